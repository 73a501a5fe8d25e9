"""configurator.py and nanogpt/config_file.py: settings from config files and --key=value."""

import shlex
import sys

import pytest
from conftest import SYNTHETIC, error_line, flags

from configurator import configure
from nanogpt.errors import UserError

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
        return namespace, configure(namespace, **options)

    return settings


@pytest.fixture
def config(tmp_path, settings):
    """config(text) -> what configure() returns for a config file of that text."""

    def config(text):
        (tmp_path / "mine.py").write_text(text)
        return settings("mine.py")[1]

    return config


def mistake(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
def test_what_nanogpts_users_write_is_taken_without_a_word(config, capsys, text, given):
    found = config(text)
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
    ("learning_rte = 1e-3; min_lr = learning_rte / 10\n", "learning_rte (did you mean learning_rate?)"),
    ("max_iter = 5\nmax_iters = max_iter\nK = 1\n", "max_iter (did you mean max_iters?), K"),
    ("batch_sizes = 5\ndef f():\n    return batch_sizes\n", "batch_sizes (did you mean batch_size?)"),
])  # fmt: skip
def test_other_plain_names_are_listed_in_one_note_and_ignored(config, settings, capsys, text, names):
    found = config(text)
    assert set(found) <= set(SETTINGS)
    assert capsys.readouterr() == (f"note: config file mine.py sets names that are no settings: {names}\n", "")
    assert set(settings("mine.py")[0]) == set(SETTINGS)


def test_the_note_comes_from_the_first_process_only(config, monkeypatch, capsys):
    for rank, shown in (("0", True), ("1", False), ("7", False)):
        monkeypatch.setenv("RANK", rank)
        config("width = 3\n")
        assert bool(capsys.readouterr().out) == shown


def test_a_name_near_a_settings_that_nothing_reads_is_a_mistake_and_all_are_told_at_once(config, settings, capsys):
    message = mistake(config, "max_itres = 5\nwidth = 3\nbach_size = 3\nbatch_size = 2\n_minlr = 1\nlearning_rat = 1e-3\n")
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
def test_a_near_name_is_a_mistake_however_it_is_set(config, text):
    assert "there is no setting max_itres; did you mean max_iters?" in mistake(config, text)


@pytest.mark.parametrize("text", ["max_itres = [5]\n", "def max_itres():\n    pass\n", "class max_itres:\n    pass\n"])
def test_a_near_name_of_something_that_is_no_plain_value_is_a_helper(config, capsys, text):
    assert config(text) == {} and capsys.readouterr() == ("", "")


def test_unknown_names_on_the_command_line_are_told_at_once(settings, tmp_path):
    (tmp_path / "mine.py").write_text("warmup_iter = 3\n")
    message = mistake(settings, "--max_itres=5", "mine.py", "--zzz=1", "--batch_size=3", "--bach_size=2")
    for part in ("--max_itres=5: there is no setting max_itres; did you mean max_iters?",
                 "mine.py: there is no setting warmup_iter; did you mean warmup_iters?",
                 "--zzz=1: there is no setting zzz; see --help", "did you mean batch_size?"):  # fmt: skip
        assert part in message


@pytest.mark.parametrize("text, says", [
    ("max_iters = 1.5\n", "takes a whole number"), ("max_iters = 1e30\n", "fewer digits"),
    ("max_iters = float('inf')\n", "takes a whole number"), ("max_iters = np.float64('nan')\n", "takes a whole number"),
    ("max_iters = np.bool_(True)\n", "takes a whole number"), ("max_iters = [5]\n", "takes a whole number"),
    ("decay_lr = 1.0\n", "takes True or False"), ("def batch_size():\n    pass\n", "takes a whole number"),
])  # fmt: skip
def test_a_setting_of_another_kind_is_still_a_mistake(config, text, says):
    assert says in mistake(config, text)


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
    more = flags(SYNTHETIC, block_size=16, batch_size=4, eval_iters=1, out_dir=tmp_path / "out", peak_flops=1e9)
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
    (["max_iters=5"], "--max_iters=5"), (["--max_iters", "5"], "--max_iters=5"), (["-max_iters=5"], "--max_iters=5"),
    (["-max_iters", "5"], "--max_iters=5"), (["max_iters", "5"], "--max_iters=5"),
    (["max_iters", "=", "5"], "--max_iters=5"), (["--max_iters", "=", "5"], "--max_iters=5"),
    (["--max_iters", "=5"], "--max_iters=5"), (["--learning_rate", "-1"], "--learning_rate=-1"),
    (["--max-iters", "5"], "--max_iters=5"), (["--max_iter", "5"], "--max_iters=5"),
    (["out_dir=My Runs/x"], "'--out_dir=My Runs/x'"), (["--out_dir", "My Runs/x"], "'--out_dir=My Runs/x'"),
    (["out_dir="], "--out_dir="),
    (["--max_iters"], "--max_iters=600000"), (["--decay_lr", "--max_iters=3"], "--decay_lr=True"),
    (["--out_dir"], "--out_dir='out'"),
])  # fmt: skip
def test_another_form_of_an_argument_is_answered_with_the_right_one(settings, arguments, form):
    message = mistake(settings, "--batch_size=3", *arguments)
    assert message.startswith(f"{arguments[0]}: give a setting as --key=value") and message.endswith(form)
    assert len(shlex.split(form)) == 1


@pytest.mark.parametrize("argument", ["batch_size=3", "batch_size"])
def test_a_file_whose_name_looks_like_a_setting_is_still_a_file(settings, tmp_path, argument):
    (tmp_path / argument).write_text("batch_size = 7\n")
    assert settings(argument)[1] == {"batch_size": 7}


def test_a_script_that_takes_files_answers_with_the_right_form_too(settings):
    files = []
    with pytest.raises(UserError, match="--dataset=x$"):
        settings("a.txt", "dataset=x", positional=files.append)
    assert files == ["a.txt"]


def test_a_script_shows_it_in_one_line(run, tmp_path):
    line = error_line(run("train.py", "max_iters=5", cwd=tmp_path, expect=2))
    assert line == "max_iters=5: give a setting as --key=value: --max_iters=5"
    line = error_line(run("data/text_char/prepare.py", "name=mine", cwd=tmp_path, expect=2))
    assert line == "name=mine: give a setting as --key=value: --name=mine"
