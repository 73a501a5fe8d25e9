"""Writes text with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3

Settings come from config files and --key=value arguments, later ones winning.
"""

import os
import sys

import torch

import checkpoint as ckpt
from configurator import ROOT, UserError, at_least, configure, pick_compile, pick_device, pick_dtype
from data.tokens import codec_for, read_meta

# ----------------------------------------------------------------------------------------------
# settings

init_from = "resume"  # resume (a model from out_dir) or a gpt2 name
out_dir = "out"  # where train.py put its checkpoints
start = "\n"  # the prompt; FILE:prompt.txt reads it from a file
num_samples = 10  # texts to write
max_new_tokens = 500  # tokens in each
temperature = 0.8  # 1.0: as the model predicts; below: bolder; 0: always the most likely token
top_k = 200  # draw from this many most likely tokens only
window_step = 1  # tokens the full context drops at a time; 1 is exact, more is many times faster
seed = 1337  # sample k takes seed + k
device = "auto"  # cuda, cuda:N, mps or cpu
dtype = "auto"  # float32, bfloat16 or float16
compile = False  # torch.compile the model

configure(globals())
at_least(1, globals(), "num_samples top_k window_step")
at_least(0, globals(), "max_new_tokens temperature seed")
device = pick_device(device)
dtype = pick_dtype(dtype, device)

# ----------------------------------------------------------------------------------------------
# the model and its tokens

if init_from.startswith("gpt2"):
    raise UserError(f"--init_from={init_from}: GPT-2's weights cannot be loaded yet")
if init_from != "resume":
    raise UserError(f"--init_from={init_from}: takes resume or a gpt2 name")
checkpoint, path, remarks = ckpt.load_model_file(out_dir)
for remark in remarks:
    print(remark, file=sys.stderr)
torch.manual_seed(seed)
model = ckpt.build_model(checkpoint, path).eval()
meta_path = os.path.join(ROOT, "data", str(checkpoint["config"].get("dataset")), "meta.pkl")
if os.path.exists(meta_path):
    codec = codec_for(read_meta(meta_path), meta_path)
else:  # the data may be gone, or never have been here
    codec = codec_for(checkpoint.get("meta"), path)
V = model.config.vocab_size
if codec.vocab_size > V:
    raise UserError(f"{path} has {V} token ids, fewer than the {codec.vocab_size} of its dataset's codec")
known = torch.tensor([codec.known(i) for i in range(V)], device=device)  # not the ids that pad a vocabulary

if start.startswith("FILE:"):
    try:
        with open(start[5:], encoding="utf-8") as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--start={start}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None
if not start:
    raise UserError("the prompt is empty: give at least one character with --start=")
prompt = torch.tensor([codec.encode(start)], device=device)  # (1, T)

# ----------------------------------------------------------------------------------------------
# the text

torch.set_float32_matmul_precision("high" if device.startswith("cuda") else "highest")
for parameter in model.parameters():  # matrices once, here, rather than by autocast for every token
    parameter.data = parameter.data.to(device, getattr(torch, dtype) if parameter.dim() >= 2 else torch.float32)
if pick_compile(compile, device):
    model.forward = torch.compile(model.forward, dynamic=True)
# One generator a sample, so that none hangs on how many there are. The first stands where nanoGPT's does
# after it has built the model, which on a CPU draws from the same numbers.
generators = [torch.Generator(device).manual_seed(seed + k) for k in range(num_samples)]
if device == "cpu":
    generators[0].set_state(torch.get_rng_state())
with torch.amp.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32"):
    texts = model.generate(
        prompt.expand(num_samples, -1), max_new_tokens, temperature, top_k,
        window_step=window_step, generators=generators, known=known,
    )  # fmt: skip
for ids in texts.tolist():
    print(codec.decode(ids))
    print("-" * 15)
