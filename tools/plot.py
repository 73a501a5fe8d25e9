"""Draws the loss curves of one or more runs, from the log.csv in their folders.

    python tools/plot.py out-shakespeare-char
    python tools/plot.py out-a out-b out-c --to=compare.png
    python tools/plot.py out-a --norm=True

It may be called while a run is training.
"""

import os
import sys
import textwrap
from contextlib import suppress
from itertools import combinations

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import numpy as np

from configurator import configure
from data.tokens import Tokens
from nanogpt import checkpoint as ckpt
from nanogpt.errors import UserError, command, require
from nanogpt.run_log import read_log

bpb = False  # draw bits per byte in place of nats a token, to compare runs with different tokens
to = ""  # the picture, its kind by its name (.svg, .pdf; without one .png); empty: loss.png in the first OUT_DIR
norm = False  # draw the gradient norm too, beneath the losses

out_dirs = []
configure(globals(), positional=out_dirs.append)
if not out_dirs:
    raise UserError(f"give the folder of a run, or of several: {command('tools/plot.py')} OUT_DIR ...")
require("tools/plot.py", "matplotlib.figure")
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

POINTS = 400  # of a longer curve, this many means of consecutive points are drawn
# Okabe and Ito's colours, which colour-blind people can tell apart, in an order whose greys differ
COLOURS = ("#000000", "#d55e00", "#56b4e9", "#0072b2", "#e69f00", "#009e73", "#cc79a7")
NO_MATTER = (  # settings that do not change a curve
    "out_dir init_from eval_only save_interval always_save_checkpoint log_interval tensorboard_log wandb_log "
    "wandb_project wandb_run_name backend peak_flops"
).split()


def curves(out_dir):
    """The tables of the training rows and of the evaluations in out_dir/log.csv; UserError where there is none."""
    with suppress(ValueError):  # a cell that is no number
        if rows := read_log(os.path.join(out_dir, "log.csv")):
            return [table([row for row in rows if row["kind"] == kind]) for kind in ("train", "eval")]
    raise UserError(f"there is no log.csv in {out_dir}, or it has no rows yet, or it is not a log of train.py")


def table(rows):
    """{column: array} of rows of a log; NaN where a cell is empty, or an older log lacks the column."""
    columns = ("iter", "train_loss", "val_loss", "lr", "grad_norm", "val_bpb")
    return {name: np.array([float(row.get(name) or "nan") for row in rows]) for name in columns}


def in_bits_per_byte(train, evals, out_dir):
    """Replaces the losses in both tables, nats a token, by bits per byte. UserError if the log has none.

    Only val losses were measured in both. A token of the training part has as many bytes as one of the val part."""
    factors = evals["val_bpb"] / evals["val_loss"]
    factors = factors[np.isfinite(factors)]
    if not len(factors):
        raise UserError(f"{out_dir} has no bits per byte: train.py counts them where the tokens' bytes are known")
    train["train_loss"] *= factors.mean()
    evals["train_loss"] *= factors.mean()
    evals["val_loss"] = evals["val_bpb"]


def labels(out_dirs, checkpoints):
    """A text for each run: the settings in which it differs from the others, or its folder where none are known."""
    configs = [checkpoint.get("config", {}) for checkpoint in checkpoints]
    known = [config for config in configs if config]
    names = [name for name in dict.fromkeys(k for config in known for k in config)
             if name not in NO_MATTER and any(config.get(name) != known[0].get(name) for config in known)]  # fmt: skip
    texts = [", ".join(f"{name}={config[name]}" for name in names if name in config) for config in configs]
    folders = [os.path.basename(os.path.abspath(out_dir)) for out_dir in out_dirs]
    return [f"{text} ({folder})" if text and texts.count(text) > 1 else text or folder
            for text, folder in zip(texts, folders, strict=True)]  # fmt: skip


