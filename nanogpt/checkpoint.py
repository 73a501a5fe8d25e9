"""Checkpoints on disk: written whole or not at all, verified, read back.

A checkpoint is nanoGPT's dict of six keys (model, optimizer, model_args, iter_num, best_val_loss, config), with our own
beside them. ckpt.pt is the best model, or the latest evaluated one; last.pt is the state that a resume continues from.
Everything loads under torch.load(weights_only=True): no file that this program reads can run code.
"""

import math
import os
import re
import warnings
import zipfile

import torch

from nanogpt.errors import UserError
from nanogpt.files import whole_file

KEYS = {"model": dict, "model_args": dict, "iter_num": int, "config": dict}
OPTIONAL_KEYS = {
    "optimizer": dict, "best_val_loss": (int, float, torch.Tensor), "points": list, "scaler": dict, "best_iter": int,
    "tokens_seen": int, "seconds": (int, float), "machine": dict, "run_id": str, "meta": (dict, type(None)),
    "data": dict, "wandb_id": (str, type(None)), "guard": dict, "evals_since_best": int, "time_over": (int, float),
    "tokenizer": str, "best_bpb": (float, type(None)),
}  # fmt: skip
GUARD_COUNTS = ("nonfinite_in_a_row", "skipped_in_a_row", "new_nonfinite", "new_spikes", "skipped")
RESUMED = ("last.pt", "ckpt.pt")  # what a resume looks at


# ----------------------------------------------------------------------------------------------
# writing


def save(checkpoint, path):
    """Writes `checkpoint` to `path` whole or not at all; OSError where that fails, with the older file intact."""
    try:
        with whole_file(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as either
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "; the earlier checkpoint there is intact" if os.path.exists(path) else ""
        raise OSError(f"could not save {path}: {reason}{kept}") from error


# ----------------------------------------------------------------------------------------------
# reading


def _read(path, mmap=False):
    """The dict in `path`, on the CPU, without the prefixes of wrapped modules; UserError where it is no checkpoint."""
    if path != path.encode(errors="replace").decode():
        mmap = False  # torch maps no file whose name is not UTF-8
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # torch.load answers bad bytes with many kinds of exception
        hostile = "weights_only" in str(error).lower()
        reason = "it holds more than plain data" if hostile else "cut, damaged, or another kind of file"
        raise UserError(f"{path} is not a checkpoint that can be read: {reason}") from None
    if problem := _problem(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this program or of nanoGPT: {problem}")
    weights = {re.sub(r"^((_orig_mod|module)\.)+", "", name): weight for name, weight in checkpoint["model"].items()}
    return checkpoint | {"model": weights}


def _problem(checkpoint):
    """What is wrong with what torch.load has read, in a few words; None where it has the form of a checkpoint."""
    if not isinstance(checkpoint, dict) or not KEYS.keys() <= checkpoint.keys():
        return f"it lacks {', '.join(KEYS)}"
    for key, kind in (KEYS | OPTIONAL_KEYS).items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            return f"its {key} is not one"
    parts = [(checkpoint["machine"], ("device_type", "dtype", "compile"))] if "machine" in checkpoint else []
    parts += [(point, ("generators", "batch", "evaluated")) for point in checkpoint.get("points", [])]
    parts += [(checkpoint["guard"], ("ring", *GUARD_COUNTS))] if "guard" in checkpoint else []
    if not all(isinstance(part, dict) and all(key in part for key in keys) for part, keys in parts):
        return "its machine, guard or points are not ones"
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in checkpoint["model"].items()):
        return "its model is not one"
    return None


def load(path):
    """The checkpoint in `path`, its bytes verified; UserError where it is missing, damaged or not one.

    torch.load does not verify the file's checksums, so a flipped bit would pass as a weight."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:  # _read() says it
        damaged = None
    except Exception:  # zipfile answers bad bytes with many kinds of exception
        damaged = "its table of contents"
    if damaged:
        raise UserError(f"{path} is damaged or cut ({damaged} does not match its check sum)")
    return _read(path)


def load_run(out_dir):
    """(checkpoint, path, remarks): the newest of RESUMED that is whole; UserError where none is."""
    # one that is not readable comes first, so that what is wrong with it is said
    paths = sorted(_saved_in(out_dir), key=lambda path: _index(path).get("iter_num", math.inf), reverse=True)
    return _first_whole(out_dir, paths, "going on from")


def load_model_file(out_dir):
    """(checkpoint, path, remarks) to sample from: ckpt.pt, or last.pt where there is no whole ckpt.pt."""
    return _first_whole(out_dir, reversed(_saved_in(out_dir)), "using")


def _first_whole(out_dir, paths, doing):
    """(checkpoint, path, remarks on those before it) of the first of `paths`, in out_dir, that is whole."""
    problems = []
    for path in paths:
        try:
            return load(path), path, [f"{problem}; {doing} {path}" for problem in problems]
        except UserError as error:
            problems.append(str(error))
    none = f"there is no checkpoint in {out_dir} (neither last.pt nor ckpt.pt): train first, or give another --out_dir"
    raise UserError("; ".join(problems) or none)


def _saved_in(out_dir):
    """The paths of RESUMED that exist in out_dir."""
    return [path for path in (os.path.join(out_dir, name) for name in RESUMED) if os.path.exists(path)]


def _index(path):
    """The checkpoint at `path` with its tensors left on disk; an empty dict where it cannot be read."""
    try:
        return _read(path, mmap=True)
    except UserError:
        return {}


def has_run(out_dir):
    """Whether out_dir holds a run that can be resumed."""
    return bool(_saved_in(out_dir))


def peek(out_dir):
    """The newest readable checkpoint in out_dir with its tensors left on disk; an empty dict where there is none."""
    found = map(_index, _saved_in(out_dir))
    return max(found, key=lambda checkpoint: checkpoint.get("iter_num", -1), default={})


def newest(out_dir):
    """What to call the checkpoint that a resume in out_dir would take."""
    there = peek(out_dir)
    return f"iteration {there['iter_num']}'s in {out_dir}" if there else "none, as nothing was saved yet"
