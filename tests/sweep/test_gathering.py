"""What reaches the matrices of a block, over all batches at once."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from compress.core.artifact import Artifact
from compress.core.run import CalibrationSource, Run
from compress.models.checkpoint import Checkpoint
from compress.numerics.masks import ColumnNorms
from compress.sweep.collector import Shared
from compress.sweep.gathering import gathered
from compress.sweep.matrices import find_matrices
from compress.sweep.walk import Walk, placed_skeleton
from tests import models_zoo

SAMPLES, LENGTH = 6, 12


def stages_of(name: str, folder: Path, *, norms: bool) -> list[list[Shared]]:
    """The stages of the first block."""
    source = Artifact.open(models_zoo.write(name, folder))
    save_file({"input_ids": models_zoo.tokens(SAMPLES, LENGTH)}, folder / "tokens.safetensors")
    text = CalibrationSource(str(folder / "tokens.safetensors"), SAMPLES, LENGTH, batch_size=4)
    run = Run(calibration=text, scratch=folder / "scratch")
    model = placed_skeleton(source, run)
    walk = Walk(source, run.scratch, run, model, Checkpoint(source, model), torch.device("cpu"))
    activations = walk.calibration()
    assert activations is not None
    first = walk.blocks[0]
    walk.load_outside()
    walk.checkpoint.load_module(first.name, walk.device)
    matrices = find_matrices(model, first.name, walk.checkpoint).matrices
    with walk.reentry() as reentry:
        return gathered(model, matrices, first, reentry, activations, ColumnNorms if norms else None)


def test_every_input_is_seen_in_every_batch(tmp_path: Path) -> None:
    stages = stages_of("llama", tmp_path, norms=True)
    leaves = [[matrix.name.rpartition(".")[2] for matrix in shared.matrices] for [shared] in stages]
    assert leaves == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    for [shared] in stages:
        assert shared.statistic is not None
        assert shared.statistic.tokens == SAMPLES * LENGTH


def test_every_expert_sees_what_was_sent_to_it(tmp_path: Path) -> None:
    stages = stages_of("mixtral", tmp_path, norms=True)
    experts = [stage for stage in stages if stage[0].matrices[0].expert is not None]
    assert len(experts) == 2
    for stage in experts:
        tokens = [shared.statistic.tokens for shared in stage if shared.statistic is not None]
        assert len(tokens) == 4
        # Two of four experts for each token.
        assert sum(tokens) == 2 * SAMPLES * LENGTH


def test_nothing_is_gathered_where_nothing_is_wanted(tmp_path: Path) -> None:
    stages = stages_of("llama", tmp_path, norms=False)
    assert len(stages) == 4
    assert all(shared.statistic is None for stage in stages for shared in stage)
