"""nanogpt/guard.py: steps that are skipped, and saves that are refused.

tests/spikes.py shows what spike_sigma is worth.
"""

import csv
import itertools
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import IN_BFLOAT16, SMALL, TINY, error_line, rows
from guards import make_guard
from runs import content
from small_models import small

from model import GPT, GPTConfig
from nanogpt import checkpoint as ckpt

# long enough to fill the ring; from iteration 150 on it is harmed
SPIKED = TINY | dict(
    max_iters=170, lr_decay_iters=170, eval_interval=20, dropout=0.1, save_interval=7, init_from="auto",
    spike_sigma=6.0, grad_clip=0.0,
)  # fmt: skip
HARM = dict(INJECT="huge", AT=150, COUNT=5)


# ----------------------------------------------------------------------------------------------
# which steps are spikes


def spikes_by_hand(values, sigma):
    """Whether each of `values` (n, 2) is skipped: the rule in words, in float64."""
    ring, verdicts, in_a_row = [], [], 0
    for value in np.asarray(values, dtype=np.float64):
        last = np.array(ring[-128:])
        spike = len(ring) >= 128 and bool((value > last.mean(0) + sigma * last.std(0)).any())
        in_a_row = in_a_row + 1 if spike else 0
        if not spike or in_a_row >= 3:
            ring.append(value)
        verdicts.append(spike)
    return verdicts


def spike_guard(sigma=6.0, **more):
    """A guard that reads the flag first: SGD, which steps here, cannot skip a step by itself."""
    return make_guard(spike_sigma=sigma, optimizer="muon", **more)


def judged(guard, values):
    """What `guard` made of each (norm, loss): whether the step was skipped."""
    weight = torch.nn.Parameter(torch.zeros(1))
    verdicts = []
    for norm, loss in values:
        optim, weight.grad = torch.optim.SGD([weight], lr=1.0), torch.ones(1)
        before = weight.item()
        guard.note_loss(torch.tensor(loss, dtype=torch.float32, requires_grad=True))
        guard.step(optim, torch.tensor(norm, dtype=torch.float32))
        verdicts.append(weight.item() == before)
    return verdicts


def drawn(spikes, mean=10.0, deviation=0.01, n=400):
    """Norms and losses of so small a deviation that E[x^2] - E[x]^2 in float32 is of no use."""
    values = np.random.default_rng(0).normal(mean, deviation, (n, 2))
    for at, which, by in spikes:
        values[at, which] += by * deviation
    return values.astype(np.float32)


@pytest.mark.parametrize("spikes", [
    [], [(200, 0, 9)], [(200, 1, 9)], [(200, 0, 7), (201, 1, 7), (250, 0, 50)], [(100, 0, 1000)], [(127, 0, 99)],
    [(128, 1, 99)], [(200, 0, -50)], [(n, 0, 40) for n in range(200, 203)], [(n, 1, 40) for n in range(200, 400)],
    [(n, 0, 100 * 2.0 ** (n - 200)) for n in range(200, 220)],
])  # fmt: skip
@pytest.mark.parametrize("sigma", [4.0, 6.0])
def test_a_step_is_skipped_where_its_norm_or_loss_is_that_many_deviations_above_the_mean_of_the_last_128(spikes, sigma):
    values = drawn(spikes)
    assert judged(spike_guard(sigma), values) == spikes_by_hand(values, sigma)


def test_what_is_not_finite_is_skipped_and_stays_out_of_the_ring():
    values = drawn([])
    expected = judged(spike_guard(), values[:200])
    for bad in (math.nan, math.inf):
        mixed = np.insert(values[:200], [5, 150, 150, 150, 150], bad, axis=0)
        verdicts = judged(guard := spike_guard(), mixed)
        assert [v for v, row in zip(verdicts, mixed, strict=True) if np.isfinite(row).all()] == expected
        assert all(v for v, row in zip(verdicts, mixed, strict=True) if not np.isfinite(row).all())
        assert torch.isfinite(guard.ring).all()


def test_a_new_level_is_no_spike_for_long():
    values = drawn([(n, 1, 40) for n in range(200, 400)])
    verdicts = judged(spike_guard(), values)
    assert sum(verdicts) < 10 and all(verdicts[200:203]) and not any(verdicts[210:])


def test_the_loss_is_the_mean_over_the_micro_batches_and_the_processes():
    class Two:
        world_size = 2

        def add_up(self, values):
            values += torch.tensor([0.75, 2.0])  # the other process, divided by 2

        say = largest = None

    guard = spike_guard(processes=Two())
    for loss in (2.0, 3.0, 4.0, 3.0):
        guard.note_loss(torch.tensor(loss / 4))
    guard.step(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), torch.tensor(1.5))
    assert guard.ring[:, -1].tolist() == [1.5, 3.5] and guard.loss == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "float16"])
