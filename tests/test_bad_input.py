"""Bad input costs nothing: one `error:` line, exit code 2, and no file changed, made or removed."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import META, TINY, error_line, flags, tree, write_synthetic
SYNTHETIC_BIN = "data/synthetic/{}.bin"


@pytest.fixture(scope="module")
def place(synthetic_run, tmp_path_factory):
    """A folder with a finished run in out/, and files for a user to get wrong."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(synthetic_run[0], folder / "out")
    (folder / "empty").mkdir()
    (folder / "broken.py").write_text("max_iters = 5\nmax_iters = = 6\n")
    (folder / "raises.py").write_text("max_iters = 5\nbatch_size = 1 // 0\n")
    (folder / "unknown.py").write_text("max_itres = 5\n")
    (folder / "bytes.py").write_bytes(b"max_iters = 5  # \xff\n")
    (folder / "empty.txt").write_text("")
    (folder / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "greek.txt").write_text("abc Ω", encoding="utf-8")
    return folder


def refused(run, project, place, script, *arguments, **options):
    """The error's line, after a look at every file."""
    before = tree(project, place)
    result = run(script, *arguments, cwd=place, project=project, expect=2, **options)
    assert tree(project, place) == before
    line = error_line(result)
    assert "saving" not in result.stdout and "iter 0" not in result.stdout
    return line


NEW = flags(TINY, out_dir="new")  # a run that would start, but for what follows
TRAIN = {
    "an unknown setting": (["--colour=red"], ["colour"]),
    "a mistyped setting": (["--max_iter=5"], ["max_iter", "max_iters"]),
    "a value of another type": (["--max_iters=many"], ["--max_iters=many: max_iters takes a whole number", "such as 600000"]),
    "a fraction for a whole number": (["--batch_size=1.5"], ["batch_size", "1.5"]),
    "a number for a switch": (["--decay_lr=1"], ["decay_lr"]),
    "not a number": (["--learning_rate=nan"], ["learning_rate"]),
    "no value": (["--max_iters"], ["--max_iters", "--key=value"]),
    "one dash": (["-max_iters=5"], ["-max_iters=5"]),
    "a config file that is missing": (["config/nothing.py"], ["config/nothing.py", "No such file"]),
    "a config file that does not parse": (["broken.py"], ["broken.py", "line 2"]),
    "a config file that raises": (["raises.py"], ["raises.py", "line 2", "ZeroDivisionError"]),
    "a config file with an unknown setting": (["unknown.py"], ["unknown.py", "max_itres", "max_iters"]),
    "a config file that is no text": (["bytes.py"], ["bytes.py"]),
    "a config file that is a folder": (["empty"], ["empty"]),
    "a dataset that has no bins": (["--dataset=openwebtext"], ["prepare.py", "openwebtext"]),
    "a dataset that there is not": (["--dataset=nowhere"], ["nowhere"]),
    "n_embd that n_head does not divide": (["--n_embd=17"], ["n_embd", "n_head", "17"]),
    "no heads": (["--n_head=0"], ["n_head"]),
    "no layers": (["--n_layer=0"], ["n_layer"]),
    "more layers than any machine has room for": (["--n_layer=100000000000"], ["n_layer", "parameters"]),
    "no context": (["--block_size=0"], ["block_size"]),
    "no batch": (["--batch_size=0"], ["batch_size"]),
    "a context longer than the data": (["--block_size=4000"], ["val.bin", "4,000", "4,001"]),
    "dropout of everything": (["--dropout=1.0"], ["dropout"]),
    "a negative learning rate": (["--learning_rate=-0.1"], ["learning_rate"]),
    "a beta of 1": (["--beta1=1.0"], ["beta1"]),
    "a negative beta": (["--beta2=-0.5"], ["beta2"]),
    "a device that is not there": (["--device=cuda:99"], ["cuda:99"]),
    "a device that is none": (["--device=gpu"], ["gpu", "cuda"]),
    "a dtype that is none": (["--dtype=float8"], ["float8", "bfloat16"]),
    "compile that is neither": (["--compile=maybe"], ["maybe"]),
    "a backend that is none": (["--backend=tcp"], ["tcp", "nccl"]),
    "an optimizer that there is not": (["--optimizer=sgd"], ["sgd", "adamw"]),
    "nothing to start from": (["--init_from=nothing"], ["nothing", "scratch"]),
    "resume without a folder": (["--init_from=resume"], ["no checkpoint", "new"]),
    "resume without a checkpoint": (["--init_from=resume", "--out_dir=empty"], ["no checkpoint", "empty"]),
    "resume of another shape": (["--init_from=resume", "--out_dir=out"], ["n_layer", "1", "2"]),
}


