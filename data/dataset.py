"""A dataset under data/ as train.py finds it: its bins, and what the ids in them stand for."""

import functools
import os

from data.bins import SPLITS, check_bin, check_size
from data.folder import FACTS, bin_path, bytes_per_token, check_described, read_facts, tokens_in
from data.tokens import GPT2_VOCAB_SIZE, bytes_of_ids, gpt2_is_cached
from data.vocabulary import codec_of_tokens, has_codec, has_tokens, kept, kept_of_gpt2, same_tokens
from nanogpt.bits_per_byte import TextBytes
from nanogpt.errors import ROOT, UserError

PADDED_GPT2_VOCAB_SIZE = 50304  # of a new model
ROUNDED_ABOVE = 8192  # a smaller vocabulary is not worth the padding


class Dataset:
    """The dataset data/NAME as train.py finds it; UserError where it cannot be trained on with that `block_size`."""

    def __init__(self, name, block_size):
        self.name, self.folder = name, os.path.join(ROOT, "data", name)
        self.facts = read_facts(self.folder)
        self.bins = {split: bin_path(self.folder, split, self.facts) for split in SPLITS}
        for path in self.bins.values():
            check_size(path, block_size, name)
        self.meta, self.tokenizer = tokens_in(self.folder, self.facts)
        # how many ids its tokens have, and how many a new model for it has
        self.own_vocab_size, self.vocab_size = _vocab_sizes(self.folder, self.facts, self.meta, self.tokenizer)

    @property
    def found_line(self):
        """The line on its vocabulary size; None where its tokens are GPT-2's."""
        if not self.meta and not self.tokenizer:
            return None
        file = "meta.pkl" if self.meta else FACTS if self.facts else "tokenizer.json"
        return f"found vocab_size = {self.own_vocab_size} (inside {os.path.join('data', self.name, file)})"

    @property
    def rounded_line(self):
        """The line on a new model's vocabulary size, if it is not the dataset's own; else None."""
        if not self.meta and not self.tokenizer:
            size = f"{PADDED_GPT2_VOCAB_SIZE}, GPT-2's {GPT2_VOCAB_SIZE} rounded up for speed"
            return f"no meta.pkl beside the data: vocab_size = {size}"
        if self.vocab_size != self.own_vocab_size:
            return f"the model's vocab_size = {self.vocab_size}: rounded up to a multiple of 64 for speed"
        return None

    def check_bins(self, block_size, vocab_size, expected):
        """{split: fingerprint} of the bins. UserError where an id is >= `vocab_size`, or the bins are not those that
        dataset.json describes, or not the `expected` ones, which a resumed run was trained on (None: any)."""
        found = {split: check_bin(path, block_size, vocab_size, self.name) for split, path in self.bins.items()}
        for split, path in self.bins.items() if self.facts else ():
            check_described(path, split, self.facts)
        if self.facts and self.facts["vocab_size"] != self._size_of_codec():
            raise UserError(f"the tokens of {self.name} are not those that its {FACTS} counts: prepare it again")
        if expected not in (None, found):
            raise UserError(
                f"{self.folder} is not the data this run was trained on: prepare it as it was, or start from scratch"
            )
        return found

    def _size_of_codec(self):
        """How many ids its meta.pkl or tokenizer.json has; what dataset.json says where that is not known."""
        if self.meta:
            return self.meta["vocab_size"]
        try:
            return self.codec.vocab_size if self.tokenizer else self.facts["vocab_size"]
        except UserError:  # tokenizers is not installed, and training does not need it
            return self.facts["vocab_size"]

    def kept(self):
        """What a checkpoint keeps of its tokens: the keys meta (characters; None: GPT-2's) or tokenizer (its text)."""
        return kept(self.meta, self.tokenizer)

    def text_bytes(self, vocab_size, device):
        """The TextBytes of its ids, for a model of `vocab_size` ids on `device`.

        GPT-2's are counted by id only if tiktoken need not fetch its vocabulary: training needs no network."""
        fetches = not self.meta and not self.tokenizer and not gpt2_is_cached()
        try:
            by_id = None if fetches else bytes_of_ids(self.codec, vocab_size)
        except UserError:  # a meta.pkl without characters, say, or tokenizers is not installed
            by_id = None
        return TextBytes(by_id, bytes_per_token(self.facts, "val"), device)

    @functools.cached_property
    def codec(self):
        """What turns its text into ids and back."""
        return codec_of_tokens(self.meta, self.tokenizer, self.folder)

    def resumed_remark(self, saved, path):
        """A line if the ids of the run in `saved`, read from `path`, stand for other tokens than these; else None.

        UserError where one of the two has a tokenizer: then nothing of what the model knows is left."""
        if not has_tokens(saved) or same_tokens(saved, self.kept()):
            return None
        if saved.get("tokenizer") or self.tokenizer:
            raise UserError(_other_tokens(path, self.name))
        return f"the ids of {self.name} stand for other tokens now: what the model knows of them is lost"

    def check_model(self, checkpoint, path):
        """UserError if the ids of the model in `checkpoint`, read from `path`, stand for other tokens than these.

        A checkpoint that does not keep its tokens, such as nanoGPT's, may have any."""
        if has_codec(checkpoint, path) and not same_tokens(checkpoint, self.kept()):
            raise UserError(_other_tokens(path, self.name))

    def gpt2_remark(self, init_from, vocab_size):
        """A line if its tokens are not those of the GPT-2 in `init_from`, which has `vocab_size` ids; else None.

        UserError if that is a folder with a tokenizer.json of its own, and the dataset has other tokens."""
        theirs = kept_of_gpt2(init_from, vocab_size)
        if theirs and has_codec(self.kept(), self.folder):
            same = same_tokens(theirs, self.kept())
        else:  # they may be the same if the sizes are: at most rounded up
            same = self.own_vocab_size <= vocab_size < self.own_vocab_size + 64
        if same:
            return None
        if theirs and theirs.get("tokenizer"):
            raise UserError(_other_tokens(init_from, self.name))
        return (
            f"{self.name} has tokens of its own, {self.own_vocab_size}, not the {vocab_size} of {init_from}: what that "
            "model knows of its tokens is lost"
        )


def _other_tokens(path, name):
    return (
        f"the ids of the model in {path} stand for other tokens than those of {name}: prepare {name} with "
        "the tokens of that model, or train from scratch"
    )


def new_vocab_size(folder):
    """How many ids a new model for the dataset in `folder` has; GPT-2's where there is no dataset."""
    facts = read_facts(folder)
    return _vocab_sizes(folder, facts, *tokens_in(folder, facts))[1]


def _vocab_sizes(folder, facts, meta, tokenizer):
    """(how many ids the dataset's tokens have, how many a new model for it has)."""
    if meta:
        return meta["vocab_size"], meta["vocab_size"]
    if not tokenizer:
        return GPT2_VOCAB_SIZE, PADDED_GPT2_VOCAB_SIZE
    size = facts["vocab_size"] if facts else codec_of_tokens(None, tokenizer, folder).vocab_size
    return size, size if size <= ROUNDED_ABOVE else -(-size // 64) * 64
