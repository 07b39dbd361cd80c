"""Integer matrices as they are trained: floats behind them, rounded onto their own grid in every pass.

A student that is stored as integers keeps bits, groups, zero points and format. Behind each matrix stands a
float weight that is trained; what the model multiplies with is that weight rounded (fake quantization), with
the very numbers that a reader of the artifact sees, so that the loss is that of the artifact. Gradients go
straight through the rounding (`compress.numerics.straight_through`).
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch.nn.utils import parametrize

from compress.conversion.gptq import survey as gptq_survey
from compress.conversion.packed import Layer, Survey
from compress.conversion.packed import survey as packed_survey
from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.facts import Fact
from compress.core.run import Run
from compress.formats.compressed_tensors import CompressedTensors, holds_floats, quantizes_inputs
from compress.formats.gptq import Gptq, checkpoint_format
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.numerics.affine import Quantized, quantize
from compress.numerics.straight_through import moved, rounded, within
from compress.training.trainer import ORIGIN, Trainer

_START = "start from the float model, or quantize its weights alone, to integers"


@final
class Latent(nn.Parameter):
    """A float behind integers. That it is zero says nothing: it is where the integer was."""


@final
class Grid(nn.Module):
    """Rounds a float matrix onto the grid of a quantized one.

    Args:
        matrix: as it is stored.
        learns: whether its scales are trained too, by their logarithms.
    """

    def __init__(self, matrix: Quantized, *, learns: bool) -> None:
        super().__init__()
        self.scheme = matrix.scheme
        self.scale = nn.Buffer(matrix.scale, persistent=False)
        self.zero: torch.Tensor | None
        self.register_buffer("zero", matrix.zero, persistent=False)
        self.logarithm: nn.Parameter | None = None
        if learns:
            self.logarithm = nn.Parameter(torch.zeros(matrix.scale.shape, dtype=torch.float32))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Floats ``[rows, columns]`` as a reader of their integers sees them."""
        return rounded(latent, self.scale, self.zero, self.scheme, self.logarithm)

    @torch.no_grad()
    def matrix(self, latent: torch.Tensor) -> Quantized:
        """The nearest integers of floats ``[rows, columns]``, on the CPU."""
        scale = moved(self.scale, self.logarithm)
        q = quantize(latent, scale, self.zero, self.scheme)
        zero = None if self.zero is None else self.zero.cpu()
        return Quantized(q.cpu(), scale.cpu(), zero, self.scheme)


def is_quantized(source: Artifact) -> bool:
    """Whether an artifact is stored as integers."""
    return Fact.INTEGER_WEIGHTS in source.facts


def check(method: Trainer, source: Artifact, run: Run) -> None:
    """Refuse integers that cannot be trained, and options of integers for a model that has none.

    Raises:
        PlanError: which, and why.
    """
    if is_quantized(source):
        survey(source, run)
        return
    given = [f"--scales {method.scales}"] * (method.scales != "keep") + ["--origin"] * bool(method.origin)
    if given:
        raise PlanError(
            f"{source.path} is no model of integers, for which {' and '.join(given)} would be",
            "leave it out, or quantize the model first",
        )


def origin_of(run: Run) -> Artifact | None:
    """The float model behind the integers, where a run has one."""
    return Artifact.open(run.models[ORIGIN]) if ORIGIN in run.models else None


def survey(source: Artifact, run: Run) -> Survey:
    """The integer matrices of an artifact, from headers.

    Raises:
        PlanError: its numbers are not weights as integers, in a format that is written back, each the weight
            of one module.
        ModelError: it is damaged.
    """
    quantization: Mapping[str, Any] = source.config["quantization_config"]
    if Fact.GPTQ_CHECKPOINT in source.facts:
        found = gptq_survey(source, run)
    else:
        method = quantization.get("quant_method")
        if method != CompressedTensors.name:
            raise PlanError(f"{source.path} is stored as '{method}', which cannot be trained", _START)
        if quantizes_inputs(quantization):
            raise PlanError(f"{source.path} rounds inputs too, which training does not imitate", _START)
        if holds_floats(quantization):
            raise PlanError(f"{source.path} is stored as small floats, which cannot be trained", _START)
        found = packed_survey(source, run)
    for layer in found.layers:
        if layer.expert:
            raise PlanError(
                f"{layer.stem}: transformers runs experts fused, and their integers cannot be trained so",
                "start from the float model, or leave experts in floats (--ignore '*.experts')",
            )
    return found


