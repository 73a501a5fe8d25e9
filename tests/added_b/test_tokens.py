"""data/tokens.py: the safe reader of meta.pkl, and the codecs."""

import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, error_line, flags, write_synthetic

from data import tokens
from data.tokens import BPECodec, CharCodec, codec_of_run, read_meta
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


# ----------------------------------------------------------------------------------------------
# meta.pkl as others write it

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
WITH_CHARACTERS = {
    "itos a list": {"vocab_size": 3, "stoi": ABC["stoi"], "itos": ["a", "b", "é"]},
    "itos a tuple": {"vocab_size": 3, "stoi": ABC["stoi"], "itos": ("a", "b", "é")},
    "itos a text": {"vocab_size": 3, "stoi": ABC["stoi"], "itos": "abé"},
    "itos a list, alone": {"vocab_size": 3, "itos": ["a", "b", "é"]},
    "itos alone": {"vocab_size": 3, "itos": ABC["itos"]},
    "stoi alone": {"vocab_size": 3, "stoi": ABC["stoi"]},
    "itos None": ABC | {"itos": None},
    "stoi None": ABC | {"stoi": None},
    "integer keys beside": ABC | {0: "x", 1: 2, -5: []},
    "float keys, None and False as keys": ABC | {0.5: 1, None: 2, False: 3},
    "floats": ABC | {"split": 0.9, "nan": math.nan, "inf": -math.inf},
    "booleans and None": ABC | {"lower": True, "upper": False, "source": None},
    "tuples": ABC | {"shape": (), "a": (1,), "b": (1, 2), "c": ("x", 2.0, None), "d": (1, 2, 3, 4, (5, (6, [7])))},
    "tuples in lists": ABC | {"merges": [("t", "h"), ("e", " "), ("th", "e ")] * 500},
    "one tuple many times": ABC | {"pairs": [(1, 2)] * 10},
    "padding": {"vocab_size": 8, "stoi": ABC["stoi"], "itos": ["a", "b", "é", None, None]},
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("meta", WITH_CHARACTERS.values(), ids=WITH_CHARACTERS.keys())
def test_a_harmless_meta_of_others_gives_its_characters(tmp_path, meta, protocol):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    found = read_meta(tmp_path / "meta.pkl")
    assert found == ABC | {"vocab_size": meta["vocab_size"]}
    codec = CharCodec(found)
    assert codec.encode("éab") == [2, 0, 1] and codec.decode([2, 0, 1]) == "éab" and not codec.known(3)


@pytest.mark.parametrize("more", [{"chars": {"a", "b"}}, {"magic": b"abc"}, {"frozen": frozenset("ab")}])
def test_sets_and_bytes_are_plain_where_pickle_has_opcodes_for_them(tmp_path, more):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(ABC | more, 4))
    assert read_meta(tmp_path / "meta.pkl") == ABC


TRAINING_ONLY = {
    "integer keys": {"vocab_size": 3, "stoi": {10: 0, 20: 1, 30: 2}, "itos": {0: 10, 1: 20, 2: 30}},
    "a list of numbers": {"vocab_size": 3, "itos": [10, 20, 30]},
    "other names": {"vocab_size": 3, "chars": ["a", "b", "é"]},
    "ids that are floats": {"vocab_size": 3, "stoi": {"a": 0.0, "b": 1.0}},
    "tables of another kind": {"vocab_size": 3, "stoi": 3, "itos": 4.5},
    "None": {"vocab_size": 3, "stoi": None, "itos": None},
    "empty tables": {"vocab_size": 3, "stoi": {}, "itos": {}},
}


@pytest.mark.parametrize("meta", TRAINING_ONLY.values(), ids=TRAINING_ONLY.keys())
def test_training_needs_vocab_size_alone_and_sampling_says_what_is_missing(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    found = read_meta(tmp_path / "meta.pkl")
    assert found == {"vocab_size": 3}
    with pytest.raises(UserError, match="no characters") as error:
        CharCodec(found, "data/x/meta.pkl")
    assert "data/x/meta.pkl" in str(error.value) and "stoi" in str(error.value) and "itos" in str(error.value)


def test_a_table_alone_that_gives_two_characters_one_id_or_two_ids_one_character_has_the_first(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, "stoi": {"a": 0, "A": 0, "b": 1}}))
    assert read_meta(tmp_path / "meta.pkl")["stoi"] == {"a": 0, "b": 1}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, "itos": ["a", "b", "?", "?"]}))
    found = read_meta(tmp_path / "meta.pkl")
    assert found["itos"] == {0: "a", 1: "b", 2: "?"} and found["stoi"] == {"a": 0, "b": 1, "?": 2}


def test_what_has_been_read_is_read_again_from_a_checkpoint_as_it_was(tmp_path):
    for meta in (*WITH_CHARACTERS.values(), *TRAINING_ONLY.values()):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
        found = read_meta(tmp_path / "meta.pkl")
        assert tokens.check_meta(found, "ckpt.pt") == found


