"""nanogpt/errors.py: one line for a mistake and for a failure of the machine, as a user sees them."""

import os
import shlex
import subprocess

import pytest
import torch
from conftest import ROOT, TINY, error_line, flags

from nanogpt import errors
from nanogpt.errors import command, machine_failure, relative_path


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
    """A script in the project's folder that does `line`."""
    (project / name).write_text(f"import os, torch\nfrom nanogpt import errors\nerrors.install()\nprint('before')\n{line}\n")
    return name


@pytest.mark.parametrize("line, code, message", [
    ("raise errors.UserError('two\\n  lines')", 2, "two lines"),
    ("open('nowhere/file')", 1, "nowhere/file: No such file or directory"),
    ("raise OSError(28, os.strerror(28), 'ckpt.pt')", 1, "ckpt.pt: No space left on device"),
    ("raise BrokenPipeError(32, 'Broken pipe')", 1, "Broken pipe"),  # and it is not that of stdout
    ("raise MemoryError", 1, "out of memory: try a smaller --batch_size"),
    ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')", 1, "out of memory: try a smaller"),
    ("torch.empty(1 << 60)", 1, "out of memory: try a smaller --batch_size"),
])  # fmt: skip
def test_a_failure_of_the_machine_is_one_line_and_exit_1(run, own_project, line, code, message):
    result = run(failing(own_project, "failing.py", line), project=own_project, expect=code)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: " + message), result.stderr
    assert result.stdout == "before\n"


def test_a_programs_own_stream_is_kept_where_the_standard_one_is_closed(run, own_project, tmp_path):
    """As in an editor that shows what is printed in a window of its own."""
    lines = ["import io, os, sys", "from nanogpt import errors", "sys.stdout = own = io.StringIO()", "os.close(1)",
             "errors.install()", "print('a line')", f"open({str(tmp_path / 'seen')!r}, 'w').write(own.getvalue())"]  # fmt: skip
    (own_project / "editor.py").write_text("\n".join(lines))
    run("editor.py", project=own_project)
    assert (tmp_path / "seen").read_text() == "a line\n"


def test_a_stream_that_is_none_is_replaced_though_its_number_is_in_use(run, own_project):
    lines = ["import sys", "from nanogpt import errors", "sys.stdout = None", "errors.install()", "print('a line', flush=True)",
             "sys.stdout.write('another')"]  # fmt: skip
    (own_project / "none.py").write_text("\n".join(lines))
    assert run("none.py", project=own_project).stderr == ""


def test_importing_the_project_changes_nothing_in_the_process(run, own_project):
    """Only configure(), which a script calls, has mistakes printed as one line."""
    program = "import sys, model, configurator, data.text, nanogpt.errors\nassert sys.excepthook is sys.__excepthook__\n"
    (own_project / "imports.py").write_text(program)
    assert run("imports.py", project=own_project).stderr == ""


@pytest.mark.parametrize("script", ["train.py", "sample.py", "tools/plan.py", "tools/export.py", "data/text_bpe/prepare.py"])
@pytest.mark.parametrize("old", ["torch.__version__ = '2.10.1+cpu'", "sys.version_info = (3, 10, 9, 'final', 0)"])
def test_an_old_python_or_torch_is_one_line(run, own_project, script, old):
    path = own_project / os.path.dirname(script) / "old.py"
    path.write_text(f"import sys, torch, runpy\n{old}\nsys.argv[0] = {str(own_project / script)!r}\n"
                    "runpy.run_path(sys.argv[0], run_name='__main__')\n")  # fmt: skip
    line = error_line(run(str(path.relative_to(own_project)), project=own_project, expect=2))
    assert line.startswith("this project needs Python 3.11 and torch 2.11 or newer, and this is Python 3.")


NOTEBOOK = """
import runpy, signal, sys, types
from data.dataset import Dataset

class Events(list):
    def register(self, name, function):
        if name == "post_execute" and function not in self:
            self.append(function)

shell = types.SimpleNamespace(events=Events())  # what nanogpt uses of IPython
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
kept, handlers = [], [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

def cell(*arguments):
    \"\"\"%run train.py: no excepthook is called, and the old objects stay.\"\"\"
    sys.argv = ["train.py", *sys.argv[1:3], *arguments]
    try:
        kept.append(runpy.run_path("train.py", run_name="__main__"))
    except BaseException as error:
        kept.append(error)
    if not isinstance(kept[-1], ValueError):  # it gives back by itself; only after a bug the notebook does
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for function in shell.events:
        function()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return kept[-1]
"""