def test_a_spike_leaves_weights_moments_and_loss_scale_as_they_were(optimizer):
    model = small().train()
    scaler = torch.amp.GradScaler("cpu", enabled=optimizer == "float16", init_scale=64.0, growth_interval=10**6)
    optim = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu", "muon" if optimizer == "muon" else "adamw")
    guard = make_guard(spike_sigma=6.0, optimizer="muon" if optimizer == "muon" else "adamw", scaler=scaler)

    def state(part):
        if isinstance(part, torch.Tensor):
            return [part.clone()]
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        return [tensor for each in parts for tensor in state(each)]

    def step(factor):
        loss = model(*torch.randint(23, (2, 4, 12), generator=draw))[1]
        guard.note_loss(loss)
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optim)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        before = state(model.state_dict()) + state(optim.state_dict())
        guard.step(optim, norm)
        after = state(model.state_dict()) + state(optim.state_dict())
        return len(before) == len(after) and all(map(torch.equal, before, after))

    draw = torch.Generator().manual_seed(1)
    assert not any(step(1.0) for _ in range(130))
    assert [step(1000.0), step(1.0), step(1000.0), step(1.0)] == [True, False, True, False]
    assert scaler.get_scale() == (64.0 if optimizer == "float16" else 1.0)
    assert all(p.grad is None for p in model.parameters())


# ----------------------------------------------------------------------------------------------
# a run with spikes


@pytest.fixture(scope="module")
def spiked(train, tmp_path_factory):
    """(out_dir, Result) of the run that meets random tokens, and a gradient 1000 times as large, from 150 to 154."""
    out_dir = tmp_path_factory.mktemp("spiked") / "out"
    return out_dir, train(SPIKED, program="inject.py", env=HARM, out_dir=out_dir)


def test_spikes_are_said_and_skipped_and_counted(spiked):
    said = [line for line in spiked[1].lines if "steps skipped" in line]
    assert [line.split(",")[0] for line in said[:5]] == [f"iter {n}: 1 steps skipped" for n in range(150, 155)]
    assert "more than 6 standard deviations above its mean" in said[0]
    assert f"skipped steps: {len(said)}" in spiked[1].lines
    with open(spiked[0] / "log.csv", newline="") as f:
        norms = {int(row["iter"]): float(row["grad_norm"]) for row in csv.DictReader(f) if row["grad_norm"]}
    assert set(sorted(norms, key=norms.get)[-3:]) <= set(range(150, 155))  # log.csv has the norms


@pytest.mark.parametrize("stops", [[20], [149, 152, 160]])
def test_a_resume_with_spike_sigma_is_exact_to_the_digit(train, spiked, tmp_path, stops):
    for stop in stops:
        train(SPIKED, program="inject.py", env=HARM, out_dir=tmp_path, max_iters=stop)
    result = train(SPIKED, program="inject.py", env=HARM, out_dir=tmp_path)
    [count] = [line for line in spiked[1].lines if line.startswith("skipped steps: ")]
    assert rows(tmp_path) == rows(spiked[0]) and count in result.lines
    assert result.losses == spiked[1].losses[-len(result.losses) :]


def test_a_checkpoint_of_a_version_that_could_go_back_resumes(train, spiked, tmp_path):
    """Its guard has more keys. With order=epoch such a run cannot be continued: its windows were of other seeds."""
    again = dict(program="inject.py", env=HARM, out_dir=tmp_path)
    train(SPIKED, **again, max_iters=152)
    saved = torch.load(tmp_path / "last.pt")
    saved["config"] |= dict(spike_rewind=0.5, plan=False)
    saved["guard"] |= dict(exploded="", good=True, went_back=[[180, 140, 2001340]], largest_norms=[[50.0, 150]])
    torch.save(saved, tmp_path / "last.pt")
    shutil.copytree(tmp_path, tmp_path / "epoch")
    assert "--spike_rewind=0.0 does without it" in error_line(train(SPIKED, **again, expect=2))
    result = train(SPIKED, **again, spike_rewind=0.0)
    assert result.losses == spiked[1].losses[-len(result.losses) :] and result.losses[0][:2] == ("iter", 153)

    saved["config"]["order"] = "epoch"
    torch.save(saved, tmp_path / "epoch" / "last.pt")
    before = content(tmp_path / "epoch")
    line = error_line(train({}, init_from="resume", out_dir=tmp_path / "epoch", device="cpu", expect=2))
    assert "went back" in line and f"--init_from={tmp_path / 'epoch'}" in line
    assert content(tmp_path / "epoch") == before


def test_without_spike_sigma_a_checkpoint_holds_no_guard(synthetic_run):
    assert "guard" not in ckpt.load(str(synthetic_run[0] / "last.pt"))
    assert "skipped steps: 0" in synthetic_run[1].lines


