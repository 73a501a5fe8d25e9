"""Runs a script with an instrument attached, for tools/gpu_check.py and tools/bench.py.

    python tools/gpu_hooks.py INSTRUMENT SCRIPT ARGUMENT...

The script runs as `python SCRIPT ARGUMENT...` would. The last line is `seen: ` and what the instrument saw, as JSON.
"""

import json
import os
import runpy
import sys
import time
import warnings

import torch

POISONED = 5  # the iteration whose gradient gets a NaN
WARM_UP = 6  # iterations that compile, allocate and warm up


def device_memory():
    """The most memory that tensors have taken on the GPU, in MiB; None where no GPU was used."""

    def seen():
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        return {"device_mib": torch.cuda.max_memory_allocated() / 2**20 if used else None}

    return seen


def added_memory():
    """The most memory that a run has taken beyond what the process held before it made the model, in MiB."""
    import model
    from nanogpt.device import peak_host_bytes

    before, init = [], model.GPT.__init__

    def taken():
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        return torch.cuda.max_memory_allocated() if on_gpu else peak_host_bytes()

    def watched_init(self, config):
        before.append(taken())
        init(self, config)

    model.GPT.__init__ = watched_init
    return lambda: {"added_mib": (taken() - before[0]) / 2**20}


def graphs():
    """How many graphs torch.compile has traced, how often it had to break one, and how many ran without CUDA graphs."""
    from torch._dynamo.utils import counters

    return lambda: {
        "graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"], "device_mib": device_memory()()["device_mib"],
    }  # fmt: skip


def counted_graphs():
    """As graphs(), with a compiler that only counts: it needs no GPU, and returns each graph as it is."""
    from nanogpt import device

    real = torch.compile
    torch.compile = lambda model, **_: real(model, backend="eager")
    device.pick_compile = lambda *_: True  # it asks for the compilers that this one does not need
    return graphs()


def synchronisations(mode):
    """Watches the iterations after an unlogged one: from the end of that one to their own end.

    mode "error": torch raises where the host waits for the GPU. "warn": it warns, and this counts the warnings.
    """
    from nanogpt import mfu

    log_interval = next(int(a.partition("=")[2]) for a in sys.argv if a.startswith("--log_interval="))
    found = {"iterations": 0, "synchronisations": 0}
    watching = [False]

    def count(message, *_, **__):
        found["synchronisations"] += "synchronizing" in str(message)

    warnings.simplefilter("always")
    warnings.showwarning = count

    class WatchedClock(mfu.Clock):
        """The clock's marks are the ends of the iterations; the first comes before the loop."""

        iteration = -1

        def tick(self):
            torch.cuda.set_sync_debug_mode("default")
            super().tick()
            found["iterations"] += watching[0]
            watching[0] = self.iteration >= WARM_UP and self.iteration % log_interval != 0
            torch.cuda.set_sync_debug_mode(mode if watching[0] else "default")
            self.iteration += 1

    mfu.Clock = WatchedClock
    return lambda: found


def poisoned_gradient():
    """Puts a NaN into a gradient once, and compares all weights and moments before and after that iteration's step."""
    from nanogpt import guard

    clip, found, iteration, before = guard.clip_gradients, {}, [0], []

    def bits(optimizer):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        state = [t for p in weights for t in getattr(optimizer, "state", {}).get(p, {}).values()]
        return [t.detach().clone().view(torch.uint8 if t.dim() else t.dtype) for t in (*weights, *state)]

    def poisoning_clip(parameters, grad_clip):
        parameters = list(parameters)
        if iteration[0] == POISONED:
            parameters[0].grad.view(-1)[0] = float("nan")
        return clip(parameters, grad_clip)

    class WatchedGuard(guard.StepGuard):
        def step(self, optimizer, grad_norm):
            before[:] = bits(optimizer) if iteration[0] == POISONED else []
            super().step(optimizer, grad_norm)
            if before:
                after = bits(optimizer)
                found["tensors"] = len(after)
                found["changed"] = sum(not torch.equal(*pair) for pair in zip(before, after, strict=True))
            iteration[0] += 1

    guard.clip_gradients, guard.StepGuard = poisoning_clip, WatchedGuard
    return lambda: found


