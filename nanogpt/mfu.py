"""The device's peak FLOPS, from a table or measured, and the share of it that a run uses (MFU).

MFU, model FLOPs utilisation: the FLOPs that the model's own arithmetic needs (GPT.flops_per_token), over the time,
over the peak. Source: PaLM (arXiv:2204.02311), appendix B.
"""

import functools
import re
import time

import torch

from nanogpt.device import pick_dtype

# Dense peaks in TFLOPS: 16-bit tensor cores with float32 accumulation, and float32. Then GiB of memory: where a device
# is sold with two sizes, the smaller. A device has the first row whose words its name has, where it has no word of
# VARIANTS besides them.
# The figures are those of the makers' data sheets. Behind each row: SMs x boost clock in GHz x 16-bit FLOPs per cycle
# and SM, which gives the first figure; a test computes it. Where the maker does not say these three: the source.
# A laptop's GPU has no row: its clock depends on the power limit that the laptop's maker chose, so it is measured.
DEVICES = {
    "b200": (2250, 75, 180),  # NVIDIA HGX B200: 36 PFLOPS with sparsity in 8 GPUs
    "gb200": (2500, 75, 186),  # NVIDIA GB200 NVL72: 360 PFLOPS with sparsity in 72 GPUs
    "b300": (2250, 75, 288),  # NVIDIA HGX B300: 36 PFLOPS with sparsity in 8 GPUs
    "gb300": (2500, 80, 288),  # NVIDIA GB300 NVL72: 360 PFLOPS with sparsity in 72 GPUs
    "h100 pcie": (756, 51, 80),  # 114 x 1.620 x 4096
    "h100": (989.4, 67, 80),  # 132 x 1.830 x 4096
    "h200": (989.4, 67, 141),  # 132 x 1.830 x 4096
    "gh200": (989.4, 67, 96),  # 132 x 1.830 x 4096
    "h800 pcie": (756, 51, 80),  # 114 x 1.620 x 4096
    "h800": (989.4, 67, 80),  # 132 x 1.830 x 4096: an H100 with a slower NVLink and less float64
    "h100 nvl": (835, 60, 94),  # 132 x 1.545 x 4096
    "h200 nvl": (835, 60, 141),  # 132 x 1.545 x 4096
    "h20": (148, 44, 96),  # NVIDIA H20's data sheet; 78 SMs, far below 4096 FLOPs a cycle each
    "a100": (312, 19.5, 40),  # 108 x 1.410 x 2048
    "a800": (312, 19.5, 40),  # 108 x 1.410 x 2048
    "a30": (165, 10.3, 24),  # 56 x 1.440 x 2048
    "a40": (149.7, 37.4, 48),  # 84 x 1.740 x 1024
    "a10": (125, 31.2, 24),  # 72 x 1.695 x 1024
    "a10g": (70, 35, 24),  # 80 x 1.710 x 512
    "l40s": (362, 91.6, 48),  # 142 x 2.520 x 1024
    "l40": (181, 90.5, 48),  # 142 x 2.490 x 512
    "l4": (121, 30.3, 24),  # 58 x 2.040 x 1024
    "rtx a6000": (154.8, 38.7, 48),  # 84 x 1.800 x 1024
    "rtx 6000 ada": (364, 91.1, 48),  # 142 x 2.505 x 1024
    "rtx pro 6000 blackwell workstation": (503.8, 126, 96),  # 188 x 2.617 x 1024
    "rtx 5090": (209.5, 104.8, 32),  # 170 x 2.407 x 512
    "rtx 5080": (112.6, 56.3, 16),  # 84 x 2.617 x 512
    "rtx 5070 ti": (87.9, 43.9, 16),  # 70 x 2.452 x 512
    "rtx 5070": (61.7, 30.9, 12),  # 48 x 2.512 x 512
    "rtx 5060 ti": (47.4, 23.7, 8),  # 36 x 2.572 x 512
    "rtx 5060": (38.4, 19.2, 8),  # 30 x 2.497 x 512
    "rtx 4090": (165.2, 82.6, 24),  # 128 x 2.520 x 512
    "rtx 4090 d": (147.1, 73.5, 24),  # 114 x 2.520 x 512
    "rtx 4080 super": (104.4, 52.2, 16),  # 80 x 2.550 x 512
    "rtx 4080": (97.5, 48.7, 16),  # 76 x 2.505 x 512
    "rtx 4070 ti super": (88.2, 44.1, 16),  # 66 x 2.610 x 512
    "rtx 4070 ti": (80.2, 40.1, 12),  # 60 x 2.610 x 512
    "rtx 4070 super": (71, 35.5, 12),  # 56 x 2.475 x 512
    "rtx 4070": (58.3, 29.1, 12),  # 46 x 2.475 x 512
    "rtx 4060 ti": (44.1, 22.1, 8),  # 34 x 2.535 x 512
    "rtx 4060": (30.2, 15.1, 8),  # 24 x 2.460 x 512
    "rtx 3090": (71, 35.6, 24),  # 82 x 1.695 x 512
    "rtx 3060": (25.5, 12.7, 12),  # 28 x 1.777 x 512
    "v100 sxm2": (125, 15.7, 16),  # 80 x 1.530 x 1024
    "v100 sxm3": (125, 15.7, 32),  # 80 x 1.530 x 1024
    "v100 pcie": (112, 14, 16),  # 80 x 1.370 x 1024
    "t4": (65, 8.1, 16),  # 40 x 1.590 x 1024
    "mi300x": (1307, 163.4, 192),  # 304 x 2.100 x 2048, compute units for SMs
    "mi250x": (191.5, 23.9, 64),  # 110 x 1.700 x 1024, for one of its two dies, which is a device to torch
}
VARIANTS = set("nvl mig laptop mobile ti super d max q ada".split())
BEFORE_AMPERE = ("v100 sxm2", "v100 sxm3", "v100 pcie", "t4")  # no bfloat16, and no tf32
TF32 = {"l40s": 183, "mi250x": 23.9}  # elsewhere half the 16-bit figure; an MI250X has none, so float32's


