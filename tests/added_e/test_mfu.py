"""The peak table against the makers' own formula, and the names that torch gives to GPUs."""

import re

import pytest
from conftest import ROOT

from nanogpt.mfu import PEAK_TFLOPS, peak_from_table

# name as torch gives it: 16-bit, tf32, float32 in TFLOPS, dense, from NVIDIA's data sheets and architecture papers
PEAKS = {
    "NVIDIA GB200": (2500, 1250, 80),
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


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_newer_device(name):
    half, tf32, single = (tflops * 1e12 for tflops in PEAKS[name])
    assert peak_from_table(name, "bfloat16") == peak_from_table(name, "float16") == pytest.approx(half)
    assert peak_from_table(name, "float32") == pytest.approx(single)
    assert peak_from_table(name, "float32", tf32=True) == pytest.approx(tf32)


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
    rows = re.findall(r'^    "([a-z0-9 ]+)": \(([\d.]+), ([\d.]+), [\d.]+\),  # (.*)$', source, re.M)
    assert {row[0] for row in rows} == PEAK_TFLOPS.keys()
    by_formula = 0
    for key, half, tf32, comment in rows:
        if found := re.match(r"(\d+) x (\d\.\d{3}) x (512|1024|2048|4096|8192)\b", comment):
            sms, clock, per_cycle = map(float, found.groups())
            assert float(half) == pytest.approx(sms * clock * per_cycle / 1000, rel=0.013), key
            by_formula += 1
        else:
            assert re.match(r"NVIDIA H20's data sheet|NVIDIA (HGX|GB).*: \d+ PFLOPS with sparsity in \d+ GPUs", comment), key
        if pflops := re.search(r"(\d+) PFLOPS with sparsity in (\d+) GPUs", comment):  # sparsity doubles the figure
            assert float(half) == pytest.approx(int(pflops[1]) / int(pflops[2]) / 2 * 1000), key
        if not key.startswith(("v100", "t4", "mi250x")):  # tf32 runs at half the rate
            assert float(tf32) == pytest.approx(float(half) / 2, rel=0.015), key
    assert by_formula == len(PEAK_TFLOPS) - 5
