"""The command line, and what 'auto' means: shared/DESIGN.md's sections "Command line" and "MFU"."""

import re
import sys

import pytest
import torch
from conftest import ROOT, error_line

import configurator
from configurator import (
    UserError, adopt, at_least, configure, find_peak_flops, measure_peak, one_of, peak_from_table, pick_backend,
    pick_compile, pick_device, pick_dtype, pick_threads, setting_names, share_evenly, usable_cores,
)  # fmt: skip

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
SCRIPTS = [p.relative_to(ROOT) for pattern in ("*.py", "data/*/prepare.py") for p in sorted(ROOT.glob(pattern))]
SCRIPTS = [str(p) for p in SCRIPTS if re.search(r"^(\w+ = )?configure\(globals\(\)", (ROOT / p).read_text(), re.M)]


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
# mistakes and failures, as a user sees them


@pytest.mark.parametrize("name, argument, says", [
    ("train.py", "--learning_rat=1", "--learning_rat=1: there is no setting learning_rat; did you mean learning_rate?"),
    ("sample.py", "--strat=x", "--strat=x: there is no setting strat; did you mean start?"),
    ("data/text_char/prepare.py", "--nam=x", "--nam=x: there is no setting nam; did you mean name?"),
])  # fmt: skip
def test_a_mistake_is_one_line_on_stderr_and_exit_2(run, tmp_path, name, argument, says):
    result = run(name, argument, cwd=tmp_path, interpreter=name == "train.py", expect=2)
    assert error_line(result) == says and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def failing(project, name, line):
    """A script beside configurator.py that does `line`."""
    (project / name).write_text(f"import configurator, os, sys, torch\nprint('before')\n{line}\n")
    return name


@pytest.mark.parametrize("line, code, message", [
    ("raise configurator.UserError('two\\n  lines')", 2, "two lines"),
    ("open('nowhere/file')", 1, "nowhere/file: No such file or directory"),
    ("raise OSError(28, os.strerror(28), 'ckpt.pt')", 1, "ckpt.pt: No space left on device"),
    ("raise MemoryError", 1, "out of memory: try a smaller --batch_size"),
    ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')", 1, "out of memory: try a smaller"),
    ("torch.empty(1 << 60)", 1, "out of memory: try a smaller --batch_size"),
])  # fmt: skip
def test_a_failure_of_the_machine_is_one_line_and_exit_1(run, own_project, line, code, message):
    result = run(failing(own_project, "failing.py", line), project=own_project, expect=code)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: " + message), result.stderr
    assert result.stdout == "before\n"


def test_a_bug_keeps_its_traceback(run, own_project):
    result = run(failing(own_project, "buggy.py", "{}['key']"), project=own_project, expect=1)
    assert "Traceback" in result.stderr and "KeyError: 'key'" in result.stderr


def test_an_interrupt_and_a_reader_that_has_seen_enough_are_no_errors(run, own_project):
    result = run(failing(own_project, "a.py", "raise KeyboardInterrupt"), project=own_project, expect=130)
    assert result.stderr == ""
    result = run(failing(own_project, "b.py", "raise BrokenPipeError"), project=own_project, expect=0)
    assert result.stderr == ""


# ----------------------------------------------------------------------------------------------
# what scripts use beside it


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


# ----------------------------------------------------------------------------------------------
# 'auto'


def machine(monkeypatch, cuda=0, mps=False, bf16=True, name="NVIDIA A100-SXM4-80GB"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_the_device_is_cuda_else_mps_else_cpu(monkeypatch):
    for cuda, mps, expected in [(2, False, "cuda"), (1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]:
        machine(monkeypatch, cuda, mps)
        assert pick_device("auto") == expected
        assert pick_device("cpu") == "cpu"
    machine(monkeypatch, cuda=2)
    assert pick_device("cuda") == "cuda" and pick_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "cpu:1", "gpu", "cuda:x", "cuda:-1", "", "0", "CPU", True])
def test_a_device_that_is_not_there_is_an_error(monkeypatch, device):
    machine(monkeypatch)
    with pytest.raises(UserError, match=f"--device={device}"):
        pick_device(device)


def test_a_gpu_beyond_those_that_are_there_is_an_error(monkeypatch):
    machine(monkeypatch, cuda=2)
    with pytest.raises(UserError, match="--device=cuda:2: there is no such device.*2 cuda"):
        pick_device("cuda:2")


