"""nanogpt/run_log.py: log.csv, whole or torn, and what TensorBoard and Weights & Biases get of it."""

import csv
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import TINY, error_line, flags, tree

from nanogpt import run_log
from nanogpt.run_log import read_log


def test_log_csv_has_a_row_for_each_printed_loss(synthetic_run):
    with open(synthetic_run[0] / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    found = []
    for row in rows:
        loss, val = (f"{float(row[name]):.4f}" if row[name] else None for name in ("train_loss", "val_loss"))
        n = int(row["iter"])
        found.append(("step", n, loss, val) if row["kind"] == "eval" else ("iter", n, loss))
    assert found == synthetic_run[1].losses


COLUMNS = "iter,kind,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s,mfu,tokens_seen,val_bpb".split(",")
HEADER = ",".join(COLUMNS)


def log_of(folder, iter_num=0, evaluated=False, **wandb):
    """The RunLog of a run in `folder` that goes on at `iter_num`; with W&B where that has settings."""
    run_folder = SimpleNamespace(out_dir=str(folder), writes=True, processes=SimpleNamespace(say=print))
    return run_log.RunLog(run_folder, iter_num, evaluated, False, bool(wandb), **(wandb or {"id": None}))


def continued(folder, log, iter_num=20, evaluated=False):
    """The lines of log.csv, which had the bytes `log`, after a run goes on at `iter_num`."""
    (folder / "log.csv").write_bytes(log)
    log_of(folder, iter_num, evaluated)
    header, *lines = (folder / "log.csv").read_text(encoding="utf-8").splitlines()
    assert header == HEADER
    return lines


@pytest.mark.parametrize(
    "tail",
    [
        b"1",  # of 12,train,...
        b"9,train,4.1,,0.01,1.0,3.0,100,,12",  # of 1234 tokens
        b"\0" * 50,
        b"\xff\xfe\n",
        b"\xc2\xb2,train,1,1,1,1,1,1,1,1\n",
        b'"' + b"x" * 200000 + b"\n",
        b"9" * 5000 + b",train\n",
        b"-3,train,4.1,,0.01,1.0,3.0,100,,1200\n",
    ],
    ids=["torn number", "torn row", "zeros", "no text", "odd digit", "open quote", "long number", "negative"],
)
def test_a_torn_log_loses_its_torn_rows_alone(tmp_path, tail):
    whole = [f"{i},train,4.1,,0.01,1.0,3.0,100,,{64 * (i + 1)}," for i in range(9)]
    assert continued(tmp_path, "\n".join([HEADER, *whole, ""]).encode() + tail) == whole


def test_a_quote_that_is_cut_swallows_no_later_row(tmp_path):
    rows = [f"{i},train,4.1,,0.01,1.0,3.0,100,,{64 * (i + 1)}," for i in range(3)]
    torn = [rows[0], '"1,train,4', rows[1], rows[2], ""]
    assert continued(tmp_path, "\n".join([HEADER, *torn]).encode()) == rows


def test_a_log_from_before_a_column_was_added_is_continued(tmp_path):
    row = "3,eval,2.1,2.2,0.01,,,100,,64"
    (tmp_path / "log.csv").write_text(f"{','.join(COLUMNS[:-1])}\n{row}\n")
    log_of(tmp_path, 20).write(iter=20, kind="eval", val_loss=2.0, val_bpb=1.5)
    kept, new = read_log(tmp_path / "log.csv")
    assert kept == dict(zip(COLUMNS, row.split(",") + [""], strict=True)) and new["val_bpb"] == "1.5"


def test_rows_that_an_older_version_has_undone_stay(tmp_path):
    """Iterations 0 to 2, back to 1, 1 and 2 again; the resume is at 2."""
    old = [
        "0,eval,4,4.5,0.1,,,,,,", "0,train,4,,0.1,1,,,,,", "1,undone train,3,,0.1,2,,,,,",
        "2,undone eval,8,8.5,0.1,,,,,,", "2,undone train,9,,0.1,50,,,,,", "1,back (seed 7),,,,,,,,,",
        "1,train,3.1,,0.1,2.5,,,,,", "2,eval,2,2.5,0.1,,,,,,", "2,train,2.1,,0.1,9,,,,,",
    ]  # fmt: skip
    log = "\n".join([HEADER, *old, ""]).encode()
    assert continued(tmp_path, log, 2, False) == old[:-2]
    assert continued(tmp_path, log, 2, True) == old[:-1]


@pytest.mark.parametrize("log", [
    f"\ufeff{HEADER}\r\n3,train,4.1,,0.01,1.0,3.0,100,,64,\r\n",
    "\n".join([", ".join(f'"{name}"' for name in COLUMNS), '"3", "train", "4.1", , 0.01, 1.0, 3.0, 100, , 64, ', ""]),
], ids=["byte order mark", "quotes and blanks"])  # fmt: skip
def test_a_log_that_a_spreadsheet_has_saved_is_continued(tmp_path, log):
    assert continued(tmp_path, log.encode()) == ["3,train,4.1,,0.01,1.0,3.0,100,,64,"]


@pytest.mark.parametrize("other", [b"\xff\xfe\x00garbage", b"a,b\n1,2\n", b"iter\n3\n20\n", b"\n\n,,,\n", b"iter;kind\n"])
def test_a_file_that_is_no_log_is_kept_under_another_name(tmp_path, capsys, other):
    assert continued(tmp_path, other) == []
    [kept] = [path for path in tmp_path.iterdir() if path.name != "log.csv"]
    assert kept.read_bytes() == other and f"it is kept as {kept}" in capsys.readouterr().out


def test_an_empty_log_is_begun(tmp_path):
    assert continued(tmp_path, b"") == [] and len(list(tmp_path.iterdir())) == 1


def test_a_log_that_cannot_be_written_any_more_is_said_once_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    rows = []
    monkeypatch.setitem(sys.modules, "wandb", wandb_module(rows.append))
    log = log_of(tmp_path, project="p", name="n", config={}, id=None)
    log.loggers["log.csv"].file.close()  # stands for a disk that is full
    for n in range(3):
        log.write(iter=n, kind="train", train_loss=4.0)
    said = capsys.readouterr().out
    assert said.count("log.csv cannot be written any more") == 1 == said.count("\n")
    assert [row["iter"] for row in rows] == [0, 1, 2]


# ----------------------------------------------------------------------------------------------
# TensorBoard, Weights & Biases


def wandb_module(log):
    """Stands for the library wandb in this process."""
    run = SimpleNamespace(id="run-7", log=log, define_metric=lambda *names, **options: None)
    return SimpleNamespace(init=lambda **options: run)


@pytest.mark.parametrize("setting, library", [("wandb_log", "wandb"), ("tensorboard_log", "tensorboard")])
def test_a_logger_that_is_not_installed_is_one_line_with_the_pip_install_and_costs_nothing(
    run, own_project, synthetic_run, tmp_path, setting, library
):
    (own_project / f"{library}.py").write_text("raise ImportError('not installed')\n")
    shutil.copytree(synthetic_run[0], tmp_path / "out")  # an earlier run, which stays where it is
    before = tree(tmp_path / "out")
    arguments = flags(TINY, out_dir=tmp_path / "out", **{setting: True})
    result = run("train.py", *arguments, project=own_project, expect=2)
    assert f"pip install {library}" in error_line(result)
    assert tree(tmp_path / "out") == before


def killed_after_its_last_save(train, out_dir, saved="*.pt", **settings):
    """A run to iteration 9 whose iterations from 5 on were computed twice, as after a kill; with `saved` "ckpt.pt"
    those from 4 on, whose evaluation was done before."""
    train(out_dir, max_iters=4, **settings)
    early = {path: path.read_bytes() for path in out_dir.glob(saved)}
    for _ in range(2):
        train(out_dir, max_iters=9, init_from="resume", **settings)
        if early:
            for path in out_dir.glob("*.pt"):
                path.unlink()
            for path, content in early.items():
                path.write_bytes(content)
        early = {}


def logged(out_dir):
    """{(kind, name): {iteration: value}} of log.csv."""
    found = {}
    for row in read_log(out_dir / "log.csv"):
        for name, value in row.items():
            if name not in ("iter", "kind") and value:
                found.setdefault(f"{row['kind']}/{name}", {})[int(row["iter"])] = float(value)
    return found


@pytest.mark.parametrize("saved", ["*.pt", "ckpt.pt"])
def test_tensorboard_gets_what_log_csv_has_and_no_iteration_twice(run, tmp_path, saved):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def train(out_dir, **settings):
        run("train.py", *flags(TINY, out_dir=out_dir, tensorboard_log=True, **settings))

    killed_after_its_last_save(train, tmp_path / "out", saved)
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    board.Reload()
    expected = logged(tmp_path / "out")
    assert set(board.Tags()["scalars"]) == set(expected) and "eval/val_loss" in expected
    for name, rows in expected.items():
        points = [(event.step, event.value) for event in board.Scalars(name)]
        # times and rates are those of either go, the rest is the same in both
        assert [step for step, _ in points] == sorted(rows)
        if name.endswith(("loss", "lr", "grad_norm", "tokens_seen")):
            assert [value for _, value in points] == pytest.approx([rows[step] for step, _ in points], rel=1e-6)


def test_wandb_gets_what_log_csv_has_and_a_resume_goes_on_in_the_same_run(run, own_project, tmp_path):
    shutil.copy(own_project / "tests" / "programs" / "fake_wandb.py", own_project / "wandb.py")
    environment = {"NOTES": str(tmp_path / "notes")}
    settings = TINY | dict(wandb_log=True, wandb_project="p", wandb_run_name="r", out_dir=tmp_path / "out")
    run("train.py", *flags(settings, max_iters=4), project=own_project, env=environment)
    run("train.py", *flags(settings, max_iters=9, init_from="resume"), project=own_project, env=environment)
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    started = dict(project="p", name="r", resume="allow")
    assert [n[1:] for n in notes if n[0] == "init"] == [[started | {"id": None}, 1], [started | {"id": "run-7"}, 1]]
    found = {}
    for _, row in (n for n in notes if n[0] == "log"):
        for name in row.keys() - {"iter", "train/loss", "val/loss", "lr", "mfu"}:  # the last four are nanoGPT's
            found.setdefault(name, {})[row["iter"]] = row[name]
    assert found == logged(tmp_path / "out")
    refused = run("train.py", *flags(settings | dict(wandb_project="closed", out_dir=tmp_path / "other")),
                  project=own_project, env=environment, expect=2)  # fmt: skip
    line = error_line(refused)
    assert "api_key not configured" in line and "wandb login" in line and "--wandb_log=False" in line


def test_wandb_gets_nanogpts_keys_at_evaluations(tmp_path, monkeypatch):
    rows = []
    monkeypatch.setitem(sys.modules, "wandb", wandb_module(rows.append))
    log = log_of(tmp_path, project="p", name="n", config={}, id=None)
    log.write(iter=0, kind="eval", train_loss=4.0, val_loss=4.1, lr=1e-3)
    log.write(iter=0, kind="train", train_loss=3.9, lr=1e-3, mfu=None)
    log.write(iter=1, kind="train", train_loss=3.8, lr=1e-3, mfu=0.25)
    log.write(iter=2, kind="eval", train_loss=3.0, val_loss=3.1, lr=2e-3)
    # nanoGPT's train.py logs {"iter", "train/loss", "val/loss", "lr", "mfu": running_mfu * 100}
    first, *_, last = rows
    wanted = {"iter": 2, "train/loss": 3.0, "val/loss": 3.1, "lr": 2e-3, "mfu": 25.0}
    assert {key: last[key] for key in wanted} == wanted
    assert first["val/loss"] == 4.1 and "mfu" not in first
    assert all("val/loss" not in row for row in rows[1:3])
