"""data/dataset.py and data/folder.py: a dataset as it is written, and as train.py finds it."""

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tree
from prepare_scripts import files_in

from data.dataset import Dataset
from data.folder import write_dataset
from data.pretrained import Pretrained
from data.tokenizer import codec_of_tokenizer, train_tokenizer
from data.tokens import Tokens
from nanogpt.errors import UserError, machine_failure

ABC = {"vocab_size": 3, "stoi": {"a": 0, "b": 1, "é": 2}, "itos": {0: "a", 1: "b", 2: "é"}}
BAC = {"vocab_size": 3, "stoi": {"b": 0, "a": 1, "é": 2}, "itos": {0: "b", 1: "a", 2: "é"}}

# ----------------------------------------------------------------------------------------------
# dataset.json


def pairs(*lists):
    """Splits as a prepare script hands them over: arrays of ids, each with the bytes it stands for."""
    return [(np.array(ids), 2 * len(ids)) for ids in lists]


def facts_of(folder):
    return json.loads((folder / "dataset.json").read_text())


def test_a_dataset_is_written_whole_or_not_at_all(tmp_path):
    one = pairs([1, 2, 3])
    write_dataset(str(tmp_path), one, one, 4, meta={"vocab_size": 4})
    assert facts_of(tmp_path)["tokens"] == {"train": 3, "val": 3}
    before = files_in(tmp_path)
    assert before["train.bin"] == b"\1\0\2\0\3\0"
    assert sorted(before) == ["dataset.json", "meta.pkl", "train.bin", "val.bin"]

    def stops():
        yield from pairs([5])
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_dataset(str(tmp_path), pairs([4]), stops(), 6)
    with pytest.raises(OSError):
        write_dataset(str(tmp_path / "new"), pairs([4]), stops(), 6)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="token 1 is 100000, but the vocabulary's ids end at 50256"):
        write_dataset(str(tmp_path), pairs([4, 100_000]), one, 50257)
    assert files_in(tmp_path) == before
    write_dataset(str(tmp_path), one, one, 4)
    assert sorted(files_in(tmp_path)) == ["dataset.json", "train.bin", "val.bin"]  # the old meta.pkl told of other ids


def test_two_processes_do_not_write_one_dataset(tmp_path, capsys):
    """The second is refused while the first writes, and changes nothing."""
    folder, one = str(tmp_path / "data" / "mine"), pairs([1, 2, 3])

    def during():
        before = tree(tmp_path)
        with pytest.raises(UserError, match=f"^another preparation is writing .*{os.path.join('data', 'mine')}$"):
            write_dataset(folder, pairs([7]), pairs([7]), 9)
        assert tree(tmp_path) == before
        yield from one

    write_dataset(folder, during(), one, 4)
    write_dataset(folder, one, one, 4)
    assert capsys.readouterr().out == "train has 3 tokens\nval has 3 tokens\n" * 2


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        write_dataset(str(tmp_path / "new"), pairs([4]), pairs([4]), 6)
    assert machine_failure(error.value) == f"{tmp_path / 'new' / 'train.bin.tmp'}: No space left on device"


def test_ids_that_uint16_does_not_hold_go_to_bins_of_another_name_and_the_other_kind_goes(tmp_path):
    names = {2: ["dataset.json", "train.bin", "val.bin"], 4: ["dataset.json", "train.u32.bin", "val.u32.bin"]}
    for vocab_size, width in ((65536, 2), (65537, 4), (200_019, 4), (50257, 2)):
        write_dataset(str(tmp_path), pairs([1, vocab_size - 1]), pairs([0], [2]), vocab_size)
        assert sorted(files_in(tmp_path)) == names[width]
        written = (tmp_path / names[width][1]).read_bytes()
        assert written == (1).to_bytes(width, "little") + (vocab_size - 1).to_bytes(width, "little")
        assert facts_of(tmp_path)["dtype"] == f"uint{8 * width}"


