"""Holding a finished artifact against what was meant, loaded the way its users load it.

The model is loaded block by block through transformers' own loader and, where it is compressed, its own
quantizer: no key may be missing or unexpected, every changed weight must come out with exactly the values
that the pass meant, every other tensor must still be the source's.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import AutoHfQuantizer

from compress.core.artifact import Artifact, Lineage, StepRecord
from compress.core.errors import CompressError, PlanError, VerificationError
from compress.core.passes import Delegating, Meant, find
from compress.core.run import Run
from compress.formats.bitsandbytes import dequantized, forget, is_layer
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, quiet, skeleton
from compress.models.tasks import FeatureExtraction, resolve
from compress.numerics.fingerprint import fingerprint
from compress.sweep.memory import return_freed
from compress.sweep.stored import is_stored_otherwise, verify_stored

_HINT = "the artifact is damaged or was written wrongly: make it again, and report it if that does not help"


@dataclass(frozen=True)
class Verified:
    """What a verification held true.

    Attributes:
        changed: weights that the passes changed, all as meant.
        unchanged: weights that are still the source's.
        calibrated: layers that calibration data reached.
    """

    changed: int
    unchanged: int
    calibrated: int


def verify_weights(
    artifact: Artifact, lineage: Lineage, run: Run, source: Artifact | None = None
) -> Verified:
    """Load an artifact block by block and compare every weight.

    Args:
        lineage: what was meant.
        source: the artifact before the last pass, where it is at hand: unchanged tensors are compared
            with it too, and mistakes are measured against it.

    Raises:
        VerificationError: naming the first weight that is not what was meant.
    """
    last = lineage.steps[-1]
    layers = last.decisions.get("layers", {})
    starved = [name for name, row in layers.items() if row.get("tokens") == 0 and _calibrated(last)]
    if starved:
        raise VerificationError(f"{starved[0]} was never calibrated", _HINT)
    if is_stored_otherwise(artifact):
        verify_stored(artifact, lineage, run)
        changed = sum(meant.changed for meant in lineage.tensors.values())
        return Verified(changed, len(lineage.tensors) - changed, 0)
    try:
        model, quantizer = prepared(artifact, artifact.config.get("quantization_config"), run)
        original = None
        if source is not None:
            bare = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
            original = Checkpoint(source, bare)
        checkpoint = Checkpoint(artifact, model, quantizer)
        with quiet():
            return _Verification(model, checkpoint, lineage, run, original).run()
    except VerificationError:
        raise
    except CompressError as error:
        raise VerificationError(f"stock transformers does not load it: {error.message}", _HINT) from error


def _calibrated(step: StepRecord) -> bool:
    """Whether the layers of a step saw data: its method's word, or that of the method which did the work."""
    kind = find(step.use)
    if issubclass(kind, Delegating):
        return kind(**step.options).delegate.reads_calibration
    # The record itself says it: options of an older version need not make a pass any more.
    asked = any(step.options.get(option) in values for option, values in kind.calibrated_with.items())
    return kind.calibrated or asked


def prepared(source: Artifact, quantization: Mapping[str, Any] | None, run: Run) -> tuple[Any, Any]:
    """A skeleton as transformers prepares it before it loads weights, and its quantizer.

    Args:
        quantization: a ``quantization_config``, or ``None`` for a model of plain floats.

    Raises:
        PlanError: the loader cannot prepare this model with this configuration.
    """
    dtype = loaded_dtype(source)
    model = skeleton(source, task=run.task, dtype=dtype, trust_remote_code=run.trust_remote_code)
    if quantization is None:
        return model, None
    try:
        quantizer = AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
        # The library draws a bar for the layout of the modules, which is done in a moment.
        with quiet(), contextlib.redirect_stderr(io.StringIO()), torch.device("meta"):
            quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
        # transformers initialises what a checkpoint leaves out, and some models' own code for it reaches
        # for weights that are packed. A skeleton counts as initialised, until it is unmarked.
        for module in model.modules():
            # A layer of bitsandbytes holds bytes under the name of a weight: the loader leaves it alone.
            module._is_hf_initialized = is_layer(module)
            if getattr(module, "quantization_scheme", None) is not None:
                # The artifact has all of them, and what was loaded is not initialised: integers could not be.
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = True
        model.initialize_weights()
    except (AttributeError, TypeError, ValueError, RuntimeError, ImportError) as error:
        raise PlanError(
            f"stock transformers cannot load {type(model).__name__} with this quantization: {error}",
            "not every model's own code takes packed layers: use a method that writes one integer format, "
            "such as quantize.gptq, which it can unpack while it loads",
        ) from error
    return model, quantizer


