"""configurator.py: settings from config files and --key=value."""

import ast
import io
import re
import sys
import tokenize

import pytest
from conftest import ROOT, SYNTHETIC, error_line, flags, project_code

from configurator import Settings, configure, setting_names
from nanogpt import config_file
from nanogpt.distributed import share_evenly
from nanogpt.errors import UserError

SCRIPT = '''"""What the script does.

    python script.py --name=value

Later ones win.
"""
import os

out_dir = "out"  # where to
batch_size = 12  # sequences in a micro-batch
gradient_accumulation_steps = 5 * 8  # micro-batches
learning_rate = 6e-4  # the highest
decay_lr = True  # whether it falls
device = "auto"  # cuda, mps or cpu
compile = "auto"  # torch.compile
_private = 1
CONSTANT = 2
PATH = "p"
a_list = []
config = configure(globals())
later = 3  # is no setting yet when configure is called
'''


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(*arguments) -> (its globals after configure, what was given)"""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)

    def script(*arguments, **options):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        namespace = {"__file__": str(path), "configure": lambda names: configure(names, **options)}
        exec(compile(SCRIPT, str(path), "exec"), namespace)
        return namespace, namespace["config"].given

    return script


def mistake(script, *arguments):
    with pytest.raises(UserError) as caught:
        script(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------
# --key=value


@pytest.mark.parametrize("argument, name, value", [
    ("--batch_size=3", "batch_size", 3),
    ("--batch_size=1_000", "batch_size", 1000),
    ("--batch_size=-1", "batch_size", -1),
    ("--batch_size=3.0", "batch_size", 3),  # an integral float where a whole number stands
    ("--batch_size=1e4", "batch_size", 10_000),
    ("--learning_rate=1e-3", "learning_rate", 1e-3),
    ("--learning_rate=1", "learning_rate", 1.0),  # an int where a float stands
    ("--decay_lr=False", "decay_lr", False),
    ("--out_dir=here", "out_dir", "here"),
    ("--out_dir='here'", "out_dir", "here"),  # a literal
    ("--out_dir=a=b=c", "out_dir", "a=b=c"),  # split at the first =
    ("--out_dir=--x", "out_dir", "--x"),
    ("--out_dir=", "out_dir", ""),
    ("--out_dir=1984", "out_dir", "1984"),  # what looks like a number is still a text
    ("--out_dir=None", "out_dir", "None"),
    ("--out_dir=(1, 2)", "out_dir", "(1, 2)"),
    ("--out_dir=True", "out_dir", "True"),
    ("--out_dir=run's", "out_dir", "run's"),
    ("--out_dir=über 中", "out_dir", "über 中"),
    ("--device=cpu", "device", "cpu"),
    ("--compile=False", "compile", False),  # 'auto' takes its own values
    ("--compile=auto", "compile", "auto"),
])  # fmt: skip
def test_a_value_is_a_python_literal_else_a_text(script, argument, name, value):
    settings, given = script(argument)
    assert settings[name] == value and type(settings[name]) is type(value)
    assert given == {name: value}


@pytest.mark.parametrize("argument", [
    "--batch_size=3.5", "--batch_size=True", "--batch_size=many", "--batch_size=", "--batch_size='3'",
    "--batch_size=2*3", "--batch_size=__import__('os').getcwd()", "--learning_rate=fast", "--learning_rate=True",
    "--learning_rate=None", "--learning_rate=1e-3,", "--learning_rate=nan", "--learning_rate=1e999", "--decay_lr=1",
    "--decay_lr=true", "--decay_lr=yes", "--decay_lr=None", "--batch_size=" + "(" * 500,
])  # fmt: skip
def test_a_value_of_another_type_than_the_defaults_is_an_error_that_names_it(script, argument):
    assert argument[2:].partition("=")[0] in mistake(script, argument)


def test_an_unknown_setting_is_an_error_that_names_the_nearest(script):
    assert "did you mean batch_size?" in mistake(script, "--bach_size=3")
    assert "did you mean learning_rate?" in mistake(script, "--learning-rate=3")
    assert "see --help" in mistake(script, "--DECAY_LR=True")
    assert "--help" in mistake(script, "--zzzzzz=3")


@pytest.mark.parametrize("name", ["_private", "CONSTANT", "PATH", "a_list", "os", "later", "configure", "__file__", ""])
def test_what_is_no_plain_public_lower_case_value_is_no_setting(script, name):
    assert "there is no setting" in mistake(script, f"--{name}=3")


@pytest.mark.parametrize("argument", ["--batch_size", "-batch_size=3", "-b", "--", "-"])
def test_other_forms_of_arguments_are_errors(script, argument):
    assert argument in mistake(script, argument)


def test_later_arguments_win(script, tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 5\nlearning_rate = 0.5\n")
    (tmp_path / "b.py").write_text("batch_size = 7\n")
    assert script("--batch_size=1", "--batch_size=2")[0]["batch_size"] == 2
    assert script("a.py", "--batch_size=2")[0]["batch_size"] == 2
    settings, given = script("--batch_size=2", "a.py")
    assert (settings["batch_size"], settings["learning_rate"]) == (5, 0.5)
    assert given == {"batch_size": 5, "learning_rate": 0.5}
    assert script("a.py", "b.py")[0]["batch_size"] == 7 and script("b.py", "a.py")[0]["batch_size"] == 5
    assert script("b.py", "a.py", "--learning_rate=3")[0]["learning_rate"] == 3.0


def test_after_a_mistake_nothing_is_changed(monkeypatch):
    namespace = {"a": 1, "b": 2}
    monkeypatch.setattr(sys, "argv", ["x", "--a=5", "--b=oops"])
    with pytest.raises(UserError):
        configure(namespace)
    assert namespace == {"a": 1, "b": 2}


def test_arguments_without_dashes_go_to_a_script_that_takes_files(script):
    files = []
    assert script("x.txt", "--batch_size=2", "y.txt", positional=files.append)[1] == {"batch_size": 2}
    assert files == ["x.txt", "y.txt"]


# ----------------------------------------------------------------------------------------------
# config files


def config(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text(text)
    return name


def test_a_config_file_may_compute_import_and_read_settings(script, tmp_path):
    name = config(
        tmp_path,
        "import time, math as m\n_width = 3\n_ = 4\nbatch_size = int(m.sqrt(16)) * _width\n"
        "out_dir = 'out-' + str(batch_size)\nlearning_rate = 1\ngradient_accumulation_steps *= 2\n"
        "if decay_lr:\n    decay_lr = False\n",
    )
    settings, given = script(name)
    assert settings["batch_size"] == 12 and settings["out_dir"] == "out-12"
    assert settings["learning_rate"] == 1.0 and type(settings["learning_rate"]) is float
    assert settings["gradient_accumulation_steps"] == 80 and settings["decay_lr"] is False
    assert "_width" not in settings and "m" not in settings and "time" not in settings
    assert set(given) <= set(setting_names(settings))


def test_a_config_file_reads_what_came_before_it(script, tmp_path):
    name = config(tmp_path, "gradient_accumulation_steps = 48 // batch_size\n")
    assert script("--batch_size=4", name)[0]["gradient_accumulation_steps"] == 12


def test_what_a_config_file_sets_counts_as_given_even_if_it_is_the_default(script, tmp_path):
    """A resumed run takes what is not given from its checkpoint: `batch_size = 12` in the user's file is given."""
    name = config(tmp_path, "batch_size = 12\ndecay_lr = True\nout_dir = 'out'\nlearning_rate = 6e-4\n")
    expected = {"batch_size": 12, "decay_lr": True, "out_dir": "out", "learning_rate": 6e-4}
    assert script(name)[1] == expected


