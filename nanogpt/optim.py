"""The optimizers: AdamW, and Muon for the matrices of the blocks.

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, as torch.optim.Muon computes it.
"""

import inspect
import math
import os

import torch

from nanogpt.device import fast_bfloat16
from nanogpt.distributed import like
from nanogpt.errors import UserError


def configure_optimizers(model, weight_decay, learning_rate, betas, device_type, optimizer="adamw"):
    """AdamW over two groups of `model`, a GPT: matrices and embeddings, with weight decay, biases and norms, without.

    Fused wherever torch has the kernel: one pass over the weights, no temporary copies. With `optimizer` "muon" Muon
    takes the matrices of the blocks, and AdamW the rest.
    """
    hidden = [p for p in model.transformer.h.parameters() if p.dim() >= 2] if optimizer == "muon" else []
    taken = {*hidden}
    rest = [p for p in model.parameters() if p not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu", "mps"))
    if optimizer == "adamw":
        return adamw
    return MuonWithAdamW(Muon(hidden, learning_rate, weight_decay, betas[0]), adamw)


class WithoutDynamo:
    """torch.optim.Optimizer's methods without their wrappers for torch.compile, whose import takes a second.

    train.py compiles the model, never an optimizer.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(WithoutDynamo, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def wide_matrices(p):
    """The matrices in p, a weight of a block or its gradient, each transposed where it has more rows than columns.

    c_attn's has three, which give q, k and v. Muon learns faster if they are orthogonalised separately: the val loss of
    config/train_shakespeare_cpu.py after 350 iterations was 0.035 lower.
    """
    matrices = p.chunk(3) if len(p) == 3 * p.size(1) else (p,)
    return [matrix.mT if len(matrix) > matrix.size(1) else matrix for matrix in matrices]


class Muon(WithoutDynamo, torch.optim.Optimizer):
    """torch.optim.Muon over wide_matrices(): the same numbers, with matrices of one shape in one batch.

    One by one, a small model's matrices keep no device busy: a batch is up to three times as fast. A CPU that is slow
    at bfloat16 computes in float32. Momentum is Nesterov's; a step has the size of AdamW's (match_rms_adamw:
    arXiv:2502.16982), so that one learning rate serves both.
    """

    def __init__(self, parameters, lr, weight_decay, momentum):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        by_shape = {}
        for p in group["params"]:
            by_shape.setdefault(wide_matrices(p)[0].shape, []).append(p)
        for (_, columns), parameters in by_shape.items():
            dtype = torch.bfloat16 if parameters[0].is_cuda or fast_bfloat16() else torch.float32
            directions = (self._direction(p, group["momentum"]).to(dtype) for p in parameters)
            updates = newton_schulz(torch.stack([matrix for d in directions for matrix in wide_matrices(d)]))
            matrices = [matrix for p in parameters for matrix in wide_matrices(p)]
            lr, scale = group["lr"], 0.2 * math.sqrt(columns)
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * scale)

    def _direction(self, p, beta):
        """Nesterov's: p's gradient, drawn towards the running mean of its gradients, this one included."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean = state["momentum_buffer"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(mean, beta)


def newton_schulz(x, steps=5):
    """x (n, rows, columns), rows <= columns, with the singular values of each matrix brought near 1 (0.7 to 1.2)."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MuonWithAdamW:
    """Two optimizers as one: Muon for the matrices of the blocks, AdamW for the rest."""

    def __init__(self, muon, adamw):
        self.parts = {"muon": muon, "adamw": adamw}

    @property
    def param_groups(self):
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self):
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}


def schedule_remark(learning_rate, warmup_iters, lr_decay_iters, max_iters, min_lr, max_seconds):
    """A line if the learning rate's decay may surprise the user, else None. UserError if it is none any more."""
    if lr_decay_iters == 0 and max_seconds:
        raise UserError("--lr_decay_iters=0 does not follow the clock any more: give the iteration at which decay ends")
    if warmup_iters >= max_iters > 0:
        return (
            f"the warm-up of {warmup_iters} iterations does not end before max_iters = {max_iters}, so the learning "
            f"rate never reaches {learning_rate}: give a smaller --warmup_iters= or a larger --max_iters="
        )
    if lr_decay_iters < max_iters:
        return (
            f"the learning rate is min_lr = {min_lr} from iteration {max(warmup_iters, lr_decay_iters)} on, to "
            f"max_iters = {max_iters}: to decay until then give --lr_decay_iters={max_iters}"
        )
    return None


def restore_optimizer(optimizer, scaler, saved, path):
    """Loads moments, step counts and loss scale from the checkpoint `saved`, read from `path`; nothing in a new run.

    Learning rate, betas, weight decay and fused stay as the settings say. UserError where the state does not fit.
    """
    if not saved:
        return
    state = saved.get("optimizer")
    if not state:
        folder = os.path.dirname(path)
        raise UserError(f"{path} has no optimizer state: start a new run from its weights by --init_from={folder}")
    parts = getattr(optimizer, "parts", {"": optimizer})
    states = state if "muon" in state else {"": state}
    if parts.keys() != states.keys():
        raise UserError(f"{path}: a resume cannot change the optimizer from adamw to muon, or from muon to adamw")
    try:
        for name, part in parts.items():
            part.load_state_dict(part.state_dict() | {"state": reshard(part, states[name]["state"])})
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit this model: {error}") from None
    if scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])


def reshard(optimizer, state):
    """An optimizer's saved `state` of full tensors, each cut to its parameter's size and sharded as the parameter is.

    torch does not check sizes. If block_size was cropped, the moments of the dropped positions are removed. ValueError
    if a size does not fit otherwise.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    result = {}
    for i, values in state.items():
        p, result[i] = parameters[i], dict(values)
        if values.keys() != names:
            raise ValueError(f"parameter {i} has {', '.join(map(str, values))}")
        for name, value in values.items():  # in the same order on all ranks, since like() is collective
            if name == "step":
                continue
            value = value[: len(p)].clone() if len(value) > len(p) else value
            if value.shape != p.shape:
                raise ValueError(f"{name} of parameter {i} is {tuple(value.shape)}, not {tuple(p.shape)}")
            result[i][name] = like(value, p)
    return result
