"""sample.py as a user sees it. The texts that are expected come from tests/reference.py, not from model.py."""

import math
import os
import pickle
import subprocess
import sys

import pytest
import reference
import torch
from conftest import CHARACTERS, META, TINY, error_line, flags, tree, write_synthetic
from runs import as_nanogpt_saves

DASHES = "-" * 15
CPU = ["--device=cpu", "--dtype=float32"]


def texts(result):
    """The samples: what stands before each line of dashes."""
    *found, rest = result.stdout.split(f"\n{DASHES}\n")
    assert rest == "" and result.stderr == "", (rest, result.stderr)
    return found


@pytest.fixture(scope="module")
def sample(run, synthetic_run):
    """sample(*arguments, **settings) -> Result; of the golden settings' model unless out_dir is given."""

    def sample(*arguments, expect=0, project=None, cwd=None, env=None, stdin=b"", **settings):
        options = {"project": project} if project else {}
        arguments = [*CPU, *flags({"out_dir": synthetic_run[0]} | settings), *arguments]
        return run("sample.py", *arguments, expect=expect, cwd=cwd, env=env, stdin=stdin, **options)

    return sample


def nanogpts_text(out_dir, start, seed, new, temperature=0.8, top_k=200, greedy=False):
    """nanoGPT's sample.py: seed, build the model (which draws), load the weights, draw the first sample."""
    saved = torch.load(out_dir / "ckpt.pt")
    torch.manual_seed(seed)
    sizes = {name: saved["model_args"][name] for name in ("n_layer", "n_embd", "block_size", "vocab_size")}
    reference.fresh_weights(**sizes)
    idx = torch.tensor([[CHARACTERS.index(c) for c in start]])
    for _ in range(new):
        logits = reference.logits_of(saved["model"], idx[:, -sizes["block_size"] :], n_head=2)[:, -1]
        if greedy:
            drawn = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            least = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
            logits[logits < least] = -math.inf
            drawn = torch.multinomial(logits.softmax(-1), 1)
        idx = torch.cat([idx, drawn], dim=1)
    return "".join(CHARACTERS[i] for i in idx[0].tolist())


# ----------------------------------------------------------------------------------------------
# the text


@pytest.mark.parametrize("settings", [
    dict(), dict(seed=7, temperature=1.3, start="abc"), dict(top_k=3, start="Hi there"),
], ids=str)  # fmt: skip
def test_the_first_sample_is_nanogpts_for_that_seed(sample, synthetic_run, settings):
    """80 new tokens, past block_size = 32; the prompt is '\\n' unless given."""
    expected = nanogpts_text(synthetic_run[0], **{"start": "\n", "seed": 1337, "new": 80} | settings)
    alone = texts(sample(num_samples=1, max_new_tokens=80, **settings))
    assert alone == [expected]
    assert texts(sample(num_samples=3, max_new_tokens=80, **settings))[0] == expected


def test_a_line_of_fifteen_dashes_after_each_sample_and_nothing_else(sample, project):
    before = tree(project)
    for count in (1, 4):
        result = sample(num_samples=count, max_new_tokens=20, start="abc")
        assert [line for line in result.lines if set(line) == {"-"}] == [DASHES] * count
        found = texts(result)
        assert len(found) == count and result.lines[-1] == DASHES
        assert all(text.startswith("abc") and len(text) == 23 for text in found)
    assert len(set(found)) == 4
    assert tree(project) == before


def test_a_sample_does_not_hang_on_how_many_there_are(sample):
    found = {count: texts(sample(num_samples=count, max_new_tokens=60)) for count in (1, 2, 5)}
    assert found[5][:2] == found[2] and found[2][:1] == found[1]
    # and sample k is what --seed=seed+k begins with, but for the first's own place in the numbers
    assert texts(sample(num_samples=2, max_new_tokens=60, seed=1336))[1] != found[2][1]


