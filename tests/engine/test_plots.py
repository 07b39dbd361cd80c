"""Pictures: what can be drawn is drawn, and what cannot be is refused before the work."""

import importlib.util
from pathlib import Path

import pytest

from compress.core.errors import EnvironmentFault, UsageError
from compress.engine.plots import plot_importance, plot_sensitivity, require_plots
from compress.sweep.importance import BlockImportance, Importance, PartsImportance
from compress.sweep.sensitivity import Sensitivity


def test_what_could_not_be_drawn_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_plots(tmp_path / "picture.svg")
    with pytest.raises(UsageError, match=r"'.*picture\.gif' is no picture"):
        require_plots(tmp_path / "picture.gif")
    with pytest.raises(EnvironmentFault, match="there is no folder"):
        require_plots(tmp_path / "absent" / "picture.svg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentFault, match="drawing needs matplotlib"):
        require_plots(tmp_path / "picture.svg")


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_sensitivity_is_drawn_in_every_kind(suffix: str, tmp_path: Path) -> None:
    parts = [Sensitivity((name,), name, 10, {2: 0.4, 4: 0.0}) for name in ("first.layer", "second.layer")]
    plot_sensitivity(parts, tmp_path / f"picture{suffix}")
    assert (tmp_path / f"picture{suffix}").stat().st_size > 1000


def found(loss: float | None) -> Importance:
    blocks = tuple(
        BlockImportance(
            f"block.{number}", 0.1 * number, None if loss is None or number == 1 else loss + number
        )
        for number in range(3)
    )
    # Layers differ in size, and one of them does nothing.
    parts = (
        PartsImportance("block.0.out", "heads", 2, (1.0, 2.0, 3.0, 4.0)),
        PartsImportance("block.1.out", "heads", 2, (1.0, 2.0)),
        PartsImportance("block.0.down", "channels", 8, tuple(map(float, range(8)))),
        PartsImportance("block.1.down", "channels", 8, (0.0,) * 8),
    )
    return Importance(blocks, parts, loss, 100)


def test_importance_is_drawn_with_all_its_layers(tmp_path: Path) -> None:
    plot_importance(found(2.0), tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text()
    for name in ("block.2", "block.1.out", "block.1.down", "heads: share of their layer", "loss more"):
        assert name in drawn


def test_losses_that_were_not_measured_are_not_drawn(tmp_path: Path) -> None:
    plot_importance(found(None), tmp_path / "picture.svg")
    assert "loss more" not in (tmp_path / "picture.svg").read_text()


def test_a_model_without_parts_has_its_blocks_drawn(tmp_path: Path) -> None:
    whole = found(None)
    plot_importance(Importance(whole.blocks, (), None, 100), tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text()
    assert "block.2" in drawn
    assert "heads" not in drawn
