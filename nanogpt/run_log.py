"""What a run tells: its start-up line, progress, log.csv, TensorBoard, Weights & Biases, and its last lines."""

import csv
import math
import os
import re

import torch

from nanogpt.checkpoint import has_run, newest
from nanogpt.device import peak_memory
from nanogpt.errors import UserError, command, require
from nanogpt.files import whole_file
from nanogpt.progress import duration

# ----------------------------------------------------------------------------------------------
# lines for the user


def start_line(processes, device, dtype, compile, optimizer, sharding, mfu):
    """The line that says what was picked; `mfu` is the run's RunningMFU, which knows the peak."""
    tflops = format(mfu.peak / 1e12, ".1f" if mfu.peak > 1e13 else ".4g")
    several = processes.several
    return (
        f"{processes.world_size} x {device}, {torch.get_num_threads()} CPU threads each, {dtype}, compile {compile}, "
        f"{optimizer}, {sharding if several else 'one process'}; peak {tflops} TFLOPS ({mfu.source})"
        f"{'; mfu is per device, tokens/s over all' if several else ''}"
    )


def step_line(iter_num, losses):
    """The line of an evaluation, whose `losses` are {split: nats a token}, and more."""
    return f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"


def last_lines(out_dir, progress, iter_num, device):
    """The last lines of a run: how it has ended, and what to type next. `progress` is the run's Progress."""
    if not progress.has_ended(iter_num):
        resume = command("train.py", "--init_from=resume", f"--out_dir={out_dir}")
        to_type = f"; type: {resume}" if has_run(out_dir) else ""
        return [f"stopped at iteration {iter_num}; the checkpoint to go on from is {newest(out_dir)}{to_type}"]
    why = [f"ended by {progress.ended_by} at iteration {iter_num}"] if progress.ended_by else []
    best = f"best val loss {progress.best_val_loss:.4f} at iteration {progress.best_iter}"
    best += f", {progress.best_bpb:.4f} bits per byte" if progress.best_bpb is not None else ""
    return [
        *why,
        f"{best if math.isfinite(progress.best_val_loss) else 'no val loss yet'}, "
        f"{progress.tokens_seen:,} tokens seen, {duration(progress.seconds())} in all, at most {peak_memory(device)}",
        f"to see what it writes: {command('sample.py', f'--out_dir={out_dir}')}",
        f"to see the curves: {command('tools/plot.py', out_dir)}",
    ]


# ----------------------------------------------------------------------------------------------
# log.csv, TensorBoard, Weights & Biases


def check_loggers(folder, tensorboard_log, wandb_log):
    """UserError if a logger is asked for whose library is not installed. `folder` is a RunFolder: only rank 0 logs."""
    if folder.writes and wandb_log:
        require("--wandb_log=True", "wandb")
    if folder.writes and tensorboard_log:
        require("--tensorboard_log=True", "tensorboard")


# `train` and `eval`. Logs of older versions may have others, which stay: where such a run went back to an earlier
# iteration, a row `back`, and before it the rows that this has undone
KINDS = r"(undone )?(train|eval)|back \(seed [0-9]+\)"


def read_log(path):
    """The complete rows of a log.csv as dicts of texts; none where the file does not exist."""
    rows, names = [], None
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                cells = line.rstrip("\n").split(",")
                names = names or cells
                row = dict(zip(names, cells, strict=False))
                known = re.fullmatch("[0-9]{1,18}", row.get("iter", "")) and re.fullmatch(KINDS, row.get("kind", ""))
                # a row that a full disk, a power cut or a write under way has cut short lacks its end
                if known and len(cells) == len(names) and line.endswith("\n"):
                    rows.append(row)
    return rows


class RunLog:
    """What a run has printed, as a table: a row for each logged iteration and each evaluation.

    Rank 0 appends the rows to out_dir/log.csv, and sends them to the loggers that are asked for. wandb_id is that of
    the W&B run, or None.
    """

    columns = (
        "iter", "kind", "train_loss", "val_loss", "lr", "grad_norm", "ms", "tokens_per_s", "mfu", "tokens_seen",
        "val_bpb",
    )  # fmt: skip

    def __init__(self, folder, iter_num, evaluated, tensorboard=False, wandb=None):
        """Continues the log in `folder`, a RunFolder, before iteration `iter_num`, or after its evaluation if that is
        `evaluated`. Later rows are removed: the resumed run writes them again.

        wandb: arguments of WeightsAndBiases, or None."""
        self.writes, self.loggers, self.wandb_id = folder.writes, [], None
        if not self.writes:
            return
        self.path = os.path.join(folder.out_dir, "log.csv")
        place = iter_num, evaluated  # an iteration's evaluation comes before its training
        rows = read_log(self.path)
        rows = [r for r in rows if r["kind"] not in ("train", "eval") or (int(r["iter"]), r["kind"] == "train") < place]
        try:
            with whole_file(self.path, "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
            self.file = open(self.path, "a", newline="", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from error
        self.writer = csv.DictWriter(self.file, self.columns)
        if tensorboard:
            here = [row for row in rows if row["iter"] == str(iter_num) and row["kind"] == "eval"]
            self.loggers.append(TensorBoard(folder.out_dir, iter_num, here))
        if wandb:
            self.loggers.append(WeightsAndBiases(**wandb, folder=folder.out_dir))
            self.wandb_id = self.loggers[-1].run.id

    def write(self, **row):
        """Appends a row; `iter`, `kind` and any other of the columns."""
        if not self.writes:
            return
        try:
            self.writer.writerow(row)
            self.file.flush()
        except OSError as error:
            raise self._failure(error) from error
        for logger in self.loggers:
            logger.write(row, {k: v for k, v in row.items() if k not in ("iter", "kind") and v is not None})

    def _failure(self, error):
        return OSError(f"could not write {self.path}: {error.strerror}; the checkpoints there are intact")


class TensorBoard:
    def __init__(self, out_dir, iter_num, rows_here):
        """rows_here: those of `iter_num` in log.csv. purge_step removes them, and a resumed run does not write them."""
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(os.path.join(out_dir, "tensorboard"), purge_step=iter_num)
        for row in rows_here:
            self.write(row | {"iter": iter_num}, {k: float(row[k]) for k in RunLog.columns[2:] if row.get(k)})

    def write(self, row, numbers):
        for name, value in numbers.items():
            self.board.add_scalar(f"{row['kind']}/{name}", value, row["iter"])
        self.board.flush()


class WeightsAndBiases:
    def __init__(self, project, name, config, id, folder):
        """Starts a W&B run, or with the `id` of a saved one continues that. UserError where wandb does not start."""
        import wandb

        try:
            self.run = wandb.init(project=project, name=name, config=config, dir=folder, id=id, resume="allow")
        except Exception as error:  # no login, no network, ...
            raise UserError(
                f"--wandb_log=True: wandb does not start ({' '.join(str(error).split())[:200]}): type wandb login, "
                "or set WANDB_MODE=offline, or add --wandb_log=False"
            ) from None
        self.run.define_metric("*", step_metric="iter")  # a row that comes again replaces the one before
        self.last_mfu = None

    def write(self, row, numbers):
        self.last_mfu = row.get("mfu") or self.last_mfu
        values = {f"{row['kind']}/{name}": value for name, value in numbers.items()}
        if row["kind"] == "eval":  # nanoGPT's keys too, for dashboards that were made for it
            values |= {"train/loss": row["train_loss"], "val/loss": row["val_loss"], "lr": row["lr"]}
            values |= {"mfu": self.last_mfu * 100} if self.last_mfu else {}
        self.run.log({"iter": row["iter"], **values})
