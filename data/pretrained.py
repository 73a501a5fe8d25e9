"""A trained model, and what its ids stand for: what --init_from means to train.py, sample.py and the tools."""

import os
from dataclasses import dataclass

from data.folder import dataset_folder
from data.tokens import Tokens
from nanogpt import checkpoint as ckpt
from nanogpt.errors import UserError


@dataclass
class Pretrained:
    """A GPT with the weights of a run or of a GPT-2."""

    model: object
    tokens: Tokens
    path: str  # the checkpoint, or the GPT-2's name or folder
    is_run: bool
    dataset: str  # that the run was trained on
    remarks: list  # lines for the user

    @classmethod
    def load(cls, GPT, init_from, out_dir="", dropout=0.0):
        """What `init_from` says: "resume" (the run in `out_dir`), a run's folder, a gpt2 name, or a GPT-2's folder.

        GPT: model.py's class. UserError where there is no such model, or it is damaged."""
        if init_from == "resume" or ckpt.has_run(init_from):
            checkpoint, path, remarks = ckpt.load_model_file(out_dir if init_from == "resume" else init_from)
            dataset = str(checkpoint["config"].get("dataset", ""))
            folder = dataset_folder(dataset)
            model, tokens = GPT.from_checkpoint(checkpoint, path, dropout), Tokens.of_run(checkpoint, path, folder)
            if tokens.prepared_again(folder):
                remarks.append(f"{folder} has other tokens than the run was trained on: using those in {path}")
            return cls(model, tokens, path, True, dataset, remarks)
        if not init_from.startswith("gpt2") and not os.path.isdir(init_from):
            takes = "takes resume, a gpt2 name or a model's folder; train.py also scratch and auto"
            raise UserError(f"--init_from={init_from}: {takes}")
        model = GPT.from_pretrained(init_from, {"dropout": dropout})
        tokens = Tokens.of_gpt2(init_from, model.config.vocab_size)
        return cls(model, tokens, init_from, False, "", [])

    @property
    def title(self):
        return f"the model in {self.path}" if self.is_run else f"GPT-2 weights: {self.path}"

    @property
    def codec(self):
        """The codec of its tokens; UserError where there is none, or the model has fewer ids than it."""
        codec, n_ids = self.tokens.codec, self.model.config.vocab_size
        if codec.vocab_size > n_ids:
            raise UserError(f"{self.path} has {n_ids} token ids, fewer than the {codec.vocab_size} of its tokens")
        return codec
