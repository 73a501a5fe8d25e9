"""nanogpt/mfu.py: the peaks of devices, against the makers' data sheets."""

import re
import time
import types

import pytest
import torch
from conftest import ROOT, TINY, flags, machine
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt import mfu
from nanogpt.distributed import Processes
from nanogpt.mfu import DEVICES, find_peak_flops, measure_peak, peak_from_table

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
    "NVIDIA A10M", "NVIDIA A16", "NVIDIA A2", "NVIDIA A100X", "NVIDIA L20", "NVIDIA L2", "NVIDIA T4G", "NVIDIA T400",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H100 PCIe MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA GeForce RTX 5090 D",
    "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 3060 Ti", "NVIDIA GeForce RTX 3060 Laptop GPU",
    "NVIDIA GeForce RTX 3060 Mobile / Max-Q", "NVIDIA GeForce GTX 1080 Ti", "NVIDIA RTX A600", "NVIDIA RTX A4000",
    "NVIDIA RTX 5000 Ada Generation", "Quadro RTX 6000", "Tesla V100S-PCIE-32GB", "Tesla V100-FHHL-16GB",
    "Tesla P100-PCIE-16GB", "Tesla K80", "AMD Instinct MI300A", "AMD Instinct MI250", "AMD Instinct MI210",
    "AMD Radeon RX 7900 XTX", "NVIDIA Thor", "",
]  # fmt: skip


def rounding(tflops):
    """Half a unit of the last digit that a data sheet prints: 0.5 for 82, 0.05 for 12.7."""
    return 0.5 * 10.0 ** -len(str(tflops).partition(".")[2])


def assert_tf32(name, half, tf32):
    """It is half the 16-bit figure, and so within the rounding of both printed ones."""
    found = peak_from_table(name, "float32", tf32=True) / 1e12
    assert found == pytest.approx(tf32, abs=rounding(half) / 2 + rounding(tf32))


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_known_device(name):
    half, tf32, single = PEAKS[name]
    assert peak_from_table(name, "bfloat16") == peak_from_table(name, "float16") == pytest.approx(half * 1e12)
    assert peak_from_table(name, "float32") == pytest.approx(single * 1e12)
    if tf32:
        assert_tf32(name, half, tf32)


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
    monkeypatch.setattr(mfu, "measure_peak", lambda device, dtype: 7e12)
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
    machine(monkeypatch, cuda=1, name="NVIDIA A16")
    assert find_peak_flops(0.0, "cuda", "bfloat16") == (7e12, "measured, cuda, bfloat16")
    assert find_peak_flops(0.0, "cpu", "float32") == (7e12, "measured, cpu, float32")


# ----------------------------------------------------------------------------------------------
# the measured peak, and an MFU that is never above 100 % of it


class Model:
    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """Of a sequence of 1 MFLOP."""
        return 1e6 * fwdbwd_per_iter / (dt * peak_flops)


def running(monkeypatch, peak, source, said):
    monkeypatch.setattr(mfu, "find_peak_flops", lambda *_: (peak, source))
    processes = Processes()
    processes.say = lambda *lines: said.extend(lines)
    return mfu.RunningMFU(0.0, "cpu", "float32", processes, first_iter=10)


def test_a_measured_peak_that_is_beaten_is_raised_and_the_mean_with_it(monkeypatch):
    """By hand: 100 sequences of 1 MFLOP are 1e8 FLOP."""
    said = []
    found = running(monkeypatch, 1e9, "measured, cpu, float32", said)
    assert [found.update(n, Model(), 100, 1.0) for n in (10, 14)] == ["n/a", "n/a"]
    assert found.update(15, Model(), 100, 0.2) == "50.00%"  # 5e8 of 1e9
    assert said == []
    assert found.update(16, Model(), 100, 0.05) == "32.50%"  # 2e9 is the peak now: 0.9 * 25 % + 0.1 * 100 %
    assert said == ["the peak was measured too low: from here on it is 0.002 TFLOPS"]
    assert found.update(17, Model(), 100, 0.05) == "39.25%" and len(said) == 1
    for n in range(18, 200):
        assert float(found.update(n, Model(), 100, 0.05 * 0.99 ** (n - 17)).rstrip("%")) <= 100


@pytest.mark.parametrize("source", ["given", "NVIDIA A100-SXM4-80GB, bfloat16"])
def test_a_peak_that_was_not_measured_stands_as_it_is(monkeypatch, source):
    said = []
    found = running(monkeypatch, 1e9, source, said)
    assert found.update(15, Model(), 100, 0.05) == "200.00%" and said == [] and found.peak == 1e9


