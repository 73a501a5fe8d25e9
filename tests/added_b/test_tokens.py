"""data/tokens.py: the safe reader of meta.pkl, and the codecs."""

import os

import numpy as np
import pytest
from conftest import write_synthetic

from data import tokens
from data.tokens import BPECodec, codec_of_run
from nanogpt.errors import UserError

ABC = {"vocab_size": 3, "stoi": {"a": 0, "b": 1, "é": 2}, "itos": {0: "a", 1: "b", 2: "é"}}
BAC = {"vocab_size": 3, "stoi": {"b": 0, "a": 1, "é": 2}, "itos": {0: "b", 1: "a", 2: "é"}}

# ----------------------------------------------------------------------------------------------
# which codec a checkpoint's ids have


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """dataset(meta) -> the folder data/mine, whose meta.pkl is `meta`; None writes no meta.pkl."""
    monkeypatch.setattr(tokens, "ROOT", str(tmp_path))
    return lambda meta: write_synthetic(tmp_path / "data" / "mine", meta)


def checkpoint(**more):
    return {"config": {"dataset": "mine"}, **more}


def test_the_checkpoints_characters_come_before_the_data_folders(dataset):
    folder = dataset(BAC)
    codec, [remark] = codec_of_run(checkpoint(meta=ABC), "out/ckpt.pt", 3)
    assert codec.decode([0, 1, 2]) == "abé" and codec.encode("ab") == [0, 1]
    assert str(folder) in remark and "using those in out/ckpt.pt" in remark and "\n" not in remark


@pytest.mark.parametrize("here", [ABC, ABC | {"vocab_size": 9}, {"vocab_size": 3}, {"vocab_size": 7}])
def test_where_the_data_folder_says_nothing_else_nothing_is_said(dataset, here):
    dataset(here)
    codec, remarks = codec_of_run(checkpoint(meta=ABC), "out/ckpt.pt", 3)
    assert codec.decode([0, 1, 2]) == "abé" and remarks == []


@pytest.mark.parametrize("content", [None, b"", b"no pickle", b"cos\nsystem\n(S'touch it_ran'\ntR."])
def test_without_a_readable_meta_the_checkpoints_serves_and_nothing_is_said(dataset, tmp_path, content):
    folder = dataset(None)
    (folder / "train.bin").unlink()
    if content is not None:
        (folder / "meta.pkl").write_bytes(content)
    codec, remarks = codec_of_run(checkpoint(meta=ABC), "out/ckpt.pt", 3)
    assert codec.decode([2]) == "é" and remarks == [] and not os.path.exists("it_ran")


def test_a_dataset_prepared_again_in_gpt2s_tokens_is_said(dataset):
    dataset(None)
    codec, [remark] = codec_of_run(checkpoint(meta=ABC), "out/ckpt.pt", 3)
    assert codec.decode([1]) == "b" and "out/ckpt.pt" in remark


def test_a_run_on_gpt2s_tokens_keeps_them_where_the_dataset_has_characters_now(dataset, shared):
    dataset(ABC)
    codec, [remark] = codec_of_run(checkpoint(meta=None), "out/ckpt.pt", 50304)
    assert isinstance(codec, BPECodec) and "out/ckpt.pt" in remark


@pytest.mark.parametrize("kept", [{}, {"meta": {"vocab_size": 3}}])
def test_where_the_checkpoint_has_no_characters_the_data_folders_serve(dataset, kept):
    """nanoGPT's checkpoints have none; and a run may have been trained with vocab_size alone."""
    dataset(BAC)
    codec, remarks = codec_of_run(checkpoint(**kept), "out/ckpt.pt", 3)
    assert codec.decode([0, 1]) == "ba" and remarks == []
    assert np.array_equal(codec.encode("ab"), [1, 0])


def test_where_neither_has_characters_the_line_names_the_file(dataset):
    folder = dataset({"vocab_size": 3})
    with pytest.raises(UserError, match="no characters") as error:
        codec_of_run(checkpoint(meta={"vocab_size": 3}), "out/ckpt.pt", 3)
    assert str(folder / "meta.pkl") in str(error.value)
