"""nanogpt/optim.py: AdamW's groups, Muon against torch's, the course of the learning rate, and resumed optimizers."""

import copy
import csv

import pytest
import torch
from conftest import RESUME, TINY, error_line, flags
from small_models import small

from nanogpt import optim
from nanogpt.optim import Muon, restore_optimizer, schedule_remark

def test_matrices_and_embeddings_decay_and_biases_and_norms_do_not():
    model = small()
    optimizer = model.configure_optimizers(0.3, 1e-3, (0.8, 0.9), "cpu")
    names = {id(p): name for name, p in model.named_parameters()}
    in_order = [names[id(p)] for p in optimizer.param_groups[0]["params"]]
    blocks = [f"h.{i}.{m}" for i in range(2) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    # the order, too, is that of nanoGPT's checkpoints, whose moments go by it
    assert in_order == [f"transformer.{name}.weight" for name in ("wte", "wpe", *blocks)]
    decays, rests = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decays | rests == set(names.values()) and not decays & rests
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.9) and group["lr"] == 1e-3 and group["fused"]


def test_with_muon_the_blocks_matrices_are_muons_and_nothing_else_is():
    model = small()
    optimizer = model.configure_optimizers(0.3, 1e-3, (0.8, 0.9), "cpu", "muon")
    names = {id(p): name for name, p in model.named_parameters()}
    found = {part: [names[id(p)] for g in o.param_groups for p in g["params"]] for part, o in optimizer.parts.items()}
    blocks = {name for name in names.values() if ".h." in name and "ln_" not in name and name.endswith("weight")}
    assert set(found["muon"]) == blocks and len(blocks) == 8
    assert sorted(found["muon"] + found["adamw"]) == sorted(names.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muons_batches_give_the_weights_of_torchs_muon(monkeypatch, dtype):
    """... where that has q's, k's and v's maps, which c_attn holds together, as three matrices."""
    # torch's computes in bfloat16 everywhere: beside float32 it is its rounding that shows, a hundredth of a step
    monkeypatch.setattr(optim, "fast_bfloat16", lambda: dtype == torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    shapes = [(48, 16), (16, 16), (64, 16), (16, 64)] * 2

    def apart(tensors):
        return [part for t in tensors for part in (t.chunk(3) if len(t) == 48 else [t])]

    ours = [torch.nn.Parameter(torch.full(shape, 0.02)) for shape in shapes]
    theirs = [torch.nn.Parameter(part.detach().clone()) for part in apart(ours)]
    settings = dict(lr=0.01, weight_decay=0.3, momentum=0.8)
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p in ours:
            p.grad = torch.randn(p.shape, generator=generator)
        for q, grad in zip(theirs, apart(p.grad for p in ours), strict=True):
            q.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = torch.cat([(q - 0.02).detach().flatten() for q in theirs]).square().mean().sqrt()
    mine, reference = (torch.cat([p.detach().flatten() for p in parameters]) for parameters in (ours, theirs))
    assert (mine - reference).square().mean().sqrt() <= (1e-6 if dtype == torch.bfloat16 else 0.02) * moved
    assert moved > 0.002
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    mine, reference = (torch.cat([s[i]["momentum_buffer"].flatten() for i in range(len(s))]) for s in states)
    assert torch.equal(mine, reference)


def test_muons_momentum_is_beta1():
    groups = small().configure_optimizers(0.3, 1e-3, (0.8, 0.9), "cpu", "muon").parts["muon"].param_groups
    assert [group["momentum"] for group in groups] == [0.8]


# ----------------------------------------------------------------------------------------------
# what is said of a learning rate that does not do what it looks like, and of a run without its optimizer's state


SCHEDULE = dict(
    learning_rate=1e-3, warmup_iters=10, lr_decay_iters=100, max_iters=100, min_lr=0.0, max_seconds=0.0
)  # fmt: skip


@pytest.mark.parametrize("change, parts", [
    ({}, None),
    (dict(lr_decay_iters=120), None),
    (dict(lr_decay_iters=99), ["min_lr = 0.0 from iteration 99 on", "--lr_decay_iters=100"]),
    (dict(lr_decay_iters=5), ["min_lr = 0.0 from iteration 10 on", "--lr_decay_iters=100"]),  # the warm-up comes first
    (dict(max_iters=5000), ["from iteration 100 on", "max_iters = 5000", "--lr_decay_iters=5000"]),
    (dict(warmup_iters=100), ["warm-up of 100 iterations does not end before max_iters = 100", "--warmup_iters="]),
    (dict(warmup_iters=2000, lr_decay_iters=50), ["warm-up of 2000", "never reaches 0.001"]),
    (dict(warmup_iters=99), None),
    (dict(max_iters=0, warmup_iters=0), None),
    (dict(max_seconds=60.0), None),
])  # fmt: skip
def test_a_schedule_that_does_not_fit_the_run_is_said(change, parts):
    remark = schedule_remark(**SCHEDULE | change)
    assert (remark is None) == (parts is None)
    assert all(part in remark for part in parts or [])


def test_a_rate_that_followed_the_clock_in_older_versions_is_one_line_that_says_what_to_do(train, tmp_path):
    out_dir = tmp_path / "out"
    line = error_line(train(TINY, out_dir=out_dir, lr_decay_iters=0, max_seconds=5, expect=2))
    assert "does not follow the clock any more: give the iteration at which decay ends" in line
    assert not out_dir.exists()
    train(TINY, out_dir=out_dir, lr_decay_iters=0, max_seconds=5, decay_lr=False, max_iters=2)  # it has no decay


def test_a_run_that_is_resumed_beyond_its_schedule_is_told_from_which_iteration_the_rate_is_min_lr(run, tmp_path):
    settings = TINY | dict(max_iters=8, lr_decay_iters=8, min_lr=0.0, out_dir=tmp_path / "out")
    first = run("train.py", *flags(settings))
    assert "min_lr" not in first.stdout
    resume = RESUME | dict(out_dir=tmp_path / "out")
    nothing_left = run("train.py", *flags(resume))
    assert "--max_iters= and --lr_decay_iters=" in nothing_left.lines[-1]
    longer = run("train.py", *flags(resume, max_iters=12))
    [said] = [line for line in longer.lines if "min_lr = 0.0" in line]
    assert "from iteration 8 on" in said and "--lr_decay_iters=12" in said
    with open(tmp_path / "out" / "log.csv") as f:
        rates = {int(row["iter"]): float(row["lr"]) for row in csv.DictReader(f)}
    assert rates[7] > 0 and {rates[n] for n in range(8, 13)} == {0.0}  # as was said
    evaluated = run("train.py", *flags(resume, eval_only=True, max_iters=20))
    assert "min_lr" not in evaluated.stdout  # which trains nothing


@pytest.mark.parametrize("state", ["none", "empty"])
def test_a_checkpoint_without_optimizer_state_is_one_line_that_names_the_way_to_use_it(run, tmp_path, state):
    run("train.py", *flags(TINY, out_dir=tmp_path / "out"))
    for path in (tmp_path / "out").glob("*.pt"):
        checkpoint = torch.load(path)
        if state == "none":
            del checkpoint["optimizer"]
        else:
            checkpoint["optimizer"] = {}
        torch.save(checkpoint, path)
    resumed = run("train.py", *flags(RESUME, out_dir=tmp_path / "out", max_iters=20), expect=2)
    line = error_line(resumed)
    assert "no optimizer state" in line and f"--init_from={tmp_path / 'out'}" in line


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resume_loads_the_state_of_older_versions_whose_muon_had_torchs_own_settings(optimizer):
    batches = torch.randint(23, (4, 2, 4, 12), generator=torch.Generator().manual_seed(0))

    def trained(steps, state=None, model=None):
        model = model or small().train()
        made = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu", optimizer)
        if state:
            restore_optimizer(made, torch.amp.GradScaler("cpu", enabled=False), {"optimizer": state}, "out/last.pt")
        for x, y in batches[steps]:
            model(x, y)[1].backward()
            made.step()
            made.zero_grad()
        return model, made.state_dict()

    whole, _ = trained(slice(4))
    half, state = trained(slice(2))
    state = copy.deepcopy(state)
    if optimizer == "muon":
        assert state["muon"]["param_groups"][0].keys() >= {"lr", "weight_decay", "momentum", "params"}
        theirs = torch.optim.Muon([torch.zeros(2, 2, requires_grad=True)], adjust_lr_fn="match_rms_adamw")
        del (settings := theirs.state_dict()["param_groups"][0])["params"]
        state["muon"]["param_groups"][0] = settings | state["muon"]["param_groups"][0]
    resumed, _ = trained(slice(2, 4), state, half)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
