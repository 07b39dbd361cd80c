"""AutoRound: its descent on problems whose answer is known, and on models through the sweep."""

import itertools
import json
import random
from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors.torch import save_file

from compress import engine
from compress.core.artifact import LAYERS_FILE, Artifact
from compress.core.errors import CalibrationError, ModelError
from compress.core.events import SILENT, Reporter
from compress.core.run import CalibrationSource, Run
from compress.core.scheme import Scheme
from compress.numerics.affine import Quantized, round_to_nearest
from compress.numerics.hessian import Hessian
from compress.numerics.masks import ColumnNorms
from compress.quantize.autoround import AutoRound
from compress.quantize.gptq import Gptq
from compress.quantize.rtn import Rtn
from compress.sweep.joint import BlockProblem
from compress.sweep.matrices import Matrix
from tests import models_zoo
from tests.marks import slow_but


def matrix(name: str, rows: int, columns: int) -> Matrix:
    return Matrix(name, f"{name}.weight", None, "Linear", rows, columns, (f"{name}.weight",))


@final
class Layers(BlockProblem):
    """Linear layers one behind the other with a bend between them, held to what they say themselves."""

    def __init__(self, weights: list[torch.Tensor], inputs: torch.Tensor, batches: int = 1, seed: int = 0):
        self.members = [matrix(f"layer{index}", *weight.shape) for index, weight in enumerate(weights)]
        self._values = {member: weight.clone() for member, weight in zip(self.members, weights, strict=True)}
        self._inputs = inputs.chunk(batches)
        self._targets = [self._output(part).detach() for part in self._inputs]
        self._numbers = random.Random(seed)
        self.asked: list[int] = []

    @property
    def name(self) -> str:
        return "block"

    @property
    def batches(self) -> int:
        return len(self._inputs)

    @property
    def numbers(self) -> random.Random:
        return self._numbers

    @property
    def reporter(self) -> Reporter:
        return SILENT

    def weight(self, matrix: Matrix) -> torch.Tensor:
        return self._values[matrix].detach()

    def put(self, matrix: Matrix, value: torch.Tensor) -> None:
        self._values[matrix] = value.float().clone()

    def error(self, batch: int) -> tuple[float, int]:
        difference = (self._output(self._inputs[batch]) - self._targets[batch]).detach()
        return float(difference.square().sum()), difference.numel()

    def gradients(self, batch: int) -> tuple[float, dict[Matrix, torch.Tensor]]:
        self.asked.append(batch)
        for value in self._values.values():
            value.requires_grad_(True)
        loss = (self._output(self._inputs[batch]) - self._targets[batch]).square().mean()
        found = torch.autograd.grad(loss, list(self._values.values()))
        return float(loss.detach()), dict(zip(self._values, found, strict=True))

    def _output(self, rows: torch.Tensor) -> torch.Tensor:
        last = self.members[-1]
        for member in self.members:
            rows = rows @ self._values[member].T
            rows = rows if member is last else torch.nn.functional.silu(rows)
        return rows


def problem(*shapes: tuple[int, int], seed: int = 0, tokens: int = 256, batches: int = 1) -> Layers:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    columns = shapes[0][1]
    mixing = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator)
    return Layers(weights, torch.randn(tokens, columns, generator=generator) @ mixing, batches)


def nearest(layers: Layers, scheme: Scheme) -> dict[Matrix, Quantized]:
    return {
        member: round_to_nearest(layers.weight(member), scheme, torch.float32) for member in layers.members
    }


def error_of(layers: Layers, values: dict[Matrix, Quantized]) -> float:
    for member, quantized in values.items():
        layers.put(member, quantized.dequantize())
    return layers.mean_error()


@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product([2, 3, 4], [True, False])))
def test_one_layer_ends_below_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits, 8, symmetric)
    method = AutoRound(iterations=100, start="nearest", clip="none", range_rate=0.0025, looks=10)
    before, after = 0.0, 0.0
    for seed in range(2):
        layers = problem((12, 32), seed=seed)
        starts = nearest(layers, scheme)
        member = layers.members[0]
        found = method.round_together(starts, layers)[member]
        found.quantized.check_values()
        first, error = error_of(layers, starts), error_of(layers, {member: found.quantized})
        assert found.notes["block_error_before"] == pytest.approx(first)
        assert found.notes["block_error"] == pytest.approx(error)
        assert error <= first
        before, after = before + first, after + error
    if symmetric:
        assert after < 0.9 * before


