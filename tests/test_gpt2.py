"""GPT-2 in and out: against transformers, which stands for GPT-2 here, on small models with random weights."""

import http.server
import json
import math
import os
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, error_line, flags

offline = os.environ.get("HF_HUB_OFFLINE")
os.environ["HF_HUB_OFFLINE"] = "1"  # read as it is imported: nothing here may hang on a network
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

if offline is None:
    del os.environ["HF_HUB_OFFLINE"]
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

from nanogpt import checkpoint as ckpt
from model import GPT, GPTConfig

CPU = dict(device="cpu", dtype="float32", compile=False)
# without what comes from the model
TUNE = {name: value for name, value in TINY.items() if name not in ("n_layer", "n_head", "n_embd", "bias")}
SMALL = dict(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=97)
SHAPES = {
    "small": SMALL,
    "context of 128": SMALL | dict(n_positions=128, n_layer=1),
    "three heads": SMALL | dict(n_layer=3, n_head=3, n_embd=48),
    "exact gelu": SMALL | dict(activation_function="gelu"),
    "n_inner given": SMALL | dict(n_inner=128),
}
# what a tokenizer is most likely to lose: blanks, line ends, other planes, and the marks it uses itself
ODD = "\n\t \r é漢字🙂▁Ġ\u0301\u200b\u2028<unk> ##a  b\n\n c"


def gpt2(**settings):
    """A transformers GPT-2 with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(1)
    settings = dict(bos_token_id=None, eos_token_id=None, initializer_range=0.3) | settings
    model = GPT2LMHeadModel(GPT2Config(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases 0 and gains 1 would hide a mix-up
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def folder_of(tmp_path, **settings):
    gpt2(**SMALL | settings).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def ids_for(config):
    return torch.randint(config.vocab_size, (2, config.n_positions), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def differences(theirs, ours, ids):
    return (theirs(ids).logits - ours(ids, ids)[0]).abs().max().item()


def edit(path, **changes):
    """Changes keys of a JSON file."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def checkpoint_of(model, out_dir, **more):
    """A run's checkpoint with that GPT in it."""
    out_dir.mkdir(parents=True)
    state = {"model": model.state_dict(), "optimizer": {}, "model_args": model.config.as_model_args()}
    state |= {"iter_num": 0, "best_val_loss": 9.0, "config": {"dataset": "no such"}}
    torch.save(state | more, out_dir / "ckpt.pt")
    return out_dir


