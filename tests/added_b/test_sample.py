"""sample.py as a user sees it."""

import pickle

import pytest
import torch
from conftest import CHARACTERS, flags, write_synthetic

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
