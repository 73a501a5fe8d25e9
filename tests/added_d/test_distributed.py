"""Which library the processes talk by; and an evaluation of a model that is split over them."""

import pytest
import torch.distributed as dist
from conftest import TINY, flags
from test_distributed import ranks  # noqa: F401

from nanogpt.distributed import pick_backend
from nanogpt.errors import UserError


@pytest.mark.parametrize("built_in", [True, False])
def test_auto_is_nccl_on_cuda_where_torch_has_it(monkeypatch, built_in):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: built_in)
    for world_size in (1, 2):
        assert pick_backend("auto", "cuda:3", world_size) == ("nccl" if built_in else "gloo")
        assert pick_backend("auto", "cpu", world_size) == pick_backend("auto", "mps", world_size) == "gloo"
        assert pick_backend("gloo", "cuda", world_size) == "gloo"
    assert pick_backend("nccl", "cuda", 2) == "nccl"  # torch itself says what is wrong with it


def test_a_backend_does_not_matter_to_a_single_process():
    for device in ("cpu", "mps"):
        assert pick_backend("nccl", device, 1) == "gloo"
        with pytest.raises(UserError, match=f"--backend=nccl works on CUDA devices only, and this run is on {device}"):
            pick_backend("nccl", device, 2)
    for wrong in ("tcp", "", True, 1):
        for world_size in (1, 2):
            with pytest.raises(UserError, match=f"--backend={wrong}: takes auto, nccl, gloo or mpi"):
                pick_backend(wrong, "cpu", world_size)


@pytest.mark.parametrize("backend", ["nccl", "mpi"])
def test_nanogpts_backend_trains_in_a_single_process_on_a_cpu(run, tmp_path, backend):
    config = tmp_path / "config.py"
    config.write_text(f"backend = '{backend}'\n")
    done = run("train.py", config, *flags(TINY, out_dir=tmp_path / "out", max_iters=2))
    assert "iter 2: loss" in done.stdout and done.stderr == ""


def test_a_sharded_model_with_a_large_vocabulary_evaluates_as_a_replicated_one(ranks, own_project, tmp_path):  # noqa: F811
    (own_project / "data" / "synthetic" / "meta.pkl").unlink()  # vocab_size is 50304 then
    settings = TINY | dict(gradient_accumulation_steps=2, max_iters=2, eval_interval=1, eval_iters=2)
    printed = []
    for sharding in ("ddp", "fsdp"):
        settings |= dict(sharding=sharding, out_dir=tmp_path / sharding)
        first, second = (r.end() for r in ranks(2, *flags(settings), project=own_project))
        assert first.returncode == second.returncode == 0, first.stderr + second.stderr
        printed.append([line for line in first.losses if line[0] == "step"])
    assert printed[0] == printed[1] and len(printed[0]) == 3
