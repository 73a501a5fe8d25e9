"""A run on disk: saved whole or not at all, checked and read back; a model from a checkpoint.

A checkpoint is nanoGPT's dict of six keys (model, optimizer, model_args, iter_num, best_val_loss,
config), with our own beside them. ckpt.pt is the best model, or the latest evaluated; last.pt is
the state a run goes on from. Everything loads under torch.load(weights_only=True): no file that we
read can run code.
"""

import csv
import dataclasses
import glob
import os
import re
import time
import warnings
import zipfile

import torch

from configurator import UserError
from model import GPT, GPTConfig

try:
    import fcntl
except ImportError:  # Windows has none: two runs on one out_dir are not told apart there
    fcntl = None

KEYS = {"model": dict, "model_args": dict, "iter_num": int, "config": dict}
OURS = {  # what may lie beside them, or in nanoGPT's own
    "optimizer": dict, "best_val_loss": (int, float, torch.Tensor), "points": list, "scaler": dict, "best_iter": int,
    "tokens_seen": int, "seconds": (int, float), "machine": dict, "run_id": str, "meta": (dict, type(None)),
    "data": dict, "wandb_id": (str, type(None)),
}  # fmt: skip
RUN_FILES = ("ckpt.pt", "last.pt", "log.csv", "tensorboard")


# ----------------------------------------------------------------------------------------------
# writing


def save(checkpoint, path):
    """Writes `checkpoint` to `path` whole or not at all; OSError, with what was there intact.

    The bytes go to a temporary file in the same folder and are flushed to disk before it takes the
    name, and the folder after, so that neither a kill nor a power cut leaves half a file there.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        flush_folder(os.path.dirname(path) or ".")
    except (OSError, RuntimeError) as error:  # torch reports a failed write as either
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "; the earlier checkpoint there is intact" if os.path.exists(path) else ""
        raise OSError(f"could not save {path}: {reason}{kept}") from error


def flush_folder(folder):
    """Makes a rename in `folder` survive a power cut. Windows cannot, and needs no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def claim(out_dir):
    """Takes `out_dir`, made where it is missing, for this process until it ends; UserError if a run has it.

    Returns the open lock, which must be kept. The system drops it with the process, however that ends.
    """
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = open(os.path.join(out_dir, ".lock"), "w")
    except (OSError, ValueError) as error:
        raise OSError(f"cannot write to --out_dir={out_dir}: {getattr(error, 'strerror', error)}") from error
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {out_dir}: stop it, or choose another --out_dir") from None
        except OSError as error:
            # A file system without locks: go on, as there is nothing to be told from it.
            warnings.warn(f"{out_dir} cannot be locked ({error.strerror})", stacklevel=2)
    return lock


def sweep(out_dir):
    """Removes what saves that were cut short have left in `out_dir`, which must be claimed."""
    for name in RUN_FILES:
        for leftover in glob.glob(os.path.join(glob.escape(out_dir), f"{name}*.tmp")):
            os.remove(leftover)


def has_lock(out_dir):
    """Whether a run has ever claimed out_dir, so that one may be at work there now."""
    return os.path.exists(os.path.join(out_dir, ".lock"))


def move_aside(out_dir):
    """Moves an earlier run's files into a dated folder inside out_dir. Returns its path, or None if there are none."""
    there = [name for name in RUN_FILES if os.path.exists(os.path.join(out_dir, name))]
    if not there:
        return None
    folder = dated = os.path.join(out_dir, time.strftime("%Y-%m-%d_%H-%M-%S"))
    for k in range(2, 100):
        if not os.path.exists(folder):
            break
        folder = f"{dated}_{k}"
    os.makedirs(folder)
    for name in there:
        os.replace(os.path.join(out_dir, name), os.path.join(folder, name))
    return folder


# ----------------------------------------------------------------------------------------------
# the log


