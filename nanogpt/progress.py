"""How far a run is, how good its model is so far, and when it ends: at max_iters, by `patience`, or by the clock."""

import math
import time
from datetime import timedelta


def duration(seconds):
    """Such as 0:12:34, or 3 days, 4:05:06; at most the longest that timedelta can have."""
    return str(timedelta(seconds=round(min(max(0.0, seconds), timedelta.max.total_seconds() - 1))))


class Progress:
    """The counters of a run over all its resumes. Every process calls these methods; rank 0's clock decides for all.

    Public: best_val_loss, best_iter, best_bpb (bits per byte, or None), tokens_seen; rate, tokens per second between
    the last two evaluations, or None; ended_by, the setting that ended the run before max_iters, or "".
    """

    def __init__(
        self, saved, iter_num, tokens_per_iter, processes, max_iters, patience, max_seconds, now=time.monotonic
    ):  # fmt: skip
        """saved: the checkpoint that the run resumes from, or {}. now(): the clock, in seconds."""
        self.max_iters, self.patience, self.max_seconds = max_iters, patience, max_seconds
        self.tokens_per_iter, self.processes, self.now = tokens_per_iter, processes, now
        self.best_val_loss = float(saved.get("best_val_loss", math.inf))
        self.best_iter, self.best_bpb = saved.get("best_iter", iter_num), saved.get("best_bpb")
        self.tokens_seen = saved.get("tokens_seen", iter_num * tokens_per_iter)
        self.evals_since_best = saved.get("evals_since_best", 0)
        self.time_over = saved.get("time_over", 0.0)  # the max_seconds that ended the saved run
        self.seconds_before, self.began = saved.get("seconds", 0.0), now()
        self.ended_by = ""
        self.last_evaluation = None  # (iteration, time)
        self.rate = self.time_left = None

    def seconds(self):
        """How long the run has taken so far, over all its resumes."""
        return self.seconds_before + self.now() - self.began

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
        return bool(self.processes.largest(int(is_up)))

    def note_evaluation(self, losses, iter_num, time_is_up=False):
        """Takes the {split: loss} of an evaluation, and the time. Returns whether the val loss is the best so far."""
        now, last, self.time_left = self.now(), self.last_evaluation, None
        if last and iter_num > last[0] and now != last[1]:  # in this time evaluations and saves count
            per_iteration = (now - last[1]) / (iter_num - last[0])
            left = per_iteration * (self.max_iters + 1 - iter_num)
            self.rate = self.tokens_per_iter / per_iteration
            self.time_left = min(left, self.max_seconds - self.seconds()) if self.max_seconds else left
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

    def has_ended(self, iter_num):
        """Whether the run has come to its end by itself, before iteration `iter_num`."""
        return bool(self.ended_by) or iter_num > self.max_iters

    def line(self, iter_num):
        """A line such as `5% done, 14,213 tokens/s, 0:12:34 left`; the first of a process has no rate yet."""
        of_time = min(1.0, self.seconds() / self.max_seconds) if self.max_seconds else 0.0
        text = f"{max(iter_num / (self.max_iters + 1), of_time):.0%} done"
        if self.time_left is None:
            return text
        return f"{text}, {self.rate:,.0f} tokens/s, {duration(self.time_left)} left"

    def for_checkpoint(self):
        """What a checkpoint holds of this."""
        kept = ("best_val_loss", "best_iter", "best_bpb", "tokens_seen", "evals_since_best", "time_over")
        return {name: getattr(self, name) for name in kept} | {"seconds": self.seconds()}
