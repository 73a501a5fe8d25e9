"""data/text.py: texts that are read, split, downloaded, and written as datasets."""

import hashlib
import http.server
import io
import itertools
import os
import threading

import numpy as np
import pytest
from prepare_scripts import PROXIES, UNICODE, files_in, write_text

from data import text as data_text
from data.text_files import text_chunks, text_files
from data.tiny_shakespeare import shakespeare
from data.meta import read_meta
from nanogpt.errors import UserError
from nanogpt.text_file import decoded, read_text

@pytest.mark.parametrize("read", [1, 2, 3, 7, 1000])
def test_a_text_is_read_by_position_whatever_the_reads_cut(tmp_path, monkeypatch, read):
    monkeypatch.setattr("data.text_files.READ", read)
    paths = [str(write_text(tmp_path / name, UNICODE * 3)) for name in ("one", "two")]
    text = (UNICODE * 6).replace("\r\n", "\n")
    assert "".join(text_chunks(paths)) == text
    for cut in (1, len(text) // 2, len(text) - 1):
        assert "".join(text_chunks(paths, 0, cut)) == text[:cut]
        assert "".join(text_chunks(paths, cut, len(text))) == text[cut:]


@pytest.mark.parametrize("argument", ["--name=../elsewhere", "--name=", "--name=a/b", "--name=.hidden", "--name=text.py"])
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
        ("text".encode("utf-16"), "UTF-16"),
        (b"\x7fELF" + bytes(range(1, 61)) + b"\xff", r"byte 64: invalid start byte\)$"),  # no word of UTF-16
    ],
)
@pytest.mark.parametrize("read", [3, 1 << 17])
def test_a_file_that_is_no_text_is_named_with_the_byte(tmp_path, monkeypatch, content, reason, read):
    monkeypatch.setattr("data.text_files.READ", read)
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        list(text_chunks([str(path)]))
    assert str(path) in str(error.value)


def test_a_folder_or_a_pipe_is_no_text_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="a folder, a pipe or a device"):
            list(text_chunks([str(path)]))


def test_a_text_too_short_to_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="too short"):
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
            sent = {"/file": content, "/filecut": content[:150_000]}
            self.wfile.write(sent.get(self.path, bytes(len(content))))

        def log_message(self, *arguments):
            pass

    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/file", content
    httpd.shutdown()


@pytest.fixture
def fetched(server, tmp_path, monkeypatch):
    """fetched(suffix, digest) -> the path that shakespeare() returns, of that file on the server."""
    url, content = server
    monkeypatch.setattr("data.folder.ROOT", str(tmp_path / "nothing here"))

    def fetched(suffix="", digest=None):
        monkeypatch.setattr("data.tiny_shakespeare.URL", url + suffix)
        monkeypatch.setattr("data.tiny_shakespeare.SHA256", digest or hashlib.sha256(content).hexdigest())
        return shakespeare(str(tmp_path))

    return fetched


def test_a_download_arrives_whole_and_once(server, fetched, tmp_path, capsys):
    url, content = server
    assert fetched() == fetched("missing") == str(tmp_path / "input.txt")
    assert files_in(tmp_path) == {"input.txt": content}
    assert capsys.readouterr().out == f"downloading {url}\n"


@pytest.mark.parametrize("arguments, reason", [(("", "0" * 64), "SHA-256"), (("cut",), "Error"), (("missing",), "404")])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(fetched, tmp_path, arguments, reason):
    with pytest.raises(UserError, match=reason) as error:
        fetched(*arguments)
    assert f"save it as {tmp_path / 'input.txt'}" in str(error.value)
    assert files_in(tmp_path) == {}


# ----------------------------------------------------------------------------------------------
# data/text.py and nanogpt/text_file.py: how texts are read


