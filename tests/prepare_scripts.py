"""For the tests of data/: how to run a prepare script as a user would, and what it has written."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, Running

SHAKESPEARE = SHARED / "tinyshakespeare" / "input.txt"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
NO_NETWORK = dict.fromkeys(PROXIES, "http://127.0.0.1:9")  # where no one listens
UNICODE = "Äpfel, naïve, 中文。\r\n\tΩ\x00\u2028 \ufeff😀 e\u0301\n"

needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason="no ../shared/tinyshakespeare")
needs_bpe = pytest.mark.skipif(not (SHARED / "tiktoken").is_dir(), reason="no ../shared/tiktoken")


def environment(work, **more):
    hub = {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"}
    return os.environ | NO_NETWORK | hub | {"PYTHONDONTWRITEBYTECODE": "1"} | more


def prepare(work, dataset, *arguments, **env):
    """Runs the copy's prepare script as a user would, from another folder and without a network."""
    script = str(work / "data" / dataset / "prepare.py")
    new = "PYTHONIOENCODING" in env  # only a new Python reads it
    with tempfile.TemporaryDirectory() as folder:
        running = Running(script, list(map(str, arguments)), os.path.abspath(os.sep), environment(work, **env), Path(folder), new)
        return running.end()


def error_after_progress(result, code=2):
    """The one error line of a run that failed as it should."""
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def ids(work, dataset, split):
    return np.fromfile(work / "data" / dataset / f"{split}.bin", dtype="<u2")


def files_in(folder):
    """{name: content}; the file by which the folder is locked is left out."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def write_text(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


def tiktoken_gpt2():
    import tiktoken

    return tiktoken.get_encoding("gpt2")
