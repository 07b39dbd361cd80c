"""What the exports to other formats share: which matrices are integers, and how a model is rewritten.

Everything that can be refused is refused from configuration and headers. Integers then move matrix by matrix
and shard by shard; everything else is copied byte for byte.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compress.core.errors import ModelError, PlanError
from compress.core.passes import Meant, Needs, Outcome

if TYPE_CHECKING:
    import torch

    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.core.scheme import Scheme
    from compress.formats.packed import Layout, PackedFormat
    from compress.formats.weight_format import Held
    from compress.models.checkpoint import Checkpoint
    from compress.numerics.affine import Quantized

IMPORT_BYTES: Final = 700 * 2**20
"""Python with torch and transformers, resident."""
_RATE: Final = 200e6
"""Bytes a second that are read, repacked, written and read again, on one core."""
_START: Final = "start from a model that a quantize pass made"


@dataclass(frozen=True)
class Layer:
    """One matrix that is stored as integers.

    Attributes:
        stem: its name on disk, without ``.weight``.
        module: the module that it is the weight of; the name on disk where transformers fuses it.
        kind: class of that module.
        expert: whether transformers fuses it with others.
        names: its tensors on disk, by local name.
        scheme: how it is quantized.
        rows: outputs.
        columns: inputs.
    """

    stem: str
    module: str
    kind: str
    expert: bool
    names: Mapping[str, str]
    scheme: "Scheme"
    rows: int
    columns: int

    @property
    def integers(self) -> str:
        """The tensor that holds its integers; the others of the new matrix go into the file of this one."""
        return next(
            self.names[local] for local in ("weight_packed", "qweight", "weight") if local in self.names
        )

    def held(self) -> "Held":
        """What a format is asked to hold."""
        from compress.formats.weight_format import Held

        return Held(self.module, self.kind, self.expert, self.rows, self.columns, self.scheme)


@dataclass(frozen=True)
class Survey:
    """An artifact as its headers and its configuration describe it.

    Attributes:
        source: the artifact.
        model: a skeleton.
        checkpoint: the weights beside it.
        layers: the matrices that are integers, in order of their names.
        kept: linear modules that are floats.
        read: one matrix from its tensors by local name, and its name on disk.
        left_out: tensors on disk that a reader of the source passes over and that are not copied.
    """

    source: "Artifact"
    model: Any
    checkpoint: "Checkpoint"
    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    read: "Callable[[Mapping[str, torch.Tensor], str], Quantized]"
    left_out: frozenset[str] = frozenset()

    def matrix(self, layer: Layer) -> "Quantized":
        """The integers of one layer, read from disk."""
        tensors = {local: self.checkpoint.tensor(name) for local, name in layer.names.items()}
        matrix = self.read(tensors, layer.stem)
        try:
            matrix.check_values()
        except ValueError as error:
            raise ModelError(f"'{layer.stem}': {error}", "make the artifact again") from error
        return matrix

    @property
    def floats(self) -> list[str]:
        """Tensors on disk that belong to no integer matrix, and that transformers reads."""
        taken = {name for layer in self.layers for name in layer.names.values()} | self.left_out
        return [
            name
            for name in self.checkpoint.names
            if name not in taken and name not in self.checkpoint.passed_over
        ]


def survey(source: "Artifact", run: "Run") -> Survey:
    """Look an artifact over without reading a weight.

    Raises:
        PlanError: it is stored in a way that does not convert, and why.
        ModelError: it is damaged.
    """
    from torch import nn

    from compress.formats.compressed_tensors import read_matrix
    from compress.models.checkpoint import Checkpoint
    from compress.models.integers import integer_matrices
    from compress.models.load import skeleton

    check_storage(source)
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    layers = tuple(
        _layer(stem, names, model, checkpoint) for stem, names in integer_matrices(checkpoint.names).items()
    )
    packed = {layer.module for layer in layers}
    kept = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in packed and not _is_head(model, module)
    )
    return Survey(source, model, checkpoint, layers, kept, read_matrix)


def _is_head(model: Any, module: Any) -> bool:
    """Whether a module is the output head, which every reader expects in floats unless it is told."""
    return module is model.get_output_embeddings()


def check_storage(source: "Artifact") -> None:
    """Refuse integers that are not weights alone, or are stored in another format.

    Raises:
        PlanError: what it is instead.
    """
    quantization = source.config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise PlanError(f"{source.path} is stored as '{method}', expected compressed-tensors", _START)
    for group in (quantization.get("config_groups") or {}).values():
        for part in ("input_activations", "output_activations"):
            if isinstance(group, dict) and group.get(part):
                raise PlanError(
                    f"{source.path} quantizes {part.replace('_', ' ')}, which the format does not hold",
                    "quantize the weights alone",
                )
    if quantization.get("kv_cache_scheme"):
        raise PlanError(f"{source.path} quantizes its cache, which the format does not hold", _START)


def _layer(stem: str, names: Mapping[str, str], model: Any, checkpoint: "Checkpoint") -> Layer:
    """One matrix from headers; of its tensors only the shape, two numbers, is read."""
    import torch

    from compress.formats.compressed_tensors import UnknownStorage, scheme_of
    from compress.models.integers import module_of

    headers = {
        local: checkpoint.tensor(name)
        if local == "weight_shape"
        else torch.empty(checkpoint.shape(name), dtype=checkpoint.dtype(name), device="meta")
        for local, name in names.items()
    }
    try:
        scheme, shape = scheme_of(headers, stem)
    except UnknownStorage as error:
        raise PlanError(f"{error.message}, which does not convert", _START) from error
    module = module_of(model, checkpoint, stem)
    kind = "expert" if module is None else type(model.get_submodule(module)).__name__
    return Layer(stem, module or stem, kind, module is None, dict(names), scheme, *shape)


def check(source: "Artifact", run: "Run", form: "PackedFormat") -> Needs:
    """Refuse what a format cannot hold, and predict the work.

    Raises:
        PlanError: naming the first layer that cannot be held.
    """
    found = survey(source, run)
    _refuse(found, form)
    packed = sum(form.encoded_bytes(layer.held(), 2) for layer in found.layers)
    copied = sum(size_of(found, name) for name in found.floats)
    return needs(found, packed + copied)


def needs(found: Survey, disk: int) -> Needs:
    """What a conversion takes that writes so many bytes: one matrix at a time, whatever the depth."""
    largest = max((layer.rows * layer.columns for layer in found.layers), default=0)
    longest = max((size_of(found, name) for name in found.floats), default=0)
    # Integers as int32 and int64 while they are packed and read back, and their values in float32.
    return Needs(disk, IMPORT_BYTES + max(28 * largest, 6 * longest), 0, 2.0 + disk / _RATE)


def size_of(found: Survey, name: str) -> int:
    """Bytes of one tensor on disk."""
    count = 1
    for size in found.checkpoint.shape(name):
        count *= size
    return count * found.checkpoint.dtype(name).itemsize


def _refuse(found: Survey, form: "PackedFormat") -> None:
    if not found.layers:
        raise PlanError(f"{found.source.path} holds no integer matrices", _START)
    for layer in found.layers:
        reason = form.refusal(layer.held())
        if reason is not None:
            raise PlanError(
                f"{layer.stem}: {reason}", "quantize it otherwise, or leave it in floats (--ignore)"
            )
    reason = form.refusal_together([layer.held() for layer in found.layers])
    if reason is not None:
        raise PlanError(f"{found.source.path}: {reason}", "quantize all layers alike")


def apply(source: "Artifact", target: Path, run: "Run", form: "PackedFormat") -> Outcome:
    """Write the model in another format: the same integers, scales and zero points.

    Returns:
        What was decided, and what every tensor must be: a converted matrix by its float32 value, every
        other tensor by its bytes.

    Raises:
        PlanError: a number that the format cannot hold, with the layer's name.
    """
    found = survey(source, run)
    _refuse(found, form)
    held = [layer.held() for layer in found.layers]
    config = form.configuration(held, found.kept, source.config)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    rewriting = Rewriting(
        found, run, form.name, lambda layer: form.layout(layer.held()), partial(_packed, form)
    )
    rewriting.write(target)
    carry(source, target)
    decisions = {
        "format": form.name,
        "matrices": len(found.layers),
        "schemes": sorted({str(layer.scheme) for layer in found.layers}),
        "kept": list(found.kept),
        "largest_scale_change": rewriting.shift,
    }
    return Outcome(decisions, dict(sorted(rewriting.meant.items())))


def _packed(form: "PackedFormat", layer: Layer, matrix: "Quantized") -> "Rewritten":
    """One matrix as a packed format stores it, and its value in float32."""
    from compress.formats.packed import largest_shift
    from compress.numerics.affine import Quantized

    tensors = form.encode(f"{layer.stem}.weight", matrix.parts(), layer.scheme)
    # The scales as they are stored: float16, which is what they were unless a person had them rounded.
    stored = tensors[f"{layer.stem}.scales"].T.float()
    value = Quantized(matrix.q, stored, matrix.zero, layer.scheme).dequantize()
    return Rewritten(tensors, value, largest_shift(matrix.scale, stored))


def carry(source: "Artifact", target: Path, but: str = "") -> None:
    """Copy everything that travels along: tokenizer, generation config, chat template, licence, card.

    Args:
        source: where it is.
        target: where it goes.
        but: the name of a file that speaks of the old format alone.
    """
    for file in source.companions:
        if file.name == but:
            continue
        copy = target / file.relative_to(source.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


@dataclass(frozen=True)
class Rewritten:
    """One matrix in its new form.

    Attributes:
        tensors: by full name.
        value: the float weight as a reader of the new form computes it.
        shift: the largest relative change of a scale.
    """

    tensors: "Mapping[str, torch.Tensor]"
    value: "torch.Tensor"
    shift: float = 0.0


class Rewriting:
    """One pass over the shards of an artifact: matrices in a new form, everything else byte for byte.

    Args:
        found: the artifact.
        run: who is told.
        name: of the new form.
        layout: the tensors of a matrix in it, by local name.
        rewrite: a matrix in it.

    Attributes:
        meant: what every tensor must be.
        shift: the largest relative change of a scale.
    """

    def __init__(
        self,
        found: Survey,
        run: "Run",
        name: str,
        layout: "Callable[[Layer], Layout]",
        rewrite: "Callable[[Layer, Quantized], Rewritten]",
    ) -> None:
        self.meant: dict[str, Meant] = {}
        self.shift = 0.0
        self._found, self._run, self._name = found, run, name
        self._layout, self._rewrite = layout, rewrite
        self._waiting: dict[str, torch.Tensor] = {}

    def write(self, target: Path) -> None:
        """Write every shard under its own name, and the index that ties them."""
        from compress.formats.shards import write_index, write_shard
        from compress.models.headers import SINGLE_FILE

        shards, checkpoint = self._shards(), self._found.checkpoint
        total, files = 0, {}
        with self._run.reporter.progress(
            f"{len(self._found.layers)} matrices to {self._name}", len(shards), "shard"
        ) as advance:
            for file, (owners, copied) in shards.items():
                layout, origin = {}, {}
                for layer in owners:
                    for local, entry in self._layout(layer).items():
                        layout[f"{layer.stem}.{local}"] = entry
                        origin[f"{layer.stem}.{local}"] = layer
                layout |= {name: (checkpoint.dtype(name), checkpoint.shape(name)) for name in copied}
                total += write_shard(
                    target / file,
                    layout,
                    partial(self._bring, origin=origin),
                    partial(self._written, file),
                )
                files[file] = sorted(layout)
                advance(1)
        if list(files) != [SINGLE_FILE]:
            write_index(target, files, total)

    def _shards(self) -> dict[str, tuple[list[Layer], list[str]]]:
        """For each weight file of the source: the layers whose integers lie there, and what is copied."""
        from compress.models.headers import read_model

        found = self._found
        where = {name: entry.file.name for name, entry in read_model(found.source.path).items()}
        shards: dict[str, tuple[list[Layer], list[str]]] = {file: ([], []) for file in sorted(where.values())}
        for layer in found.layers:
            shards[where[layer.integers]][0].append(layer)
        taken = {name for layer in found.layers for name in layer.names.values()} | found.left_out
        for name, file in where.items():
            if name not in taken:
                shards[file][1].append(name)
        return {file: shard for file, shard in shards.items() if any(shard)}

    def _written(self, file: str, tensor: str) -> None:
        self._run.reporter.event("shard.tensor", file=file, tensor=tensor)

    def _bring(self, name: str, origin: Mapping[str, Layer]) -> "torch.Tensor":
        """One tensor of the new shard; those of a matrix come together and wait for their turn."""
        from compress.numerics.fingerprint import fingerprint

        if name not in origin:
            tensor = self._found.checkpoint.tensor(name)
            self.meant[name] = Meant(fingerprint(tensor), False)
            return tensor
        if name not in self._waiting:
            layer = origin[name]
            rewritten = self._rewrite(layer, self._found.matrix(layer))
            self.shift = max(self.shift, rewritten.shift)
            self.meant[f"{layer.stem}.weight"] = Meant(fingerprint(rewritten.value), True)
            self._waiting |= rewritten.tensors
        return self._waiting.pop(name)