def thin(x, y, of=np.mean):
    """The curve itself, or where it has more than POINTS points, that many means (or `of`) of consecutive ones."""
    parts = [part for part in np.array_split(np.arange(len(x)), POINTS) if len(part)]
    return [x[part].mean() for part in parts], [of(y[part]) for part in parts]


logs = [curves(out_dir) for out_dir in out_dirs]
checkpoints = [ckpt.peek(out_dir) for out_dir in out_dirs]
tokens = [Tokens.kept_in(each, out_dir) for each, out_dir in zip(checkpoints, out_dirs, strict=True) if each]
if not bpb and any(one.same_as(other) is False for one, other in combinations(tokens, 2)):
    print("these runs have different tokens, so their losses do not compare: --bpb=True draws bits per byte")
figure = Figure(figsize=(9, 8 if norm else 6), layout="constrained")
axes, *beneath = figure.subplots(1 + norm, sharex=True, squeeze=False, height_ratios=(3, 1)[: 1 + norm]).flat
lr_axes = axes.twinx()
lr_axes.set_ylabel("learning rate", color="0.5")
lr_axes.tick_params(colors="0.5")
axes.set(ylabel="loss (bits per byte)" if bpb else "loss (nats a token)", zorder=1, frame_on=False)  # over lr_axes
axes.grid(color="0.92")
for norm_axes in beneath:
    norm_axes.set(ylabel="gradient norm", yscale="log")
    norm_axes.grid(color="0.92")
(beneath or [axes])[0].set_xlabel("iteration")

entries, texts = [], []
for i, ((train, evals), label) in enumerate(zip(logs, labels(out_dirs, checkpoints), strict=True)):
    if bpb:
        in_bits_per_byte(train, evals, out_dirs[i])
    colour = COLOURS[i % len(COLOURS)]
    lr_axes.plot(*thin(train["iter"], train["lr"]), ":", color="0.75")
    axes.plot(*thin(train["iter"], train["train_loss"]), color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(evals["iter"], evals["train_loss"], "--", color=colour, linewidth=1.2)
    entries += axes.plot(evals["iter"], evals["val_loss"], color=colour, linewidth=1.8)
    if np.isfinite(evals["val_loss"]).any():
        best = np.nanargmin(evals["val_loss"])
        at, loss = evals["iter"][best], evals["val_loss"][best]
        axes.plot(at, loss, "*", color=colour, markersize=17, markeredgecolor="white", zorder=5)
        label += f": best val loss {loss:.4f}{' bits per byte' * bpb} at iteration {at:.0f}"
    for norm_axes in beneath:  # of consecutive norms the largest: a mean would hide a spike
        finite = np.isfinite(train["grad_norm"])
        norm_axes.plot(*thin(train["iter"][finite], train["grad_norm"][finite], np.max), color=colour, linewidth=0.8)
    texts.append(textwrap.fill(label, 110))
kinds = [("-", "0.3", "val loss, star: the best"), ("--", "0.3", "train loss, as evaluated"),
         ("-", "0.75", "loss of the training batches"), (":", "0.75", "learning rate")]  # fmt: skip
kinds = [Line2D([], [], linestyle=line, color=grey, label=text) for line, grey, text in kinds]
lr_axes.set_ylim(bottom=0)
figure.legend(handles=kinds, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
legend = figure.legend(entries, ["run"] * len(entries), loc="outside lower left", frameon=False, fontsize=9)
for shown, text in zip(legend.get_texts(), texts, strict=True):
    shown.set_parse_math(False)  # a $ in a folder's name begins no formula
    shown.set_text(text)  # here, as a legend leaves out a label that begins with _

to = (to or os.path.join(out_dirs[0], "loss.png")).rstrip(".")
if not os.path.splitext(to)[1]:
    to += ".png"  # as matplotlib calls it then
try:
    figure.savefig(to, dpi=150)
except ValueError as error:  # a kind of picture that there is not
    raise UserError(f"--to={to}: {error}") from None
print(f"wrote {to}")
