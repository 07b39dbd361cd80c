"""Inspection: an artifact held against its lineage."""

import json
from pathlib import Path

import pytest

from compress import engine
from compress.core.errors import (
    ModelError,
    VerificationError,
)
from tests.engine.conftest import RTN, recipe


def test_verify_holds_an_artifact_against_its_lineage(model: Path, tmp_path: Path) -> None:
    engine.run(recipe(model, RTN), tmp_path / "out", single=True)
    report = engine.verify(tmp_path / "out")
    assert report.weights is not None
    assert (report.weights.changed, report.weights.unchanged) == (21, 9)
    (tmp_path / "out" / "README.md").write_text("a card may be edited")
    engine.verify(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises((VerificationError, ModelError)):
        engine.verify(tmp_path / "out")


def test_verify_needs_a_lineage(model: Path) -> None:
    with pytest.raises(ModelError, match="no lineage"):
        engine.verify(model)
