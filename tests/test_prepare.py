"""The prepare scripts, run on a copy of the project, so that nothing in the checkout is written."""

import hashlib
import json
import os
import pickle
import random
import runpy
import shlex
import shutil
import signal
import string
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, copy_project, error_line
from prepare_scripts import (
    SHAKESPEARE, UNICODE, environment, error_after_progress, files_in, ids, needs_bpe, needs_shakespeare,
    prepare, tiktoken_gpt2, write_text,
)  # fmt: skip

from data.meta import read_meta
from data.codecs import CharCodec

@needs_shakespeare
def test_tiny_shakespeare_by_character_is_nanogpts_dataset(work):
    folder = work / "data" / "shakespeare_char"
    shutil.copy(SHAKESPEARE, folder)
    result = prepare(work, "shakespeare_char")
    assert result.returncode == 0, result.stderr
    for fact in (
        "length of dataset in characters: 1,115,394",
        "vocab size: 65",
        "train has 1,003,854 tokens",
        "val has 111,540 tokens",
        "config/train_shakespeare_char.py",
    ):
        assert fact in result.stdout
    with open(folder / "meta.pkl", "rb") as f:
        meta = pickle.load(f)  # as nanoGPT reads it
    assert meta["vocab_size"] == 65 and meta["stoi"]["\n"] == 0 and meta["itos"][64] == "z"
    train, val = ids(work, "shakespeare_char", "train"), ids(work, "shakespeare_char", "val")
    assert (len(train), len(val)) == (1_003_854, 111_540)
    assert train[:6].tolist() == [18, 47, 56, 57, 58, 1]  # "First ", as nanoGPT's train.bin begins
    with open(SHAKESPEARE, encoding="utf-8") as f:
        assert "".join(meta["itos"][i] for i in np.concatenate([train, val]).tolist()) == f.read()
    assert sorted(files_in(folder)) == ["dataset.json", "input.txt", "meta.pkl", "prepare.py", "train.bin", "val.bin"]


@needs_shakespeare
@needs_bpe
def test_tiny_shakespeare_in_byte_pairs_has_nanogpts_counts_and_finds_the_other_datasets_text(work):
    shutil.copy(SHAKESPEARE, work / "data" / "shakespeare_char")
    result = prepare(work, "shakespeare")
    assert result.returncode == 0, result.stderr
    assert "train has 301,966 tokens" in result.stdout and "val has 36,059 tokens" in result.stdout
    train, val = ids(work, "shakespeare", "train"), ids(work, "shakespeare", "val")
    assert (len(train), len(val)) == (301_966, 36_059)
    assert sorted(files_in(work / "data" / "shakespeare")) == ["dataset.json", "prepare.py", "train.bin", "val.bin"]


@needs_bpe
def test_text_bpe_puts_endoftext_between_several_texts_and_splits_by_position(work, tmp_path):
    text = UNICODE * 300
    one, two = write_text(tmp_path / "one.txt", text[:999]), write_text(tmp_path / "two.txt", text[999:])
    result = prepare(work, "text_bpe", one, two, "--name=mine", "--val_fraction=0.25")
    assert result.returncode == 0, result.stderr
    assert "--dataset=mine" in result.stdout
    first, second = (part.replace("\r\n", "\n") for part in (text[:999], text[999:]))
    cut, codec = int(len(first + second) * 0.75) - len(first), tiktoken_gpt2()
    expected = [*codec.encode_ordinary(first), 50256, *codec.encode_ordinary(second[:cut])]
    assert ids(work, "mine", "train").tolist() == expected
    assert ids(work, "mine", "val").tolist() == codec.encode_ordinary(second[cut:])
    assert sorted(files_in(work / "data" / "text_bpe")) == ["prepare.py"]


def test_text_char_without_files_takes_the_standard_library_and_needs_no_network(work):
    result = prepare(work, "text_char")
    assert result.returncode == 0, result.stderr
    meta = read_meta(work / "data" / "text_char" / "meta.pkl")
    assert all(ord(c) < 128 for c in meta["stoi"])
    train, val = ids(work, "text_char", "train"), ids(work, "text_char", "val")
    assert 3_000_000 < len(train) + len(val) < 8_000_000
    folder = sysconfig.get_path("stdlib")
    names = sorted(name for name in os.listdir(folder) if name.endswith(".py"))
    with open(os.path.join(folder, names[0]), encoding="utf-8") as f:
        head = f.read(500)
    assert CharCodec(meta).decode(train[:500].tolist()) == head


