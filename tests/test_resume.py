"""A resumed run prints what the run that was never stopped does, and takes its settings from the checkpoint."""

import csv
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import LONGER, SMALL, SYNTHETIC, TESTS, TINY, error_line, flags, parse, tree, write_synthetic
from reference import losses_of_a_run
from runs import DEFAULTS, TOKENS, as_nanogpt_saves, assert_close, assert_near, assert_same_losses, content, load

from nanogpt import checkpoint as ckpt
from nanogpt.run_log import read_log


# ----------------------------------------------------------------------------------------------
# stopped and resumed

KINDS = {
    "float32": (signal.SIGINT, dict(gradient_accumulation_steps=1)),
    "float32, dropout, accumulation": (signal.SIGTERM, dict(dropout=0.2, gradient_accumulation_steps=3)),
    "bfloat16": (signal.SIGTERM, dict(dtype="bfloat16", gradient_accumulation_steps=1)),
    "bfloat16, dropout, saves between": (signal.SIGINT, dict(dtype="bfloat16", dropout=0.2, save_interval=3)),
    "float16": (signal.SIGTERM, dict(dtype="float16", n_layer=1, n_embd=16, block_size=16, batch_size=4)),
    "order=epoch, dropout, accumulation": (signal.SIGTERM, dict(order="epoch", dropout=0.2, gradient_accumulation_steps=3)),
    "muon, biases": (signal.SIGTERM, dict(optimizer="muon", bias=True, gradient_accumulation_steps=1)),
}