@pytest.mark.parametrize("text, says", [
    ("bach_size = 3\n", "did you mean batch_size?"),
    ("batch_size = 3.5\n", "batch_size takes a whole number"),
    ("batch_size = True\n", "batch_size takes a whole number"),
    ("batch_size = None\n", "batch_size takes a whole number"),
    ("learning_rate = float('nan')\n", "learning_rate takes a finite number"),
    ("decay_lr = 1\n", "decay_lr takes True or False"),
    ("out_dir = 3\n", "out_dir takes a text"),
    ("batch_size = 3\nbatch_size = (\n", "line 2"),
    ("batch_size = 3\n\nbatch_size = 1 / 0\n", "line 3: ZeroDivisionError"),
    ("import no_such_module_anywhere\n", "line 1: No module named"),
    ("batch_size = widht\n", "line 1: NameError"),
    ("\x00", "mine.py"),
])  # fmt: skip
def test_a_mistake_in_a_config_file_names_the_file_and_what_it_is(script, tmp_path, text, says):
    message = mistake(script, config(tmp_path, text))
    assert says in message and "mine.py" in message


def test_a_config_file_that_is_not_there_or_not_readable_as_text_is_an_error(script, tmp_path):
    assert "nowhere.py: No such file" in mistake(script, "nowhere.py")
    (tmp_path / "folder.py").mkdir()
    assert "folder.py" in mistake(script, "folder.py")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\nbatch_size = 3\n")
    assert "latin.py" in mistake(script, "latin.py")
    assert "batch_size=3" in mistake(script, "batch_size=3")  # the dashes were forgotten


