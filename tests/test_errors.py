"""nanogpt/errors.py: one line for a mistake and for a failure of the machine, as a user sees them."""

import pytest
from conftest import error_line


@pytest.mark.parametrize("name, argument, says", [
    ("train.py", "--learning_rat=1", "--learning_rat=1: there is no setting learning_rat; did you mean learning_rate?"),
    ("sample.py", "--strat=x", "--strat=x: there is no setting strat; did you mean start?"),
    ("data/text_char/prepare.py", "--nam=x", "--nam=x: there is no setting nam; did you mean name?"),
])  # fmt: skip
def test_a_mistake_is_one_line_on_stderr_and_exit_2(run, tmp_path, name, argument, says):
    result = run(name, argument, cwd=tmp_path, interpreter=name == "train.py", expect=2)
    assert error_line(result) == says and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def failing(project, name, line):
    """A script in the project's folder that does `line`."""
    (project / name).write_text(f"import os, sys, torch\nfrom nanogpt import errors\nprint('before')\n{line}\n")
    return name


@pytest.mark.parametrize("line, code, message", [
    ("raise errors.UserError('two\\n  lines')", 2, "two lines"),
    ("open('nowhere/file')", 1, "nowhere/file: No such file or directory"),
    ("raise OSError(28, os.strerror(28), 'ckpt.pt')", 1, "ckpt.pt: No space left on device"),
    ("raise MemoryError", 1, "out of memory: try a smaller --batch_size"),
    ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')", 1, "out of memory: try a smaller"),
    ("torch.empty(1 << 60)", 1, "out of memory: try a smaller --batch_size"),
])  # fmt: skip
def test_a_failure_of_the_machine_is_one_line_and_exit_1(run, own_project, line, code, message):
    result = run(failing(own_project, "failing.py", line), project=own_project, expect=code)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: " + message), result.stderr
    assert result.stdout == "before\n"


def test_a_bug_keeps_its_traceback(run, own_project):
    result = run(failing(own_project, "buggy.py", "{}['key']"), project=own_project, expect=1)
    assert "Traceback" in result.stderr and "KeyError: 'key'" in result.stderr


def test_an_interrupt_and_a_reader_that_has_seen_enough_are_no_errors(run, own_project):
    result = run(failing(own_project, "a.py", "raise KeyboardInterrupt"), project=own_project, expect=130)
    assert result.stderr == ""
    result = run(failing(own_project, "b.py", "raise BrokenPipeError"), project=own_project, expect=0)
    assert result.stderr == ""