def test_a_notebook_gets_its_lock_and_its_signals_back_however_a_run_ends(run, own_project, tmp_path):
    program = own_project / "notebook.py"
    program.write_text(NOTEBOOK + f"""
import os
settings, out = {flags(TINY)!r}, {str(tmp_path / 'out')!r}
sys.argv[1:] = [f"--out_dir={{out}}", "--init_from=auto"]
assert isinstance(cell(*settings), dict), kept
assert isinstance(cell(*settings, "--max_iters=12"), dict), kept  # the lock is free
opened = Dataset.open
def fails(self, split):
    raise ValueError("a bug")
Dataset.open = fails
assert str(cell(*settings, "--max_iters=16")) == "a bug"
def stops(self, split):
    os.kill(os.getpid(), signal.SIGTERM)
    return opened(self, split)
Dataset.open = stops
assert cell(*settings, "--max_iters=16").code == 143
Dataset.open = opened
assert cell(*settings, "--max_iters=16")["iter_num"] == 17
""")  # fmt: skip
    result = run("notebook.py", project=own_project, cwd=own_project)
    assert result.losses[-1][:2] == ("iter", 16) and "another run" not in result.stdout


def test_a_bug_keeps_its_traceback(run, own_project):
    result = run(failing(own_project, "buggy.py", "{}['key']"), project=own_project, expect=1)
    assert "Traceback" in result.stderr and "KeyError: 'key'" in result.stderr


def test_an_interrupt_and_a_reader_that_has_seen_enough_are_no_errors(run, own_project):
    result = run(failing(own_project, "a.py", "raise KeyboardInterrupt"), project=own_project, expect=130)
    assert result.stderr == ""
    gone = "read, write = os.pipe(); os.close(read); os.dup2(write, 1); print('more', flush=True)"
    result = run(failing(own_project, "b.py", gone), project=own_project, expect=0)
    assert result.stderr == ""


# ----------------------------------------------------------------------------------------------
# what collectives say: a process that is gone, or a failure of their own


GONE = "another process is gone or cannot be reached: "
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:317, {}, NCCL version 2.27.3\n{}\nLast error:\n{}"


def nccl(kind, meaning, last):
    return NCCL.format(kind, meaning, last)


