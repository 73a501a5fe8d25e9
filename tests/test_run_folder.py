"""nanogpt/run_folder.py: out_dir is locked, an earlier run's files are moved aside, and nothing else is touched."""

import fcntl
import os
import pickle
import re
import shutil
import signal

import pytest
import torch
from conftest import CHARACTERS, META, SMALL, TINY, error_line, flags, tree, write_synthetic
from runs import content

from nanogpt import run_folder


def test_a_second_run_on_the_same_folder_is_refused_in_one_line_and_the_first_goes_on(start, train, tmp_path):
    first = start("train.py", *flags(SMALL, out_dir=tmp_path, max_iters=10**6))
    first.wait_for("iter 1:")
    for init_from in ("scratch", "auto", "resume"):
        line = error_line(train(SMALL, expect=2, out_dir=tmp_path, init_from=init_from, max_iters=10**6))
        assert f"another run is writing to {tmp_path}" in line
    seen = len(first.read()[0])
    first.wait(lambda: len(first.read()[0]) > seen + 100)
    assert first.code is None and not [p for p in tmp_path.iterdir() if p.is_dir()]  # nothing was moved aside
    first.signal(signal.SIGKILL)
    first.end()
    train(SMALL, out_dir=tmp_path, max_iters=2)  # a dead run holds no lock


def test_eval_only_works_beside_the_run_that_is_writing_and_moves_nothing(train, small_run, tmp_path):
    with open(small_run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = tree(tmp_path)
        for init_from in ("resume", "scratch"):
            train(SMALL, out_dir=small_run, init_from=init_from, eval_only=True)
        assert tree(tmp_path) == before


def test_leftover_temporary_files_are_cleared_and_others_are_not(train, tmp_path):
    ours = ["last.pt.123.tmp", "ckpt.pt.99999.tmp", "log.csv.tmp"]
    theirs = ["notes.tmp", "essay.pt", "folder.tmp"]
    for name in ours + theirs[:2]:
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.tmp").mkdir()
    train(SMALL, out_dir=tmp_path, max_iters=2)
    left = os.listdir(tmp_path)
    assert not set(ours) & set(left) and set(theirs) <= set(left)


def test_a_run_from_scratch_moves_another_runs_files_aside_and_says_so(train, small_run):
    """A good.pt is of a version whose runs could go back to it."""
    (small_run / "notes.txt").write_text("the user's own")
    shutil.copy(small_run / "ckpt.pt", small_run / "good.pt")
    before = content(small_run)
    result = train(SMALL, out_dir=small_run, max_iters=4)
    (said,) = [line for line in result.lines if "moved to" in line]
    folder = small_run / said.rpartition("/")[2]
    assert said == f"an earlier run's files were in {small_run}: moved to {folder}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d{6}", folder.name)
    assert content(folder) == {name: before[name] for name in ("last.pt", "ckpt.pt", "good.pt", "log.csv")}
    assert torch.load(small_run / "last.pt")["iter_num"] == 5 and (small_run / "notes.txt").exists()


def test_runs_moved_aside_within_one_second_do_not_meet(tmp_path):
    kept = []
    for k in range(5):
        (tmp_path / "last.pt").write_text(str(k))
        kept.append(run_folder.move_aside(str(tmp_path)))
    assert len(set(kept)) == 5
    assert [open(os.path.join(folder, "last.pt")).read() for folder in kept] == list("01234")
    assert run_folder.move_aside(str(tmp_path)) is None


def test_a_refused_command_moves_and_writes_nothing(train, small_run):
    before = tree(small_run)
    for bad in (dict(dataset="nowhere"), dict(n_embd=15), dict(dropout=2.0), dict(learning_rate="x"), dict(beta1=2.0)):
        error_line(train(SMALL, expect=2, out_dir=small_run, **bad))
        assert tree(small_run) == before


def test_an_out_dir_of_odd_bytes_is_written_to_and_named(train, tmp_path):
    out_dir = os.path.join(tmp_path, "r\udcffn \u00e9\n*[1]")  # no UTF-8, a line feed, a glob's characters
    result = train(SMALL, out_dir=out_dir, max_iters=4)
    assert f"saving checkpoint to {tmp_path}/r\\udcffn" in result.stdout and result.stderr == ""
    assert len(train(SMALL, out_dir=out_dir, max_iters=8, init_from="resume").losses) == 4 + 1