def test_the_dtype_is_bfloat16_where_it_is_fast(monkeypatch):
    machine(monkeypatch, cuda=1, bf16=True)
    assert pick_dtype("auto", "cuda") == pick_dtype("auto", "cuda:1") == "bfloat16"
    machine(monkeypatch, cuda=1, bf16=False)  # before Ampere: emulated
    assert pick_dtype("auto", "cuda") == "float16"
    for bf16, amx, expected in [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert pick_dtype("auto", "cpu") == expected
    for dtype in ("float32", "bfloat16", "float16"):
        assert pick_dtype(dtype, "cpu") == dtype
    for wrong in ("float64", "bf16", "", True):
        with pytest.raises(UserError, match=f"--dtype={wrong}"):
            pick_dtype(wrong, "cpu")


def test_compile_pays_on_cuda_and_needs_its_compiler(monkeypatch, tmp_path):
    found = {"triton": True, "g++": True, "gcc": True}
    monkeypatch.setattr(configurator.sysconfig, "get_path", lambda name: str(tmp_path / name))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    capability = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability[0])
    monkeypatch.setattr(configurator.importlib.util, "find_spec", lambda name: found.get(name) or None)
    monkeypatch.setattr(configurator.shutil, "which", lambda name: found.get(name) or None)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert pick_compile("auto", "cuda") == pick_compile(True, "cuda:0") == (True, None)
    assert pick_compile("auto", "cpu") == pick_compile(False, "cuda") == (False, None)
    assert pick_compile(True, "cpu") == (True, None)
    for name, device in (("CC", "cuda"), ("CXX", "cpu")):  # one that is asked for is the one that is used
        monkeypatch.setenv(name, "nocc")
        chosen, said = pick_compile(True, device)
        assert chosen is False and "compiler" in said
        monkeypatch.delenv(name)
    (tmp_path / "include" / "Python.h").unlink()
    for device in ("cuda", "cpu"):
        chosen, said = pick_compile(True, device)
        assert chosen is False and "Python.h" in said
    (tmp_path / "include" / "Python.h").touch()
    capability[0] = (6, 1)
    assert pick_compile("auto", "cuda")[0] is False and "7.0" in pick_compile("auto", "cuda")[1]
    del found["gcc"]
    assert pick_compile("auto", "cuda")[0] is False and "C compiler" in pick_compile("auto", "cuda")[1]
    found.clear()
    for device, missing in (("cuda", "Triton"), ("cpu", "C++ compiler")):
        chosen, said = pick_compile(True, device)
        assert chosen is False and missing in said
    for wrong in ("yes", "1", ""):
        with pytest.raises(UserError, match=f"--compile={wrong}"):
            pick_compile(wrong, "cpu")


def test_the_backend_is_nccl_on_cuda_else_gloo():
    assert pick_backend("auto", "cuda:3") == "nccl" and pick_backend("auto", "cpu") == "gloo"
    assert pick_backend("gloo", "cuda") == "gloo"
    for wrong, device in (("nccl", "cpu"), ("tcp", "cpu"), (True, "cpu")):
        with pytest.raises(UserError, match=f"--backend={wrong}"):
            pick_backend(wrong, device)


@pytest.mark.parametrize("omp, processes, cores, threads", [
    (None, 1, 16, 16), (None, 2, 16, 8), ("1", 2, 16, 8), ("1", 1, 16, 1), ("4", 2, 16, 4), ("4", 1, 16, 4),
    ("1", 8, 4, 1), ("1", 3, 16, 5), ("", 2, 16, 8), ("0", 2, 16, 8), ("x", 1, 16, 16), ("4,2", 1, 16, 16),
])  # fmt: skip
def test_threads_share_the_cores_and_torchruns_1_is_its_default(omp, processes, cores, threads):
    assert pick_threads(omp, processes, cores) == threads


