"""configurator.py: settings from config files and --key=value. shared/DESIGN.md's section "Command line"."""

import ast
import io
import re
import sys
import tokenize

import pytest
from conftest import ROOT, project_code

import configurator
from configurator import adopt, at_least, configure, one_of, setting_names
from nanogpt.distributed import share_evenly
from nanogpt.errors import UserError
SCRIPT = '''"""What the script does.

    python script.py --name=value
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
    """script(*arguments) -> (its globals after configure, what configure returned)"""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)

    def script(*arguments, **options):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        namespace = {"__file__": str(path), "configure": lambda names: configure(names, **options)}
        exec(compile(SCRIPT, str(path), "exec"), namespace)
        return namespace, namespace["config"]

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
    "--batch_size=3.0", "--batch_size=3.5", "--batch_size=True", "--batch_size=many", "--batch_size=", "--batch_size='3'",
    "--batch_size=2*3", "--batch_size=__import__('os').getcwd()", "--learning_rate=fast", "--learning_rate=True",
    "--learning_rate=None", "--learning_rate=1e-3,", "--learning_rate=nan", "--learning_rate=1e999", "--decay_lr=1",
    "--decay_lr=true", "--decay_lr=yes", "--decay_lr=None", "--batch_size=" + "(" * 500,
])  # fmt: skip
def test_a_value_of_another_type_than_the_defaults_is_an_error_that_names_it(script, argument):
    assert argument[2:].partition("=")[0] in mistake(script, argument)


def test_an_unknown_setting_is_an_error_that_names_the_nearest(script):
    assert "did you mean batch_size?" in mistake(script, "--bach_size=3")
    assert "did you mean learning_rate?" in mistake(script, "--learning-rate=3")
    assert "did you mean decay_lr?" in mistake(script, "--DECAY_LR=True") or "--help" in mistake(script, "--DECAY_LR=1")
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
    ("batch_size = 3\nwidth = 3\n", "there is no setting width"),
    ("import math\nfrom math import sqrt\n", "there is no setting sqrt"),
    ("for i in range(3):\n    pass\n", "there is no setting i"),
    ("CONSTANT = 3\n", "there is no setting CONSTANT"),
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
    monkeypatch.setattr(configurator, "ROOT", str(tmp_path / "beside"))
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
    assert text.startswith("What the script does.\n\n    python script.py --name=value\n")
    assert shown_by_help(text) == {
        "out_dir": ("'out'", "where to"),
        "batch_size": ("12", "sequences in a micro-batch"),
        "gradient_accumulation_steps": ("40", "micro-batches"),
        "learning_rate": ("0.0006", "the highest"),
        "decay_lr": ("True", "whether it falls"),
        "device": ("'auto'", "cuda, mps or cpu"),
        "compile": ("'auto'", "torch.compile"),
    }


# nanoGPT's train.py and sample.py as published, less what DESIGN.md names as different
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
    """From another folder; exit 0; a comment beside every setting; nanoGPT's defaults."""
    result = run(name, "--help", cwd=tmp_path)
    assert result.stderr == "" and list(tmp_path.iterdir()) == []
    first = (ROOT / name).read_text().split('"""')[1].strip().splitlines()[0]
    assert result.lines[0] == first
    shown = shown_by_help(result.stdout)
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_setting_with_the_default_and_the_comment_that_stand_in_the_source(run, name):
    shown = shown_by_help(run(name, "--help").stdout)
    assert shown == settings_in_the_source(ROOT / name)


# ----------------------------------------------------------------------------------------------
# checkpoints' settings and ranges


def test_adopt_takes_a_checkpoints_settings_where_none_is_given_and_says_what_differs():
    namespace = {"a": 1, "b": 2.0, "c": "x"}
    said = adopt(namespace, ["a", "b", "c"], {"a": 10, "b": 5, "other": 3}, {"b": 2.0})
    assert namespace == {"a": 10, "b": 2.0, "c": "x"}
    assert said == ["b is now 2.0 (the run had 5.0)"]
    with pytest.raises(UserError, match="a takes a whole number"):
        adopt({"a": 1}, ["a"], {"a": "x"}, {})


def test_at_least_one_of_and_share_evenly_name_the_setting():
    at_least(1, {"a": 1, "b": 2}, "a b")
    with pytest.raises(UserError, match="--b=0: must be at least 1"):
        at_least(1, {"a": 1, "b": 0}, "a b")
    one_of({"a": "x"}, a=("x", "y"))
    with pytest.raises(UserError, match="--a=z: takes x or y"):
        one_of({"a": "z"}, a=("x", "y"))
    assert share_evenly(40, 8) == 5
    with pytest.raises(UserError, match="--gradient_accumulation_steps=5"):
        share_evenly(5, 2)