def test_the_same_command_gives_the_same_text_and_another_seed_another(sample):
    first, again = (sample(num_samples=2, max_new_tokens=40).stdout for _ in range(2))
    assert first == again != sample(num_samples=2, max_new_tokens=40, seed=1).stdout


@pytest.mark.parametrize("how", [dict(temperature=0), dict(temperature=0.0, top_k=5), dict(top_k=1)], ids=str)
def test_temperature_0_is_greedy(sample, synthetic_run, how):
    expected = nanogpts_text(synthetic_run[0], "ab", 1, 50, greedy=True)
    assert texts(sample(num_samples=2, start="ab", max_new_tokens=50, seed=5, **how)) == [expected] * 2


def test_a_window_that_moves_in_steps_gives_the_same_text_until_it_moves(sample):
    exact, stepped = (texts(sample(num_samples=1, max_new_tokens=80, window_step=n))[0] for n in (1, 8))
    assert len(stepped) == 81 and stepped[:33] == exact[:33]


def test_no_new_tokens_is_the_prompt(sample):
    assert texts(sample(num_samples=2, max_new_tokens=0, start="abc")) == ["abc", "abc"]
    assert texts(sample(num_samples=1, max_new_tokens=0, start="abc")) == ["abc"]


def test_a_prompt_longer_than_the_context_is_kept_whole(sample):
    start = "the quick brown fox jumps over the lazy dog and runs away"
    for count in (1, 2):
        assert all(t.startswith(start) for t in texts(sample(num_samples=count, max_new_tokens=5, start=start)))


def test_a_prompt_that_looks_like_a_number_is_a_text(sample):
    assert texts(sample(num_samples=1, max_new_tokens=3, start="1234"))[0].startswith("1234")


def test_nothing_is_compiled_unless_asked_for(run, synthetic_run):
    arguments = [*CPU, f"--out_dir={synthetic_run[0]}", "--num_samples=1", "--max_new_tokens=2"]
    run("tests/programs/refuse_compile.py", *arguments)
    assert "compiled" in run("tests/programs/refuse_compile.py", *arguments, "--compile=True", expect=1).stderr


# ----------------------------------------------------------------------------------------------
# prompts


def test_file_reads_the_prompt_from_a_file_relative_to_where_the_user_stands(sample, tmp_path):
    (tmp_path / "my prompt.txt").write_text("two\nlines", encoding="utf-8")
    result = sample(num_samples=1, max_new_tokens=5, start="FILE:my prompt.txt", cwd=tmp_path)
    assert texts(result)[0].startswith("two\nlines")


@pytest.mark.parametrize("prompt, says", [("café", "'é' (U+00E9)"), ("a\tb", "'\\t' (U+0009)"), ("a🙂", "U+1F642")])
def test_a_character_that_the_vocabulary_lacks_is_named(sample, prompt, says):
    for count in (1, 2):
        result = sample(start=prompt, num_samples=count, expect=2)
        assert says in error_line(result) and result.stdout == ""


def interactive(project, out_dir, stdin, **options):
    """The finished process of a new interpreter."""
    command = [sys.executable, str(project / "sample.py"), *CPU, f"--out_dir={out_dir}", "--interactive=True",
               "--max_new_tokens=4"]  # fmt: skip
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=300, **options)


def test_prompts_from_stdin_one_by_one(project, synthetic_run):
    done = interactive(project, synthetic_run[0], "abc\n\u00e9\nxyz\n".encode())
    assert done.returncode == 0, done.stderr
    first, second, rest = done.stdout.decode().split(f"\n{DASHES}\n")
    assert first.startswith("abc") and len(first) == 7 and second.startswith("xyz") and len(second) == 7 and not rest
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("error: ") and "'\u00e9'" in line


# ----------------------------------------------------------------------------------------------
# characters and tokens


def test_where_the_data_folder_is_gone_the_checkpoints_own_codec_serves(sample, own_project, synthetic_run):
    expected = texts(sample(num_samples=2, max_new_tokens=20))
    for path in (own_project / "data" / "synthetic").iterdir():
        path.unlink()
    (own_project / "data" / "synthetic").rmdir()
    assert texts(sample(num_samples=2, max_new_tokens=20, project=own_project)) == expected