@pytest.mark.parametrize("arguments, said", TRAIN.values(), ids=TRAIN.keys())
def test_train_refuses(run, project, place, arguments, said):
    line = refused(run, project, place, "train.py", *NEW, *arguments)
    assert all(text in line for text in said), line


def test_a_dataset_that_is_not_prepared_is_named_with_the_command_that_prepares_it(run, project, place):
    line = refused(run, project, place, "train.py", "config/train_shakespeare_char.py", "--device=cpu")
    command = line.partition("python ")[2].split()[0]
    assert os.path.samefile(place / command, project / "data" / "shakespeare_char" / "prepare.py")  # from where one is


def test_train_alone_on_a_fresh_copy_says_what_to_type(run, project, place):
    """Nothing prepared, no argument."""
    assert "openwebtext" in refused(run, project, place, "train.py")


SAMPLE = {
    "such a character in a file": (["--start=FILE:greek.txt"], ["'Ω'"]),
    "an empty prompt": (["--start="], ["prompt is empty"]),
    "an empty prompt file": (["--start=FILE:empty.txt"], ["prompt is empty"]),
    "a prompt file that is missing": (["--start=FILE:nothing.txt"], ["FILE:nothing.txt", "No such file"]),
    "a prompt file without a name": (["--start=FILE:"], ["FILE:", "No such file"]),
    "a prompt file that is no text": (["--start=FILE:latin1.txt"], ["FILE:latin1.txt", "not UTF-8"]),
    "a prompt file that is a folder": (["--start=FILE:empty"], ["FILE:empty", "Is a directory"]),
    "top_k below 0": (["--top_k=-5"], ["top_k", "must be at least 0"]),
    "no samples": (["--num_samples=0"], ["num_samples", "must be at least 1"]),
    "a negative length": (["--max_new_tokens=-1"], ["max_new_tokens", "must be at least 0"]),
    "a negative temperature": (["--temperature=-0.5"], ["temperature", "must be at least 0"]),
    "no window step": (["--window_step=0"], ["window_step", "must be at least 1"]),
    "a negative seed": (["--seed=-1"], ["seed", "must be at least 0"]),
    "a mistyped setting": (["--num_sample=3"], ["num_samples"]),
    "a config file that is missing": (["nothing.py"], ["nothing.py"]),
    "a folder that there is not": (["--out_dir=nowhere"], ["nowhere"]),
    "a folder without a checkpoint": (["--out_dir=empty"], ["empty", "no checkpoint"]),
    "a device that is not there": (["--device=cuda:99"], ["cuda:99"]),
    "a dtype that is none": (["--dtype=int8"], ["int8"]),
    "nothing to start from": (["--init_from=scratch"], ["scratch", "resume"]),
}


@pytest.mark.parametrize("arguments, said", SAMPLE.values(), ids=SAMPLE.keys())
def test_sample_refuses(run, project, place, arguments, said):
    line = refused(run, project, place, "sample.py", "--out_dir=out", "--device=cpu", *arguments)
    assert all(text in line for text in said), line


# ----------------------------------------------------------------------------------------------
# data


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory, project):
    """spoilt(file, bytes or a function of them) -> a project with that file in data/synthetic made so."""
    made = []

    def spoilt(name, change):
        if not made:
            made.append(shutil.copytree(project, tmp_path_factory.mktemp("spoilt") / "main"))
        write_synthetic(made[0] / "data" / "synthetic")
        path = made[0] / "data" / "synthetic" / name
        path.write_bytes(change(path.read_bytes()) if callable(change) else change)
        return made[0]

    return spoilt


def with_id(value, at):
    def change(data):
        tokens = np.frombuffer(data, dtype="<u2").copy()
        tokens[at] = value
        return tokens.tobytes()

    return change


