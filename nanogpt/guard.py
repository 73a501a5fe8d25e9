"""The optimizer's step: the gradients are clipped, and a bad step is skipped.

A step whose gradient is not finite is always skipped. With spike_sigma, so is one whose gradient norm or loss is an
outlier (as in llm.c: a z-score over the last 128).
"""

import math

import torch

from nanogpt.checkpoint import GUARD_COUNTS, newest
from nanogpt.distributed import full_state
from nanogpt.errors import UserError

RING = 128  # the norms and losses that a new one is compared with
NEW_LEVEL = 3  # from this skip in a row on, skipped values count in the ring: a new level is no spike


def clip_gradients(parameters, grad_clip):
    """Scales the gradients so that their norm is at most `grad_clip` (0: leaves them). Returns the norm before that."""
    parameters = list(parameters)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm)
    return full_state(grad_norm)


class StepGuard:
    """Judges each step, and each save. Every process calls these methods, and all come to the same verdicts.

    Fused AdamW can skip a step on the device, without a host sync. Other optimizers must read the flag first. With
    float16 the GradScaler also skips a step now and then, to find its scale."""

    def __init__(self, saved, processes, scaler, device, optimizer, sharding, spike_sigma, max_nonfinite, out_dir):
        """saved: the checkpoint that the run resumes from, or {}. Others: see train.py."""
        self.processes, self.scaler, self.device, self.out_dir = processes, scaler, device, out_dir
        self.sigma, self.max_nonfinite = spike_sigma, max_nonfinite
        self.skips_on_device = optimizer == "adamw" and sharding == "ddp"
        self.reads_are_free = torch.device(device).type == "cpu"
        state = saved.get("guard", {})
        for name in GUARD_COUNTS:  # each a tensor on the device; `skipped` has what report() has said
            setattr(self, name, torch.tensor(state.get(name, 0), device=device))
        # norms and losses, the oldest first
        self.ring = state.get("ring", torch.full((2, RING), math.nan)).to(device)
        if self.ring.shape != (2, RING):
            raise UserError(f"the checkpoint's ring of norms and losses is {tuple(self.ring.shape)}")
        self.loss = 0.0  # this iteration's, summed over the micro-steps

    def note_loss(self, loss):
        """Takes the loss of a micro-batch, divided by the number of micro-steps."""
        if self.sigma:
            self.loss = self.loss + loss.detach()

    def step(self, optim, grad_norm):
        """Steps `optim`, through the loss scaler, unless `grad_norm` is not finite or this step is a spike.

        Then frees the gradients."""
        nonfinite, spike = self._judge(grad_norm) if self.sigma else (~torch.isfinite(grad_norm), False)
        if self.scaler.is_enabled():  # it skips what is not finite by itself
            skip = spike
        elif self.skips_on_device:
            skip, optim.found_inf = False, (nonfinite | spike).float()  # its kernel leaves the step out
        else:
            skip = nonfinite | spike
        if not skip:
            self.scaler.step(optim)
        self.scaler.update()
        optim.zero_grad(set_to_none=True)
        self.nonfinite_in_a_row = (self.nonfinite_in_a_row + 1) * nonfinite
        self.new_nonfinite += nonfinite

    def _judge(self, grad_norm):
        """(not finite, a spike), flags on the device, of the norm and the mean loss over micro-batches and ranks."""
        values = torch.stack((grad_norm.to(self.device), self.loss)) / self.processes.world_size
        self.processes.add_up(values)  # every process sees the same bits
        self.loss = 0.0
        variance, mean = torch.var_mean(self.ring, dim=1, correction=0)  # not E[x^2] - E[x]^2, which cancels
        finite = torch.isfinite(values).all()
        # while the ring is not full its mean is NaN, and nothing is above that
        spike = finite & (values > torch.add(mean, variance.sqrt(), alpha=self.sigma)).any()
        nonfinite = ~finite
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * (spike | nonfinite)
        self.new_spikes += spike
        enters = finite & ((self.skipped_in_a_row == 0) | (self.skipped_in_a_row >= NEW_LEVEL))
        self.ring = torch.where(enters, torch.cat((self.ring[:, 1:], values[:, None]), dim=1), self.ring)
        return nonfinite, spike

    def report(self, iter_num, logged):
        """Says how many steps were skipped since the last report. UserError if too many in a row were not finite.

        On a GPU this runs only on `logged` iterations, because reading the counts waits for the GPU."""
        if not (logged or self.reads_are_free):
            return
        above = f"gradient norm or loss was more than {self.sigma:g} standard deviations above its mean"
        counts = torch.stack((self.new_nonfinite, self.new_spikes, self.nonfinite_in_a_row)).tolist()
        for n, why in ((counts[0], "gradients were not finite"), (counts[1], above)):
            if n:
                self.processes.say(f"iter {iter_num}: {n} steps skipped, their {why}")
        self.skipped += counts[0] + counts[1]
        self.new_nonfinite.zero_()
        self.new_spikes.zero_()
        if counts[2] >= self.max_nonfinite:
            raise UserError(
                f"iteration {iter_num}: the loss or its gradient was not finite {counts[2]} times in "
                f"a row; the last good checkpoint is {newest(self.out_dir)}; "
                "try a lower --learning_rate, --grad_clip=1.0, or --dtype=bfloat16 or float32"
            )

    def allows_save(self, name, model, losses):
        """Whether the last gradients, the weights of `model` and the last evaluation's `losses` ({} before) are finite.

        Says so if not. All processes agree, each for its own share of the weights."""
        finite = self.scaler.is_enabled() or not self.nonfinite_in_a_row
        finite = finite and all(math.isfinite(loss) for loss in losses.values() if loss is not None)
        own = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
        finite = finite and torch.stack([torch.isfinite(p).all() for p in own]).all()
        if self.processes.largest(not finite):
            self.processes.say(f"{name} is not written: the loss, its gradient or a weight is not finite")
            return False
        return True

    def for_checkpoint(self):
        """What a checkpoint holds of this: nothing unless spike_sigma is on."""
        if not self.sigma:
            return {}
        return {"guard": {"ring": self.ring.cpu()} | {name: int(getattr(self, name)) for name in GUARD_COUNTS}}

    def summary(self):
        """The line on the whole run; if spike_sigma is off, on this process since it was started."""
        return f"skipped steps: {int(self.skipped + self.new_nonfinite + self.new_spikes)}"
