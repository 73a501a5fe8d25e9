"""How far a run is, how good its model is so far, when it ends (at max_iters, by `patience`, by the clock), and how."""

import math
import time
from datetime import timedelta

from nanogpt.checkpoint import has_run, newest
from nanogpt.device import peak_memory
from nanogpt.errors import command


def duration(seconds):
    """Such as 0:12:34, or 3 days, 4:05:06; at most the longest that timedelta can have."""
    return str(timedelta(seconds=round(min(max(0.0, seconds), timedelta.max.total_seconds() - 1))))


class Progress:
    """The counters of a run over all its resumes. Every process calls these methods; rank 0's clock decides for all.

    Public: best_val_loss, best_iter, best_bpb (bits per byte, or None), tokens_seen; rate, tokens per second between
    the last two evaluations, or None; ended_by, the setting that ended the run before max_iters, or "".
    """

    def __init__(self, saved, iter_num, tokens_per_iter, processes, max_iters, patience, max_seconds,
                 now=time.monotonic):  # fmt: skip
        """saved: the checkpoint that the run resumes from, or {}. now(): the clock, in seconds."""
        self.max_iters, self.patience, self.max_seconds = max_iters, patience, max_seconds
        self.tokens_per_iter, self.processes, self.now = tokens_per_iter, processes, now
        self.best_val_loss = float(saved.get("best_val_loss", math.inf))
        self.best_iter, self.best_bpb = saved.get("best_iter", iter_num), saved.get("best_bpb")
        self.tokens_seen = saved.get("tokens_seen", iter_num * tokens_per_iter)
        self.evals_since_best = saved.get("evals_since_best", 0)
        self.time_over = saved.get("time_over", 0.0)  # the max_seconds that ended the saved run
        self.began = now() - saved.get("seconds", 0.0)  # what passed between the processes of the run does not count
        self.ended_by, self.rate = "", None
        self.last_evaluation = None  # (iteration, time)

    def seconds(self):
        """How long the run has taken so far, over all its resumes."""
        return self.now() - self.began

    def nothing_left(self, iter_num):
        """Whether a resume at `iter_num` has nothing to do; says why."""
        if iter_num > self.max_iters:
            end, larger = f"reached max_iters = {self.max_iters}", "--max_iters= and --lr_decay_iters="
        elif 0 < self.patience <= self.evals_since_best:
            end, larger = f"ended by patience = {self.patience}", "--patience="
        elif 0 < self.max_seconds <= self.time_over:
            end, larger = f"ended by max_seconds = {self.max_seconds:g}", "--max_seconds="
        else:
            return False
        self.processes.say(f"the run has {end}: to train on, give a larger {larger}")
        return True

    def time_is_up(self):
        """Whether max_seconds are over, on rank 0's clock: then the run makes its last evaluation, and ends."""
        if not self.max_seconds:
            return False
        is_up = self.processes.rank == 0 and self.seconds() >= self.max_seconds
        return bool(self.processes.largest(is_up))

    def note_evaluation(self, losses, iter_num, time_is_up=False):
        """Takes the {split: loss} of an evaluation, and the time. Returns whether the val loss is the best so far."""
        now = self.now()
        if self.last_evaluation and now > self.last_evaluation[1]:  # a coarse clock may stand still
            iteration, then = self.last_evaluation
            # evaluations and saves count in this time
            self.rate = self.tokens_per_iter * (iter_num - iteration) / (now - then)
        self.last_evaluation = iter_num, now
        better = losses["val"] < self.best_val_loss
        if better:
            self.best_val_loss, self.best_iter, self.best_bpb = losses["val"], iter_num, losses.get("val_bpb")
        self.evals_since_best = 0 if better else self.evals_since_best + 1
        if 0 < self.patience <= self.evals_since_best:
            self.ended_by = f"patience = {self.patience}"
        if time_is_up:
            self.ended_by, self.time_over = f"max_seconds = {self.max_seconds:g}", self.max_seconds
        return better

    def line(self, iter_num):
        """A line such as `5% done, 14,213 tokens/s, 0:12:34 left`; the first of a process has no rate yet."""
        of_time = min(1.0, self.seconds() / self.max_seconds) if self.max_seconds else 0.0
        text = f"{max(iter_num / (self.max_iters + 1), of_time):.0%} done"
        if self.rate is None:
            return text
        left = (self.max_iters + 1 - iter_num) * self.tokens_per_iter / self.rate
        if self.max_seconds:
            left = min(left, self.max_seconds - self.seconds())
        return f"{text}, {self.rate:,.0f} tokens/s, {duration(left)} left"

    def last_lines(self, iter_num, out_dir, device):
        """The last lines of a run, some of them None: how it ended before iteration `iter_num`, what to type next."""
        if not self.ended_by and iter_num <= self.max_iters:
            resume = command("train.py", "--init_from=resume", f"--out_dir={out_dir}")
            to_type = f"; type: {resume}" if has_run(out_dir) else ""
            return [f"stopped at iteration {iter_num}; the checkpoint to go on from is {newest(out_dir)}{to_type}"]
        best = f"best val loss {self.best_val_loss:.4f} at iteration {self.best_iter}"
        best += f", {self.best_bpb:.4f} bits per byte" if self.best_bpb is not None else ""
        return [
            f"ended by {self.ended_by} at iteration {iter_num}" if self.ended_by else None,
            f"{best if math.isfinite(self.best_val_loss) else 'no val loss yet'}, "
            f"{self.tokens_seen:,} tokens seen, {duration(self.seconds())} in all, at most {peak_memory(device)}",
            f"to see what it writes: {command('sample.py', f'--out_dir={out_dir}')}",
            f"to see the curves: {command('tools/plot.py', out_dir)}",
        ]

    def for_checkpoint(self):
        """What a checkpoint holds of this."""
        kept = ("best_val_loss", "best_iter", "best_bpb", "tokens_seen", "evals_since_best", "time_over")
        return {name: getattr(self, name) for name in kept} | {"seconds": self.seconds()}
