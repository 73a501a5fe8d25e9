"""GPT-2 in: against transformers, which stands for GPT-2 here, on small models with random weights."""

import http.server
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import RESUME, ROOT, TINY, error_line, flags
from hugging_face import (
    SMALL, TUNE, GPT2LMHeadModel, differences, edit, edit_weights, folder_of, gpt2, ids_for,
)  # fmt: skip

from model import GPT
from nanogpt import checkpoint as ckpt
SHAPES = {
    "small": SMALL,
    "context of 128": SMALL | dict(n_positions=128, n_layer=1),
    "three heads": SMALL | dict(n_layer=3, n_head=3, n_embd=48),
    "exact gelu": SMALL | dict(activation_function="gelu"),
    "n_inner given": SMALL | dict(n_inner=128),
}


# ----------------------------------------------------------------------------------------------
# the weights


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


def no_embeddings(weights):
    del weights["transformer.wte.weight"]


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
WEIGHT_FAULTS = [wrong_shape, missing, no_embeddings, whole_numbers, untied, another_model, flat]
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


def test_a_byte_order_mark_before_a_config_is_read_over(tmp_path):
    config = folder_of(tmp_path) / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert GPT.from_pretrained(str(config.parent)).config.n_layer == 2


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
    assert expected.get(fault, "gpt2-huge is no folder with ckpt.pt or config.json, and not one of gpt2, gpt2-medium") in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"model": 1}', '{"model": {"type": "Unigram", "vocab": []}}',
                                     '{"model": {"type": "WordLevel", "vocab": {"a": "b"}}}'])  # fmt: skip
def test_a_tokenizer_of_another_kind_is_refused(content, run, tmp_path):
    folder = folder_of(tmp_path)
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in error_line(run("sample.py", f"--init_from={folder}", expect=2))


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
    resumed = run("train.py", *flags(RESUME, out_dir=tmp_path / "out", max_iters=10))
    assert [entry[1] for entry in resumed.losses if entry[0] == "iter"] == [9, 10]


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


@pytest.mark.parametrize("script, name", [("train.py", "gpt2"), ("sample.py", "gpt2-xl")])
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
