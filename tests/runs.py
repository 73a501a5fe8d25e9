"""What the tests read of a run: its printed losses, beside nanoGPT's, its log and its files."""

import csv

import pytest
import torch
from conftest import GOLDEN, SYNTHETIC

DEFAULTS = dict(seed=1337, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True)  # nanoGPT's
TOKENS = (lambda i: (i * i * 7 + i // 3) % 61)(torch.arange(24000))
TOKENS = {"train": TOKENS[:20000], "val": TOKENS[20000:]}


def assert_same_losses(printed, expected):
    """Equal as printed; where not, at most 1e-4 off, on at most 2 % of the lines."""
    assert [line[:2] for line in printed] == [line[:2] for line in expected]
    off = []
    for ours, theirs in zip(printed, expected, strict=True):
        for a, b in zip(ours[2:], theirs[2:], strict=True):
            difference = abs(float(a) - float(f"{float(b):.4f}"))
            assert difference < 1.5e-4, (ours, theirs)
            if difference:
                off.append((ours, theirs))
    assert len(off) <= 0.02 * len(printed), off


def assert_near(printed, expected):
    """Within 1e-4, figures of a plain reimplementation, which rounds in other places."""
    assert [line[:2] for line in printed] == [line[:2] for line in expected]
    for ours, theirs in zip(printed, expected, strict=True):
        assert [float(a) for a in ours[2:]] == pytest.approx(theirs[2:], abs=1e-4), (ours, theirs)


def places(losses):
    """What was printed, and at which iterations, without the figures."""
    return [line[:2] for line in losses]


def assert_close(printed, expected):
    """Within 1e-4 of figures that are printed to four digits themselves, or computed another way."""
    assert places(printed) == places(expected)
    for line, numbers in zip(printed, expected, strict=True):
        assert [float(x) for x in line[2:]] == pytest.approx(numbers[2:], abs=1.01e-4), (line, numbers)


def val_losses(result):
    return [float(line[3]) for line in result.losses if line[0] == "step"]


def golden(name):
    with open(GOLDEN / name, newline="") as f:
        rows = list(csv.DictReader(f))
    return [(r["kind"], int(r["n"]), r["loss"], *([r["val_loss"]] if r["kind"] == "step" else [])) for r in rows]


def load(path):
    return torch.load(path)  # torch's default since 2.6: weights_only=True


def content(out_dir):
    return {path.name: path.read_bytes() for path in out_dir.iterdir() if path.is_file()}


def as_nanogpt_saves(path, to, n_layer=2):
    """`path`, one of our checkpoints, with what nanoGPT's train.py saves from a compiled model and nothing else."""
    saved = load(path)
    config = {name: saved["config"][name] for name in SYNTHETIC | DEFAULTS if name not in ("seed", "peak_flops")}
    config |= dict(backend="nccl", device="cuda", dtype="bfloat16", compile=True, init_from="scratch", eval_only=False)
    torch.save(
        {
            "model": {f"_orig_mod.{name}": weight for name, weight in saved["model"].items()},
            "optimizer": saved["optimizer"],
            "model_args": saved["model_args"],
            "iter_num": saved["iter_num"],
            "best_val_loss": torch.tensor(float(saved["best_val_loss"])),
            "config": config,
        },
        to,
    )
    return to
