"""data/bins.py: which bins can be trained on. Small ones are refused in test_bad_input.py, by train.py itself."""

import numpy as np
import pytest

from data import bins
from nanogpt.errors import UserError


def test_a_long_bin_is_looked_at_in_places_and_every_batch_as_it_is_drawn(tmp_path, monkeypatch):
    """A whole-file maximum of a 17 GB file is not cheap: here `long` begins at 1,000 tokens."""
    monkeypatch.setattr(bins, "FULL_CHECK_TOKENS", 1 << 10)
    path = str(tmp_path / "train.bin")
    tokens = np.zeros(1 << 20, dtype="<u2")
    tokens[: 1 << 19] = 60
    tokens.tofile(path)
    looked_at, check_ids = [], bins.check_ids
    monkeypatch.setattr(bins, "check_ids", lambda t, *rest: looked_at.append(t.size) or check_ids(t, *rest))
    bins.check_bin(path, 61)
    assert sum(looked_at) <= 1 << 11
    for at in (0, len(tokens) - 1):  # both ends are among the places
        tokens[at] = 61
        tokens.tofile(path)
        with pytest.raises(UserError, match=f"token {at:,} is 61"):
            bins.check_bin(path, 61)
        tokens[at] = 0
    monkeypatch.undo()
    windows = tokens[np.array([5, 700])[:, None] + np.arange(17)]
    windows[1, 3] = 61
    with pytest.raises(UserError, match=r"train\.bin: token 703 is 61, but the vocabulary's ids end at 60"):
        bins.check_ids(windows, 61, path, np.array([5, 700]))


def test_a_dataset_that_is_not_prepared_is_told_how_to_be(tmp_path):
    path = str(tmp_path / "train.bin")
    with pytest.raises(UserError, match="dataset mine is not prepared .*data/text_bpe/prepare.py FILE --name=mine"):
        bins.open_checked(path, 16, "mine")
    (tmp_path / "prepare.py").touch()
    with pytest.raises(UserError, match=f"run: python .*{tmp_path.name}/prepare.py"):
        bins.open_checked(path, 16, "mine")
