"""Shares of matrices before the sweep, held against whole forward passes of stock transformers."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError
from compress.core.run import RESUMABLE, CalibrationSource, Run
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.numerics.masks import row_mask
from compress.prune.magnitude import Magnitude
from compress.prune.sparsegpt import SparseGpt
from compress.prune.wanda import Wanda
from compress.sweep import shares
from compress.sweep.matrices import Matrix, find_matrices
from compress.sweep.shares import GRID, choices, settle
from tests import models_zoo
from tests.dummies import Recorder
from tests.marks import slow_but

SAMPLES, LENGTH = 8, 16


@pytest.fixture
def run(tmp_path: Path) -> Run:
    file = tmp_path / "tokens.safetensors"
    save_file({"input_ids": models_zoo.tokens(SAMPLES, LENGTH)}, file)
    text = CalibrationSource(str(file), SAMPLES, LENGTH, batch_size=3)
    return Run(calibration=text, scratch=tmp_path / "scratch", threads=1)


def matrices_of(source: Artifact) -> list[Matrix]:
    model = skeleton(source, task="auto", trust_remote_code=False)
    checkpoint = Checkpoint(source, model)
    return [
        matrix
        for block in find_blocks(model)
        for matrix in find_matrices(model, block.name, checkpoint, dense=True).matrices
    ]


def scores_of(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Magnitude times norm of the input of every linear layer inside a module, on one forward pass."""
    inputs: dict[str, torch.Tensor] = {}
    linear = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, torch.nn.Linear)
    }
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, module in linear.items()
    ]
    with torch.no_grad():
        model(input_ids=models_zoo.tokens(SAMPLES, LENGTH))
    for handle in handles:
        handle.remove()
    return {name: linear[name].weight.detach().abs() * inputs[name].norm(dim=0) for name in linear}


# -- by outliers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(("gemma3",), ("llama", "gemma3", "qwen2-sliding")))
def test_outliers_are_those_of_whole_forward_passes(name: str, run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    masker = Wanda(sparsity=0.6, ratios="outliers", outlier_factor=2.5, spread=0.1)
    found = settle(masker, matrices_of(source), source, run)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.path).eval()
    expected = []
    for block in ("model.layers.0.", "model.layers.1.", "model.layers.2."):
        scores = torch.cat([score.flatten() for score in scores_of(model, block).values()])
        expected.append(float((scores > 2.5 * scores.mean()).double().mean()))
    said = found.decisions["ratios"]
    assert [entry["outliers"] for entry in said.values()] == pytest.approx(expected, abs=2e-3)
    taken = [entry["sparsity"] for entry in said.values()]
    assert sum(taken) / 3 == pytest.approx(0.6, abs=1e-5)
    assert max(taken) - min(taken) == pytest.approx(0.2, abs=1e-5)
    assert expected.index(max(expected)) == taken.index(min(taken))
    for matrix, share in found.by_matrix.items():
        block = next(entry for entry in said if matrix.startswith(f"{entry}."))
        assert share == pytest.approx(said[block]["sparsity"], abs=1e-6)


def test_matrices_outside_the_blocks_lose_what_was_asked_for(run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    masker = Wanda(sparsity=0.6, ratios="outliers", outlier_factor=2.0)
    head = Matrix("lm_head", "lm_head.weight", None, "Linear", models_zoo.VOCABULARY, 32, ("lm_head.weight",))
    found = settle(masker, [*matrices_of(source), head], source, run)
    assert found.zeros(masker, head) == masker.zeros
    assert head.name not in found.by_matrix
    first = matrices_of(source)[0]
    assert found.zeros(masker, first) == replace(masker.zeros, sparsity=found.by_matrix[first.name])


def test_an_expert_without_text_has_no_outliers_to_count(run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("mixtral", tmp_path))
    # One token reaches two of four experts.
    save_file({"input_ids": models_zoo.tokens(1, 1)}, tmp_path / "one.safetensors")
    little = replace(
        run, calibration=CalibrationSource(str(tmp_path / "one.safetensors"), 1, 1, batch_size=1)
    )
    with pytest.raises(CalibrationError, match=r"experts\..*no calibration token"):
        settle(Wanda(ratios="outliers"), matrices_of(source), source, little)


# -- by sensitivity -------------------------------------------------------------------------------------


def divergence(model: Any, part: Sequence[str], share: float, by_input: bool) -> float:
    """What pruning a part alone does to the output, with all weights in memory."""
    tokens = models_zoo.tokens(SAMPLES, LENGTH)
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits.double().log_softmax(-1)
        scores = scores_of(model, "model.layers.")
        for name in part:
            weight = model.get_parameter(f"{name}.weight")
            score = scores[name] if by_input else weight.abs()
            weight.masked_fill_(~row_mask(score, share), 0)
        said = model(input_ids=tokens).logits.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - said)).sum(-1).mean())


