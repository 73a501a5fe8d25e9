"""tools/evaluate.py: every token once, the loss of the plainest computation, and one figure however it is computed."""

import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import reference
import torch
from conftest import CHARACTERS, META, SYNTHETIC, TINY, error_line, flags, write_synthetic
from prepare_scripts import needs_bpe
from torch.nn import functional as F

from data.folder import write_dataset
from data.text import Meter
from nanogpt.distributed import Processes
from tools import evaluation

METER = Meter("evaluating", 0)

LINE = re.compile(
    r"(\S+): (\d+\.\d{4}) nats a token, perplexity (\d+\.\d{3}), (?:(\d+\.\d{4}) bits per byte, )?([\d,]+) tokens, "
    r"standard error (\d+\.\d{4})"
)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The out_dir of a small run, whose block_size is 16."""
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    run("train.py", *flags(TINY, out_dir=out_dir, max_iters=30, eval_interval=30))
    return out_dir


def weights_of(out_dir):
    return torch.load(out_dir / "ckpt.pt", weights_only=True)["model"]


def nats_one_by_one(weights, ids, block_size, stride, n_head=2):
    """Nats of ids[1:], each from a forward pass of its own: the window rule in its plainest form."""
    found = []
    for i in range(1, len(ids)):
        if i <= block_size:
            start = 0
        else:
            start = math.ceil((i - block_size) / stride) * stride
        logits = reference.logits_of(weights, torch.tensor(ids[start:i])[None], n_head)[0, -1]
        found.append(F.cross_entropy(logits.double(), torch.tensor(ids[i])).item())
    return found


# ----------------------------------------------------------------------------------------------
# windows


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10, 16, 17, 18, 40])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_token_but_the_first_is_predicted_once_whatever_the_parts_are(n, stride):
    for part in (1, 5, 100):
        chunks = (np.arange(start, min(start + part, n)) for start in range(0, n, part))
        found = list(evaluation.spans(chunks, 8, stride))
        assert [i for ids, new in found for i in ids[-new:]] == list(range(1, n))
        assert all(len(ids) <= 9 and list(ids) == list(range(ids[0], ids[-1] + 1)) for ids, _ in found)
        if stride == 8:  # window k predicts kT + 1 ... kT + T, its first from one token
            assert [ids[0] for ids, _ in found] == list(range(0, n - 1, 8))


def test_a_long_text_is_read_only_as_far_as_it_is_computed():
    read = []

    def endless():
        while True:
            read.append(1)
            yield np.zeros(100, dtype=np.uint16)

    found = evaluation.spans(endless(), 8, 8)
    for _ in range(50):
        next(found)
    assert len(read) <= 6


# ----------------------------------------------------------------------------------------------
# figures


@pytest.mark.parametrize("stride", [16, 5])
def test_the_loss_is_that_of_each_token_computed_by_itself(run, trained, tmp_path, stride):
    text = "".join(CHARACTERS[(i * i * 7 + i // 3) % 61] for i in range(20000, 20200))
    (tmp_path / "text").write_text(text)
    result = run("tools/evaluate.py", f"--out_dir={trained}", f"--file={tmp_path / 'text'}", f"--stride={stride}")
    ids = [META["stoi"][c] for c in text]
    nats = nats_one_by_one(weights_of(trained), ids, 16, stride)
    name, loss, perplexity, bits, tokens, _ = LINE.fullmatch(result.stdout.strip()).groups()
    assert name == str(tmp_path / "text") and int(tokens) == 199
    assert float(loss) == pytest.approx(np.mean(nats), abs=6e-5)
    assert float(perplexity) == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert float(bits) == pytest.approx(np.mean(nats) / math.log(2), abs=6e-5)  # a character here is a byte


def test_the_standard_error_is_that_of_window_means(run, trained):
    """With windows of one length it is their means' standard deviation over sqrt(windows)."""
    draws = np.random.default_rng(0).normal(2.0, 0.5, (40, 16))
    totals = evaluation.Totals(np.array([[row.sum(), 16, 16] for row in draws]))
    assert totals.standard_error == pytest.approx(draws.mean(1).std(ddof=1) / math.sqrt(40), rel=1e-9)
    assert totals.loss == pytest.approx(draws.mean(), rel=1e-12)
    one = evaluation.Totals(np.array([[3.0, 2, 2]]))
    assert one.standard_error is None and one.line("x").endswith("standard error unknown (a single window)")


def test_the_line_has_each_figure_to_its_digits():
    n = np.array([256] * 435 + [179])
    off = 0.0031 * 111_539 * math.sqrt(435) / 436  # half of the windows lie so much above the mean, half below
    nats = 1.46569 * n + np.repeat([off, -off], 218)
    totals = evaluation.Totals(np.stack([nats, n, n], axis=1))
    assert totals.line("val") == (
        "val: 1.4657 nats a token, perplexity 4.331, 2.1145 bits per byte, 111,539 tokens, standard error 0.0031"
    )


