"""A resumed run prints what the run that was never stopped does, and takes its settings from the checkpoint."""

import shutil

import numpy as np
import pytest
import torch
from conftest import (
    RESUME, SMALL, SYNTHETIC, TESTS, TINY, error_line, flags, one_failure, parse, rows, tree, write_synthetic,
)  # fmt: skip
from reference import losses_of_a_run
from runs import DEFAULTS, TOKENS, as_nanogpt_saves, assert_close, assert_near, content, load

from nanogpt import checkpoint as ckpt
from nanogpt.run_log import read_log


# ----------------------------------------------------------------------------------------------
# stopped and resumed


def test_a_finished_run_goes_on_to_a_larger_max_iters(run, tmp_path):
    whole = run("train.py", *flags(TINY, dropout=0.1, max_iters=16, out_dir=tmp_path / "whole")).losses
    first = run("train.py", *flags(TINY, dropout=0.1, max_iters=9, out_dir=tmp_path / "out")).losses
    second = run("train.py", *flags(RESUME, out_dir=tmp_path / "out", max_iters=16))
    assert first + second.losses == whole
    assert "max_iters is now 16 (the run had 9)" in second.lines


def test_the_last_iteration_is_saved_and_a_resume_of_it_says_that_nothing_is_left(train, small_run):
    before = content(small_run)
    result = train(SMALL, out_dir=small_run, max_iters=8, init_from="resume")
    assert "the run has reached max_iters = 8" in result.stdout and not result.losses
    assert {k: v for k, v in content(small_run).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_auto_starts_where_there_is_no_run_and_resumes_where_there_is_one(train, whole_run, tmp_path):
    expected, _ = whole_run(SMALL)
    first = train(SMALL, out_dir=tmp_path / "out", init_from="auto", max_iters=8)
    second = train(SMALL, out_dir=tmp_path / "out", init_from="auto")
    assert "from scratch" in first.stdout and "Resuming" in second.stdout
    assert second.losses == expected[-len(second.losses) :]


# ----------------------------------------------------------------------------------------------
# what a resumed run takes from the checkpoint


def test_another_seed_at_a_resume_draws_other_batches_and_is_said(train, small_run, tmp_path):
    """And the run has that seed from then on: a resume without --seed is exact."""
    folders = {name: shutil.copytree(small_run, tmp_path / name) for name in ("plain", "same", "again", "parts")}
    resume = SMALL | dict(init_from="resume", dropout=0.1)
    plain = train(resume, out_dir=folders["plain"])
    same = train(resume, out_dir=folders["same"], seed=1337)
    assert plain.losses == same.losses and "seed is now" not in plain.stdout + same.stdout
    other = train(resume, out_dir=small_run, seed=5)
    assert "seed is now 5 (the run had 1337)" in other.lines
    assert [line[:2] for line in other.losses] == [line[:2] for line in plain.losses]
    assert all(ours != theirs for ours, theirs in zip(other.losses, plain.losses, strict=True))
    assert train(resume, out_dir=folders["again"], seed=5).losses == other.losses
    first = train(resume, out_dir=folders["parts"], seed=5, max_iters=12)
    second = train(RESUME, out_dir=folders["parts"], max_iters=16)
    assert first.losses + second.losses == other.losses and "seed is now" not in second.stdout


def test_out_dir_and_resume_are_enough_and_overrides_are_said(train, whole_run, small_run):
    expected, _ = whole_run(SMALL)
    plain = train({}, out_dir=small_run, init_from="resume", max_iters=16, device="cpu", compile=False)
    assert plain.losses == expected[-len(plain.losses) :] and len(plain.losses) == 8 + 2
    assert "max_iters is now 16 (the run had 8)" in plain.lines
    changed = train(RESUME, out_dir=small_run, max_iters=18, learning_rate=0.5, weight_decay=0.25)
    for line in (
        "max_iters is now 18 (the run had 16)",
        "learning_rate is now 0.5 (the run had 0.01)",
        "weight_decay is now 0.25 (the run had 0.1)",
    ):
        assert line in changed.lines
    kept = torch.load(small_run / "last.pt")
    assert (kept["config"]["learning_rate"], kept["config"]["max_iters"]) == (0.5, 18)
    assert kept["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


@pytest.mark.parametrize("changed", [dict(beta1=0.5), dict(beta2=0.5), dict(weight_decay=0.9)])
def test_an_optimizer_setting_changed_at_a_resume_takes_effect(train, whole_run, small_run, changed):
    expected, _ = whole_run(SMALL)
    result = train(SMALL, out_dir=small_run, init_from="resume", **changed)
    assert result.losses[0] == expected[-len(result.losses)]  # the state is the same, the steps from here on are not
    assert result.losses != expected[-len(result.losses) :]
    ((name, value),) = changed.items()
    for group in torch.load(small_run / "last.pt")["optimizer"]["param_groups"][:1]:
        assert group["fused"] and value in (group["weight_decay"], *group["betas"])


@pytest.mark.parametrize("name, value", [("n_layer", 2), ("n_embd", 32), ("bias", True)])
def test_a_models_size_cannot_be_changed_by_a_resume(train, small_run, name, value):
    before = content(small_run)
    line = error_line(train(SMALL, expect=2, out_dir=small_run, init_from="resume", **{name: value}))
    assert name in line and str(value) in line and str(SMALL[name]) in line
    assert content(small_run) == before


def test_a_shorter_context_can_be_taken_on_at_a_resume(train, small_run):
    result = train(SMALL, out_dir=small_run, init_from="resume", block_size=8)
    assert "block_size is now 8 (the run had 16)" in result.lines
    last = torch.load(small_run / "last.pt")
    moments = [tuple(s["exp_avg"].shape) for s in last["optimizer"]["state"].values()]
    assert last["model"]["transformer.wpe.weight"].shape == (8, 16) and moments[:2] == [(61, 16), (8, 16)]


def test_another_optimizer_at_a_resume_is_refused_in_one_line(train, small_run):
    before = content(small_run)["last.pt"]
    line = error_line(train(SMALL, expect=2, out_dir=small_run, init_from="resume", optimizer="muon"))
    assert "optimizer" in line and "muon" in line
    assert content(small_run)["last.pt"] == before


def test_the_machines_settings_never_come_from_the_checkpoint(train, whole_run, small_run):
    expected, _ = whole_run(SMALL)
    for name in ("last.pt", "ckpt.pt"):
        saved = torch.load(small_run / name)
        saved["config"] |= dict(device="cuda:7", backend="mpi", dtype="float16", compile=True, peak_flops=7e12)
        saved["config"] |= dict(out_dir="/nowhere", init_from="gpt2", eval_only=True)
        ckpt.save(saved, str(small_run / name))
    result = train({}, out_dir=small_run, init_from="resume", max_iters=16, peak_flops=1e9)
    assert result.losses == expected[-len(result.losses) :]
    assert "1 x cpu" in result.stdout and "float32, compile False" in result.stdout


def test_data_that_changed_underneath_is_an_error(train, own_project, tmp_path):
    out_dir, data = tmp_path / "out", own_project / "data" / "synthetic"
    train(SMALL, out_dir=out_dir, project=own_project)
    before = content(out_dir)
    for change in ("size", "first bytes", "val's size"):
        write_synthetic(data)
        path = data / ("val.bin" if "val" in change else "train.bin")
        tokens = np.fromfile(path, "<u2")
        if change == "first bytes":
            tokens[5] = (tokens[5] + 1) % 61
        else:
            tokens = tokens[:-1]
        tokens.tofile(path)
        dataset = tree(data)
        result = train(SMALL, expect=2, out_dir=out_dir, init_from="resume", max_iters=20, project=own_project)
        assert "not the data this run was trained on" in error_line(result)
        assert tree(data) == dataset and content(out_dir) == before
    write_synthetic(data)
    train(SMALL, out_dir=out_dir, init_from="resume", max_iters=20, project=own_project)


@pytest.mark.parametrize("batch", [14, 31])  # in an evaluation, and as a step is computed
@pytest.mark.parametrize("change", ["removed", "other ids", "0", "20"])
def test_data_that_changes_under_a_run_ends_it_with_its_state_saved(train, whole_run, own_project, tmp_path, change, batch):
    spoilt = train(SMALL, out_dir=tmp_path, program="change_data.py", project=own_project, expect=None,
                   env=dict(BATCH=batch, CHANGE=change))  # fmt: skip
    assert spoilt.returncode in (1, 2) and "train.bin" in one_failure(spoilt, spoilt.returncode)
    write_synthetic(own_project / "data" / "synthetic")
    resumed = train(SMALL, out_dir=tmp_path, init_from="resume", project=own_project)
    losses, log = whole_run(SMALL)
    at = load(tmp_path / "ckpt.pt")["iter_num"]
    assert spoilt.losses + resumed.losses == losses and rows(tmp_path) == log and at > 0


def test_an_equal_copy_of_the_data_is_the_same_data(train, whole_run, own_project, tmp_path):
    copied = train(SMALL, out_dir=tmp_path, program="change_data.py", project=own_project,
                   env=dict(BATCH=20, CHANGE="copied"))  # fmt: skip
    assert copied.losses == whole_run(SMALL)[0]


def test_betas_and_decay_changed_on_resume_give_adamws_own_losses(run, synthetic_run, tmp_path):
    as_nanogpt_saves(synthetic_run[0] / "ckpt.pt", tmp_path / "ckpt.pt")
    changed = dict(beta1=0.5, beta2=0.6, weight_decay=0.9, max_iters=156, eval_interval=5, grad_clip=0.5)
    settings = SYNTHETIC | DEFAULTS | changed | dict(min_lr=3e-3, lr_decay_iters=120)
    more = flags(RESUME, dtype="float32", compile=False, min_lr=3e-3, **changed)
    result = run("train.py", f"--out_dir={tmp_path}", *more)
    saved = load(synthetic_run[0] / "ckpt.pt")
    for group, decay in zip(saved["optimizer"]["param_groups"], (0.9, 0.0), strict=True):
        group |= dict(betas=(0.5, 0.6), weight_decay=decay)
    expected = losses_of_a_run(TOKENS, settings, (saved["model"], saved["optimizer"]), first=150)
    assert_near(result.losses, expected)


# ----------------------------------------------------------------------------------------------
# nanoGPT's checkpoints


def test_a_checkpoint_of_nanogpts_resumes_with_nanogpts_losses(run, synthetic_run, tmp_path):
    """nanoGPT's resume starts its generators anew: the losses are those of a plain reimplementation of that."""
    as_nanogpt_saves(synthetic_run[0] / "ckpt.pt", tmp_path / "ckpt.pt")
    more = flags(RESUME, dtype="float32", compile=False, max_iters=160, eval_interval=10)
    result = run("train.py", f"--out_dir={tmp_path}", *more)
    assert f"Resuming training from {tmp_path}" in result.lines
    saved = load(synthetic_run[0] / "ckpt.pt")
    settings = SYNTHETIC | DEFAULTS | dict(max_iters=160, eval_interval=10)
    expected = losses_of_a_run(TOKENS, settings, (saved["model"], saved["optimizer"]), first=150)
    assert_near(result.losses, expected)


# ----------------------------------------------------------------------------------------------
# checkpoints and logs that older versions have written

OLD = TESTS / "old_layout"  # of the version in which train.py had all of nanogpt/ beside it; 10 iterations, with dropout


@pytest.mark.parametrize("name, first", [("last.pt", ("step", 10)), ("ckpt.pt", ("iter", 5))])
def test_a_run_of_the_old_layout_resumes_with_the_losses_that_the_old_code_printed(run, tmp_path, name, first):
    """resumed.txt has what the old code printed when it resumed last.pt, and iterations 5 to 9 stand in its log."""
    for file in (name, "log.csv"):
        shutil.copy(OLD / file, tmp_path)
    result = run("train.py", *flags(RESUME, out_dir=tmp_path, max_iters=20))
    assert f"Resuming training from {tmp_path}" in result.lines and result.losses[0][:2] == first
    logged = [row for row in read_log(OLD / "log.csv") if row["kind"] == "train" and int(row["iter"]) >= 5]
    old = [("iter", int(row["iter"]), row["train_loss"]) for row in logged] * (name == "ckpt.pt")
    old += parse((OLD / "resumed.txt").read_text())
    assert_close(result.losses, [(*line[:2], *map(float, line[2:])) for line in old])
    before, after = read_log(OLD / "log.csv"), read_log(tmp_path / "log.csv")
    kept = len(before) - len(logged) * (name == "ckpt.pt")
    assert [{name: row[name] for name in before[0]} for row in after[:kept]] == before[:kept] and kept >= 7
    assert [({"eval": "step", "train": "iter"}[row["kind"]], int(row["iter"])) for row in after[kept:]] == [
        line[:2] for line in result.losses
    ]


def test_sample_and_the_tools_read_a_run_of_the_old_layout(run, tmp_path):
    text = run("sample.py", f"--out_dir={OLD}", "--num_samples=1", "--max_new_tokens=20", "--device=cpu").stdout
    assert len(text) > 20
    run("tools/export.py", f"--out_dir={OLD}", f"--to={tmp_path / 'hf'}")
    run("tools/plot.py", OLD, f"--to={tmp_path / 'loss.png'}")
    assert (tmp_path / "loss.png").exists() and (tmp_path / "hf" / "model.safetensors").exists()
