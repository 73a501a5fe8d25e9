"""What ids stand for: those of a dataset, of a run's checkpoint, of a GPT-2's folder; and whether two are the same.

A checkpoint keeps it, so that a model can be used without its dataset: the key `tokenizer` has the text of a
tokenizer.json, or else the key `meta` has the content of meta.pkl, for characters; a meta of None: GPT-2's tokens.
"""

import os

from data.folder import FACTS, TOKENS, read_facts, tokens_in
from data.meta import check_meta
from data.tokenizer import codec_of_tokenizer, parse, same_tokenizer
from data.tokens import GPT2_VOCAB_SIZE, BPECodec, CharCodec
from nanogpt.errors import ROOT, UserError
from nanogpt.text_file import read_text


def codec_for(meta, where="meta.pkl"):
    """The codec of `meta`, as read_meta returns it or a checkpoint has kept it; GPT-2's where it is None."""
    return BPECodec() if meta is None else CharCodec(meta, where)


def codec_of_dataset(folder):
    """The codec of the dataset in `folder`; UserError where its ids cannot be made into text."""
    return codec_of_tokens(*tokens_in(folder, read_facts(folder)), folder)


def codec_of_tokens(meta, tokenizer, folder):
    """The codec of what tokens_in() has found in `folder`."""
    if tokenizer:
        return codec_of_tokenizer(tokenizer, os.path.join(folder, "tokenizer.json"))
    return codec_for(meta, os.path.join(folder, "meta.pkl"))


def codec_of_run(checkpoint, path, vocab_size):
    """(codec, remarks for the user) of the model of `vocab_size` ids in `checkpoint`, read from `path`.

    The codec is the one kept in the checkpoint, since the dataset may have been prepared again from another text. Where
    the checkpoint has none, as nanoGPT's do, it is the dataset's of today. UserError where neither has one, or it has
    more ids than the model.
    """
    folder = os.path.join(ROOT, "data", str(checkpoint["config"].get("dataset")))
    if not has_codec(checkpoint, path):
        here = any(os.path.exists(os.path.join(folder, name)) for name in (*TOKENS, FACTS))
        codec = codec_of_dataset(folder) if here else codec_for(checkpoint.get("meta"), path)
        return _checked_size(codec, vocab_size, path), []
    if checkpoint.get("tokenizer"):
        codec = codec_of_tokenizer(checkpoint["tokenizer"], f"the tokenizer in {path}")
    else:
        codec = codec_for(checkpoint["meta"], path)
    remark = f"{folder} has other tokens than the run was trained on: using those in {path}"
    return _checked_size(codec, vocab_size, path), [remark] if _has_other_tokens(folder, checkpoint) else []


def has_tokens(checkpoint):
    """Whether the checkpoint says what its ids stand for, or at least how many there are."""
    return "meta" in checkpoint or bool(checkpoint.get("tokenizer"))


def has_codec(checkpoint, path):
    """Whether the checkpoint read from `path`, or kept() of a dataset there, says what each id stands for.

    A meta of None says that they are GPT-2's. Some have only their number."""
    if checkpoint.get("tokenizer"):
        return True
    meta = checkpoint.get("meta")
    return "meta" in checkpoint and (meta is None or "stoi" in check_meta(meta, path))


def same_tokens(one, other):
    """Whether the ids of two checkpoints, or of what kept() returns, stand for the same tokens."""
    tokenizers = [each.get("tokenizer") for each in (one, other)]
    if any(tokenizers):
        return all(tokenizers) and same_tokenizer(*tokenizers)
    metas = [each.get("meta") for each in (one, other)]
    ids = [meta and meta.get("stoi", meta.get("vocab_size")) for meta in metas]
    return ids[0] == ids[1]


def kept(meta, tokenizer):
    """What a checkpoint keeps of a dataset's tokens, which tokens_in() has found."""
    return {"tokenizer": tokenizer} if tokenizer else {"meta": meta}


def kept_of_codec(codec):
    """kept() of a dataset with the tokens of `codec`."""
    return kept({"stoi": codec.stoi} if isinstance(codec, CharCodec) else None, codec.tokenizer)


def kept_of_gpt2(init_from, vocab_size):
    """kept() for the tokens of a GPT-2, a hub name or a folder; None where they are not known.

    UserError where its tokenizer.json is damaged."""
    path = os.path.join(init_from, "tokenizer.json")
    if not os.path.isfile(path):
        return {"meta": None} if vocab_size >= GPT2_VOCAB_SIZE else None
    text = read_text(path)
    parse(text, path)
    try:
        return kept_of_codec(codec_of_tokenizer(text, path))
    except UserError:  # of a kind whose library is missing: training does not need it
        return None


def _has_other_tokens(folder, checkpoint):
    """Whether the ids of the dataset in `folder`, as it is now, stand for something else than the checkpoint's."""
    try:
        theirs = kept(*tokens_in(folder, read_facts(folder)))
    except UserError:  # a broken file does not say
        return False
    if theirs == {"meta": None} and not os.path.exists(os.path.join(folder, "train.bin")):
        return False
    return has_codec(theirs, folder) and not same_tokens(theirs, checkpoint)


def codec_of_folder(name_or_path, vocab_size):
    """The codec of a GPT-2: that of the tokenizer.json in its folder, else GPT-2's own. UserError where the folder's
    cannot be read, or has more ids than the model."""
    path = os.path.join(name_or_path, "tokenizer.json")
    has_own = os.path.isfile(path)
    codec = codec_of_tokenizer(read_text(path), path) if has_own else BPECodec()
    if os.path.isdir(name_or_path) and not has_own and codec.vocab_size > vocab_size:
        raise UserError(f"{name_or_path} has no tokenizer.json, and its {vocab_size} ids are not GPT-2's")
    return _checked_size(codec, vocab_size, name_or_path)


def _checked_size(codec, vocab_size, path):
    """The codec itself; UserError where the model in `path`, of `vocab_size` ids, has too few of them."""
    if codec.vocab_size > vocab_size:
        raise UserError(f"{path} has {vocab_size} token ids, fewer than the {codec.vocab_size} of its tokens")
    return codec