@pytest.mark.parametrize(
    "masker",
    [
        Wanda(ratios="sensitivity", spread=0.2),
        pytest.param(Magnitude(ratios="sensitivity", spread=0.2, scope="row"), marks=pytest.mark.slow),
    ],
    ids=["wanda", "magnitude"],
)
def test_sensitivity_is_the_divergence_of_a_plain_forward_pass(masker: Any, run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    found = settle(masker, matrices_of(source), source, run)
    parts = found.decisions["ratios"]
    assert len(parts) == 3 * 4
    for part in list(parts)[::5]:
        for share in ("0.3", "0.6"):
            model = transformers.AutoModelForCausalLM.from_pretrained(source.path).eval()
            expected = divergence(model, part.split(" "), float(share), masker.scored_by_input)
            assert parts[part]["divergence"][share] == pytest.approx(expected, rel=2e-2, abs=1e-6)


@pytest.mark.parametrize("name", slow_but(("llama", "mixtral"), ("llama", "mixtral", "gpt2")))
def test_the_choice_keeps_the_mean_and_is_no_worse_than_the_same_for_all(
    name: str, run: Run, tmp_path: Path
) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    masker = SparseGpt(sparsity=0.5, ratios="sensitivity", spread=0.2)
    matrices = matrices_of(source)
    found = settle(masker, matrices, source, run)
    sizes = {matrix.name: matrix.rows * matrix.columns for matrix in matrices}
    assert found.by_matrix.keys() == sizes.keys()
    gone = sum(sizes[matrix] * share for matrix, share in found.by_matrix.items())
    # The grid of the choice may round in favour of zeros.
    assert 0.5 - 1e-9 <= gone / sum(sizes.values()) < 0.55
    allowed = {share / GRID for share in choices(masker)}
    assert allowed == {0.3, 0.4, 0.5, 0.6, 0.7}
    assert set(found.by_matrix.values()) <= allowed
    parts = found.decisions["ratios"].values()
    chosen = sum(part["divergence"][f"{part['sparsity']:.6g}"] for part in parts)
    alike = sum(part["divergence"]["0.5"] for part in parts)
    assert chosen <= alike


def test_it_is_measured_on_a_part_of_the_text(run: Run) -> None:
    assert run.calibration is not None
    assert shares.measuring(Wanda(measured_samples=3), run).calibration == replace(run.calibration, samples=3)
    assert shares.measuring(Wanda(measured_samples=99), run).calibration == run.calibration


def test_a_model_without_an_output_distribution_is_refused(run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("bert", tmp_path))
    with pytest.raises(PlanError, match="feature-extraction has none"):
        Wanda(ratios="sensitivity").check(source, run)
    Wanda(ratios="outliers").check(source, run)


# -- taken up again -------------------------------------------------------------------------------------


def test_what_was_settled_is_not_settled_again(run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    masker = Wanda(ratios="outliers", outlier_factor=2.0)
    matrices = matrices_of(source)
    found = settle(masker, matrices, source, run)
    assert (run.scratch / RESUMABLE).is_file()
    assert not (run.scratch / "shares.partial").exists()
    reporter = Recorder()
    again = settle(masker, matrices, source, replace(run, reporter=reporter))
    assert again == found
    assert reporter.count("begin") == 0
    file = run.scratch / "shares.json"
    document = json.loads(file.read_text())
    document["by_matrix"][matrices[0].name] = 0.25
    file.write_text(json.dumps(document))
    assert settle(masker, matrices, source, run).by_matrix[matrices[0].name] == 0.25


def test_the_same_share_for_all_needs_no_look_at_the_model(run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    found = settle(Wanda(), matrices_of(source), source, run)
    assert found.by_matrix == {}
    assert not run.scratch.exists()