@pytest.mark.parametrize(
    ("start", "descent"), [("nearest", "sign"), ("feedback", "sign"), ("feedback", "scaled")]
)
def test_a_tiny_matrix_comes_close_to_the_best_of_all_roundings(start: Any, descent: Any) -> None:
    """Against every choice of integers on the grid of the start: 4 to the power of 6 for each row."""
    method = AutoRound(
        bits=2, group_size="channel", start=start, clip="none", descent=descent, range_rate=0, looks=50
    )
    before, ours, best = 0.0, 0.0, 0.0
    for seed in range(6):
        layers = problem((4, 6), seed=seed, tokens=64)
        member, inputs = layers.members[0], layers._inputs[0]
        weight = layers.weight(member).clone()
        hessian = Hessian(6)
        hessian.add(inputs)
        first = method.round(weight.clone(), hessian, method.scheme_for("layer"), torch.float32).quantized
        choices = torch.tensor(list(itertools.product(range(-2, 2), repeat=6))).float()
        for row in range(4):
            errors = (choices * first.scale[row] - weight[row]) @ inputs.T
            best += float(errors.square().mean(1).min()) / 4
        found = method.round_together({member: first}, layers)[member]
        assert torch.equal(found.quantized.scale, first.scale)
        before += float(found.notes["block_error_before"])
        ours += float(found.notes["block_error"])
    assert best <= ours * (1 + 1e-5)
    # Descent ends in a local optimum: from the nearest integers it gains a good part of what can be gained,
    # from those of error feedback there is little left to gain.
    assert ours <= before
    assert ours < 1.3 * best or before - ours > 0.4 * (before - best), (before, ours, best)


def test_layers_make_up_for_each_other() -> None:
    """Both layers together end below what each can do alone."""
    scheme = Scheme(2, 16)
    method = AutoRound(iterations=100, start="nearest")
    layers = problem((32, 32), (16, 32), batches=4)
    starts = nearest(layers, scheme)
    together = method.round_together(starts, layers)[layers.members[0]].notes
    alone = []
    for free in range(2):
        layers = problem((32, 32), (16, 32), batches=4)
        held = layers.members[1 - free]
        layers.put(held, starts[held].dequantize())
        member = layers.members[free]
        alone.append(method.round_together({member: starts[member]}, layers)[member].notes["block_error"])
    assert float(together["block_error"]) < min(float(error) for error in alone)


@pytest.mark.parametrize("start", ["feedback", "nearest"])
def test_no_step_gives_the_start_to_the_bit(start: Any) -> None:
    layers = problem((12, 32))
    member = layers.members[0]
    method = AutoRound(bits=3, group_size=8, iterations=0, start=start)
    hessian = method.statistic(32, torch.device("cpu"))
    hessian.add(layers._inputs[0])
    weight = layers.weight(member).clone()
    first = method.round(weight, hessian, method.scheme_for("layer"), torch.bfloat16).quantized
    found = method.round_together({member: first}, layers)[member]
    assert torch.equal(found.quantized.q, first.q)
    assert torch.equal(found.quantized.scale, first.scale)
    assert found.notes["step"] == 0
    assert found.notes["block_error"] == found.notes["block_error_before"]
    assert layers.asked == []


def test_the_start_by_feedback_is_that_of_gptq() -> None:
    layers = problem((12, 32))
    hessian = Hessian(32)
    hessian.add(layers._inputs[0])
    ours, theirs = AutoRound(bits=3, group_size=8), Gptq(bits=3, group_size=8)
    weight = layers.weight(layers.members[0])
    first, second = (
        each.round(weight.clone(), hessian, each.scheme_for("layer"), torch.bfloat16).quantized
        for each in (ours, theirs)
    )
    assert torch.equal(first.q, second.q)
    assert torch.equal(first.scale, second.scale)


@pytest.mark.parametrize("start", ["feedback", "nearest"])
def test_zeros_of_a_pruned_matrix_stay_zero(start: Any) -> None:
    layers = problem((12, 32))
    member = layers.members[0]
    pruned = torch.rand(12, 32, generator=torch.Generator().manual_seed(7)) < 0.5
    layers.put(member, layers.weight(member).masked_fill(pruned, 0))
    weight, hessian = layers.weight(member).clone(), Hessian(32)
    hessian.add(layers._inputs[0])
    moved = []
    for keep in (True, False):
        method = AutoRound(bits=2, group_size=8, start=start, iterations=40, rate=0.05, keep_zeros=keep)
        first = method.round(weight.clone(), hessian, method.scheme_for("layer"), torch.bfloat16).quantized
        layers.put(member, weight)
        found = method.round_together({member: first}, layers)[member]
        moved.append(bool(found.quantized.dequantize()[pruned].any()))
        assert found.notes["step"] > 0
        assert float(found.notes["block_error"]) < float(found.notes["block_error_before"])
    # Of the nearest integers those of zeros are zero anyway.
    assert moved == [False, start == "feedback"]


