"""Optimizers in versions of torch that lack Muon, or the wrappers around an optimizer's methods."""

import importlib.util
import inspect

import pytest
import torch
from conftest import ROOT

from model import GPT, GPTConfig
from nanogpt import optim


def loaded_again():
    """nanogpt/optim.py as a torch gives it that lacks what the test has taken away."""
    specification = importlib.util.spec_from_file_location("optim_again", ROOT / "nanogpt" / "optim.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def trained(module, optimizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50, 2, 2, 16, 0.0, True))
    made = module.make_optimizer(model, 0.1, 1e-2, (0.9, 0.95), "cpu", optimizer)
    for _ in range(3):
        x, y = torch.randint(50, (2, 4, 8))
        model(x, y)[1].backward()
        made.step()
        made.zero_grad()
    made.load_state_dict(made.state_dict())
    return torch.cat([p.detach().flatten() for p in model.parameters()]), made.state_dict()


def test_muon_needs_none_of_torchs(monkeypatch):
    weights, state = trained(optim, "muon")
    reference = torch.optim.Muon([torch.nn.Parameter(torch.zeros(2, 2))], adjust_lr_fn="match_rms_adamw")
    group, theirs = state["muon"]["param_groups"][0], reference.state_dict()["param_groups"][0]
    given = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "params": group["params"]}
    assert group == theirs | given  # checkpoints stay what they were
    monkeypatch.delattr(torch.optim, "Muon")
    assert torch.equal(trained(loaded_again(), "muon")[0], weights)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimizer_whose_methods_have_no_wrappers_gives_the_same_weights(monkeypatch, optimizer):
    weights, _ = trained(optim, optimizer)
    for owner, names in (
        (torch.optim.Optimizer, ("add_param_group", "zero_grad", "state_dict", "load_state_dict")),
        (torch.optim.AdamW, ("step",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    assert torch.equal(trained(loaded_again(), optimizer)[0], weights)