OWN = {
    "a torch without it": (
        "Distributed package doesn't have NCCL built in",
        ["Distributed package doesn't have NCCL built in"],
    ),
    "without MPI": (
        "Distributed package doesn't have MPI built in. MPI is only included if you build PyTorch from source",
        ["MPI built in"],
    ),
    "two ranks on a GPU": (
        nccl("invalid usage (run with NCCL_DEBUG=WARN for details)",
             "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
             "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"),
        ["invalid usage", "Last error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"],
    ),
    "the driver": (
        nccl("unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
             "ncclUnhandledCudaError: Call to CUDA function failed.",
             "Cuda failure 'CUDA driver version is insufficient for CUDA runtime version'"),
        ["unhandled cuda error", "Last error: Cuda failure 'CUDA driver version is insufficient"],
    ),
    "no such interface": (
        "[enforce fail at ../third_party/gloo/gloo/transport/tcp/device.cc:84] ifa != nullptr. "
        "Unable to find address for: eth9",
        ["Unable to find address for: eth9"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("text, said", OWN.values(), ids=OWN.keys())
def test_a_failure_of_the_library_itself_is_no_process_that_is_gone(text, said):
    line = machine_failure(RuntimeError(text))
    assert "another process" not in line and all(part in line for part in said), line


LOST = [
    nccl("remote process exited or there was a network error",
         "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
         "socketProgress: Connection closed by remote peer node1<40000>"),
    nccl("unhandled system error (run with NCCL_DEBUG=INFO for details)",
         "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
         "socketStartConnect: Connect to 10.0.0.1<44000> failed : Connection refused"),
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600029 ms",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40286",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Read error [127.0.0.1]:21022: Connection reset by peer",
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation",
    "Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error",
    "Application timeout caused pair closure (gloo)",
    "Connection reset by peer",
]  # fmt: skip


@pytest.mark.parametrize("text", LOST)
def test_a_process_that_is_gone_is_said_with_its_cause(text):
    line = machine_failure(RuntimeError(text))
    assert line.startswith(GONE + text.splitlines()[0])
    assert text.splitlines()[-1] in line


def test_torchs_own_class_of_such_errors_is_no_bug_whatever_its_words():
    taken = "The server socket has failed to listen on any local network address. port: 29500, name: EADDRINUSE"
    assert machine_failure(torch.distributed.DistError(taken)) == taken
    late = "The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 29500)."
    assert machine_failure(torch.distributed.DistError(late)) == GONE + late


def test_other_runtime_errors_are_bugs():
    assert machine_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert machine_failure(RuntimeError("the computation timed out")) is None


# ----------------------------------------------------------------------------------------------
# nanogpt/errors.py: paths and commands as a user types them


def test_a_path_is_that_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert relative_path("train.py") == "train.py"
    monkeypatch.chdir(tmp_path)
    assert os.path.samefile(relative_path("data/text_char/prepare.py"), ROOT / "data" / "text_char" / "prepare.py")
    assert not os.path.isabs(relative_path("train.py"))


def other_drive(path, start=None):
    """os.path.relpath of Windows, with the current folder on another drive."""
    raise ValueError("path is on mount 'D:', start on mount 'C:'")


def test_on_another_drive_the_path_is_absolute(monkeypatch):
    monkeypatch.setattr(os.path, "relpath", other_drive)
    assert relative_path("train.py") == str(ROOT / "train.py")
    assert command("train.py", "--out_dir=x") == f"python {ROOT / 'train.py'} --out_dir=x"


def test_what_names_a_command_works_there_too(tmp_path, monkeypatch):
    from data.bins import open_checked
    from data.text import print_next
    from nanogpt.progress import Progress

    monkeypatch.setattr(os.path, "relpath", other_drive)
    (tmp_path / "prepare.py").write_text("")
    with pytest.raises(errors.UserError) as error:
        open_checked(str(tmp_path / "train.bin"), 16, "openwebtext")
    assert f"python {tmp_path / 'prepare.py'}" in str(error.value)
    print_next("config/train_gpt2.py")
    progress = Progress({}, 0, 64, None, max_iters=5, patience=0, max_seconds=0.0)
    progress.last_lines(3, str(tmp_path), "cpu")
    assert str(ROOT / "sample.py") in progress.last_lines(6, "out", "cpu")[2]


@pytest.mark.parametrize("argument", [
    "--out_dir=out", "--out_dir=My Runs/x", "--out_dir=a'b", '--out_dir=a"b', "--out_dir=$HOME", "--out_dir=a;ls", "--x=*",
    "--out_dir=a&b", "--out_dir=ü", "--out_dir=(a)", "--out_dir=a\\b", "--out_dir=#1", "--out_dir=`x`", "--out_dir=~/x",
])  # fmt: skip
def test_a_command_is_quoted_for_the_shell(argument, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = command("train.py", "config/a.py", argument)
    assert shlex.split(line) == ["python", "train.py", "config/a.py", argument]
    shown = subprocess.run(["sh", "-c", "printf %s\\\\n " + line.removeprefix("python ")], capture_output=True, text=True)
    assert shown.stdout == f"train.py\nconfig/a.py\n{argument}\n"


def test_a_plain_command_has_no_quotes(monkeypatch):
    monkeypatch.chdir(ROOT)
    line = command("train.py", "--out_dir=out-a/b_1.2", launcher="torchrun --standalone")
    assert line == "torchrun --standalone train.py --out_dir=out-a/b_1.2"


def test_windows_has_quotes_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(errors.os, "name", "nt")
    line = command("train.py", "--out_dir=My Runs\\x")
    monkeypatch.undo()
    assert line == 'python train.py "--out_dir=My Runs\\x"'
