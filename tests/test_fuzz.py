"""Garbage in every input: one line and no harm, whatever the bytes. The examples are the same each time."""

import ast
import functools
import json
import os
import pickle
import random
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import META, ROOT, TINY, flags, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import Settings, configure
from data.bins import check_bin, check_ids, open_bin, open_checked
from data.dataset import Dataset
from data.folder import write_dataset
from data.meta import read_meta
from data.streaming import stream_text
from data.tokenizer import codec_of_tokenizer, train_tokenizer
from data.codecs import CharCodec
from data.tokens import Tokens
from model import GPT
from nanogpt import checkpoint as ckpt
from nanogpt.device import pick_compile, pick_device, pick_dtype
from nanogpt.distributed import share_evenly
from nanogpt.errors import UserError
from nanogpt.optim import restore_optimizer
from nanogpt.run_folder import restore_generators

pytestmark = pytest.mark.slow

SMALL = TINY | dict(max_iters=4, save_interval=2, eval_interval=2)


def fuzz(examples):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=20_000,
                    suppress_health_check=quiet)  # fmt: skip


# A mutation: (kind, where as a share of the length, bytes).
MUTATION = st.tuples(
    st.sampled_from(["flip", "set", "cut", "insert", "remove", "repeat"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=9),
)


def mutate(data, mutations):
    for kind, share, some in mutations:
        at = int(share * len(data))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << some[0] % 8)]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + some + data[at + len(some) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + some + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + some[0] + 1 :]
        elif kind == "repeat":
            data = data[: at + some[0]] + data[at:]
    return data


MUTATIONS = st.lists(MUTATION, min_size=1, max_size=3)


def one_line(error):
    """What a user would see of `error`: a text, which says something."""
    assert str(error).strip()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A tiny model's threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """out_dir of a finished run."""
    out_dir = tmp_path_factory.mktemp("saved") / "out"
    run("train.py", *flags(SMALL, out_dir=out_dir), env={"OMP_NUM_THREADS": "1"})
    return out_dir


# ----------------------------------------------------------------------------------------------
# the dataset


@fuzz(300)
@given(mutations=MUTATIONS, protocol=st.integers(0, 5))
def test_a_mutated_meta_is_a_table_or_one_line(tmp_path, mutations, protocol):
    path = tmp_path / "meta.pkl"
    path.write_bytes(mutate(pickle.dumps(META, protocol), mutations))
    try:
        meta = read_meta(str(path))
        if "stoi" in meta:
            codec = CharCodec(meta)
            assert codec.decode(codec.encode("".join(codec.stoi))) == "".join(codec.stoi)
        assert 1 <= meta["vocab_size"] <= 65536
    except UserError as error:
        one_line(error)


@fuzz(200)
@given(data=st.binary(max_size=400))
def test_random_bytes_are_no_meta(tmp_path, data):
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(UserError):
        read_meta(str(tmp_path / "meta.pkl"))


@fuzz(200)
@given(mutations=st.lists(MUTATION, max_size=3), vocab_size=st.integers(1, 70), block_size=st.integers(1, 120))
def test_a_mutated_bin_gives_batches_of_known_ids_or_one_line(tmp_path, mutations, vocab_size, block_size):
    path = str(tmp_path / "train.bin")
    with open(path, "wb") as f:
        f.write(mutate((np.arange(100) % 61).astype("<u2").tobytes(), mutations))
    try:
        open_checked(path, block_size, "name")
        check_bin(path, vocab_size)
    except UserError as error:
        one_line(error)
        return
    tokens, _ = open_bin(path)
    assert len(tokens) > block_size and tokens.max() < vocab_size
    check_ids(tokens[None, : block_size + 1], vocab_size, path, np.array([0]))


@functools.cache
def small_tokenizer():
    return train_tokenizer(["a word, another word and other words\n" * 3], 270)


def own_tokens(folder):
    """Writes a dataset in tokens of its own to `folder`."""
    ids = np.arange(600) % 270
    write_dataset(str(folder), [(ids, 600)], [(ids, 600)], 270, tokenizer=small_tokenizer())