def test_the_data_folders_meta_serves_a_checkpoint_of_nanogpts(sample, synthetic_run, tmp_path):
    """Six keys, `_orig_mod.` prefixes, a tensor for best_val_loss: and no codec in it."""
    as_nanogpt_saves(synthetic_run[0] / "ckpt.pt", tmp_path / "ckpt.pt")
    ours = texts(sample(num_samples=2, max_new_tokens=30))
    assert texts(sample(num_samples=2, max_new_tokens=30, out_dir=tmp_path)) == ours


def test_a_meta_that_is_not_one_is_an_error_where_the_checkpoint_has_no_codec(
    sample, own_project, synthetic_run, tmp_path
):
    edited(synthetic_run[0] / "ckpt.pt", tmp_path, lambda saved: saved.pop("meta"))
    meta = own_project / "data" / "synthetic" / "meta.pkl"
    for content in (b"", b"not a pickle", pickle.dumps([1, 2])):
        meta.write_bytes(content)
        assert "meta.pkl" in error_line(sample(project=own_project, out_dir=tmp_path, expect=2))
    for content in ({"vocab_size": 61}, {"vocab_size": 61, "stoi": 3, "itos": 4}):
        meta.write_bytes(pickle.dumps(content))
        assert "no characters" in error_line(sample(project=own_project, out_dir=tmp_path, expect=2))


def edited(path, to, edit):
    saved = torch.load(path)
    edit(saved)
    torch.save(saved, to / "ckpt.pt")
    return to


def test_ids_that_pad_a_vocabulary_of_characters_are_never_sampled(sample, synthetic_run, tmp_path):
    def pad(saved):
        """Ids 61 to 63, which no character has; the model would have nothing else."""
        old = saved["model"]["transformer.wte.weight"]
        wte = torch.cat([old, torch.zeros(3, 64)])
        wte[61:] = 30 * old.mean(0, keepdim=True)
        saved["model"]["transformer.wte.weight"] = saved["model"]["lm_head.weight"] = wte
        saved["model_args"]["vocab_size"] = 64

    edited(synthetic_run[0] / "ckpt.pt", tmp_path, pad)
    for count in (1, 4):
        found = texts(sample(num_samples=count, max_new_tokens=60, out_dir=tmp_path, temperature=3.0))
        assert [len(text) for text in found] == [61] * count


def test_a_model_with_fewer_ids_than_its_datasets_characters_is_an_error(sample, synthetic_run, tmp_path):
    def cut(saved):
        for name in ("transformer.wte.weight", "lm_head.weight"):
            saved["model"][name] = saved["model"][name][:60].clone()
        saved["model_args"]["vocab_size"] = 60

    edited(synthetic_run[0] / "ckpt.pt", tmp_path, cut)
    assert "60 token ids, fewer than the 61" in error_line(sample(out_dir=tmp_path, expect=2))


def test_without_a_meta_the_tokens_are_gpt2s_and_its_padding_is_never_sampled(run, sample, own_project, shared, tmp_path):
    if not (shared / "tiktoken").is_dir():
        pytest.skip("no ../shared/tiktoken")
    write_synthetic(own_project / "data" / "bpe", meta=None)
    settings = TINY | dict(dataset="bpe", n_embd=8, max_iters=0, eval_iters=1, eval_interval=1)
    run("train.py", *flags(settings, out_dir=tmp_path / "out"), project=own_project)
    saved = torch.load(tmp_path / "out" / "last.pt")
    wte = saved["model"]["transformer.wte.weight"]
    assert wte.shape == (50304, 8)
    wte[50257:] = 100 * wte[50257:]
    saved["model"]["lm_head.weight"] = wte
    torch.save(saved, tmp_path / "out" / "ckpt.pt")
    for count in (1, 3):
        result = sample(num_samples=count, max_new_tokens=40, start="Hello, <|endoftext|>caf\u00e9", out_dir=tmp_path / "out",
                        project=own_project, temperature=2.0)  # fmt: skip
        found = texts(result)
        assert len(found) == count and all(t.startswith("Hello, <|endoftext|>caf\u00e9") and len(t) > 40 for t in found)


