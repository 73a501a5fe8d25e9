"""tools/export.py: what transformers reads in an exported folder, and what is written where it cannot be."""

import functools
import json
import math
import shlex

import numpy as np
import pytest
import torch
from conftest import CHARACTERS, META, ROOT, TINY, error_line, flags, write_synthetic
from hugging_face import TUNE, differences, folder_of, ids_for
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from data.tokens import Tokens
from model import GPT, GPTConfig
from nanogpt import checkpoint as ckpt

CPU = dict(device="cpu", dtype="float32", compile=False)
# what a tokenizer is most likely to lose: blanks, line ends, other planes, and the marks it uses itself
ODD = "\n\t \r é漢字🙂▁Ġ\u0301\u200b\u2028<unk> ##a  b\n\n c"
OUT = {
    "plain": GPTConfig(32, 61, 2, 2, 32, 0.0, bias=False),
    "biases": GPTConfig(48, 64, 3, 4, 64, 0.0, bias=True),
    "gelu_new": GPTConfig(32, 61, 2, 2, 32, 0.0, bias=True, activation="gelu_new"),
}
ODD_CHARACTERS = "".join(sorted(set(ODD))).ljust(61, "~")[:61]


def checkpoint_of(model, out_dir, **more):
    """A run's checkpoint with that GPT in it."""
    out_dir.mkdir(parents=True)
    state = {"model": model.state_dict(), "optimizer": {}, "model_args": model.config.as_model_args()}
    state |= {"iter_num": 0, "best_val_loss": 9.0, "config": {"dataset": "no such"}}
    torch.save(state | more, out_dir / "ckpt.pt")
    return out_dir


@functools.cache
def loaded(folder):
    """(model, tokenizer) as transformers reads them."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def greedy(folder, prompt, count):
    """The text that transformers itself goes on with, prompt included."""
    model, tokenizer = loaded(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    return tokenizer.decode(model.generate(**inputs, do_sample=False, max_new_tokens=count)[0])


def char_meta(characters):
    return {
        "vocab_size": len(characters),
        "stoi": {c: i for i, c in enumerate(characters)},
        "itos": dict(enumerate(characters)),
    }


@pytest.mark.parametrize("shape", OUT)
def test_exported_logits_are_the_same_there_and_back(shape, run, tmp_path):
    torch.manual_seed(4)
    ours = GPT(OUT[shape]).eval()
    for parameter in ours.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    out_dir = checkpoint_of(ours, tmp_path / "out", meta=char_meta("".join(sorted(set(ODD)))))
    run("tools/export.py", f"--out_dir={out_dir}", f"--to={tmp_path / 'hf'}")
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    ids = ids_for(theirs.config)
    assert ids.shape[1] == OUT[shape].block_size
    assert differences(theirs.eval(), ours, ids) < 1e-4
    again = GPT.from_pretrained(str(tmp_path / "hf")).eval()
    with torch.no_grad():
        assert torch.equal(again(ids, ids)[0], ours(ids, ids)[0]) or differences(theirs, again, ids) < 1e-4
    assert ours.config.activation == again.config.activation


@pytest.fixture(scope="module")
def char_run(run, project, tmp_path_factory):
    """(out_dir, exported folder, text) of a small character model of a text with odd characters."""
    folder = tmp_path_factory.mktemp("char")
    text = "".join(f"{ODD}The {n} quick brown foxes\njump over {n * n} lazy dogs.\n" for n in range(150))
    (folder / "text").write_text(text, encoding="utf-8", newline="")
    run("data/text_char/prepare.py", folder / "text", "--name=odd_char")
    settings = TINY | dict(dataset="odd_char", block_size=64, n_embd=64, max_iters=150, lr_decay_iters=150,
                           eval_interval=150, batch_size=16, out_dir=folder / "out")  # fmt: skip
    run("train.py", *flags(settings))
    run("tools/export.py", f"--out_dir={folder / 'out'}", f"--to={folder / 'hf'}")
    return folder / "out", folder / "hf", text


@pytest.fixture(scope="module")
def bpe_run(run, shared, tmp_path_factory):
    """(out_dir, exported folder) of a small byte-pair model."""
    folder = tmp_path_factory.mktemp("bpe")
    text = "".join(f"The {n} quick brown foxes\njump over {n * n} lazy dogs.\n" for n in range(300))
    (folder / "text").write_text(text, encoding="utf-8", newline="")
    run("data/text_bpe/prepare.py", folder / "text", "--name=odd_bpe")
    settings = TINY | dict(dataset="odd_bpe", block_size=48, n_embd=32, max_iters=40, lr_decay_iters=40,
                           learning_rate=3e-2, eval_interval=40, eval_iters=1, batch_size=3, out_dir=folder / "out")  # fmt: skip
    run("train.py", *flags(settings))
    run("tools/export.py", f"--out_dir={folder / 'out'}", f"--to={folder / 'hf'}")
    return folder / "out", folder / "hf"


@pytest.fixture(scope="module")
def own_run(run, project, tmp_path_factory):
    """(out_dir, exported folder) of a small model in 400 tokens of its own."""
    folder = tmp_path_factory.mktemp("own")
    text = "".join(f"{ODD}The {n} quick brown foxes\njump over {n * n} lazy dogs.\n" for n in range(300))
    (folder / "text").write_text(text, encoding="utf-8", newline="")
    run("data/text_bpe/prepare.py", folder / "text", "--name=odd_own", "--vocab_size=400")
    settings = TINY | dict(dataset="odd_own", block_size=48, n_embd=32, max_iters=40, lr_decay_iters=40,
                           learning_rate=3e-2, eval_interval=40, eval_iters=1, batch_size=3, out_dir=folder / "out")  # fmt: skip
    run("train.py", *flags(settings))
    run("tools/export.py", f"--out_dir={folder / 'out'}", f"--to={folder / 'hf'}")
    return folder / "out", folder / "hf"


def sampled(run, prompt, count, **settings):
    """What sample.py goes on with, taking the most likely token each time."""
    settings = CPU | dict(start=prompt, max_new_tokens=count, temperature=0.0, num_samples=1) | settings
    text = run("sample.py", *flags(settings)).stdout
    assert text.endswith("\n" + "-" * 15 + "\n")
    return text.removesuffix("\n" + "-" * 15 + "\n")


def as_read(text):
    """`text` as a file of it is read: the tests' runner does not tell line ends apart."""
    return text.replace("\r", "\n")


