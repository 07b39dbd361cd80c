"""Stock transformers in eager mode: the reference runtime, which every transformers artifact runs on.

A compressed-tensors artifact runs dense here, because transformers has no kernel for it: it gets neither
faster nor smaller in memory than the float model. Its accuracy is the one that its users get: where its
configuration says that inputs are quantized, they are rounded in front of every layer, as transformers does.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch
from compressed_tensors.compressors import ModelCompressor
from transformers import CompressedTensorsConfig

from compress.core.artifact import Artifact
from compress.core.errors import ModelError
from compress.core.facts import MEANING, Fact
from compress.formats.compressed_tensors import quantizes_inputs
from compress.models.load import loaded_dtype, quiet
from compress.models.tasks import Task
from compress.runtimes import Placement, Runtime, Session, Unavailable
from compress.runtimes._session import TorchSession, chosen_device

_UNREAD = "pooler"
"""A part that no task's outputs read: encoders trained with another head come without it."""


@final
class TorchEager(Runtime):
    """``from_pretrained``, then the model's own forward."""

    name = "torch-eager"
    title = "stock transformers, eager"
    loads = Fact.TRANSFORMERS

    def prepared(
        self, artifact: Artifact, task: Task, folder: Path, *, trust_remote_code: bool = False
    ) -> Path:
        """See `Runtime.prepared`: it loads what is there."""
        return artifact.path

    def load(self, artifact: Artifact, task: Task, placement: Placement) -> Session:
        """See `Runtime.load`."""
        model, facts = load_model(artifact, task, placement)
        return TorchSession(model, task, facts)


def load_model(artifact: Artifact, task: Task, placement: Placement) -> tuple[Any, dict[str, Any]]:
    """The model in evaluation mode on its device, dense also where it is stored compressed; and what of it
    is worth a record.

    Raises:
        Unavailable: stock transformers cannot run this artifact here, and why.
        ModelError: the artifact is damaged.
    """
    if Fact.TRANSFORMERS not in artifact.facts:
        held = " and ".join(MEANING[fact] for fact in sorted(artifact.facts))
        raise Unavailable(f"{artifact.path.name} is no transformers model, it holds {held}")
    device = chosen_device(placement.device)
    stored = loaded_dtype(artifact)
    dtype = stored if placement.dtype == "auto" else getattr(torch, placement.dtype)
    quantization = artifact.config.get("quantization_config")
    facts: dict[str, Any] = {}
    arguments: dict[str, Any] = {"dtype": dtype}
    layered = False
    if quantization is not None:
        method = quantization.get("quant_method")
        if method == "bitsandbytes":
            return _with_bitsandbytes(artifact, task, placement, dtype)
        if method != "compressed-tensors":
            raise Unavailable(f"torch-eager does not run '{method}' models")
        facts["runs"] = "dense, dequantized while loading"
        inputs = quantizes_inputs(quantization)
        if inputs:
            facts["runs"] += ", inputs rounded in front of every layer"
            _check_not_dropped(artifact, quantization)
        layered = inputs or len(_schemes(quantization)) > 1
        if layered:
            # transformers' own dequantization takes one scheme for all layers and forgets about inputs; the
            # compressed layout knows each layer's, and is decompressed below.
            arguments["dtype"] = stored
        else:
            arguments["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = _from_pretrained(artifact, task, arguments, trust_remote_code=placement.trust_remote_code)
    if layered:
        compressor: ModelCompressor = model.hf_quantizer.compressor
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            compressor.decompress_model(model)
    return _placed(model, device, dtype).eval(), facts


def _with_bitsandbytes(
    artifact: Artifact, task: Task, placement: Placement, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """A model on the kernels of bitsandbytes, which put it on its device while it is loaded."""
    if find_spec("bitsandbytes") is None:
        raise Unavailable("models of bitsandbytes need the extra compress-models[bitsandbytes]")
    arguments = {"dtype": dtype, "device_map": {"": chosen_device(placement.device)}}
    model = _from_pretrained(artifact, task, arguments, trust_remote_code=placement.trust_remote_code)
    return model.eval(), {"runs": "packed, by the kernels of bitsandbytes"}


def _schemes(quantization: Mapping[str, Any]) -> set[str]:
    groups = quantization.get("config_groups") or {}
    return {json.dumps(group.get("weights"), sort_keys=True) for group in groups.values()}


def _placed(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model on a device in a dtype, but for the scales of whole tensors, which are float32 everywhere."""
    whole = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith("_global_scale")
    }
    model = model.to(device=device, dtype=dtype)
    for name, scale in whole.items():
        model.get_parameter(name).data = scale.to(device)
    return model


def _check_not_dropped(artifact: Artifact, quantization: Mapping[str, Any]) -> None:
    """Refuse a configuration with which transformers would leave inputs as they are, without a word."""
    if quantization.get("dequantize") or quantization.get("run_compressed") is False:
        raise Unavailable(
            f"{artifact.path.name} says that inputs are quantized, and also that it is to be dequantized "
            "while it is loaded, after which they would not be"
        )


def _from_pretrained(
    artifact: Artifact, task: Task, arguments: Mapping[str, Any], *, trust_remote_code: bool
) -> Any:
    try:
        with quiet(), warnings.catch_warnings():
            # The folder's own quantization is meant; only how to load it is said.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model, found = task.model_class().from_pretrained(
                artifact.path,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                **arguments,
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"transformers cannot load {artifact.path.name}: {error}") from error
    missing = [name for name in sorted(found["missing_keys"]) if _UNREAD not in name.split(".")]
    if missing or found["mismatched_keys"]:
        first = missing[0] if missing else str(sorted(map(str, found["mismatched_keys"]))[0])
        raise ModelError(
            f"{artifact.path.name}: {len(missing) + len(found['mismatched_keys'])} weights are missing or of "
            f"another shape and would be random, first: {first}",
            "is the task right, and the download complete?",
        )
    return model