def test_it_is_never_worse_than_its_start_on_all_batches() -> None:
    """Rates so large that every step is a leap: the start stays."""
    layers = problem((12, 32), batches=4)
    starts = nearest(layers, Scheme(8, 8))
    found = AutoRound(iterations=6, rate=1.0, range_rate=1.0, start="nearest").round_together(starts, layers)
    member = layers.members[0]
    assert found[member].notes["step"] == 0
    assert torch.equal(found[member].quantized.q, starts[member].q)


def test_every_batch_has_its_turn_before_any_comes_again() -> None:
    orders = []
    for seed in (0, 0, 1):
        layers = problem((4, 8), batches=4)
        layers._numbers = random.Random(seed)
        AutoRound(iterations=10, start="nearest").round_together(nearest(layers, Scheme(2, 8)), layers)
        orders.append(layers.asked)
        assert sorted(layers.asked[:4]) == sorted(layers.asked[4:8]) == [0, 1, 2, 3]
        assert len(layers.asked) == 10
    assert orders[0] == orders[1] != orders[2]


def test_factors_grow_only_from_ranges_that_were_searched() -> None:
    scheme = Scheme(2, 8)
    scales = {}
    for clip in ("none", "mse"):
        layers = problem((12, 32))
        starts = nearest(layers, scheme)
        method = AutoRound(iterations=50, start="nearest", clip=clip, range_rate=0.05)
        found = method.round_together(starts, layers)[layers.members[0]].quantized
        scales[clip] = float((found.scale / starts[layers.members[0]].scale).max())
    assert scales["none"] <= 1 < scales["mse"]


def test_a_layer_without_data_is_an_error() -> None:
    for start in ("feedback", "nearest"):
        method = AutoRound(group_size=16, start=start)
        with pytest.raises(CalibrationError, match="no calibration token"):
            method.round(torch.randn(4, 16), Hessian(16), Scheme(4, 16), torch.bfloat16)
    with pytest.raises(CalibrationError, match="needs the Hessian of the layer's input, got ColumnNorms"):
        AutoRound().round(torch.randn(4, 16), ColumnNorms(16), Scheme(4, 16), torch.bfloat16)


def test_statistics_are_no_more_than_the_start_needs() -> None:
    cpu = torch.device("cpu")
    assert isinstance(AutoRound().statistic(8, cpu), Hessian)
    assert isinstance(AutoRound(start="nearest").statistic(8, cpu), Hessian)
    plain = AutoRound(start="nearest", clip="mse", group_size=8)
    counted = plain.statistic(16, cpu)
    assert isinstance(counted, ColumnNorms)
    counted.add(torch.randn(3, 16))
    plain.round(torch.randn(4, 16), counted, Scheme(4, 8), torch.float32).quantized.check_values()


def test_weights_that_are_not_finite_are_an_error() -> None:
    hessian = Hessian(16)
    hessian.add(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ModelError, match="NaN"):
        AutoRound(group_size=16).round(torch.full((2, 16), torch.nan), hessian, Scheme(4, 16), torch.bfloat16)


# -- through the sweep ---------------------------------------------------------------------------------


def quantized(folder: Path, name: str, out: str, **options: Any) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Run one rounder on a tiny model; the artifact and its decisions by layer."""
    model = folder / name
    if not model.exists():
        models_zoo.write(name, folder)
        save_file({"input_ids": models_zoo.tokens(16, 32)}, folder / "tokens.safetensors")
    text = {"calibration": str(folder / "tokens.safetensors"), "samples": 16, "sequence_length": 32}
    step = {"use": "quantize.autoround", "group_size": 16, "bits": 2, "iterations": 24, **options}
    recipe = {"model": str(model), "threads": 1, "steps": [step], "data": {**text, "batch_size": 4}}
    result = engine.run(recipe, folder / out, single=True)
    lineage = Artifact.open(result.final).lineage
    assert lineage is not None
    return result.final, lineage.steps[-1].decisions["layers"]


@pytest.mark.parametrize(
    "name",
    slow_but(("llama", "mixtral"), ("llama", "mixtral", "qwen2-sliding", "gemma3", "bert", "albert")),
)
def test_the_error_of_blocks_falls_on_every_kind_of_model(name: str, tmp_path: Path) -> None:
    _, layers = quantized(tmp_path, name, "out", rate=0.02)
    before = sum(float(row["block_error_before"]) for row in layers.values())
    after = sum(float(row["block_error"]) for row in layers.values())
    assert after < 0.95 * before
    assert all(int(row["tokens"]) > 0 and float(row["error"]) > 0 for row in layers.values())


def test_the_last_block_is_held_to_the_original_model(tmp_path: Path) -> None:
    """What is reported as the last block's error is the distance of the whole models at that place."""
    from transformers import AutoModelForCausalLM

    artifact, layers = quantized(tmp_path, "llama", "out", iterations=6, clip="none")
    tokens = models_zoo.tokens(16, 32)
    states = []
    for folder in (tmp_path / "llama", artifact):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        seen: list[torch.Tensor] = []
        model.model.layers[-1].register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        with torch.no_grad():
            model(input_ids=tokens)
        states.append(seen[0])
    error = float((states[0] - states[1]).square().mean())
    assert float(layers["model.layers.2.mlp.down_proj"]["block_error"]) == pytest.approx(error, rel=1e-4)