def test_a_config_path_is_tried_as_given_and_then_beside_the_script(script, tmp_path, monkeypatch):
    (tmp_path / "beside" / "config").mkdir(parents=True)
    (tmp_path / "here" / "config").mkdir(parents=True)
    (tmp_path / "beside" / "config" / "a.py").write_text("batch_size = 1\n")
    monkeypatch.setattr(config_file, "ROOT", str(tmp_path / "beside"))
    monkeypatch.chdir(tmp_path / "here")
    assert script("config/a.py")[0]["batch_size"] == 1
    (tmp_path / "here" / "config" / "a.py").write_text("batch_size = 2\n")
    assert script("config/a.py")[0]["batch_size"] == 2


@pytest.mark.parametrize("name, values", [
    ("train_shakespeare_char", dict(
        out_dir="out-shakespeare-char", eval_interval=250, eval_iters=200, log_interval=10,
        always_save_checkpoint=False, wandb_log=False, wandb_project="shakespeare-char", wandb_run_name="mini-gpt",
        dataset="shakespeare_char", gradient_accumulation_steps=1, batch_size=64, block_size=256, n_layer=6, n_head=6,
        n_embd=384, dropout=0.2, learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99,
        warmup_iters=100,
    )),
    ("train_gpt2", dict(
        wandb_log=True, wandb_project="owt", wandb_run_name="gpt2-124M", batch_size=12, block_size=1024,
        gradient_accumulation_steps=40, max_iters=600000, lr_decay_iters=600000, eval_interval=1000, eval_iters=200,
        log_interval=10, weight_decay=1e-1,
    )),
])  # fmt: skip
def test_the_config_files_have_nanogpts_values(name, values):
    found = {}
    exec((ROOT / "config" / f"{name}.py").read_text(), found)
    del found["__builtins__"]
    assert found == values


def test_the_config_file_for_fineweb_has_the_values_of_llm_cs_reproduction():
    """As in its run: -d 524288 -t 1024 -c 0.1 -l 0.0006 -q 0.0 -u 700, one epoch of 18,865 steps; clip at 1.0."""
    found = {}
    exec((ROOT / "config" / "train_gpt2_fineweb.py").read_text(), found)
    assert found["batch_size"] * found["block_size"] * found["gradient_accumulation_steps"] == 524288
    assert found["max_iters"] + 1 == found["lr_decay_iters"] == 18865  # max_iters is the number of the last iteration
    expected = dict(
        block_size=1024, weight_decay=0.1, learning_rate=6e-4, min_lr=0.0, warmup_iters=700, grad_clip=1.0, order="epoch"
    )
    assert {name: found[name] for name in expected} == expected


# ----------------------------------------------------------------------------------------------
# --help


def shown_by_help(text):
    """{name: (default, comment)}"""
    found = re.findall(r"^  --(\w+)=(.*?)(?:\s{2,}|(?<=\S{44})|\s)(\S.*)?$", text, re.M)
    return {name: (default, comment) for name, default, comment in found}


