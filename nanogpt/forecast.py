"""A run's own forecast of its time and memory (--plan=True), and at the end the facts beside it."""

import time

import torch

from nanogpt import planning
from nanogpt.device import peak_host_bytes
from nanogpt.progress import duration


def bytes_held(device):
    """The most bytes that this process has held: on its GPU, or on the host. None if the system does not say."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_host_bytes()


class Forecast:
    """Made before the model, so that it knows what the process holds without one. Unless `wanted` it says nothing."""

    def __init__(self, wanted, device):
        self.wanted, self.device = wanted, device
        self.before = bytes_held(device) if wanted else None

    def line(self, model, config, mfu, processes, iter_num):
        """The forecast of the run from iteration `iter_num` on, with `processes` devices.

        config: {setting: value} of train.py. mfu: the run's RunningMFU, which knows the peak."""
        if not self.wanted:
            return None
        device_type = torch.device(self.device).type
        self.began, self.first_iter = time.monotonic(), iter_num
        share = planning.usual_mfu(model.config.n_embd, device_type)
        micro_steps = config["gradient_accumulation_steps"] // processes
        tokens = micro_steps * config["batch_size"] * model.config.block_size
        iteration = planning.iteration_seconds(model, tokens, mfu.peak, share, model.recompute)
        self.schedule = iteration, config["eval_interval"], config["eval_iters"] / processes, micro_steps
        sharding = config["sharding"] if processes > 1 else "one process"
        setup = planning.Setup(
            config["batch_size"], micro_steps, processes, sharding, config["recompute"], config["optimizer"],
            config["dtype"], device_type, model.config.dropout,
        )  # fmt: skip
        parameters = model.get_num_params(non_embedding=False)
        self.memory = sum(planning.memory(model.config, parameters, setup).values())
        seconds = duration(self._seconds(config["max_iters"]))
        held = f", beside {self.before / 2**20:,.0f} held before the model" if self.before is not None else ""
        memory = f"{self.memory / 2**20:,.0f} MiB at the peak of an iteration"
        return f"forecast: {seconds} at {share:.0%} MFU, by rule; {memory}{held}"

    def _seconds(self, last_iter):
        """Seconds from the first iteration of this process to `last_iter`, by the forecast."""
        iteration, eval_interval, eval_iters, micro_steps = self.schedule
        return planning.run_seconds(iteration, last_iter - self.first_iter, eval_interval, eval_iters, micro_steps)

    def compared(self, iter_num):
        """The forecast of the iterations up to `iter_num`, which is not trained any more, beside what they took."""
        if not self.wanted or iter_num == self.first_iter:
            return None
        forecast, fact = self._seconds(iter_num - 1), time.monotonic() - self.began
        line = f"forecast and fact: time {duration(forecast)} and {duration(fact)} ({fact / forecast - 1:+.0%})"
        if self.before is not None:
            held = bytes_held(self.device) - self.before
            line += f", memory {self.memory / 2**20:,.0f} and {held / 2**20:,.0f} MiB ({held / self.memory - 1:+.0%})"
        return line
