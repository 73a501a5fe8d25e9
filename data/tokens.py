"""What ids stand for: those of a dataset, of a run, of a GPT-2; and whether two are the same."""

import functools
import os
from pathlib import Path

from data.codecs import GPT2_VOCAB_SIZE, BPECodec, CharCodec, gpt2_is_cached
from data.folder import read_facts, tokens_path
from data.meta import check_meta, read_meta
from data.tokenizer import codec_of_tokenizer, same_tokenizer
from nanogpt.errors import UserError
from nanogpt.text_file import read_text

ROUNDED_ABOVE = 8192  # a smaller vocabulary is not worth the padding


class Tokens:
    """What ids stand for: the characters in `meta` (the content of a meta.pkl), the tokens of `tokenizer` (the text of
    a tokenizer.json), or, without both, GPT-2's tokens. They are not known where `meta` has nothing but a vocab_size.

    `where` is the file that says so, for errors."""

    def __init__(self, meta=None, tokenizer=None, where="GPT-2's tokens"):
        self.meta, self.tokenizer, self.where = meta, tokenizer, where

    @classmethod
    def of_dataset(cls, folder):
        """Those of the dataset in `folder`; GPT-2's if there is none. UserError where its files are damaged."""
        facts = read_facts(folder)
        path = tokens_path(folder, facts)
        if not path:
            return cls()
        if path.endswith("meta.pkl"):
            return cls(read_meta(path), where=path)
        tokens = cls(tokenizer=read_text(path), where=path)
        if facts:  # this needs no codec, whose library may not be installed where nothing but training is done
            tokens.vocab_size = facts["vocab_size"]
        return tokens

    @classmethod
    def kept_in(cls, checkpoint, path):
        """Those that `checkpoint`, read from `path`, keeps. nanoGPT's have nothing but their number."""
        if checkpoint.get("tokenizer"):
            return cls(tokenizer=checkpoint["tokenizer"], where=f"the tokenizer in {path}")
        if "meta" not in checkpoint:
            return cls({"vocab_size": checkpoint["model_args"].get("vocab_size")}, where=path)
        return cls(checkpoint["meta"] and check_meta(checkpoint["meta"], path), where=path)

    @classmethod
    def of_run(cls, checkpoint, path, folder):
        """Those that the run in `checkpoint`, read from `path`, keeps: its dataset may have been prepared again from
        another text. Where it keeps none, those of its dataset's `folder` as it is now; without it GPT-2's."""
        kept = cls.kept_in(checkpoint, path)
        if kept.known:
            return kept
        now = cls.of_dataset(folder)
        return kept if now.are_gpt2s and kept.vocab_size < GPT2_VOCAB_SIZE else now

    @classmethod
    def of_gpt2(cls, name_or_path, vocab_size):
        """Those of a GPT-2 with `vocab_size` ids: of the tokenizer.json in its folder, or else GPT-2's own."""
        path = os.path.join(name_or_path, "tokenizer.json")
        if not os.path.isfile(path):
            return cls(None if vocab_size >= GPT2_VOCAB_SIZE else {"vocab_size": vocab_size}, where=name_or_path)
        tokens = cls(tokenizer=read_text(path), where=path)
        codec = tokens.codec_if_here
        if codec and not codec.tokenizer:  # the file of GPT-2's tokens, or of characters
            return cls(codec.meta, where=path)
        return tokens

    def kept(self):
        """What a checkpoint keeps, so that a model can be used without its dataset; a meta of None: GPT-2's tokens."""
        return {"tokenizer": self.tokenizer} if self.tokenizer else {"meta": self.meta}

    @property
    def are_gpt2s(self):
        return self.meta is None and self.tokenizer is None

    @property
    def known(self):
        """Whether it is known what each id stands for, and not only how many there are."""
        return self.meta is None or "stoi" in self.meta

    @functools.cached_property
    def vocab_size(self):
        if self.tokenizer is not None:
            return self.codec.vocab_size
        return self.meta["vocab_size"] if self.meta else GPT2_VOCAB_SIZE

    @property
    def model_vocab_size(self):
        """How many ids a new model has: a large vocabulary is rounded up to a multiple of 64, for speed."""
        return self.vocab_size if self.meta or self.vocab_size <= ROUNDED_ABOVE else -(-self.vocab_size // 64) * 64

    @functools.cached_property
    def codec(self):
        """What turns text into ids and back; UserError where there is none."""
        if self.tokenizer is not None:
            return codec_of_tokenizer(self.tokenizer, self.where)
        return CharCodec(self.meta, self.where) if self.meta else BPECodec()

    @property
    def codec_if_here(self):
        """The codec; None where there is none without a network, or a library that training does not need."""
        try:
            return None if self.are_gpt2s and not gpt2_is_cached() else self.codec
        except (UserError, OSError):  # an OSError: there is no temporary folder, where tiktoken would look
            return None

    def same_as(self, other):
        """Whether the ids of both stand for the same tokens: True, False, or None where one of the two does not say,
        and has as many as the other."""
        if not self.known or not other.known:
            sizes = ({tokens.vocab_size, tokens.model_vocab_size} for tokens in (self, other))
            return None if set.intersection(*sizes) else False
        if self.tokenizer and other.tokenizer:
            return same_tokenizer(self.tokenizer, other.tokenizer)
        stoi = [tokens.tokenizer or tokens.meta and tokens.meta["stoi"] for tokens in (self, other)]
        return stoi[0] == stoi[1]

    def prepared_again(self, folder):
        """Whether the dataset in `folder` has other tokens now. A broken file does not say."""
        try:
            now = Tokens.of_dataset(folder)
            return any(Path(folder).glob("train*.bin")) and now.known and now.same_as(self) is False
        except UserError:
            return False
