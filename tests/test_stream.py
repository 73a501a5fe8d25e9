"""sample.py's output: streamed or not the same text, whole characters only, prompts from stdin, closed pipes."""

import io
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import CHARACTERS, ROOT, flags
from recorded_graphs import RecordedGraph

from model import GPT, GPTConfig
from nanogpt import decoding


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """A model that was never trained, over characters of one to four bytes, whose data folder is gone."""
    torch.manual_seed(0)
    characters = CHARACTERS[:50] + "äΩ中文😀é"
    itos = dict(enumerate(characters))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    arguments = dict(block_size=16, vocab_size=len(itos), n_layer=1, n_head=2, n_embd=16, dropout=0.0, bias=False)
    checkpoint = {
        "model": GPT(GPTConfig(**arguments)).state_dict(), "optimizer": {}, "model_args": arguments, "iter_num": 1,
        "best_val_loss": 1.0, "config": {"dataset": "gone"}, "meta": meta,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    torch.save(checkpoint, folder / "ckpt.pt")
    return folder


class Recorder(io.StringIO):
    """A stdout that notes what had been written at each flush."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def flush(self):
        self.shown.append(self.getvalue())


@pytest.fixture
def sample(out_dir, monkeypatch):
    """sample(**settings) -> (stdout as a Recorder, stderr), in this process."""

    def sample(stdin="", **settings):
        fixed = {"out_dir": out_dir, "device": "cpu", "dtype": "float32", "start": "ab", "temperature": 1.5}
        settings = fixed | settings
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags(settings)])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or sample.py would leave this process with as many as it has cores
        recorder, errors = Recorder(), io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", recorder)
            patch.setattr(sys, "stderr", errors)
            data = stdin if isinstance(stdin, bytes) else stdin.encode()
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        return recorder, errors.getvalue()

    return sample


def test_a_streamed_sample_is_the_first_of_several(sample):
    alone = sample(num_samples=1, max_new_tokens=60)[0].getvalue()
    several = sample(num_samples=3, max_new_tokens=60)[0].getvalue()
    assert several.startswith(alone) and several.count("\n" + "-" * 15 + "\n") == 3
    assert alone.startswith("ab") and len(alone) == 2 + 60 + len("\n" + "-" * 15 + "\n")


def test_one_sample_appears_token_by_token(sample):
    shown = sample(num_samples=1, max_new_tokens=20)[0].shown
    lengths = list(dict.fromkeys(map(len, shown)))
    assert lengths[:21] == list(range(2, 23))  # the prompt, then a character at a time


@pytest.mark.parametrize("settings", [
    dict(num_samples=1, stop="é"), dict(num_samples=3), dict(num_samples=3, stop="B", window_step=5),
    dict(interactive=True, top_p=0.9), dict(interactive=True, temperature=0, stop="é"),
], ids=str)  # fmt: skip
def test_with_cuda_graphs_sample_writes_the_same(sample, monkeypatch, settings):
    """The graphs are recorded and replayed on this CPU."""
    settings = dict(stdin="ab\nAB\na\nab", max_new_tokens=40) | settings
    expected, graphs = sample(**settings)[0].getvalue(), []

    def capture(function, device, pool):
        graphs.append(RecordedGraph(function, pool))
        return graphs[-1], graphs[-1].outputs

    monkeypatch.setattr(decoding, "make_step", decoding.GraphStep)
    monkeypatch.setattr(decoding, "capture", capture)
    recorder, errors = sample(**settings)
    assert recorder.getvalue() == expected and errors == "" and graphs


@pytest.mark.parametrize("num_samples", [1, 3])
def test_the_model_runs_until_every_sample_has_met_stop_and_no_longer(sample, monkeypatch, num_samples):
    texts = sample(num_samples=num_samples, max_new_tokens=200)[0].getvalue().split("\n" + "-" * 15 + "\n")[:-1]
    common = set.intersection(*(set(text[2:]) for text in texts))
    stop = max(common, key=lambda c: max(text.index(c, 2) for text in texts))
    calls, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *args, **more: calls.append(1) or forward(self, *args, **more))
    found = sample(num_samples=num_samples, max_new_tokens=200, stop=stop)[0].getvalue()
    assert found == "".join("ab" + text[2:].partition(stop)[0] + "\n" + "-" * 15 + "\n" for text in texts)
    assert len(calls) == max(text.index(stop, 2) - 1 for text in texts) < 200


def test_no_new_tokens_print_the_prompt(sample):
    assert sample(num_samples=1, max_new_tokens=0)[0].getvalue() == "ab\n" + "-" * 15 + "\n"


def test_interactive_answers_each_line_and_goes_on_after_one_it_cannot(sample):
    recorder, errors = sample(b"ab\n\nab%\n\xff\nb", interactive=True, max_new_tokens=5)
    answers = recorder.getvalue().split("\n" + "-" * 15 + "\n")
    assert len(answers) == 3 and answers[0][:2] == "ab" and answers[1][0] == "b" and not answers[2]
    assert errors.splitlines() == [
        "error: the prompt is empty, or the tokenizer drops all of it: give at least one character",
        "error: the vocabulary has no tokens for '%' (U+0025)",
        "error: the vocabulary has no tokens for '\ufffd' (U+FFFD)",
    ]


def test_an_answer_does_not_hang_on_the_prompts_before_it(sample):
    ones = [sample(f"{first}\nab\n", interactive=True, max_new_tokens=9)[0].getvalue() for first in ("b", "%", "abab")]
    assert len({text.split("-" * 15 + "\n")[-2] for text in ones}) == 1


@pytest.mark.parametrize(
    "settings", ["--num_samples=1 --max_new_tokens=3000", "--num_samples=2 --max_new_tokens=20", "--help"]
)
def test_a_closed_pipe_ends_quietly(out_dir, settings):
    """Closed in the middle of the text, before it, and at the interpreter's own last flush."""
    command = [sys.executable, str(ROOT / "sample.py"), f"--out_dir={out_dir}", "--device=cpu", *settings.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if "3000" in settings:
            process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
