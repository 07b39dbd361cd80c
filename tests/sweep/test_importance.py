"""Importance of blocks, heads and channels, against stock transformers with hooks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError
from compress.core.run import CalibrationSource, Run
from compress.models.blocks import find_blocks
from compress.sweep import importance
from compress.sweep.importance import Importance, measure_importance
from tests import models_zoo
from tests.depth_models import without
from tests.marks import slow_but
from tests.single_steps import LENGTH, SAMPLES, loaded, outputs


@pytest.fixture
def run(tmp_path: Path) -> Run:
    save_file({"input_ids": tokens()}, tmp_path / "tokens.safetensors")
    text = CalibrationSource(str(tmp_path / "tokens.safetensors"), SAMPLES, LENGTH, batch_size=2)
    return Run(calibration=text, scratch=tmp_path / "scratch")


def tokens() -> torch.Tensor:
    return models_zoo.tokens(SAMPLES, LENGTH)


def measured(name: str, folder: Path, run: Run, **options: Any) -> tuple[Importance, Path]:
    source = models_zoo.write(name, folder)
    return measure_importance(Artifact.open(source), run, **options), source


def reading(model: Any, layer: str) -> torch.Tensor:
    """What a layer reads of the calibration tokens, in one batch."""
    seen: list[torch.Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs(model, tokens())
    return seen[0]


@pytest.mark.parametrize("name", slow_but(("llama", "bert"), ("llama", "gpt2", "bert", "modernbert")))
def test_blocks_heads_and_channels_are_measured(name: str, tmp_path: Path, run: Run) -> None:
    found, source = measured(name, tmp_path, run)
    assert found.tokens == SAMPLES * LENGTH
    names = [block.name for block in find_blocks(loaded(source))]
    assert [block.block for block in found.blocks] == names
    assert [part.kind for part in found.parts] == ["heads", "channels"] * 3
    for part in found.parts:
        inputs = reading(loaded(source), part.layer)
        width = inputs.shape[-1] // len(part.activation)
        sizes = inputs.unflatten(-1, (-1, width)).norm(dim=-1)
        expected = sizes.double().mean(1).square().sum(0).sqrt()
        assert part.activation == pytest.approx(expected.tolist(), rel=1e-4)
        assert part.groups == (2 if name == "llama" and part.kind == "heads" else len(part.activation))
        assert part.taylor is None


def test_a_block_is_measured_by_the_loss_without_it(tmp_path: Path, run: Run) -> None:
    found, source = measured("llama", tmp_path, run)

    def loss(*gone: int) -> float:
        said = outputs(without(loaded(source), gone), tokens())
        return float(torch.nn.functional.cross_entropy(said[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()))

    assert found.loss == pytest.approx(loss(), rel=1e-4)
    for number, block in enumerate(found.blocks):
        assert block.loss == pytest.approx(loss(number), rel=1e-4)


def test_an_encoder_loses_against_itself(tmp_path: Path, run: Run) -> None:
    found, source = measured("bert", tmp_path, run)
    assert found.loss == pytest.approx(0.0, abs=1e-6)
    wanted = outputs(loaded(source), tokens())
    vectors = outputs(without(loaded(source), [1]), tokens())
    expected = 1 - torch.nn.functional.cosine_similarity(vectors, wanted, dim=-1).mean()
    assert found.blocks[1].loss == pytest.approx(float(expected), rel=1e-3)


def test_one_block_that_runs_again_and_again_is_measured(tmp_path: Path, run: Run) -> None:
    found, _ = measured("albert", tmp_path, run)
    assert len(found.blocks) == 1
    assert found.blocks[0].influence > 0
    assert {part.kind for part in found.parts} == {"heads", "channels"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-moe"])
def test_first_terms_of_the_loss(name: str, tmp_path: Path, run: Run) -> None:
    found, source = measured(name, tmp_path, run, loss=False, taylor=True)
    assert found.loss is None
    assert all(block.loss is None for block in found.blocks)
    model = loaded(source)
    for part in found.parts[:2]:
        assert part.taylor is not None
        width = reading(model, part.layer).shape[-1] // len(part.activation)
        # What a part adds to the loss of one sequence when it is scaled, by the difference of two losses.
        for number in (0, len(part.activation) - 1):
            columns = slice(number * width, (number + 1) * width)
            terms = [slope(model, part.layer, columns, row) for row in tokens()]
            expected = math.hypot(*terms)
            assert part.taylor[number] == pytest.approx(expected, rel=2e-2, abs=1e-3)


def slope(model: Any, layer: str, columns: slice, row: torch.Tensor) -> float:
    """The derivative of a sequence's loss by a factor on some inputs of a layer, by central differences."""
    losses = []
    for factor in (0.999, 1.001):  # so near that no token changes its expert

        def scaled(_: Any, args: tuple[torch.Tensor, ...], by: float = factor) -> tuple[torch.Tensor]:
            inputs = args[0].clone()
            inputs[..., columns] *= by
            return (inputs,)

        hook = model.get_submodule(layer).register_forward_pre_hook(scaled)
        said = outputs(model, row.unsqueeze(0))
        hook.remove()
        losses.append(float(torch.nn.functional.cross_entropy(said[0, :-1].double(), row[1:])))
    return (losses[1] - losses[0]) / 0.002