def test_where_there_is_no_vocabulary_of_gpt2s_to_be_had_it_is_one_line(sample, own_project, synthetic_run, tmp_path):
    def with_gpt2s_ids(saved):
        saved["model"]["transformer.wte.weight"] = saved["model"]["lm_head.weight"] = torch.zeros(50304, 64)
        saved["model_args"]["vocab_size"] = 50304
        del saved["meta"]

    (own_project / "data" / "synthetic" / "meta.pkl").unlink()
    edited(synthetic_run[0] / "ckpt.pt", tmp_path, with_gpt2s_ids)
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    nowhere["TIKTOKEN_CACHE_DIR"] = str(tmp_path / "none")
    result = sample(out_dir=tmp_path, project=own_project, env=nowhere, expect=2)
    assert "TIKTOKEN_CACHE_DIR" in error_line(result)


@pytest.mark.parametrize("init_from", ["gpt3", "scratch", "auto", ""])
def test_init_from_takes_resume_or_a_gpt2_only(sample, init_from):
    assert f"--init_from={init_from}: takes resume" in error_line(sample(init_from=init_from, expect=2))


def test_bfloat16_samples_too(run, synthetic_run):
    arguments = [f"--out_dir={synthetic_run[0]}", "--device=cpu", "--dtype=bfloat16", "--max_new_tokens=50"]
    found = {count: texts(run("sample.py", *arguments, f"--num_samples={count}")) for count in (1, 3)}
    for count, samples in found.items():
        assert [len(text) for text in samples] == [51] * count
        assert all(set(text) <= set(META["stoi"]) for text in samples)


# ----------------------------------------------------------------------------------------------
# sample.py as a user sees it


# the same characters in another order, as another text may bring them
BACKWARDS = {
    "vocab_size": 61,
    "stoi": {c: i for i, c in enumerate(reversed(CHARACTERS))},
    "itos": dict(enumerate(reversed(CHARACTERS))),
}


def texts_of(result):
    """The samples: what stands before each line of dashes."""
    *found, rest = result.stdout.split(f"\n{DASHES}\n")
    assert rest == "", rest
    return found


# ----------------------------------------------------------------------------------------------
# which characters the ids are


def test_a_dataset_prepared_from_another_text_leaves_the_runs_samples_alone(sample, own_project, synthetic_run):
    expected = sample(num_samples=2, max_new_tokens=20)
    write_synthetic(own_project / "data" / "synthetic", BACKWARDS)
    result = sample(num_samples=2, max_new_tokens=20, project=own_project)
    assert texts_of(result) == texts_of(expected)
    [line] = result.stderr.splitlines()
    assert f"using those in {synthetic_run[0] / 'ckpt.pt'}" in line
    assert expected.stderr == ""


def test_a_broken_meta_does_not_matter_where_the_checkpoint_has_the_characters(sample, own_project):
    expected = sample(num_samples=2, max_new_tokens=20).stdout
    for content in (b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"vocab_size": 61})):
        (own_project / "data" / "synthetic" / "meta.pkl").write_bytes(content)
        result = sample(num_samples=2, max_new_tokens=20, project=own_project)
        assert result.stdout == expected and result.stderr == ""


def test_the_data_folders_characters_serve_a_checkpoint_without_any(sample, own_project, synthetic_run, tmp_path):
    edited(synthetic_run[0] / "ckpt.pt", tmp_path, lambda saved: saved.pop("meta"))
    expected = texts_of(sample(num_samples=1, max_new_tokens=20, start="abc"))
    assert texts_of(sample(num_samples=1, max_new_tokens=20, start="abc", out_dir=tmp_path)) == expected
    write_synthetic(own_project / "data" / "synthetic", BACKWARDS)
    [other] = texts_of(sample(num_samples=1, max_new_tokens=0, start="abc", out_dir=tmp_path, project=own_project))
    assert other == "abc"