def read_log(path):
    """The whole rows of a log.csv as dicts of texts; none where there is no such file."""
    rows, names = [], None
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                cells = line.rstrip("\n").split(",")
                names = names or cells
                row = dict(zip(names, cells, strict=False))
                numbered = re.fullmatch("[0-9]{1,18}", row.get("iter", "")) and row.get("kind") in ("train", "eval")
                # what a full disk or a power cut has torn lacks its end
                if numbered and len(cells) == len(names) and line.endswith("\n"):
                    rows.append(row)
    return rows


class RunLog:
    """What a run has printed, as a table: a row a logged iteration and one an evaluation.

    Appended to out_dir/log.csv, and to TensorBoard and Weights & Biases where they are asked for.
    """

    columns = ("iter", "kind", "train_loss", "val_loss", "lr", "grad_norm", "ms", "tokens_per_s", "mfu", "tokens_seen")

    def __init__(self, out_dir, iter_num, evaluated):
        """Goes on before iteration `iter_num`, after its evaluation if that is `evaluated`: rows that a
        stopped run wrote beyond the checkpoint it goes on from will come again, and are taken out."""
        self.path = os.path.join(out_dir, "log.csv")
        try:
            before = iter_num, evaluated  # an iteration's evaluation comes before its training
            rows = [row for row in read_log(self.path) if (int(row["iter"]), row["kind"] == "train") < before]
            with open(self.path + ".tmp", "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
            os.replace(self.path + ".tmp", self.path)
            self.file = open(self.path, "a", newline="", encoding="utf-8")
        except OSError as error:
            raise self.failure(error) from error
        self.writer = csv.DictWriter(self.file, self.columns)
        self.board = self.wandb = None
        self.here = [row for row in rows if int(row["iter"]) == iter_num]  # its evaluation, where that is done

    def add_tensorboard(self, out_dir, iter_num):
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(os.path.join(out_dir, "tensorboard"), purge_step=iter_num)
        for row in self.here:  # purged with the iteration, and will not come again
            self.to_board(int(row["iter"]), row["kind"], {k: float(row[k]) for k in self.columns[2:] if row[k]})

    def add_wandb(self, out_dir, project, name, config, id):
        """Returns the run's id there, with which a resumed run goes on in it."""
        import wandb

        try:
            self.wandb = wandb.init(project=project, name=name, config=config, dir=out_dir, id=id, resume="allow")
        except Exception as error:  # no login, no network, ...
            raise UserError(
                f"--wandb_log=True: wandb does not start ({' '.join(str(error).split())[:200]}): type wandb login, "
                "or set WANDB_MODE=offline, or add --wandb_log=False"
            ) from None
        self.wandb.define_metric("*", step_metric="iter")  # a row that comes again lands on the one before
        return self.wandb.id

    def to_board(self, iter_num, kind, numbers):
        for name, value in numbers.items():
            self.board.add_scalar(f"{kind}/{name}", value, iter_num)
        self.board.flush()

    def failure(self, error):
        return OSError(f"could not write {self.path}: {error.strerror}; the checkpoints there are intact")

    def write(self, **row):
        try:
            self.writer.writerow(row)
            self.file.flush()
        except OSError as error:
            raise self.failure(error) from error
        numbers = {name: value for name, value in row.items() if name not in ("iter", "kind") and value is not None}
        if self.board:
            self.to_board(row["iter"], row["kind"], numbers)
        if self.wandb:
            self.wandb.log({"iter": row["iter"], **{f"{row['kind']}/{k}": v for k, v in numbers.items()}})


# ----------------------------------------------------------------------------------------------
# reading


def _read(path, mmap=False):
    """The dict in `path`, on the CPU, prefixes of wrapped modules taken off; UserError where it is no checkpoint."""
    if path != path.encode(errors="replace").decode():
        mmap = False  # torch maps no file whose name is not UTF-8
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # torch.load answers bad bytes with many kinds
        hostile = "weights_only" in str(error).lower()
        reason = "it holds more than plain data" if hostile else "cut, damaged, or another kind of file"
        raise UserError(f"{path} is not a checkpoint that can be read: {reason}") from None
    for key, kind in KEYS.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise UserError(f"{path} is not a checkpoint of this program or of nanoGPT: no {key} in it")
    for key, kind in OURS.items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            raise UserError(f"{path} is not a checkpoint of this program or of nanoGPT: its {key} is not one")
    complete = [(checkpoint["machine"], ("device_type", "dtype", "compile"))] if "machine" in checkpoint else []
    complete += [(point, ("generators", "batch", "evaluated")) for point in checkpoint.get("points", [])]
    if not all(isinstance(part, dict) and all(key in part for key in keys) for part, keys in complete):
        raise UserError(f"{path} is not a checkpoint of this program or of nanoGPT: its machine or points are not ones")
    weights = checkpoint["model"]
    for name, tensor in list(weights.items()):
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path} is not a checkpoint of this program or of nanoGPT: its model is not one")
        bare = name
        while bare.startswith(("_orig_mod.", "module.")):
            bare = bare.partition(".")[2]
        if bare != name:
            weights[bare] = weights.pop(name)
    return checkpoint


