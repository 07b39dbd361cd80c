"""Texts that several tests read."""

import pytest

from compress.data import corpora
from compress.data.builtin import texts
from compress.data.builtin.splits import Split


@pytest.fixture
def short_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    """``builtin:stories`` with few documents in each split: making all of them takes seconds."""
    for split in Split:
        monkeypatch.setitem(texts.SIZES, split, 200)
    # A digest that is remembered belongs to the whole text.
    monkeypatch.setattr(corpora, "_digest_of_builtin", corpora._digest_of_builtin.__wrapped__)
