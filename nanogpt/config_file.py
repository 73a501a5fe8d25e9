"""Config files, Python that assigns settings and may compute them in any way; and names that are no settings.

nanoGPT runs such a file inside train.py's own globals. So its users' files read settings and use modules without an
import, and have names of their own, which are no mistakes.
"""

import ast
import builtins
import difflib
import math
import numbers
import os
import pickle
import sys
import time
import traceback

import numpy as np
import torch

from nanogpt.errors import ROOT, UserError
from nanogpt.text_file import read_text

# what nanoGPT's train.py has imported before it runs a config file
MODULES = {"math": math, "np": np, "os": os, "pickle": pickle, "sys": sys, "time": time, "torch": torch}
PLAIN = (numbers.Number, np.generic, str, bytes, type(None))
NEAR = 0.8  # difflib's ratio from which on a name is taken for a setting's: from 0.6 on, data_dir would be out_dir
# {a setting of earlier versions: (the value that switched it off, what to do in its place)}. Old config files, commands
# and checkpoints may have the first; any other value is an error.
REMOVED = {
    "spike_rewind": (0.0, "resume from ckpt.pt with another --seed or a lower rate (docs/exploding_loss.md)"),
    "plan": (False, "use tools/plan.py"),
}


def run(path, where, settings):
    """({name: value} of the settings that a config file sets in the end, its mistakes, the names that it ignores).

    `path` is that from the current folder, else that in the project. The file can read `settings`, {name: value} of all
    as they are before it. UserError, which calls the file `where`, if it fails."""
    path = path if os.path.exists(path) else os.path.join(ROOT, path)
    source = read_text(path, where)
    # The settings so far and the modules are readable like built-ins. So the scope holds only what the file has set.
    scope = {"__builtins__": vars(builtins) | MODULES | settings, "__name__": "__main__", "__file__": path}
    try:
        exec(compile(source, path, "exec"), scope)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if frame.filename == path]  # the last is the deepest line of the file
        line = own[-1] if own else getattr(error, "lineno", None)
        reason = getattr(error, "msg", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{where}, line {line}: {reason}") from None
    values = {name: value for name, value in scope.items() if name in settings}
    return values, *judge_names(scope, source, settings, where)


def nearest(name, names, ratio=0.6):
    """The one of `names` that is most like `name`, by difflib's ratio; None where that is lower for all."""
    names = [each for each in names if each not in REMOVED]
    return next(iter(difflib.get_close_matches(name, names, 1, ratio)), None)


def unknown(name, names, where):
    """The error's text for a `name`, given `where`, that is not in `names`, the settings'."""
    near = nearest(name, names)
    return f"{where}: there is no setting {name}; " + (f"did you mean {near}?" if near else "see --help")


def check_removed(values):
    """UserError where one of REMOVED is switched on in `values`, {name: value}."""
    for name, (off, advice) in REMOVED.items():
        if (value := values.get(name, off)) != off:
            raise UserError(
                f"--{name}={value}: there is no setting {name} any more: {advice}; --{name}={off} does without it"
            )


def judge_names(found, source, names, where):
    """(the errors' texts, the ignored names) of what is not in `names`, the settings', nor private, of `found`: {name:
    value} that a config file with this `source` has set.

    Modules, functions, classes, containers and other objects are the file's helpers, and so is what the file reads. A
    plain value that is near a setting's name is a mistake, unless the file reads it. The others are ignored."""
    nodes = ast.walk(ast.parse(source))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    mistakes, ignored = [], []
    for name, value in found.items():
        if name in names or name.startswith("_") or not isinstance(value, PLAIN):
            continue
        near = nearest(name, names, NEAR)
        if near and name not in read:
            mistakes.append(unknown(name, names, where))
        elif near or name not in read:
            ignored.append(name)
    return mistakes, ignored
