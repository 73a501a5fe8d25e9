"""Settings from config files and --key=value arguments.

A script's settings are its plain module globals. configure(globals()) applies config files and arguments to them, later
ones winning. Importing this module also has mistakes printed as one line (nanogpt/errors.py).
"""

import ast
import builtins
import difflib
import math
import os
import re
import sys
import types

from nanogpt.errors import ROOT, UserError


def setting_names(namespace):
    """The names in a script's globals that are settings: lower-case, public, and plain values."""
    plain = (bool, int, float, str)
    return [k for k, v in namespace.items() if not k.startswith("_") and k == k.lower() and isinstance(v, plain)]


def coerce(name, value, default, where):
    """`value` as setting `name` takes it, whose default is `default`; UserError where it does not fit."""
    wanted = type(default)
    if default == "auto" and isinstance(value, (str, bool)):
        return value  # each setting with an 'auto' knows its own values
    if type(value) is int and wanted in (int, float) and abs(value) >= 1 << 62:
        raise UserError(f"{where[:80]}: {name} takes {_article(wanted)} of fewer digits")
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UserError(f"{where}: {name} takes {_article(wanted)}, such as {default!r}, not {value!r}")
    if wanted is float and not math.isfinite(value):
        raise UserError(f"{where}: {name} takes a finite number, not {value!r}")
    return value


def _article(kind):
    return {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[kind]


def _unknown(name, names, where):
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "see --help"
    return UserError(f"{where}: there is no setting {name}; {hint}")


def _from_argument(argument, namespace, names):
    """(name, value) of one --key=value argument."""
    key, equals, text = argument[2:].partition("=")
    if not equals:
        raise UserError(f"{argument}: give a setting as --key=value")
    if key not in names:
        raise _unknown(key, names, argument)
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = text
    if isinstance(namespace[key], str) and not isinstance(value, str) and namespace[key] != "auto":
        value = text  # --start=1984 is a prompt
    return key, coerce(key, value, namespace[key], argument)


def _from_config_file(path, namespace, names):
    """{name: value} of what the config file at `path` sets. It is Python, and runs."""
    found = path if os.path.exists(path) else os.path.join(ROOT, path)
    try:
        with open(found, encoding="utf-8") as f:
            source = f.read()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"config file {path}: {getattr(error, 'strerror', None) or error}") from None
    # The file can read the settings so far like built-ins. So the scope holds only what the file has set.
    scope = {"__builtins__": vars(builtins) | {name: namespace[name] for name in names}, "__file__": found}
    try:
        exec(compile(source, found, "exec"), scope)
    except Exception as error:
        frame, line = error.__traceback__, getattr(error, "lineno", None)
        while frame:  # the deepest line that is the file's own
            line = frame.tb_lineno if frame.tb_frame.f_code.co_filename == found else line
            frame = frame.tb_next
        reason = getattr(error, "msg", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"config file {path}, line {line}: {reason}") from None
    values = {}
    for name, value in scope.items():
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if name not in names:
            raise _unknown(name, names, f"config file {path}")
        values[name] = coerce(name, value, namespace[name], f"config file {path}")
    return values


def documented(path):
    """{name: (default, comment)} of the settings of the script at `path`, as its source has them."""
    with open(path, encoding="utf-8") as f:
        source = f.read().partition("configure(globals()")[0]  # they stand above this call
    lines = re.findall(r"^([a-z]\w*) = (.+?)  # (.*)$", source, re.M)
    return {name: (default, comment) for name, default, comment in lines}


def _print_help(namespace, names):
    """Every setting with its default and the comment beside it in the script."""
    print((namespace.get("__doc__") or "").strip() + "\n\nsettings (--key=value):")
    comments = documented(namespace["__file__"])
    for name in names:
        print(f"  --{name}={namespace[name]!r}".ljust(46) + comments.get(name, ("", ""))[1])


def configure(namespace, positional=None):
    """Applies the command line to a script's settings, `namespace` (its globals()), in place.

    An argument without dashes is a config file; where a script takes other files, it is passed to `positional`.
    Returns {name: value} of what was given. Raises UserError.
    """
    names = setting_names(namespace)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for odd bytes in a path, or a plain terminal
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        _print_help(namespace, names)
        sys.exit(0)
    given = {}
    for argument in sys.argv[1:]:
        if argument.startswith("-"):
            if not argument.startswith("--"):
                raise UserError(f"{argument}: give a setting as --key=value")
            name, value = _from_argument(argument, namespace, names)
            given[name] = value
        elif positional:
            positional(argument)
        else:
            given |= _from_config_file(argument, namespace | given, names)
    namespace.update(given)
    return given


def adopt(namespace, names, saved, given):
    """Applies a checkpoint's settings, `saved`, to those of a script's `names` that the user has not given.

    Returns a line for each setting that now differs from the saved one.
    """
    differences = []
    for name in names:
        if name not in saved:
            continue
        value = coerce(name, saved[name], namespace[name], "the checkpoint's settings")
        if name not in given:
            namespace[name] = value
        elif given[name] != value:
            differences.append(f"{name} is now {given[name]!r} (the run had {value!r})")
    return differences


def adopt_model_sizes(namespace, given, config, init_from):
    """Sets n_layer, n_head, n_embd and bias to those of the model, whose GPTConfig is `config`.

    UserError where the user gave another value, which a trained model cannot take.
    """
    for name in ("n_layer", "n_head", "n_embd", "bias"):
        namespace[name] = getattr(config, name)
        if given.get(name, namespace[name]) != namespace[name]:
            raise UserError(f"--{name}={given[name]}: the model of --init_from={init_from} has {namespace[name]}")


def at_least(least, namespace, names, below=math.inf):
    """UserError naming the first of the settings `names` (one text) that is below `least`, or not below `below`."""
    for name in names.split():
        if not least <= namespace[name] < below:
            limit = f" and below {below}" if below < math.inf else ""
            raise UserError(f"--{name}={namespace[name]}: must be at least {least}{limit}")


def one_of(namespace, **choices):
    """UserError naming the first of the settings that is none of its choices."""
    for name, values in choices.items():
        if namespace[name] not in values:
            raise UserError(f"--{name}={namespace[name]}: takes {' or '.join(values)}")