def test_a_run_whose_peak_was_measured_far_too_low_prints_no_mfu_above_100(run, own_project, tmp_path):
    driver = own_project / "driver.py"
    driver.write_text(
        "import os, runpy, sys\nfrom nanogpt import mfu\nmfu.measure_peak = lambda device, dtype: 1e4\n"
        "runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'), run_name='__main__')\n"
    )
    arguments = flags(TINY | dict(max_iters=30, peak_flops=0.0), out_dir=tmp_path / "out")
    result = run("driver.py", *arguments, project=own_project)
    shown = [float(m) for m in re.findall(r"mfu ([\d.]+)%$", result.stdout, re.M)]
    assert len(shown) == 26 and max(shown) <= 100
    assert "the peak was measured too low: from here on it is" in result.stdout
    given = run("train.py", *flags(TINY, out_dir=tmp_path / "given", peak_flops=1e4))
    assert max(float(m) for m in re.findall(r"mfu ([\d.]+)%$", given.stdout, re.M)) > 100
    assert "measured too low" not in given.stdout


class FakeTime:
    """A clock that shows `step` seconds more at each look."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def perf_counter(self):
        self.now += self.step
        return self.now


class NoProducts(TorchDispatchMode):
    """No product of matrices is computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.ops.aten.mm.default else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("step, largest", [(0.01, 2048), (0.1, 256)])  # at 3e8 FLOPS a 1024 takes 6 s
def test_a_peak_takes_half_a_second_and_slow_devices_skip_large_products(monkeypatch, step, largest):
    fake = FakeTime(step)
    monkeypatch.setattr(mfu, "time", fake)
    with NoProducts():
        assert measure_peak("cpu", "float32") == pytest.approx(2 * largest**3 / step)
    assert 0.5 <= fake.now <= 0.9


def test_the_measured_peak_is_what_the_fastest_product_reaches_and_no_random_number_is_drawn():
    """Against products timed here: other work on the machine only ever lowers either."""
    a, best = torch.randn(1024, 1024), 0.0
    state = torch.get_rng_state()
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    assert 0.3 * best < measure_peak("cpu", "float32") < 10 * best
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------
# the peak table against the makers' own formula, and the names that torch gives to GPUs


# name as torch gives it: 16-bit, tf32, float32 in TFLOPS, dense, from NVIDIA's data sheets and architecture papers
TABLE = {
    "NVIDIA B300 SXM6 AC": (2250, 1125, 75),
    "NVIDIA GB300": (2500, 1250, 80),
    "NVIDIA H800": (989.4, 494.7, 67),
    "NVIDIA H800 PCIe": (756, 378, 51),
    "NVIDIA H200 NVL": (835, 417, 60),
    "NVIDIA H20": (148, 74, 44),
    "NVIDIA A10G": (70, 35, 35),
    "NVIDIA L40": (181, 90.5, 90.5),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (503.8, 251.9, 126),
    "NVIDIA GeForce RTX 5080": (112.6, 56.3, 56.3),
    "NVIDIA GeForce RTX 5070 Ti": (87.9, 43.9, 43.9),
    "NVIDIA GeForce RTX 5070": (61.7, 30.9, 30.9),
    "NVIDIA GeForce RTX 5060 Ti": (47.4, 23.7, 23.7),
    "NVIDIA GeForce RTX 5060": (38.4, 19.2, 19.2),
    "NVIDIA GeForce RTX 4090 D": (147.1, 73.5, 73.5),
    "NVIDIA GeForce RTX 4080 SUPER": (104.4, 52.2, 52.2),
    "NVIDIA GeForce RTX 4080": (97.5, 48.7, 48.7),
    "NVIDIA GeForce RTX 4070 Ti SUPER": (88.2, 44.1, 44.1),
    "NVIDIA GeForce RTX 4070 Ti": (80.2, 40.1, 40.1),
    "NVIDIA GeForce RTX 4070 SUPER": (71, 35.5, 35.5),
    "NVIDIA GeForce RTX 4070": (58.3, 29.1, 29.1),
    "NVIDIA GeForce RTX 4060 Ti": (44.1, 22.1, 22.1),
    "NVIDIA GeForce RTX 4060": (30.2, 15.1, 15.1),
}
# float32 by the same data sheets: SMs, clock in GHz, FLOPs a cycle and SM; cards whose tensor cores have no other clock
SINGLE = {
    "NVIDIA A10G": (80, 1.710, 256),
    "NVIDIA L40": (142, 2.490, 256),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (188, 2.617, 256),
    "NVIDIA GeForce RTX 5080": (84, 2.617, 256),
    "NVIDIA GeForce RTX 5070 Ti": (70, 2.452, 256),
    "NVIDIA GeForce RTX 5070": (48, 2.512, 256),
    "NVIDIA GeForce RTX 5060 Ti": (36, 2.572, 256),
    "NVIDIA GeForce RTX 5060": (30, 2.497, 256),
    "NVIDIA GeForce RTX 4090 D": (114, 2.520, 256),
    "NVIDIA GeForce RTX 4080 SUPER": (80, 2.550, 256),
    "NVIDIA GeForce RTX 4080": (76, 2.505, 256),
    "NVIDIA GeForce RTX 4070 Ti SUPER": (66, 2.610, 256),
    "NVIDIA GeForce RTX 4070 Ti": (60, 2.610, 256),
    "NVIDIA GeForce RTX 4070 SUPER": (56, 2.475, 256),
    "NVIDIA GeForce RTX 4070": (46, 2.475, 256),
    "NVIDIA GeForce RTX 4060 Ti": (34, 2.535, 256),
    "NVIDIA GeForce RTX 4060": (24, 2.460, 256),
}
MEASURED = [
    "NVIDIA GeForce RTX 4060 Laptop GPU", "NVIDIA GeForce RTX 4070 Laptop GPU", "NVIDIA GeForce RTX 4080 Laptop GPU",
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 5060 Laptop GPU", "NVIDIA GeForce RTX 5070 Laptop GPU",
    "NVIDIA GeForce RTX 5070 Ti Laptop GPU", "NVIDIA GeForce RTX 5080 Laptop GPU", "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 D", "NVIDIA GeForce RTX 5090 D V2", "NVIDIA GeForce RTX 5050", "NVIDIA GeForce RTX 4050",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "NVIDIA RTX PRO 5000 Blackwell", "NVIDIA RTX 4000 SFF Ada Generation", "NVIDIA L40G", "NVIDIA L20", "NVIDIA A10M",
    "NVIDIA H20 MIG 1g.12gb", "NVIDIA H800 NVL", "Tesla V100S-PCIE-32GB", "Tesla V100-FHHL-16GB", "NVIDIA GB10",
]  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_peak_of_a_newer_device(name):
    half, tf32, single = TABLE[name]
    assert peak_from_table(name, "bfloat16") == peak_from_table(name, "float16") == pytest.approx(half * 1e12)
    assert peak_from_table(name, "float32") == pytest.approx(single * 1e12)
    assert_tf32(name, half, tf32)