def greedy(folder, prompt, count):
    """The text that transformers itself goes on with, prompt included."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    return tokenizer.decode(model.generate(**inputs, do_sample=False, max_new_tokens=count)[0])


# ----------------------------------------------------------------------------------------------
# in


@pytest.mark.parametrize("shape", SHAPES)
def test_loaded_logits_are_transformers(shape, tmp_path):
    theirs = gpt2(**SHAPES[shape])
    theirs.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert differences(theirs, ours, ids_for(theirs.config)) < 1e-4
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert ours.config.as_model_args().get("activation", "gelu") == theirs.config.activation_function


def openais(weights):
    """As in OpenAI's own files: no prefix, and each layer's mask."""
    for name in list(weights):
        weights[name.removeprefix("transformer.")] = weights.pop(name)
    for i in range(2):
        weights[f"h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]


def with_head(weights):
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()


def halved(dtype):
    def change(weights):
        for name in weights:
            weights[name] = weights[name].to(dtype)

    return change


@pytest.mark.parametrize("change", [openais, with_head], ids=["openai", "with head"])
def test_a_file_with_other_names_for_the_same_is_loaded(change, tmp_path):
    folder = folder_of(tmp_path)
    edit_weights(folder / "model.safetensors", change)
    theirs = gpt2(**SMALL)
    assert differences(theirs, GPT.from_pretrained(str(folder)).eval(), ids_for(theirs.config)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_as_float32(dtype, tmp_path):
    folder = folder_of(tmp_path)
    edit_weights(folder / "model.safetensors", halved(dtype))
    ours = GPT.from_pretrained(str(folder)).eval()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    theirs = gpt2(**SMALL).to(dtype).float()
    assert differences(theirs, ours, ids_for(theirs.config)) < 1e-4


def wrong_shape(weights):
    weights["transformer.h.1.mlp.c_fc.weight"] = weights["transformer.h.1.mlp.c_fc.weight"].T.contiguous()


def missing(weights):
    del weights["transformer.h.1.mlp.c_fc.bias"]


def whole_numbers(weights):
    weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"].long()


def untied(weights):
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1


def another_model(weights):
    weights["score.weight"] = torch.ones(2, 32)


def flat(weights):
    weights["transformer.h.0.attn.c_attn.weight"] = torch.ones(32 * 96)


CONFIG_FAULTS = [
    dict(model_type="llama"), dict(model_type=None), dict(n_layer=3), dict(n_layer=10**9), dict(n_layer=1),
    dict(vocab_size=96), dict(vocab_size=10**12), dict(n_embd=64), dict(n_embd=10**15), dict(n_embd="32"),
    dict(n_head=5), dict(n_head=0), dict(n_positions=65), dict(n_positions=None), dict(n_positions=True),
    dict(activation_function="relu"), dict(activation_function=[]), dict(n_inner=64), dict(layer_norm_epsilon=1e-6),
    dict(tie_word_embeddings=False), dict(scale_attn_by_inverse_layer_idx=True), dict(scale_attn_weights=False),
    dict(add_cross_attention=True),
]  # fmt: skip
WEIGHT_FAULTS = [wrong_shape, missing, whole_numbers, untied, another_model, flat]
FILE_FAULTS = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "empty config": lambda folder: (folder / "config.json").write_text(""),
    "a list for a config": lambda folder: (folder / "config.json").write_text("[1]"),
    "deep config": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "config not UTF-8": lambda folder: (folder / "config.json").write_bytes(b'{"a": "\xff"}'),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "cut": lambda folder: cut(folder / "model.safetensors", -1000),
    "cut in its header": lambda folder: cut(folder / "model.safetensors", 100),
    "noise": lambda folder: (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(9999)),
    "a folder for weights": lambda folder: replace_by_folder(folder / "model.safetensors"),
}  # fmt: skip


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def cut(path, at):
    path.write_bytes(path.read_bytes()[:at])


def load_error(folder):
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(str(folder))
    assert type(caught.value).__name__ == "UserError", caught.value
    return str(caught.value)


@pytest.mark.parametrize("fault", CONFIG_FAULTS, ids=str)
def test_a_config_of_another_model_is_refused(fault, tmp_path):
    folder = folder_of(tmp_path)
    edit(folder / "config.json", **fault)
    message = load_error(folder)
    assert str(folder) in message or next(iter(fault)) in message


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_weights_of_another_model_are_refused(fault, tmp_path):
    folder = folder_of(tmp_path)
    edit_weights(folder / "model.safetensors", fault)
    assert "model.safetensors cannot be loaded: " in load_error(folder)


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_damaged_folder_is_refused(fault, tmp_path):
    folder = folder_of(tmp_path)
    FILE_FAULTS[fault](folder)
    assert str(folder) in load_error(folder)


@pytest.mark.slow
def test_no_bytes_in_the_file_do_more_than_be_refused(tmp_path):
    folder = folder_of(tmp_path)
    whole, path = (folder / "model.safetensors").read_bytes(), folder / "model.safetensors"
    rng = np.random.default_rng(3)
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged[: rng.integers(len(damaged))] if rng.integers(4) == 0 else damaged)
        try:
            GPT.from_pretrained(str(folder))
        except ValueError as error:
            assert type(error).__name__ == "UserError", error


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
@pytest.mark.parametrize("fault", ["cut", "another architecture", "no folder", "no such name"])
def test_the_scripts_say_so_in_one_line(script, fault, run, tmp_path):
    folder = folder_of(tmp_path)
    if fault == "cut":
        cut(folder / "model.safetensors", -1000)
    if fault == "another architecture":
        edit(folder / "config.json", model_type="llama")
    init_from = {"no folder": tmp_path / "nothing", "no such name": "gpt2-huge"}.get(fault, folder)
    settings = flags(TUNE, init_from=init_from) if script == "train.py" else flags(init_from=init_from)
    settings += [f"--out_dir={tmp_path / 'out'}"]
    error = error_line(run(script, *settings, expect=2))
    expected = {"cut": "model.safetensors cannot be loaded", "another architecture": "model_type", "no folder": "takes"}
    assert expected.get(fault, "gpt2-huge is neither a folder nor one of gpt2, gpt2-medium") in error
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------
# training from it


@pytest.fixture(scope="module")
def constant(project):
    """A dataset whose windows are all alike, so that a loss is known beforehand."""
    folder = project / "data" / "constant"
    folder.mkdir()
    for split in ("train", "val"):
        np.full(500, 7, dtype="<u2").tofile(folder / f"{split}.bin")
    return "constant"


def expected_loss(model, block_size):
    ids = torch.full((1, block_size + 1), 7)
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item()


def test_finetuning_starts_at_transformers_loss_and_its_sizes(run, constant, tmp_path):
    folder = folder_of(tmp_path)
    settings = TUNE | dict(dataset=constant, block_size=32, init_from=folder, out_dir=tmp_path / "out", dropout=0.1)
    lines = run("train.py", *flags(settings)).lines
    assert f"Initializing from GPT-2 weights: {folder}" in lines
    loss = f"{expected_loss(gpt2(**SMALL), 32):.4f}"
    assert f"step 0: train loss {loss}, val loss {loss}" in lines
    saved = ckpt.load(str(tmp_path / "out" / "last.pt"))
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, bias=True)
    assert saved["config"] == saved["config"] | sizes
    assert saved["model_args"] == sizes | dict(vocab_size=97, dropout=0.1, activation="gelu_new")
    more = ["--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=10", "--device=cpu"]
    assert [entry[1] for entry in run("train.py", *more).losses if entry[0] == "iter"] == [9, 10]


def test_a_folder_by_the_name_of_scratch_is_not_taken_for_a_model(run, tmp_path):
    (tmp_path / "scratch").mkdir()
    lines = run("train.py", *flags(TINY, max_iters=0, out_dir=tmp_path / "out"), cwd=tmp_path).lines
    assert "Initializing a new model from scratch" in lines


def test_a_context_longer_than_the_models_is_refused(run, constant, tmp_path):
    settings = TUNE | dict(dataset=constant, block_size=65, init_from=folder_of(tmp_path))
    error = error_line(run("train.py", *flags(settings), expect=2))
    assert "block_size" in error and "64" in error and "65" in error


def test_tokens_beyond_the_models_vocabulary_are_refused(run, constant, tmp_path):
    settings = TUNE | dict(dataset=constant, init_from=folder_of(tmp_path, vocab_size=7))
    assert "token 0 is 7, but the vocabulary's ids end at 6" in error_line(run("train.py", *flags(settings), expect=2))


# ----------------------------------------------------------------------------------------------
# the hub


@pytest.fixture(scope="module")
def hub_files(tmp_path_factory):
    """A small model's files by the name gpt2, with GPT-2's vocabulary."""
    folder = tmp_path_factory.mktemp("hub_files")
    gpt2(n_layer=1, n_head=2, n_embd=8, n_positions=64).save_pretrained(folder)
    return folder


def evaluate(run, constant, home, **options):
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": None, "HF_ENDPOINT": None, "HF_HUB_CACHE": None}
    environment |= {"NO_PROXY": "127.0.0.1", **options.pop("env", {})}
    settings = TUNE | dict(dataset=constant, init_from="gpt2", eval_only=True, out_dir=home / "out")
    return run("train.py", *flags(settings), env=environment, **options)


def assert_is_hub_model(result, hub_files):
    loss = f"{expected_loss(GPT2LMHeadModel.from_pretrained(hub_files).eval(), 16):.4f}"
    assert f"step 0: train loss {loss}, val loss {loss}" in result.lines


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_what_the_hubs_cache_has_needs_no_network(name, run, constant, hub_files, tmp_path):
    cache = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(hub_files, cache / "snapshots" / ("0" * 40))
    assert_is_hub_model(evaluate(run, constant, tmp_path, env={"HF_HUB_OFFLINE": "1"}), hub_files)


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_offline_and_not_cached_is_one_line_that_says_what_to_do(name, script, run, tmp_path):
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": None}
    settings = flags(TUNE if script == "train.py" else {}, init_from=name)
    error = error_line(run(script, *settings, expect=2, env=environment))
    assert f"hf download openai-community/{name} config.json model.safetensors" in error and "--init_from=DIR" in error


@pytest.mark.slow  # the library tries again for half a minute
def test_no_network_and_not_cached_is_one_line(run, constant, tmp_path):
    result = evaluate(run, constant, tmp_path, env={"HF_ENDPOINT": "http://127.0.0.1:9"}, expect=2)
    assert "openai-community/gpt2 is not in the Hugging Face cache" in error_line(result)


@pytest.fixture
def endpoint(hub_files):
    """A hub on loopback that has openai-community/gpt2: (its address, the requests it has answered)."""
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append((self.command, self.path))
            name = self.path.removeprefix("/openai-community/gpt2/resolve/main/")
            content = (hub_files / name).read_bytes() if name in ("config.json", "model.safetensors") else None
            self.send_response(200 if content else 404)
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if content and self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_a_hub_elsewhere_is_asked_once(run, constant, hub_files, endpoint, tmp_path):
    address, asked = endpoint
    assert_is_hub_model(evaluate(run, constant, tmp_path, env={"HF_ENDPOINT": address}), hub_files)
    assert len([path for command, path in asked if command == "GET" and path.endswith("model.safetensors")]) == 1
    asked.clear()
    assert_is_hub_model(evaluate(run, constant, tmp_path, env={"HF_ENDPOINT": address}), hub_files)
    assert not asked  # it is in the cache under HF_HOME now


@pytest.mark.parametrize("absent", ["safetensors", "huggingface_hub"])
def test_a_library_that_is_not_there_is_named(absent, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)
    assert "pip install" in load_error("gpt2") and absent in load_error("gpt2")


# ----------------------------------------------------------------------------------------------
# out

OUT = {
    "plain": GPTConfig(32, 61, 2, 2, 32, 0.0, bias=False),
    "biases": GPTConfig(48, 64, 3, 4, 64, 0.0, bias=True),
    "gelu_new": GPTConfig(32, 61, 2, 2, 32, 0.0, bias=True, activation="gelu_new"),
}
CHARACTERS = "".join(sorted(set(ODD))).ljust(61, "~")[:61]


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


def sampled(run, prompt, count, **settings):
    """What sample.py goes on with, taking the most likely token each time."""
    settings = CPU | dict(start=prompt, max_new_tokens=count, temperature=0.0, num_samples=1) | settings
    text = run("sample.py", *flags(settings)).stdout
    assert text.endswith("\n" + "-" * 15 + "\n")
    return text.removesuffix("\n" + "-" * 15 + "\n")


def as_read(text):
    """`text` as a file of it is read: the tests' runner does not tell line ends apart."""
    return text.replace("\r", "\n")