@pytest.mark.parametrize("meta", [
    {"vocab_size": 2, "itos": ["a", "b", "é"]}, {"vocab_size": 3, "stoi": {"a": 3}}, {"vocab_size": 3, "stoi": {"a": -1}},
    {"vocab_size": 3, "itos": ["b", "a", "é"], "stoi": ABC["stoi"]}, {"vocab_size": 1, "itos": ["\ud800"]},
    {"vocab_size": 3.0}, {"vocab_size": True}, {"vocab_size": None}, {"vocab_size": (3,)}, (3,), None, 3.5, True,
    {"itos": ["a"]}, {("vocab_size",): 3},
], ids=str)  # fmt: skip
def test_a_meta_that_contradicts_itself_or_has_no_size_is_refused(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match="is not a meta.pkl"):
        read_meta(tmp_path / "meta.pkl")


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def deep(value, times):
    for _ in range(times):
        value = (value,)
    return value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("place", [
    lambda x: ABC | {"x": x}, lambda x: ABC | {"x": (1, x)}, lambda x: ABC | {"x": [None, {"y": (x,)}]},
    lambda x: {"vocab_size": 3, "itos": [x]}, lambda x: (x, ABC), lambda x: ABC | {"vocab_size": x},
])  # fmt: skip
def test_code_never_runs_wherever_it_stands(tmp_path, monkeypatch, protocol, place):
    monkeypatch.chdir(tmp_path)
    hostile = [Calls(os.system, "touch it_ran"), Calls(os.mkdir, "it_ran"), Calls(eval, "open('it_ran', 'w')")]
    hostile += [np.int64(3), np.array([1]), range(3), ValueError, print]
    for value in hostile:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(place(value), protocol))
        with pytest.raises(UserError, match="meta.pkl is not a meta.pkl"):
            read_meta(tmp_path / "meta.pkl")
        assert not (tmp_path / "it_ran").exists()


HOSTILE = {
    "a tuple for a key": pickle.dumps(ABC | {(1, 2): 3}),
    "an empty tuple for a key": pickle.dumps(ABC | {(): 3}),
    "a tuple in a set": pickle.dumps(ABC | {"x": {(1, 2), (3, 4)}}),
    "a tuple in a frozen set": pickle.dumps(ABC | {"x": frozenset([(1, 2)])}),
    "a frozen set for a key": pickle.dumps(ABC | {frozenset("ab"): 1}),
    "tuples nested deep, as a value": pickle.dumps(ABC | {"x": deep(1, 400)}),
    "a deep key": b"}" + b")" + b"\x85" * 1_000_000 + b"K\x01s.",
    "a deep value": b"}K\x01" + b")" + b"\x85" * 1_000_000 + b"s.",
    "a deep key from the memo": b"}" + b")" + b"\x85" * 1_000_000 + b"q\x000" + b"h\x00K\x01s.",
    "a deep key, marked": b"}(" + b")" + b"\x85" * 1_000_000 + b"K\x01u.",
    "a deep key in a list of pairs": b"(" + b")" + b"\x85" * 1_000_000 + b"K\x01d.",
    "tuples of three, each the one before": b"}" + b")" + b"\x94h\x00h\x00\x87" * 60 + b"K\x01s.",
    "marks without an end": b"(" * 100_000 + b".",
    "lists and marks": b"(" * 100_000 + b"l" * 100_000 + b".",
    "more taken than there is": b"}\x87.",
    "a mark that is missing": b"K\x01u.",
    "a memo that was not filled": b"}h\x05s.",
    "an extension": b"\x80\x02\x82\x01.",
    "an instance": b"(ios\nsystem\n.",
    "a persistent id": b"Pname\n.",
}


READ_ALL = """
import sys
from data.tokens import read_meta
from nanogpt.errors import UserError
for path in sys.argv[1:]:
    try:
        read_meta(path)
    except UserError as error:
        print(error)
"""


def test_a_hostile_meta_ends_in_one_line_and_not_the_process(tmp_path):
    paths = [tmp_path / f"{name}.pkl" for name in HOSTILE]
    for path, content in zip(paths, HOSTILE.values(), strict=True):
        path.write_bytes(content)
    command = [sys.executable, "-c", READ_ALL, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{path} is not a meta.pkl: ") and len(line) < 500


def test_train_trains_with_a_meta_of_integer_keys_and_sample_says_what_is_missing(run, own_project, tmp_path):
    meta = {"vocab_size": 61, "stoi": {i + 100: i for i in range(61)}, "version": (1, 2), "ratio": 0.9}
    write_synthetic(own_project / "data" / "synthetic", meta)
    result = run("train.py", *flags(TINY, max_iters=2, out_dir=tmp_path / "out"), project=own_project)
    assert "found vocab_size = 61 (inside data/synthetic/meta.pkl)" in result.lines
    line = error_line(run("sample.py", f"--out_dir={tmp_path / 'out'}", "--device=cpu", project=own_project, expect=2))
    assert "no characters" in line