def test_the_table_of_layers_has_one_row_a_matrix_with_what_became_of_it(tmp_path: Path) -> None:
    artifact, layers = quantized(tmp_path, "llama", "out", include=["lm_head"], iterations=6, clip="none")
    assert len(layers) == 3 * 7 + 1
    row = layers["model.layers.1.self_attn.q_proj"]
    assert {"damping", "dead_columns", "block_error_before", "block_error", "step", "error"} <= set(row)
    # A layer outside the blocks keeps its beginning.
    assert "block_error" not in layers["lm_head"]
    assert (artifact / LAYERS_FILE).is_file()


def test_the_seed_decides_the_order_of_batches_and_nothing_else_does(tmp_path: Path) -> None:
    model = models_zoo.write("llama", tmp_path)
    save_file({"input_ids": models_zoo.tokens(16, 32)}, tmp_path / "tokens.safetensors")
    method = AutoRound(group_size=16, bits=2, iterations=5, looks=1, start="nearest")
    tensors = []
    for attempt, seed in enumerate((0, 0, 1)):
        (tmp_path / str(attempt)).mkdir()
        source = CalibrationSource(str(tmp_path / "tokens.safetensors"), 16, 32, 4)
        run = Run(seed=seed, calibration=source, scratch=tmp_path / str(attempt) / ".progress")
        outcome = method.apply(Artifact.open(model), tmp_path / str(attempt), run)
        tensors.append(json.dumps({name: meant.digest for name, meant in outcome.tensors.items()}))
    assert tensors[0] == tensors[1] != tensors[2]


def test_a_plan_counts_the_steps_and_the_second_stream(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    save_file({"input_ids": models_zoo.tokens(16, 32)}, tmp_path / "tokens.safetensors")
    run = Run(calibration=CalibrationSource(str(tmp_path / "tokens.safetensors"), 16, 32, 4))
    alone, joint = Gptq(group_size=16).check(source, run), AutoRound(group_size=16).check(source, run)
    recordings = 16 * 32 * 32 * 4
    assert joint.disk_bytes - alone.disk_bytes == 2 * recordings
    assert joint.host_bytes - alone.host_bytes > recordings
    assert joint.seconds > 2 * alone.seconds


@pytest.mark.slow
def test_two_bits_on_a_real_model_beat_error_feedback(shared: Path, tmp_path: Path) -> None:
    """Output error of the last block on the calibration text, against what the same start gives alone."""
    text = {"calibration": str(shared / "data" / "gutenberg_train.txt.gz"), "samples": 32}
    errors = []
    for iterations in (0, 60):
        step = {"use": "quantize.autoround", "bits": 2, "group_size": 64, "iterations": iterations}
        recipe = {
            "model": str(shared / "models" / "gutenberg-4m"),
            "steps": [step],
            "data": {**text, "sequence_length": 128},
        }
        result = engine.run(recipe, tmp_path / str(iterations), single=True)
        lineage = Artifact.open(result.final).lineage
        assert lineage is not None
        errors.append(
            float(lineage.steps[-1].decisions["layers"]["model.layers.3.mlp.down_proj"]["block_error"])
        )
    assert errors[1] < 0.8 * errors[0]


def test_rounding_to_nearest_is_beaten_through_the_sweep(tmp_path: Path) -> None:
    """Against `quantize.rtn` as it comes, in what the model says of other tokens."""
    from transformers import AutoModelForCausalLM

    learned, _ = quantized(tmp_path, "llama", "learned")
    plain, _ = quantized(tmp_path, "llama", "plain", iterations=0, start="nearest", clip="none")
    assert Rtn(bits=2, group_size=16, integer_range="full").scheme_for("x") == Scheme(2, 16)
    outputs = []
    for folder in (tmp_path / "llama", learned, plain):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            outputs.append(model(input_ids=models_zoo.tokens(8, 32, seed=9)).logits)
    assert (outputs[1] - outputs[0]).norm() < 0.8 * (outputs[2] - outputs[0]).norm()