def load(path):
    """The checkpoint in `path`, its bytes verified; UserError where it is missing, damaged or not one.

    torch.load does not look at the file's check sums, so a flipped bit would pass as a weight."""
    if not os.path.exists(path):
        raise UserError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception:
        damaged = "its table of contents"
    if damaged:
        raise UserError(f"{path} is damaged or cut ({damaged} does not match its check sum)")
    return _read(path)


def load_run(out_dir):
    """(checkpoint, path, remarks): the newer of last.pt and ckpt.pt that is whole.

    `remarks` are lines about a file that had to be passed over. UserError where neither can be read.
    """
    found, problems = [], []
    for name in ("last.pt", "ckpt.pt"):
        path = os.path.join(out_dir, name)
        if os.path.exists(path):
            try:
                found.append((_read(path, mmap=True)["iter_num"], path))  # reads the index, not the weights
            except UserError as error:
                problems.append(str(error))
    for _, path in sorted(found, reverse=True):
        try:
            return load(path), path, [f"{problem}; going on from {path}" for problem in problems]
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    raise UserError(f"there is no checkpoint in {out_dir} (neither last.pt nor ckpt.pt)")


def has_run(out_dir):
    """Whether out_dir holds a run to go on from."""
    return any(os.path.exists(os.path.join(out_dir, name)) for name in ("last.pt", "ckpt.pt"))


def peek(out_dir):
    """The newest readable checkpoint in out_dir with its tensors left on disk; an empty dict where there is none."""
    best = {}
    for name in ("last.pt", "ckpt.pt"):
        try:
            found = _read(os.path.join(out_dir, name), mmap=True)
        except UserError:
            continue
        best = max(best, found, key=lambda checkpoint: checkpoint.get("iter_num", -1))
    return best


def newest(out_dir):
    """What to call the checkpoint that a run in out_dir would go on from."""
    there = peek(out_dir)
    return f"iteration {there['iter_num']}'s in {out_dir}" if there else "none, as nothing was saved yet"


def load_model_file(out_dir):
    """(checkpoint, path, remarks) to sample from: ckpt.pt, else last.pt where there is no whole ckpt.pt."""
    best, last = (os.path.join(out_dir, name) for name in ("ckpt.pt", "last.pt"))
    if not os.path.isdir(out_dir):
        raise UserError(f"there is no folder {out_dir}: train first, or give another --out_dir")
    try:
        return load(best), best, []
    except UserError as error:
        if not os.path.exists(last):
            raise
        problem = error
    try:
        return load(last), last, [f"{problem}; using {last}"]
    except UserError as error:
        raise UserError(f"{problem}; {error}") from None


