"""What keeps a run from blowing up: steps that are skipped, and the decision to go back to good.pt.

A step whose gradient is not finite is always skipped. With spike_sigma, so is one whose gradient norm or loss is an
outlier (as in llm.c: a z-score over the last 128). With spike_rewind, a run whose loss has exploded goes back.
"""

import math

import torch

from nanogpt.checkpoint import newest
from nanogpt.errors import UserError, command
from nanogpt.run_log import logged_norms

RING = 128  # the norms and losses that a new one is compared with
NEW_LEVEL = 3  # from this skip in a row on, skipped values count in the ring: a new level is no spike
GOOD = 0.1  # good.pt has an evaluation whose val loss is at most this above the best
MOST_REWINDS = 2
ADVICE = (
    "try a lower --learning_rate, a longer --warmup_iters, --grad_clip=1.0, --beta2=0.95, or --dtype=float32 "
    "(docs/exploding_loss.md)"
)


class StepGuard:
    """Judges each step and each evaluation. Every process calls these methods, and all come to the same verdicts.

    Fused AdamW can skip a step on the device, without a host sync. Other optimizers must read the flag first. With
    float16 the GradScaler also skips a step now and then, to find its scale.

    Public: exploded, why the run has to go back ("" if it need not); good, whether the weights are those of an
    evaluation worth going back to; went_back, a [from iteration, to iteration, seed] for each time.
    """

    def __init__(self, config, processes, scaler, saved):
        """config: {setting: value} of train.py. saved: the checkpoint that the run resumes from, or {}."""
        self.config, self.processes, self.scaler = config, processes, scaler
        self.sigma, self.rewind = config["spike_sigma"], config["spike_rewind"]
        if self.rewind and config["eval_interval"] > config["max_iters"]:
            raise UserError(
                f"--spike_rewind={self.rewind:g} needs evaluations, and --eval_interval={config['eval_interval']} is "
                f"above max_iters = {config['max_iters']}: give a smaller one"
            )
        self.device = config["device"]
        self.skips_on_device = config["optimizer"] == "adamw" and config["sharding"] == "ddp"
        self.reads_are_free = torch.device(self.device).type == "cpu"
        self.nonfinite_in_a_row, self.skipped_in_a_row, self.new_nonfinite, self.new_spikes = (
            torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(4)
        )
        self.ring = torch.full((2, RING), math.nan, device=self.device)  # norms and losses, the oldest first
        self.loss = 0.0  # this iteration's, summed over the micro-steps
        self.norms = LargestNorms(self.device)
        self.skipped, self.exploded, self.good, self.went_back = 0, "", False, []
        self.evaluation_is_finite = True
        self.known_from = 0 if "guard" in saved else saved.get("iter_num", 0)  # of earlier norms log.csv has some
        if "guard" in saved:
            self._restore(saved["guard"])
            self.skipped, self.went_back = saved["guard"]["skipped"], saved["guard"]["went_back"]
            self.norms.largest = [tuple(pair) for pair in saved["guard"]["largest_norms"]]

    @property
    def batch_seed(self):
        """What the batches are drawn from: the setting `seed`, or the one of the last time that the run went back."""
        return self.went_back[-1][2] if self.went_back else self.config["seed"]

    # ---- steps

    def note_loss(self, loss):
        """Takes the loss of a micro-batch, divided by the number of micro-steps."""
        if self.sigma:
            self.loss = self.loss + loss.detach()

    def step(self, optim, grad_norm, iter_num):
        """Steps `optim`, through the loss scaler, unless `grad_norm` is not finite or this step is a spike.

        Then frees the gradients."""
        self.norms.note(grad_norm, iter_num)
        nonfinite = skip = ~torch.isfinite(grad_norm)
        if self.sigma:
            nonfinite, spike = self._judge(grad_norm)
            skip = nonfinite | spike
        if self.scaler.is_enabled():  # it skips what is not finite by itself
            stepping = not (self.sigma and spike)
        else:
            stepping = self.skips_on_device or not skip
            if self.skips_on_device:
                optim.found_inf = skip.float()
        if stepping:
            self.scaler.step(optim)
        self.scaler.update()
        optim.zero_grad(set_to_none=True)
        self.nonfinite_in_a_row = (self.nonfinite_in_a_row + 1) * nonfinite
        self.new_nonfinite += nonfinite
        self.good = False

    def _judge(self, grad_norm):
        """(not finite, a spike), flags on the device, of the norm and the mean loss over micro-batches and ranks."""
        values = torch.stack((grad_norm.to(self.device), self.loss))
        if self.processes.world_size > 1:
            values = values / self.processes.world_size
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
        """Says how many steps were skipped since the last report, and notes when too many were in a row.

        UserError then if they were not finite, unless the run can go back. On a GPU this runs only on `logged`
        iterations, because reading the counts waits for the GPU."""
        if not (logged or self.reads_are_free):
            return
        if count := int(self.new_nonfinite):
            self.processes.say(f"iter {iter_num}: {count} steps skipped, their gradients were not finite")
            self.new_nonfinite.zero_()
            self.skipped += count
        if self.sigma and (count := int(self.new_spikes)):
            self.processes.say(
                f"iter {iter_num}: {count} steps skipped, their gradient norm or loss was more than {self.sigma:g} "
                "standard deviations above its mean"
            )
            self.new_spikes.zero_()
            self.skipped += count
        nonfinite = int(self.nonfinite_in_a_row)
        in_a_row = int(self.skipped_in_a_row) if self.sigma else nonfinite
        if self.rewind and in_a_row >= self.config["max_nonfinite"]:
            self.exploded = f"{in_a_row} steps in a row were skipped"
        elif nonfinite >= self.config["max_nonfinite"]:
            raise UserError(
                f"iteration {iter_num}: the loss or its gradient was not finite {nonfinite} times in "
                f"a row; the last good checkpoint is {newest(self.config['out_dir'])}; "
                "try a lower --learning_rate, --grad_clip=1.0, or --dtype=bfloat16 or float32"
            )

    # ---- evaluations and saves

    def note_evaluation(self, losses, best_val_loss):
        """Takes the {split: loss} of an evaluation, and the best val loss before it. Returns whether to save ckpt.pt.

        With spike_rewind this decides whether the run goes back, and whether it may come back to here."""
        self.evaluation_is_finite = math.isfinite(losses["train"]) and math.isfinite(losses["val"])
        val = losses["val"]
        if self.rewind and not (self.evaluation_is_finite and val <= best_val_loss + self.rewind):
            self.exploded = f"val loss {val:.4f} is more than {self.rewind:g} above the best, {best_val_loss:.4f}"
        self.good = bool(self.rewind) and not self.exploded and val <= best_val_loss + GOOD
        return self.evaluation_is_finite and not self.exploded

    def allows_save(self, name, model, point, autocast):
        """Whether the last gradients, the last evaluation and the next loss are finite at a resume `point`.

        Says so if not. All processes agree. If this iteration was evaluated, that counts as the next loss. Otherwise
        this computes it, without torch.compile and without dropout: a save must not compile, or change a random
        generator."""
        finite = self.evaluation_is_finite and (not int(self.nonfinite_in_a_row) or self.scaler.is_enabled())
        if finite and not point["evaluated"]:
            model.eval()
            with torch.no_grad(), autocast:
                finite = bool(torch.isfinite(model(*point["batch"])[1]))
            model.train()
        if not self.processes.all_agree(finite):
            self.processes.say(f"{name} is not written: the loss or its gradient is not finite")
            return False
        return True

    def for_checkpoint(self):
        """What a checkpoint holds of this: nothing unless spike_sigma or spike_rewind is on."""
        if not (self.sigma or self.rewind or self.went_back):
            return {}
        state = {
            "ring": self.ring.cpu(), "nonfinite_in_a_row": int(self.nonfinite_in_a_row),
            "skipped_in_a_row": int(self.skipped_in_a_row), "new_nonfinite": int(self.new_nonfinite),
            "new_spikes": int(self.new_spikes), "exploded": self.exploded, "good": self.good,
            "skipped": self.skipped, "went_back": self.went_back, "largest_norms": self.norms.three(),
        }  # fmt: skip
        return {"guard": state}

    def _restore(self, state):
        """Takes up the part of for_checkpoint()'s state that steps and evaluations depend on."""
        if state["ring"].shape != self.ring.shape:
            raise UserError(f"the checkpoint's ring of norms and losses is {tuple(state['ring'].shape)}")
        self.ring = state["ring"].to(self.device)
        for name in ("nonfinite_in_a_row", "skipped_in_a_row", "new_nonfinite", "new_spikes"):
            getattr(self, name).fill_(state[name])
        self.exploded, self.good = (state["exploded"], state["good"]) if self.rewind else ("", False)
        self.evaluation_is_finite = True

    # ---- going back, and what is said afterwards

    def go_back(self, iter_num, saved):
        """Takes up the state in good.pt, the checkpoint `saved` ({} if there is none). Returns the batches' new seed.

        It follows from the setting `seed` and from how often the run has gone back, so the run can be repeated.
        UserError if there is nothing to go back to, or if the run has gone back twice already."""
        why = f"iteration {iter_num}: {self.exploded}"
        if not saved:
            raise UserError(f"{why}, and there is no good.pt of this data to go back to; {ADVICE}")
        good = saved["iter_num"]
        if len(self.went_back) == MOST_REWINDS:
            resume = command("train.py", "--init_from=resume", f"--out_dir={self.config['out_dir']}")
            raise UserError(
                f"{why}, and the run has gone back twice already; {ADVICE}; "
                f"a resume starts at iteration {good}: {resume}"
            )
        seed = self.config["seed"] + 2_000_003 * (len(self.went_back) + 1)  # process r takes seed + r
        self.processes.say(f"{why}: going back to iteration {good}; the batches from there come from seed {seed}")
        self._restore(saved["guard"])
        self.went_back = [*self.went_back, [iter_num, good, seed]]
        return seed

    def summary(self):
        """The line on the whole run: its largest gradient norms, skipped steps, and how often it has gone back.

        If spike_sigma and spike_rewind are off, a checkpoint holds none of this. Then norms from before a resume are
        those that log.csv has, and skipped steps are those of this process."""
        skipped = self.skipped + int(self.new_nonfinite) + int(self.new_spikes)
        three = largest_three(self.norms.three() + logged_norms(self.config["out_dir"]))
        norms = ", ".join(f"{norm:.4g} at iteration {n}" for norm, n in three)
        which = f" (before iteration {self.known_from}: of those in log.csv)" if self.known_from else ""
        return (
            f"largest gradient norms{which}: {norms or 'none'}; skipped steps: {skipped}, "
            f"gone back: {len(self.went_back)}"
        )


