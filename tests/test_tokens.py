"""data/tokens.py: what the ids of a dataset, a run or a GPT-2 stand for; and whether two are the same."""

import json
import os

import numpy as np
import pytest
from conftest import write_synthetic

from data.codecs import BPECodec
from data.dataset import Dataset
from data.folder import dataset_folder, write_dataset
from data.tokenizer import tokenizer_of, train_tokenizer
from data.tokens import Tokens
from nanogpt.errors import UserError

ABC = {"vocab_size": 3, "stoi": {"a": 0, "b": 1, "é": 2}, "itos": {0: "a", 1: "b", 2: "é"}}
BAC = {"vocab_size": 3, "stoi": {"b": 0, "a": 1, "é": 2}, "itos": {0: "b", 1: "a", 2: "é"}}

# ----------------------------------------------------------------------------------------------
# of a run


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """dataset(meta) -> the folder data/mine, whose meta.pkl is `meta`; None writes no meta.pkl."""
    monkeypatch.setattr("data.folder.ROOT", str(tmp_path))
    return lambda meta: write_synthetic(tmp_path / "data" / "mine", meta)


def of_run(vocab_size=3, **kept):
    checkpoint = {"model_args": {"vocab_size": vocab_size}}
    return Tokens.of_run(checkpoint | kept, "out/ckpt.pt", dataset_folder("mine"))


def test_the_checkpoints_characters_come_before_the_data_folders(dataset):
    folder = dataset(BAC)
    tokens = of_run(meta=ABC)
    assert tokens.codec.decode([0, 1, 2]) == "abé" and tokens.codec.encode("ab") == [0, 1]
    assert tokens.prepared_again(str(folder))


def test_without_a_temporary_folder_gpt2s_tokens_have_no_codec(dataset, tmp_path, monkeypatch):
    def none_usable():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.gettempdir", none_usable)
    write_dataset(str(tmp_path / "data" / "mine"), [(np.array([0, 1]), 6)], [(np.array([2, 3, 4]), 12)], 50257)
    by_id = Dataset("mine", 1).bytes_by_id(50304, "cpu")
    assert by_id.shape == (50304,) and (by_id == 4).all()  # by dataset.json: 12 bytes are 3 tokens


@pytest.mark.parametrize("here", [ABC, ABC | {"vocab_size": 9}, {"vocab_size": 3}, {"vocab_size": 7}])
def test_a_data_folder_with_the_same_characters_or_none_is_not_prepared_again(dataset, here):
    folder = dataset(here)
    tokens = of_run(meta=ABC)
    assert tokens.codec.decode([0, 1, 2]) == "abé" and not tokens.prepared_again(str(folder))


@pytest.mark.parametrize("content", [None, b"", b"no pickle", b"cos\nsystem\n(S'touch it_ran'\ntR."])
def test_without_a_readable_meta_the_checkpoints_serves(dataset, content):
    folder = dataset(None)
    (folder / "train.bin").unlink()
    if content is not None:
        (folder / "meta.pkl").write_bytes(content)
    tokens = of_run(meta=ABC)
    assert tokens.codec.decode([2]) == "é" and not tokens.prepared_again(str(folder)) and not os.path.exists("it_ran")


def test_a_broken_tokenizer_json_does_not_say_that_the_dataset_was_prepared_again(dataset, own):
    folder = dataset(None)
    (folder / "tokenizer.json").write_text("{")
    assert not of_run(260, tokenizer=own).prepared_again(str(folder))


def test_a_dataset_prepared_again_in_gpt2s_tokens_is_known(dataset):
    folder = dataset(None)
    tokens = of_run(meta=ABC)
    assert tokens.codec.decode([1]) == "b" and tokens.prepared_again(str(folder))


def test_a_run_on_gpt2s_tokens_keeps_them_where_the_dataset_has_characters_now(dataset, shared):
    folder = dataset(ABC)
    tokens = of_run(50304, meta=None)
    assert isinstance(tokens.codec, BPECodec) and tokens.prepared_again(str(folder))


@pytest.mark.parametrize("kept", [{}, {"meta": {"vocab_size": 3}}])
def test_where_the_checkpoint_has_no_characters_the_data_folders_serve(dataset, kept):
    """nanoGPT's checkpoints have none; and a run may have been trained with vocab_size alone."""
    folder = dataset(BAC)
    tokens = of_run(**kept)
    assert tokens.codec.decode([0, 1]) == "ba" and not tokens.prepared_again(str(folder))
    assert tokens.codec.encode("ab") == [1, 0]


def test_where_neither_has_characters_the_line_names_the_file(dataset):
    folder = dataset({"vocab_size": 3})
    with pytest.raises(UserError, match="no characters") as error:
        of_run(meta={"vocab_size": 3}).codec  # noqa: B018
    assert str(folder / "meta.pkl") in str(error.value)


@pytest.mark.parametrize("has_bins", [False, True])
def test_a_checkpoint_of_nanogpts_without_characters_has_gpt2s_tokens_if_it_may(dataset, has_bins):
    if has_bins:
        dataset(None)
    assert of_run(50304).are_gpt2s
    with pytest.raises(UserError, match="out/ckpt.pt has no characters"):
        of_run(65).codec  # noqa: B018


# ----------------------------------------------------------------------------------------------
# whether two are the same


@pytest.fixture(scope="module")
def own():
    """The text of a tokenizer.json of 260 tokens, trained here."""
    return train_tokenizer(["the cat sat on the mat, that cat\n" * 50], 260)


def test_two_are_the_same_or_not_or_it_is_not_known(own):
    gpt2s, mine, other = Tokens(), Tokens(ABC), Tokens(BAC)
    trained, written = Tokens(tokenizer=own), Tokens(tokenizer=json.dumps(json.loads(own)))
    assert gpt2s.same_as(Tokens()) and mine.same_as(Tokens(dict(ABC))) and trained.same_as(written)
    for one, two in ((gpt2s, mine), (mine, other), (gpt2s, trained), (trained, mine)):
        assert one.same_as(two) is two.same_as(one) is False
    for known, size in ((gpt2s, 50257), (gpt2s, 50304), (mine, 3), (trained, 260)):
        assert known.same_as(Tokens({"vocab_size": size})) is Tokens({"vocab_size": size}).same_as(known) is None
        assert known.same_as(Tokens({"vocab_size": size + 1})) is False


def test_what_a_checkpoint_keeps_says_the_same_again(own):
    for tokens in (Tokens(), Tokens(ABC), Tokens({"vocab_size": 3}), Tokens(tokenizer=own)):
        again = of_run(tokens.vocab_size, **tokens.kept())
        assert again.kept() == tokens.kept() and again.known == tokens.known


# ----------------------------------------------------------------------------------------------
# of a GPT-2


def test_a_gpt2s_tokens_are_those_of_its_tokenizer_json(own, tmp_path, shared):
    assert Tokens.of_gpt2("gpt2", 50257).are_gpt2s and Tokens.of_gpt2(str(tmp_path), 50304).are_gpt2s
    assert not Tokens.of_gpt2(str(tmp_path), 97).known
    write_dataset(str(tmp_path / "chars"), [], [], 3, meta=ABC)
    characters = Tokens.of_dataset(str(tmp_path / "chars"))
    for tokens in (Tokens(tokenizer=own), characters, Tokens()):
        (tmp_path / "tokenizer.json").write_text(tokenizer_of(tokens.codec), encoding="utf-8")
        assert Tokens.of_gpt2(str(tmp_path), tokens.vocab_size).same_as(tokens)