def find_row(name):
    """The key in DEVICES of the device called `name`, or None where it is not known."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    return next((key for key in DEVICES if words & VARIANTS <= set(key.split()) <= words), None)


def peak_from_table(name, dtype, tf32=False):
    """Dense peak FLOPS (not TFLOPS) of the device called `name` at `dtype`, or None where it is not known."""
    key = find_row(name)
    if key is None or (dtype == "bfloat16" and key in BEFORE_AMPERE):
        return None
    tflops, single, _ = DEVICES[key]
    if dtype == "float32":
        tflops = TF32.get(key, tflops / 2) if tf32 and key not in BEFORE_AMPERE else single
    return 1e12 * tflops


def measure_peak(device, dtype):
    """FLOPS of square matmuls at `dtype` on `device`: the best figure found in half a second.

    Several sizes take turns, because a CPU with AMX reaches 1.5 TFLOPS at 1024 and 2.6 at 2048. Sizes whose product
    would take over a second are skipped.
    """
    kind = torch.device(device).type
    sizes, at_once = ((256, 1024, 2048), 1) if kind == "cpu" else ((4096,), 10)  # a GPU waits for the host in between
    generator = torch.Generator(device).manual_seed(0)
    matrices = [torch.randn(n, n, device=device, generator=generator).to(getattr(torch, dtype)) for n in sizes]
    best, stop = 0.0, time.perf_counter() + 0.5
    while time.perf_counter() < stop:
        for a in matrices:
            flops = at_once * 2 * len(a) ** 3
            end = start = time.perf_counter()
            while (a is matrices[0] or flops <= best) and end < start + 0.05:
                before = end
                for _ in range(at_once):
                    a @ a
                getattr(torch, kind).synchronize()
                end = time.perf_counter()
                best = max(best, flops / (end - before))
    return best


def find_peak_flops(peak_flops, device, dtype):
    """(the device's peak FLOPS at `dtype`, where the figure comes from). A `peak_flops` above 0 is taken as given."""
    if peak_flops > 0:
        return peak_flops, "given"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        if known := peak_from_table(name, dtype, torch.backends.cuda.matmul.allow_tf32):
            tf32 = dtype == "float32" and known != peak_from_table(name, dtype)  # a V100 has no tf32
            return known, f"{name}, {'tf32' if tf32 else dtype}"
    return measure_peak(device, dtype), f"measured, {device}, {dtype}"


@functools.cache
def auto_peak_flops(device):
    """The peak FLOPS of `device` at its 'auto' dtype, found once."""
    return find_peak_flops(0.0, device, pick_dtype("auto", device))[0]


class Clock:
    """The time of an iteration on `device`: tick() ends one and begins the next, seconds() is what the last took.

    CUDA and MPS run their kernels later. There a mark is an event in the device's queue, and only seconds() waits. Call
    it once a tick: on MPS a second wait for an event, or a synchronize() before elapsed_time(), never ends.
    """

    def __init__(self, device):
        self.device_type, self.end = torch.device(device).type, None
        self.tick()

    def tick(self):
        self.start, self.end = self.end, time.perf_counter()
        if self.device_type != "cpu":
            self.end = getattr(torch, self.device_type).Event(enable_timing=True)
            self.end.record()

    def seconds(self):
        if self.device_type == "cpu":
            return self.end - self.start
        if self.device_type == "cuda":
            self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1000


class RunningMFU:
    """The printed MFU: 0.9 * old + 0.1 * new over logged iterations, from the sixth iteration of the process on.

    Rank 0 finds the device's peak, while the other processes wait. If an iteration is faster than a measured peak,
    other work has disturbed the measurement: the peak is raised, and the running mean is rescaled. A peak that was
    given, or is in the table, stays.
    """

    def __init__(self, peak_flops, device, dtype, processes, first_iter):
        self.say = processes.say
        self.peak, self.source = find_peak_flops(peak_flops, device, dtype) if processes.rank == 0 else (1.0, "")
        processes.wait()
        self.from_iter = first_iter + 5  # earlier ones compile, allocate and warm up
        self.value = None

    def update(self, iter_num, model, sequences, seconds):
        """Takes in a logged iteration of `sequences` on this device; returns what to print, such as "11.07%"."""
        if iter_num < self.from_iter:
            return "n/a"
        mfu = model.estimate_mfu(sequences, seconds, self.peak)
        if mfu > 1 and self.source.startswith("measured"):
            self.peak *= mfu
            self.value = self.value and self.value / mfu
            self.say(f"the peak was measured too low: from here on it is {self.peak / 1e12:.4g} TFLOPS")
            mfu = 1.0
        self.value = mfu if self.value is None else 0.9 * self.value + 0.1 * mfu
        return f"{self.value * 100:.2f}%"