BOM = b"\xef\xbb\xbf"
ODD = "Äpfel, naïve, 中文.\tΩ\x00\u2028 \x85\x0b\x0c\x1c😀 e\u0301\n"  # line ends of other kinds are characters


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("read", [1, 2, 3, 7, 1 << 17])
@pytest.mark.parametrize("content, text", [
    (b"a\r\nb\r\n", "a\nb\n"), (b"a\rb\r", "a\nb\n"), (b"a\nb\n", "a\nb\n"), (b"a\r\r\nb\n\r", "a\n\nb\n\n"), (b"\r", "\n"),
    (b"\r\n", "\n"), (BOM + b"a\r\n", "a\n"), (BOM + b"\r\na", "\na"), (b"a" + BOM + b"b", "a\ufeffb"),
    (BOM + BOM + b"a", "\ufeffa"), (ODD.encode(), ODD), (BOM + ODD.encode() * 3, ODD * 3),
])  # fmt: skip
def test_line_ends_become_line_feeds_and_a_bom_goes_wherever_a_read_cuts(tmp_path, monkeypatch, read, content, text):
    monkeypatch.setattr("data.text_files.READ", read)
    path = write(tmp_path / "a.txt", content)
    assert "".join(text_chunks([path])) == text
    assert read_text(path) == text
    for cut in range(len(text) + 1):  # positions are those of the text as it is read
        assert "".join(text_chunks([path], 0, cut)) + "".join(text_chunks([path], cut)) == text


def test_it_is_what_open_reads(tmp_path):
    path = write(tmp_path / "a.txt", BOM + ("one\r\ntwo\rthree\n\r\r\n" + ODD).encode())
    with open(path, encoding="utf-8-sig") as f:
        assert read_text(path) == f.read()


@pytest.mark.parametrize("read", [1, 3, 1 << 17])
def test_the_bom_of_each_of_several_files_goes_and_a_line_end_is_not_joined_over_them(tmp_path, monkeypatch, read):
    monkeypatch.setattr("data.text_files.READ", read)
    contents = [b"one\r", BOM + b"\ntwo\r\n", BOM + b"three"]
    paths = [write(tmp_path / f"{i}.txt", content) for i, content in enumerate(contents)]
    text = "one\n\ntwo\nthree"
    assert "".join(text_chunks(paths)) == text
    for cut in range(len(text) + 1):
        assert "".join(text_chunks(paths, 0, cut)) + "".join(text_chunks(paths, cut)) == text


UTF16 = [
    *itertools.product(["plain words\r\nand lines\r\n", "naïve é\n", "ab"], ["utf-16-le", "utf-16-be", "utf-16"]),
    *itertools.product(["Ελληνικά και άλλα\n", "Русский текст, и ещё\n", "中文"], ["utf-16"]),  # known by the mark alone
]


@pytest.mark.parametrize("text, encoding", UTF16)
def test_utf16_is_named_as_such_with_and_without_a_bom(tmp_path, text, encoding):
    path = write(tmp_path / "a.txt", text.encode(encoding))
    for read in (lambda: list(text_chunks([path])), lambda: read_text(path)):
        with pytest.raises(UserError, match="not UTF-8 text.*UTF-16: save it as UTF-8") as error:
            read()
        assert path in str(error.value)


def test_utf16_is_seen_before_any_of_it_is_taken_in_a_long_file():
    file = io.BufferedReader(io.BytesIO(("some words\n" * 30_000).encode("utf-16-le")))
    with pytest.raises(UserError, match="UTF-16"):
        next(decoded(file, "a.txt", 99))


@pytest.mark.parametrize("text", [ODD, "a\x00b\x00\x00\x00cdefghijklmn", "tab\tand\tline\n" * 9, "中文" * 50, "\x01\x02 words"])
def test_a_text_with_a_few_nuls_is_not_taken_for_utf16(tmp_path, text):
    assert read_text(write(tmp_path / "a.txt", text)) == text


@pytest.mark.parametrize("content, reason", [(b"ab\xffcd", "byte 2: invalid start byte"), (BOM + b"a\xff", "byte 4"),
                                             ("aé".encode() * 5 + b"\xc3", "byte 15: unexpected end")])  # fmt: skip