class LargestNorms:
    """The three largest finite gradient norms of all iterations. Noting one costs no work on the device and no sync."""

    def __init__(self, device):
        self.device, self.largest, self.recent = device, [], []
        self.folded = None  # (norms, iterations), three each, on the device

    def note(self, norm, iter_num):
        if self.recent and (len(self.recent) == 256 or iter_num != self.recent[-1][1] + 1):  # it may have gone back
            self._fold()
        self.recent.append((norm.detach(), iter_num))

    def _fold(self):
        """Reduces the recent norms to three, on the device. An iteration number comes from where its norm stands."""
        norms = torch.stack([norm for norm, _ in self.recent]).to(self.device)
        first = self.recent[0][1]
        iterations = torch.arange(first, first + len(norms), device=self.device)
        norms = torch.where(torch.isfinite(norms), norms, -1.0)
        if self.folded:
            norms, iterations = torch.cat((self.folded[0], norms)), torch.cat((self.folded[1], iterations))
        norms, where = norms.topk(min(3, len(norms)))
        self.folded, self.recent = (norms, iterations[where]), []

    def three(self):
        """[(norm, iteration)], the largest first."""
        if self.recent:
            self._fold()
        if self.folded:
            norms, iterations = (numbers.tolist() for numbers in self.folded)
            self.largest = largest_three(self.largest + list(zip(norms, iterations, strict=True)))
            self.folded = None
        return self.largest


def largest_three(norms):
    """The three largest of `norms`, each (norm, iteration), the largest first, none of them twice."""
    return sorted({pair for pair in norms if 0 <= pair[0] < math.inf}, reverse=True)[:3]
