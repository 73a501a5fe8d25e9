"""python train_large_vocabulary.py: one compiled training iteration; prints its numbers, and what torch's cache saw."""

import json

import script  # noqa: F401
import torch
from torch._dynamo.utils import counters

from model import GPT, GPTConfig
from nanogpt import device as devices

compile = devices.pick_compile(True, "cpu", print)
torch.manual_seed(0)
model = GPT(GPTConfig(16, 9000, 1, 2, 32, 0.0, False))
model.loss_only = True
x = torch.randint(9000, (4, 16))
loss = (torch.compile(model) if compile else model)(x, x)[1]
loss.backward()
numbers = [loss.item(), *(p.grad.double().norm().item() for p in model.parameters())]
print(json.dumps({"compile": compile, "numbers": numbers, "cache": counters["aot_autograd"]}))
