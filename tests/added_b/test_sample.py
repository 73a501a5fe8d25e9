"""sample.py as a user sees it."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import CHARACTERS, error_line, flags, write_synthetic

DASHES = "-" * 15
CPU = ["--device=cpu", "--dtype=float32"]
# the same characters in another order, as another text may bring them
BACKWARDS = {
    "vocab_size": 61,
    "stoi": {c: i for i, c in enumerate(reversed(CHARACTERS))},
    "itos": dict(enumerate(reversed(CHARACTERS))),
}


def texts(result):
    """The samples: what stands before each line of dashes."""
    *found, rest = result.stdout.split(f"\n{DASHES}\n")
    assert rest == "", rest
    return found


@pytest.fixture(scope="module")
def sample(run, synthetic_run):
    """sample(*arguments, **settings) -> Result; of the golden settings' model unless out_dir is given."""

    def sample(*arguments, expect=0, project=None, cwd=None, interpreter=False, env=None, **settings):
        options = {"project": project} if project else {}
        arguments = [*CPU, *flags({"out_dir": synthetic_run[0]} | settings), *arguments]
        return run("sample.py", *arguments, expect=expect, cwd=cwd, interpreter=interpreter, env=env, **options)

    return sample


def edited(path, to, edit):
    saved = torch.load(path)
    edit(saved)
    torch.save(saved, to / "ckpt.pt")
    return to


# ----------------------------------------------------------------------------------------------
# which characters the ids are


def test_a_dataset_prepared_from_another_text_leaves_the_runs_samples_alone(sample, own_project, synthetic_run):
    expected = sample(num_samples=2, max_new_tokens=20)
    write_synthetic(own_project / "data" / "synthetic", BACKWARDS)
    result = sample(num_samples=2, max_new_tokens=20, project=own_project)
    assert texts(result) == texts(expected)
    [line] = result.stderr.splitlines()
    assert f"using those in {synthetic_run[0] / 'ckpt.pt'}" in line
    assert expected.stderr == ""


def test_a_broken_meta_does_not_matter_where_the_checkpoint_has_the_characters(sample, own_project):
    expected = sample(num_samples=2, max_new_tokens=20).stdout
    for content in (b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"vocab_size": 61})):
        (own_project / "data" / "synthetic" / "meta.pkl").write_bytes(content)
        result = sample(num_samples=2, max_new_tokens=20, project=own_project)
        assert result.stdout == expected and result.stderr == ""


def test_the_data_folders_characters_serve_a_checkpoint_without_any(sample, own_project, synthetic_run, tmp_path):
    edited(synthetic_run[0] / "ckpt.pt", tmp_path, lambda saved: saved.pop("meta"))
    expected = texts(sample(num_samples=1, max_new_tokens=20, start="abc"))
    assert texts(sample(num_samples=1, max_new_tokens=20, start="abc", out_dir=tmp_path)) == expected
    write_synthetic(own_project / "data" / "synthetic", BACKWARDS)
    [other] = texts(sample(num_samples=1, max_new_tokens=0, start="abc", out_dir=tmp_path, project=own_project))
    assert other == "abc"


# ----------------------------------------------------------------------------------------------
# prompts


def without_line_feed(saved):
    """The model's characters have no line feed: its id is a tilde's."""
    itos = dict(enumerate("~" + CHARACTERS[1:]))
    saved["meta"] = {"vocab_size": 61, "stoi": {c: i for i, c in itos.items()}, "itos": itos}


@pytest.fixture
def no_line_feed(synthetic_run, own_project, tmp_path):
    """(out_dir of a model whose vocabulary has no line feed, a project with its dataset)"""
    edited(synthetic_run[0] / "ckpt.pt", tmp_path, without_line_feed)
    write_synthetic(own_project / "data" / "synthetic", torch.load(tmp_path / "ckpt.pt")["meta"])
    return {"out_dir": tmp_path, "project": own_project}


def test_where_the_default_prompt_is_unknown_a_character_of_the_vocabulary_begins_and_that_is_said(sample, no_line_feed):
    for count in (1, 2):
        result = sample(num_samples=count, max_new_tokens=20, **no_line_feed)
        found = texts(result)
        assert len(found) == count and all(text[0] == "~" and len(text) == 21 for text in found)
        [line] = result.stderr.splitlines()
        assert r"'\n'" in line and "default prompt" in line and "begin with '~'" in line


def test_a_prompt_that_was_given_is_taken_as_given_or_refused(sample, no_line_feed, tmp_path):
    assert "no character '\\n'" in error_line(sample("--start='\\n'", expect=2, **no_line_feed))
    (tmp_path / "prompt.txt").write_text("\n")
    assert "no character '\\n'" in error_line(sample("--start=FILE:prompt.txt", cwd=tmp_path, expect=2, **no_line_feed))
    (tmp_path / "mine.py").write_text("start = '\\n'\n")
    assert "no character '\\n'" in error_line(sample("mine.py", cwd=tmp_path, expect=2, **no_line_feed))
    result = sample(num_samples=1, max_new_tokens=0, start="ab", **no_line_feed)
    assert texts(result) == ["ab"] and result.stderr == ""