def test_a_split_is_evaluated_whole(run, trained):
    result = run("tools/evaluate.py", f"--out_dir={trained}")
    name, *_, tokens, _ = LINE.fullmatch(result.stdout.strip()).groups()
    assert name == "val" and tokens == "3,999"  # 4,000 tokens
    result = run("tools/evaluate.py", f"--out_dir={trained}", "--split=train")
    name, *_, tokens, _ = LINE.fullmatch(result.stdout.strip()).groups()
    assert name == "train" and tokens == "19,999"


@pytest.mark.slow
def test_the_figure_is_the_same_for_every_batch_size_and_thread_count(trained, synthetic_run):
    from model import GPT

    checkpoint = torch.load(synthetic_run[0] / "ckpt.pt", weights_only=True)
    model = GPT.from_checkpoint(checkpoint, "ckpt.pt").eval()
    ids = np.random.default_rng(1).integers(0, 61, 1500)
    found, threads = set(), torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        for batch_size in (1, 3, 7, 64):
            found.add(evaluation.evaluate(model, [ids], 32, 32, batch_size, None, "cpu", Processes(), METER).nats)
    torch.set_num_threads(threads)
    assert max(found) - min(found) <= 1e-9 * max(found)


def test_the_sum_is_float64s_and_counts_each_token_once():
    """A mean of batch means would count the short last window's tokens more."""

    class Uniform(torch.nn.Module):  # the target's logit is its id: nats are known exactly
        def hidden(self, x):
            return x.float()[..., None]

        def lm_head(self, rows):
            return F.pad(rows, (0, 3))

    ids = np.array([0, 1, 2, 3, 0])
    totals = evaluation.evaluate(Uniform(), [ids], 3, 3, 2, None, "cpu", Processes(), METER)
    expected = [math.log(math.exp(a) + 3) - (a if b == 0 else 0) for a, b in zip(ids[:-1], ids[1:], strict=True)]
    assert totals.tokens == 4 and totals.loss == pytest.approx(sum(expected) / 4, rel=1e-6)
    assert len(totals.spans) == 2


@pytest.mark.slow
def test_several_processes_find_the_same_figure(project, trained):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(project / "tools" / "evaluate.py"), f"--out_dir={trained}", "--batch_size=7", "--device=cpu"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    alone = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert LINE.fullmatch(done.stdout.strip()) and done.stdout == alone.stdout


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_of_the_processes_add_up_to_the_whole(world_size):
    class Rank:
        def __init__(self, rank):
            self.rank, self.world_size = rank, world_size

        def gather(self, totals):
            return [totals]

    from model import GPT, GPTConfig

    torch.manual_seed(3)
    model = GPT(GPTConfig(8, 61, 1, 2, 16, 0.0, False)).eval()
    ids = np.random.default_rng(2).integers(0, 61, 300)
    sizes = np.arange(61) % 3 + 1
    parts = [evaluation.evaluate(model, [ids], 8, 4, 3, sizes, "cpu", Rank(r), METER) for r in range(world_size)]
    whole = evaluation.evaluate(model, [ids], 8, 4, 3, sizes, "cpu", Processes(), METER)
    together = evaluation.Totals(np.concatenate([part.spans for part in parts]))
    assert together.loss == pytest.approx(whole.loss, abs=1e-6)
    assert (together.tokens, len(together.spans), together.bytes) == (299, len(whole.spans), sizes[ids[1:]].sum())


def test_bits_per_byte_count_the_bytes_of_the_text(own_project, run, tmp_path):
    import pickle

    letters = "\n " + "äöüßéèñçøåæœ漢字仮名α" + CHARACTERS[2:44]
    assert len(letters) == 61
    meta = {"vocab_size": 61, "stoi": {c: i for i, c in enumerate(letters)}, "itos": dict(enumerate(letters))}
    (own_project / "data" / "synthetic" / "meta.pkl").write_bytes(pickle.dumps(meta))
    out = tmp_path / "out"
    run("train.py", *flags(TINY, out_dir=out, max_iters=4), project=own_project)
    text = letters * 3
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    result = run("tools/evaluate.py", f"--out_dir={out}", f"--file={tmp_path / 't.txt'}", project=own_project)
    _, loss, _, bits, tokens, _ = LINE.fullmatch(result.stdout.strip()).groups()
    n_bytes = len(text.encode()) - len(text[0].encode())  # the first token is not predicted
    assert float(bits) == pytest.approx(float(loss) * int(tokens) / math.log(2) / n_bytes, abs=1e-4)
    assert n_bytes > int(tokens)