def build_model(checkpoint, path, dropout=0.0):
    """The GPT with the arguments and weights in `checkpoint`, read from `path`; UserError where they disagree."""
    try:
        config, weights = GPTConfig(**{**checkpoint["model_args"], "dropout": dropout}), checkpoint["model"]
        sizes = {"wte": (config.vocab_size, config.n_embd), "wpe": (config.block_size, config.n_embd)}
        for name, size in sizes.items():  # before anything of that size is made
            if weights[f"transformer.{name}.weight"].shape != size:
                raise UserError(f"{name} is {tuple(weights[f'transformer.{name}.weight'].shape)}, not {size}")
        if sum(name.endswith(".ln_1.weight") for name in weights) != config.n_layer:
            raise UserError(f"they are not of n_layer = {config.n_layer}")
        model = GPT(config)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path}: its weights do not fit its model_args: {detail[:300]}") from None
    return model


def model_args(config):
    """A GPTConfig as checkpoints hold it: nanoGPT's seven arguments, and ours only where they are not the default."""
    arguments = dataclasses.asdict(config)
    if arguments["activation"] == "gelu":
        del arguments["activation"]
    return arguments


def restore_optimizer(optimizer, state, path):
    """Loads the moments and step counts in `state`; lr, betas, decay and fused stay what the settings say."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    here, there = ("muon" if found else "adamw" for found in (hasattr(optimizer, "parts"), "muon" in (state or {})))
    if here != there:
        raise UserError(f"{path}: the run's optimizer is {there}, and a resume cannot change it to {here}")
    try:
        for name, part in getattr(optimizer, "parts", {"": optimizer}).items():
            part.load_state_dict(fitted(part, state[name] if name else state))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise UserError(f"{path}: its optimizer state does not fit this model: {error}") from None
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)


def whole(state, keep=True):
    """`state`, dicts and lists of tensors, with every sharded tensor put together, on the CPU; None in its place
    without `keep`, so that only one of them is there at a time. Every process must call it."""
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    if hasattr(state, "full_tensor"):  # a DTensor
        together = state.full_tensor()
        return together.cpu() if keep else None
    return state


def fitted(optimizer, state):
    """An optimizer's state_dict of whole tensors with the moments of each parameter as large as it is, and sharded
    as it is: torch checks neither. Those of positions that a shorter context has dropped go. ValueError otherwise."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
    result = {}
    for i, values in state["state"].items():
        p, result[i] = parameters[i], {}
        if values.keys() != names:
            raise ValueError(f"parameter {i} has {', '.join(map(str, values))}")
        for name, value in values.items():
            if name == "step":
                value = value.to(p.device, torch.float32)  # fused AdamW counts on the device, as not all do
            else:
                value = value[: len(p)].clone() if len(value) > len(p) else value
                if value.shape != p.shape:
                    raise ValueError(f"{name} of parameter {i} is {tuple(value.shape)}, not {tuple(p.shape)}")
                if hasattr(p, "device_mesh"):  # a DTensor, whose module takes half a second to import
                    from torch.distributed.tensor import distribute_tensor

                    value = distribute_tensor(value, p.device_mesh, p.placements)
            result[i][name] = value
    return {**state, "state": result}


# ----------------------------------------------------------------------------------------------
# the random numbers' state


def generator_states(device, batches):
    """Where every generator that a run draws from stands: the CPU's and the device's global one, and `batches`."""
    states = {"cpu": torch.get_rng_state(), "batches": batches.get_state()}
    kind = torch.device(device).type
    if kind != "cpu":
        states[kind] = getattr(torch, kind).get_rng_state()
    return states


def restore_generators(states, device, batches):
    """Puts the generators back to where generator_states() saw them, as far as this device has them."""
    kind = torch.device(device).type
    try:
        torch.set_rng_state(states["cpu"])
        if kind != "cpu" and kind in states:
            getattr(torch, kind).set_rng_state(states[kind])
        batches.set_state(states["batches"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise UserError(f"the checkpoint's random generators cannot be restored: {error}") from None