@fuzz(300)
@given(name=st.sampled_from(["dataset.json", "tokenizer.json", "train.bin", "val.bin"]), mutations=MUTATIONS)
def test_a_mutated_file_of_a_dataset_in_its_own_tokens_is_one_line_or_changes_nothing(tmp_path, name, mutations):
    own_tokens(tmp_path / "data" / "mine")
    path = tmp_path / "data" / "mine" / name
    path.write_bytes(mutate(path.read_bytes(), mutations))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.folder.ROOT", str(tmp_path))
        try:
            data = Dataset("mine", 16)
            data.check_bins(data.tokens.model_vocab_size, None)
            codec = data.tokens.codec
        except UserError as error:
            one_line(error)
            return
    assert 256 <= data.tokens.vocab_size and codec.decode(codec.encode("some words")) == "some words"


def use(codec):
    """What sample.py does with a codec."""
    text = "some other words"
    try:
        ids = codec.encode(text)
    except UserError as error:
        one_line(error)
        return
    assert all(0 <= i < codec.vocab_size for i in ids)
    codec.decode(ids)
    assert "".join(stream_text(ids[:1], iter(ids[1:]), codec)) == codec.decode(ids)
    assert any(codec.known(i) for i in range(codec.vocab_size))


@fuzz(400)
@given(mutations=MUTATIONS)
def test_a_mutated_tokenizer_in_a_checkpoint_is_a_codec_or_one_line(mutations):
    text = mutate(small_tokenizer().encode(), mutations).decode(errors="replace")
    checkpoint = {"model_args": {"vocab_size": 1 << 24}}
    try:
        codec = Tokens.of_run(checkpoint | {"tokenizer": text}, "out/ckpt.pt", "nowhere").codec
    except UserError as error:
        one_line(error)
        return
    use(codec)


@fuzz(400)
@given(share=st.floats(0, 1, exclude_max=True), value=st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([2**31, 2**40, -1, 1e99]), st.text(max_size=3),
    st.just([]), st.just({}), st.just([["a", "b"]]), st.just({"a": 1}), st.just({"type": "NFC"}),
), remove=st.booleans(), top=st.booleans())  # fmt: skip
def test_a_tokenizer_json_with_something_odd_in_it_is_a_codec_or_one_line(share, value, remove, top):
    content = json.loads(small_tokenizer())
    everywhere = [path for path in places(content) if not top or "vocab" not in path and "merges" not in path[:-1]]
    path = everywhere[int(share * len(everywhere))]
    try:
        codec = codec_of_tokenizer(json.dumps(put(content, path, value, remove)), "tokenizer.json")
    except UserError as error:
        one_line(error)
        return
    use(codec)


@fuzz(200)
@given(data=st.binary(max_size=300))
def test_random_bytes_are_no_dataset_json_and_no_tokenizer_json(tmp_path, data):
    own_tokens(tmp_path)
    for name in ("tokenizer.json", "dataset.json"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError):
            Tokens.of_dataset(str(tmp_path)).codec  # noqa: B018


# ----------------------------------------------------------------------------------------------
# checkpoints


def resume(out_dir):
    """What train.py does with a checkpoint before it trains."""
    checkpoint, path, _ = ckpt.load_run(str(out_dir))
    names = [name for name in SETTINGS if name not in ("device", "dtype")]
    Settings(dict(SETTINGS), names, {}).adopt(checkpoint["config"])
    model = GPT.from_checkpoint(checkpoint, path)
    name = checkpoint["config"].get("optimizer", "adamw")
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", "muon" if name == "muon" else "adamw")
    restore_optimizer(optimizer, torch.amp.GradScaler("cpu", enabled=False), checkpoint, path)
    for point in checkpoint.get("points", []):
        restore_generators(point["generators"], "cpu", torch.Generator())
    idx = torch.zeros((1, 2), dtype=torch.int64) if model.config.block_size > 1 else torch.zeros((1, 1)).long()
    model(idx, idx)[1].backward()
    optimizer.step()
    return checkpoint


