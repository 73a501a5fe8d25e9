"""Bits per byte: by hand from the logits of a model on a known text, in the log, in the last lines, in a picture."""

import csv
import json
import math
import pickle
import shutil

import numpy as np
import pytest
import reference
import tiktoken
import torch
from conftest import RESUME, TINY, error_line, flags
from tokenizers import Tokenizer

from data.dataset import Dataset
from data.tokenizer import train_tokenizer
from data.codecs import BPECodec, bytes_of_ids

CHARACTERS = "aé中😀" + "bcdfghijklmnopqrstuvwxyzäöüßñ"  # 1, 2, 3 and 4 bytes of UTF-8, and others


@pytest.fixture(scope="module")
def languages(project):
    """A dataset of random characters of one to four bytes, in the shared copy of the project."""
    folder = project / "data" / "languages"
    folder.mkdir()
    for seed, (split, n) in enumerate((("train", 4000), ("val", 1000))):
        ids = np.random.default_rng(seed).integers(0, len(CHARACTERS), n, dtype=np.uint16)
        ids.tofile(folder / f"{split}.bin")
    stoi = {c: i for i, c in enumerate(CHARACTERS)}
    meta = {"vocab_size": len(stoi), "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return project


def evals(out_dir):
    with open(out_dir / "log.csv", newline="") as f:
        return {int(row["iter"]): row for row in csv.DictReader(f) if row["kind"] == "eval"}


@pytest.fixture(scope="module")
def trained(run, languages, tmp_path_factory):
    """(project, folder, Result) of a short run on it."""
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    settings = TINY | dict(dataset="languages", eval_iters=3, out_dir=out_dir)
    return languages, out_dir, run("train.py", *flags(settings), project=languages)


def by_hand(folder, bytes_of_id):
    """Iteration 0's: the model as it was made, and the batches as they were drawn, by the plain model of reference.py."""
    torch.manual_seed(1337)
    sizes = {name: TINY[name] for name in ("n_layer", "n_embd", "block_size")}
    weights = reference.fresh_weights(vocab_size=len(bytes_of_id), **sizes)
    generator = torch.Generator().set_state(torch.get_rng_state())
    tokens = {s: np.fromfile(folder / f"{s}.bin", dtype=np.uint16) for s in ("train", "val")}
    nats = n_bytes = 0
    B, T = TINY["batch_size"], TINY["block_size"]
    for split in ["train"] * 4 + ["val"] * 3:  # the first training batch, and three of each split
        starts = torch.randint(len(tokens[split]) - T, (B,), generator=generator).tolist()
        if split == "val":
            windows = np.stack([tokens[split][s : s + T + 1] for s in starts]).astype(np.int64)
            logits = reference.logits_of(weights, torch.from_numpy(windows[:, :-1]), TINY["n_head"])
            log_probs = logits.log_softmax(-1)
            for row, text_ids in zip(log_probs, windows[:, 1:], strict=True):
                nats -= sum(row[t, i].item() for t, i in enumerate(text_ids))
                n_bytes += sum(bytes_of_id[i] for i in text_ids)
    return nats / n_bytes / math.log(2)


def test_it_is_the_nats_over_the_bytes_of_the_text(trained):
    project, out_dir, _ = trained
    expected = by_hand(project / "data" / "languages", [len(c.encode("utf-8")) for c in CHARACTERS])
    assert float(evals(out_dir)[0]["val_bpb"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("split", ["GPT-2's", "another"])  # by tiktoken, and by tokenizers
def test_a_byte_level_tokens_bytes_are_those_that_its_name_spells(run, own_project, tmp_path, split):
    text = "".join(f"Die {n} Füße und das 中文 {n * n}, sagte er.\n" for n in range(900))
    content = json.loads(train_tokenizer([text], 400))
    if split == "another":
        words = {"type": "Split", "pattern": {"Regex": "[^ ]+| +"}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"]["use_regex"] = False
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [words, content["pre_tokenizer"]]}
    (tmp_path / "t.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "text").write_text(text, encoding="utf-8")
    run("data/text_bpe/prepare.py", tmp_path / "text", "--name=mine", f"--tokenizer={tmp_path / 't.json'}",
        project=own_project)  # fmt: skip
    settings = flags(TINY, dataset="mine", eval_iters=3, out_dir=tmp_path / "out")
    run("train.py", *settings, project=own_project)
    tokenizer = Tokenizer.from_file(str(tmp_path / "t.json"))
    bytes_of_id = [len(tokenizer.id_to_token(i)) for i in range(399)] + [0]  # a character spells a byte
    expected = by_hand(own_project / "data" / "mine", bytes_of_id)
    assert float(evals(tmp_path / "out")[0]["val_bpb"]) == pytest.approx(expected, rel=1e-5)


def test_the_last_lines_and_the_checkpoint_have_the_best_ones(run, trained):
    project, out_dir, result = trained
    [line] = [line for line in result.lines if line.startswith("best val loss")]
    best = min(evals(out_dir).values(), key=lambda row: float(row["val_loss"]))
    assert f" at iteration {best['iter']}, {float(best['val_bpb']):.4f} bits per byte, " in line
    assert torch.load(out_dir / "last.pt", weights_only=True)["best_bpb"] == float(best["val_bpb"])


def test_a_resume_keeps_the_best_ones(run, trained, tmp_path):
    project, out_dir, _ = trained
    shutil.copytree(out_dir, tmp_path / "out")
    best = torch.load(out_dir / "last.pt", weights_only=True)["best_bpb"]
    worse = flags(RESUME, out_dir=tmp_path / "out", max_iters=10, learning_rate=0.0, min_lr=0.0)
    result = run("train.py", *worse, project=project)
    assert f"{best:.4f} bits per byte" in result.stdout


def test_ids_of_unknown_text_have_none(run, own_project, tmp_path):
    (own_project / "data" / "synthetic" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 61}))
    result = run("train.py", *flags(TINY, out_dir=tmp_path / "out"), project=own_project)
    assert "bits per byte" not in result.stdout
    assert {row["val_bpb"] for row in evals(tmp_path / "out").values()} == {""}
    assert "no bits per byte" in error_line(run("tools/plot.py", tmp_path / "out", "--bpb=True", expect=2))


def test_gpt2s_tokens_are_counted_by_id_and_the_end_of_a_document_has_no_bytes(shared):
    by_id = bytes_of_ids(BPECodec(), 50304)
    text = "Zwölf Boxkämpfer: 中文, 😀!"
    ids = [*tiktoken.get_encoding("gpt2").encode(text), 50256, 50300]
    assert by_id[ids].sum() == len(text.encode("utf-8"))


def test_without_gpt2s_vocabulary_on_disk_training_asks_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("data.codecs.gpt2_encoding", lambda: pytest.fail("it would be fetched"))
    monkeypatch.setattr("data.folder.ROOT", str(tmp_path))
    (tmp_path / "data" / "words").mkdir(parents=True)
    for split in ("train", "val"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / "data" / "words" / f"{split}.bin")
    by_id = Dataset("words", 8).bytes_by_id(50304, "cpu")
    assert by_id.shape == (50304,) and by_id.isnan().all()
