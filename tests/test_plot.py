"""tools/plot.py: what it draws of a run's log, and what it says where there is none."""

import re
import runpy
import sys
import warnings

import pytest
from conftest import ROOT

from nanogpt.errors import UserError

pytest.importorskip("matplotlib")
HEADER = "iter,kind,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s,mfu,tokens_seen"


def write_log(folder, train=20, evals=((0, 4.0), (10, 2.5), (20, 3.0)), tail=""):
    """A log.csv as train.py writes it: `train` iterations, and (iteration, val loss) of each evaluation."""
    folder.mkdir(exist_ok=True)
    rows = [HEADER]
    rows += [f"{i},eval,{loss - 0.5},{loss},0.001,,,,,{i}" for i, loss in evals]
    rows += [f"{i},train,{4 - i / train},,{0.001 * i},1.0,5.0,100,,{i}" for i in range(train)]
    (folder / "log.csv").write_text("\r\n".join(rows) + "\r\n" + tail, newline="")
    return str(folder)


@pytest.fixture
def plot(monkeypatch):
    """plot(*arguments) -> the script's globals once it has run."""

    def plot(*arguments):
        monkeypatch.setattr(sys, "argv", ["tools/plot.py", *arguments])
        return runpy.run_path(str(ROOT / "tools" / "plot.py"), run_name="__main__")

    return plot


def lines(drawn):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn["axes"].get_lines()]


def runs_legend(drawn):
    return [text.get_text() for text in drawn["figure"].legends[1].get_texts()]


def test_the_picture_has_the_logs_losses_and_marks_the_best(plot, tmp_path, capsys):
    out = write_log(tmp_path / "out-a")
    drawn = plot(out)
    batches, train, val, best = lines(drawn)
    assert batches == (list(range(20)), [4 - i / 20 for i in range(20)])
    assert train == ([0, 10, 20], [3.5, 2.0, 2.5])
    assert val == ([0, 10, 20], [4.0, 2.5, 3.0])
    assert best == ([10], [2.5])
    assert runs_legend(drawn) == ["out-a: best val loss 2.5000 at iteration 10"]
    picture = tmp_path / "out-a" / "loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"wrote {picture}\n"


def test_runs_with_different_tokens_are_said_to_have_losses_that_do_not_compare(plot, tmp_path, monkeypatch, capsys):
    letter = {"vocab_size": 1, "stoi": {"a": 0}}
    older = {"model_args": {"vocab_size": 1}}  # a checkpoint that keeps no tokens
    kept = {"out-a": {"meta": None}, "out-b": {"meta": letter}, "out-c": {"meta": letter}, "out-d": older}
    paths = {name: write_log(tmp_path / name) for name in kept}
    monkeypatch.setattr("nanogpt.checkpoint.peek", {paths[name]: kept[name] for name in kept}.get)
    plot(paths["out-b"], paths["out-c"], paths["out-d"])
    assert "compare" not in capsys.readouterr().out
    plot(paths["out-a"], paths["out-b"])
    assert "different tokens, so their losses do not compare: --bpb=True" in capsys.readouterr().out


def test_runs_are_labelled_by_the_settings_in_which_they_differ(plot, tmp_path, monkeypatch):
    folders = [write_log(tmp_path / name) for name in ("a", "b", "c", "d")]
    shared = {"n_layer": 2, "wandb_run_name": "x", "dropout": 0.0}
    configs = {
        folders[0]: shared | {"learning_rate": 1e-3, "out_dir": "a"},
        folders[1]: shared | {"learning_rate": 3e-3, "out_dir": "b", "wandb_run_name": "y"},
        folders[2]: shared | {"learning_rate": 3e-3, "out_dir": "c"},
    }
    from nanogpt import checkpoint

    kept = {out: {"config": config, "model_args": {"vocab_size": 61}} for out, config in configs.items()}
    monkeypatch.setattr(checkpoint, "peek", lambda out: kept.get(out, {}))
    labels = [text.split(":")[0] for text in runs_legend(plot(*folders, f"--to={tmp_path / 'x.svg'}"))]
    assert labels == ["learning_rate=0.001", "learning_rate=0.003 (b)", "learning_rate=0.003 (c)", "d"]
    assert "<svg" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("tail", ["20,tr", "20,eval,2.0,0.1", "2"])
def test_a_row_that_is_being_written_is_left_out(plot, tmp_path, tail):
    whole = lines(plot(write_log(tmp_path / "a")))
    assert lines(plot(write_log(tmp_path / "b", tail=tail))) == whole


def test_a_long_run_is_drawn_as_means_of_stretches(plot, tmp_path):
    batches = lines(plot(write_log(tmp_path / "a", train=4000)))[0]
    assert len(batches[0]) == 400
    assert batches[0][0] == 4.5 and batches[1][0] == pytest.approx(4 - 4.5 / 4000)


@pytest.mark.parametrize(
    "log", [{"train": 1, "evals": [(0, 4.0)]}, {"evals": []}, {"evals": [(0, float("nan"))]}, {"train": 0}]
)
def test_a_short_or_diverged_log_is_drawn_too(plot, tmp_path, log):
    plot(write_log(tmp_path / "a", **{"train": 3} | log))
    assert (tmp_path / "a" / "loss.png").exists()


