"""tools/export.py: a trained model as a Hugging Face folder."""

import json
import shlex

import pytest
from conftest import CHARACTERS, META, write_synthetic


def test_the_runs_own_characters_are_exported_where_the_dataset_has_others_now(run, own_project, synthetic_run, tmp_path):
    pytest.importorskip("safetensors")
    backwards = dict(enumerate(reversed(CHARACTERS)))
    others = {"vocab_size": 61, "stoi": {c: i for i, c in backwards.items()}, "itos": backwards}
    write_synthetic(own_project / "data" / "synthetic", others)
    arguments = [f"--out_dir={synthetic_run[0]}", f"--to={tmp_path / 'hf'}"]
    result = run("tools/export.py", *arguments, project=own_project)
    written = json.loads((tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert written == META["stoi"]
    assert f"using those in {synthetic_run[0] / 'ckpt.pt'}" in result.lines[0]


def test_the_command_that_samples_from_it_can_be_pasted(run, synthetic_run, tmp_path):
    pytest.importorskip("safetensors")
    result = run("tools/export.py", f"--out_dir={synthetic_run[0]}", "--to=my export", cwd=tmp_path)
    line = result.lines[-1]
    assert shlex.split(line[line.index("python ") :])[2:] == ["--init_from=my export"]
