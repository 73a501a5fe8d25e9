"""Settings from config files and the command line, and what 'auto' means on this machine.

A script's settings are its plain module globals. configure(globals()) lays config files and
--key=value arguments onto them, later ones winning. Importing this module also turns a mistake of
the user (UserError) into one `error:` line and exit code 2, and a failure of the machine (disk
full, out of memory) into one line and exit code 1; anything else is a bug and keeps its traceback.
"""

import ast
import atexit
import builtins
import ctypes
import difflib
import gc
import importlib.util
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import types
from datetime import timedelta

import torch
import torch.distributed as dist

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = os.path.dirname(os.path.abspath(__file__))  # config/ and data/ lie here, whatever the working directory


class UserError(ValueError):
    """Something the user can put right. The message is the one line they see."""


# ----------------------------------------------------------------------------------------------
# errors


def _machine_failure(error):
    """The one line for a failure of the machine, or None where the exception is a bug of ours."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory: try a smaller --batch_size or --block_size, or a smaller model"
    if isinstance(error, RuntimeError) and re.search("gloo|nccl|Connection (closed|reset)", str(error), re.I):
        return f"another process is gone or cannot be reached: {str(error).splitlines()[0]}"
    return None


def _drop_output():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@atexit.register
def _flush_output():
    """Python's own last flush of stdout would complain of a pipe that is closed by then."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()


def _report(kind, error, trace):
    """sys.excepthook: one line for what is not a bug."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    if issubclass(kind, BrokenPipeError):  # `| head` has seen enough; nothing is wrong
        _drop_output()
        sys.exit(0)
    message = str(error) if issubclass(kind, UserError) else _machine_failure(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
        sys.exit(1)
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        # Nearly always rank 0 has met the same error and says so; torchrun then ends us in our sleep.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        message = f"rank {rank}: {message}"
    sys.stdout.flush()
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(2 if issubclass(kind, UserError) else 1)


sys.excepthook = _report


# ----------------------------------------------------------------------------------------------
# settings


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
    # The settings so far are read as built-ins are, so that what lands in the scope is what the file has set.
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
    """Lays the command line onto a script's settings, `namespace` (its globals()), in place.

    An argument without dashes is a config file, or is handed to `positional`, where a script takes
    files of another kind. Returns {name: value} of what was given. Raises UserError.
    """
    names = setting_names(namespace)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path's odd bytes, or a terminal without our characters
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
    """Lays a checkpoint's settings, `saved`, onto a script's, those in `names`, where the user gave no other.

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


def at_least(least, namespace, names):
    """UserError naming the first of the settings `names` (one text) that is below `least`."""
    for name in names.split():
        if namespace[name] < least:
            raise UserError(f"--{name}={namespace[name]}: must be at least {least}")


def one_of(namespace, **choices):
    """UserError naming the first of the settings that is none of its choices."""
    for name, values in choices.items():
        if namespace[name] not in values:
            raise UserError(f"--{name}={namespace[name]}: takes {' or '.join(values)}")


def needed_for(asked, library, what):
    """UserError where `what` is asked for and its library is not installed, before anything is touched."""
    if asked:
        try:
            importlib.import_module(library)
        except ImportError:
            raise UserError(f"{what} needs {library}: pip install {library}") from None


def from_here(script):
    """The path of one of the project's scripts, as one types it in the folder that one is in."""
    return os.path.relpath(os.path.join(ROOT, script))


def share_evenly(gradient_accumulation_steps, world_size):
    """How many of the micro-batches of an iteration are each process's."""
    if gradient_accumulation_steps % world_size:
        raise UserError(
            f"--gradient_accumulation_steps={gradient_accumulation_steps} cannot be shared by {world_size} processes: "
            "give a multiple"
        )
    return gradient_accumulation_steps // world_size


# ----------------------------------------------------------------------------------------------
# what 'auto' means


