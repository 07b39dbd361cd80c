"""What vLLM asks of a quantized checkpoint: its releases, its fused layers, and the shapes of its kernels.

Facts of vLLM's own code and pull requests, each with its address; nothing is run. A release is the first one
published after the change was merged, or a later one where the two came within days of each other: on it and
on what follows the checkpoint loads. Kernels are those for NVIDIA's GPUs.

- Matrices that read one input are one layer there (queries, keys and values; gate and up), so they must be
  quantized alike: ``vllm/model_executor/layers/quantization/compressed_tensors/utils.py``.
- Its fastest kernel for integers beside 16-bit floats, Marlin, wants outputs divisible by 64 and inputs by
  128, in each part of a model that is split over several GPUs; groups of 32, 64 or 128, or whole rows; and
  zero points with 4 bits alone:
  ``vllm/model_executor/layers/quantization/utils/marlin_utils.py``. Newer releases pad what does not fit.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from compress.core.scheme import Scheme

Storage = Literal["compressed-tensors", "gptq", "gptq_v2", "awq"]
SPLITS: Final = (1, 2, 4, 8)
"""Numbers of GPUs that are looked at."""
GROUPS: Final = (32, 64, 128)
"""Groups that Marlin takes, besides whole rows."""
OUTPUTS: Final = 64
INPUTS: Final = 128
_CODE: Final = "https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/layers/quantization"
_PULL: Final = "https://github.com/vllm-project/vllm/pull"
_MARLIN: Final = f"{_CODE}/utils/marlin_utils.py"
_PACKED: Final = f"{_CODE}/compressed_tensors/schemes/compressed_tensors_wNa16.py"
_FUSED: Final = f"{_CODE}/compressed_tensors/utils.py"
_TOGETHER: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of matrices that vLLM makes one layer of."""
_SPLIT_BY_INPUT: Final = ("o_proj", "out_proj", "down_proj", "w2", "fc2", "dense_4h_to_h", "c_proj", "wo")
"""Names of matrices whose inputs are divided among GPUs; of the others it is the outputs."""


@dataclass(frozen=True)
class Served:
    """One quantized matrix as vLLM meets it.

    Attributes:
        name: its name on disk, without ``.weight``.
        rows: outputs.
        columns: inputs.
        scheme: how it is quantized.
        expert: whether it is one of several that a router chooses from.
        lookup: whether rows are looked up (an embedding) and not multiplied.
    """

    name: str
    rows: int
    columns: int
    scheme: Scheme
    expert: bool = False
    lookup: bool = False


@dataclass(frozen=True)
class Demand:
    """A release that something needs.

    Attributes:
        version: the release.
        what: needs it.
        source: where that is written.
    """

    version: str
    what: str
    source: str

    def __str__(self) -> str:
        return f"{self.version} for {self.what} ({self.source})"


@dataclass(frozen=True)
class Objection:
    """Why vLLM does not load a matrix.

    Attributes:
        name: of the matrix, or of the layer that it would be part of.
        reason: what is wrong with it.
        source: where the rule is written.
    """

    name: str
    reason: str
    source: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} ({self.source})"