def test_help_shows_every_setting_with_its_default_and_its_comment(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script("--help")
    assert not exit.value.code
    text = capsys.readouterr().out
    assert text.startswith("What the script does.\n\n    python script.py --name=value\n\nLater ones win.\n")
    assert shown_by_help(text) == {
        "out_dir": ("'out'", "where to"),
        "batch_size": ("12", "sequences in a micro-batch"),
        "gradient_accumulation_steps": ("40", "micro-batches"),
        "learning_rate": ("0.0006", "the highest"),
        "decay_lr": ("True", "whether it falls"),
        "device": ("'auto'", "cuda, mps or cpu"),
        "compile": ("'auto'", "torch.compile"),
    }


# nanoGPT's train.py and sample.py as published, less what docs/differences.md names as different
TRAIN = dict(
    out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True,
    init_from="scratch", wandb_log=False, wandb_project="owt", wandb_run_name="gpt2", dataset="openwebtext",
    gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0,
    bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5,
    backend="auto", device="auto", dtype="auto", compile="auto", seed=1337, peak_flops=0.0,
)  # fmt: skip
SAMPLE = dict(
    init_from="resume", out_dir="out", start="\n", num_samples=10, max_new_tokens=500, temperature=0.8, top_k=200,
    seed=1337, device="auto", dtype="auto",
)  # fmt: skip
SCRIPTS = [str(p) for p in project_code() if re.search(r"^(\w+ = )?configure\(globals\(\)", (ROOT / p).read_text(), re.M)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_each_script(run, tmp_path, name):
    """From another folder; exit 0; every setting as it stands in the source, with a comment; nanoGPT's defaults."""
    result = run(name, "--help", cwd=tmp_path)
    assert result.stderr == "" and list(tmp_path.iterdir()) == []
    first = (ROOT / name).read_text().split('"""')[1].strip().splitlines()[0]
    assert result.lines[0] == first
    assert ("--start='\"ROMEO:\\n\"' is ROMEO: and a line feed" in result.stdout) == (name == "sample.py")
    shown = shown_by_help(result.stdout)
    assert shown == settings_in_the_source(ROOT / name)
    assert all(comment for _, comment in shown.values()), result.stdout
    for setting, default in {"train.py": TRAIN, "sample.py": SAMPLE}.get(name, {}).items():
        assert shown[setting][0] == repr(default), setting


def test_help_is_there_for_train_and_sample():
    assert {"train.py", "sample.py", "data/text_char/prepare.py"} <= set(SCRIPTS)
    assert {"tools/plot.py", "tools/export.py"} <= set(SCRIPTS)
    assert {str(path) for path in project_code() if path.name == "prepare.py"} <= set(SCRIPTS)


def settings_in_the_source(path):
    """{name: (default, comment)} of the script's settings, as Python's own parser reads them above configure()."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.removeprefix("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body:
        if "configure(globals()" in ast.unparse(node):
            return found
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
            value = eval(ast.unparse(node.value))
            if isinstance(value, (bool, int, float, str)):
                found[node.targets[0].id] = repr(value), comments.get(node.lineno, "")
    raise AssertionError(f"{path} does not call configure()")


# ----------------------------------------------------------------------------------------------
# checkpoints' settings and ranges


def test_adopt_takes_a_checkpoints_settings_where_none_is_given_and_says_what_differs():
    namespace = {"a": 1, "b": 2.0, "c": "x"}
    said = Settings(namespace, ["a", "b", "c"], {"b": 2.0}).adopt({"a": 10, "b": 5, "other": 3})
    assert namespace == {"a": 10, "b": 2.0, "c": "x"}
    unknown = "the checkpoint has settings that are not known here: other"
    assert said == [unknown, "b is now 2.0 (the run had 5.0)"]
    with pytest.raises(UserError, match="a takes a whole number"):
        Settings({"a": 1}, ["a"], {}).adopt({"a": "x"})


def test_at_least_one_of_and_share_evenly_name_the_setting():
    settings = Settings({"a": 1, "b": 0, "c": "x"}, ["a", "b", "c"], {})
    settings.at_least(0, "a b")
    with pytest.raises(UserError, match="--b=0: must be at least 1"):
        settings.at_least(1, "a b")
    settings.one_of(c=("x", "y"))
    with pytest.raises(UserError, match="--c=x: takes y or z"):
        settings.one_of(c=("y", "z"))
    assert share_evenly(40, 8) == 5
    with pytest.raises(UserError, match="--gradient_accumulation_steps=5"):
        share_evenly(5, 2)


# ----------------------------------------------------------------------------------------------
# configurator.py and nanogpt/config_file.py: settings from config files and --key=value


SETTINGS = dict(
    out_dir="out", dataset="openwebtext", eval_interval=2000, batch_size=12, block_size=1024, learning_rate=6e-4,
    max_iters=600000, min_lr=6e-5, warmup_iters=2000, decay_lr=True, device="auto", compile="auto", start="\n",
)  # fmt: skip


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """settings(*arguments) -> (the settings after configure, what was given), in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)

    def settings(*arguments, **options):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        namespace = dict(SETTINGS)
        return namespace, configure(namespace, **options).given

    return settings


@pytest.fixture
def configured(tmp_path, settings):
    """config(text) -> what configure() returns for a config file of that text."""

    def configured(text):
        (tmp_path / "mine.py").write_text(text)
        return settings("mine.py")[1]

    return configured


# ----------------------------------------------------------------------------------------------
# config files of nanoGPT's users


@pytest.mark.parametrize("text, given", [
    ("device = 'cuda' if torch.cuda.device_count() > 99 else 'cpu'\n", {"device": "cpu"}),
    ("out_dir = os.path.join('out', 'x')\n", {"out_dir": "out/x"}),
    ("out_dir = 'out-' + str(time.time() > 0)\n", {"out_dir": "out-True"}),
    ("batch_size = int(math.sqrt(64))\n", {"batch_size": 8}),
    ("learning_rate = float(np.exp(0.0))\n", {"learning_rate": 1.0}),
    ("learning_rate = np.sqrt(0.25)\nbatch_size = np.int64(3)\ndecay_lr = np.bool_(False)\n",
     {"learning_rate": 0.5, "batch_size": 3, "decay_lr": False}),
    ("max_iters = np.ceil(10 / 3)\n", {"max_iters": 4}),
    ("max_iters = 1e4\nwarmup_iters = 5000 / 50\n", {"max_iters": 10_000, "warmup_iters": 100}),
    ("from math import sqrt, ceil\nbatch_size = ceil(sqrt(10))\n", {"batch_size": 4}),
    ("from math import sqrt\n", {}),
    ("import math as m, os.path\nfrom os import path\nfrom dataclasses import dataclass\n", {}),
    ("batch_size = bs = 32\nblock_size = 2 * bs\n", {"batch_size": 32, "block_size": 64}),
    ("def steps(tokens, per=batch_size):\n    return tokens // per\nmax_iters = steps(1200)\n", {"max_iters": 100}),
    ("def f():\n    global batch_size\n    batch_size = 5\nf()\n", {"batch_size": 5}),
    ("class Sizes:\n    small = 4\n    def twice(self): return 2 * self.small\nbatch_size = Sizes().twice()\n",
     {"batch_size": 8}),
    ("sizes = {'small': 4, 'large': 16}\nbatch_size = sizes['large']\n", {"batch_size": 16}),
    ("sizes = [4, 16]\nrest = (1,)\nothers = {1}\n", {}),
    ("for i in range(3):\n    batch_size = i + 1\n", {"batch_size": 3}),
    ("widths = [w * 2 for w in (1, 2)]\nbatch_size = sum(widths)\n", {"batch_size": 6}),
    ("double = lambda n: 2 * n\nbatch_size = double(batch_size)\n", {"batch_size": 24}),
    ("N = 3\nbatch_size = N * 4\nname = 'x'\nout_dir = f'out-{name}'\n", {"batch_size": 12, "out_dir": "out-x"}),
    ("if (n := 7) > 3:\n    batch_size = n\n", {"batch_size": 7}),
    ("if __name__ == '__main__':\n    batch_size = 9\n", {"batch_size": 9}),
    ("with open(__file__) as f:\n    batch_size = len(f.readlines())\n", {"batch_size": 2}),
    ("_private = 1\n_ = 2\n__also = 3\n", {}),
    ("tensor = torch.zeros(3)\narray = np.arange(3)\nkind = torch.float32\n", {}),
])  # fmt: skip
def test_what_nanogpts_users_write_is_taken_without_a_word(configured, capsys, text, given):
    found = configured(text)
    assert found == given and {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in given.items()
    }
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text, names", [
    ("width = 3\n", "width"),
    ("CONSTANT = 3\nbatch_size = 2\nnote_to_self = 'x'\nratio = 0.5\nflag = True\nnothing = None\n",
     "CONSTANT, note_to_self, ratio, flag, nothing"),
    ("for i in range(3):\n    pass\n", "i"),
    ("batch_size = bs = 32\n", "bs"),
    ("from math import pi\n", "pi"),
    ("scalar = np.float64(3)\n", "scalar"),
    ("vocab_size = 65\ndata_dir = 'data'\nbatch = 3\n", "vocab_size, data_dir, batch"),  # near, but below 0.8
    ("learning_rte = 1e-3; min_lr = learning_rte / 10\n", "learning_rte"),
    ("max_iter = 5\nmax_iters = max_iter\nK = 1\n", "max_iter, K"),
    ("batch_sizes = 5\ndef f():\n    return batch_sizes\n", "batch_sizes"),
])  # fmt: skip
def test_other_plain_names_are_listed_in_one_note_and_ignored(configured, settings, capsys, text, names):
    found = configured(text)
    assert set(found) <= set(SETTINGS)
    assert capsys.readouterr() == (f"note: config file mine.py sets names that are no settings: {names}\n", "")
    assert set(settings("mine.py")[0]) == set(SETTINGS)