# ----------------------------------------------------------------------------------------------
# a run on another dataset than before, and a new run from another run's model


KEEP_BEST = TINY | dict(always_save_checkpoint=False)


@pytest.fixture
def two_datasets(own_project):
    """The test's own project, with data/synthetic and data/other: the same ids, which stand for other characters."""
    write_synthetic(own_project / "data" / "other")
    turned = CHARACTERS[::-1]
    meta = META | {"stoi": {c: i for i, c in enumerate(turned)}, "itos": dict(enumerate(turned))}
    (own_project / "data" / "other" / "meta.pkl").write_bytes(pickle.dumps(meta))
    write_synthetic(own_project / "data" / "same_characters")
    return own_project


def val_losses(result):
    return {n: float(val) for kind, n, *rest in result.losses if kind == "step" for val in rest[1:]}


def weights(path):
    return torch.load(path)["model"]


def test_on_another_dataset_a_resumed_run_forgets_the_best_of_the_old_one(run, two_datasets, tmp_path):
    def train(**more):
        return run("train.py", *flags(KEEP_BEST, out_dir=tmp_path / "out", **more), project=two_datasets)

    train(max_iters=8)
    best = torch.load(tmp_path / "out" / "ckpt.pt")
    for path in (tmp_path / "out").glob("*.pt"):  # a best that no later evaluation can beat
        torch.save(torch.load(path) | {"best_val_loss": 0.001}, path)
    same = train(max_iters=12, init_from="resume")
    assert "forgotten" not in same.stdout and "best val loss 0.0010 at" in same.stdout
    other = train(max_iters=16, init_from="resume", dataset="same_characters")
    assert "the best val loss so far was on synthetic: it is forgotten" in other.stdout
    assert "stand for other tokens" not in other.stdout
    evaluated = val_losses(other)
    at = min(evaluated, key=evaluated.get)
    assert f"best val loss {evaluated[at]:.4f} at iteration {at}," in other.stdout
    kept = torch.load(tmp_path / "out" / "ckpt.pt")
    assert kept["iter_num"] == at > best["iter_num"] and kept["config"]["dataset"] == "same_characters"
    again = train(max_iters=20, init_from="resume", dataset="same_characters")
    assert "forgotten" not in again.stdout


def test_that_the_ids_stand_for_other_characters_now_is_said(run, two_datasets, tmp_path):
    run("train.py", *flags(KEEP_BEST, out_dir=tmp_path / "out"), project=two_datasets)
    resumed = run("train.py", *flags(KEEP_BEST, out_dir=tmp_path / "out", init_from="resume", max_iters=12, dataset="other"),
                  project=two_datasets)  # fmt: skip
    assert "the ids of other stand for other tokens now: what the model knows of them is lost" in resumed.lines


# ----------------------------------------------------------------------------------------------
# --init_from=OUT_DIR


@pytest.fixture
def trained(run, tmp_path):
    """A folder called gpt2-mine with a run in it, whose ckpt.pt is older than its last.pt."""
    folder = tmp_path / "gpt2-mine"
    run("train.py", *flags(TINY, out_dir=folder, max_iters=6, dropout=0.1))
    assert torch.load(folder / "ckpt.pt")["iter_num"] == 4 and torch.load(folder / "last.pt")["iter_num"] == 7
    return folder


def test_a_new_run_starts_from_the_model_of_another(run, trained, tmp_path):
    sizes = ("n_layer", "n_head", "n_embd")
    settings = {name: value for name, value in TINY.items() if name not in sizes}  # the model's own are taken
    before = tree(trained)
    result = run("train.py", *flags(settings, out_dir=tmp_path / "new", init_from=trained, learning_rate=0.0, min_lr=0.0,
                                    max_iters=0, weight_decay=0.0))  # fmt: skip
    assert [line[:2] for line in result.losses] == [("step", 0), ("iter", 0)]
    assert f"Initializing from the model in {trained / 'ckpt.pt'}" in result.lines
    new = torch.load(tmp_path / "new" / "last.pt")
    assert new["iter_num"] == 1 and new["optimizer"]["state"][0]["step"] == 1
    start = weights(trained / "ckpt.pt")
    assert all(torch.equal(start[name], weight) for name, weight in new["model"].items())  # at learning rate 0
    assert {k: v for k, v in tree(trained).items() if ".lock" not in k} == {
        k: v for k, v in before.items() if ".lock" not in k
    }


