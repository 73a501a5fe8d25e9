"""A dataset under data/ as train.py finds it: its bins, and what the ids in them stand for."""

import math
import os

import numpy as np
import torch

from data.bins import SPLITS, check_bin, fingerprint, open_bin, open_checked
from data.codecs import bytes_of_ids
from data.folder import FACTS, bin_path, dataset_folder, read_facts
from data.tokens import Tokens
from nanogpt.errors import UserError


class Dataset:
    """The dataset data/NAME: `bins`, {split: path of its bin}, their `fingerprints`, and the Tokens in them.

    UserError where a bin is missing or shorter than `block_size` + 1, or its files are not those that dataset.json
    describes."""

    def __init__(self, name, block_size, splits=SPLITS):
        self.name, self.folder = name, dataset_folder(name)
        self.facts = read_facts(self.folder)
        self.bins = {split: bin_path(self.folder, split) for split in splits}
        self.seen, self.fingerprints = {}, {}  # of each bin: which file it is, and what is in it
        for split, path in self.bins.items():
            tokens, self.seen[split] = open_checked(path, block_size, name)
            self.fingerprints[split] = fingerprint(path)
            found = {"tokens": len(tokens), "fingerprints": self.fingerprints[split]}
            if self.facts and any(self.facts[key][split] != value for key, value in found.items()):
                raise UserError(
                    f"{path} is not the one that {FACTS} beside it describes: prepare the dataset again, or remove "
                    f"{FACTS} if another program has written the bins"
                )
        self.tokens = Tokens.of_dataset(self.folder)
        if self.facts and not self.tokens.are_gpt2s:
            if (self.tokens.codec_if_here or self.tokens).vocab_size != self.facts["vocab_size"]:
                raise UserError(f"the tokens of {name} are not those that its {FACTS} counts: prepare it again")

    @property
    def found_line(self):
        """The line on its vocabulary size; None where its tokens are GPT-2's."""
        if self.tokens.are_gpt2s:
            return None
        file = "meta.pkl" if self.tokens.meta else FACTS if self.facts else "tokenizer.json"
        return f"found vocab_size = {self.tokens.vocab_size} (inside {os.path.join('data', self.name, file)})"

    @property
    def rounded_line(self):
        """The line on a new model's vocabulary size, if it is not the dataset's own; else None."""
        own, rounded = self.tokens.vocab_size, self.tokens.model_vocab_size
        if self.tokens.are_gpt2s:
            return f"no meta.pkl beside the data: vocab_size = {rounded}, GPT-2's {own} rounded up for speed"
        if rounded != own:
            return f"the model's vocab_size = {rounded}: rounded up to a multiple of 64 for speed"
        return None

    def check_bins(self, vocab_size, expected):
        """UserError where an id is >= `vocab_size`, or the bins do not have the `expected` fingerprints: those that a
        resumed run was trained on (None: any)."""
        for path in self.bins.values():
            check_bin(path, vocab_size)
        if expected not in (None, self.fingerprints):
            raise UserError(
                f"{self.folder} is not the data this run was trained on: prepare it as it was, or start from scratch"
            )

    def open(self, split):
        """The split's tokens as open_bin() maps them. UserError if they are not those that were there at first."""
        path = self.bins[split]
        tokens, file = open_bin(path)
        if file != self.seen[split]:  # an equal copy of it will do
            if fingerprint(path) != self.fingerprints[split] or read_facts(self.folder) != self.facts:
                raise UserError(f"{path} has changed while it was read: prepare {self.name} as it was, and resume")
            self.seen[split] = file
        return tokens

    def bytes_by_id(self, vocab_size, device):
        """float32 (vocab_size,) on `device`: how many bytes of text each id stands for.

        Where an id does not tell, those of a val token on average; NaN where these are not known either."""
        codec = self.tokens.codec_if_here
        by_id = codec and bytes_of_ids(codec, vocab_size)
        if by_id is None:
            by_id = np.full(vocab_size, self.bytes_per_token("val"))
        return torch.tensor(by_id, dtype=torch.float32, device=device)

    def bytes_per_token(self, split):
        """How many bytes of text a token of the split stands for, on average; NaN without dataset.json."""
        return self.facts["bytes"][split] / self.facts["tokens"][split] if self.facts else math.nan

    def resumed_remark(self, saved, path):
        """A line if the ids of the run in `saved`, read from `path`, stand for other tokens than these; else None.

        UserError where one of the two has a tokenizer: then nothing of what the model knows is left."""
        tokens = Tokens.kept_in(saved, path)
        remark = f"the ids of {self.name} stand for other tokens now: what the model knows of them is lost"
        return self._remark(tokens, path, tokens.tokenizer or self.tokens.tokenizer, remark)

    def start_remark(self, start):
        """A line if the ids of the Pretrained `start` stand for other tokens than these, as nanoGPT allows it of a
        GPT-2; else None. UserError if it is a run, or a GPT-2 with a tokenizer of its own."""
        remark = (
            f"{self.name} has tokens of its own, {self.tokens.vocab_size}, not the {start.model.config.vocab_size} of "
            f"{start.path}: what that model knows of its tokens is lost"
        )
        return self._remark(start.tokens, start.path, start.is_run or start.tokens.tokenizer, remark)

    def _remark(self, tokens, path, refused, remark):
        """None where these may be the `tokens` of the model in `path`; else `remark`, or UserError where `refused`."""
        if tokens.same_as(self.tokens) is not False:
            return None
        if refused:
            raise UserError(
                f"the ids of the model in {path} stand for other tokens than those of {self.name}: prepare {self.name} "
                "with the tokens of that model, or train from scratch"
            )
        return remark