def test_text_char_changes_only_line_ends_in_the_users_files(work, tmp_path):
    one, two = (
        write_text(tmp_path / "one.txt", UNICODE * 50),
        write_text(tmp_path / "two.txt", "zwei\r\n" * 50),
    )
    result = prepare(work, "text_char", one, two, "--name=mine", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    codec = CharCodec(read_meta(work / "data" / "mine" / "meta.pkl"))
    parts = [codec.decode(ids(work, "mine", split).tolist()) for split in ("train", "val")]
    assert "".join(parts) == (UNICODE * 50 + "zwei\r\n" * 50).replace("\r\n", "\n")
    assert len(parts[0]) == int(0.9 * len("".join(parts)))


@pytest.mark.parametrize(
    "dataset", ["shakespeare_char", "shakespeare", "text_char", "text_bpe", "openwebtext", "fineweb"]
)
def test_help_shows_every_setting(dataset, monkeypatch, capsys):
    script = str(ROOT / "data" / dataset / "prepare.py")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as done:
        runpy.run_path(script, run_name="__main__")
    shown = capsys.readouterr().out
    assert done.value.code == 0 and f"python data/{dataset}/prepare.py" in shown
    settings = [line for line in shown.splitlines() if line.startswith("  --")]
    names = {"text_char": ["name"], "text_bpe": ["name", "vocab_size", "tokenizer", "val_fraction"],
             "openwebtext": ["source", "tokenizer", "name"], "fineweb": ["source", "subset", "tokenizer", "name"]}  # fmt: skip
    assert [line.split("=")[0][4:] for line in settings] == names.get(dataset, [])
    assert all(len(line.split(None, 1)[1]) > 20 for line in settings)  # each with its comment


# ----------------------------------------------------------------------------------------------
# bad input: one line, and no file changed


def test_without_a_network_the_one_line_says_where_to_put_the_file(work):
    before = files_in(work / "data" / "shakespeare_char")
    line = error_after_progress(prepare(work, "shakespeare_char"))
    assert str(work / "data" / "shakespeare_char" / "input.txt") in line and "https://" in line
    assert files_in(work / "data" / "shakespeare_char") == before


def test_without_gpt2s_vocabulary_the_one_line_names_tiktoken_cache_dir(work, tmp_path):
    write_text(tmp_path / "a.txt", "some text\n" * 100)
    result = prepare(work, "text_bpe", tmp_path / "a.txt", TIKTOKEN_CACHE_DIR=str(tmp_path / "nothing"))
    assert "TIKTOKEN_CACHE_DIR" in error_after_progress(result)
    assert sorted(files_in(work / "data" / "text_bpe")) == ["prepare.py"]


def test_a_bad_file_leaves_the_old_dataset_as_it_was(work, tmp_path):
    folder = work / "data" / "text_char"
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (folder / name).write_bytes(b"old")
    before = files_in(folder)
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    assert "latin1.txt" in error_after_progress(prepare(work, "text_char", tmp_path / "latin1.txt"))
    assert files_in(folder) == before


# ----------------------------------------------------------------------------------------------
# memory


@needs_bpe
@pytest.mark.slow
def test_text_bpe_takes_no_more_memory_for_a_longer_text(work, tmp_path):
    line = "The quick brown fox jumps over the lazy dog, and so on and on.\n"
    peak = {}
    for size in (1, 64):
        write_text(tmp_path / "long.txt", line * (size << 20 >> 6))
        command = [sys.executable, work / "tests" / "programs" / "print_peak_memory.py", tmp_path / "long.txt"]
        env = environment(work, SCRIPT="data/text_bpe/prepare.py")
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        peak[size] = int(result.stdout.split("peak ")[1]) / 1024  # MB
    assert peak[64] - peak[1] < 150, peak  # the text alone is 64 MB, and its tokens in a list 500


# ----------------------------------------------------------------------------------------------
# openwebtext


def make_source(folder, documents, words):
    """Writes .jsonl, .parquet and .txt files to `folder`; returns their documents as they will be read."""
    import pyarrow
    import pyarrow.parquet

    rng = random.Random(0)
    vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(1000)]
    texts = [" ".join(rng.choices(vocabulary, k=words)) + f" {i} é中\n" for i in range(documents)]
    (folder / "deeper").mkdir(parents=True)
    a, b, c = documents // 3, documents // 2, documents - 5
    for name, part, other in (("1.jsonl", texts[:a], {"n": 1}), ("2.jsonl", texts[a:b], {"url": "x"})):
        write_text(folder / name, "".join(json.dumps({"text": text} | other) + "\n" for text in part))
    table = pyarrow.table({"id": range(c - b), "text": texts[b:c]})
    pyarrow.parquet.write_table(table, folder / "deeper" / "3.parquet")
    for i, text in enumerate(texts[c:]):
        write_text(folder / f"{i}.txt", text)
    return texts