@pytest.mark.parametrize("content", [b"one\r\ntwo\r\n", b"one\rtwo\r", b"\xef\xbb\xbfone\ntwo\n", b"\xef\xbb\xbfone\r\ntwo\n"])
def test_a_prompt_file_may_come_from_any_system(sample, tmp_path, content):
    (tmp_path / "prompt.txt").write_bytes(content)
    assert texts(sample(num_samples=1, max_new_tokens=0, start="FILE:prompt.txt", cwd=tmp_path)) == ["one\ntwo\n"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_prompt_file_in_utf16_is_named_as_such(sample, tmp_path, encoding):
    (tmp_path / "prompt.txt").write_bytes("some words\n".encode(encoding))
    line = error_line(sample(start="FILE:prompt.txt", cwd=tmp_path, expect=2))
    assert line.startswith("--start=FILE:prompt.txt: not UTF-8 text") and "UTF-16" in line


def test_start_is_taken_as_typed(sample):
    assert "'\\r' (U+000D)" in error_line(sample("--start='a\\r\\nb'", expect=2))
    assert "U+FEFF" in error_line(sample("--start=\ufeffa", expect=2))


def interactive(project, out_dir, stdin, **options):
    command = [sys.executable, str(project / "sample.py"), *CPU, f"--out_dir={out_dir}", "--interactive=True",
               "--max_new_tokens=4"]  # fmt: skip
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=300, **options)


@pytest.mark.parametrize("stdin", [
    b"abc\r\nxyz\r\n", b"abc\rxyz\r", b"\xef\xbb\xbfabc\nxyz\n", b"\xef\xbb\xbfabc\r\nxyz", b"abc\nxyz",
])  # fmt: skip
def test_prompts_on_stdin_may_come_from_any_system(project, synthetic_run, stdin):
    done = interactive(project, synthetic_run[0], stdin)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    first, second, rest = done.stdout.decode().split(f"\n{DASHES}\n")
    assert (first[:3], second[:3], rest) == ("abc", "xyz", "") and len(first) == len(second) == 7


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_stdin_in_utf16_is_named_as_such_once(project, synthetic_run, encoding):
    done = interactive(project, synthetic_run[0], "abc\nxyz\nabc\n".encode(encoding))
    [line] = done.stderr.decode().splitlines()
    assert done.returncode == 2 and line.startswith("error: stdin") and "UTF-16" in line and done.stdout == b""


def test_interactive_with_stdin_closed_is_one_line(project, synthetic_run):
    done = interactive(project, synthetic_run[0], None, preexec_fn=lambda: os.close(0))
    [line] = done.stderr.decode().splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "stdin" in line and done.stdout == b""


def test_interactive_with_nothing_on_stdin_ends_well(project, synthetic_run):
    done = interactive(project, synthetic_run[0], b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ----------------------------------------------------------------------------------------------
# settings and failures


def test_top_k_0_draws_from_all_tokens(sample):
    everything = texts(sample(num_samples=2, max_new_tokens=60, top_k=61, temperature=2.0))
    assert texts(sample(num_samples=2, max_new_tokens=60, top_k=0, temperature=2.0)) == everything
    assert texts(sample(num_samples=1, max_new_tokens=60, top_k=0, temperature=2.0)) == everything[:1]
    assert texts(sample(num_samples=2, max_new_tokens=60, top_k=2, temperature=2.0)) != everything


def test_a_config_file_of_train_serves_sample_too(sample, synthetic_run, tmp_path):
    (tmp_path / "mine.py").write_text(f"out_dir = {str(synthetic_run[0])!r}\nmax_iters = 5000\nlearning_rate = 1e-3\n")
    result = sample("mine.py", num_samples=1, max_new_tokens=3, start="abc", cwd=tmp_path)
    note, *rest = result.lines
    assert note == "note: config file mine.py sets names that are no settings: max_iters, learning_rate"
    assert rest[0].startswith("abc") and rest[-1] == DASHES


def test_out_of_memory_names_what_sample_can_change(run, synthetic_run, project):
    (project / "exhausted.py").write_text(
        "import os, runpy, sys, torch\n"
        "def multinomial(*args, **options):\n    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')\n"
        "torch.multinomial = multinomial\n"
        "sys.argv[0] = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'sample.py')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    result = run("exhausted.py", *CPU, f"--out_dir={synthetic_run[0]}", expect=1)
    [line] = result.stderr.splitlines()
    assert line.startswith("error: out of memory: ") and "--num_samples" in line
    assert "batch_size" not in line and "block_size" not in line