@pytest.mark.parametrize("prompt", ["The 1", "\n", ODD[:9].replace("\r", "")], ids=ascii)
def test_a_character_models_greedy_text_is_transformers(prompt, char_run, run):
    out_dir, folder, _ = char_run
    count = 64 - len(prompt)
    ours = sampled(run, prompt, count, out_dir=out_dir)
    assert len(ours) == 64 and len(set(ours)) > 5
    assert as_read(greedy(folder, prompt, count)) == ours
    assert sampled(run, prompt, count, init_from=folder) == ours


@pytest.mark.parametrize("prompt", ["The 1", "The 2 quick brown foxes\njump", "\n"], ids=ascii)
def test_a_byte_pair_models_greedy_text_is_transformers(prompt, bpe_run, run):
    out_dir, folder = bpe_run
    ours = sampled(run, prompt, 35, out_dir=out_dir)
    assert len(set(ours)) > 5
    assert as_read(greedy(folder, prompt, 35)) == ours
    assert sampled(run, prompt, 35, init_from=folder) == ours


@pytest.mark.parametrize("prompt", ["The 1", "The 2 quick brown foxes\njump", "\n"], ids=ascii)
def test_a_model_in_its_own_tokens_writes_transformers_greedy_text(prompt, own_run, run):
    out_dir, folder = own_run
    ours = sampled(run, prompt, 25, out_dir=out_dir)
    assert len(set(ours)) > 3
    assert as_read(greedy(folder, prompt, 25)) == as_read(ours)
    assert sampled(run, prompt, 25, init_from=folder) == ours


