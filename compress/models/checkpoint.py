"""A model's weights on disk, brought into its modules and back, one part at a time.

Names on disk are not names in the module: transformers converts while it loads (experts are fused,
layers renamed). This file is the only one that knows how, and it asks transformers: the same mapping,
the same operations and their reverse, applied to the part of the model that is needed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from compress.core.artifact import Artifact
from compress.core.errors import ModelError
from compress.models.headers import Tensor, read_model
from compress.models.load import quiet


class Checkpoint:
    """The weight files of an artifact beside the skeleton of its model.

    Args:
        source: the artifact; a tensor is read when it is asked for.
        model: a skeleton (`compress.models.load.skeleton`), possibly prepared by a quantizer.
        quantizer: transformers' quantizer of a compressed artifact, or none.
    """

    def __init__(self, source: Artifact, model: Any, quantizer: Any = None) -> None:
        self.source = source
        self.model = model
        self._quantizer = quantizer
        self._entries = read_model(source.path)
        # transformers declares the mapping more widely than what its own loader takes.
        self._mapping: list[Any] = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self.target = self._targets(self._mapping, self.names)
        self.passed_over = self._passed_over()
        # The way back is that of float weights; a quantizer's own operations have none. Renaming the float
        # names marks the rules that this checkpoint needs, as transformers does while it loads.
        self._back = get_model_conversion_mapping(model)
        self._targets(self._back, [name.removesuffix("_packed") for name in self.names])

    def _targets(self, mapping: list[Any], names: Iterable[str]) -> dict[str, str]:
        """Name on disk to the (first) name in the module."""
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        prefix = self.model.base_model_prefix
        targets = {}
        for name in names:
            renamed, _ = rename_source_key(name, renamings, converters, prefix, known)
            if renamed not in known and name in known:
                renamed = name
            targets[name] = renamed
        return targets

    def _passed_over(self) -> frozenset[str]:
        """Names on disk that transformers leaves unread: buffers that older versions used to store, and the
        head of a model of which the body alone is read."""
        known = self.model.state_dict()
        strange = {target for target in self.target.values() if target not in known}
        report = LoadStateDictInfo(
            missing_keys=set(),
            unexpected_keys=set(strange),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        self.model._adjust_missing_and_unexpected_keys(report)
        left = strange - report.unexpected_keys
        body = f"{self.model.base_model_prefix}."
        if self.model.base_model is self.model and any(name.startswith(body) for name in self.names):
            left |= {target for target in strange if not target.startswith(body)}
        return frozenset(name for name, target in self.target.items() if target in left)

    @property
    def names(self) -> list[str]:
        """All names on disk, sorted."""
        return sorted(self._entries)

    def names_of(self, module: str) -> list[str]:
        """The names on disk of everything inside one module, sorted."""
        prefix = f"{module}."
        return [name for name in self.names if self.target[name].startswith(prefix)]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as it is on disk, in memory of its own."""
        return _Stored(self._entries[name])[...]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor on disk, from the header."""
        return _Stored(self._entries[name]).dtype

    def load(self, names: Iterable[str], device: torch.device) -> None:
        """Bring tensors from disk into their modules.

        Raises:
            ModelError: a tensor belongs nowhere, has another shape than its module, or cannot be converted.
        """
        part = {name: _Stored(self._entries[name]) for name in names if name not in self.passed_over}
        config = LoadStateDictConfig(
            dtype=self.model.dtype,
            weight_mapping=self._mapping,
            hf_quantizer=self._quantizer,
            device_map={"": device},
        )
        with quiet():
            found, _ = convert_and_load_state_dict_in_model(self.model, part, config, None)
        problems = {
            "unexpected": sorted(found.unexpected_keys),
            "of another shape": sorted(str(entry) for entry in found.mismatched_keys),
            "not convertible": sorted(str(entry) for entry in found.conversion_errors),
            "failed": [str(entry) for entry in found.error_msgs],
        }
        for what, entries in problems.items():
            if entries:
                raise ModelError(
                    f"{self.source.path}: {len(entries)} weights are {what}, first: {entries[0]}",
                    "do config.json and the weight files belong together?",
                )

    def load_module(self, module: str, device: torch.device) -> None:
        """Bring one module from disk.

        Raises:
            ModelError: as `load`; or a parameter of the module is in no file.
        """
        self.load(self.names_of(module), device)
        self.require_filled(module)

    def require_filled(self, module: str) -> None:
        """Refuse a module with a parameter that no tensor on disk fills.

        Raises:
            ModelError: naming the first such parameter.
        """
        empty = [
            f"{module}.{name}".removeprefix(".")
            for name, parameter in self.model.get_submodule(module).named_parameters()
            if parameter.device.type == "meta"
        ]
        if empty:
            raise ModelError(
                f"{self.source.path}: {len(empty)} weights are missing, first: {empty[0]}",
                "is the download complete, and is the task right?",
            )

    def release(self, module: str) -> None:
        """Drop the parameters of one module: back to the meta device."""
        prefix = f"{module}." if module else ""
        for name, parameter in list(self.model.get_submodule(module).named_parameters()):
            if parameter.device.type != "meta":
                set_module_tensor_to_device(self.model, prefix + name, "meta")

    def to_disk(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by their names in the module, renamed and split as they lie on disk.

        Works for anything whose leading dimensions are those of the weight (experts, rows): integers,
        scales and zero points are split just as the weight itself.
        """
        # transformers reverses what the last load used; a part of the model may not have needed every rule.
        self.model._weight_conversions = [entry for entry in self._back if entry.was_used()]
        with quiet():
            reverted: dict[str, torch.Tensor] = revert_weight_conversion(self.model, dict(tensors))
        return reverted


class _Stored:
    """A tensor on disk that is read when it is indexed: what transformers' loader takes for a slice.

    The safetensors library maps files into memory. A mapped weight that is changed in place turns into
    private pages that live as long as the mapping, so a sweep over a large model would end up holding all
    of it; reading each tensor into memory of its own lets a finished block go.
    """

    def __init__(self, entry: Tensor) -> None:
        self._entry = entry

    @property
    def dtype(self) -> torch.dtype:
        if self._entry.dtype not in DTYPES:
            raise ModelError(
                f"{self._entry.file}: '{self._entry.name}' is {self._entry.dtype}, which torch does not know",
                f"known: {', '.join(DTYPES)}",
            )
        return DTYPES[self._entry.dtype]

    def get_dtype(self) -> str:
        return self._entry.dtype

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        raw = torch.empty(self._entry.end - self._entry.start, dtype=torch.uint8)
        if raw.numel():
            with self._entry.file.open("rb", buffering=0) as stream:
                stream.seek(self._entry.start)
                view, filled = memoryview(raw.numpy().data), 0
                while filled < len(view):
                    count = stream.readinto(view[filled:])
                    if not count:
                        raise ModelError(f"{self._entry.file} ended while it was read", "was it replaced?")
                    filled += count
        return raw.view(self.dtype).reshape(self._entry.shape)[index]


DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's words for types that torch has too."""