@fuzz(250)
@given(mutations=MUTATIONS)
def test_a_mutated_checkpoint_is_the_saved_one_or_one_line(saved, tmp_path, mutations):
    whole = (saved / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(mutate(whole, mutations))
    try:
        checkpoint = resume(tmp_path)
    except (UserError, OSError) as error:
        one_line(error)
        return
    original = torch.load(saved / "last.pt")
    assert all(torch.equal(w, original["model"][name]) for name, w in checkpoint["model"].items())
    assert checkpoint["iter_num"] == original["iter_num"]


@fuzz(150)
@given(last=MUTATIONS, best=st.lists(MUTATION, max_size=2))
def test_one_whole_checkpoint_beside_a_mutated_one_is_found(saved, tmp_path, last, best):
    for name, mutations in (("last.pt", last), ("ckpt.pt", best)):
        (tmp_path / name).write_bytes(mutate((saved / name).read_bytes(), mutations))
    try:
        checkpoint, path, remarks = ckpt.load_run(str(tmp_path))
    except (UserError, OSError) as error:
        assert best  # or ckpt.pt would have been whole
        one_line(error)
        return
    original = torch.load(saved / os.path.basename(path))
    assert all(torch.equal(w, original["model"][name]) for name, w in checkpoint["model"].items())
    assert all("\n" not in remark for remark in remarks)
    ckpt.newest(str(tmp_path))
    ckpt.load_model_file(str(tmp_path))


@fuzz(150)
@given(data=st.binary(max_size=300), archive=st.booleans())
def test_random_bytes_are_no_checkpoint(tmp_path, data, archive):
    path = tmp_path / "last.pt"
    path.write_bytes(data)
    if archive:
        with zipfile.ZipFile(path, "w") as f:
            f.writestr("archive/data.pkl", data)
            f.writestr("archive/version", "3\n")
    for read in (resume, lambda out_dir: ckpt.load(str(path)), lambda out_dir: ckpt.load_model_file(str(out_dir))):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        one_line(error.value)
    assert ckpt.peek(str(tmp_path)) == {}


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([10**9, 2**63, 2**70, -(2**40)]), st.floats(),
    st.text(max_size=3), st.just([]), st.just({}), st.just([1, "a"]), st.just({"a": 1}), st.just({1: {}}),
    st.just(torch.zeros(3)), st.just(torch.zeros(2, 2).to_sparse()), st.just(torch.ones((), dtype=torch.int64)),
    st.just(torch.tensor([float("nan")])), st.just(torch.zeros(0)), st.just(torch.ones(2, dtype=torch.complex64)),
)  # fmt: skip


def places(thing, path=()):
    """Paths to everything inside dicts, lists and tuples."""
    found = [path] if path else []
    if isinstance(thing, (dict, list, tuple)):
        for key in thing if isinstance(thing, dict) else range(len(thing)):
            found += places(thing[key], (*path, key))
    return found


def put(thing, path, value, remove):
    """A copy of `thing` with another value at `path`, or without what is there."""
    key, *rest = path
    copy = dict(thing) if isinstance(thing, dict) else list(thing)
    if rest:
        copy[key] = put(thing[key], rest, value, remove)
    elif remove:
        del copy[key]
    else:
        copy[key] = value
    return tuple(copy) if isinstance(thing, tuple) else copy


@fuzz(250)
@given(share=st.floats(0, 1, exclude_max=True), value=ODD, remove=st.booleans(), top=st.booleans())
def test_a_checkpoint_with_something_odd_in_it_goes_on_or_gets_one_line(saved, tmp_path, share, value, remove, top):
    """Its bytes are whole, and a value in it is another, or missing."""
    original = torch.load(saved / "last.pt")
    everywhere = [path for path in places(original) if len(path) < 3 or not top]
    path = everywhere[int(share * len(everywhere))]
    torch.save(put(original, path, value, remove), tmp_path / "last.pt")
    try:
        with warnings.catch_warnings(action="ignore"):
            resume(tmp_path)
    except (UserError, OSError) as error:
        one_line(error)