def test_its_own_tokenizer_gives_autotokenizer_the_codecs_ids_on_ugly_text(own_run, project):
    tokenizer, codec = loaded(own_run[1])[1], Tokens.of_dataset(str(project / "data" / "odd_own")).codec
    assert len(tokenizer) == 400 and tokenizer.eos_token_id == tokenizer.bos_token_id == codec.eot == 399
    assert (own_run[1] / "tokenizer.json").read_text() == (project / "data" / "odd_own" / "tokenizer.json").read_text()
    rng = np.random.default_rng(6)
    random = ["".join(map(chr, rng.integers(1, 0xD800, 300))) for _ in range(30)]
    random += ["".join(map(chr, rng.integers(0xE000, 0x110000, 300))) for _ in range(30)]
    code = (ROOT / "train.py").read_text(encoding="utf-8")
    for text in [*random, ODD, code, "it's  I'LL\n\n\n 12345  ", "a<|endoftext|>b", "  ", "\t\x00\x1f\x7f", "नमस्ते שלום 中文"]:
        found = tokenizer(text)["input_ids"]
        assert found == codec.encode(text) and tokenizer.decode(found) == text


def test_a_folder_of_transformers_with_any_tokenizer_is_sampled_and_trained_on(run, own_project, tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=word_piece(), unk_token="[UNK]", eos_token="[SEP]")
    folder = folder_of(tmp_path, vocab_size=len(words))
    words.save_pretrained(folder)
    text = "the quick brown foxes jump over the lazy dogs\n"
    (tmp_path / "text").write_text(text * 100)
    named = f"--tokenizer={folder}"
    result = run("data/text_bpe/prepare.py", tmp_path / "text", named, "--name=words", project=own_project)
    assert "[SEP] is id 3" in result.stdout
    ids = np.fromfile(own_project / "data" / "words" / "train.bin", dtype="<u2")
    assert words.decode(ids[:20]).startswith("the quick brown foxes")
    settings = TUNE | dict(dataset="words", block_size=8, init_from=folder, out_dir=tmp_path / "out")
    assert "of its own" not in run("train.py", *flags(settings), project=own_project).stdout
    sample = flags(CPU | dict(init_from=folder, num_samples=1, max_new_tokens=5, start="the quick"))
    assert run("sample.py", *sample, project=own_project).stdout.startswith("the quick")
    line = error_line(run("sample.py", *sample, "--start=ж", project=own_project, expect=2))
    assert "'ж'" in line


def word_piece():
    """A tokenizer of words and their parts, trained by tokenizers."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown foxes jump over the lazy dogs"], trainer)
    return tokenizer


def test_a_character_models_tokenizer_is_the_codec(char_run):
    out_dir, folder, text = char_run
    tokenizer, stoi = loaded(folder)[1], ckpt.load(str(out_dir / "ckpt.pt"))["meta"]["stoi"]
    assert len(tokenizer) == len(stoi)
    for part in (ODD, text[:3000], " ", "\n", "  \n  ", " ' s n't , ."):
        part = "".join(c for c in part if c in stoi)
        ids = tokenizer(part)["input_ids"]
        assert ids == [stoi[c] for c in part]
        assert tokenizer.decode(ids) == part
    assert tokenizer.bos_token is tokenizer.eos_token is None


def test_no_tokenizer_returns_token_types(char_run, bpe_run):
    """transformers 4's does by default, and its GPT-2 then adds the embedding of token 0 everywhere."""
    for _, folder, *_ in (char_run, bpe_run):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["model_input_names"] == ["input_ids", "attention_mask"]
        assert set(loaded(folder)[1]("a")) == {"input_ids", "attention_mask"}


def test_a_byte_pair_models_tokenizer_is_gpt2s(bpe_run, shared, monkeypatch):
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    tokenizer, encoding = loaded(bpe_run[1])[1], tiktoken.get_encoding("gpt2")
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == tokenizer.bos_token_id == 50256
    rng = np.random.default_rng(5)
    random = "".join(map(chr, rng.integers(1, 0xD800, 3000)))
    texts = [ODD, random, (shared / "tinyshakespeare" / "input.txt").read_text()[:200_000], "it's  I'LL\n\n\n 12345  ",
             "a<|endoftext|>b"]  # fmt: skip
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == encoding.encode(text, allowed_special="all")
        assert tokenizer.decode(ids) == text
    for i in range(50257):
        assert tokenizer.decode([i]) == encoding.decode([i])


