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
    the last two evaluations, and time_left, seconds (both None while they are not known); ended_by, the setting that
    ended the run before max_iters, or ""; by_clock, whether the learning rate follows the clock, and share_of_time, how
    much of that decay has passed, from 0 to 1.
    """

    def __init__(self, saved, iter_num, config, tokens_per_iter, folder, now=time.monotonic):
        """saved: the checkpoint that the run resumes from, or {}. config: {setting: value} of train.py.

        folder: the RunFolder, which times its saves. now(): the clock, in seconds."""
        self.max_iters, self.eval_interval = config["max_iters"], config["eval_interval"]
        self.save_interval = config["save_interval"] or self.eval_interval
        self.patience, self.max_seconds = config["patience"], config["max_seconds"]
        self.tokens_per_iter, self.folder, self.now = tokens_per_iter, folder, now
        self.best_val_loss = float(saved.get("best_val_loss", math.inf))
        self.best_iter, self.best_bpb = saved.get("best_iter", iter_num), saved.get("best_bpb")
        self.tokens_seen = saved.get("tokens_seen", iter_num * tokens_per_iter)
        self.evals_since_best = saved.get("evals_since_best", 0)
        self.time_over = saved.get("time_over", 0.0)  # the max_seconds that ended the saved run
        self.seconds_before, self.began = saved.get("seconds", 0.0), now()
        self.by_clock = bool(config["decay_lr"] and config["lr_decay_iters"] == 0 and self.max_seconds)
        self.share_of_time = min(1.0, self.seconds_before / self.max_seconds) if self.max_seconds else 0.0
        self.ended_by = ""
        self.time_is_up = False
        self.hurry = False  # whether the time left is too short for an evaluation before the last one
        self.evaluations = []  # seconds of each in this process
        self.last_check = self.last_busy = None
        self.last_evaluation = None  # (iteration, time)
        self.rate = self.time_left = None

    def seconds(self):
        """How long the run has taken so far, over all its resumes."""
        return self.seconds_before + self.now() - self.began

    def nothing_left(self, iter_num):
        """Why a resume at `iter_num` has nothing to do, as a line for the user; "" if it has something to do."""
        more = "to train on, give a larger"
        if iter_num > self.max_iters:
            return f"the run has reached max_iters = {self.max_iters}: {more} --max_iters= and --lr_decay_iters="
        if 0 < self.patience <= self.evals_since_best:
            return f"the run has ended by patience = {self.patience}: {more} --patience="
        if 0 < self.max_seconds <= self.time_over:
            return f"the run has ended by max_seconds = {self.max_seconds:g}: {more} --max_seconds="
        return ""

    def read_clock(self):
        """With max_seconds, agrees with the other processes on how much of it is left. Call it once an iteration.

        Time is up when the rest is needed for an evaluation, two saves (ckpt.pt and last.pt) and an iteration like the
        last; before that the run is in a hurry, if there is time for no other evaluation."""
        if not self.max_seconds:
            return
        seconds, busy = self.seconds(), sum(self.evaluations) + self.folder.seconds_saving
        iteration = seconds - self.last_check - (busy - self.last_busy) if self.last_check is not None else 0.0
        self.last_check, self.last_busy = seconds, busy
        # the first evaluation of a process may compile the model: it counts only while it is the only one
        evaluation, save = max(self.evaluations[1:] or self.evaluations, default=0.0), self.folder.longest_save
        reserve = evaluation + 2 * save
        share = min(1.0, seconds / max(1e-9, self.max_seconds - reserve))
        left = self.max_seconds - reserve - iteration - seconds
        # one exchange for all three, so that all processes stop, and set the learning rate, alike
        own = 3 * int(share * 1e9) + (left <= evaluation + save) + (left <= 0)
        agreed = self.folder.processes.largest(own * (self.folder.processes.rank == 0))
        self.share_of_time, self.hurry, self.time_is_up = agreed // 3 / 1e9, agreed % 3 >= 1, agreed % 3 == 2

    def evaluates_at(self, iter_num):
        """Whether iteration `iter_num` begins with an evaluation: every eval_interval of them, and when time is up."""
        return self.time_is_up or (iter_num % self.eval_interval == 0 and not self.hurry)

    def saves_at(self, iter_num):
        """Whether last.pt is due at iteration `iter_num`. In a hurry it is not: the end of the run saves it."""
        return iter_num % self.save_interval == 0 and not self.hurry

    def note_evaluation(self, losses, iter_num):
        """Takes the {split: loss} of an evaluation, and the time. Returns whether the val loss is the best so far."""
        if self.max_seconds:
            self.evaluations.append(self.seconds() - self.last_check)
        self._note_time(iter_num)
        better = losses["val"] < self.best_val_loss
        if better:
            self.best_val_loss, self.best_iter, self.best_bpb = losses["val"], iter_num, losses.get("val_bpb")
        self.evals_since_best = 0 if better else self.evals_since_best + 1
        if 0 < self.patience <= self.evals_since_best:
            self.ended_by = f"patience = {self.patience}"
        if self.time_is_up:
            self.ended_by, self.time_over = f"max_seconds = {self.max_seconds:g}", self.max_seconds
        return better

    def _note_time(self, iter_num):
        """Sets rate and time_left, in which evaluations and saves count, by the time since the last evaluation."""
        now, last, self.time_left = self.now(), self.last_evaluation, None
        if last and iter_num > last[0] and now != last[1]:
            per_iteration = (now - last[1]) / (iter_num - last[0])
            left = per_iteration * (self.max_iters + 1 - iter_num)
            self.rate = self.tokens_per_iter / per_iteration
            self.time_left = min(left, self.max_seconds - self.seconds()) if self.max_seconds else left
        self.last_evaluation = iter_num, now

    def go_back(self, saved):
        """Takes up the counters of good.pt, the checkpoint `saved`. The time that was lost stays counted."""
        self.best_val_loss, self.best_iter = float(saved["best_val_loss"]), saved["best_iter"]
        self.best_bpb = saved.get("best_bpb")
        self.tokens_seen, self.evals_since_best = saved["tokens_seen"], saved["evals_since_best"]
        self.ended_by, self.last_evaluation = "", None

    def has_ended(self, iter_num):
        """Whether the run has come to its end by itself, before iteration `iter_num`."""
        return bool(self.ended_by) or iter_num > self.max_iters

    def line(self, iter_num):
        """A line such as `5% done, 14,213 tokens/s, 0:12:34 left`; the first of a process has no rate yet."""
        text = f"{max(iter_num / (self.max_iters + 1), self.share_of_time):.0%} done"
        if self.time_left is None:
            return text
        return f"{text}, {self.rate:,.0f} tokens/s, {duration(self.time_left)} left"

    def for_checkpoint(self):
        """What a checkpoint holds of this."""
        return {
            "best_val_loss": self.best_val_loss, "best_iter": self.best_iter, "best_bpb": self.best_bpb,
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds(), "evals_since_best": self.evals_since_best, "time_over": self.time_over,
        }  # fmt: skip
