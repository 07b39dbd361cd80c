"""Running a graph in ONNX Runtime, with inputs and outputs bound in place.

Keys and values stay where ONNX Runtime put them: what one step gave out is bound as the next step's input,
and nothing of it is copied to or from numpy. https://onnxruntime.ai/docs/api/python/api_summary.html
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch

from compress.core.errors import EnvironmentFault, ModelError
from compress.core.run import Device
from compress.graph import FACTS_KEY, require_packages

_PAST = re.compile(r"^past_key_values\.(\d+)\.(key|value)$")
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
}
_CUDA: Final = "CUDAExecutionProvider"
_CPU: Final = "CPUExecutionProvider"


@dataclass(frozen=True)
class Cache:
    """Keys and values of the past.

    Attributes:
        values: ONNX Runtime's own tensors ``[batch, heads, length, width]``, in the order of the inputs.
        length: tokens that they hold.
    """

    values: Sequence[Any]
    length: int


def providers_for(device: Device) -> list[Any]:
    """ONNX Runtime's execution providers for a device, the preferred one first.

    Raises:
        EnvironmentFault: the package is missing, or has none for the device.
    """
    require_packages()
    import onnxruntime

    if device == "cpu":
        return [_CPU]
    if _CUDA not in onnxruntime.get_available_providers():
        raise EnvironmentFault(
            f"this onnxruntime has no {_CUDA}", "install 'compress-models[onnx-gpu]' in place of [onnx]"
        )
    return [_CUDA, _CPU]


@final
class Graph:
    """A graph ready to run.

    Args:
        path: the ``.onnx`` file; weights beside it are found by ONNX Runtime.
        device: where it runs.
        threads: of one operation; by default as many as torch has.

    Raises:
        EnvironmentFault: ONNX Runtime cannot run on the device.
        ModelError: the file is no graph that ONNX Runtime can load.
    """

    def __init__(self, path: Path, *, device: Device = "cpu", threads: int | None = None) -> None:
        wanted = providers_for(device)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Threads that go on spinning when a pass is over take the processor from whoever comes next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Its remarks on names and unused initialisers are not for the reader of a report.
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        except Exception as error:
            raise ModelError(
                f"ONNX Runtime cannot load {path}: {error}", "make the artifact again"
            ) from error
        self.providers: list[str] = list(self._session.get_providers())
        if device == "cuda" and self.providers[0] != _CUDA:
            raise EnvironmentFault(
                f"ONNX Runtime could not start {_CUDA}", "do its CUDA and cuDNN libraries fit this machine?"
            )
        self.device = torch.device(device)
        self._inputs = {spec.name: spec for spec in self._session.get_inputs()}
        self._outputs = {spec.name: spec for spec in self._session.get_outputs()}
        self._past = [name for name in self._inputs if _PAST.match(name)]
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        self._main = next(name for name in self._outputs if name not in self._present)
        self._buffers: dict[str, torch.Tensor] = {}
        unknown = self._inputs.keys() - {*self._past, "input_ids", "attention_mask", "position_ids"}
        if unknown - {"token_type_ids"} or "input_ids" not in self._inputs:
            raise ModelError(
                f"{path} takes {', '.join(sorted(self._inputs))}",
                "a graph of a text model takes input_ids, attention_mask, position_ids and past_key_values",
            )

    @property
    def caches(self) -> bool:
        """Whether the graph takes and gives keys and values."""
        return bool(self._past)

    @property
    def facts(self) -> dict[str, Any]:
        """What the graph says of itself: ``weight_bytes``, ``step_bytes`` and ``products`` by operator.

        Nothing where it was made by somebody else. Said by the file, because counting would mean to read
        it once more than serving it takes.
        """
        said = self._session.get_modelmeta().custom_metadata_map.get(FACTS_KEY)
        facts: dict[str, Any] = json.loads(said) if said else {}
        return facts

    @property
    def dtype(self) -> torch.dtype:
        """Of the graph's floats."""
        return _DTYPES[self._outputs[self._main].type]

    def run(
        self,
        tokens: torch.Tensor,
        past: Cache | None = None,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """One pass over new tokens.

        Args:
            tokens: int64 ``[batch, length]``.
            past: what an earlier pass gave; none is an empty past.
            mask: int64 ``[batch, past + length]``; by default every token counts.
            positions: int64 ``[batch, length]``; by default they follow the past.
            segments: token types, int64 ``[batch, length]``; by default all of the first text.

        Returns:
            The graph's main output, on its device and in its dtype, and the past for the next pass.
        """
        batch, length = tokens.shape
        past = past if past is not None else self._empty(batch)
        total = past.length + length
        given = {
            "input_ids": tokens,
            "attention_mask": self._ones(batch, total) if mask is None else mask,
            "position_ids": self._following(batch, past.length, length) if positions is None else positions,
            "token_type_ids": torch.zeros_like(tokens) if segments is None else segments,
        }
        binding = self._session.io_binding()
        # Bound by address: they have to live until the pass is over.
        kept = [self._bind(binding, name, given[name]) for name in given if name in self._inputs]
        for name, value in zip(self._past, past.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        sizes = {"batch_size": batch, "sequence_length": length, "total_sequence_length": total}
        outputs = self._allocated(sizes)
        binding.bind_output(
            self._main,
            self.device.type,
            self.device.index or 0,
            _element_type(outputs.dtype),
            tuple(outputs.shape),
            outputs.data_ptr(),
        )
        for name in self._present:
            binding.bind_output(name, self.device.type, self.device.index or 0)
        if self.device.type == "cuda":
            # ONNX Runtime has a stream of its own.
            torch.cuda.current_stream(self.device).synchronize()
        self._session.run_with_iobinding(binding)
        if self.device.type == "cuda":
            binding.synchronize_outputs()
        del kept
        return outputs, Cache(binding.get_outputs()[1:], total)

    def _bind(self, binding: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # Integers are bound on the host: their part of the graph is computed there.
        held = tensor.to(device="cpu", dtype=_DTYPES[self._inputs[name].type]).contiguous()
        binding.bind_input(name, "cpu", 0, _element_type(held.dtype), tuple(held.shape), held.data_ptr())
        return held

    def _allocated(self, sizes: Mapping[str, int]) -> torch.Tensor:
        spec = self._outputs[self._main]
        shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
        return torch.empty(shape, dtype=_DTYPES[spec.type], device=self.device)

    def _empty(self, batch: int) -> Cache:
        import onnxruntime

        values = []
        for name in self._past:
            spec = self._inputs[name]
            shape = [batch, int(spec.shape[1]), 0, int(spec.shape[3])]
            values.append(
                onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    shape, _element_type(_DTYPES[spec.type]), self.device.type, self.device.index or 0
                )
            )
        return Cache(values, 0)

    def _ones(self, batch: int, total: int) -> torch.Tensor:
        """``[batch, total]`` out of a buffer that grows by doubling: a step of decoding allocates nothing."""
        held = self._buffers.get("ones")
        if held is None or held.numel() < batch * total:
            held = self._buffers["ones"] = torch.ones(2 * batch * total, dtype=torch.int64)
        return held[: batch * total].view(batch, total)

    def _following(self, batch: int, start: int, length: int) -> torch.Tensor:
        return torch.arange(start, start + length).expand(batch, length)


def _element_type(dtype: torch.dtype) -> Any:
    """numpy's type, by which ONNX Runtime is told the type of a buffer."""
    return torch.empty(0, dtype=dtype).numpy().dtype.type