# ----------------------------------------------------------------------------------------------
# prompts


def without_line_feed(saved):
    """The model's characters have no line feed: its id is a tilde's."""
    itos = dict(enumerate("~" + CHARACTERS[1:]))
    saved["meta"] = {"vocab_size": 61, "stoi": {c: i for i, c in itos.items()}, "itos": itos}


@pytest.fixture
def no_line_feed(synthetic_run, own_project, tmp_path):
    """(out_dir of a model whose vocabulary has no line feed, a project with its dataset)"""
    edited(synthetic_run[0] / "ckpt.pt", tmp_path, without_line_feed)
    write_synthetic(own_project / "data" / "synthetic", torch.load(tmp_path / "ckpt.pt")["meta"])
    return {"out_dir": tmp_path, "project": own_project}


def test_where_the_default_prompt_is_unknown_a_character_of_the_vocabulary_begins_and_that_is_said(sample, no_line_feed):
    for count in (1, 2):
        result = sample(num_samples=count, max_new_tokens=20, **no_line_feed)
        found = texts_of(result)
        assert len(found) == count and all(text[0] == "~" and len(text) == 21 for text in found)
        [line] = result.stderr.splitlines()
        assert r"'\n'" in line and "default prompt" in line and "begin with '~'" in line


def test_a_prompt_that_was_given_is_taken_as_given_or_refused(sample, no_line_feed, tmp_path):
    assert "no tokens for '\\n'" in error_line(sample("--start='\\n'", expect=2, **no_line_feed))
    (tmp_path / "prompt.txt").write_text("\n")
    assert "no tokens for '\\n'" in error_line(sample("--start=FILE:prompt.txt", cwd=tmp_path, expect=2, **no_line_feed))
    (tmp_path / "mine.py").write_text("start = '\\n'\n")
    assert "no tokens for '\\n'" in error_line(sample("mine.py", cwd=tmp_path, expect=2, **no_line_feed))
    result = sample(num_samples=1, max_new_tokens=0, start="ab", **no_line_feed)
    assert texts_of(result) == ["ab"] and result.stderr == ""