def test_dataset_json_says_what_the_bins_are(tmp_path):
    write_dataset(str(tmp_path), pairs([1, 2], [3]), pairs([0]), 300, tokenizer="the text, é")
    facts = facts_of(tmp_path)
    assert facts["tokens"] == {"train": 3, "val": 1} and facts["bytes"] == {"train": 6, "val": 2}
    assert (facts["dtype"], facts["vocab_size"]) == ("uint16", 300)
    digest = hashlib.sha256("the text, é".encode()).hexdigest()
    assert facts["tokenizer"] == {"file": "tokenizer.json", "sha256": digest}
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == "the text, é"


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A folder data/mine with a dataset of characters and its dataset.json."""
    monkeypatch.setattr("data.folder.ROOT", str(tmp_path))
    folder = tmp_path / "data" / "mine"
    write_dataset(str(folder), pairs([0, 1, 2] * 9), pairs([2, 1] * 9), 3, meta=ABC)
    return folder


def checked(block_size=4, vocab_size=3):
    data = Dataset("mine", block_size)
    data.check_bins(vocab_size, None)
    return data, data.fingerprints


def test_a_dataset_with_and_without_its_dataset_json_is_the_same(prepared):
    data, fingerprints = checked()
    assert data.found_line == f"found vocab_size = 3 (inside {os.path.join('data', 'mine', 'meta.pkl')})"
    (prepared / "dataset.json").unlink()
    bare, bare_fingerprints = checked()
    assert (bare.found_line, bare.tokens.kept()) == (data.found_line, data.tokens.kept())
    assert fingerprints == bare_fingerprints


@pytest.fixture(scope="module")
def own():
    """The text of a tokenizer.json of 260 tokens, trained here."""
    return train_tokenizer(["the cat sat on the mat, that cat\n" * 50], 260)


@pytest.mark.parametrize("width", [2, 4])
def test_a_tokenizer_json_that_another_program_wrote_counts(prepared, own, width):
    """Without dataset.json, which would say so: a prepare script of the user's own wrote the bins."""
    (prepared / "dataset.json").unlink()
    (prepared / "meta.pkl").unlink()
    (prepared / "tokenizer.json").write_text(own, encoding="utf-8")
    for name in ("train", "val"):
        (prepared / f"{name}.bin").unlink()
        ending = {2: "bin", 4: "u32.bin"}[width]
        np.arange(260, dtype=f"<u{width}").tofile(prepared / f"{name}.{ending}")
    data, _ = checked(vocab_size=260)
    assert data.tokens.model_vocab_size == 260 and data.tokens.kept() == {"tokenizer": own}
    assert data.found_line == f"found vocab_size = 260 (inside {os.path.join('data', 'mine', 'tokenizer.json')})"
    assert data.tokens.codec.encode("the") == codec_of_tokenizer(own, "x").encode("the")
    (prepared / "tokenizer.json").write_text(own[:100], encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer.json"):
        assert checked(vocab_size=260)[0].found_line


def start_remark(data, path, vocab_size, is_run=False):
    """What is said where the run on `data` starts from a model of `vocab_size` ids in `path`."""
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))
    return data.start_remark(Pretrained(model, Tokens.of_gpt2(str(path), vocab_size), str(path), is_run, "", []))


