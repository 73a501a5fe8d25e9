"""The device's peak FLOPS, from a table or measured, and the share of it that a run uses (MFU).

MFU, model FLOPs utilisation: the FLOPs that the model's own arithmetic needs (GPT.flops_per_token), over the time,
over the peak. Source: PaLM (arXiv:2204.02311), appendix B.
"""

import functools
import re
import time

import torch

from nanogpt.device import pick_dtype

# Dense peaks in TFLOPS: 16-bit tensor cores with float32 accumulation, tf32, float32. A row is for each device whose
# name has all the words of the row's key, and no word of VARIANTS that the key lacks.
# NVIDIA's figures are SMs x boost clock x FLOPs a cycle an SM, from their data sheets.
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
    """FLOPS of square matmuls at `dtype` on `device`: the best burst of several, found in about half a second.

    A CPU with AMX reaches 1.5 TFLOPS at 1024 and 2.6 at 2048, so several sizes take turns; one that a slow device would
    need too long for is left out. Where the two best bursts differ by over 5 %, other work has disturbed them: measure
    for up to a second.
    """
    kind = torch.device(device).type
    sizes, at_once = ((256, 1024, 2048), 1) if kind == "cpu" else ((4096,), 10)  # a GPU waits for the host in between
    synchronize = torch.cpu.synchronize if kind == "cpu" else getattr(torch, kind).synchronize
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(sizes[-1], sizes[-1], device=device, generator=generator).to(getattr(torch, dtype))
    bursts, started = [0.0, 0.0], time.perf_counter()

    def disturbed():
        second, best = sorted(bursts)[-2:]
        return second < 0.95 * best

    while (elapsed := time.perf_counter() - started) < 0.5 or (elapsed < 1.0 and disturbed()):
        for size in sizes:
            seconds = 2 * size**3 * at_once / max(bursts) if max(bursts) else 0.0
            if size == sizes[0] or seconds <= 0.1:
                bursts.append(_burst(matrix[:size, :size].contiguous(), at_once, synchronize))
    return max(bursts)


def _burst(a, at_once, synchronize, budget=0.05):
    """FLOPS of the fastest of the products a @ a of a burst of `budget` seconds, `at_once` to a synchronisation."""
    a @ a
    synchronize()
    best, stop = 0.0, time.perf_counter() + budget
    while not best or time.perf_counter() < stop:
        start = time.perf_counter()
        for _ in range(at_once):
            a @ a
        synchronize()
        best = max(best, at_once * 2 * len(a) ** 3 / (time.perf_counter() - start))
    return best


def find_peak_flops(peak_flops, device, dtype):
    """(the device's peak FLOPS at `dtype`, where the figure comes from). A `peak_flops` above 0 is taken as given."""
    if peak_flops > 0:
        return peak_flops, "given"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        known = peak_from_table(name, dtype, torch.backends.cuda.matmul.allow_tf32)
        if known:
            tf32 = dtype == "float32" and known != peak_from_table(name, dtype)  # a V100 has no tf32
            return known, f"{name}, {'tf32' if tf32 else dtype}"
    return measure_peak(device, dtype), f"measured, {device}, {dtype}"


@functools.cache
def auto_peak_flops(device):
    """The peak FLOPS of `device` at its 'auto' dtype, found once."""
    return find_peak_flops(0.0, device, pick_dtype("auto", device))[0]


class RunningMFU:
    """The printed MFU: 0.9 * old + 0.1 * new over logged iterations, from the sixth iteration of the process on.

    Rank 0 finds the device's peak, while the other processes wait. A measured peak that an iteration beats was measured
    too low, as beside other work: it is raised, and the running mean with it. A given or a listed one stays.
    """

    def __init__(self, model, peak_flops, device, dtype, processes, first_iter):
        self.flops_per_token, self.say = model.flops_per_token(), processes.say
        self.peak, self.source = find_peak_flops(peak_flops, device, dtype) if processes.rank == 0 else (1.0, "")
        processes.wait()
        self.from_iter = first_iter + 5  # earlier ones compile, allocate and warm up
        self.value = None

    def update(self, iter_num, tokens, seconds):
        """Takes in a logged iteration of `tokens` on this device; returns what to print, such as "11.07%"."""
        if iter_num < self.from_iter:
            return "n/a"
        mfu = self.flops_per_token * tokens / (seconds * self.peak)
        if mfu > 1 and self.source.startswith("measured"):
            self.peak *= mfu
            self.value = self.value and self.value / mfu
            self.say(f"the peak was measured too low: from here on it is {self.peak / 1e12:.4g} TFLOPS")
            mfu = 1.0
        self.value = mfu if self.value is None else 0.9 * self.value + 0.1 * mfu
        return f"{self.value * 100:.2f}%"