@dataclass(frozen=True)
class Verdict:
    """What vLLM makes of a checkpoint.

    Attributes:
        demands: releases that it needs, the newest first.
        objections: why no release loads it; one for each matrix at most.
        splits: over how many GPUs its matrices can be divided into whole groups and, where they fit the
            kernel on one GPU, into parts that fit it too. Newer releases pad parts that do not.
        unknown: what nothing is known about here.
    """

    demands: tuple[Demand, ...]
    objections: tuple[Objection, ...]
    splits: tuple[int, ...]
    unknown: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether it loads, as far as is known."""
        return not self.objections and not self.unknown

    @property
    def least_version(self) -> str | None:
        """The first release that loads it; ``None`` where none is known."""
        return self.demands[0].version if self.holds and self.demands else None


def judge(
    matrices: Sequence[Served], floats: Collection[str], storage: Storage, *, rules: bool = False
) -> Verdict:
    """Hold the matrices of a checkpoint against vLLM's rules.

    Args:
        matrices: all that are quantized.
        floats: names of the matrices that are not, without ``.weight``.
        storage: how they are stored.
        rules: whether a GPTQ checkpoint has rules for single modules.
    """
    demands = [_RELEASES[storage]]
    if rules:
        demands.append(Demand("0.7.3", "rules for single modules of a GPTQ checkpoint", f"{_PULL}/7086"))
    objections: dict[str, Objection] = {}
    unknown: list[str] = []
    for matrix in matrices:
        asked, wrong = _alone(matrix, storage)
        demands += asked
        if isinstance(wrong, Objection):
            objections.setdefault(matrix.name, wrong)
        elif wrong is not None:
            unknown.append(wrong)
    layers = _fused(matrices, floats, objections)
    demands += _shaped(layers)
    splits = tuple(count for count in SPLITS if all(_divides(layer, count) for layer in layers))
    newest = {demand.version + demand.what: demand for demand in demands}
    ordered = sorted(newest.values(), key=lambda demand: _number(demand.version), reverse=True)
    return Verdict(tuple(ordered), tuple(objections.values()), splits, tuple(dict.fromkeys(unknown)))


_RELEASES: Final[Mapping[Storage, Demand]] = {
    "compressed-tensors": Demand("0.5.0", "compressed-tensors", f"{_PULL}/5037"),
    "gptq": Demand("0.2.6", "GPTQ checkpoints", f"{_PULL}/916"),
    "gptq_v2": Demand("0.11.1", "version 2 of GPTQ checkpoints", f"{_PULL}/26092"),
    "awq": Demand("0.2.0", "AWQ checkpoints", f"{_PULL}/1032"),
}


def _alone(matrix: Served, storage: Storage) -> tuple[list[Demand], Objection | str | None]:
    """What one matrix needs for its numbers, and why it cannot be, or what is not known."""
    scheme = matrix.scheme
    if storage != "compressed-tensors":
        return _of_checkpoint(matrix, storage)
    if not scheme.integers or scheme.activations != "none":
        return _with_inputs(matrix)
    if matrix.lookup:
        return [Demand("0.24.0", "embeddings of integers", f"{_PULL}/44340")], None
    if scheme.bits in (4, 8):
        pull = 5385 if scheme.bits == 4 else 5794
        demands = [Demand("0.5.1", f"{scheme.bits} bits beside 16-bit activations", f"{_PULL}/{pull}")]
    else:
        demands = [Demand("0.25.0", "other bits than 4 and 8, with the package humming", f"{_PULL}/46389")]
    demands += _of_experts(matrix)
    if not scheme.symmetric:
        if scheme.bits != 4:
            reason = f"zero points with {scheme.bits} bits; its kernels take them with 4 bits"
            return demands, Objection(matrix.name, reason, _MARLIN)
        demands.append(Demand("0.8.5", "zero points", f"{_PULL}/14211"))
    if matrix.expert and scheme.bits not in (4, 8):
        return demands, f"experts of {scheme.bits} bits"
    if scheme.bits in (4, 8) and scheme.group_size not in (None, *GROUPS):
        if scheme.group_size == 256 and scheme.bits == 4 and not matrix.expert:
            return [*demands, Demand("0.23.0", "groups of 256", f"{_PULL}/43731")], None
        reason = f"groups of {scheme.group_size}; its kernels take 32, 64, 128 or whole rows"
        return demands, Objection(matrix.name, reason, _MARLIN)
    return demands, None


def _of_experts(matrix: Served) -> list[Demand]:
    if not matrix.expert:
        return []
    if not matrix.scheme.symmetric:
        return [Demand("0.24.0", "experts with zero points", f"{_PULL}/44025")]
    if matrix.scheme.bits == 4:
        return [Demand("0.6.0", "experts of 4 bits", f"{_PULL}/7766")]
    return [Demand("0.8.5", "experts of 8 bits", f"{_PULL}/16038")] if matrix.scheme.bits == 8 else []


def _with_inputs(matrix: Served) -> tuple[list[Demand], Objection | str | None]:
    """Schemes that round inputs too, and small floats."""
    scheme = matrix.scheme
    if scheme.format == "fp8":
        source = "https://docs.vllm.ai/en/v0.6.0/quantization/fp8.html"
        return [Demand("0.6.0", "8-bit floats", source)], None
    if scheme.format == "nvfp4":
        pull = 17914 if scheme.activations == "none" else 18312
        demands = [Demand("0.10.0", "nvfp4", f"{_PULL}/{pull}")]
        return (
            demands,
            "experts of nvfp4 without quantized inputs" if matrix.expert and pull == 17914 else None,
        )
    if scheme.format == "mxfp4":
        return [], "mxfp4 in compressed-tensors"
    if scheme.bits != 8 or scheme.group_size is not None or not scheme.symmetric:
        reason = f"{scheme}; integers beside quantized inputs are 8 bits, symmetric, one scale a row"
        return [], Objection(matrix.name, reason, f"{_CODE}/compressed_tensors/compressed_tensors.py")
    source = "https://docs.vllm.ai/en/v0.6.0/quantization/int8.html"
    return [Demand("0.6.0", "8-bit integers beside 8-bit activations", source)], None


def _of_checkpoint(matrix: Served, storage: Storage) -> tuple[list[Demand], Objection | str | None]:
    """GPTQ and AWQ."""
    scheme = matrix.scheme
    if matrix.expert and (scheme.bits not in (4, 8) or storage != "gptq"):
        return [], f"experts of {scheme.bits} bits in {storage}"
    if scheme.bits == 4 or storage == "awq":
        return [], None
    source = "https://github.com/vllm-project/vllm/issues/3261"
    return [Demand("0.3.3", f"GPTQ checkpoints of {scheme.bits} bits", source)], None


def _fused(
    matrices: Sequence[Served], floats: Collection[str], objections: dict[str, Objection]
) -> list[list[Served]]:
    """Matrices by the layer that vLLM makes of them; what is not alike is objected to."""
    by_name = {matrix.name: matrix for matrix in matrices}
    layers: list[list[Served]] = []
    done: set[str] = set()
    for name in by_name:
        if name in done:
            continue
        parent, _, leaf = name.rpartition(".")
        names = next((names for names in _TOGETHER if leaf in names), (leaf,))
        family = [f"{parent}.{other}" if parent else other for other in names]
        layer = [by_name[other] for other in family if other in by_name]
        done |= {entry.name for entry in layer}
        layers.append(layer)
        # In words: the range of integers and the scale of a tensor are not the loader's matter.
        schemes = dict.fromkeys(str(entry.scheme) for entry in layer)
        if any(other in floats for other in family):
            schemes["floats"] = None
        if len(schemes) > 1:
            whole = f"{parent}.({'|'.join(names)})"
            reason = f"they are one layer there and have {' and '.join(schemes)}"
            objections.setdefault(whole, Objection(whole, reason, _FUSED))
    _alike_experts(matrices, objections)
    return layers


def _alike_experts(matrices: Sequence[Served], objections: dict[str, Objection]) -> None:
    """All experts of a layer are one operation."""
    found: dict[str, dict[str, None]] = {}
    for matrix in matrices:
        if matrix.expert:
            found.setdefault(matrix.name.rpartition(".experts.")[0], {})[str(matrix.scheme)] = None
    for parent, schemes in found.items():
        if len(schemes) > 1:
            name = f"{parent}.experts"
            reason = f"all experts are one layer there and have {' and '.join(schemes)}"
            objections.setdefault(name, Objection(name, reason, _FUSED))


def _kernel(layer: Sequence[Served]) -> bool:
    """Whether a layer is one of integers beside 16-bit floats, which the shapes of Marlin matter to."""
    scheme = layer[0].scheme
    return scheme.integers and scheme.activations == "none" and not layer[0].lookup


def _shaped(layers: Sequence[Sequence[Served]]) -> list[Demand]:
    """Releases that pad, where a matrix on one GPU is not one that Marlin takes as it is."""
    demands = []
    for layer in layers:
        rows, columns = sum(entry.rows for entry in layer), layer[0].columns
        if not _kernel(layer) or layer[0].scheme.bits not in (4, 8) or _fits(rows, columns):
            continue
        what = f"{rows} x {columns}, which is padded ({layer[0].name})"
        if layer[0].expert:
            demands.append(Demand("0.25.0", what, f"{_PULL}/45703"))
        elif layer[0].scheme.bits == 4:
            demands.append(
                Demand("0.23.0", f"{rows} x {columns}, slowly ({layer[0].name})", f"{_PULL}/43731")
            )
        else:
            demands.append(Demand("0.25.0", what, f"{_PULL}/45295"))
    # One example says it for all.
    return list({(demand.version, demand.source): demand for demand in reversed(demands)}.values())


def _fits(rows: int, columns: int) -> bool:
    return rows % OUTPUTS == 0 and columns % INPUTS == 0


def _divides(layer: Sequence[Served], count: int) -> bool:
    """Whether a layer can be divided among so many GPUs: whole parts, whole groups, whole tiles."""
    if count == 1:
        return True
    leaf = layer[0].name.rpartition(".")[2]
    columns, group = layer[0].columns, layer[0].scheme.group_size or 1
    rows = [entry.rows for entry in layer]
    if leaf in _SPLIT_BY_INPUT:
        if columns % (count * group):
            return False
        columns //= count
    else:
        if any(size % count for size in rows):
            return False
        rows = [size // count for size in rows]
    whole = _fits(sum(entry.rows for entry in layer), layer[0].columns)
    return not _kernel(layer) or not whole or _fits(sum(rows), columns)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
