"""tools/plot.py: the names it writes to, and the names that it shows."""

import re
import runpy
import sys
import warnings

import pytest
from conftest import ROOT

from nanogpt.errors import UserError

pytest.importorskip("matplotlib")
HEADER = "iter,kind,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s,mfu,tokens_seen"


def write_log(folder):
    folder.mkdir(exist_ok=True)
    rows = [HEADER, "0,eval,4.0,4.1,0.001,,,,,0", "0,train,4.0,,0.001,1.0,5.0,100,,10", "10,eval,2.0,2.5,0.001,,,,,9"]
    (folder / "log.csv").write_text("\n".join(rows) + "\n", newline="")
    return str(folder)


@pytest.fixture
def plot(monkeypatch):
    """plot(*arguments) -> the script's globals once it has run."""

    def plot(*arguments):
        monkeypatch.setattr(sys, "argv", ["tools/plot.py", *arguments])
        with warnings.catch_warnings(action="error"):
            return runpy.run_path(str(ROOT / "tools" / "plot.py"), run_name="__main__")

    return plot


def shown(drawn):
    return [text.get_text() for text in drawn["figure"].legends[1].get_texts()]


@pytest.mark.parametrize("to, written", [
    ("x", "x.png"), ("x.", "x.png"), (".png", ".png.png"), ("a.b/x", "a.b/x.png"), ("x.svg", "x.svg"),
    ("x.PNG", "x.PNG"), ("my picture", "my picture.png"), ("x.pdf", "x.pdf"),
])  # fmt: skip
def test_the_name_that_is_reported_is_the_files(plot, tmp_path, monkeypatch, capsys, to, written):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.b").mkdir()
    out = write_log(tmp_path / "out")
    before = set(tmp_path.rglob("*"))
    plot(out, f"--to={to}")
    assert capsys.readouterr().out == f"wrote {written}\n"
    assert {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before} == {written}


@pytest.mark.parametrize("name", ["a$b$c", "$x", "cost-$5", r"$\nonsense{$", "$$", "_hidden", "a_b^c", r"a\b"])
def test_a_folders_name_is_shown_as_it_is(plot, tmp_path, name):
    out = write_log(tmp_path / name)
    drawn = plot(out, write_log(tmp_path / "other"), f"--to={tmp_path / 'x.svg'}")
    best = ": best val loss 2.5000 at iteration 10"
    assert shown(drawn) == [name + best, "other" + best]
    # the picture has the text in a comment above the shapes of its letters
    comments = re.findall("<!-- (.*?) -->", (tmp_path / "x.svg").read_text())
    assert name + best in comments


def test_a_plot_without_a_folder_shows_the_command_as_typed_from_there(plot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"python (\.\./)+.*tools/plot.py OUT_DIR"):
        plot()