def trial(changes):
    """Changes to training that train.py does not have, because no GPU has measured them: see docs/benchmarks.md."""
    import model
    from nanogpt import cross_entropy, device, guard

    configure, optimizers = model.GPT.configure_optimizers, []

    def watched_configure(self, *arguments):
        optimizers.append(configure(self, *arguments))
        if "graphs" in changes:  # gradients that add up must not lie in a CUDA graph's memory: they exist before it
            for p in self.parameters():
                p.grad = torch.zeros_like(p)
            zero_grad = optimizers[0].zero_grad
            optimizers[0].zero_grad = lambda set_to_none: zero_grad(set_to_none=False)
        return optimizers[0]

    def clip_in_the_step(parameters, grad_clip):
        """Fused AdamW divides the gradients by its grad_scale."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        optimizers[0].grad_scale = (norm / grad_clip).clamp(min=1.0)
        return norm

    model.GPT.configure_optimizers = watched_configure
    if "graphs" in changes:
        device.compile_mode = lambda device_type, *_: "reduce-overhead" if device_type == "cuda" else None
    if "rows" in changes:
        cross_entropy.LOSS_ROWS = 6144
    if "clip" in changes:
        guard.clip_gradients = clip_in_the_step
    if "tuning" in changes:
        import torch._inductor.config

        torch._inductor.config.coordinate_descent_tuning = True
    return device_memory()


def matmul_tflops(device, dtype, products=20, size=None):
    """TFLOPS of the best of a few rounds of large products, many for each synchronisation."""
    size = size or (8192 if device.startswith("cuda") else 512)
    torch.set_float32_matmul_precision("high")
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out, best = torch.empty_like(a), 0.0
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else torch.cpu.synchronize
    for _ in range(6):
        synchronize()
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        synchronize()
        best = max(best, products * 2 * size**3 / (time.perf_counter() - start))
    return best / 1e12


def decoding_rates(device, sizes=None, tokens=200):
    """Tokens a second of a first text and of a second, by a GPT-2 124M with random weights: the GPT of this folder.

    The first one includes what is done once: choosing kernels, and recording CUDA graphs where the model has them."""
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model, rates, how = GPT(GPTConfig(**sizes or {})).to(device).eval(), [], {}
    if hasattr(model, "stream"):  # ours, prepared as in sample.py
        from nanogpt.decoding import cast_once, make_step

        cast_once(model, device, torch.bfloat16)
        how["step"] = make_step(model, 1, top_k=200)
    with torch.autocast(device.partition(":")[0], torch.bfloat16):
        for _ in range(2):
            start = time.perf_counter()
            model.generate(torch.zeros(1, 1, dtype=torch.long, device=device), tokens, top_k=200, **how).tolist()
            rates.append(tokens / (time.perf_counter() - start))
    return rates


INSTRUMENTS = {
    "memory": device_memory,
    "added_memory": added_memory,
    "graphs": graphs,
    "counted_graphs": counted_graphs,
    "sync_error": lambda: synchronisations("error"),
    "sync_count": lambda: synchronisations("warn"),
    "nan": poisoned_gradient,
}


def main():
    if sys.argv[1] == "matmul":
        print("seen: " + json.dumps({"tflops": matmul_tflops(*sys.argv[2:4])}))
        return
    if sys.argv[1] == "decoding":
        sys.path[0] = os.getcwd()
        print("seen: " + json.dumps({"tokens_per_second": decoding_rates(sys.argv[2])}))
        return
    name, _, changes = sys.argv[1].partition(":")  # trial:CHANGE+CHANGE
    script = os.path.abspath(sys.argv[2])
    sys.argv = [script, *sys.argv[3:]]
    sys.path[0] = os.path.dirname(script)
    seen = trial(changes.split("+")) if name == "trial" else INSTRUMENTS[name]()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()
        print("\nseen: " + json.dumps(seen()), flush=True)


if __name__ == "__main__":
    main()