@pytest.mark.parametrize("content", [b"one\r\ntwo\r\n", b"one\rtwo\r", b"\xef\xbb\xbfone\ntwo\n", b"\xef\xbb\xbfone\r\ntwo\n"])
def test_a_prompt_file_may_come_from_any_system(sample, tmp_path, content):
    (tmp_path / "prompt.txt").write_bytes(content)
    assert texts_of(sample(num_samples=1, max_new_tokens=0, start="FILE:prompt.txt", cwd=tmp_path)) == ["one\ntwo\n"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_prompt_file_in_utf16_is_named_as_such(sample, tmp_path, encoding):
    (tmp_path / "prompt.txt").write_bytes("some words\n".encode(encoding))
    line = error_line(sample(start="FILE:prompt.txt", cwd=tmp_path, expect=2))
    assert line.startswith("--start=FILE:prompt.txt: not UTF-8 text") and "UTF-16" in line


def test_start_is_taken_as_typed(sample):
    assert "'\\r' (U+000D)" in error_line(sample("--start='a\\r\\nb'", expect=2))
    assert "U+FEFF" in error_line(sample("--start=\ufeffa", expect=2))


@pytest.mark.parametrize("stdin", [
    b"abc\r\nxyz\r\n", b"abc\rxyz\r", b"\xef\xbb\xbfabc\nxyz\n", b"\xef\xbb\xbfabc\r\nxyz", b"abc\nxyz",
])  # fmt: skip
def test_prompts_on_stdin_may_come_from_any_system(sample, stdin):
    first, second = texts(sample(interactive=True, max_new_tokens=4, stdin=stdin))
    assert (first[:3], second[:3]) == ("abc", "xyz") and len(first) == len(second) == 7


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_stdin_in_utf16_is_named_as_such_once(sample, encoding):
    result = sample(interactive=True, stdin="abc\nxyz\nabc\n".encode(encoding), expect=2)
    line = error_line(result)
    assert line.startswith("stdin") and "UTF-16" in line and result.stdout == ""


def test_interactive_with_stdin_closed_is_one_line(project, synthetic_run):
    done = interactive(project, synthetic_run[0], None, preexec_fn=lambda: os.close(0))
    [line] = done.stderr.decode().splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "stdin" in line and done.stdout == b""


def test_interactive_with_nothing_on_stdin_ends_well(sample):
    result = sample(interactive=True)
    assert (result.stdout, result.stderr) == ("", "")


# ----------------------------------------------------------------------------------------------
# settings and failures


def test_top_k_0_draws_from_all_tokens(sample):
    everything = texts_of(sample(num_samples=2, max_new_tokens=60, top_k=61, temperature=2.0))
    assert texts_of(sample(num_samples=2, max_new_tokens=60, top_k=0, temperature=2.0)) == everything
    assert texts_of(sample(num_samples=1, max_new_tokens=60, top_k=0, temperature=2.0)) == everything[:1]
    assert texts_of(sample(num_samples=2, max_new_tokens=60, top_k=2, temperature=2.0)) != everything


def test_a_config_file_of_train_serves_sample_too(sample, synthetic_run, tmp_path):
    (tmp_path / "mine.py").write_text(f"out_dir = {str(synthetic_run[0])!r}\nmax_iters = 5000\nlearning_rate = 1e-3\n")
    result = sample("mine.py", num_samples=1, max_new_tokens=3, start="abc", cwd=tmp_path)
    note, *rest = result.lines
    assert note == "note: config file mine.py sets names that are no settings: max_iters, learning_rate"
    assert rest[0].startswith("abc") and rest[-1] == DASHES


def test_out_of_memory_names_what_sample_can_change(run, synthetic_run, project):
    (project / "exhausted.py").write_text(
        "import os, runpy, sys, torch\n"
        "def exponential_(*args, **options):\n    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')\n"
        "torch.Tensor.exponential_ = exponential_\n"
        "sys.argv[0] = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'sample.py')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    result = run("exhausted.py", *CPU, f"--out_dir={synthetic_run[0]}", expect=1)
    [line] = result.stderr.splitlines()
    assert line.startswith("error: out of memory: ") and "--num_samples" in line
    assert "batch_size" not in line and "block_size" not in line


@pytest.mark.parametrize("num_samples", [1, 3])
def test_stop_cuts_todays_samples_and_leaves_the_prompt(run, synthetic_run, num_samples):
    arguments = [*CPU, *flags(out_dir=synthetic_run[0], num_samples=num_samples, max_new_tokens=60, start="ab")]
    plain = run("sample.py", *arguments).stdout
    assert run("sample.py", *arguments, "--top_p=1.0").stdout == plain
    ends = "\n" + "-" * 15 + "\n"
    samples = plain.split(ends)[:-1]
    assert len(samples) == num_samples
    stop = samples[0][10]
    expected = "".join("ab" + text.removeprefix("ab").partition(stop)[0] + ends for text in samples)
    assert run("sample.py", *arguments, f"--stop={stop}").stdout == expected
    assert run("sample.py", *arguments, "--stop=ab", "--top_k=1").stdout.startswith("ab")


@pytest.mark.parametrize("argument, said", [
    ("--top_p=0", "--top_p=0.0: must be above 0 and at most 1"),
    ("--top_p=1.5", "--top_p=1.5"), ("--top_p=-1", "--top_p=-1.0"),
])  # fmt: skip
def test_a_top_p_that_cannot_be_is_one_line(run, synthetic_run, argument, said):
    assert said in error_line(run("sample.py", *CPU, f"--out_dir={synthetic_run[0]}", argument, expect=2))
