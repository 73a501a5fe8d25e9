"""What 'auto' means on this machine: device, dtype, torch.compile, CPU threads, memory."""

import ctypes
import importlib.util
import math
import os
import platform
import re
import shutil
import sys
import sysconfig

import torch

from nanogpt import cpu_kernels
from nanogpt.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

ATTENTION = {"cuda": ("auto", "flash", "efficient", "math"), "cpu": ("auto", "math"), "mps": ("auto",)}


def pick_device(device):
    """The torch device named `device`; 'auto' is cuda, else mps, else cpu. UserError where it does not exist."""
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if device == "auto":
        return next(kind for kind, count in counts.items() if count)
    found = re.fullmatch("(cpu|cuda|mps)(?::(0|[1-9][0-9]{0,3}))?", str(device))
    if not found:
        raise UserError(f"--device={device}: takes auto, cpu, cuda, cuda:N or mps")
    kind, index = found.groups()
    if int(index or 0) >= counts[kind]:
        raise UserError(f"--device={device}: there is no such device on this machine; of {kind} it has {counts[kind]}")
    return "cpu" if kind == "cpu" else device


def set_up(device, local_world_size=1):
    """Prepares this process, one of `local_world_size` on the machine, to compute on `device`. Returns its type."""
    device_type = torch.device(device).type
    if device_type == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)  # set_device takes no bare "cuda"
    if device_type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(pick_threads(os.environ.get("OMP_NUM_THREADS"), local_world_size, usable_cores()))
    torch.set_float32_matmul_precision("high" if device_type == "cuda" else "highest")  # TF32 where CUDA has it
    return device_type


def fast_bfloat16(device="cpu"):
    """Whether `device` multiplies bfloat16 itself, and so faster than float32."""
    if device.startswith("cuda"):  # not before Ampere
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return device == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def pick_dtype(dtype, device):
    """The dtype to compute in. 'auto': bfloat16 where the device is fast at it, else float16 on CUDA, else float32."""
    if dtype in ("float32", "bfloat16", "float16"):
        return dtype
    if dtype != "auto":
        raise UserError(f"--dtype={dtype}: takes auto, float32, bfloat16 or float16")
    if fast_bfloat16(device):
        return "bfloat16"
    return "float16" if device.startswith("cuda") else "float32"


def emulation_remark(dtype, device):
    """A line where `device` only emulates `dtype`, else None."""
    found = torch.cpu.get_capabilities()
    unknown = device == "mps" or (device == "cpu" and found.get("architecture") != "x86_64")  # torch cannot tell
    if dtype == "float32" or unknown:
        return None
    fast_float16 = device != "cpu" or found.get("avx512_fp16") or found.get("amx_fp16")
    native = fast_bfloat16(device) if dtype == "bfloat16" else fast_float16
    return None if native else f"this {device} only emulates {dtype}: --dtype=float32 is many times faster here"


def autocast(device, dtype, cache=True):
    """The context that computes matrix products in `dtype`. With `cache` it keeps a cast weight until its end."""
    device_type = torch.device(device).type
    return torch.amp.autocast(device_type, getattr(torch, dtype), enabled=dtype != "float32", cache_enabled=cache)


def pick_compile(compile, device, say):
    """Whether to torch.compile the model. Where it is asked for and cannot be, `say` says why.

    'auto' compiles on CUDA only. On a CPU nearly all the time goes into matrix products and a few passes written for
    it (nanogpt/cpu_kernels.py): only a long run of a small model saves more than the minute that the compiler takes.
    """
    if compile != "auto" and not isinstance(compile, bool):
        raise UserError(f"--compile={compile}: takes auto, True or False")
    if compile is False or (compile == "auto" and not device.startswith("cuda")):
        return False
    if not device.startswith("cuda"):  # the compiler that torch._inductor calls
        found = {"C++ compiler": shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))}
    else:  # Triton builds its launcher with a C compiler
        found = {"Triton": importlib.util.find_spec("triton")}
        found["C compiler"] = any(map(shutil.which, os.environ.get("CC", "gcc clang").split()))
        found["GPU of compute capability 7.0"] = torch.cuda.get_device_capability(device) >= (7, 0)
    found["Python.h"] = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    missing = next((name for name, there in found.items() if not there), None)
    from torch._functorch import config  # private, and only where the model is compiled

    # a large vocabulary's loss is an autograd.Function: torch caches code with one only where it is told to
    config.autograd_cache_allow_custom_autograd_functions = True
    if missing:
        say(f"no {missing} is found, so the model runs without torch.compile")
    return not missing