@pytest.mark.parametrize("name", ["Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"])
def test_a_v100_on_pcie_is_slower_and_has_neither_bfloat16_nor_tf32(name):
    assert peak_from_table(name, "float16") == pytest.approx(112e12)
    assert peak_from_table(name, "bfloat16") is None
    assert peak_from_table(name, "float32") == peak_from_table(name, "float32", tf32=True) == pytest.approx(14e12)


@pytest.mark.parametrize("name", SINGLE)
def test_float32_peaks_are_sms_times_clock_times_flops_per_cycle(name):
    sms, clock, per_cycle = SINGLE[name]
    assert peak_from_table(name, "float32") == pytest.approx(sms * clock * 1e9 * per_cycle, rel=0.005)


@pytest.mark.parametrize("name", MEASURED)
def test_a_device_without_one_clear_figure_is_measured(name):
    assert peak_from_table(name, "bfloat16") is None and peak_from_table(name, "float32") is None


def test_every_row_is_its_comments_product_or_names_its_source():
    source = (ROOT / "nanogpt" / "mfu.py").read_text(encoding="utf-8")
    rows = re.findall(r'^    "([a-z0-9 ]+)": \(([\d.]+), [\d.]+, \d+\),  # (.*)$', source, re.M)
    assert {row[0] for row in rows} == DEVICES.keys()
    by_formula = 0
    for key, half, comment in rows:
        if found := re.match(r"(\d+) x (\d\.\d{3}) x (512|1024|2048|4096|8192)\b", comment):
            sms, clock, per_cycle = map(float, found.groups())
            assert float(half) == pytest.approx(sms * clock * per_cycle / 1000, rel=0.013), key
            by_formula += 1
        else:
            assert re.match(r"NVIDIA H20's data sheet|NVIDIA (HGX|GB).*: \d+ PFLOPS with sparsity in \d+ GPUs", comment), key
        if pflops := re.search(r"(\d+) PFLOPS with sparsity in (\d+) GPUs", comment):  # sparsity doubles the figure
            assert float(half) == pytest.approx(int(pflops[1]) / int(pflops[2]) / 2 * 1000), key
    assert by_formula == len(DEVICES) - 5


# ----------------------------------------------------------------------------------------------
# the clock of each device


class MPSEvent:
    """torch.mps.Event as torch's MPSEvent.mm has it: whoever waits for an event takes its one signal."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        self.signalled = False

    def record(self):
        MPSEvent.now += 0.25
        self.time, self.signalled = MPSEvent.now, True

    def synchronize(self):
        assert self.signalled, "this waits forever"
        self.signalled = False

    def elapsed_time(self, end):
        end.synchronize()
        return 1000 * (end.time - self.time)


class CUDAEvent(MPSEvent):
    """torch.cuda.Event: elapsed_time() fails where the end has not been waited for."""

    def record(self):
        super().record()
        self.waited = False

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        if not end.waited:
            raise RuntimeError("CUDA error: device not ready")
        return 1000 * (end.time - self.time)


@pytest.mark.parametrize("kind, event", [("mps", MPSEvent), ("cuda", CUDAEvent)])
def test_the_clock_waits_for_each_mark_once(monkeypatch, kind, event):
    monkeypatch.setattr(torch, kind, types.SimpleNamespace(Event=event))
    clock = mfu.Clock(kind)
    for logged in (True, True, False, True):  # as train.py's loop has it: a mark ends an iteration and begins the next
        clock.tick()
        if logged:
            assert clock.seconds() == pytest.approx(0.25)
