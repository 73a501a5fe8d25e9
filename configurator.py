"""Settings from config files and --key=value arguments.

A script's settings are its plain module globals. configure(globals()) applies config files and arguments to them, later
ones winning, and from then on mistakes are printed as one line (nanogpt/errors.py).
"""

import ast
import math
import os
import re
import sys

import numpy as np

from nanogpt import config_file, errors
from nanogpt.errors import UserError
from nanogpt.text_file import read_text

DASHES = "-\u2013\u2014"  # and what editors make of two of them
CURLY = "\u2018\u2019\u201c\u201d\u201e"  # what they make of quotes
OF_SAMPLES = ("start", "stop")  # settings of sample.py that are a text of the model's
KINDS = {bool: "True or False", int: "a whole number of at most 18 digits", float: "a finite number", str: "a text"}
BELOW = {int: 10**18, float: math.inf}  # what such a value stays below: torch takes integers of 64 bits


def setting_names(namespace):
    """The names in a script's globals that are settings: lower-case, public, and plain values."""
    return [k for k, v in namespace.items() if not k.startswith("_") and k == k.lower() and type(v) in KINDS]


def coerce(name, value, default, where):
    """`value` as setting `name` takes it, whose default is `default`; UserError where it does not fit."""
    wanted = type(default)
    value = value.item() if isinstance(value, np.generic) else value
    if default == "auto" and isinstance(value, (str, bool)):
        return value  # each setting with an 'auto' knows its own values
    if wanted is int and type(value) is float and value.is_integer():
        value = int(value)  # max_iters = 1e4
    if wanted is float and type(value) is int and abs(value) < BELOW[int]:
        value = float(value)  # learning_rate = 1
    if type(value) is not wanted or (wanted in BELOW and not abs(value) < BELOW[wanted]):  # nor is it NaN
        raise UserError(f"{where}: {name} takes {KINDS[wanted]}, such as {default!r}")
    return value


def _value(key, text, default, argument):
    """The value of --key=text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = text
    if text[:1] in CURLY and text.strip(CURLY) != text and key not in OF_SAMPLES:
        raise UserError(f"{argument}: did you mean --{key}={text.strip(CURLY)}?")
    if isinstance(default, str) and not isinstance(value, str) and default != "auto":
        value = text  # --start=1984 is a prompt
    return coerce(key, value, default, argument)


def documented(path):
    """{name: [default, comment]} of the settings of the script at `path`, as its source has them."""
    source = read_text(path).partition("configure(globals()")[0]  # they stand above this call
    return {name: both for name, *both in re.findall(r"^([a-z]\w*) = (.+?)  # (.*)$", source, re.M)}


def _print_help(namespace, names, sources):
    """Every setting with its default and the comment beside it in one of the `sources`, paths of scripts."""
    print((namespace.get("__doc__") or "").strip() + "\n\nsettings (--key=value):")
    if "start" in names:
        print(r"""a text in quotes of its own is Python's: --start='"ROMEO:\n"' is ROMEO: and a line feed""")
    comments = {name: found for path in sources for name, found in documented(path).items()}
    for name in names:
        print(f"  --{name}={namespace[name]!r}".ljust(46) + comments.get(name, ("", ""))[1])


def configure(namespace, positional=None, sources=()):
    """Applies the command line to a script's settings, `namespace` (its globals()), in place.

    An argument without dashes is a config file; where a script takes other files, it is passed to `positional`. --help
    shows the comments of the scripts `sources`. Returns the script's Settings. Raises UserError."""
    errors.install()
    names = setting_names(namespace)
    settings = {name: off for name, (off, _) in config_file.REMOVED.items()} | {name: namespace[name] for name in names}
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        _print_help(namespace, names, sources or [namespace["__file__"]])
        sys.exit(0)
    given, mistakes, notes = {}, [], []
    for argument in sys.argv[1:]:
        key, equals, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and equals and key in settings:
            given[key] = _value(key, text, settings[key], argument)
            if key in OF_SAMPLES and r"\n" in given[key] and not text.startswith("FILE:"):
                notes.append(rf"""note: --{key} has the characters \ and n; a line feed is --{key}='"{given[key]}"'""")
        elif argument.startswith("--") and equals:
            mistakes.append(config_file.unknown(key, names, argument))
        elif argument.startswith(tuple(DASHES)) or (key in names and not os.path.exists(argument)):
            near = config_file.nearest(key.lstrip(DASHES), names)
            example = f", such as --{near}={text or repr(namespace[near])}" if near else ""
            raise UserError(f"{argument}: give a setting as --key=value{example}")
        elif positional:
            positional(argument)
        else:
            where = f"config file {argument}"
            values, more_mistakes, ignored = config_file.run(argument, where, settings | given)
            given |= {name: coerce(name, value, settings[name], where) for name, value in values.items()}
            mistakes += more_mistakes
            if ignored:
                notes.append(f"note: {where} sets names that are no settings: {', '.join(ignored)}")
    if mistakes:
        raise UserError("; ".join(mistakes))
    config_file.check_removed(given)
    if int(os.environ.get("RANK", 0)) == 0:
        for note in notes:
            print(note)
    namespace.update((name, given[name]) for name in names if name in given)
    return Settings(namespace, names, given)


class Settings:
    """A script's settings: `names`, of its globals() `namespace`, of which the user has `given` some, {name: value}."""

    def __init__(self, namespace, names, given):
        self.namespace, self.names, self.given = namespace, names, given

    def values(self):
        """{name: value} of all settings, as they are now."""
        return {name: self.namespace[name] for name in self.names}

    def adopt(self, saved):
        """Applies a checkpoint's settings, `saved`, where the user has given none.

        Returns a line for each setting that now differs from the saved one."""
        config_file.check_removed(saved | self.given)
        unknown = sorted(map(str, saved.keys() - {*self.names} - config_file.REMOVED.keys()))
        differences = [f"the checkpoint has settings that are not known here: {', '.join(unknown)}"] if unknown else []
        for name in self.names:
            if name not in saved:
                continue
            value = coerce(name, saved[name], self.namespace[name], "the checkpoint's settings")
            if name not in self.given:
                self.namespace[name] = value
            elif self.given[name] != value:
                differences.append(f"{name} is now {self.given[name]!r} (the run had {value!r})")
        return differences

    def adopt_model_sizes(self, config, init_from):
        """Sets n_layer, n_head, n_embd and bias to those of the model, whose GPTConfig is `config`.

        UserError where the user gave another value, which a trained model cannot take."""
        for name in ("n_layer", "n_head", "n_embd", "bias"):
            own = self.namespace[name] = getattr(config, name)
            if self.given.get(name, own) != own:
                raise UserError(f"--{name}={self.given[name]}: the model of --init_from={init_from} has {own}")

    def at_least(self, least, names, below=math.inf):
        """UserError naming the first of `names` (one text) whose value is below `least`, or not below `below`."""
        for name in names.split():
            if not least <= self.namespace[name] < below:
                limit = f" and below {below}" if below < math.inf else ""
                raise UserError(f"--{name}={self.namespace[name]}: must be at least {least}{limit}")

    def one_of(self, **choices):
        """UserError naming the first of the settings that is none of its choices."""
        for name, values in choices.items():
            if self.namespace[name] not in values:
                raise UserError(f"--{name}={self.namespace[name]}: takes {' or '.join(values)}")