@pytest.mark.parametrize("value, word", [
    (-1.0, "--spike_sigma=-1.0: must be at least 0"), ("six", "spike_sigma takes a finite number"),
])  # fmt: skip
def test_a_bad_spike_sigma_is_one_line_and_writes_nothing(train, tmp_path, value, word):
    assert word in error_line(train(TINY, spike_sigma=value, out_dir=tmp_path / "out", expect=2))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------
# numbers that are not finite


def poison(path):
    """Puts a NaN into a weight of the checkpoint at `path`."""
    saved = torch.load(path)
    saved["model"]["transformer.h.0.mlp.c_fc.weight"][3, 5] = math.nan
    ckpt.save(saved, str(path))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("max_nonfinite", [3, 10])
def test_nan_in_the_weights_stops_the_run_and_overwrites_nothing(train, tmp_path, optimizer, max_nonfinite):
    out_dir = tmp_path / "out"
    settings = SMALL | dict(optimizer=optimizer, max_nonfinite=max_nonfinite)
    train(settings, out_dir=out_dir, max_iters=8)
    poison(out_dir / "last.pt")
    before = content(out_dir)
    failed = train(settings, expect=2, out_dir=out_dir, init_from="resume", max_iters=100, eval_interval=5)
    line = error_line(failed)
    assert line.startswith(f"iteration {9 + max_nonfinite - 1}: ") and f"{max_nonfinite} times in a row" in line
    for advice in ("--learning_rate", "--grad_clip", "bfloat16 or float32", str(out_dir)):
        assert advice in line
    iters = [found for found in failed.losses if found[0] == "iter"]
    assert [found[1] for found in iters] == list(range(9, 9 + max_nonfinite - 1))
    assert all(found[2] == "nan" for found in iters)
    for n in range(9, 9 + max_nonfinite):
        assert f"iter {n}: 1 steps skipped, their gradients were not finite" in failed.lines
    assert f"saving checkpoint to {out_dir}" not in failed.lines
    after = content(out_dir)
    assert (after["last.pt"], after["ckpt.pt"]) == (before["last.pt"], before["ckpt.pt"])


def test_nan_at_a_known_iteration_names_the_last_good_checkpoint(train, tmp_path):
    """The weights are spoilt in memory after iteration 6's step; last.pt is then iteration 6's."""
    spoilt = dict(program="spoil_weights.py", env={"STEP": 7})
    failed = train(SMALL, expect=2, out_dir=tmp_path, max_iters=100, max_nonfinite=4, **spoilt)
    line = error_line(failed)
    assert line.startswith("iteration 10: ") and f"the last good checkpoint is iteration 6's in {tmp_path}" in line
    assert ckpt.load(str(tmp_path / "last.pt"))["iter_num"] == 6
    best = ckpt.load(str(tmp_path / "ckpt.pt"))
    assert best["iter_num"] == 4 and all(torch.isfinite(w).all() for w in best["model"].values())


@pytest.mark.parametrize("dtype, lr, save_interval", [("float32", 50.0, 3), pytest.param("bfloat16", 1e4, 3, marks=IN_BFLOAT16)])
def test_a_learning_rate_that_diverges_for_real_stops_and_leaves_weights_that_work(
    train, tmp_path, dtype, lr, save_interval
):
    settings = SMALL | dict(dtype=dtype, save_interval=save_interval, max_nonfinite=5)
    train(settings, out_dir=tmp_path, max_iters=8)
    settings |= dict(learning_rate=lr, decay_lr=False, grad_clip=0.0, max_iters=400, eval_interval=50)
    line = error_line(train(settings, expect=2, out_dir=tmp_path, init_from="resume"))
    stopped, kept = map(int, re.match(r"iteration (\d+): .* is iteration (\d+)'s", line).groups())
    assert 9 <= kept < stopped - 3 and ckpt.load(str(tmp_path / "last.pt"))["iter_num"] == kept
    # Going on from there, the next iteration's loss is a number: what was kept is no garbage.
    rest = train(settings, expect=2, out_dir=tmp_path, init_from="resume")
    assert rest.losses[0][:2] == ("iter", kept) and math.isfinite(float(rest.losses[0][2]))


def test_a_val_loss_of_nan_writes_no_checkpoint(train, tmp_path):
    """With evaluations that see NaN where training does not."""
    result = train(SMALL, out_dir=tmp_path, always_save_checkpoint=True, program="nan_in_evaluations.py")
    assert ("step", 4, "nan", "nan") in result.losses
    assert not (tmp_path / "ckpt.pt").exists() and not (tmp_path / "last.pt").exists()
    assert "saving checkpoint" not in result.stdout
    assert "last.pt is not written: the loss, its gradient or a weight is not finite" in result.lines