BINS = {
    "an odd number of bytes": (lambda data: data[:-1], ["is no whole number of tokens"]),
    "one byte": (b"\1", ["1 bytes, is no whole number of tokens"]),
    "no bytes": (b"", ["0 bytes", "empty"]),
    "as many tokens as block_size": (lambda data: data[: 2 * 16], ["16 tokens", "block_size + 1 = 17"]),
    "an id that is the vocabulary's size": (with_id(61, 1234), ["1,234", "61", "60"]),
    "the largest id, at the end": (with_id(65535, -1), ["65535"]),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("change, said", BINS.values(), ids=BINS.keys())
def test_a_bin_is_refused_that_has(run, spoilt, place, split, change, said):
    project = spoilt(f"{split}.bin", change)
    line = refused(run, project, place, "train.py", *NEW)
    assert all(text in line for text in [f"{split}.bin", *said]), line


def test_a_bin_of_block_size_plus_one_tokens_will_do(run, spoilt, tmp_path):
    project = spoilt("val.bin", lambda data: data[: 2 * 17])
    run("train.py", *flags(TINY, max_iters=1, out_dir=tmp_path / "out"), project=project)


METAS = {
    "no pickle": b"this is text",
    "nothing": b"",
    "a cut pickle": lambda data: data[:-10],
    "another pickle": b"\x80\x04K\x07.",  # the number 7
    "code": b"cos\nsystem\n(S'touch it_ran'\ntR.",
}


@pytest.mark.parametrize("change", METAS.values(), ids=METAS.keys())
def test_a_meta_is_refused_that_is(run, spoilt, place, change):
    project = spoilt("meta.pkl", change)
    assert "meta.pkl" in refused(run, project, place, "train.py", *NEW)
    with_codec = ["--out_dir=out", "--device=cpu", "--num_samples=1", "--max_new_tokens=2"]
    run("sample.py", *with_codec, cwd=place, project=project)  # the checkpoint has its own
    saved = torch.load(place / "out" / "ckpt.pt")
    del saved["meta"]
    (place / "bare").mkdir(exist_ok=True)
    torch.save(saved, place / "bare" / "ckpt.pt")
    assert "meta.pkl" in refused(run, project, place, "sample.py", "--out_dir=bare", "--device=cpu")


# ----------------------------------------------------------------------------------------------
# checkpoints


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


def cut_to_nothing(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def write_text(path):
    path.write_text("not a checkpoint\n")


def change(path, edit):
    saved = torch.load(path)
    edit(saved)
    torch.save(saved, path)


def other_width(path):
    change(path, lambda saved: saved["model_args"].update(n_embd=128))


def other_depth(path):
    change(path, lambda saved: saved["model_args"].update(n_layer=3))


def a_weight_missing(path):
    change(path, lambda saved: saved["model"].pop("transformer.h.1.mlp.c_fc.weight"))


def a_weight_cut(path):
    change(path, lambda saved: saved["model"].update({"transformer.ln_f.weight": torch.ones(63)}))


def no_model(path):
    change(path, lambda saved: saved.pop("model"))


DAMAGES = [
    cut, cut_to_nothing, flip_a_bit, write_text, other_width, other_depth, a_weight_missing, a_weight_cut, no_model,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused_by_train_and_sample(run, project, synthetic_run, tmp_path, damage):
    (tmp_path / "out").mkdir()
    shutil.copy(synthetic_run[0] / "ckpt.pt", tmp_path / "out")
    damage(tmp_path / "out" / "ckpt.pt")
    resume = flags(out_dir="out", init_from="resume", device="cpu", max_iters=200)
    assert "ckpt.pt" in refused(run, project, tmp_path, "train.py", *resume)
    assert "ckpt.pt" in refused(run, project, tmp_path, "sample.py", "--out_dir=out", "--device=cpu")


def test_a_model_that_the_data_does_not_fit_is_refused(run, own_project, synthetic_run, tmp_path):
    """The dataset was prepared anew with more characters than the model has ids."""
    shutil.copytree(synthetic_run[0], tmp_path / "out")
    write_synthetic(own_project / "data" / "more", META | {"vocab_size": 70})
    arguments = flags(out_dir="out", init_from="resume", device="cpu", max_iters=200, dataset="more")
    tokens = np.full(24000, 65, dtype="<u2")
    tokens.tofile(own_project / "data" / "more" / "train.bin")
    assert "65" in refused(run, own_project, tmp_path, "train.py", *arguments)
