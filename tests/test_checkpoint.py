"""nanogpt/checkpoint.py: what is saved, and what becomes of it on damaged, hostile, full and read-only disks."""

import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import META, SMALL, SYNTHETIC, TINY, error_line, flags, one_failure, rows
from runs import content, load, val_losses

from nanogpt import checkpoint as ckpt


# ----------------------------------------------------------------------------------------------
# as nanoGPT's

SIX = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}


def nanogpt_shapes(V, C, T, n_layer):
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C), "transformer.ln_f.weight": (C,)}
    for i in range(n_layer):
        shapes |= {
            f"transformer.h.{i}.ln_1.weight": (C,),
            f"transformer.h.{i}.attn.c_attn.weight": (3 * C, C),
            f"transformer.h.{i}.attn.c_proj.weight": (C, C),
            f"transformer.h.{i}.ln_2.weight": (C,),
            f"transformer.h.{i}.mlp.c_fc.weight": (4 * C, C),
            f"transformer.h.{i}.mlp.c_proj.weight": (C, 4 * C),
        }
    return shapes | {"lm_head.weight": (V, C)}


@pytest.mark.parametrize("name", ["ckpt.pt", "last.pt"])
def test_our_checkpoint_is_one_of_nanogpts(synthetic_run, name):
    saved = load(synthetic_run[0] / name)
    assert saved.keys() >= SIX
    assert {name: tuple(w.shape) for name, w in saved["model"].items()} == nanogpt_shapes(61, 64, 32, 2)
    assert saved["model_args"] == dict(
        n_layer=2, n_head=2, n_embd=64, block_size=32, bias=False, vocab_size=61, dropout=0.0
    )
    assert saved["iter_num"] == {"ckpt.pt": 150, "last.pt": 151}[name]
    assert float(saved["best_val_loss"]) == pytest.approx(1.6349, abs=2e-4)  # golden/synthetic.csv, the least
    assert saved["config"] == saved["config"] | SYNTHETIC | {"out_dir": str(synthetic_run[0])}
    # the optimizer state fits torch's AdamW over nanoGPT's groups: matrices first, then the norms
    shapes = [s for n, s in nanogpt_shapes(61, 64, 32, 2).items() if n != "lm_head.weight"]
    groups = [[torch.zeros(s) for s in shapes if len(s) == k] for k in (2, 1)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    optimizer.load_state_dict(saved["optimizer"])
    for parameter in sum(groups, []):
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert saved["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.1, 0.0]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_modules_are_taken_off(small_run, prefix):
    saved = load(small_run / "ckpt.pt")
    expected = dict(saved["model"])
    saved["model"] = {prefix + name: weight for name, weight in expected.items()}
    torch.save(saved, small_run / "ckpt.pt")
    found = ckpt.load(str(small_run / "ckpt.pt"))["model"]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ----------------------------------------------------------------------------------------------
# which model is saved


@pytest.mark.parametrize("always", [True, False])
def test_ckpt_is_the_best_model_or_with_always_save_checkpoint_the_latest(run, tmp_path, always):
    """At learning rate 1 the val loss only rises from iteration 0's, at which nanoGPT never saves."""
    settings = TINY | dict(learning_rate=1.0, min_lr=1.0, warmup_iters=0, grad_clip=0.0, max_iters=10)
    result = run("train.py", *flags(settings, always_save_checkpoint=always, out_dir=tmp_path))
    val = val_losses(result)
    assert len(val) == 3 and min(val) == val[0]
    assert result.stdout.count(f"saving checkpoint to {tmp_path}") == (2 if always else 0)
    if always:
        saved = load(tmp_path / "ckpt.pt")
        assert saved["iter_num"] == 8
        assert float(saved["best_val_loss"]) == pytest.approx(val[0], abs=1e-4)
    else:
        assert not (tmp_path / "ckpt.pt").exists()


def test_the_best_model_stays_in_ckpt_while_worse_ones_follow(run, tmp_path):
    settings = TINY | dict(max_iters=24, lr_decay_iters=1, min_lr=3.0, grad_clip=0.0, always_save_checkpoint=False)
    result = run("train.py", *flags(settings, learning_rate=3e-3, warmup_iters=5, out_dir=tmp_path))
    steps = [line for line in result.losses if line[0] == "step"]
    best = min(steps, key=lambda line: float(line[3]))
    assert 0 < best[1] < 24, steps  # it has a best, and worse ones after it
    assert load(tmp_path / "ckpt.pt")["iter_num"] == best[1]
    assert f"best val loss {best[3]} at iteration {best[1]}, " in result.stdout


# ----------------------------------------------------------------------------------------------
# damaged files


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "bit flipped in a weight":
        weights = torch.load(path)["model"]["transformer.h.0.attn.c_attn.weight"].numpy().tobytes()
        at = data.index(weights) + 41
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        torch.load(path, weights_only=True)  # which does not notice
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(len(data)))
    elif how == "a folder":
        path.unlink()
        path.mkdir()


DAMAGES = ["truncated", "bit flipped in a weight", "empty", "garbage", "a folder"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_last_pt_is_passed_over_for_ckpt_pt(train, whole_run, small_run, how):
    expected, expected_rows = whole_run(SMALL)
    damage(small_run / "last.pt", how)
    if how == "a folder":
        (small_run / "last.pt").rmdir()
        (small_run / "last.pt").write_bytes(b"PK\x03\x04")
    result = train(SMALL, out_dir=small_run, init_from="resume")
    said = [line for line in result.lines if "last.pt" in line and line.endswith(f"going on from {small_run}/ckpt.pt")]
    assert len(said) == 1
    step = expected.index(next(line for line in expected if line[:2] == ("iter", 8)))
    assert result.losses == expected[step:]  # ckpt.pt stands after iteration 8's evaluation
    assert rows(small_run) == expected_rows
    assert ckpt.load(str(small_run / "last.pt"))["iter_num"] == 17


@pytest.mark.parametrize("how", DAMAGES[:3])
def test_a_damaged_ckpt_pt_does_not_matter_to_a_resume(train, whole_run, small_run, how):
    expected, _ = whole_run(SMALL)
    damage(small_run / "ckpt.pt", how)
    result = train(SMALL, out_dir=small_run, init_from="resume", max_iters=11)
    assert result.losses == expected[-len(result.losses) - 7 :][: len(result.losses)] and result.losses


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("init_from", ["resume", "auto"])
def test_two_damaged_checkpoints_are_one_line_and_are_left_there(train, small_run, how, init_from):
    for name in ("last.pt", "ckpt.pt"):
        damage(small_run / name, how)
    before = content(small_run)
    line = error_line(train(SMALL, expect=2, out_dir=small_run, init_from=init_from))
    assert f"{small_run}/last.pt" in line and f"{small_run}/ckpt.pt" in line
    assert content(small_run) == before


def test_the_newer_of_the_two_files_is_taken(train, small_run):
    """ckpt.pt is newer where a run was killed between an evaluation and its last.pt."""
    shutil.copy(small_run / "last.pt", small_run / "nine")
    shutil.copy(small_run / "ckpt.pt", small_run / "last.pt")
    shutil.copy(small_run / "nine", small_run / "ckpt.pt")
    checkpoint, path, remarks = ckpt.load_run(str(small_run))
    assert checkpoint["iter_num"] == 9 and path == str(small_run / "ckpt.pt") and remarks == []


# ----------------------------------------------------------------------------------------------
# hostile files


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["whole", "config", "optimizer", "pickle"])
def test_a_hostile_checkpoint_is_refused_in_one_line_and_runs_nothing(train, run, small_run, tmp_path, where):
    evil = Hostile(tmp_path / "ran")
    for name in ("last.pt", "ckpt.pt"):
        saved = torch.load(small_run / name)
        if where in ("config", "optimizer"):
            saved[where]["evil"] = evil
        elif where == "whole":
            saved = evil
        if where == "pickle":
            (small_run / name).write_bytes(pickle.dumps(evil))
        else:
            torch.save(saved, small_run / name)
    before = content(small_run)
    line = error_line(train(SMALL, expect=2, out_dir=small_run, init_from="resume"))
    sampled = error_line(run("sample.py", f"--out_dir={small_run}", expect=2))
    assert "last.pt" in line and "ckpt.pt" in sampled
    if where != "pickle":
        assert "more than plain data" in line and "more than plain data" in sampled
    assert not (tmp_path / "ran").exists() and content(small_run) == before
    torch.load(small_run / "last.pt", weights_only=False) if where != "pickle" else pickle.loads(before["last.pt"])
    assert (tmp_path / "ran").exists()  # the bait was live


def test_a_hostile_meta_is_refused_in_one_line_and_runs_nothing(train, own_project, tmp_path):
    path = own_project / "data" / "synthetic" / "meta.pkl"
    path.write_bytes(pickle.dumps(META | {"evil": Hostile(tmp_path / "ran")}))
    line = error_line(train(SMALL, expect=2, out_dir=tmp_path / "out", project=own_project))
    assert "meta.pkl" in line and not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()  # the bait was live


# ----------------------------------------------------------------------------------------------
# the disk


def mounted(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounting a tmpfs takes Linux and root")
    mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
    yield folder
    while subprocess.run(["umount", "-l", str(folder)], capture_output=True).returncode == 0:
        pass


def fill(folder, leave):
    """A file that leaves `leave` bytes of the disk free."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError:
            pass
    os.truncate(path, path.stat().st_size - leave)
    return path


@pytest.mark.parametrize("leave", [40960, 4096, 0])
def test_a_full_disk_costs_nothing_but_time(train, whole_run, small_disk, leave):
    """Full in the midst of a checkpoint's bytes, at its first ones, and for the log too."""
    expected, expected_rows = whole_run(SMALL)
    out_dir = small_disk / "out"
    printed = train(SMALL, out_dir=out_dir, max_iters=8).losses
    before = content(out_dir)
    filler = fill(small_disk, leave)
    failed = train(SMALL, expect=1, out_dir=out_dir, init_from="resume")
    line = one_failure(failed, 1)
    assert "No space left on device" in line and str(out_dir) in line
    if leave:
        assert f"could not save {out_dir}/" in line and "earlier checkpoint there is intact" in line
    after = content(out_dir)
    assert {name: after[name] for name in ("last.pt", "ckpt.pt")} == {
        name: before[name] for name in ("last.pt", "ckpt.pt")
    }
    assert not list(out_dir.glob("*.pt.*")), "what a failed save wrote takes no room"
    filler.unlink()
    rest = train(SMALL, out_dir=out_dir, init_from="resume")
    assert set(printed + failed.losses + rest.losses) == set(expected)
    assert rows(out_dir) == expected_rows


def test_a_file_that_may_not_grow_costs_nothing_but_time(train, whole_run, small_run):
    expected, expected_rows = whole_run(SMALL)
    before = content(small_run)
    limit = dict(program="limit_file_size.py", env={"BYTES": 30000})
    failed = train(SMALL, expect=1, out_dir=small_run, init_from="resume", **limit)
    line = one_failure(failed, 1)
    assert f"could not save {small_run}/ckpt.pt: File too large" in line and "intact" in line
    after = content(small_run)
    assert (after["last.pt"], after["ckpt.pt"]) == (before["last.pt"], before["ckpt.pt"])
    rest = train(SMALL, out_dir=small_run, init_from="resume")
    assert rest.losses == expected[-len(rest.losses) :] and rows(small_run) == expected_rows


def test_a_crash_in_the_save_itself_leaves_the_earlier_checkpoint(train, small_run):
    before = content(small_run)["last.pt"]
    failed = train(SMALL, expect=1, out_dir=small_run, init_from="resume", program="crash_in_save.py")
    assert "the earlier checkpoint there is intact" in one_failure(failed, 1)
    assert content(small_run)["last.pt"] == before and not list(small_run.glob("*.tmp"))


def test_a_folder_that_turns_read_only_costs_nothing_but_time(train, whole_run, small_run):
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("root writes to any folder, and a read-only mount takes Linux and root")
    settings = SMALL | dict(eval_interval=10**6, save_interval=10**6)
    before = content(small_run)
    mounted("--bind", small_run, small_run)  # whether that can be done here
    try:
        more = dict(out_dir=small_run, init_from="resume", program="read_only_at_save.py")
        failed = train(SMALL | settings, expect=1, **more)
        line = one_failure(failed, 1)
        assert f"could not save {small_run}/last.pt: Read-only file system; the earlier checkpoint" in line
        again = train(SMALL, expect=1, out_dir=small_run, init_from="resume")
        assert f"cannot write to {small_run}: Read-only file system" in one_failure(again, 1)
        after = content(small_run)
    finally:
        while subprocess.run(["umount", "-l", str(small_run)], capture_output=True).returncode == 0:
            pass
    assert (after["last.pt"], after["ckpt.pt"]) == (before["last.pt"], before["ckpt.pt"])
    expected, _ = whole_run(SMALL)
    rest = train(SMALL, out_dir=small_run, init_from="resume")
    assert rest.losses == expected[-len(rest.losses) :]
