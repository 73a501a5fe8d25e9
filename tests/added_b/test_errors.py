"""nanogpt/errors.py: paths and commands as a user types them."""

import os
import shlex
import subprocess

import pytest
from conftest import ROOT

from nanogpt import errors
from nanogpt.errors import command, relative_path


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
    from data.bins import check_size
    from data.text import print_next
    from nanogpt.run_log import finished_lines, stopped_lines

    monkeypatch.setattr(os.path, "relpath", other_drive)
    (tmp_path / "prepare.py").write_text("")
    with pytest.raises(errors.UserError) as error:
        check_size(str(tmp_path / "train.bin"), 16, "openwebtext")
    assert f"python {tmp_path / 'prepare.py'}" in str(error.value)
    print_next("config/train_gpt2.py")
    stopped_lines(str(tmp_path), 3)
    assert str(ROOT / "sample.py") in finished_lines("out", 1.0, 1, 1, 1.0, "cpu")[1]


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