def expected_openwebtext(texts):
    """{split: ids}: nanoGPT's recipe, on documents in memory."""
    import datasets

    parts = datasets.Dataset.from_dict({"text": texts})
    parts = parts.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    encoding = tiktoken_gpt2()
    return {
        split: [i for text in parts[part]["text"] for i in [*encoding.encode_ordinary(text), 50256]]
        for split, part in (("train", "train"), ("val", "test"))
    }


@needs_bpe
@pytest.mark.slow
def test_openwebtext_from_a_folder_is_nanogpts_recipe_and_goes_on_after_a_stop(work, tmp_path):
    pytest.importorskip("datasets")
    texts = make_source(tmp_path / "source", 3001, 40)
    expected = expected_openwebtext(texts)
    folder = work / "data" / "openwebtext"
    result = prepare(work, "openwebtext", f"--source={tmp_path / 'source'}")
    assert result.returncode == 0, result.stderr
    assert "3,001 documents" in result.stdout
    assert f"train has {len(expected['train']):,} tokens" in result.stdout
    for split in ("train", "val"):
        assert ids(work, "openwebtext", split).tolist() == expected[split]
    assert sorted(files_in(folder)) == ["dataset.json", "prepare.py", "train.bin", "val.bin"]

    # as a stop after 1,000 documents leaves it, with marks for their tokens, and half-written ones behind
    done = [i for i, token in enumerate(expected["train"]) if token == 50256][999] + 1
    with open(folder / "train.bin.tmp", "wb") as f:
        f.write(np.full(done, 7, dtype="<u2").tobytes() + b"half-written")
    first = tiktoken_gpt2().decode(expected["train"][: expected["train"].index(50256)])
    state = {"train": {"documents": 1000, "tokens": done, "bytes": 5}, "val": {"documents": 0, "tokens": 0, "bytes": 0}}
    state["of"] = [str(tmp_path / "source"), 3001, hashlib.sha256(first.encode()).hexdigest()]
    write_text(folder / "unfinished.tmp", json.dumps(state))
    (tmp_path / "other").mkdir()
    for i in range(3):
        write_text(tmp_path / "other" / f"{i}.txt", "another source\n")
    line = error_after_progress(prepare(work, "openwebtext", f"--source={tmp_path / 'other'}"))
    assert "unfinished" in line and str(tmp_path / "source") in line
    result = prepare(work, "openwebtext", f"--source={tmp_path / 'source'}")
    assert result.returncode == 0 and "going on after document 1,000" in result.stdout, result.stderr
    assert ids(work, "openwebtext", "train").tolist() == [7] * done + expected["train"][done:]
    assert ids(work, "openwebtext", "val").tolist() == expected["val"]
    assert sorted(files_in(folder)) == ["dataset.json", "prepare.py", "train.bin", "val.bin"]


