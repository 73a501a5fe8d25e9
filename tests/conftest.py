"""What the tests share: a copy of the project to run scripts in, the golden settings' data, and a runner."""

import compileall
import csv
import functools
import hashlib
import os
import pickle
import py_compile
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests mean the CPU; tools/gpu_check.py is what checks a GPU

import launcher
import numpy as np
import pytest
import torch

for name in {"SIGINT", "SIGHUP", "SIGTERM"} & set(dir(signal)):  # nohup and a shell's `&` have some of them ignored,
    if signal.getsignal(number := getattr(signal, name)) is signal.SIG_IGN:  # and so would the runs that tests stop
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
torch.set_num_threads(1)  # models this small gain nothing from more, and beside other work they lose a lot

GOLDEN = TESTS / "golden"
SHARED = ROOT.parent / "shared"
if (SHARED / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))

# The settings of golden/synthetic.csv.
SYNTHETIC = dict(
    dataset="synthetic", device="cpu", dtype="float32", compile=False, n_layer=2, n_head=2, n_embd=64, block_size=32,
    batch_size=8, gradient_accumulation_steps=2, max_iters=150, lr_decay_iters=120, warmup_iters=10,
    learning_rate=1e-3, min_lr=1e-4, dropout=0.0, bias=False, eval_interval=50, eval_iters=5, log_interval=1,
    peak_flops=1e9,
)  # fmt: skip
# Smaller still, where the numbers do not matter.
TINY = SYNTHETIC | dict(
    n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=1, max_iters=8,
    lr_decay_iters=8, warmup_iters=2, learning_rate=1e-2, min_lr=1e-3, eval_interval=4, eval_iters=2,
)  # fmt: skip
# As small, with a few saves between its evaluations.
SMALL = TINY | dict(max_iters=16, lr_decay_iters=16, gradient_accumulation_steps=2, save_interval=3)
# What a run takes from its checkpoint is its own; the peak is the machine's, and to measure one takes half a second.
RESUME = dict(init_from="resume", device="cpu", peak_flops=1e9)
# whole runs in bfloat16 take long where the processor has to emulate it
IN_BFLOAT16 = [] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [pytest.mark.slow]
CHARACTERS = "\n " + string.ascii_letters + string.digits[:7]  # 61, an id each
META = {
    "vocab_size": 61,
    "stoi": {c: i for i, c in enumerate(CHARACTERS)},
    "itos": dict(enumerate(CHARACTERS)),
}
# what torch says of 127.0.0.1, with several processes, where there is no network
NO_NAME_SERVER = re.compile(r"^\[W.*hostname of the client socket cannot be retrieved.*\n", re.M)


def flags(settings=None, **more):
    """Settings as --key=value arguments."""
    return [f"--{name}={value}" for name, value in {**(settings or {}), **more}.items()]


def parse(text):
    """The printed losses: ('step', n, train, val) and ('iter', n, loss), the figures as they were printed."""
    found = re.findall(r"^step (\d+): train loss (\S+), val loss (\S+)$|^iter (\d+): loss (\S+),", text, re.M)
    return [("step", int(s), t, v) if s else ("iter", int(n), loss) for s, t, v, n, loss in found]


def rows(out_dir):
    """log.csv without the columns that time, or an estimate from it, is in."""
    with open(out_dir / "log.csv", newline="") as f:
        table = list(csv.DictReader(f))
    timed = ("ms", "tokens_per_s", "mfu")
    return [tuple(value for name, value in row.items() if name not in timed) for row in table]


def tree(*folders):
    """{path: content's hash} of every file and folder under `folders`, compiled Python left out."""
    found = {}
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*")):
            if "__pycache__" not in path.parts:
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def error_line(result):
    """What stands after `error: ` in the one line that a script wrote to stderr; it exited with 2."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0].removeprefix("error: ")


def one_failure(result, code):
    """The one line on stderr of a run that ended with `code`."""
    assert result.returncode == code, (result.stdout, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def machine(monkeypatch, cuda=0, mps=False, bf16=True, name="NVIDIA A100-SXM4-80GB"):
    """Has torch report `cuda` GPUs of that name, and mps or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str

    @property
    def losses(self):
        return parse(self.stdout)

    @property
    def lines(self):
        return self.stdout.splitlines()


class Running:
    """A script under way."""

    def __init__(self, script, arguments, cwd, environment, folder, interpreter, stdin=b""):
        streams = [str(folder / name) for name in ("stdin", "stdout", "stderr")]
        for name in streams:
            Path(name).touch()
        Path(streams[0]).write_bytes(stdin)
        self.out, self.err = streams[1:]
        if interpreter or sys.platform != "linux":
            with open(streams[0], "rb") as given, open(self.out, "wb") as out, open(self.err, "wb") as err:
                command = [sys.executable, script, *arguments]
                self.process = subprocess.Popen(command, cwd=cwd, env=environment, stdin=given, stdout=out, stderr=err)
        else:
            self.process = launcher.fork(script, arguments, cwd, environment, *streams)

    @property
    def code(self):
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def read(self):
        return [Path(name).read_text(encoding="utf-8") for name in (self.out, self.err)]

    def wait(self, until, seconds=300):
        """Waits for until() to hold, or for the script's end."""
        deadline = time.monotonic() + seconds
        while not until() and self.code is None:
            if time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"after {seconds} s it was still at:\n" + "\n".join(self.read()))
            time.sleep(0.005)

    def wait_for(self, text):
        self.wait(lambda: text in self.read()[0])
        assert text in self.read()[0], self.read()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        if not isinstance(self.process, subprocess.Popen):
            self.process.join(300)  # sooner back than wait(), which looks from time to time
        self.wait(lambda: False)
        out, err = self.read()
        return Result(self.code, out, NO_NAME_SERVER.sub("", err))


