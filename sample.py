"""Writes text with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
    python sample.py --out_dir=out-shakespeare-char --interactive=True

Settings come from config files and --key=value arguments, later ones winning.
"""

import functools
import itertools
import sys

import torch

from configurator import configure
from data.codecs import first_prompt
from data.pretrained import Pretrained
from data.streaming import stream_text
from model import GPT
from nanogpt import device as devices
from nanogpt.cpu_kernels import pack_linear_layers
from nanogpt.decoding import cast_once, make_step, on_host
from nanogpt.errors import UserError, advise_on_memory
from nanogpt.text_file import read_text, stdin_lines

# ---- settings ----------------------------------------------------------------------------------------------------

init_from = "resume"  # resume (the model in out_dir), a gpt2 name, or the folder of a model
out_dir = "out"  # where train.py put its checkpoints
start = "\n"  # the prompt; FILE:prompt.txt reads it from a file
interactive = False  # read prompts from stdin, a line each, and continue each of them once
num_samples = 10  # texts to write; the first one appears as it is generated
max_new_tokens = 500  # tokens in each
temperature = 0.8  # 1.0: as the model predicts; below: safer, and repeats more; 0: always the most likely token
top_k = 200  # draw from this many most likely tokens only; 0: from all
top_p = 1.0  # draw from the most likely tokens only whose probabilities sum to this; 1.0: from all
stop = ""  # a text that ends a sample, and is not printed; empty: a sample has max_new_tokens
window_step = 1  # tokens the full context drops at a time; 1 is exact, more is many times faster
seed = 1337  # sample k, or the answer to prompt k, takes seed + k
device = "auto"  # cuda, cuda:N, mps or cpu
dtype = "auto"  # float32, bfloat16 or float16
compile = False  # torch.compile the model

settings = configure(globals())
settings.at_least(1, "num_samples window_step")
settings.at_least(0, "max_new_tokens temperature top_k seed")
if not 0 < top_p <= 1:
    raise UserError(f"--top_p={top_p}: must be above 0 and at most 1")
advise_on_memory("try a smaller --num_samples, or --dtype=bfloat16")
device = devices.pick_device(device)
devices.set_up(device)
dtype = devices.pick_dtype(dtype, device)
say = functools.partial(print, file=sys.stderr)
compile = devices.pick_compile(compile, device, say)

# ---- the model and its tokens ------------------------------------------------------------------------------------

torch.manual_seed(seed)
trained = Pretrained.load(GPT, init_from, out_dir)
model, codec, remarks = trained.model.eval(), trained.codec, trained.remarks
allowed = torch.tensor([codec.known(i) for i in range(model.config.vocab_size)], device=device)  # no padding ids

if start.startswith("FILE:"):
    start = read_text(start[5:], f"--start={start}")
elif "start" not in settings.given and not interactive:
    start, more_remarks = first_prompt(codec, start)
    remarks += more_remarks
for remark in remarks:
    say(remark)

cast_once(model, device, getattr(torch, dtype))
if compile:
    model.forward = torch.compile(model.forward, dynamic=True)
elif devices.packs_weights(device, dtype):
    pack_linear_layers(model)

# ---- the text ----------------------------------------------------------------------------------------------------

first_state = torch.get_rng_state()


def generator(k):
    """Sample k's own generator, so that its text does not depend on how many samples there are. On a CPU the first has
    the state that nanoGPT's has after it has built the model, and so draws the same tokens."""
    own = torch.Generator(device).manual_seed(seed + k)
    return own.set_state(first_state) if k == 0 and device == "cpu" else own


def write(text, generators):
    """Prints a sample that continues `text` for each of `generators`, the first one as it is generated."""
    ids = codec.encode(text)
    if not ids:
        raise UserError("the prompt is empty, or the tokenizer drops all of it: give at least one character")
    prompt = torch.tensor([ids], device=device).expand(len(generators), -1)  # (B, T)
    tokens = on_host(model.stream(prompt, max_new_tokens, window_step, generators, step))
    for k, rows in enumerate(itertools.tee(tokens, len(generators))):  # a row asks for tokens until its text ends
        for part in stream_text(ids, (row[k] for row in rows), codec, stop):
            print(part, end="", flush=True)
        print()
        print("-" * 15, flush=True)


with devices.autocast(device, dtype):
    batch = 1 if interactive else num_samples
    step = make_step(model, batch, temperature=temperature, top_k=top_k, top_p=top_p, allowed=allowed)
    if interactive:
        for k, line in enumerate(stdin_lines()):
            try:
                write(line, [generator(k)])
            except UserError as error:  # an unknown character, say: the next prompt may be better
                say(f"error: {error}", flush=True)
    else:
        write(start, [generator(k) for k in range(num_samples)])