@needs_bpe
@pytest.mark.slow
def test_openwebtext_killed_half_way_ends_as_if_it_had_not_been(work, tmp_path):
    pytest.importorskip("datasets")
    texts = make_source(tmp_path / "source", 4000, 1000)
    folder = work / "data" / "openwebtext"
    command = [sys.executable, str(folder / "prepare.py"), f"--source={tmp_path / 'source'}"]
    kept = 0
    for _ in range(2):
        process = subprocess.Popen(
            command,
            env=environment(work),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            state = folder / "unfinished.tmp"
            if state.exists() and json.loads(state.read_text())["train"]["documents"] > kept:
                break
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kept = json.loads(state.read_text())["train"]["documents"]
        assert 0 < kept < 4000
    result = prepare(work, "openwebtext", f"--source={tmp_path / 'source'}")
    assert result.returncode == 0 and f"going on after document {kept:,}" in result.stdout, result.stderr
    expected = expected_openwebtext(texts)
    for split in ("train", "val"):
        assert ids(work, "openwebtext", split).tolist() == expected[split]


@pytest.mark.parametrize("dataset", ["openwebtext", "fineweb"])
def test_openwebtext_and_fineweb_without_their_library_name_the_pip_install(work, tmp_path, dataset):
    write_text(tmp_path / "datasets.py", "raise ImportError('not installed')\n")
    line = error_after_progress(prepare(work, dataset, PYTHONPATH=str(tmp_path)))
    assert "pip install datasets" in line and "--source=" in line


@needs_bpe
@pytest.mark.slow
def test_fineweb_from_a_parquet_file_has_nanogpts_split_and_names_the_next_command(work, tmp_path):
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    texts = [f"Document {i} of the web: {'naïve 中文 ' * (i % 7)}\n" for i in range(2500)]
    # columns of FineWeb's own files
    table = pyarrow.table({"text": texts, "id": list(map(str, range(2500))), "language_score": [0.9] * 2500})
    (tmp_path / "source").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "source" / "000_00000.parquet")
    result = prepare(work, "fineweb", f"--source={tmp_path / 'source'}")
    assert result.returncode == 0, result.stderr
    expected = expected_openwebtext(texts)
    for split in ("train", "val"):
        assert ids(work, "fineweb", split).tolist() == expected[split]
        assert f"{split} has {len(expected[split]):,} tokens" in result.stdout
    assert "next: torchrun" in result.stdout
    assert "train.py config/train_gpt2_fineweb.py --dataset=fineweb\n" in result.stdout
    assert sorted(files_in(work / "data" / "fineweb")) == ["dataset.json", "prepare.py", "train.bin", "val.bin"]


@needs_bpe
@pytest.mark.parametrize("dataset, expected", [
    ("openwebtext", ("dylanebert/openwebtext", None)), ("fineweb", ("HuggingFaceFW/fineweb", "sample-10BT")),
])  # fmt: skip
def test_what_is_loaded_of_the_hub(work, tmp_path, dataset, expected):
    """A stand-in for `datasets` fails with what it was asked for."""
    stand_in = "def load_dataset(*names, **options):\n    raise OSError(f'asked for {names}, {options[\"split\"]}')\n"
    write_text(tmp_path / "datasets.py", stand_in + "concatenate_datasets = None\n")
    line = error_after_progress(prepare(work, dataset, PYTHONPATH=str(tmp_path)))
    assert line.startswith(f"error: --source={expected[0]} cannot be loaded: asked for {expected}, train; ")
    assert line.endswith("takes a folder of .parquet, .jsonl and .txt files too")
    assert sorted(files_in(work / "data" / dataset)) == ["prepare.py"]


@pytest.mark.slow
@needs_bpe
@pytest.mark.parametrize(
    "content, reason", [(None, "no .jsonl"), ('{"body": "x"}\n', "text"), ("{nonsense\n", "JSON")]
)
def test_an_openwebtext_source_that_cannot_be_read_gets_one_line(work, tmp_path, content, reason):
    pytest.importorskip("datasets")
    (tmp_path / "source").mkdir()
    if content:
        write_text(tmp_path / "source" / "a.jsonl", content)
    line = error_after_progress(prepare(work, "openwebtext", f"--source={tmp_path / 'source'}"))
    assert reason in line and "--source=" in line
    assert sorted(files_in(work / "data" / "openwebtext")) == ["prepare.py"]


@pytest.mark.slow
@needs_bpe
def test_a_source_that_is_a_file_is_not_looked_for_on_the_hub(work, tmp_path):
    pytest.importorskip("datasets")
    write_text(tmp_path / "book.txt", "a book")
    result = prepare(work, "openwebtext", f"--source={tmp_path / 'book.txt'}")
    assert error_line(result).endswith(
        "book.txt cannot be loaded: it is a file; --source= takes a folder of .parquet, .jsonl and .txt files too"
    )


@pytest.mark.slow
@needs_bpe
def test_openwebtext_without_a_network_gets_one_line(work):
    pytest.importorskip("datasets")
    assert "dylanebert/openwebtext" in error_after_progress(prepare(work, "openwebtext"))


# ----------------------------------------------------------------------------------------------
# the prepare scripts, run on a copy of the project


BOM = b"\xef\xbb\xbf"


