"""Datasets: the prepare scripts, the codecs, and what they make of bad input.

Scripts run on a copy of data/ in a temporary folder, so that nothing in the checkout is written.
"""

import hashlib
import http.server
import json
import os
import pickle
import random
import runpy
import shutil
import signal
import string
import subprocess
import sys
import sysconfig
import threading
import time

import numpy as np
import pytest
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from configurator import ROOT, UserError
from data import text as data_text
from data import tokens as data_tokens
from data.tokens import BPECodec, CharCodec, bpe_pieces, codec_for, read_meta

SHARED = os.path.join(ROOT, "..", "shared")
SHAKESPEARE = os.path.join(SHARED, "tinyshakespeare", "input.txt")
VOCABULARY = os.path.abspath(os.path.join(SHARED, "tiktoken"))
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
NO_NETWORK = dict.fromkeys(PROXIES, "http://127.0.0.1:9")  # where no one listens
UNICODE = "Äpfel, naïve, 中文。\r\n\tΩ\x00\u2028 \ufeff😀 e\u0301\n"

needs_shakespeare = pytest.mark.skipif(not os.path.exists(SHAKESPEARE), reason="no ../shared/tinyshakespeare")
needs_bpe = pytest.mark.skipif(not os.path.isdir(VOCABULARY), reason="no ../shared/tiktoken")


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch):
    if os.path.isdir(VOCABULARY):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", VOCABULARY)


@pytest.fixture
def work(tmp_path):
    """A folder with configurator.py and data/, no dataset prepared."""
    ignore = shutil.ignore_patterns("*.bin", "*.pkl", "*.tmp", "input.txt", "__pycache__")
    shutil.copytree(os.path.join(ROOT, "data"), tmp_path / "data", ignore=ignore)
    shutil.copy(os.path.join(ROOT, "configurator.py"), tmp_path)
    return tmp_path


def environment(work, **more):
    hub = {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"}
    return os.environ | NO_NETWORK | hub | {"PYTHONDONTWRITEBYTECODE": "1"} | more


def prepare(work, dataset, *arguments, **env):
    """Runs the copy's prepare script as a user would, from another folder and without a network."""
    command = [sys.executable, str(work / "data" / dataset / "prepare.py"), *map(str, arguments)]
    away = os.path.abspath(os.sep)
    return subprocess.run(
        command, cwd=away, env=environment(work, **env), capture_output=True, text=True, timeout=120
    )


def error_line(result, code=2):
    """The one error line of a run that failed as it should."""
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def ids(work, dataset, split):
    return np.fromfile(work / "data" / dataset / f"{split}.bin", dtype="<u2")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_text(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


# ----------------------------------------------------------------------------------------------
# the prepare scripts


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
    assert sorted(files_in(folder)) == ["input.txt", "meta.pkl", "prepare.py", "train.bin", "val.bin"]


@needs_shakespeare
@needs_bpe
def test_tiny_shakespeare_in_byte_pairs_has_nanogpts_counts_and_finds_the_other_datasets_text(work):
    shutil.copy(SHAKESPEARE, work / "data" / "shakespeare_char")
    result = prepare(work, "shakespeare")
    assert result.returncode == 0, result.stderr
    assert "train has 301,966 tokens" in result.stdout and "val has 36,059 tokens" in result.stdout
    train, val = ids(work, "shakespeare", "train"), ids(work, "shakespeare", "val")
    assert (len(train), len(val)) == (301_966, 36_059)
    assert sorted(files_in(work / "data" / "shakespeare")) == ["prepare.py", "train.bin", "val.bin"]


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
    "dataset", ["shakespeare_char", "shakespeare", "text_char", "text_bpe", "openwebtext"]
)
def test_help_shows_every_setting(dataset, monkeypatch, capsys):
    script = os.path.join(ROOT, "data", dataset, "prepare.py")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as done:
        runpy.run_path(script, run_name="__main__")
    shown = capsys.readouterr().out
    assert done.value.code == 0 and f"python data/{dataset}/prepare.py" in shown
    settings = [line for line in shown.splitlines() if line.startswith("  --")]
    names = {"text_char": ["name"], "text_bpe": ["name", "val_fraction"], "openwebtext": ["source", "name"]}
    assert [line.split("=")[0][4:] for line in settings] == names.get(dataset, [])
    assert all(len(line.split(None, 1)[1]) > 20 for line in settings)  # each with its comment


# ----------------------------------------------------------------------------------------------
# bad input: one line, and no file changed


def test_without_a_network_the_one_line_says_where_to_put_the_file(work):
    before = files_in(work / "data" / "shakespeare_char")
    line = error_line(prepare(work, "shakespeare_char"))
    assert str(work / "data" / "shakespeare_char" / "input.txt") in line and "https://" in line
    assert files_in(work / "data" / "shakespeare_char") == before


def test_without_gpt2s_vocabulary_the_one_line_names_tiktoken_cache_dir(work, tmp_path):
    write_text(tmp_path / "a.txt", "some text\n" * 100)
    result = prepare(work, "text_bpe", tmp_path / "a.txt", TIKTOKEN_CACHE_DIR=str(tmp_path / "nothing"))
    assert "TIKTOKEN_CACHE_DIR" in error_line(result)
    assert sorted(files_in(work / "data" / "text_bpe")) == ["prepare.py"]


def test_a_bad_file_leaves_the_old_dataset_as_it_was(work, tmp_path):
    folder = work / "data" / "text_char"
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (folder / name).write_bytes(b"old")
    before = files_in(folder)
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    assert "latin1.txt" in error_line(prepare(work, "text_char", tmp_path / "latin1.txt"))
    assert files_in(folder) == before


@pytest.mark.parametrize("argument", ["--name=../elsewhere", "--name=", "--name=a/b", "--name=.hidden"])
def test_a_name_outside_data_is_refused(argument):
    with pytest.raises(UserError, match="--name="):
        data_text.data_folder(argument[7:])


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "there is no such file"),
        (b"", "is empty"),
        (b"ab\xffcd", "byte 2: invalid start byte"),
        ("aé".encode() * 5 + b"\xc3", "byte 15: unexpected end"),
        ("text".encode("utf-16"), "byte 0"),
    ],
)
@pytest.mark.parametrize("read", [3, 1 << 17])
def test_a_file_that_is_no_text_is_named_with_the_byte(tmp_path, monkeypatch, content, reason, read):
    monkeypatch.setattr(data_text, "READ", read)
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        list(data_text.text_chunks([str(path)]))
    assert str(path) in str(error.value)