def test_the_figure_is_transformers_on_an_exported_model(run, trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    run("tools/export.py", f"--out_dir={trained}", f"--to={tmp_path / 'hf'}")
    text = "".join(CHARACTERS[(i * i * 7 + i // 3) % 61] for i in range(5000, 6000))
    (tmp_path / "text").write_text(text)
    result = run("tools/evaluate.py", f"--init_from={tmp_path / 'hf'}", f"--file={tmp_path / 'text'}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"])
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    assert LINE.fullmatch(result.stdout.strip())[2] == f"{total / (len(ids) - 1):.4f}"


@needs_bpe
def test_gpt2s_tokens_are_counted_in_bytes_and_end_of_text_in_none(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=50257)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    text = "Ein Löwe brüllt in the zoo, twice a day. " * 20
    (tmp_path / "text").write_text(text, encoding="utf-8")
    result = run("tools/evaluate.py", f"--init_from={tmp_path / 'hf'}", f"--file={tmp_path / 'text'}")
    import tiktoken

    ids = tiktoken.get_encoding("gpt2").encode(text)
    n_bytes = len(text.encode()) - len(tiktoken.get_encoding("gpt2").decode_single_token_bytes(ids[0]))
    _, loss, _, bits, tokens, _ = LINE.fullmatch(result.stdout.strip()).groups()
    assert int(tokens.replace(",", "")) == len(ids) - 1
    assert float(bits) == pytest.approx(float(loss) * (len(ids) - 1) / math.log(2) / n_bytes, abs=2e-4)


# ----------------------------------------------------------------------------------------------
# long texts


def test_a_bin_of_a_billion_tokens_starts_at_once_and_holds_little(own_project, start, trained):
    with open(own_project / "data" / "synthetic" / "val.bin", "wb") as f:
        f.truncate(2_000_000_000)  # a file with a hole: zeros
    began = time.monotonic()
    running = start("tools/evaluate.py", f"--out_dir={trained}", project=own_project)
    running.wait(lambda: "of 999,999,999 (0%)" in running.read()[1], seconds=60)
    assert time.monotonic() - began < 30
    status = open(f"/proc/{running.process.pid}/status").read() if os.path.exists("/proc") else ""
    running.process.kill()
    resident = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
    assert not resident or resident[0] < 700 * 1024  # KiB: torch itself, and not 2 GB of tokens


# ----------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize("arguments, said", [
    (["--stride=17"], "--stride=17: must be at most the model's block_size, 16"),
    (["--stride=-1"], "--stride=-1"), (["--split=test"], "--split=test: takes val or train"),
    (["--dataset=absent"], "absent"), (["--file=absent.txt"], "there is no such file"),
    (["--file={one}"], "a text of fewer than two tokens"), (["--file={other}"], "the vocabulary has no tokens for 'é'"),
    (["--dataset=letters"], "the tokens of letters are not those of the model"),
    (["--dataset=gpt2s"], "the tokens of gpt2s are not those of the model"),  # no vocabulary is needed to know
    (["--dataset=lost"], "tokenizer.json is missing"),
    (["--dataset=cut"], "val.bin is not the one that dataset.json"),
    (["--init_from=nonsense"], "takes resume, a gpt2 name or a model's folder"),
])  # fmt: skip
def test_a_mistake_is_one_line(run, project, trained, tmp_path, arguments, said):
    (tmp_path / "one").write_text("a")
    (tmp_path / "other").write_text("aé")
    swapped = CHARACTERS[::-1]
    meta = {"vocab_size": 61, "stoi": {c: i for i, c in enumerate(swapped)}, "itos": dict(enumerate(swapped))}
    write_synthetic(project / "data" / "letters", meta=meta)
    part = [(np.arange(61), 61)]
    write_dataset(str(project / "data" / "gpt2s"), part, part, 50257)
    write_dataset(str(project / "data" / "lost"), part, part, 300, tokenizer="{}")
    (project / "data" / "lost" / "tokenizer.json").unlink()
    write_dataset(str(project / "data" / "cut"), part, part, 61, meta=META)
    np.arange(30, dtype="<u2").tofile(project / "data" / "cut" / "val.bin")
    places = {"one": tmp_path / "one", "other": tmp_path / "other"}
    result = run("tools/evaluate.py", f"--out_dir={trained}", *(a.format(**places) for a in arguments), expect=2)
    assert said in error_line(result)


def test_a_dataset_without_characters_has_nats_but_no_bytes(own_project, run, tmp_path):
    write_synthetic(own_project / "data" / "synthetic", meta={"vocab_size": 61})
    run("train.py", *flags(SYNTHETIC, out_dir=tmp_path / "out", max_iters=2), project=own_project)
    result = run("tools/evaluate.py", f"--out_dir={tmp_path / 'out'}", project=own_project)
    assert LINE.fullmatch(result.lines[-1])[4] is None and "no bits per byte: " in result.stdout