def load(found: Survey, device: torch.device) -> None:
    """Fill the model: floats as they are, integer matrices with what they stand for, in float32."""
    for module in list(found.model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    found.checkpoint.load(found.floats, device)
    for layer in found.layers:
        value = found.matrix(layer).dequantize().float()
        set_module_tensor_to_device(found.model, f"{layer.module}.weight", device, value=value)
    found.model.tie_weights()


def ground(found: Survey, origin: Artifact | None, run: Run, *, learns: bool) -> dict[str, Grid]:
    """Put every integer matrix of a filled model on its grid; the model computes the same as before.

    Args:
        found: the matrices.
        origin: the float model that the integers were rounded from. Training starts from its weights where
            they are rounded to the integers, else from as near to them as is.
        learns: whether scales are trained too.

    Returns:
        The grids, by the modules they belong to.

    Raises:
        PlanError: `origin` is another model.
    """
    floats = None if origin is None else _origin(found, origin, run)
    grids: dict[str, Grid] = {}
    for layer in found.layers:
        matrix = found.matrix(layer)
        module = found.model.get_submodule(layer.module)
        weight = module.weight
        users = [user for user in found.model.modules() if getattr(user, "weight", None) is weight]
        if floats is None:
            latent: nn.Parameter = Latent(weight.detach(), requires_grad=True)
        else:
            latent = nn.Parameter(within(floats[layer.module], matrix).to(weight.device))
        grid = Grid(matrix, learns=learns).to(weight.device)
        for user in users:
            user.weight = latent
            parametrize.register_parametrization(user, "weight", grid, unsafe=True)
        grids[layer.module] = grid
    return grids


def latent_of(found: Survey, layer: Layer) -> torch.Tensor:
    """The float behind a matrix: of a module that is on its grid, or as it is."""
    module: Any = found.model.get_submodule(layer.module)
    if parametrize.is_parametrized(module, "weight"):
        latent: torch.Tensor = module.parametrizations.weight.original
        return latent
    weight: torch.Tensor = module.weight
    return weight


def encoded(layer: Layer, matrix: Quantized, source: Artifact) -> dict[str, torch.Tensor]:
    """What training changes of a matrix on disk, integers and scales, by full names."""
    weight = f"{layer.stem}.weight"
    if "qweight" in layer.names:
        version = checkpoint_format(source.config["quantization_config"])
        tensors = Gptq("v1" if version == "gptq" else "v2").encode(weight, matrix.parts(), layer.scheme)
    elif "weight_packed" in layer.names:
        tensors = CompressedTensors().encode(weight, matrix.parts(), layer.scheme)
    else:
        tensors = {weight: matrix.q, f"{layer.stem}.weight_scale": matrix.scale}
    changed = ("qweight", "scales", "weight_packed", "weight_scale", "weight")
    return {layer.names[local]: tensors[layer.names[local]] for local in changed if local in layer.names}


def value_of(layer: Layer, matrix: Quantized) -> torch.Tensor:
    """The matrix as verification reads it: in float32 of a GPTQ checkpoint, else in the scales' dtype."""
    if "qweight" in layer.names:
        return Quantized(matrix.q, matrix.scale.float(), matrix.zero, matrix.scheme).dequantize()
    return matrix.dequantize()


def _origin(found: Survey, origin: Artifact, run: Run) -> dict[str, torch.Tensor]:
    """Float weights of the modules that are integers, in float32."""
    if Fact.FLOAT_WEIGHTS not in origin.facts:
        raise PlanError(f"{origin.path} has no float weights", "name the float model before quantization")
    model = skeleton(origin, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(origin, model)
    weights: dict[str, torch.Tensor] = {}
    for layer in found.layers:
        checkpoint.load_module(layer.module, torch.device("cpu"))
        weight = model.get_submodule(layer.module).weight
        if tuple(weight.shape) != (layer.rows, layer.columns):
            raise PlanError(
                f"{layer.module} is {layer.rows} x {layer.columns} in {found.source.path} and "
                f"{' x '.join(map(str, weight.shape))} in {origin.path}",
                "name the float model that was quantized",
            )
        weights[layer.module] = weight.detach().float()
    return weights