def test_a_single_bad_step_is_skipped_and_the_run_goes_on(train, tmp_path):
    """The gradient of iteration 5 is infinite. Nothing but that step is missing."""
    result = train(SMALL, out_dir=tmp_path, program="infinite_gradient.py", env={"NTH": 6})
    assert "iter 5: 1 steps skipped, their gradients were not finite" in result.lines
    assert result.stdout.count("steps skipped") == 1 and len(result.losses) == 17 + 5
    last = ckpt.load(str(tmp_path / "last.pt"))
    assert last["iter_num"] == 17 and last["optimizer"]["state"][0]["step"] == 16
    assert all(torch.isfinite(w).all() for w in last["model"].values())


def test_a_skipped_step_leaves_weights_count_and_moments_as_they_were():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16, bias=True))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")

    def state():
        moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        return [t.clone() for t in [*model.state_dict().values(), *moments]]

    def step(bad):
        model(torch.randint(11, (2, 8)), torch.randint(11, (2, 8)))[1].backward()
        if bad:
            model.transformer.ln_f.weight.grad[3] = bad
        optimizer.found_inf = torch.tensor(float(bool(bad)))
        optimizer.step()
        optimizer.zero_grad()

    step(None)
    before = state()
    assert len(before) == len(model.state_dict()) + 3 * len(list(model.parameters()))
    for bad in (math.nan, math.inf, -math.inf):
        step(bad)
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    step(None)
    after = state()
    assert all(torch.isfinite(t).all() for t in after)
    assert not any(torch.equal(a, b) for a, b in itertools.islice(zip(before, after, strict=True), 3))



# ----------------------------------------------------------------------------------------------
# which saves are refused


def losses_of(train=1.0, val=1.0):
    return {"train": train, "val": val, "val_bpb": None}


def saves(guard, model=None, losses=None):
    return guard.allows_save("last.pt", model or small(), losses or {})


def test_a_save_needs_finite_losses_of_the_last_evaluation(capsys):
    assert saves(make_guard()) and saves(make_guard(), losses=losses_of()) and capsys.readouterr().out == ""
    for bad in (losses_of(val=math.nan), losses_of(train=math.inf)):
        assert not saves(make_guard(), losses=bad)
        assert capsys.readouterr().out == "last.pt is not written: the loss, its gradient or a weight is not finite\n"


def test_a_save_needs_finite_gradients_in_the_last_iteration():
    guard, weight = make_guard(optimizer="muon"), torch.nn.Parameter(torch.zeros(1))
    for norm, allowed in ((1.0, True), (math.nan, False), (math.inf, False), (2.0, True)):
        weight.grad = torch.ones(1)
        guard.step(torch.optim.SGD([weight]), torch.tensor(norm))
        assert saves(guard) == allowed
    # float16's loss scaler meets infinite gradients now and then: that is how it finds its scale
    guard = make_guard(scaler=torch.amp.GradScaler("cpu", enabled=True))
    guard.nonfinite_in_a_row += 1
    assert saves(guard)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_save_needs_finite_weights(bad):
    for name in ("transformer.wte.weight", "transformer.h.1.mlp.c_proj.weight", "transformer.ln_f.bias"):
        model = small()
        model.get_parameter(name).data.view(-1)[-1] = bad
        assert not saves(make_guard(), model)


def test_one_process_that_objects_keeps_all_from_saving():
    said = []

    def processes(*others):
        return SimpleNamespace(largest=lambda mine: max((mine, *others)), say=said.append, world_size=2)

    assert saves(make_guard(processes=processes(0))) and not said
    assert not saves(make_guard(processes=processes(1))) and len(said) == 1


def test_a_run_whose_weights_alone_are_spoilt_keeps_its_older_checkpoint(train, tmp_path):
    """After the last step: no gradient and no evaluation has seen the NaN. The resume goes on from before it."""
    train(SMALL, out_dir=tmp_path, max_iters=7, program="spoil_weights.py", env={"STEP": 8})
    assert ckpt.load(str(tmp_path / "last.pt"))["iter_num"] == 6
    assert not list(tmp_path.glob("*.tmp"))


def test_a_rate_at_which_weights_are_huge_and_finite_leaves_no_bad_checkpoint(train, tmp_path):
    """One step at 1e25 leaves weights of 1e25, at which no gradient is finite."""
    train(SMALL, out_dir=tmp_path, max_iters=8)
    before = content(tmp_path)
    settings = SMALL | dict(learning_rate=1e25, decay_lr=False, max_iters=100, eval_interval=1000)
    failed = train(settings, out_dir=tmp_path, init_from="resume", expect=2)
    assert "10 times in a row; the last good checkpoint is iteration 9's" in error_line(failed)
    assert "last.pt is not written" in failed.stdout
    after = content(tmp_path)
    assert (after["last.pt"], after["ckpt.pt"]) == (before["last.pt"], before["ckpt.pt"])
