"""Which blocks turn the hidden state least, against the whole model with hooks."""

import csv
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.artifact import LAYERS_FILE
from compress.core.errors import CalibrationError
from compress.models.blocks import find_blocks
from compress.numerics.similarity import Influence
from compress.sweep import depth_scan
from tests import models_zoo
from tests.depth_models import five_layers, prune
from tests.single_steps import LENGTH, SAMPLES, decisions, loaded, numbers, outputs


def states(model: Any) -> list[torch.Tensor]:
    """Hidden states in front of each block and behind the last, on the calibration tokens."""
    seen: list[torch.Tensor] = []
    blocks = [block.module for block in find_blocks(model)]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    blocks[-1].register_forward_hook(lambda _module, _args, output: seen.append(output.clone()))
    outputs(model, models_zoo.tokens(SAMPLES, LENGTH))
    return seen


def test_the_blocks_that_turn_the_hidden_state_least_go(tmp_path: Path) -> None:
    source = five_layers(tmp_path)
    out = prune(source, tmp_path / "out", layers=3)
    said = decisions(out)
    assert said["blocks"]["gone"] == "2 4"
    seen = states(loaded(source))
    for number, (before, after) in enumerate(itertools.pairwise(seen)):
        row = said["layers"][f"model.layers.{number}"]
        expected = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
        assert float(row["influence"]) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
        assert row["tokens"] == SAMPLES * LENGTH
    becomes = [said["layers"][f"model.layers.{number}"]["becomes"] for number in range(5)]
    assert becomes == ["model.layers.0", "model.layers.1", "", "model.layers.2", ""]
    with (out.path / LAYERS_FILE).open(encoding="utf-8", newline="") as stream:
        assert [row["becomes"] for row in csv.DictReader(stream)] == becomes


def test_neighbours_go_by_the_angle_over_all_of_them(tmp_path: Path) -> None:
    source = five_layers(tmp_path)
    said = decisions(prune(source, tmp_path / "out", layers=3, contiguous=True))
    seen = states(loaded(source))
    expected = {}
    for start in range(4):
        cosine = torch.nn.functional.cosine_similarity(seen[start], seen[start + 2], dim=-1)
        expected[str(start)] = float(torch.arccos(cosine.clamp(-1, 1)).mean()) / math.pi
    assert {key: float(value) for key, value in said["windows"].items()} == pytest.approx(expected, rel=1e-3)
    best = int(min(expected, key=lambda key: expected[key]))
    assert numbers(said["blocks"]["gone"]) == [best, best + 1]


def test_where_there_is_no_room_the_last_positions_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.zeros(2, 10, 4)
    assert depth_scan._places(hidden, 3, 5).tolist() == list(range(10))
    # Room for three positions of each of six sequences at six places.
    monkeypatch.setattr(depth_scan, "_COMPARED", 3 * 6 * 6 * 4 * 4)
    assert depth_scan._places(hidden, 3, 5).tolist() == [1, 5, 9]
    monkeypatch.setattr(depth_scan, "_COMPARED", 1)
    assert depth_scan._places(hidden, 3, 5).tolist() == [9]


def test_hidden_states_that_are_not_finite_are_an_error_that_names_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Influence.add
    monkeypatch.setattr(Influence, "add", lambda self, before, after: add(self, before, after * float("nan")))
    with pytest.raises(CalibrationError, match=r"model\.layers\.0: .*NaN or infinite"):
        prune(models_zoo.write("llama", tmp_path), tmp_path / "out")