def test_a_padded_vocabulary_is_kept_and_its_padding_never_generated(bpe_run, char_run):
    generation = json.loads((bpe_run[1] / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(50257, 50304))
    assert generation["eos_token_id"] == 50256
    config = json.loads((bpe_run[1] / "config.json").read_text())
    assert config["vocab_size"] == 50304 and config["bos_token_id"] == config["eos_token_id"] == 50256
    config = json.loads((char_run[1] / "config.json").read_text())
    assert config["eos_token_id"] is None and config["bos_token_id"] is None


def test_an_exported_model_can_be_trained_on(char_run, run, tmp_path):
    settings = TUNE | dict(dataset="odd_char", block_size=64, init_from=char_run[1], out_dir=tmp_path / "out")
    (_, _, _, val), *_ = run("train.py", *flags(settings)).losses
    untrained = math.log(len(ckpt.load(str(char_run[0] / "ckpt.pt"))["meta"]["stoi"]))
    assert float(val) < untrained / 2


@pytest.mark.parametrize("there", ["full folder", "file"])
def test_export_writes_over_nothing(there, char_run, run, tmp_path):
    to = tmp_path / "to"
    if there == "file":
        to.write_text("mine")
    else:
        to.mkdir()
        (to / "mine").write_text("mine")
    error = error_line(run("tools/export.py", f"--out_dir={char_run[0]}", f"--to={to}", expect=2))
    assert str(to) in error and (to if there == "file" else to / "mine").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


def test_export_fills_an_empty_folder_and_leaves_nothing_beside_it(char_run, run, tmp_path):
    (tmp_path / "to").mkdir()
    run("tools/export.py", f"--out_dir={char_run[0]}", f"--to={tmp_path / 'to'}/")
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "to").iterdir()} == names


def test_an_export_that_fails_leaves_nothing(char_run, run, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("tools/export.py", f"--out_dir={char_run[0]}", f"--to={tmp_path / 'file' / 'to'}", expect=1)
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [["--to=x"], ["--out_dir={out}"], ["--to=x", "--out_dir={out}/nothing"]])
def test_an_export_without_a_model_or_a_place_is_one_line(arguments, char_run, run, tmp_path):
    arguments = [argument.format(out=char_run[0]) for argument in arguments]
    error_line(run("tools/export.py", *arguments, cwd=tmp_path, expect=2))
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_codec_is_not_exported(run, tmp_path):
    out_dir = checkpoint_of(GPT(OUT["plain"]), tmp_path / "out", meta={"vocab_size": 61})
    assert "has no characters" in error_line(
        run("tools/export.py", f"--out_dir={out_dir}", f"--to={tmp_path / 'to'}", expect=2)
    )


# ----------------------------------------------------------------------------------------------
# tools/export.py: a trained model as a Hugging Face folder


def test_the_runs_own_characters_are_exported_where_the_dataset_has_others_now(run, own_project, synthetic_run, tmp_path):
    pytest.importorskip("safetensors")
    backwards = dict(enumerate(reversed(CHARACTERS)))
    others = {"vocab_size": 61, "stoi": {c: i for i, c in backwards.items()}, "itos": backwards}
    write_synthetic(own_project / "data" / "synthetic", others)
    arguments = [f"--out_dir={synthetic_run[0]}", f"--to={tmp_path / 'hf'}"]
    result = run("tools/export.py", *arguments, project=own_project)
    written = json.loads((tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert written == META["stoi"]
    assert f"using those in {synthetic_run[0] / 'ckpt.pt'}" in result.lines[0]


def test_the_command_that_samples_from_it_can_be_pasted(run, synthetic_run, tmp_path):
    pytest.importorskip("safetensors")
    result = run("tools/export.py", f"--out_dir={synthetic_run[0]}", "--to=my export", cwd=tmp_path)
    line = result.lines[-1]
    assert shlex.split(line[line.index("python ") :])[2:] == ["--init_from=my export"]