def test_its_loss_is_the_one_that_the_other_run_had(run, trained, tmp_path):
    theirs = run("train.py", *flags(TINY, out_dir=trained, init_from="resume", eval_only=True, eval_iters=200))
    ours = run("train.py", *flags(TINY, out_dir=tmp_path / "new", init_from=trained, eval_only=True, eval_iters=200))
    assert float(ours.losses[0][3]) == pytest.approx(float(theirs.losses[0][3]), abs=0.1)
    untrained = run("train.py", *flags(TINY, out_dir=tmp_path / "x", eval_only=True, eval_iters=200))
    assert float(untrained.losses[0][3]) > float(ours.losses[0][3]) + 0.05


def test_last_pt_serves_where_there_is_no_ckpt_pt_and_a_damaged_one_is_said(run, trained, tmp_path):
    (trained / "ckpt.pt").write_bytes(b"damaged")
    result = run("train.py", *flags(TINY, out_dir=tmp_path / "a", init_from=trained, max_iters=0))
    assert any("ckpt.pt is damaged" in line and line.endswith(f"using {trained / 'last.pt'}") for line in result.lines)
    (trained / "ckpt.pt").unlink()
    result = run("train.py", *flags(TINY, out_dir=tmp_path / "b", init_from=trained, max_iters=0))
    assert f"Initializing from the model in {trained / 'last.pt'}" in result.lines


def test_a_run_may_start_anew_from_the_model_in_its_own_folder(run, trained):
    start = weights(trained / "ckpt.pt")
    result = run("train.py", *flags(TINY, out_dir=trained, init_from=trained, max_iters=0, learning_rate=0.0, min_lr=0.0,
                                    weight_decay=0.0))  # fmt: skip
    [moved] = re.findall(r"an earlier run's files were in .*: moved to (.*)", result.stdout)
    assert weights(f"{moved}/ckpt.pt").keys() == start.keys()
    assert all(torch.equal(start[name], weight) for name, weight in weights(trained / "last.pt").items())


def test_a_dataset_of_other_characters_than_the_models_is_refused_and_costs_nothing(run, two_datasets, trained, tmp_path):
    settings = flags(TINY, out_dir=tmp_path / "new", init_from=trained, dataset="other")
    line = error_line(run("train.py", *settings, project=two_datasets, expect=2))
    assert "other tokens" in line and "other" in line and str(trained) in line
    assert not (tmp_path / "new").exists()
    run("train.py", *flags(TINY, out_dir=tmp_path / "new", init_from=trained, dataset="same_characters", max_iters=0),
        project=two_datasets)  # fmt: skip


def test_sizes_that_are_not_the_models_are_refused(run, trained, tmp_path):
    line = error_line(run("train.py", *flags(TINY, out_dir=tmp_path / "new", init_from=trained, n_layer=3), expect=2))
    assert "--n_layer=3" in line and str(trained) in line


def test_a_shorter_context_is_cropped(run, trained, tmp_path):
    run("train.py", *flags(TINY, out_dir=tmp_path / "new", init_from=trained, block_size=8, max_iters=0))
    assert torch.load(tmp_path / "new" / "last.pt")["model_args"]["block_size"] == 8


def test_sample_takes_it_likewise(run, trained):
    arguments = ["--device=cpu", "--num_samples=2", "--max_new_tokens=30"]
    theirs = run("sample.py", f"--out_dir={trained}", *arguments)
    assert run("sample.py", f"--init_from={trained}", *arguments).stdout == theirs.stdout


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_folder_with_no_model_is_one_line(run, tmp_path, script):
    (tmp_path / "empty").mkdir()
    settings = flags(TINY, out_dir=tmp_path / "new") if script == "train.py" else []
    line = error_line(run(script, *settings, f"--init_from={tmp_path / 'empty'}", expect=2))
    assert "ckpt.pt" in line and "config.json" in line and str(tmp_path / "empty") in line
