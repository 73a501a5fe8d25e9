"""Writes a trained model as a Hugging Face GPT-2 folder, which transformers and its kin load.

    python tools/export.py --out_dir=out-shakespeare-char --to=hf-shakespeare-char

The folder has config.json, generation_config.json, model.safetensors and the tokenizer. Needs: pip install safetensors
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from configurator import configure
from data.pretrained import Pretrained
from data.tokenizer import tokenizer_of
from model import GPT
from nanogpt import gpt2
from nanogpt.errors import UserError, advise_on_memory, command, require

out_dir = "out"  # where train.py put its checkpoints
to = ""  # the folder to write; it must not exist, or be empty

configure(globals())
require("tools/export.py", "safetensors")
advise_on_memory("the model takes some 8 bytes a parameter here")
if not to or os.path.exists(to) and (not os.path.isdir(to) or os.listdir(to)):
    raise UserError(f"--to={to}: takes a folder that is not there yet, or is empty")

trained = Pretrained.load(GPT, "resume", out_dir)
for remark in trained.remarks:
    print(remark)
gpt2.write_folder(to, trained.model, trained.codec, tokenizer_of(trained.codec))
print(f"wrote {to} from {trained.path}")
print(f"to sample from it: {command('sample.py', f'--init_from={to}')}")