def test_the_note_comes_from_the_first_process_only(configured, monkeypatch, capsys):
    for rank, shown in (("0", True), ("1", False), ("7", False)):
        monkeypatch.setenv("RANK", rank)
        configured("width = 3\n")
        assert bool(capsys.readouterr().out) == shown


def test_a_name_near_a_settings_that_nothing_reads_is_a_mistake_and_all_are_told_at_once(configured, settings, capsys):
    message = mistake(configured, "max_itres = 5\nwidth = 3\nbach_size = 3\nbatch_size = 2\n_minlr = 1\nlearning_rat = 1e-3\n")
    for name, near in (("max_itres", "max_iters"), ("bach_size", "batch_size"), ("learning_rat", "learning_rate")):
        assert f"there is no setting {name}; did you mean {near}?" in message
    assert "mine.py" in message and "width" not in message and "minlr" not in message
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", [
    "max_itres = 5\n", "max_itres = 5.0\n", "max_itres = '5'\n", "max_itres = None\n", "max_itres = True\n",
    "max_itres = np.int64(5)\n", "max_iters = max_itres = 5\n", "for max_itres in range(3):\n    pass\n",
    "max_itres = 4\nmax_itres += 1\n", "if True:\n    max_itres = 5\n", "(max_itres := 5)\n",
    "max_itres, width = 5, 3\n", "def f():\n    global max_itres\n    max_itres = 5\nf()\n",
])  # fmt: skip
def test_a_near_name_is_a_mistake_however_it_is_set(configured, text):
    assert "there is no setting max_itres; did you mean max_iters?" in mistake(configured, text)