def test_a_gpt2s_folder_with_other_tokens_is_one_line_or_said(prepared, own, tmp_path):
    """Two tokenizers are refused. What nanoGPT allows, GPT-2 on characters, is said; so is what may be another kind."""
    folder = tmp_path / "hf"
    folder.mkdir()
    other = train_tokenizer(["ein Hund und eine Katze, und ein Hund\n" * 50], 260)
    part = pairs([1, 2] * 9)
    characters = Dataset("mine", 4)
    assert "tokens of its own, 3, not the 50257 of gpt2" in start_remark(characters, "gpt2", 50257)
    assert "not the 50304 of" in start_remark(characters, folder, 50304)
    with pytest.raises(UserError, match="stand for other tokens than those of mine"):
        start_remark(characters, folder, 50304, is_run=True)
    write_dataset(str(prepared), part, part, 260, tokenizer=own)
    data = Dataset("mine", 4)
    assert start_remark(data, folder, 260) is None  # it has no tokenizer.json: nothing is known
    assert "tokens of its own, 260, not the 4096" in start_remark(data, folder, 4096)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(own)), encoding="utf-8")
    assert start_remark(data, folder, 260) is None
    for text, said in ((other, "stand for other tokens than those of mine"), (own[:90], "is not a tokenizer.json")):
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            start_remark(data, folder, 260)
    write_dataset(str(prepared), part, part, 50257)
    (folder / "tokenizer.json").write_text(own, encoding="utf-8")
    with pytest.raises(UserError, match="stand for other tokens"):
        start_remark(Dataset("mine", 4), folder, 260)
    assert start_remark(Dataset("mine", 4), "gpt2", 50257) is None


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("change", [lambda b: b + b"\0\0", lambda b: b"\1\0" + b[2:], lambda b: b[:-4]])
def test_bins_that_dataset_json_does_not_describe_are_one_line(prepared, name, change):
    (prepared / name).write_bytes(change((prepared / name).read_bytes()))
    with pytest.raises(UserError, match=f"{name} is not the one that dataset.json"):
        checked()


@pytest.mark.parametrize("change", [
    lambda f: f.pop("dtype"), lambda f: f.update(dtype="float32"), lambda f: f.update(vocab_size=-1),
    lambda f: f.update(vocab_size=True), lambda f: f.update(vocab_size=1 << 60), lambda f: f.update(tokens=[1, 2]),
    lambda f: f["tokens"].pop("val"), lambda f: f["bytes"].update(train="9"), lambda f: f.pop("fingerprints"),
    lambda f: f["tokenizer"].update(file="../meta.pkl"), lambda f: f["tokenizer"].pop("sha256"),
    lambda f: f.update(tokenizer="gpt2"), lambda f: f.pop("tokenizer"), lambda f: f["bytes"].update(val=-1),
    lambda f: f["bytes"].update(val=10**400), lambda f: f["tokens"].update(train=-1),
])  # fmt: skip
def test_a_dataset_json_that_is_not_one_is_one_line(prepared, change):
    facts = facts_of(prepared)
    change(facts)
    (prepared / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="dataset.json is not a dataset's"):
        checked()


def test_a_dataset_json_that_counts_other_tokens_than_the_bin_has_is_one_line(prepared):
    facts = facts_of(prepared)
    facts["tokens"]["val"] = 0
    (prepared / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="val.bin is not the one that dataset.json"):
        checked()


def test_a_dataset_json_that_an_editor_has_saved_with_a_mark_and_other_line_ends_is_the_same(prepared, own):
    write_dataset(str(prepared), pairs([1, 2] * 9), pairs([0, 1] * 9), 260, tokenizer=own)
    content = (prepared / "dataset.json").read_bytes()
    (prepared / "dataset.json").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert checked(vocab_size=260)[0].tokens.tokenizer == own


@pytest.mark.parametrize("size", [0, 299, 301, 1 << 30])
def test_a_dataset_json_that_counts_other_ids_than_its_tokenizer_has_is_one_line(prepared, own, size):
    write_dataset(str(prepared), pairs([1, 2] * 9), pairs([0, 1] * 9), 260, tokenizer=own)
    checked(vocab_size=260)
    facts = facts_of(prepared)
    (prepared / "dataset.json").write_text(json.dumps(facts | {"vocab_size": size}))
    with pytest.raises(UserError, match="not those that its dataset.json counts"):
        checked(vocab_size=size)