# ----------------------------------------------------------------------------------------------
# settings


def read_settings():
    """train.py's settings, as it sets them, without running it."""
    found = {}
    for node in ast.parse((ROOT / "train.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "settings":
                return found
            found[node.targets[0].id] = eval(compile(ast.Expression(node.value), "train.py", "eval"))


SETTINGS = read_settings()

VALUES = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from([
        "", "=", "[", "{[]: 1}", "{{}: 1}", "None", "True", "1" * 400, "1" * 5000, "0x" + "f" * 6000, "1e400", "-1",
        "nan", "inf", "-inf", "1_000", "1.", ".", "'", '"""', "(" * 300, "-" * 500 + "1", "lambda: 1", "1j", "auto",
        "__import__('os')", "b'x'", "f'{x}'", "cpu:", "cpu:0", "cpu:00", "cuda", "cuda:99", "cuda:\u00b2", "cpu:-1",
        "meta", "\udcff", "\u2028", "../..", "/dev/null", "float64", "0", "1", "'\\d'", "'\\N{dash}'", "1if 1else 2",
    ]),
)  # fmt: skip
ARGUMENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([*SETTINGS, "nonsense", "", "-", "n_layer "]), VALUES).map("--{0[0]}={0[1]}".format),
        st.tuples(st.sampled_from(["--", "-", "", "---", "--n_layer", "-h=", "--help=1"]), VALUES).map("".join),
    ),
    max_size=4,
)


def set_up(namespace):
    """The checks that train.py makes of its settings before anything else."""
    device = pick_device(namespace["device"])
    torch.device(device)
    pick_dtype(namespace["dtype"], device)
    pick_compile(namespace["compile"], device, print)
    Settings(namespace, list(namespace), {}).at_least(0, "seed max_iters learning_rate")
    share_evenly(namespace["gradient_accumulation_steps"], 1)
    torch.Generator().manual_seed(namespace["seed"])


@fuzz(600)
@given(arguments=ARGUMENTS)
def test_any_command_line_is_taken_or_gets_one_line(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *[a for a in arguments if a not in ("--help", "-h")]])
    namespace = dict(SETTINGS)
    with warnings.catch_warnings(action="error"):  # one would be printed to the user
        try:
            configure(namespace)
            set_up(namespace)
        except (UserError, OSError) as error:
            one_line(error)
    assert {k: type(v) for k, v in namespace.items() if SETTINGS[k] != "auto"} == {
        k: type(v) for k, v in SETTINGS.items() if v != "auto"
    }


CONFIG = """import math
out_dir = "out"  # a comment
eval_interval = 250 * 2
learning_rate = 1e-3 if eval_interval > 3 else 2.0
block_size = int(math.sqrt(64))
dataset = 'synthetic'
compile = False
"""


@fuzz(300)
@given(mutations=MUTATIONS, random_bytes=st.none() | st.binary(max_size=60))
def test_a_mutated_config_file_is_taken_or_gets_one_line(monkeypatch, tmp_path, mutations, random_bytes):
    path = tmp_path / "config.py"
    path.write_bytes(mutate(CONFIG.encode(), mutations) if random_bytes is None else random_bytes)
    monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
    namespace = dict(SETTINGS)
    with warnings.catch_warnings(action="ignore"):  # Python's own, of the user's source
        try:
            configure(namespace)
        except (UserError, OSError) as error:
            one_line(error)
    assert all(name in namespace for name in SETTINGS)


LINES = st.sampled_from([
    "n_layer = 10 ** 5000", "learning_rate = 10 ** 400", "n_layer = None", "n_layer = True", "lr = 1",
    "raise SystemError",
    "def f(): pass", "f = lambda: 1", "from os import path", "import os", "n_layer = [1]", "1 / 0", "n_layer", "_x = 1",
    "out_dir = 'a\\0b'", "x = y", "globals().clear()", "del n_layer", "n_layer += 1", "seed = -1",
    "dropout = float('nan')",
    "class A: pass\nn_layer = A()", "n_layer = 2.0", "\tindented", "'''", "# -*- coding: nonsense -*-",
    "import nothing_of_this_name", "raise ValueError('two\\nlines')", "assert False", "open('/nowhere')",
    "def r(): r()\nr()", "if True:\n    n_layer = 3",
])  # fmt: skip