@pytest.mark.parametrize("text", ["max_itres = [5]\n", "def max_itres():\n    pass\n", "class max_itres:\n    pass\n"])
def test_a_near_name_of_something_that_is_no_plain_value_is_a_helper(configured, capsys, text):
    assert configured(text) == {} and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("argument, advice", [
    ("--spike_rewind=1", "resume from ckpt.pt with another --seed or a lower rate (docs/exploding_loss.md)"),
    ("--plan=True", "use tools/plan.py"),
])  # fmt: skip
def test_a_setting_of_earlier_versions_is_an_error_that_says_what_to_do(settings, tmp_path, argument, advice):
    name, value = argument[2:].split("=")
    (tmp_path / "mine.py").write_text(f"{name} = {value}\n")
    for given in (argument, "mine.py"):
        message = mistake(settings, given)
        assert f"there is no setting {name} any more: {advice}" in message and "did you mean" not in message


def test_a_setting_of_earlier_versions_that_is_switched_off_is_taken_without_a_word(settings, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("spike_rewind = 0\nplan = False\nbatch_size = 3\nplans = [1]\n")
    found, _ = settings("mine.py", "--spike_rewind=0.0", "--plan=False")
    assert found == SETTINGS | {"batch_size": 3} and capsys.readouterr() == ("", "")


def test_a_checkpoint_with_a_setting_of_earlier_versions_says_how_to_resume_it(settings):
    old = {"spike_rewind": 1.0, "plan": False, "batch_size": 5}

    def adopted(saved, *arguments):
        namespace, given = settings(*arguments)
        return Settings(namespace, list(SETTINGS), given).adopt(saved), namespace["batch_size"]

    with pytest.raises(UserError, match="--spike_rewind=1.0: there is no setting.*; --spike_rewind=0.0 does without it"):
        adopted(old)
    assert adopted(old, "--spike_rewind=0.0") == adopted(old | {"spike_rewind": 0.0}) == ([], 5)


def test_unknown_names_on_the_command_line_are_told_at_once(settings, tmp_path):
    (tmp_path / "mine.py").write_text("warmup_iter = 3\n")
    message = mistake(settings, "--max_itres=5", "mine.py", "--zzz=1", "--batch_size=3", "--bach_size=2")
    for part in ("--max_itres=5: there is no setting max_itres; did you mean max_iters?",
                 "mine.py: there is no setting warmup_iter; did you mean warmup_iters?",
                 "--zzz=1: there is no setting zzz; see --help", "did you mean batch_size?"):  # fmt: skip
        assert part in message


@pytest.mark.parametrize("text, says", [
    ("max_iters = 1.5\n", "takes a whole number"), ("max_iters = 1e30\n", "at most 18 digits"),
    ("max_iters = float('inf')\n", "takes a whole number"), ("max_iters = np.float64('nan')\n", "takes a whole number"),
    ("max_iters = np.bool_(True)\n", "takes a whole number"), ("max_iters = [5]\n", "takes a whole number"),
    ("decay_lr = 1.0\n", "takes True or False"), ("def batch_size():\n    pass\n", "takes a whole number"),
])  # fmt: skip
def test_a_setting_of_another_kind_is_still_a_mistake(configured, text, says):
    assert says in mistake(configured, text)


@pytest.mark.parametrize("argument, value", [
    ("--max_iters=1e4", 10_000), ("--max_iters=3.0", 3), ("--max_iters=5e0", 5), ("--max_iters=-2.0", -2),
    ("--max_iters=1_000.0", 1000), ("--max_iters=0.0", 0),
])  # fmt: skip
def test_an_integral_float_is_taken_for_a_whole_number(settings, argument, value):
    found = settings(argument)[0]["max_iters"]
    assert found == value and type(found) is int


@pytest.mark.parametrize("argument", ["--max_iters=1.5", "--max_iters=1e30", "--max_iters=inf", "--max_iters=1e999"])
def test_another_float_is_not(settings, argument):
    assert "max_iters takes a whole number" in mistake(settings, argument)


def test_a_real_users_config_trains_and_says_what_it_ignores(run, tmp_path):
    """Helpers of each kind at once, under train.py itself."""
    (tmp_path / "mine.py").write_text(
        "from math import ceil\n"
        "tokens, per = 640, 16 * 4\n"
        "sizes = dict(n_layer=1, n_head=2, n_embd=16)\n"
        "n_layer, n_head, n_embd = (sizes[k] for k in ('n_layer', 'n_head', 'n_embd'))\n"
        "def iters(): return ceil(tokens / per)\n"
        "max_iters = lr_decay_iters = float(iters())\n"
        "dtype = 'bfloat16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'float32'\n"
        "wandb_run_name = 'run' + str(time.time())\n"
        "master = True\n"
    )
    more = flags(SYNTHETIC, block_size=16, batch_size=4, eval_iters=1, out_dir=tmp_path / "out")
    more = [flag for flag in more if not flag.startswith(("--n_", "--max_iters", "--lr_decay", "--dtype"))]
    result = run("train.py", *more, "mine.py", cwd=tmp_path)
    assert result.lines[0] == "note: config file mine.py sets names that are no settings: master"
    assert [n for kind, n, *_ in result.losses if kind == "iter"][-1] == 10 and result.stderr == ""


# ----------------------------------------------------------------------------------------------
# line ends, byte order marks


TEXT = "# naïve\nbatch_size = 5\nout_dir = 'ü'\n"


@pytest.mark.parametrize("content", [
    TEXT.encode(), TEXT.replace("\n", "\r\n").encode(), TEXT.replace("\n", "\r").encode(), TEXT.encode("utf-8-sig"),
    TEXT.replace("\n", "\r\n").encode("utf-8-sig"),
])  # fmt: skip
def test_a_config_file_may_come_from_any_system(settings, tmp_path, content):
    (tmp_path / "mine.py").write_bytes(content)
    assert settings("mine.py")[1] == {"batch_size": 5, "out_dir": "ü"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_config_file_in_utf16_is_named_as_such(settings, tmp_path, encoding):
    (tmp_path / "mine.py").write_bytes(TEXT.replace("ï", "i").replace("ü", "u").encode(encoding))
    message = mistake(settings, "mine.py")
    assert "config file mine.py" in message and "UTF-16" in message


# ----------------------------------------------------------------------------------------------
# the right form


@pytest.mark.parametrize("arguments, form", [
    (["max_iters=5"], "--max_iters=5"), (["-max_iters=5"], "--max_iters=5"), (["out_dir=runs/x"], "--out_dir=runs/x"),
    (["--max_iters", "5"], "--max_iters=600000"), (["-max_iters", "5"], "--max_iters=600000"),
    (["max_iters", "5"], "--max_iters=600000"), (["--max_iters", "=", "5"], "--max_iters=600000"),
    (["--max-iters", "5"], "--max_iters=600000"), (["--max_iter", "5"], "--max_iters=600000"),
    (["--max_iters"], "--max_iters=600000"), (["--decay_lr", "--max_iters=3"], "--decay_lr=True"),
    (["--out_dir"], "--out_dir='out'"),
])  # fmt: skip
def test_another_form_of_an_argument_is_answered_with_the_right_one(settings, arguments, form):
    message = mistake(settings, "--batch_size=3", *arguments)
    assert message == f"{arguments[0]}: give a setting as --key=value, such as {form}"


@pytest.mark.parametrize("argument, form", [
    ("\u2014max_iters=5", "such as --max_iters=5"), ("\u2013max_iter=5", "such as --max_iters=5"),
    ("-\u2014max_iters", "such as --max_iters=600000"), ("--max_iters=\u201c5\u201d", "did you mean --max_iters=5?"),
    ("--out_dir=\u2018out-x\u2019", "did you mean --out_dir=out-x?"), ("--out_dir=\u201eout-x\u201c", "did you mean --out_dir=out-x?"),
])  # fmt: skip
def test_dashes_and_quotes_that_an_editor_has_changed_are_answered_with_the_plain_ones(settings, argument, form):
    message = mistake(settings, argument)
    assert message.startswith(argument) and message.endswith(form)


def test_a_name_may_end_in_such_a_quote(settings):
    assert settings("--out_dir=James\u2019")[0]["out_dir"] == "James\u2019"


@pytest.mark.parametrize("argument, start, note", [
    ("--start=\u201cAy\u201d", "\u201cAy\u201d", ""), ('--start="ROMEO"', "ROMEO", ""), ('--start="ROMEO:\\n"', "ROMEO:\n", ""),
    ("--start=FILE:x\\new.txt", "FILE:x\\new.txt", ""), ("--start=a\nb", "a\nb", ""),
    (r"--start=ROMEO:\n", r"ROMEO:\n", "note: --start has the characters \\ and n; a line feed is --start='\"ROMEO:\\n\"'\n"),
])  # fmt: skip
def test_a_line_feed_in_a_prompt_that_a_shell_has_not_written_is_explained(settings, capsys, argument, start, note):
    assert settings(argument)[0]["start"] == start
    assert capsys.readouterr().out == note


@pytest.mark.parametrize("argument", ["batch_size=3", "batch_size"])
def test_a_file_whose_name_looks_like_a_setting_is_still_a_file(settings, tmp_path, argument):
    (tmp_path / argument).write_text("batch_size = 7\n")
    assert settings(argument)[1] == {"batch_size": 7}


def test_a_script_that_takes_files_answers_with_the_right_form_too(settings):
    files = []
    with pytest.raises(UserError, match="such as --dataset=x$"):
        settings("a.txt", "dataset=x", positional=files.append)
    assert files == ["a.txt"]


def test_a_script_shows_it_in_one_line(run, tmp_path):
    line = error_line(run("train.py", "max_iters=5", cwd=tmp_path, expect=2))
    assert line == "max_iters=5: give a setting as --key=value, such as --max_iters=5"
    line = error_line(run("data/text_char/prepare.py", "name=mine", cwd=tmp_path, expect=2))
    assert line == "name=mine: give a setting as --key=value, such as --name=mine"


@pytest.mark.parametrize("argument", ["--decay_lr=0x" + "f" * 5000, "--batch_size=[0x" + "f" * 5000 + "]", "--decay_lr=" + "9" * 4000])
def test_a_number_of_more_digits_than_python_prints_is_one_line(script, argument):
    assert mistake(script, argument).count(argument.partition("=")[0]) >= 1


def test_such_a_number_in_a_config_file_is_one_line_too(script, tmp_path):
    assert "decay_lr takes True or False" in mistake(script, config(tmp_path, "decay_lr = 1 << 100000\n"))
