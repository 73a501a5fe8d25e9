"""nanogpt/run_log.py: the commands in a run's last lines."""

import shlex

from conftest import TINY, flags


def words(line):
    """The words of the command at the end of a line."""
    return shlex.split(line[line.index("python ") :])


def test_the_commands_of_a_finished_run_can_be_pasted(run, tmp_path):
    out_dir = "My Runs/it's $1"
    result = run("train.py", *flags(TINY, out_dir=out_dir, max_iters=2), cwd=tmp_path)
    sample, plot = (words(line) for line in result.lines[-2:])
    assert sample[1].endswith("sample.py") and sample[2:] == [f"--out_dir={out_dir}"]
    assert plot[1].endswith("tools/plot.py") and plot[2:] == [out_dir]


def test_the_command_of_a_stopped_run_can_be_pasted(tmp_path, monkeypatch):
    import torch

    from nanogpt.run_log import stopped_lines

    monkeypatch.chdir(tmp_path)
    (tmp_path / "My Runs").mkdir()
    [line] = stopped_lines("My Runs", 3)
    assert "type:" not in line  # nothing was saved
    torch.save({"model": {}, "model_args": {}, "iter_num": 3, "config": {}}, tmp_path / "My Runs" / "last.pt")
    [line] = stopped_lines("My Runs", 3)
    assert words(line)[2:] == ["--init_from=resume", "--out_dir=My Runs"]


def test_plain_names_are_printed_as_ever(run, tmp_path, project):
    result = run("train.py", *flags(TINY, out_dir="out", max_iters=2), cwd=project.parent)
    assert result.lines[-2:] == [
        f"to see what it writes: python {project.name}/sample.py --out_dir=out",
        f"to see the curves: python {project.name}/tools/plot.py out",
    ]