def test_what_cannot_be_drawn_is_one_clear_error(plot, tmp_path):
    (tmp_path / "bare").mkdir()
    good = write_log(tmp_path / "good")
    for content, message in (
        ("", "no rows yet"), (HEADER + "\r\n", "no rows yet"), (HEADER + "\r\n0,eval,4", "no rows yet"),
        ("a,b\r\n1,2\r\n", "not a log of train.py"), (f"{HEADER}\r\nx,eval,a,b,c\r\n", "not a log of train.py"),
    ):  # fmt: skip
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "log.csv").write_text(content, newline="")
        with pytest.raises(UserError, match=message):
            plot(str(tmp_path / "bad"))
    for arguments, message in (
        ([], "python tools/plot.py OUT_DIR"),
        ([str(tmp_path / "none")], "no log.csv in"),
        ([str(tmp_path / "bare")], "no log.csv in"),
        ([good, "--to=" + str(tmp_path / "x.nonsense")], "nonsense"),
    ):
        with pytest.raises(UserError, match=message):
            plot(*arguments)


def test_without_matplotlib_the_error_names_the_pip_install(plot, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot(write_log(tmp_path / "a"))


# ----------------------------------------------------------------------------------------------
# the names it writes to, and the names that it shows


@pytest.fixture
def strict_plot(plot):
    """As `plot`, but a warning is an error."""

    def strict_plot(*arguments):
        with warnings.catch_warnings(action="error"):
            return plot(*arguments)

    return strict_plot


@pytest.mark.parametrize("to, written", [
    ("x", "x.png"), ("x.", "x.png"), (".png", ".png.png"), ("a.b/x", "a.b/x.png"), ("x.svg", "x.svg"),
    ("x.PNG", "x.PNG"), ("my picture", "my picture.png"), ("x.pdf", "x.pdf"),
])  # fmt: skip
def test_the_name_that_is_reported_is_the_files(strict_plot, tmp_path, monkeypatch, capsys, to, written):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.b").mkdir()
    out = write_log(tmp_path / "out")
    before = set(tmp_path.rglob("*"))
    strict_plot(out, f"--to={to}")
    assert capsys.readouterr().out == f"wrote {written}\n"
    assert {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before} == {written}


@pytest.mark.parametrize("name", ["a$b$c", "$x", "cost-$5", r"$\nonsense{$", "$$", "_hidden", "a_b^c", r"a\b"])
def test_a_folders_name_is_shown_as_it_is(strict_plot, tmp_path, name):
    out = write_log(tmp_path / name)
    drawn = strict_plot(out, write_log(tmp_path / "other"), f"--to={tmp_path / 'x.svg'}")
    best = ": best val loss 2.5000 at iteration 10"
    assert runs_legend(drawn) == [name + best, "other" + best]
    # the picture has the text in a comment above the shapes of its letters
    comments = re.findall("<!-- (.*?) -->", (tmp_path / "x.svg").read_text())
    assert name + best in comments


def test_a_plot_without_a_folder_shows_the_command_as_typed_from_there(strict_plot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"python (\.\./)+.*tools/plot.py OUT_DIR"):
        strict_plot()


# ----------------------------------------------------------------------------------------------
# columns that only some logs have


def test_the_norms_are_drawn_beneath_and_of_a_long_run_the_largest_ones(plot, tmp_path):
    folder = tmp_path / "a"
    write_log(folder, train=4000)
    rows = (folder / "log.csv").read_text().replace("3,train,3.99925,,0.003,1.0,", "3,train,3.99925,,0.003,50.0,")
    (folder / "log.csv").write_text(rows)
    drawn = plot(str(folder), "--norm=True")
    [curve] = drawn["norm_axes"].get_lines()
    assert len(curve.get_ydata()) == 400 and max(curve.get_ydata()) == 50.0 and sorted(curve.get_ydata())[-2] == 1.0


def test_a_run_that_an_older_version_took_back_is_drawn_as_it_went_on(plot, tmp_path):
    """Rows `undone` and `back` are what it has undone."""
    undone = "6,undone eval,9.0,9.5,0.001,,,,,6\r\n6,undone train,9.0,,0.001,1.0,5.0,100,,6\r\n0,back (seed 7),,,,,,,,\r\n"
    assert lines(plot(write_log(tmp_path / "a", tail=undone))) == lines(plot(write_log(tmp_path / "b")))


def test_bits_per_byte_replace_nats(plot, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    rows = [HEADER + ",val_bpb", "0,eval,4.0,4.0,0.001,,,,,0,2.0", "0,train,3.0,,0.001,1.0,5.0,100,,10,"]
    rows += ["10,eval,2.0,3.0,0.001,,,,,9,1.5"]
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    drawn = plot(str(folder), "--bpb=True")
    batches, train, val, _ = lines(drawn)
    assert val == ([0, 10], [2.0, 1.5]) and train == ([0, 10], [2.0, 1.0]) and batches == ([0], [1.5])
    assert runs_legend(drawn) == ["a: best val loss 1.5000 bits per byte at iteration 10"]
    with pytest.raises(UserError, match="has no bits per byte"):
        plot(write_log(tmp_path / "b"), "--bpb=True")