def test_a_folder_or_a_pipe_is_no_text_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="no such file"):
            list(data_text.text_chunks([str(path)]))


def test_a_text_too_short_to_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="too few"):
        data_text.prepare_chars(str(tmp_path / "new"), "abcdefgh")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_a_val_fraction_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(UserError, match="val_fraction"):
        data_text.split_at(1000, fraction)


def test_more_characters_than_uint16_holds_are_refused_and_65536_are_not(tmp_path):
    characters = [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    with pytest.raises(UserError, match="65,537 different characters"):
        data_text.prepare_chars(str(tmp_path), "".join(characters[: (1 << 16) + 1]))
    assert not list(tmp_path.iterdir())
    data_text.prepare_chars(str(tmp_path), "".join(characters[: 1 << 16]))
    meta = read_meta(tmp_path / "meta.pkl")
    assert meta["vocab_size"] == 1 << 16 and meta["stoi"][characters[(1 << 16) - 1]] == (1 << 16) - 1
    assert np.fromfile(tmp_path / "val.bin", dtype="<u2")[-1] == (1 << 16) - 1


def test_a_dataset_is_written_whole_or_not_at_all(tmp_path):
    one = [np.array([1, 2, 3])]
    assert data_text.write_dataset(str(tmp_path), one, one, {"vocab_size": 4}) == [3, 3]
    before = files_in(tmp_path)
    assert before["train.bin"] == b"\1\0\2\0\3\0"

    def stops():
        yield np.array([5])
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        data_text.write_dataset(str(tmp_path), [np.array([4])], stops())
    with pytest.raises(UserError, match="100,000"):
        data_text.write_dataset(str(tmp_path), [np.array([4, 100_000])], one)
    assert files_in(tmp_path) == before
    data_text.write_dataset(str(tmp_path), one, one)
    assert sorted(files_in(tmp_path)) == ["train.bin", "val.bin"]  # the old meta.pkl told of other ids


# ----------------------------------------------------------------------------------------------
# download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(url, content) of a file on a local server; url + 'cut' breaks off half-way, other names are 404."""
    content = os.urandom(300_000)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/file", "/filecut") else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: 150_000 if self.path == "/filecut" else None])

        def log_message(self, *arguments):
            pass

    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/file", content
    httpd.shutdown()


def test_a_download_arrives_whole(server, tmp_path, capsys):
    url, content = server
    data_text.download(url, str(tmp_path / "x"), hashlib.sha256(content).hexdigest())
    assert files_in(tmp_path) == {"x": content}
    assert "300,000 of 300,000" in capsys.readouterr().err


@pytest.mark.parametrize(
    "suffix, digest, reason",
    [("", "0" * 64, "SHA-256"), ("cut", None, "Error"), ("missing", None, "404")],
)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(server, tmp_path, suffix, digest, reason):
    url, content = server
    with pytest.raises(UserError, match=reason) as error:
        data_text.download(url + suffix, str(tmp_path / "x"), digest or hashlib.sha256(content).hexdigest())
    assert f"save it as {tmp_path / 'x'}" in str(error.value)
    assert files_in(tmp_path) == {}


# ----------------------------------------------------------------------------------------------
# meta.pkl

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
        codec_for(meta)


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
# codecs


def tiktoken_gpt2():
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def test_characters_go_to_ids_and_back_and_padding_is_not_known():
    codec = codec_for(ABC | {"vocab_size": 8})
    assert codec.encode("aéb") == [0, 2, 1] and codec.decode([0, 2, 1]) == "aéb"
    assert codec.vocab_size == 8 and [codec.known(i) for i in range(8)] == [True] * 3 + [False] * 5
    assert codec.piece(2) == "é".encode()


@pytest.mark.parametrize(
    "character, shown", [("ö", "'ö' (U+00F6)"), ("\n", "'\\n' (U+000A)"), ("😀", "U+1F600")]
)
def test_a_character_that_the_vocabulary_lacks_is_named(character, shown):
    with pytest.raises(UserError) as error:
        codec_for(ABC).encode("ab" + character)
    assert shown in str(error.value)


def test_a_codec_comes_back_from_a_checkpoint(tmp_path):
    torch.save({"meta": ABC}, tmp_path / "ckpt.pt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert codec_for(saved["meta"]).encode("é") == [2]
    with pytest.raises(UserError, match="ckpt.pt"):
        codec_for({"vocab_size": 3, "stoi": {"a": 9}, "itos": {9: "a"}}, "ckpt.pt")


@needs_bpe
def test_byte_pairs_go_to_ids_and_back_and_padding_is_not_known():
    codec = codec_for(None)
    assert codec.encode("Hello world") == [15496, 995]  # GPT-2's own ids
    assert codec.encode("a<|endoftext|>") == [64, 50256]
    assert codec.encode_ordinary("a<|endoftext|>").tolist() == [64, 27, 91, 437, 1659, 5239, 91, 29]
    assert codec.decode(codec.encode(UNICODE)) == UNICODE
    assert b"".join(map(codec.piece, codec.encode(UNICODE))) == UNICODE.encode()
    assert codec.decode(codec.encode("😀")[:1]) == "\ufffd"
    assert codec.vocab_size == 50257
    assert [i for i in range(50304) if not codec.known(i)] == list(range(50257, 50304))


def encoded_in_pieces(texts):
    codec = BPECodec()
    pieces = list(bpe_pieces(texts))
    return pieces, [i for piece in pieces for i in codec.encode_ordinary(piece).tolist()]


@needs_bpe
@pytest.mark.parametrize("seed", range(40))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch, seed):
    monkeypatch.setattr(data_tokens, "PIECE", 64)
    rng = random.Random(seed)
    # words and white space of every kind, none of them so long that a piece must end inside one
    odd = ["\t", "\r\n", "\xa0", "\u3000", "\x1c", "\x85", "\u2028", "\v", "\u200b"]
    spaces = [" ", " ", "\n", "\n\n", "   ", "\n  ", "  \n"]
    words = [
        "'s",
        "'ll",
        "don't",
        "e\u0301",
        "中文",
        "😀",
        "x²",
        "१२",
        "\ufeff",
        "--",
        "...",
        "<|endoftext|>",
    ]
    letters = string.ascii_letters + "019'."
    parts = []
    for _ in range(2000):
        parts.append(rng.choice(spaces + [rng.choice(odd), " " + rng.choice(odd)]) * rng.randint(1, 2))
        parts.append(rng.choice([rng.choice(words), "".join(rng.choices(letters, k=rng.randint(1, 8)))]))
    text = "".join(parts)
    cuts = sorted(rng.randint(0, len(text)) for _ in range(50))
    texts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=False)]
    pieces, tokens = encoded_in_pieces(texts)
    assert "".join(pieces) == text and len(pieces) > 50
    assert tokens == tiktoken_gpt2().encode_ordinary(text)