@pytest.mark.parametrize("read", [1, 3, 1 << 17])
def test_the_byte_that_is_no_utf8_is_named(tmp_path, monkeypatch, content, reason, read):
    monkeypatch.setattr("data.text_files.READ", read)
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(UserError, match=reason) as error:
        list(text_chunks([path]))
    assert "UTF-16" not in str(error.value)


def test_the_byte_that_is_no_utf8_is_named_in_a_long_file(tmp_path):
    path = write(tmp_path / "a.txt", BOM + "é".encode() * 500_000 + b"\xff" + b"a" * 9)
    for read in (lambda: list(text_chunks([path])), lambda: read_text(path)):
        with pytest.raises(UserError, match="byte 1,000,003: invalid start byte"):
            read()


def test_a_pipe_is_read_as_a_file_is():
    """As `train.py <(command)` has a config file."""
    for content, expected in ((BOM + b"a\r\nb", "a\nb"), (b"ab\xff", "byte 2")):
        reads, writes = os.pipe()
        os.write(writes, content)
        os.close(writes)
        if expected == "a\nb":
            assert read_text(f"/dev/fd/{reads}") == expected
        else:
            with pytest.raises(UserError, match=expected):
                read_text(f"/dev/fd/{reads}")
        os.close(reads)


@pytest.mark.parametrize("content", [b"", BOM])
def test_a_file_without_any_text_is_empty(tmp_path, content):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(UserError, match="the file is empty"):
        list(text_chunks([path]))


def test_a_folder_stands_for_every_txt_below_it_in_order_of_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.txt", "b/10.txt", "b/a/z.txt", "b/a.txt", "b/C.TXT", "b/no.md", "b/txt", "b/x.txt.gz", "c/q.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "folder.txt").mkdir()
    assert text_files(["b"]) == ["b/10.txt", "b/2.txt", "b/C.TXT", "b/a.txt", "b/a/z.txt"]
    assert text_files(["c", "b/no.md", "b/a"]) == ["c/q.txt", "b/no.md", "b/a/z.txt"]
    assert text_files(["nowhere.txt"]) == ["nowhere.txt"] and text_files([]) == []


def test_below_a_folder_hidden_empty_and_repeated_files_are_left_out_and_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    book = tmp_path / ".corpora" / "books"  # the FILE itself may lie in a hidden folder
    (book / ".ipynb_checkpoints").mkdir(parents=True)
    (book / "deeper").mkdir()
    for name in ("book.txt", ".ipynb_checkpoints/book-checkpoint.txt", "._book.txt", "deeper/z.txt"):
        write(book / name, b"some text")
    write(book / "empty.txt", b"")
    write(book / ".DS_Store", b"no text anyway")
    (book / "circle").symlink_to(book)
    (book / "twice.txt").symlink_to(book / "book.txt")
    (book / "gone.txt").symlink_to(book / "a file that is not there")
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "linked.txt", b"some text")
    (book / "link").symlink_to(tmp_path / "elsewhere")
    here = os.path.join(".corpora", "books")
    assert text_files([here]) == [os.path.join(here, name) for name in ("book.txt", "deeper/z.txt", "link/linked.txt")]
    assert capsys.readouterr().out == (
        f"{here}: left out as hidden, empty or there twice: 6, the first is ._book.txt\n"
    )
    (book / "link").unlink()
    assert text_files([os.path.join(here, "deeper"), os.path.join(here, "._book.txt")])[1].endswith("._book.txt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("inside", [[], ["a.md"], ["deeper/b.py"]])
def test_a_folder_without_a_txt_is_one_line(tmp_path, inside):
    (tmp_path / "folder").mkdir()
    for name in inside:
        (tmp_path / "folder" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_text("x")
    with pytest.raises(UserError, match="there is no .txt file in this folder") as error:
        text_files([str(tmp_path / "folder")])
    assert str(tmp_path / "folder") in str(error.value)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (tmp_path / "closed").mkdir(mode=0)
    write(tmp_path / "a.txt", "x")
    with pytest.raises(OSError):
        text_files([str(tmp_path)])
