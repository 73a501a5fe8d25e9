"""Times a small GPT by the calls that nanoGPT's bench.py makes, in its order. It is run in the project's folder."""

import time

import script  # noqa: F401
import torch

batch_size = 4
block_size = 16
bias = False
seed = 1337
device = "cpu"
compile = False
exec(open("configurator.py").read())  # there this reads --key=value; here it must do no harm

from model import GPT, GPTConfig

torch.manual_seed(seed)
x, y = torch.randint(61, (2, batch_size, block_size), device=device)
model = GPT(GPTConfig(block_size=block_size, vocab_size=61, n_layer=1, n_head=2, n_embd=16, dropout=0, bias=bias))
model.to(device)
optimizer = model.configure_optimizers(weight_decay=1e-2, learning_rate=1e-4, betas=(0.9, 0.95), device_type=device)
num_steps = 3
t0 = time.time()
for k in range(num_steps):
    logits, loss = model(x, y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    print(f"{k}/{num_steps} loss: {loss.item():.4f}")
dt = time.time() - t0
mfu = model.estimate_mfu(batch_size * 1 * num_steps, dt)
print(f"time per iteration: {dt / num_steps * 1000:.4f}ms, MFU: {mfu * 100:.2f}%")