@needs_bpe
@needs_shakespeare
@pytest.mark.parametrize("size", [1000, 1 << 17])
def test_tiny_shakespeare_in_pieces_has_the_tokens_of_the_whole(monkeypatch, size):
    monkeypatch.setattr(data_tokens, "PIECE", size)
    with open(SHAKESPEARE, encoding="utf-8") as f:
        text = f.read()
    pieces, tokens = encoded_in_pieces([text])
    assert len(pieces) > 5 and tokens == tiktoken_gpt2().encode_ordinary(text)


@needs_bpe
@pytest.mark.parametrize("text", [" " * 1_500_000 + "x", "中" * 1_000_000, "a b" + " " * 1_200_000 + "x"])
def test_a_text_without_a_place_to_cut_is_cut_all_the_same(text):
    pieces, tokens = encoded_in_pieces([text])  # tiktoken panics on a million blanks in one text
    assert max(map(len, pieces)) < 1 << 19 and BPECodec().decode(tokens) == text


@pytest.mark.parametrize("read", [1, 2, 3, 7, 1000])
def test_a_text_is_read_by_position_whatever_the_reads_cut(tmp_path, monkeypatch, read):
    monkeypatch.setattr(data_text, "READ", read)
    paths = [str(write_text(tmp_path / name, UNICODE * 3)) for name in ("one", "two")]
    text = (UNICODE * 6).replace("\r\n", "\n")
    assert "".join(data_text.text_chunks(paths)) == text
    for cut in (1, len(text) // 2, len(text) - 1):
        assert "".join(data_text.text_chunks(paths, 0, cut)) == text[:cut]
        assert "".join(data_text.text_chunks(paths, cut, len(text))) == text[cut:]


@needs_bpe
@pytest.mark.slow
def test_text_bpe_takes_no_more_memory_for_a_longer_text(work, tmp_path):
    line = "The quick brown fox jumps over the lazy dog, and so on and on.\n"
    peak = {}
    for size in (1, 64):
        write_text(tmp_path / "long.txt", line * (size << 20 >> 6))
        code = (
            "import atexit, resource, runpy, sys; sys.argv[:] = sys.argv[1:];"
            "atexit.register(lambda: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss));"
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        command = [
            sys.executable,
            "-c",
            code,
            str(work / "data/text_bpe/prepare.py"),
            str(tmp_path / "long.txt"),
        ]
        result = subprocess.run(command, env=environment(work), capture_output=True, text=True, timeout=120)
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
    assert sorted(files_in(folder)) == ["prepare.py", "train.bin", "val.bin"]

    # as a stop after 1,000 documents leaves it, with marks for their tokens, and half-written ones behind
    done = [i for i, token in enumerate(expected["train"]) if token == 50256][999] + 1
    with open(folder / "train.bin.tmp", "wb") as f:
        f.write(np.full(done, 7, dtype="<u2").tobytes() + b"half-written")
    first = tiktoken_gpt2().decode(expected["train"][: expected["train"].index(50256)])
    state = {"train": {"documents": 1000, "tokens": done}, "val": {"documents": 0, "tokens": 0}}
    state["of"] = [str(tmp_path / "source"), 3001, hashlib.sha256(first.encode()).hexdigest()]
    write_text(folder / "progress.tmp", json.dumps(state))
    (tmp_path / "other").mkdir()
    for i in range(3):
        write_text(tmp_path / "other" / f"{i}.txt", "another source\n")
    line = error_line(prepare(work, "openwebtext", f"--source={tmp_path / 'other'}"))
    assert "unfinished" in line and str(tmp_path / "source") in line
    result = prepare(work, "openwebtext", f"--source={tmp_path / 'source'}")
    assert result.returncode == 0 and "going on after document 1,000" in result.stdout, result.stderr
    assert ids(work, "openwebtext", "train").tolist() == [7] * done + expected["train"][done:]
    assert ids(work, "openwebtext", "val").tolist() == expected["val"]
    assert sorted(files_in(folder)) == ["prepare.py", "train.bin", "val.bin"]


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
            progress = folder / "progress.tmp"
            if progress.exists() and json.loads(progress.read_text())["train"]["documents"] > kept:
                break
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kept = json.loads(progress.read_text())["train"]["documents"]
        assert 0 < kept < 4000
    result = prepare(work, "openwebtext", f"--source={tmp_path / 'source'}")
    assert result.returncode == 0 and f"going on after document {kept:,}" in result.stdout, result.stderr
    expected = expected_openwebtext(texts)
    for split in ("train", "val"):
        assert ids(work, "openwebtext", split).tolist() == expected[split]


def test_openwebtext_without_its_library_names_the_pip_install(work, tmp_path):
    write_text(tmp_path / "datasets.py", "raise ImportError('not installed')\n")
    line = error_line(prepare(work, "openwebtext", PYTHONPATH=str(tmp_path)))
    assert "pip install datasets" in line


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
    line = error_line(prepare(work, "openwebtext", f"--source={tmp_path / 'source'}"))
    assert reason in line and "--source=" in line
    assert sorted(files_in(work / "data" / "openwebtext")) == ["prepare.py"]


@pytest.mark.slow
@needs_bpe
def test_openwebtext_without_a_network_gets_one_line(work):
    pytest.importorskip("datasets")
    assert "dylanebert/openwebtext" in error_line(prepare(work, "openwebtext"))