def pick_device(device):
    """The torch device named `device`, 'auto' being cuda, else mps, else cpu; UserError if it is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = str(device).partition(":")
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if kind not in counts or not re.fullmatch("[a-z]+(:(0|[1-9][0-9]{0,3}))?", device):
        raise UserError(f"--device={device}: takes auto, cpu, cuda, cuda:N or mps")
    if int(index or 0) >= counts[kind]:
        here = ", ".join(f"{n} {k}" for k, n in counts.items() if n)
        raise UserError(f"--device={device}: there is no such device on this machine ({here})")
    return "cpu" if kind == "cpu" else device


def fast_bfloat16():
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_dtype(dtype, device):
    """The dtype to compute in. 'auto': bfloat16 where the device is fast at it, else float16 on CUDA, else float32."""
    if dtype in ("float32", "bfloat16", "float16"):
        return dtype
    if dtype != "auto":
        raise UserError(f"--dtype={dtype}: takes auto, float32, bfloat16 or float16")
    if device.startswith("cuda"):
        # emulated bfloat16 (before Ampere) is slower than float16 on the tensor cores
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu":
        return "bfloat16" if fast_bfloat16() else "float32"
    return "float32"


def pick_compile(compile, device):
    """(whether to torch.compile the model, a line for the user or None).

    'auto' compiles on CUDA. On a CPU it does not pay: nearly all the time goes into matrix products
    and the few passes of model.py's CPU part, and the compiler's minute is more than all but long runs of a
    small model get back.
    """
    if compile != "auto" and not isinstance(compile, bool):
        raise UserError(f"--compile={compile}: takes auto, True or False")
    if compile is False or (compile == "auto" and not device.startswith("cuda")):
        return False, None
    if not device.startswith("cuda"):  # the one that torch._inductor takes
        found = {"C++ compiler": shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))}
    else:  # Triton builds its launcher with a C compiler
        found = {"Triton": importlib.util.find_spec("triton")}
        found["C compiler"] = any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ("gcc", "clang")))
        found["GPU of compute capability 7.0"] = torch.cuda.get_device_capability(device) >= (7, 0)
    found["Python.h"] = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    missing = next((name for name, there in found.items() if not there), None)
    return missing is None, missing and f"no {missing} is found, so the model runs without torch.compile"


def pick_threads(threads, processes, cores):
    """CPU threads for each of `processes` on a machine of `cores`, OMP_NUM_THREADS being `threads` (None: not set).

    torchrun sets it to 1 where it starts several processes, so 1 is then taken for its default.
    """
    if threads and threads.isdigit() and int(threads) > 0 and (processes == 1 or threads != "1"):
        return int(threads)
    return max(1, cores // processes)


def usable_cores(quota="/sys/fs/cgroup/cpu.max"):
    """Physical cores this process may run on: torch's own count, which torchrun's OMP_NUM_THREADS=1 would hide.

    No more than a container's quota of processor time, which Linux has in the file `quota`: more threads would wait.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        with open(quota, encoding="ascii") as f:
            share, period = map(int, f.read().split())  # microseconds; "max" where there is no limit
        allowed = min(allowed, max(1, math.ceil(share / period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass
    return min(allowed, torch.cpu.get_capabilities().get("num_physical_cores") or allowed)


def keep_memory():
    """Has glibc's malloc keep what large tensors lay in, where a CPU trains.

    By default it hands each back to the system, which clears every page of the next one anew: a fifth
    of a GPT-2's iteration. Other C libraries have no such call, or no such need.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)  # from the heap, however large
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks
        libc.mallopt(M_TOP_PAD, 1 << 26)


def pick_backend(backend, device):
    """The collectives' library: 'auto' is nccl on CUDA, else gloo."""
    if backend == "auto":
        return "nccl" if device.startswith("cuda") else "gloo"
    if backend not in ("nccl", "gloo", "mpi"):
        raise UserError(f"--backend={backend}: takes auto, nccl, gloo or mpi")
    if backend == "nccl" and not device.startswith("cuda"):
        raise UserError(f"--backend=nccl works on CUDA devices only, and this run is on {device}: use --backend=gloo")
    return backend


class Clock:
    """Marks in the time of `device`, and the seconds between two of them.

    CUDA and MPS are only handed work that they do later: a mark there is an event among that work, so
    that what an iteration is charged with is its own, and only reading two marks waits.
    """

    def __init__(self, device):
        self.kind = torch.device(device).type

    def mark(self):
        if self.kind == "cpu":
            return time.perf_counter()
        event = getattr(torch, self.kind).Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end):
        if self.kind == "cpu":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Progress:
    """How far a run is. Evaluations and saves are part of each stretch, and so of the rate and the estimate."""

    def __init__(self, max_iters, tokens_per_iter):
        self.iters, self.tokens_per_iter = max_iters + 1, tokens_per_iter
        self.before, self.rate = None, None  # (iteration, time) of the last line; tokens a second since

    def line(self, iter_num):
        """A line such as `5% done, 14,213 tokens/s, 0:12:34 left`; the first of a process knows no rate."""
        now, text = time.time(), f"{iter_num / self.iters:.0%} done"
        if self.before and iter_num > self.before[0]:
            seconds = (now - self.before[1]) / (iter_num - self.before[0])  # an iteration
            self.rate = self.tokens_per_iter / seconds
            text += f", {self.rate:,.0f} tokens/s, {timedelta(seconds=round(seconds * (self.iters - iter_num)))} left"
        self.before = iter_num, now
        return text


def peak_memory(device):
    """What this process has held at most, as a text: on the host, and on its device."""
    if resource is None:
        host = "host memory unknown"
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
        host = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB on the host"
    if device.startswith("cuda"):
        return f"{host}, {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}"
    return host


# ----------------------------------------------------------------------------------------------
# the processes of a run


class Processes:
    """This process among those of the run, by what torchrun sets; alone where it did not start it."""

    def __init__(self):
        self.several = "RANK" in os.environ
        for name in ("rank", "local_rank"):
            setattr(self, name, int(os.environ.get(name.upper(), 0)))
        for name in ("world_size", "local_world_size"):
            setattr(self, name, int(os.environ.get(name.upper(), 1)))
        self.hosts = self.exchange = None
        self.stop_signal = 0

    def join(self, backend):
        """Meets the others. What the hosts agree on travels by gloo, beside the gradients."""
        if self.several:
            place = {"store": self._own_store(), "rank": self.rank, "world_size": self.world_size}
            dist.init_process_group(backend, **(place if place["store"] else {}))
            sys.excepthook = _report  # torch has put one before it, which holds back what a hook that exits has printed
            # a day: while one process saves a large model, or evaluates, the others wait here and nowhere else
            self.hosts = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def _own_store(self):
        """torchrun's store under a prefix that is this start of the group's alone, or None where the whole store is.

        It outlives a restart, and who then found the addresses that dead processes left there would hang. So
        process 0 draws the prefix, and tells it to each process that asks by a number drawn for this start.
        """
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        prefix = drawn = os.urandom(8).hex()
        if self.rank > 0:
            store.set(f"rank {self.rank} asks", drawn)
            prefix = store.get(f"answer to {drawn}").decode()  # waits for it
            store.set(f"rank {self.rank} knows {prefix}", "")
        for rank in range(1, self.world_size) if self.rank == 0 else ():
            deadline = time.monotonic() + 600
            while not store.check([f"rank {rank} knows {prefix}"]):
                if store.check([f"rank {rank} asks"]):  # maybe one that is dead, whom the next will overwrite
                    store.set("answer to " + store.get(f"rank {rank} asks").decode(), prefix)
                if time.monotonic() > deadline:
                    raise OSError(f"process {rank} has not come for 10 minutes")
                time.sleep(0.01)
        return dist.PrefixStore(prefix, store)

    def largest(self, number):
        """The largest of the numbers that the processes call this with."""
        if not self.several:
            return number
        flag = torch.tensor(number)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.hosts)
        return flag.item()

    def listen(self):
        """Notes SIGTERM and SIGINT for asked_to_stop(). A second SIGINT stops this process at once."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number, frame):
        if number == signal.SIGINT and self.stop_signal:
            raise KeyboardInterrupt
        self.stop_signal = number

    def asked_to_stop(self):
        """The signal on which to stop, or 0; among several processes the same on all of them at the same call.

        Each call starts an exchange that the next one reads, so that nobody waits for the network.
        """
        if not self.several:
            return self.stop_signal
        agreed = self._exchanged()
        flag = torch.tensor(self.stop_signal)
        self.exchange = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.hosts, async_op=True)
        return agreed

    def _exchanged(self):
        if not self.exchange:
            return 0
        flag, work = self.exchange
        work.wait()
        self.exchange = None
        return flag.item()

    def leave(self):
        """Parts from the others, and ends the process if a signal has asked for it, with the shell's code for that."""
        if self.several:
            self._exchanged()
            gc.collect()  # what still holds the process group, such as a DDP model nobody refers to
            dist.destroy_process_group()
        if self.stop_signal:
            sys.exit(128 + self.stop_signal)

    def gather(self, thing):
        """A list of what every process calls this with, on rank 0; None on the others."""
        if not self.several:
            return [thing]
        things = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(thing, things, group=self.hosts)
        return things

    def wait(self):
        if self.several:
            dist.barrier(self.hosts)


# ----------------------------------------------------------------------------------------------
# the device's peak

# Dense peaks in TFLOPS: 16-bit tensor cores with float32 accumulation, tf32, float32. A row stands
# for a device whose name has all the words of its key, and no word of VARIANTS that the key lacks.
# NVIDIA's follow from SMs x boost clock x FLOPs a cycle an SM, as their data sheets give them.
PEAK_TFLOPS = {
    "b200": (2250, 1125, 75),
    "gb200": (2500, 1250, 75),
    "h100": (989.4, 494.7, 67),
    "h200": (989.4, 494.7, 67),
    "gh200": (989.4, 494.7, 67),
    "h100 pcie": (756, 378, 51),
    "h100 nvl": (835, 417, 60),
    "a100": (312, 156, 19.5),
    "a100 pcie": (312, 156, 19.5),
    "a800": (312, 156, 19.5),
    "a800 pcie": (312, 156, 19.5),
    "a30": (165, 82, 10.3),
    "a40": (149.7, 74.8, 37.4),
    "a10": (125, 62.5, 31.2),
    "l40s": (362, 183, 91.6),
    "l4": (121, 60, 30.3),
    "rtx a6000": (154.8, 77.4, 38.7),
    "rtx 6000 ada": (364, 182, 91.1),
    "rtx 5090": (209.5, 104.8, 104.8),
    "rtx 4090": (165.2, 82.6, 82.6),
    "rtx 3090": (71, 35.6, 35.6),
    "rtx 3060": (25.5, 12.7, 12.7),
    "v100 sxm2": (125, 15.7, 15.7),  # no tf32 and no bfloat16 before Ampere
    "v100 sxm3": (125, 15.7, 15.7),
    "t4": (65, 8.1, 8.1),
    "mi300x": (1307, 654, 163.4),
    "mi250x": (191.5, 23.9, 23.9),  # one of its two dies, which is what torch sees as a device
}
VARIANTS = set("pcie nvl mig laptop mobile ti super d max q ada".split())
BEFORE_AMPERE = ("v100 sxm2", "v100 sxm3", "t4")


def peak_from_table(name, dtype, tf32=False):
    """Dense peak FLOPS (not TFLOPS) of the device called `name` at `dtype`, or None where it is not known."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    for key, (half, tensor, single) in PEAK_TFLOPS.items():
        needed = set(key.split())
        if needed <= words and not (words - needed) & VARIANTS:
            if dtype == "bfloat16" and key in BEFORE_AMPERE:
                return None
            return 1e12 * (single if dtype == "float32" and not tf32 else tensor if dtype == "float32" else half)
    return None


def measure_peak(device, dtype):
    """FLOPS of the best of a few square matmuls at `dtype` on `device`, found in under half a second.

    Of two sizes on a CPU, whose AMX may do 1.5 TFLOPS at 1024 and 2.6 at 2048; a slow one leaves out the larger.
    """
    kind = torch.device(device).type
    sizes = (1024, 2048) if kind == "cpu" else (4096,)
    synchronize = torch.cpu.synchronize if kind == "cpu" else getattr(torch, kind).synchronize
    generator = torch.Generator(device).manual_seed(0)
    whole = torch.randn(sizes[-1], sizes[-1], device=device, generator=generator).to(getattr(torch, dtype))
    best, budget = 0.0, 0.1  # FLOPS, and seconds for a size
    for size in sizes:
        if best and 2 * size**3 / best > budget:
            break
        a = whole[:size, :size].contiguous()
        a @ a
        synchronize()
        start = now = time.perf_counter()
        while now - start < budget:
            t0 = time.perf_counter()
            a @ a
            synchronize()
            now = time.perf_counter()
            best = max(best, 2 * size**3 / (now - t0))
    return best


def find_peak_flops(peak_flops, device, dtype):
    """(FLOPS the device could reach, where that figure comes from). A setting above 0 stands as given."""
    if peak_flops > 0:
        return peak_flops, "given"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        known = peak_from_table(name, dtype, torch.backends.cuda.matmul.allow_tf32)
        if known:
            tf32 = dtype == "float32" and known != peak_from_table(name, dtype)  # a V100 has none
            return known, f"{name}, {'tf32' if tf32 else dtype}"
    return measure_peak(device, dtype), f"measured, {device}, {dtype}"