def project_code():
    """The project's Python files, sorted, as paths below ROOT; not the tests."""
    patterns = ("*.py", "config/*.py", "data/*.py", "data/*/*.py", "nanogpt/*.py", "tools/*.py")
    return sorted(path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern))


@functools.cache
def compiled_project():
    """A folder with the code, tests/programs and the bytecode of both, which would take half of a short run to make."""
    folder = tempfile.TemporaryDirectory()
    programs = [path.relative_to(ROOT) for path in TESTS.glob("programs/*.py")]
    for path in [*project_code(), *programs]:
        copy = Path(folder.name, path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy)
    compileall.compile_dir(folder.name, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return folder  # it is removed when this object is


def copy_project(to):
    """The code alone, no data, so that no test writes to the checkout; and tests/programs, which run beside it."""
    shutil.copytree(compiled_project().name, to, dirs_exist_ok=True)
    return to


def write_synthetic(folder, meta=META):
    """The golden figures' dataset: tok(i) = (i*i*7 + i//3) % 61, train i < 20000, val 20000 <= i < 24000."""
    folder.mkdir(parents=True, exist_ok=True)
    i = np.arange(24000, dtype=np.int64)
    tokens = ((i * i * 7 + i // 3) % 61).astype("<u2")
    tokens[:20000].tofile(folder / "train.bin")
    tokens[20000:].tofile(folder / "val.bin")
    if meta:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def shared():
    """The folder with tiny Shakespeare and GPT-2's vocabulary, where it is."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A copy of the code with data/synthetic; tests may add files, but leave those that are there alone."""
    folder = copy_project(tmp_path_factory.mktemp("project") / "main")
    write_synthetic(folder / "data" / "synthetic")
    return folder


@pytest.fixture
def own_project(tmp_path):
    """As `project`, but the test's own, to spoil."""
    folder = copy_project(tmp_path / "own")
    write_synthetic(folder / "data" / "synthetic")
    return folder


@pytest.fixture(scope="session")
def start(project, tmp_path_factory):
    """start(script, *arguments) -> Running, with one thread unless `env` says otherwise (None takes a variable out).

    `interpreter`: by a new Python rather than by a fork of a warm one. `stdin`: the bytes that it can read there."""
    running = []

    def start(script, *arguments, cwd=None, interpreter=False, env=None, project=project, stdin=b""):
        keep = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment = keep | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"} | (env or {})
        environment = {name: value for name, value in environment.items() if value is not None}
        path = script if os.path.isabs(script) else str(project / script)
        cwd = str(cwd or project)
        folder = tmp_path_factory.mktemp("run")
        running.append(Running(path, [str(a) for a in arguments], cwd, environment, folder, interpreter, stdin))
        return running[-1]

    yield start
    for each in running:
        if each.code is None:
            each.process.kill()


@pytest.fixture(scope="session")
def run(start):
    """run(script, *arguments, expect=0) -> Result, whose return code is `expect` (None: any)."""

    def run(script, *arguments, expect=0, **options):
        result = start(script, *arguments, **options).end()
        assert expect in (None, result.returncode), f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture(scope="session")
def synthetic_run(run, tmp_path_factory):
    """The run of golden/synthetic.csv: (its out_dir, its Result)."""
    out_dir = tmp_path_factory.mktemp("synthetic") / "out"
    return out_dir, run("train.py", *flags(SYNTHETIC, out_dir=out_dir))


@pytest.fixture(scope="session")
def train(run):
    """train(settings, expect=0, program=None, **more) -> Result of train.py, or of that one of tests/programs.

    `env` has what the program reads of its environment."""

    def train(settings, expect=0, program=None, env=None, project=None, **more):
        script = f"tests/programs/{program}" if program else "train.py"
        environment = {name: str(value) for name, value in (env or {}).items()}
        options = {"project": project} if project else {}
        return run(script, *flags(settings, **more), expect=expect, env=environment, **options)

    return train


@pytest.fixture(scope="session")
def whole_run(train, tmp_path_factory):
    """whole_run(settings) -> (losses, rows of log.csv) of the run that nothing interrupts."""
    seen = {}

    def whole_run(settings):
        key = tuple(sorted(settings.items()))
        if key not in seen:
            out_dir = tmp_path_factory.mktemp("whole") / "out"
            losses = train(settings, out_dir=out_dir).losses
            seen[key] = losses, rows(out_dir)
            assert len(losses) > settings["max_iters"] and len(seen[key][1]) == len(losses)
        return seen[key]

    return whole_run


@pytest.fixture(scope="session")
def _small_run(train, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("small") / "out"
    train(SMALL, out_dir=out_dir, max_iters=8)
    assert torch.load(out_dir / "last.pt")["iter_num"] == 9 and torch.load(out_dir / "ckpt.pt")["iter_num"] == 8
    return out_dir


@pytest.fixture
def small_run(_small_run, tmp_path):
    """The test's own copy of the folder of SMALL's run stopped after iteration 8: last.pt is at 9, ckpt.pt at 8."""
    return Path(shutil.copytree(_small_run, tmp_path / "out"))


@pytest.fixture
def work(tmp_path):
    """The test's own folder as a copy of the project in which no dataset is prepared."""
    return copy_project(tmp_path)