@pytest.mark.parametrize("prompt", ["The 1", "\n", ODD[:9]], ids=ascii)
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


def test_a_character_models_tokenizer_is_the_codec(char_run):
    out_dir, folder, text = char_run
    tokenizer, stoi = AutoTokenizer.from_pretrained(folder), ckpt.load(str(out_dir / "ckpt.pt"))["meta"]["stoi"]
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
        assert set(AutoTokenizer.from_pretrained(folder)("a")) == {"input_ids", "attention_mask"}


def test_a_byte_pair_models_tokenizer_is_gpt2s(bpe_run, shared, monkeypatch):
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    tokenizer, encoding = AutoTokenizer.from_pretrained(bpe_run[1]), tiktoken.get_encoding("gpt2")
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


@pytest.mark.parametrize("content", ["", "{}", '{"model": 1}', '{"model": {"type": "Unigram", "vocab": []}}',
                                     '{"model": {"type": "WordLevel", "vocab": {"a": "b"}}}'])  # fmt: skip
def test_a_tokenizer_of_another_kind_is_refused(content, run, tmp_path):
    folder = folder_of(tmp_path)
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in error_line(run("sample.py", f"--init_from={folder}", expect=2))


# ----------------------------------------------------------------------------------------------
# the settings files, at nanoGPT's values

EVALUATION = dict(batch_size=8, eval_iters=500, eval_only=True, wandb_log=False)
FINETUNING = dict(
    out_dir="out-shakespeare", eval_interval=5, eval_iters=40, dataset="shakespeare", always_save_checkpoint=False,
    batch_size=1, gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5, decay_lr=False, wandb_log=False,
    wandb_project="shakespeare",
)  # fmt: skip


@pytest.mark.parametrize(
    "name, model, expected",
    [("finetune_shakespeare", "gpt2-xl", FINETUNING)]
    + [(f"eval_{m.replace('-', '_')}", m, EVALUATION) for m in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")],
)
def test_the_settings_files_have_nanogpts_values(name, model, expected, run, tmp_path):
    values = {"wandb_log": False}  # the default
    exec((ROOT / "config" / f"{name}.py").read_text(), values)
    assert values == values | expected | {"init_from": model}
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": None}
    arguments = [f"config/{name}.py", "--dataset=synthetic"]  # one that is there: it is looked for first
    assert f"openai-community/{model} " in error_line(run("train.py", *arguments, env=environment, expect=2))
