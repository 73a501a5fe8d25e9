"""A stand-in for a CUDA graph, for tests on a CPU: a function's operations, recorded once and replayed.

As in a capture, each number of the host, slice and address is fixed; nothing is computed while it records; an operation
that draws random numbers or that the host waits for is refused; and memory is the graph's own. Graphs of one pool write
over one another's memory, and nothing of it is left once a graph is deleted.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = ("random", "exponential", "multinomial", "bernoulli", "uniform", "normal_", "_local_scalar_dense", "is_nonzero")


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor):
    return tensor.untyped_storage()


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.own, self.before = [], {}, {}  # storages by address: made here; of others, and what they held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(name in str(function) for name in REFUSED):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        for storage in map(storage_of, tensors((args, kwargs))):
            if storage.data_ptr() not in self.own | self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()
        outputs = function(*args, **kwargs)
        for storage in map(storage_of, tensors(outputs)):
            if storage.data_ptr() not in self.before:
                self.own[storage.data_ptr()] = storage
        self.calls.append((function, args, kwargs, outputs))
        return outputs


def spoil(storages):
    """NaN in each float, -1 in each whole number."""
    for storage in storages:
        storage.fill_(255)


class RecordedGraph:
    def __init__(self, function, pool):
        with Recorder() as recorder:
            self.outputs = function()
        for storage, held in recorder.before.values():
            storage.copy_(held)
        self.calls, self.memory, self.replays = recorder.calls, list(recorder.own.values()), 0
        self.reads = set(recorder.before)  # the addresses of others' memory
        spoil(self.memory)
        self.shared = [] if pool is None else pool
        self.shared.append(self.memory)
        weakref.finalize(self, spoil, self.memory)

    def pool(self):
        return self.shared

    def replay(self):
        self.replays += 1
        for memory in self.shared:
            spoil(memory)
        for function, args, kwargs, outputs in self.calls:
            for old, new in zip(tensors(outputs), tensors(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