@fuzz(200)
@given(lines=st.lists(LINES, min_size=1, max_size=4))
def test_an_odd_config_file_is_taken_or_gets_one_line(monkeypatch, tmp_path, lines):
    (tmp_path / "config.py").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "config.py")])
    namespace = dict(SETTINGS)
    try:
        configure(namespace)
        set_up(namespace)
    except (UserError, OSError) as error:
        one_line(error)


# ----------------------------------------------------------------------------------------------
# whole runs


def spoil(project, out_dir, draw):
    """Mutates one of the inputs that lie there; returns what to add to the command line."""
    data = project / "data" / "synthetic"
    kinds = ["flip", "set", "cut", "insert", "remove", "repeat"]
    mutations = [
        (draw.choice(kinds), draw.random(), draw.randbytes(draw.randint(1, 9))) for _ in range(draw.randint(1, 3))
    ]
    what = draw.choice(["train.bin", "val.bin", "meta.pkl", "last.pt", "ckpt.pt", "log.csv", "config", "arguments"])
    if draw.random() < 0.2:
        own_tokens(data)
        what = draw.choice(["dataset.json", "tokenizer.json", "train.bin"])
    if what == "config":
        (project / "odd.py").write_bytes(mutate(b"max_iters = 6\neval_iters = 1\nlog_interval = 2\n", mutations))
        return what, [str(project / "odd.py")]
    if what == "arguments":
        name = draw.choice([*SETTINGS])
        odd = ["0", "-1", "1", "2", "x", "", "1e-3", "nan", "[1]", "True", "None", "cpu:", "1.5", "\udcff", "/proc/x"]
        odd += ["1" * 18, "1" * 300]
        return what, [f"--{name}={draw.choice(odd)}", "--max_iters=6"]
    path = (out_dir if what.endswith(("pt", "csv")) else data) / what
    path.write_bytes(mutate(path.read_bytes(), mutations))
    return what, []


@pytest.mark.parametrize("seed", range(48))
def test_a_run_on_garbage_ends_well_and_costs_nothing(start, own_project, tmp_path, saved, seed):
    """No traceback, no hang, the dataset's bytes as they were, and a good checkpoint still there."""
    draw, out_dir = random.Random(seed), tmp_path / "out"
    out_dir.mkdir()
    for name in ("last.pt", "ckpt.pt", "log.csv"):
        (out_dir / name).write_bytes((saved / name).read_bytes())
    what, more = spoil(own_project, out_dir, draw)
    dataset = tree(own_project / "data")
    init_from = draw.choice(["resume", "auto", "scratch"])
    base = flags(SMALL, out_dir=out_dir, init_from=init_from, max_iters=6)
    if what == "arguments" and more[0].startswith(("--n_", "--batch", "--block", "--eval_iters", "--gradient")):
        more[0] = more[0].replace("1" * 18, "-7")  # which would rightly take for ever
    running = start("train.py", *base, *more, project=own_project, env={"OMP_NUM_THREADS": "1"})
    running.wait(lambda: False, seconds=60)
    result = running.end()
    assert result.returncode in (0, 1, 2) and "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == (result.returncode != 0) and len(result.stderr.splitlines()) <= 1, result.stderr
    assert tree(own_project / "data") == dataset
    kept = [path for path in tmp_path.rglob("*.pt") if path.stat().st_size]
    whole = []
    for path in kept:
        try:
            whole.append(ckpt.load(str(path)))
        except UserError:
            assert what == path.name or what in ("last.pt", "ckpt.pt")
    assert max(checkpoint["iter_num"] for checkpoint in whole) >= 4
