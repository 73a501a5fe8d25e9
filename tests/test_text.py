"""data/text.py: texts that are read, split, downloaded, and written as datasets."""

import hashlib
import http.server
import os
import threading

import numpy as np
import pytest
from prepare_scripts import PROXIES, UNICODE, files_in, write_text

from data import text as data_text
from data.tokens import read_meta
from nanogpt.errors import UserError


@pytest.mark.parametrize("read", [1, 2, 3, 7, 1000])
def test_a_text_is_read_by_position_whatever_the_reads_cut(tmp_path, monkeypatch, read):
    monkeypatch.setattr(data_text, "READ", read)
    paths = [str(write_text(tmp_path / name, UNICODE * 3)) for name in ("one", "two")]
    text = UNICODE * 6
    assert "".join(data_text.text_chunks(paths)) == text
    for cut in (1, len(text) // 2, len(text) - 1):
        assert "".join(data_text.text_chunks(paths, 0, cut)) == text[:cut]
        assert "".join(data_text.text_chunks(paths, cut, len(text))) == text[cut:]


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