def encoder_decoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformers.T5Model(config).save_pretrained(folder / "t5")
    return folder / "t5"


def test_both_stacks_of_an_encoder_decoder_are_measured(tmp_path: Path, run: Run) -> None:
    source = encoder_decoder(tmp_path)
    found = measure_importance(Artifact.open(source), run)
    model = loaded(source)
    seen: list[torch.Tensor] = []
    for block in find_blocks(model):
        block.module.register_forward_hook(lambda _, args, output: seen.extend([args[0], output[0]]))
    with torch.no_grad():
        model(input_ids=tokens(), decoder_input_ids=tokens())
    assert [block.block for block in found.blocks] == [block.name for block in find_blocks(model)]
    for block, before, after in zip(found.blocks, seen[::2], seen[1::2], strict=True):
        expected = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
        assert block.influence == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
    assert found.loss == pytest.approx(0.0, abs=1e-6)
    wanted = outputs(loaded(source), tokens())
    for number, block in enumerate(found.blocks):
        vectors = outputs(without(loaded(source), [number]), tokens())
        lost = 1 - torch.nn.functional.cosine_similarity(vectors, wanted, dim=-1).mean()
        assert block.loss == pytest.approx(float(lost), rel=1e-3, abs=1e-6)
    # Attention to itself, attention to the encoder, and the MLP.
    assert [part.kind for part in found.parts].count("channels") == 4
    assert [part.kind for part in found.parts].count("heads") >= 4
    assert all(len(part.activation) in (4, 64) for part in found.parts)


def test_experts_are_named_with_the_reason(tmp_path: Path, run: Run) -> None:
    found, _ = measured("mixtral", tmp_path, run, loss=False)
    assert {part.kind for part in found.parts} == {"heads"}


def test_what_cannot_be_measured_is_refused(tmp_path: Path, run: Run) -> None:
    with pytest.raises(PlanError, match="gradients are those of the next token's loss"):
        measured("bert", tmp_path, run, taylor=True)
    with pytest.raises(PlanError, match="measured on calibration text"):
        measure_importance(Artifact.open(tmp_path / "bert"), Run())


def test_what_is_not_finite_is_an_error_or_left_out(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "losses_alone", lambda _: (1.0, {0: 2.0, 1: math.inf, 2: 3.0}))
    found, source = measured("llama", tmp_path, run)
    assert [block.loss for block in found.blocks] == [2.0, None, 3.0]
    model = loaded(source)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1: .*NaN or infinite"):
        measure_importance(Artifact.open(source), run)