def test_nanogpts_bins_beside_ours_in_uint32_are_one_line(prepared):
    write_dataset(str(prepared), pairs([1, 2] * 9), pairs([0, 1] * 9), 70_000, meta=None)
    Dataset("mine", 4)
    np.arange(9, dtype="<u2").tofile(prepared / "train.bin")
    with pytest.raises(UserError, match="train.bin is not the one that dataset.json beside it describes"):
        Dataset("mine", 4)


@pytest.mark.parametrize("before", ["nothing", "characters by hand", "characters", "own", "GPT-2's"])
@pytest.mark.parametrize("after", ["characters", "own", "GPT-2's"])
def test_preparing_that_is_stopped_leaves_the_old_dataset_the_new_one_or_an_error(tmp_path, monkeypatch, own, before, after):
    """Stopped before each of the renames and removals that bring in a dataset and take away the one before."""
    monkeypatch.setattr("data.folder.ROOT", str(tmp_path))
    folder, tokens = tmp_path / "data" / "mine", {"characters": {"meta": BAC}, "own": {"tokenizer": own}, "GPT-2's": {}}

    def write(kind, ids, **characters):
        size = {"characters": 3, "own": 260, "GPT-2's": 50257}[kind]
        write_dataset(str(folder), pairs(ids), pairs(ids), size, **(tokens[kind] | characters))

    def state():
        try:
            data = Dataset("mine", 4)
            data.check_bins(50304, None)
            return data.tokens.kept(), np.fromfile(data.bins["train"], "<u2").tolist(), np.fromfile(data.bins["val"], "<u2").tolist()
        except UserError:
            return None

    done, states = False, []
    for stop in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if before != "nothing":
            write(before.removesuffix(" by hand"), [0, 1, 2] * 4, **({"meta": ABC} if "characters" in before else {}))
        if before.endswith("hand"):
            (folder / "dataset.json").unlink()
        old, left = state(), iter(range(stop))
        with monkeypatch.context() as patch:
            for name in ("replace", "remove"):
                plain = getattr(os, name)

                def counted(*paths, plain=plain, left=left):
                    published = len(paths) == 2 or not str(paths[0]).endswith(".tmp")
                    if published and next(left, None) is None:
                        raise KeyboardInterrupt
                    return plain(*paths)

                patch.setattr(os, name, counted)
            try:
                write(after, [2, 1, 0] * 5)
                done = True
            except KeyboardInterrupt:
                pass
        states.append(state())
        assert states[-1] in (None, old) or states[-1][1:] == ([2, 1, 0] * 5,) * 2
        if done:
            break
    assert done and len(states) > 2 and states[-1][1:] == ([2, 1, 0] * 5,) * 2
    assert all(each is None or each == old or each[0] == states[-1][0] for each in states)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[", b"[" * 100_000, b"9" * 5000])
def test_a_dataset_json_that_is_no_json_is_one_line(prepared, content):
    (prepared / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match="dataset.json"):
        checked()


def test_a_tokenizers_file_that_has_changed_or_is_missing_is_one_line(prepared):
    whole = (prepared / "meta.pkl").read_bytes()
    (prepared / "meta.pkl").write_bytes(whole + b" ")
    with pytest.raises(UserError, match="meta.pkl is missing, or has changed since"):
        checked()
    (prepared / "meta.pkl").unlink()
    with pytest.raises(UserError, match="meta.pkl is missing, or has changed since"):
        checked()


@pytest.mark.parametrize("size, model", [(4096, 4096), (8192, 8192), (8193, 8256), (50257, 50304), (200_019, 200_064)])
def test_a_new_model_has_a_multiple_of_64_ids_above_8192_and_this_is_said(prepared, size, model):
    write_dataset(str(prepared), pairs([1, 2] * 9), pairs([0, 1] * 9), size, tokenizer="{}")
    data = Dataset("mine", 4)
    assert data.tokens.model_vocab_size == model
    assert f"found vocab_size = {size} (inside" in data.found_line and "dataset.json" in data.found_line
    assert (data.rounded_line is None) == (size == model) and (size == model or f"vocab_size = {model}" in data.rounded_line)