def test_cores_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"num_physical_cores": 8})
    monkeypatch.setattr(configurator.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert usable_cores("no such file") == 3
    monkeypatch.setattr(configurator.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert usable_cores("no such file") == 8


@pytest.mark.parametrize("cpu_max, cores", [
    ("max 100000\n", 8), ("200000 100000\n", 2), ("250000 100000\n", 3), ("50000 100000\n", 1), ("1600000 100000\n", 8),
    ("", 8), ("200000\n", 8), ("200000 0\n", 8),
])  # fmt: skip
def test_a_containers_quota_of_processor_time_bounds_the_cores(monkeypatch, tmp_path, cpu_max, cores):
    """cpu.max has microseconds of processor time, and of the period that they are for (the kernel's cgroup-v2.rst)."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"num_physical_cores": 8})
    monkeypatch.setattr(configurator.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    (tmp_path / "cpu.max").write_text(cpu_max)
    assert usable_cores(tmp_path / "cpu.max") == cores


# ----------------------------------------------------------------------------------------------
# peak FLOPS

# name as torch gives it: 16-bit, tf32, float32 in TFLOPS: the makers' data sheets, dense
PEAKS = {
    "NVIDIA B200": (2250, 1125, 75),
    "NVIDIA GB200": (2500, 1250, 75),
    "NVIDIA H100 80GB HBM3": (989.4, 494.7, 67),
    "NVIDIA H200": (989.4, 494.7, 67),
    "NVIDIA GH200 480GB": (989.4, 494.7, 67),
    "NVIDIA H100 PCIe": (756, 378, 51),
    "NVIDIA H100 NVL": (835, 417, 60),
    "NVIDIA A100-SXM4-40GB": (312, 156, 19.5),
    "NVIDIA A100-SXM4-80GB": (312, 156, 19.5),
    "NVIDIA A100-PCIE-40GB": (312, 156, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 156, 19.5),
    "A100-SXM4-40GB": (312, 156, 19.5),
    "NVIDIA A800-SXM4-80GB": (312, 156, 19.5),
    "NVIDIA A800 80GB PCIe": (312, 156, 19.5),
    "NVIDIA A30": (165, 82, 10.3),
    "NVIDIA A40": (149.7, 74.8, 37.4),
    "NVIDIA A10": (125, 62.5, 31.2),
    "NVIDIA L40S": (362, 183, 91.6),
    "NVIDIA L4": (121, 60, 30.3),
    "NVIDIA RTX A6000": (154.8, 77.4, 38.7),
    "NVIDIA RTX 6000 Ada Generation": (364, 182, 91.1),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8, 104.8),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
    "NVIDIA GeForce RTX 3090": (71, 35.6, 35.6),
    "NVIDIA GeForce RTX 3060": (25.5, 12.7, 12.7),
    "AMD Instinct MI300X": (1307, 654, 163.4),
    "AMD Instinct MI250X": (191.5, None, 23.9),
}
BEFORE_AMPERE = {"Tesla V100-SXM2-16GB": (125, 15.7), "Tesla V100-SXM2-32GB": (125, 15.7), "Tesla T4": (65, 8.1)}

# SMs, boost clock in GHz for the tensor cores, FLOPs a cycle an SM; then those of float32 and its clock
NVIDIA = {
    "NVIDIA H100 80GB HBM3": (132, 1.830, 4096, 256, 1.980),
    "NVIDIA H100 PCIe": (114, 1.620, 4096, 256, 1.755),
    "NVIDIA A100-SXM4-80GB": (108, 1.410, 2048, 128, 1.410),
    "NVIDIA A30": (56, 1.440, 2048, 128, 1.440),
    "NVIDIA A40": (84, 1.740, 1024, 256, 1.740),
    "NVIDIA A10": (72, 1.695, 1024, 256, 1.695),
    "NVIDIA L40S": (142, 2.520, 1024, 256, 2.520),
    "NVIDIA L4": (58, 2.040, 1024, 256, 2.040),
    "NVIDIA RTX A6000": (84, 1.800, 1024, 256, 1.800),
    "NVIDIA RTX 6000 Ada Generation": (142, 2.505, 1024, 256, 2.505),
    "NVIDIA GeForce RTX 5090": (170, 2.407, 512, 256, 2.407),
    "NVIDIA GeForce RTX 4090": (128, 2.520, 512, 256, 2.520),
    "NVIDIA GeForce RTX 3090": (82, 1.695, 512, 256, 1.695),
    "NVIDIA GeForce RTX 3060": (28, 1.777, 512, 256, 1.777),
    "Tesla V100-SXM2-16GB": (80, 1.530, 1024, 128, 1.530),
    "Tesla T4": (40, 1.590, 1024, 128, 1.590),
}
# None of these is a device above, however like one its name is.
OTHERS = [
    "NVIDIA A10G", "NVIDIA A10M", "NVIDIA A16", "NVIDIA A2", "NVIDIA A100X", "NVIDIA L40", "NVIDIA L20", "NVIDIA L2",
    "NVIDIA H20", "NVIDIA H800", "NVIDIA H200 NVL", "NVIDIA H800 PCIe", "NVIDIA B300", "NVIDIA T4G", "NVIDIA T400",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H100 PCIe MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 3060 Ti",
    "NVIDIA GeForce RTX 3060 Laptop GPU", "NVIDIA GeForce RTX 3060 Mobile / Max-Q", "NVIDIA GeForce RTX 4080",
    "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA GeForce GTX 1080 Ti", "NVIDIA RTX A600", "NVIDIA RTX A4000",
    "NVIDIA RTX 5000 Ada Generation", "Quadro RTX 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    "Tesla V100-PCIE-16GB", "Tesla V100S-PCIE-32GB", "Tesla V100-FHHL-16GB", "Tesla P100-PCIE-16GB", "Tesla K80",
    "AMD Instinct MI300A", "AMD Instinct MI250", "AMD Instinct MI210", "AMD Radeon RX 7900 XTX", "NVIDIA Thor", "",
]  # fmt: skip


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_known_device(name):
    half, tf32, single = PEAKS[name]
    assert peak_from_table(name, "bfloat16") == peak_from_table(name, "float16") == pytest.approx(half * 1e12)
    assert peak_from_table(name, "float32") == pytest.approx(single * 1e12)
    if tf32:
        assert peak_from_table(name, "float32", tf32=True) == pytest.approx(tf32 * 1e12)


@pytest.mark.parametrize("name", BEFORE_AMPERE)
def test_devices_before_ampere_have_neither_bfloat16_nor_tf32(name):
    half, single = BEFORE_AMPERE[name]
    assert peak_from_table(name, "float16") == pytest.approx(half * 1e12)
    assert peak_from_table(name, "bfloat16") is None
    assert peak_from_table(name, "float32") == peak_from_table(name, "float32", tf32=True) == pytest.approx(single * 1e12)


@pytest.mark.parametrize("name", NVIDIA)
def test_nvidias_peaks_are_sms_times_clock_times_flops_a_cycle(name):
    sms, clock, a_cycle, a_cycle_single, clock_single = NVIDIA[name]
    assert peak_from_table(name, "float16") == pytest.approx(sms * clock * 1e9 * a_cycle, rel=0.015)
    assert peak_from_table(name, "float32") == pytest.approx(sms * clock_single * 1e9 * a_cycle_single, rel=0.01)
    if name not in BEFORE_AMPERE:
        assert peak_from_table(name, "float32", True) == pytest.approx(sms * clock * 1e9 * a_cycle / 2, rel=0.015)


@pytest.mark.parametrize("name", OTHERS)
def test_a_device_that_only_resembles_a_known_one_is_not_taken_for_it(name):
    assert peak_from_table(name, "float16") is None and peak_from_table(name, "float32") is None


def test_the_start_up_line_says_where_the_peak_is_from(monkeypatch):
    machine(monkeypatch, cuda=1)
    monkeypatch.setattr(configurator, "measure_peak", lambda device, dtype: 7e12)
    assert find_peak_flops(5e9, "cuda", "bfloat16") == (5e9, "given")
    assert find_peak_flops(0.0, "cuda", "bfloat16") == (312e12, "NVIDIA A100-SXM4-80GB, bfloat16")
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # what the scripts set on CUDA
        assert find_peak_flops(0.0, "cuda:0", "float32") == (156e12, "NVIDIA A100-SXM4-80GB, tf32")
        machine(monkeypatch, cuda=1, name="Tesla V100-SXM2-16GB")
        assert find_peak_flops(0.0, "cuda", "float32") == (15.7e12, "Tesla V100-SXM2-16GB, float32")
        machine(monkeypatch, cuda=1)
        torch.set_float32_matmul_precision("highest")
        assert find_peak_flops(0.0, "cuda", "float32") == (19.5e12, "NVIDIA A100-SXM4-80GB, float32")
    finally:
        torch.set_float32_matmul_precision(precision)
    machine(monkeypatch, cuda=1, name="NVIDIA A10G")
    assert find_peak_flops(0.0, "cuda", "bfloat16") == (7e12, "measured, cuda, bfloat16")
    assert find_peak_flops(0.0, "cpu", "float32") == (7e12, "measured, cpu, float32")


def test_a_peak_is_measured_without_touching_the_random_numbers():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    peak = measure_peak("cpu", "float32")
    assert 1e8 < peak < 1e14
    assert torch.equal(torch.get_rng_state(), state)
