"""The prepare scripts, run on a copy of the project."""

import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, copy_project, error_line

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def prepare(run, tmp_path):
    """prepare(script, *arguments) -> Result, from the folder tmp_path, on a project of its own."""
    project = copy_project(tmp_path / "project")

    def prepare(dataset, *arguments, expect=0):
        return run(f"data/{dataset}/prepare.py", *arguments, project=project, cwd=tmp_path, expect=expect)

    prepare.data = project / "data"
    return prepare


@pytest.fixture
def gpt2(shared):
    if not (shared / "tiktoken").is_dir():
        pytest.skip("no ../shared/tiktoken")
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def ids(folder):
    return [np.fromfile(folder / f"{split}.bin", dtype="<u2").tolist() for split in ("train", "val")]


def characters(folder):
    train, val = ids(folder)
    itos = pickle.loads((folder / "meta.pkl").read_bytes())["itos"]
    return "".join(itos[i] for i in train + val)


@pytest.mark.parametrize("content", [b"one\r\ntwo\r\n" * 20, b"one\rtwo\r" * 20, BOM + b"one\r\ntwo\n" * 20])
def test_text_char_has_nanogpts_characters_whichever_system_a_text_is_from(prepare, tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    result = prepare("text_char", "a.txt", "--name=mine")
    assert characters(prepare.data / "mine") == "one\ntwo\n" * 20
    assert "vocab size: 6" in result.lines and "length of dataset in characters: 160" in result.lines


def test_the_bom_of_a_file_in_the_middle_is_no_character(prepare, tmp_path):
    for name, content in (("a", b"aa\r\n"), ("b", BOM + b"bb\r\n"), ("c", BOM + b"cc\r\n")):
        (tmp_path / f"{name}.txt").write_bytes(content * 9 if name == "a" else content)
    prepare("text_char", "a.txt", "b.txt", "c.txt", "--name=mine")
    assert characters(prepare.data / "mine") == "aa\n" * 9 + "bb\ncc\n"


def test_tiny_shakespeare_with_other_line_ends_is_the_same_dataset(prepare):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20
    for dataset, content in (("shakespeare_char", BOM + text.replace("\n", "\r\n").encode()),):
        (prepare.data / dataset / "input.txt").write_bytes(content)
        prepare(dataset)
        assert characters(prepare.data / dataset) == text


def test_text_bpe_and_shakespeare_have_the_tokens_of_line_feeds(prepare, tmp_path, gpt2):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20
    expected = gpt2.encode_ordinary(text[: int(len(text) * 0.9)])
    content = BOM + text.replace("\n", "\r\n").encode()
    (tmp_path / "a.txt").write_bytes(content)
    prepare("text_bpe", "a.txt", "--name=mine")
    assert ids(prepare.data / "mine")[0] == expected
    (prepare.data / "shakespeare" / "input.txt").write_bytes(content)
    prepare("shakespeare")
    assert ids(prepare.data / "shakespeare")[0] == expected


@pytest.mark.parametrize("dataset", ["text_char", "text_bpe"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_one_line_that_names_the_file_and_writes_nothing(prepare, tmp_path, dataset, encoding):
    (tmp_path / "a.txt").write_text("some words\n" * 50, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(("some words\n" * 50).encode(encoding))
    line = error_line(prepare(dataset, "a.txt", "b.txt", "--name=mine", expect=2))
    assert "b.txt" in line and "UTF-16" in line
    assert not (prepare.data / "mine").exists()


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_text_bpe_puts_endoftext_between_files(prepare, tmp_path, gpt2, fraction):
    """Wherever the split falls: in a file, or between two (0.25, 0.5)."""
    texts = [f"This is text {i} of four, with some words in it: naïve 中文 😀 end{i}" for i in range(4)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    assert len({len(text) for text in texts}) == 1
    prepare("text_bpe", *[f"{i}.txt" for i in range(4)], "--name=mine", f"--val_fraction={fraction}")
    n_train = int(len("".join(texts)) * (1 - fraction))
    expected, position = ([], []), 0
    for i, text in enumerate(texts):
        cut = min(max(n_train - position, 0), len(text))
        expected[0].extend(gpt2.encode_ordinary(text[:cut]))
        expected[1].extend(gpt2.encode_ordinary(text[cut:]))
        position += len(text)
        if i < 3:
            expected[position > n_train].append(50256)
    assert ids(prepare.data / "mine") == list(expected)


def test_text_bpe_puts_nothing_after_a_single_file_and_reads_endoftext_in_a_text_as_characters(prepare, tmp_path, gpt2):
    text = "one <|endoftext|> two, and more words\n" * 20
    (tmp_path / "a.txt").write_text(text)
    prepare("text_bpe", "a.txt", "--name=mine")
    train, val = ids(prepare.data / "mine")
    assert 50256 not in train + val and train == gpt2.encode_ordinary(text[: int(len(text) * 0.9)])


def test_text_bpe_of_a_folder_is_that_of_its_files(prepare, tmp_path, gpt2):
    for i in range(30):
        path = tmp_path / "docs" / f"part{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(BOM * (i % 2) + f"Document {i} has its words.\r\n".encode())
    (tmp_path / "docs" / "readme.md").write_text("not this one")
    prepare("text_bpe", "docs", "--name=mine")
    order = [i for part in range(3) for i in range(30) if i % 3 == part]
    found = gpt2.decode(sum(ids(prepare.data / "mine"), []))
    assert found == "<|endoftext|>".join(f"Document {i} has its words.\n" for i in order)


def test_text_char_of_a_folder_has_its_texts_one_after_the_other(prepare, tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("b", "a", "c"):
        (tmp_path / "docs" / f"{name}.txt").write_text(name * 20)
    prepare("text_char", "docs", "--name=mine")
    assert characters(prepare.data / "mine") == "a" * 20 + "b" * 20 + "c" * 20


@pytest.mark.parametrize("dataset", ["text_char", "text_bpe"])
def test_an_empty_folder_is_one_line(prepare, tmp_path, dataset):
    (tmp_path / "docs").mkdir()
    line = error_line(prepare(dataset, "docs", "--name=mine", expect=2))
    assert line == "docs: there is no .txt file in this folder"
    assert not (prepare.data / "mine").exists()


def test_openwebtexts_documents_stay_as_they_are_but_for_a_leading_bom(gpt2):
    """The function alone: the script itself downloads, or needs another library."""
    source = (ROOT / "data" / "openwebtext" / "prepare.py").read_text(encoding="utf-8")
    function = source[source.index("def encode(") : source.index("def tokenise(")]
    from data.tokens import BPECodec, bpe_pieces
    from nanogpt.errors import UserError

    names = {"codec": BPECodec(), "bpe_pieces": bpe_pieces, "np": np, "end": np.array([50256]), "UserError": UserError}
    exec(function, names)
    found = names["encode"]({"text": ["\ufeffa\r\nb\r", "c\ufeffd", ""]}).tolist()
    expected = [*gpt2.encode_ordinary("a\r\nb\r"), 50256, *gpt2.encode_ordinary("c\ufeffd"), 50256, 50256]
    assert found == expected


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


def test_a_plain_command_is_printed_without_quotes(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    result = prepare("text_char", "a.txt", "--name=mine")
    expected = "next: python project/train.py config/train_text_char.py --dataset=mine --out_dir=out-mine"
    assert result.lines[-1] == expected
