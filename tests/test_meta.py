"""data/meta.py: the safe reader of meta.pkl."""

import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, error_line, flags, write_synthetic

from data.meta import check_meta, read_meta
from data.codecs import CharCodec
from nanogpt.errors import UserError

ABC = {"vocab_size": 3, "stoi": {"a": 0, "b": 1, "é": 2}, "itos": {0: "a", 1: "b", 2: "é"}}


class Runs:
    """Pickles as a call of os.system."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_is_read_in_every_pickle_protocol_and_may_have_other_plain_keys(tmp_path, protocol):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(ABC | {"words": ["x", {"y": [1, -(10**30)]}]}, protocol))
    assert read_meta(path) == ABC


def test_a_meta_with_a_vocabulary_size_alone_will_do_for_training(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 61}))
    meta = read_meta(tmp_path / "meta.pkl")
    assert meta == {"vocab_size": 61}
    with pytest.raises(UserError, match="no characters"):
        CharCodec(meta)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: ABC | {"more": [x]}, lambda x: {x: 1}])
def test_a_hostile_meta_does_not_run(tmp_path, protocol, wrap):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(wrap(Runs(tmp_path / "it_ran")), protocol))
    with pytest.raises(UserError, match="is not a meta.pkl") as error:
        read_meta(path)
    assert str(path) in str(error.value) and not (tmp_path / "it_ran").exists()


BROKEN = {
    "nothing": b"",
    "text": b"hello, this is text",
    "cut": pickle.dumps(ABC)[:-20],
    "a list": pickle.dumps([1, 2]),
    "bytes": pickle.dumps(b"abc"),
    "numpy's int": pickle.dumps(ABC | {"vocab_size": np.int64(3)}),
    "too large": pickle.dumps("x" * (1 << 23)),
    "a deep list": b"]" * 300_000 + b"a" * 299_999 + b".",
    "a deep key": b"}" + b")" + b"\x85" * 1_000_000 + b"K\x01s.",  # hashing it would overflow the stack
    "a memo index": b"\x80\x02}r\xff\xff\xff\x7f.",  # would take 32 GB
    "a long that is none": b"L" + b"9" * 5000 + b"L\n.",
    "no hashable key": b"}]K\x01s.",
    "no vocab_size": pickle.dumps({k: ABC[k] for k in ("stoi", "itos")}),
    "vocab_size 0": pickle.dumps(ABC | {"vocab_size": 0}),
    "vocab_size too large": pickle.dumps(ABC | {"vocab_size": 65537}),
    "vocab_size True": pickle.dumps(ABC | {"vocab_size": True}),
    "vocab_size a float": pickle.dumps(ABC | {"vocab_size": 3.0}),
    "id out of range": pickle.dumps(ABC | {"vocab_size": 2}),
    "tables that disagree": pickle.dumps(ABC | {"itos": {0: "b", 1: "a", 2: "é"}}),
    "a table that lacks one": pickle.dumps(ABC | {"itos": {0: "a", 1: "b"}}),
    "two characters of one id": pickle.dumps(ABC | {"stoi": {"a": 0, "b": 1, "é": 2, "c": 2}}),
    "half a character": pickle.dumps({"vocab_size": 1, "stoi": {"\ud800": 0}, "itos": {0: "\ud800"}}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_meta_gets_one_line_with_its_name(tmp_path, content):
    path = tmp_path / "meta.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a meta.pkl") as error:
        read_meta(path)
    assert str(path) in str(error.value)


# ----------------------------------------------------------------------------------------------
# meta.pkl as others write it

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
WITH_CHARACTERS = {
    "itos a list": {"vocab_size": 3, "stoi": ABC["stoi"], "itos": ["a", "b", "é"]},
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
    "one list many times": ABC | {"pairs": [[1, 2]] * 10},
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


def test_bytes_are_plain_where_pickle_has_opcodes_for_them(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(ABC | {"magic": b"abc"}, 4))
    assert read_meta(tmp_path / "meta.pkl") == ABC


@pytest.mark.parametrize("more", [
    {"shape": ()}, {"pair": (1, 2)}, {"itos": ("a", "b", "é")}, {"x": {1, 2}}, {"x": frozenset("ab")}
])  # fmt: skip
def test_a_tuple_or_a_set_is_one_line_that_says_what_a_meta_may_hold(tmp_path, more):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(ABC | more, 4))
    with pytest.raises(UserError, match="is not a meta.pkl: holds more than dicts, lists, texts and numbers"):
        read_meta(tmp_path / "meta.pkl")


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
        assert check_meta(found, "ckpt.pt") == found


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
from data.meta import read_meta
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
    meta = {"vocab_size": 61, "stoi": {i + 100: i for i in range(61)}, "version": [1, 2], "ratio": 0.9}
    write_synthetic(own_project / "data" / "synthetic", meta)
    result = run("train.py", *flags(TINY, max_iters=2, out_dir=tmp_path / "out"), project=own_project)
    assert "found vocab_size = 61 (inside data/synthetic/meta.pkl)" in result.lines
    line = error_line(run("sample.py", f"--out_dir={tmp_path / 'out'}", "--device=cpu", project=own_project, expect=2))
    assert "no characters" in line