def compile_mode(device_type, processes, micro_steps, flops_scale):
    """torch.compile's mode: "reduce-overhead" (CUDA graphs) where launching kernels would keep a small model waiting.

    CUDA graphs need one process and one micro-step: a second micro-step would add to gradients that lie in the memory
    which its own graph writes. `flops_scale` is parameters x tokens of a micro-batch.
    """
    small = processes == 1 and micro_steps == 1 and flops_scale < 5e11
    return "reduce-overhead" if device_type == "cuda" and small else None


def pick_attention(attention, device, dtype):
    """Has scaled_dot_product_attention use the kernel `attention` only; with 'auto' torch chooses.

    On a CPU 'math' is torch's plain attention, and 'auto' may be that of nanogpt/cpu_kernels.py. UserError where this
    device or dtype does not have the kernel.
    """
    allowed = ATTENTION[torch.device(device).type]
    if attention not in allowed:
        raise UserError(f"--attention={attention}: takes {' or '.join(allowed)} on {device}")
    if attention == "flash" and dtype == "float32":
        raise UserError("--attention=flash does not work in float32: use --dtype=bfloat16, or --attention=efficient")
    if attention == "auto":
        return
    cpu_kernels.plain_attention = attention == "math"
    torch.backends.cuda.enable_flash_sdp(attention == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(attention == "efficient")
    torch.backends.cuda.enable_math_sdp(attention == "math")
    torch.backends.cuda.enable_cudnn_sdp(False)
    # torch.compile's cache on disk does not look at these switches: it would return code with another kernel
    torch.compiler.config.cache_key_tag += f"attention={attention}"


def set_deterministic(deterministic):
    """If `deterministic`, torch uses algorithms that give the same digits each time. Comes before the first product.

    Flash and efficient attention then have a deterministic backward pass, and cuDNN's, which has none, is not chosen.
    Source: ATen/native/transformers/cuda/ in torch, attention_backward.cu and sdp_utils.cpp.
    """
    if not deterministic:
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch asks for this
    torch.use_deterministic_algorithms(True)  # torch.compile then does not choose kernels by their speed


def packs_weights(device, dtype):
    """Whether a model that only samples gains from packed weights (nanogpt/cpu_kernels.py)."""
    return device == "cpu" and dtype == "bfloat16" and fast_bfloat16() and torch.backends.mkldnn.is_available()


def pick_threads(threads, processes, cores):
    """CPU threads for each of `processes` on a machine of `cores`; `threads` is OMP_NUM_THREADS, or None.

    torchrun sets OMP_NUM_THREADS to 1 where it starts several processes, so 1 is then taken for its default.
    """
    if threads and threads.isdigit() and int(threads) > 0 and (processes == 1 or threads != "1"):
        return int(threads)
    return max(1, cores // processes)


def usable_cores(quota="/sys/fs/cgroup/cpu.max"):
    """Physical cores that this process may use. torch's thread count would not do: OMP_NUM_THREADS=1 would hide them.

    On Linux the file `quota` holds the container's limit of processor time. More threads than that would only wait.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        with open(quota, encoding="ascii") as f:
            share, period = map(int, f.read().split())  # microseconds; "max" where there is no limit
        allowed = min(allowed, math.ceil(share / period))
    except (OSError, ValueError):
        pass
    return min(allowed, torch.cpu.get_capabilities().get("num_physical_cores") or allowed)


def keep_freed_memory():
    """Makes glibc's malloc keep the memory of freed tensors for the next ones.

    By default it returns large freed blocks to the system, which clears every page of the next block. That takes a
    fifth of a GPT-2's iteration on a CPU. Other C libraries do not have this call, or do not need it.
    """
    if platform.libc_ver()[0] == "glibc":
        set_option = ctypes.CDLL(None).mallopt  # options: malloc.h
        set_option(-4, 0)  # M_MMAP_MAX: blocks come from the heap, however large
        set_option(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        set_option(-2, 1 << 26)  # M_TOP_PAD: it grows by 64 MiB at a time


def peak_host_bytes():
    """The most host memory that this process has held; None if the system does not say."""
    try:
        # Linux's ru_maxrss begins at the size of the process that started this one, so read VmHWM, which does not
        with open("/proc/self/status", encoding="ascii", errors="replace") as f:
            return int(f.read().partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        if resource is None:
            return None
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(device):
    """The most memory that this process has held, as a text: on the host, and on its GPU."""
    held = peak_host_bytes()
    host = "host memory unknown" if held is None else f"{held / 2**30:.2f} GiB on the host"
    if device.startswith("cuda"):
        return f"{host}, {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}"
    return host