@pytest.fixture
def prepare_here(run, tmp_path):
    """prepare(script, *arguments) -> Result, from the folder tmp_path, on a project of its own."""
    project = copy_project(tmp_path / "project")

    def prepare_here(dataset, *arguments, expect=0):
        return run(f"data/{dataset}/prepare.py", *arguments, project=project, cwd=tmp_path, expect=expect)

    prepare_here.data = project / "data"
    return prepare_here


@pytest.fixture
def gpt2(shared):
    if not (shared / "tiktoken").is_dir():
        pytest.skip("no ../shared/tiktoken")
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def both_ids(folder):
    return [np.fromfile(folder / f"{split}.bin", dtype="<u2").tolist() for split in ("train", "val")]


def characters(folder):
    train, val = both_ids(folder)
    itos = pickle.loads((folder / "meta.pkl").read_bytes())["itos"]
    return "".join(itos[i] for i in train + val)


@pytest.mark.parametrize("content", [b"one\r\ntwo\r\n" * 20, b"one\rtwo\r" * 20, BOM + b"one\r\ntwo\n" * 20])
def test_text_char_has_nanogpts_characters_whichever_system_a_text_is_from(prepare_here, tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    result = prepare_here("text_char", "a.txt", "--name=mine")
    assert characters(prepare_here.data / "mine") == "one\ntwo\n" * 20
    assert "vocab size: 6" in result.lines and "length of dataset in characters: 160" in result.lines


def test_the_bom_of_a_file_in_the_middle_is_no_character(prepare_here, tmp_path):
    for name, content in (("a", b"aa\r\n"), ("b", BOM + b"bb\r\n"), ("c", BOM + b"cc\r\n")):
        (tmp_path / f"{name}.txt").write_bytes(content * 9 if name == "a" else content)
    prepare_here("text_char", "a.txt", "b.txt", "c.txt", "--name=mine")
    assert characters(prepare_here.data / "mine") == "aa\n" * 9 + "bb\ncc\n"


def test_tiny_shakespeare_with_other_line_ends_is_the_same_dataset(prepare_here):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20
    for dataset, content in (("shakespeare_char", BOM + text.replace("\n", "\r\n").encode()),):
        (prepare_here.data / dataset / "input.txt").write_bytes(content)
        prepare_here(dataset)
        assert characters(prepare_here.data / dataset) == text


def test_text_bpe_and_shakespeare_have_the_tokens_of_line_feeds(prepare_here, tmp_path, gpt2):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20
    expected = gpt2.encode_ordinary(text[: int(len(text) * 0.9)])
    content = BOM + text.replace("\n", "\r\n").encode()
    (tmp_path / "a.txt").write_bytes(content)
    prepare_here("text_bpe", "a.txt", "--name=mine")
    assert both_ids(prepare_here.data / "mine")[0] == expected
    (prepare_here.data / "shakespeare" / "input.txt").write_bytes(content)
    prepare_here("shakespeare")
    assert both_ids(prepare_here.data / "shakespeare")[0] == expected


@pytest.mark.parametrize("dataset", ["text_char", pytest.param("text_bpe", marks=needs_bpe)])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_one_line_that_names_the_file_and_writes_nothing(prepare_here, tmp_path, dataset, encoding):
    (tmp_path / "a.txt").write_text("some words\n" * 50, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(("some words\n" * 50).encode(encoding))
    line = error_line(prepare_here(dataset, "a.txt", "b.txt", "--name=mine", expect=2))
    assert "b.txt" in line and "UTF-16" in line
    assert not (prepare_here.data / "mine").exists()


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_text_bpe_puts_endoftext_between_files(prepare_here, tmp_path, gpt2, fraction):
    """Wherever the split falls: in a file, or between two (0.25, 0.5)."""
    texts = [f"This is text {i} of four, with some words in it: naïve 中文 😀 end{i}" for i in range(4)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    assert len({len(text) for text in texts}) == 1
    prepare_here("text_bpe", *[f"{i}.txt" for i in range(4)], "--name=mine", f"--val_fraction={fraction}")
    n_train = int(len("".join(texts)) * (1 - fraction))
    expected, position = ([], []), 0
    for i, text in enumerate(texts):
        cut = min(max(n_train - position, 0), len(text))
        expected[0].extend(gpt2.encode_ordinary(text[:cut]))
        expected[1].extend(gpt2.encode_ordinary(text[cut:]))
        position += len(text)
        if i < 3:
            expected[position > n_train].append(50256)
    assert both_ids(prepare_here.data / "mine") == list(expected)


def test_text_bpe_puts_nothing_after_a_single_file_and_reads_endoftext_in_a_text_as_characters(prepare_here, tmp_path, gpt2):
    text = "one <|endoftext|> two, and more words\n" * 20
    (tmp_path / "a.txt").write_text(text)
    prepare_here("text_bpe", "a.txt", "--name=mine")
    train, val = both_ids(prepare_here.data / "mine")
    assert 50256 not in train + val and train == gpt2.encode_ordinary(text[: int(len(text) * 0.9)])


def test_text_bpe_of_a_folder_is_that_of_its_files(prepare_here, tmp_path, gpt2):
    for i in range(30):
        path = tmp_path / "docs" / f"part{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(BOM * (i % 2) + f"Document {i} has its words.\r\n".encode())
    (tmp_path / "docs" / "readme.md").write_text("not this one")
    prepare_here("text_bpe", "docs", "--name=mine")
    order = [i for part in range(3) for i in range(30) if i % 3 == part]
    found = gpt2.decode(sum(both_ids(prepare_here.data / "mine"), []))
    assert found == "<|endoftext|>".join(f"Document {i} has its words.\n" for i in order)


def test_text_char_of_a_folder_has_its_texts_one_after_the_other(prepare_here, tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("b", "a", "c"):
        (tmp_path / "docs" / f"{name}.txt").write_text(name * 20)
    prepare_here("text_char", "docs", "--name=mine")
    assert characters(prepare_here.data / "mine") == "a" * 20 + "b" * 20 + "c" * 20


@pytest.mark.parametrize("dataset", ["text_char", "text_bpe"])
def test_an_empty_folder_is_one_line(prepare_here, tmp_path, dataset):
    (tmp_path / "docs").mkdir()
    line = error_line(prepare_here(dataset, "docs", "--name=mine", expect=2))
    assert line == "docs: there is no .txt file in this folder"
    assert not (prepare_here.data / "mine").exists()


def test_openwebtexts_documents_stay_as_they_are_but_for_a_leading_bom(gpt2):
    """The function alone: the script itself downloads, or needs another library."""
    from data.documents import encode
    from data.codecs import BPECodec

    ids, n_bytes, changed = encode(["\ufeffa\r\nb\r", None, "c\ufeffd", ""], BPECodec())
    expected = [*gpt2.encode_ordinary("a\r\nb\r"), 50256, *gpt2.encode_ordinary("c\ufeffd"), 50256, 50256]
    assert ids.tolist() == expected and ids.dtype == np.uint16 and n_bytes == len("a\r\nb\rc\ufeffd".encode())


# ----------------------------------------------------------------------------------------------
# printed commands


def printed(result, script):
    """The words of the printed command that runs `script`."""
    [line] = [line for line in result.lines if script in line]
    return shlex.split(line[line.index("python ") :])


def test_the_next_command_can_be_pasted_whatever_the_names(run, tmp_path):
    project = copy_project(tmp_path / "My Projects" / "it's nano")
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    name = "my text $HOME;ls"
    result = run("data/text_char/prepare.py", "a.txt", f"--name={name}", project=project, cwd=tmp_path)
    words = printed(result, "train.py")
    assert words[0] == "python" and words[2:] == ["config/train_text_char.py", f"--dataset={name}", f"--out_dir=out-{name}"]
    assert (tmp_path / words[1]).samefile(project / "train.py")
    line = error_line(run("train.py", "--dataset=text_char", project=project, cwd=tmp_path, expect=2))
    words = shlex.split(line[line.index("python ") :])
    assert (tmp_path / words[1]).samefile(project / "data" / "text_char" / "prepare.py") and len(words) == 2
    line = error_line(run("train.py", project=project, cwd=tmp_path, expect=2))
    commands = [shlex.split(part) for part in line.split("python ")[1:]]
    assert [Path(words[0].rstrip(";")).parent.name for words in commands] == ["openwebtext", "shakespeare_char"]


def test_a_plain_command_is_printed_without_quotes(prepare_here, tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    result = prepare_here("text_char", "a.txt", "--name=mine")
    expected = "next: python project/train.py config/train_text_char.py --dataset=mine --out_dir=out-mine"
    assert result.lines[-1] == expected