def rehearse(source: Artifact, quantization: Mapping[str, Any], run: Run) -> None:
    """Let transformers prepare a model before anything is written.

    A configuration that the loader cannot work with fails here, on the meta device, instead of at a user's.
    What was said of a configuration when it was planned holds when it is written.

    Raises:
        PlanError: as `prepared`.
    """
    documents = (json.dumps(dict(each), sort_keys=True) for each in (source.config, quantization))
    refusal = _refusal(source.path, *documents, run.task, run.trust_remote_code)
    if refusal is not None:
        raise PlanError(*refusal)


@lru_cache(maxsize=8)
def _refusal(
    path: Path, config: str, quantization: str, task: str, trust_remote_code: bool
) -> tuple[str, str] | None:
    """Message and hint of what `prepared` says of a configuration, ``None`` where it says nothing."""
    del config  # tells one model from another at the same path
    try:
        run = Run(task=task, trust_remote_code=trust_remote_code)
        prepared(Artifact.open(path), json.loads(quantization), run)
    except PlanError as error:
        return error.message, error.hint
    return None


@dataclass
class _Verification:
    model: Any
    checkpoint: Checkpoint
    lineage: Lineage
    run_: Run
    original: Checkpoint | None

    def run(self) -> Verified:
        self._check_names()
        blocks = find_blocks(self.model)
        seen: set[str] = set()
        parts = [block.name for block in blocks]
        with self.run_.reporter.progress("verifying", len(parts) + 1, "block") as advance:
            for part in parts:
                self.run_.reporter.event("verify.block", block=part)
                self.checkpoint.load_module(part, torch.device("cpu"))
                seen |= self._compare(self.checkpoint.names_of(part))
                self.checkpoint.release(part)
                return_freed()
                advance(1)
            self.run_.reporter.event("verify.block", block="outside")
            seen |= self._outside(parts)
            advance(1)
        lost = sorted(set(self.lineage.tensors) - seen)
        if lost:
            raise VerificationError(
                f"{lost[0]} should be in the artifact, and no loaded weight has its name", _HINT
            )
        changed = sum(meant.changed for meant in self.lineage.tensors.values())
        layers = self.lineage.steps[-1].decisions.get("layers", {})
        calibrated = sum(int(row.get("tokens", 0)) > 0 for row in layers.values())
        return Verified(changed, len(self.lineage.tensors) - changed, calibrated)

    def _check_names(self) -> None:
        unknown = [
            name
            for name, target in self.checkpoint.target.items()
            if target not in self._known() and name not in self.checkpoint.passed_over
        ]
        if unknown:
            raise VerificationError(
                f"{unknown[0]} is on disk, and the loaded model has no place for it", _HINT
            )

    def _known(self) -> set[str]:
        if not hasattr(self, "_names"):
            self._names = set(self.model.state_dict())
        return self._names

    def _absent(self) -> list[str]:
        """Parts that are in no file, of an encoder whose hidden states do without them (BERT's pooler)."""
        source = self.checkpoint.source
        if not isinstance(resolve(self.run_.task, source.config), FeatureExtraction):
            return []
        held = {target.partition(".")[0] for target in self.checkpoint.target.values()}
        return [f"{name}." for name, _ in self.model.named_children() if name not in held]

    def _outside(self, parts: list[str]) -> set[str]:
        """Everything beyond the blocks."""
        inside = tuple(f"{part}." for part in parts)
        names = [
            name for name in self.checkpoint.names if not self.checkpoint.target[name].startswith(inside)
        ]
        modules: dict[str, list[str]] = {}
        for name in names:
            modules.setdefault(self.checkpoint.target[name].rpartition(".")[0], []).append(name)
        for entries in modules.values():
            self.checkpoint.load(entries, torch.device("cpu"))
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.device.type == "meta" and not name.startswith((*inside, *self._absent())):
                raise VerificationError(f"{name} is in no file of the artifact", _HINT)
        return {name for _, entries in sorted(modules.items()) for name in self._compare(entries)}

    def _compare(self, names: list[str]) -> set[str]:
        """Hold loaded weights against what was meant; the float names that were compared."""
        seen: set[str] = set()
        for name in names:
            meant = self.lineage.tensors.get(name)
            if meant is None or meant.changed:
                continue
            seen.add(name)
            raw = fingerprint(self.checkpoint.tensor(name))
            if raw != meant.digest:
                raise VerificationError(f"{name} should be untouched, and its values changed", _HINT)
            if self.original is not None and raw != fingerprint(self.original.tensor(name)):
                raise VerificationError(f"{name} should be untouched, and differs from the source", _HINT)
        for name, value in self._changed_values([name for name in names if name not in seen]):
            meant = self.lineage.tensors.get(name)
            if meant is None:
                raise VerificationError(f"{name} was loaded, and no pass meant to write it", _HINT)
            seen.add(name)
            if fingerprint(value) != meant.digest:
                raise VerificationError(self._difference(name, value, meant), _HINT)
        return seen

    def _changed_values(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Dequantized weights by float name on disk, as the loader computes them, one at a time."""
        targets = {self.checkpoint.target[name] for name in names}
        owners = {target.rpartition(".")[0] for target in targets}
        for owner in sorted(owners):
            module = self.model.get_submodule(owner)
            dense = dequantized(module, self.model.dtype)
            if dense is not None:
                # What belongs to the weight has the same target.
                parts = [name for name in names if self.checkpoint.target[name] == f"{owner}.weight"]
                yield next(name for name in parts if name.endswith(".weight")), dense
                forget(module)
                return_freed()
            elif getattr(module, "quantization_scheme", None) is not None:
                _check_input_scale(owner, module)
                numbers = self._float_name(owner, names)
                # A bias is no part of the numbers, and training may have changed it.
                beside = {
                    self.checkpoint.target[name]: name
                    for name in names
                    if name != numbers and name in self.lineage.tensors
                }
                for target, name in beside.items():
                    if target.rpartition(".")[0] == owner:
                        yield name, self.model.get_parameter(target).detach()
                yield numbers, _decompressed(module)
                # A block of dense weights is several times the packed one.
                self.checkpoint.release(owner)
                return_freed()
            else:
                loaded = {
                    target: self.model.get_parameter(target).detach()
                    for target in targets
                    if target.rpartition(".")[0] == owner
                }
                yield from self._split(loaded, names).items()

    def _float_name(self, owner: str, names: list[str]) -> str:
        """The float name on disk of a quantized module: that of its numbers, without what packing adds."""
        for name in names:
            if self.checkpoint.target[name] in (f"{owner}.weight_packed", f"{owner}.weight"):
                return name.removesuffix("_packed")
        raise VerificationError(f"{owner} is declared quantized, and has no quantized weight", _HINT)

    def _split(self, loaded: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
        """Loaded parameters that are no packed modules: experts, or layers that were left in floats."""
        values: dict[str, torch.Tensor] = {}
        for target, value in loaded.items():
            direct = [name for name in names if self.checkpoint.target[name] == target]
            if len(direct) == 1:
                values[direct[0].removesuffix("_packed")] = value
            else:
                values |= self.checkpoint.to_disk({target: value})
        return values

    def _difference(self, name: str, value: torch.Tensor, meant: Meant) -> str:
        message = f"{name} loads with other values than were meant"
        if self.original is None or name not in self.original.names:
            return message
        before = self.original.tensor(name).float()
        if before.shape != value.shape:
            return f"{message}: shape {tuple(value.shape)}, the source has {tuple(before.shape)}"
        distance = float(
            torch.linalg.norm(before - value.float()) / torch.linalg.norm(before).clamp_min(1e-30)
        )
        return f"{message}: relative distance to the source {distance:.4g}, meant {meant.error:.4g}"


def _check_input_scale(name: str, module: nn.Module) -> None:
    """The fixed scale of a layer's inputs is a number that can be divided by."""
    for part in ("input_scale", "input_global_scale"):
        scale = getattr(module, part, None)
        if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise VerificationError(f"{name}.{part} loads as {scale.flatten()[0].item():g}", _HINT)


def _decompressed(module: nn.Module) -> torch.Tensor:
    from compressed_tensors.compressors import decompress_module

    with quiet(), torch.no_grad():
        decompress_module(module)
    return module.get_parameter("weight").detach()
