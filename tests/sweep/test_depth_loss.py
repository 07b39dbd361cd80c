"""Losses without blocks, against the whole model whose blocks are passed by."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.errors import CalibrationError
from compress.models.blocks import find_blocks
from compress.sweep import depth_loss
from tests import models_zoo
from tests.depth_models import five_layers, prune, without
from tests.marks import slow_but
from tests.single_steps import LENGTH, SAMPLES, decisions, loaded, numbers, outputs


def losses(source: Path, gone: Sequence[int]) -> float:
    tokens = models_zoo.tokens(SAMPLES, LENGTH)
    said = outputs(without(loaded(source), gone), tokens)
    return float(torch.nn.functional.cross_entropy(said[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def test_the_loss_is_measured_again_after_every_block(tmp_path: Path) -> None:
    source = five_layers(tmp_path)
    said = decisions(prune(source, tmp_path / "out", layers=3, by="loss"))
    alone = {number: losses(source, [number]) for number in range(5)}
    for number, loss in alone.items():
        assert float(said["layers"][f"model.layers.{number}"]["loss"]) == pytest.approx(loss, rel=1e-4)
    first = min(alone, key=lambda number: alone[number])
    second = min((n for n in range(5) if n != first), key=lambda number: losses(source, [first, number]))
    assert numbers(said["blocks"]["gone"]) == sorted([first, second])
    assert said["blocks"]["by"] == "loss"


def test_neighbours_go_by_the_loss_without_them(tmp_path: Path) -> None:
    source = five_layers(tmp_path)
    said = decisions(prune(source, tmp_path / "out", layers=3, by="loss", contiguous=True))
    expected = {str(start): losses(source, [start, start + 1]) for start in range(4)}
    assert {key: float(value) for key, value in said["windows"].items()} == pytest.approx(expected, rel=1e-4)
    best = int(min(expected, key=lambda key: expected[key]))
    assert numbers(said["blocks"]["gone"]) == [best, best + 1]


@pytest.mark.parametrize("name", slow_but(("bert",), ("bert", "modernbert")))
def test_an_encoder_is_judged_by_how_far_its_vectors_turn(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    said = decisions(prune(source, tmp_path / "out", by="loss", measured_samples=4))
    tokens = models_zoo.tokens(SAMPLES, LENGTH)[:4]
    wanted = outputs(loaded(source), tokens)
    for number in range(3):
        vectors = outputs(without(loaded(source), [number]), tokens)
        expected = 1 - torch.nn.functional.cosine_similarity(vectors, wanted, dim=-1).mean()
        row = said["layers"][find_blocks(loaded(source))[number].name]
        assert float(row["loss"]) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
        assert row["tokens"] == 4 * LENGTH


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth_loss, "_loss_of", lambda *_: float("nan"))
    with pytest.raises(CalibrationError, match="own loss on the calibration text is not finite"):
        prune(models_zoo.write("llama", tmp_path), tmp_path / "out", by="loss")


def test_a_block_without_which_nothing_is_finite_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = depth_loss._Losses._mean

    def mean(self: Any, position: int, *others: Any) -> float:
        return float("nan") if position == 2 else measure(self, position, *others)

    monkeypatch.setattr(depth_loss._Losses, "_mean", mean)
    said = decisions(prune(five_layers(tmp_path), tmp_path / "out", by="loss", layers=3))
    assert 2 not in numbers(said["blocks"]["gone"])
    assert said["layers"]["model.layers.2"]["loss"] == "inf"
