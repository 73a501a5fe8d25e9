"""What a run tells: its start-up line; and log.csv, TensorBoard, Weights & Biases."""

import csv
import os
import re
import time

import torch

from nanogpt.errors import UserError, require
from nanogpt.files import whole_file


def start_line(processes, device, dtype, compile, optimizer, sharding, mfu):
    """The line that says what was picked; `mfu` is the run's RunningMFU, which knows the peak."""
    tflops = format(mfu.peak / 1e12, ".1f" if mfu.peak > 1e13 else ".4g")
    several = processes.several
    return (
        f"{processes.world_size} x {device}, {torch.get_num_threads()} CPU threads each, {dtype}, compile {compile}, "
        f"{optimizer}, {sharding if several else 'one process'}; peak {tflops} TFLOPS ({mfu.source})"
        f"{'; mfu is per device, tokens/s over all' if several else ''}"
    )


def check_loggers(folder, tensorboard_log, wandb_log):
    """UserError if a logger is asked for whose library is not installed. `folder` is a RunFolder: only rank 0 logs."""
    if folder.writes and wandb_log:
        require("--wandb_log=True", "wandb")
    if folder.writes and tensorboard_log:
        require("--tensorboard_log=True", "tensorboard")


def read_log(path):
    """The complete rows of a log.csv as dicts of texts; None if the file has no header of ours: it is something else.

    Their kinds are train and eval; logs of older versions may have `back`, where a run went back to an earlier
    iteration, and before it the rows `undone`. A file that is missing or empty has no rows. A spreadsheet may have put
    a byte order mark, quotes, or blanks after commas into it. Each line is read by itself, so that a quote which is cut
    swallows no later row."""
    rows, names = [], None
    if os.path.exists(path):
        with open(path, encoding="utf-8-sig", errors="replace") as f:
            for line in f:
                try:
                    [cells] = csv.reader([line.rstrip("\n")], skipinitialspace=True)
                except (csv.Error, ValueError):  # a blank line, or one that is too long
                    continue
                names = names or cells
                row = dict(zip(names, cells, strict=False))
                numbered = re.fullmatch("[0-9]{1,18}", row.get("iter", ""))
                # a row that a full disk, a power cut or a write under way has cut short lacks its end
                if numbered and len(cells) == len(names) and line.endswith("\n"):
                    rows.append(row)
    return rows if names is None or {"iter", "kind"} <= {*names} else None


class RunLog:
    """What a run has printed, as a table: a row for each logged iteration and each evaluation.

    Rank 0 appends the rows to out_dir/log.csv, and sends them to the other loggers that are asked for. One that fails
    is left out from then on, and the run goes on. wandb_id is that of the W&B run, or None."""

    def __init__(self, folder, iter_num, evaluated, tensorboard_log, wandb_log, **wandb):
        """Continues the log in `folder`, a RunFolder, before iteration `iter_num`, or after its evaluation if that is
        `evaluated`. wandb: arguments of WeightsAndBiases; its id is None in a new run."""
        self.say, self.loggers, self.wandb_id = folder.processes.say, {}, wandb["id"]
        if not folder.writes:
            return
        table = self.loggers["log.csv"] = Table(os.path.join(folder.out_dir, "log.csv"), iter_num, evaluated, self.say)
        if tensorboard_log:
            self.loggers["TensorBoard"] = TensorBoard(folder.out_dir, iter_num, table.rows_here)
        if wandb_log:
            self.loggers["Weights & Biases"] = run = WeightsAndBiases(**wandb, folder=folder.out_dir)
            self.wandb_id = run.id

    def write(self, **row):
        """Appends a row; `iter`, `kind` and any other of the columns."""
        for name, logger in list(self.loggers.items()):
            try:
                logger.write(row, {k: v for k, v in row.items() if k not in ("iter", "kind") and v is not None})
            except Exception as error:  # a full disk, a library's own process that has died: the run is worth more
                del self.loggers[name]
                reason = getattr(error, "strerror", None) or f"{type(error).__name__} {error}"
                self.say(f"{name} cannot be written any more ({' '.join(reason.split())}): the run goes on without it")


class Table:
    """log.csv."""

    columns = ("iter", "kind", "train_loss", "val_loss", "lr", "grad_norm", "ms", "tokens_per_s", "mfu", "tokens_seen",
               "val_bpb")  # fmt: skip

    def __init__(self, path, iter_num, evaluated, say):
        """Continues the file before iteration `iter_num`, or after its evaluation if that is `evaluated`.

        Later rows are removed: the resumed run writes them again. A file that is no log is kept under another name."""
        rows = read_log(path)
        if rows is None:
            aside = f"{path}.{time.strftime('%Y-%m-%d_%H-%M-%S')}"
            os.replace(path, aside)
            say(f"{path} is not a log of train.py (a spreadsheet may have saved it): it is kept as {aside}")
        place = iter_num, evaluated  # an iteration's evaluation comes before its training
        rows = [
            row for row in rows or []
            if row["kind"] not in ("train", "eval") or (int(row["iter"]), row["kind"] == "train") < place
        ]  # fmt: skip
        self.rows_here = [row for row in rows if row["iter"] == str(iter_num) and row["kind"] == "eval"]
        with whole_file(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, self.columns)

    def write(self, row, numbers):
        self.writer.writerow(row)
        self.file.flush()


class TensorBoard:
    def __init__(self, out_dir, iter_num, rows_here):
        """rows_here: those of `iter_num` in log.csv. purge_step removes them, and a resumed run does not write them."""
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(os.path.join(out_dir, "tensorboard"), purge_step=iter_num)
        for row in rows_here:
            self.write(row | {"iter": iter_num}, {k: float(row[k]) for k in Table.columns[2:] if row.get(k)})

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
        self.id, self.last_mfu = self.run.id, None

    def write(self, row, numbers):
        self.last_mfu = row.get("mfu") or self.last_mfu
        values = {f"{row['kind']}/{name}": value for name, value in numbers.items()}
        if row["kind"] == "eval":  # nanoGPT's keys too, for dashboards that were made for it
            values |= {"train/loss": row["train_loss"], "val/loss": row["val_loss"], "lr": row["lr"]}
            values |= {"mfu": self.last_mfu * 100} if self.last_mfu else {}
        self.run.log({"iter": row["iter"], **values})
