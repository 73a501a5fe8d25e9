"""A run's own forecast, and the facts beside it."""

import math
import re

from conftest import TINY, flags


def test_the_last_lines_compare_forecast_with_fact(run, tmp_path):
    result = run("train.py", *flags(TINY, out_dir=tmp_path / "out", plan=True), interpreter=True)
    [forecast] = [line for line in result.lines if line.startswith("forecast: ")]
    compared = r"forecast and fact: time \S+ and \S+ \([+-]\d+%\), memory (\d+) and (\d+) MiB \(([+-]\d+)%\)"
    planned, fact, error = re.fullmatch(compared, result.lines[-1]).groups()
    assert f" {planned} MiB at the peak of an iteration, beside " in forecast
    assert 0 < float(fact) < 200 and math.isfinite(float(error))
    assert "forecast" not in run("train.py", *flags(TINY, out_dir=tmp_path / "b")).stdout