@pytest.mark.parametrize("number, kind", KINDS.values(), ids=KINDS.keys())
def test_a_stopped_run_goes_on_as_if_it_had_not_been(start, run, tmp_path, number, kind):
    settings = LONGER | dict(max_iters=120) | kind  # enough for the signal to find it at work
    whole = run("train.py", *flags(settings, out_dir=tmp_path / "whole")).losses
    out_dir = tmp_path / "out"
    first = start("train.py", *flags(settings, out_dir=out_dir))
    first.wait_for("iter 10:")
    first.signal(number)
    first = first.end()
    assert first.returncode == 128 + number and first.stderr == ""
    at = re.search(r"stopped at iteration (\d+); the checkpoint to go on from is iteration (\d+)'s", first.lines[-1])
    assert at and at[1] == at[2] and 10 < int(at[1]) <= settings["max_iters"]
    second = run("train.py", f"--out_dir={out_dir}", "--init_from=resume", "--device=cpu")
    assert f", {kind.get('dtype', 'float32')}, compile False, {kind.get('optimizer', 'adamw')}, " in second.stdout
    assert first.losses + second.losses == whole
    # and log.csv has no row twice
    with open(out_dir / "log.csv", newline="") as f:
        rows = [(row["kind"], int(row["iter"])) for row in csv.DictReader(f)]
    assert rows == [({"step": "eval", "iter": "train"}[line[0]], line[1]) for line in whole]
    ends = [load(folder / "last.pt")["model"] for folder in (out_dir, tmp_path / "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
def test_a_run_stopped_three_times_goes_on_as_if_it_had_not_been(start, run, tmp_path):
    settings = LONGER | dict(dropout=0.1, eval_iters=30, eval_interval=4, max_iters=36)  # mostly evaluations
    whole = run("train.py", *flags(settings, out_dir=tmp_path / "whole")).losses
    joined, arguments = [], flags(settings, out_dir=tmp_path / "out")
    for text in ("step 8:", "iter 15:", "step 28:"):
        part = start("train.py", *arguments)
        part.wait_for(text)
        part.signal(signal.SIGTERM)
        part = part.end()
        assert part.returncode == 143, part.stderr
        joined += part.losses
        arguments = flags(out_dir=tmp_path / "out", init_from="resume", device="cpu")
    assert joined + run("train.py", *arguments).losses == whole


def test_a_finished_run_goes_on_to_a_larger_max_iters(run, tmp_path):
    whole = run("train.py", *flags(TINY, dropout=0.1, max_iters=16, out_dir=tmp_path / "whole")).losses
    first = run("train.py", *flags(TINY, dropout=0.1, max_iters=9, out_dir=tmp_path / "out")).losses
    second = run("train.py", *flags(out_dir=tmp_path / "out", init_from="resume", device="cpu", max_iters=16))
    assert first + second.losses == whole
    assert "max_iters is now 16 (the run had 9)" in second.lines


def test_resume_at_max_iters_says_so_and_changes_nothing(run, synthetic_run, tmp_path):
    shutil.copytree(synthetic_run[0], tmp_path / "out")
    before = tree(tmp_path)
    result = run("train.py", *flags(out_dir=tmp_path / "out", init_from="resume", device="cpu"))
    assert "reached max_iters = 150" in result.lines[-1] and not result.losses
    assert tree(tmp_path) == before


def test_the_last_iteration_is_saved_and_a_resume_of_it_says_that_nothing_is_left(train, small_run):
    before = content(small_run)
    result = train(SMALL, out_dir=small_run, max_iters=8, init_from="resume")
    assert "the run has reached max_iters = 8" in result.stdout and not result.losses
    assert {k: v for k, v in content(small_run).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_init_from_auto_resumes_where_there_is_a_run_and_else_starts(run, tmp_path):
    arguments = flags(TINY, out_dir=tmp_path, init_from="auto")
    first = run("train.py", *arguments)
    assert "Initializing a new model from scratch" in first.lines
    second = run("train.py", *arguments[:-1], "--init_from=auto", "--max_iters=12")
    assert f"Resuming training from {tmp_path}" in second.lines
    assert [line[1] for line in second.losses if line[0] == "iter"] == [9, 10, 11, 12]


def test_auto_starts_where_there_is_no_run_and_resumes_where_there_is_one(train, whole_run, tmp_path):
    expected, _ = whole_run(SMALL)
    first = train(SMALL, out_dir=tmp_path / "out", init_from="auto", max_iters=8)
    second = train(SMALL, out_dir=tmp_path / "out", init_from="auto")
    assert "from scratch" in first.stdout and "Resuming" in second.stdout
    assert second.losses == expected[-len(second.losses) :]


# ----------------------------------------------------------------------------------------------
# what a resumed run takes from the checkpoint


def test_out_dir_and_resume_are_enough_and_overrides_are_said(train, whole_run, small_run):
    expected, _ = whole_run(SMALL)
    plain = train({}, out_dir=small_run, init_from="resume", max_iters=16, device="cpu", compile=False)
    assert plain.losses == expected[-len(plain.losses) :] and len(plain.losses) == 8 + 2
    assert "max_iters is now 16 (the run had 8)" in plain.lines
    changed = train({}, out_dir=small_run, init_from="resume", max_iters=18, learning_rate=0.5, weight_decay=0.25)
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


@pytest.fixture(scope="module")
def half_way(run, tmp_path_factory):
    """(out_dir of a run of 20 iterations, the weights that it has after 30)"""
    folder = tmp_path_factory.mktemp("half")
    run("train.py", *flags(LONGER, max_iters=19, out_dir=folder / "out"))
    shutil.copytree(folder / "out", folder / "on")
    run("train.py", *flags(out_dir=folder / "on", init_from="resume", device="cpu", max_iters=29))
    return folder / "out", load(folder / "on" / "last.pt")["model"]


@pytest.mark.parametrize("name, value", [("beta1", 0.5), ("beta2", 0.5), ("weight_decay", 0.7)])
def test_optimizer_settings_changed_on_resume_take_effect(run, half_way, tmp_path, name, value):
    """A group loaded from a checkpoint brings its own, and turns fused off."""
    shutil.copytree(half_way[0], tmp_path / "out")
    changed = {name: value}
    more = flags(init_from="resume", device="cpu", max_iters=29, **changed)
    result = run("train.py", f"--out_dir={tmp_path / 'out'}", *more)
    assert [line for line in result.lines if line.startswith(f"{name} is now {value}")]
    saved = load(tmp_path / "out" / "last.pt")
    matrices, vectors = saved["optimizer"]["param_groups"]
    expected = dict(beta1=0.9, beta2=0.95, weight_decay=0.1) | changed
    assert matrices["betas"] == vectors["betas"] == (expected["beta1"], expected["beta2"])
    assert matrices["weight_decay"] == expected["weight_decay"] and vectors["weight_decay"] == 0.0
    assert matrices["fused"] and vectors["fused"]
    # and not on paper only: the weights are others
    assert not torch.equal(saved["model"]["transformer.wte.weight"], half_way[1]["transformer.wte.weight"])


def test_betas_and_decay_changed_on_resume_give_adamws_own_losses(run, synthetic_run, tmp_path):
    as_nanogpt_saves(synthetic_run[0] / "ckpt.pt", tmp_path / "ckpt.pt")
    changed = dict(beta1=0.5, beta2=0.6, weight_decay=0.9, max_iters=165, eval_interval=10, grad_clip=0.5)
    settings = SYNTHETIC | DEFAULTS | changed | dict(min_lr=3e-3, lr_decay_iters=120)
    more = flags(device="cpu", dtype="float32", compile=False, min_lr=3e-3, **changed)
    result = run("train.py", f"--out_dir={tmp_path}", "--init_from=resume", *more)
    saved = load(synthetic_run[0] / "ckpt.pt")
    for group, decay in zip(saved["optimizer"]["param_groups"], (0.9, 0.0), strict=True):
        group |= dict(betas=(0.5, 0.6), weight_decay=decay)
    expected = losses_of_a_run(TOKENS, settings, (saved["model"], saved["optimizer"]), first=150)
    assert_near(result.losses, expected)


def test_resume_crops_the_context_where_a_smaller_block_size_is_given(run, synthetic_run, tmp_path):
    shutil.copytree(synthetic_run[0], tmp_path / "out")
    run("train.py", *flags(out_dir=tmp_path / "out", init_from="resume", device="cpu", block_size=16, max_iters=152))
    saved = load(tmp_path / "out" / "last.pt")
    assert saved["model"]["transformer.wpe.weight"].shape == (16, 64) and saved["model_args"]["block_size"] == 16


# ----------------------------------------------------------------------------------------------
# nanoGPT's checkpoints


def test_a_checkpoint_of_nanogpts_resumes_with_nanogpts_losses(run, synthetic_run, tmp_path):
    """nanoGPT's resume starts its generators anew: the losses are those of a plain reimplementation of that."""
    as_nanogpt_saves(synthetic_run[0] / "ckpt.pt", tmp_path / "ckpt.pt")
    more = flags(device="cpu", dtype="float32", compile=False, max_iters=170, eval_interval=10)
    result = run("train.py", f"--out_dir={tmp_path}", "--init_from=resume", *more)
    assert f"Resuming training from {tmp_path}" in result.lines
    saved = load(synthetic_run[0] / "ckpt.pt")
    settings = SYNTHETIC | DEFAULTS | dict(max_iters=170, eval_interval=10)
    expected = losses_of_a_run(TOKENS, settings, (saved["model"], saved["optimizer"]), first=150)
    assert_near(result.losses, expected)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_modules_are_taken_off(run, synthetic_run, tmp_path, prefix):
    saved = load(synthetic_run[0] / "ckpt.pt")
    saved["model"] = {prefix + name: weight for name, weight in saved["model"].items()}
    torch.save(saved, tmp_path / "ckpt.pt")
    result = run("train.py", *flags(out_dir=tmp_path, init_from="resume", device="cpu", max_iters=150))
    assert_same_losses(result.losses, synthetic_run[1].losses[-1:])  # its step 150 had been printed already


# ----------------------------------------------------------------------------------------------
# checkpoints and logs that older versions have written

OLD = TESTS / "old_layout"  # of the version in which train.py had all of nanogpt/ beside it; 10 iterations, with dropout


@pytest.mark.parametrize("name, first", [("last.pt", ("step", 10)), ("ckpt.pt", ("iter", 5))])
def test_a_run_of_the_old_layout_resumes_with_the_losses_that_the_old_code_printed(run, tmp_path, name, first):
    """resumed.txt has what the old code printed when it resumed last.pt, and iterations 5 to 9 stand in its log."""
    for file in (name, "log.csv"):
        shutil.copy(OLD / file, tmp_path)
    result = run("train.py", *flags(out_dir=tmp_path, init_from="resume", device="cpu", max_iters=20))
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
