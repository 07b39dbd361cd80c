"""Tensors that lose rows, take another name, get new values or stay, written into one shard."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from compress.core.artifact import Artifact
from compress.core.run import Run
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.numerics.fingerprint import fingerprint
from compress.sweep.cutting import Piece, as_they_are, write_pieces
from compress.sweep.walk import Walk
from tests import models_zoo

UP, DOWN, NORM, GATE = (
    f"model.layers.1.{name}.weight"
    for name in ("mlp.up_proj", "mlp.down_proj", "input_layernorm", "mlp.gate_proj")
)


def test_a_shard_holds_what_was_asked_for_to_the_bit(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path, dtype=torch.bfloat16))
    model = skeleton(source)
    (tmp_path / "out").mkdir()
    run = Run(scratch=tmp_path / "scratch")
    walk = Walk(source, tmp_path / "out", run, model, Checkpoint(source, model), torch.device("cpu"))
    rows, columns = torch.tensor([0, 5, 6]), torch.tensor([1, 2, 30, 31])
    fitted = torch.full((64, 32), 0.5, dtype=torch.bfloat16)
    pieces = {
        UP: Piece(UP, {0: rows, 1: columns}),
        "moved": Piece(DOWN, moved=True),
        GATE: Piece(GATE, fitted=fitted, error=0.25),
        **as_they_are([NORM]),
    }
    record = write_pieces(walk, 1, pieces, [{"layer": "x"}])
    before = load_file(source.path / "model.safetensors")
    after = load_file(tmp_path / "out" / record.file)
    assert record.names == sorted(after) == sorted(pieces)
    assert torch.equal(after[UP], before[UP][rows][:, columns])
    assert torch.equal(after["moved"], before[DOWN])
    assert torch.equal(after[GATE], fitted)
    assert torch.equal(after[NORM], before[NORM])
    assert record.bytes == sum(tensor.numel() * 2 for tensor in after.values())
    assert {name: meant.changed for name, meant in record.tensors.items()} == {
        UP: True,
        "moved": True,
        GATE: True,
        NORM: False,
    }
    assert all(record.tensors[name].digest == fingerprint(after[name]) for name in after)
    whole = before[UP].float()
    left = float(after[UP].float().square().sum() / whole.square().sum())
    assert abs(record.tensors[UP].error - (1 - left) ** 0.5) < 1e-6
    assert record.tensors["moved"].error == 0
    assert record.tensors[GATE].error == 0.25
