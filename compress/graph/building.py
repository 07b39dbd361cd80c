"""The whole way from an artifact to a folder with a graph that was held against it."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from compress.core.artifact import Artifact
from compress.core.errors import VerificationError
from compress.core.events import SILENT, Reporter
from compress.formats.matmul_nbits import OPERATOR, Packed, unpack
from compress.graph import DATA_FILE, FACTS_KEY, GRAPH_FILE, parity, require_packages
from compress.graph.linear import replace
from compress.graph.loading import Loaded, load
from compress.graph.running import Graph
from compress.graph.tracing import OPSET, sample_cache, trace
from compress.models.tasks import Task
from compress.numerics.affine import Quantized

if TYPE_CHECKING:
    import onnx_ir

Precision = Literal["float32", "float16"]
INLINE_LIMIT: Final = 1_500_000_000
"""Bytes of weights up to which they lie in the graph's own file; protobuf ends at 2 GiB."""
_EXACT_FILE: Final = ".exact.onnx"


@dataclass(frozen=True)
class Meant:
    """What a graph has to compute.

    Attributes:
        cases: what torch says.
        matrices: the integers of the layers that are multiplied as integers, by module.
        dense: quantized layers that are multiplied as floats, with the reason.
        precision: of the graph's floats.
        accuracy_level: of its products with integers.
    """

    cases: list[parity.Case]
    matrices: Mapping[str, Quantized]
    dense: Mapping[str, str]
    precision: Precision = "float32"
    accuracy_level: int = 4


def export(
    source: Artifact,
    task: Task,
    folder: Path,
    *,
    precision: Precision = "float32",
    accuracy_level: int = 4,
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Write a graph of an artifact, with everything else that the artifact's folder carries.

    Args:
        source: a transformers artifact, of floats or of integers in compressed-tensors.
        task: what it does.
        folder: an existing folder, which gets the files.
        precision: of the graph's floats.
        accuracy_level: of ``MatMulNBits``: 0 multiplies floats, 4 rounds the inputs to 8 bits.
        trust_remote_code: whether code inside the model folder may run.
        reporter: who is told what happens.

    Returns:
        What was decided and measured: opset, layers by operator, parity.

    Raises:
        PlanError: the model cannot be exported.
        VerificationError: the graph does not compute what the model does; no graph is left in the folder.
    """
    require_packages()
    with reporter.progress(f"{source.path.name} to ONNX", 2, "step") as advance:
        reporter.event("export.build", source=str(source.path), target=str(folder))
        meant = build(source, task, folder, precision, accuracy_level, trust_remote_code=trust_remote_code)
        if meant.dense:
            name, reason = next(iter(sorted(meant.dense.items())))
            reporter.message(
                f"{len(meant.dense)} quantized layers stay floats in the graph: {name} ({reason})"
            )
        advance(1)
        reporter.event("export.check")
        measured = check_graph(folder, meant)
        advance(1)
    _carry(source, folder)
    return {
        "task": task.name,
        "opset": OPSET,
        "precision": precision,
        "integer_layers": len(meant.matrices),
        "dense_layers": dict(sorted(meant.dense.items())),
        "parity": measured,
    }


def build(
    source: Artifact,
    task: Task,
    folder: Path,
    precision: Precision = "float32",
    accuracy_level: int = 4,
    *,
    trust_remote_code: bool = False,
) -> Meant:
    """Write the graph alone, unchecked; see `export`.

    Returns:
        What `check_graph` holds it against.
    """
    loaded = load(source, task, trust_remote_code=trust_remote_code)
    # Before the weights of the model are replaced and cast.
    cases = parity.reference(loaded.model, task)
    _write(_traced(loaded, task, precision, accuracy_level), folder)
    return Meant(cases, loaded.matrices, loaded.dense, precision, accuracy_level)


def check_graph(folder: Path, meant: Meant) -> dict[str, Any]:
    """Hold the graph in a folder against what it has to compute; remove it where it does not.

    Integers: every operator's operands dequantize to exactly the weights that were meant; the graph with
    exact products is held to a small bound; and the graph as it is, whose products may round their
    inputs, to a looser one.

    Returns:
        What was measured, by graph.

    Raises:
        VerificationError: something does not hold.
    """
    try:
        floats = parity.FLOAT16 if meant.precision == "float16" else parity.FLOAT32
        if not meant.matrices:
            return {"graph": _measured(folder / GRAPH_FILE, meant, floats, "the graph")}
        check_integers(folder / GRAPH_FILE, meant)
        exact = floats if meant.precision == "float16" else parity.INTEGER
        document: dict[str, Any] = {"weights": "exact"}
        if meant.accuracy_level != 0:
            with_level(folder / GRAPH_FILE, folder / _EXACT_FILE, 0)
            what = "the graph with exact products"
            document["exact_products"] = _measured(folder / _EXACT_FILE, meant, exact, what)
            bounds = parity.INT8_ACTIVATIONS
        else:
            bounds = exact
        document["graph"] = _measured(folder / GRAPH_FILE, meant, bounds, "the graph")
        return document
    except VerificationError:
        (folder / GRAPH_FILE).unlink()
        (folder / DATA_FILE).unlink(missing_ok=True)
        raise
    finally:
        (folder / _EXACT_FILE).unlink(missing_ok=True)


def _measured(path: Path, meant: Meant, bounds: parity.Bounds, what: str) -> dict[str, Any]:
    found = parity.measure(Graph(path), meant.cases, bounds)
    parity.check(found, bounds, what)
    return found.document(bounds)


def check_integers(path: Path, meant: Meant) -> None:
    """Hold the operands of every product with integers against the weights that were meant, exactly.

    Raises:
        VerificationError: a weight differs, or a layer has no operator.
    """
    import onnx_ir

    dtype = getattr(torch, meant.precision)
    graph = onnx_ir.load(path).graph
    held = set()
    for node in graph:
        if node.op_type != OPERATOR:
            continue
        name = str(node.name).partition("#")[0]
        matrix = meant.matrices.get(name)
        if matrix is None:
            raise VerificationError(f"the graph multiplies with integers in '{name}', where none were meant")
        held.add(name)
        expected = Quantized(matrix.q, matrix.scale.to(dtype).double(), matrix.zero, matrix.scheme)
        found = unpack(_operands(node))
        if found.shape != matrix.shape or not torch.equal(found, expected.dequantize()):
            raise VerificationError(f"the graph's weights of '{name}' are not those of the artifact")
    lost = sorted(meant.matrices.keys() - held)
    if lost:
        raise VerificationError(f"{len(lost)} layers are not multiplied as integers, first: '{lost[0]}'")


def with_level(source: Path, target: Path, level: int) -> None:
    """Write a graph again, its products with integers at another accuracy level.

    Args:
        target: beside ``source``, whose external data it shares.
    """
    import onnx_ir

    model = onnx_ir.load(source)
    for node in model.graph:
        if node.op_type == OPERATOR:
            node.attributes["accuracy_level"] = onnx_ir.AttrInt64("accuracy_level", level)
    onnx_ir.save(model, target)


def _operands(node: "onnx_ir.Node") -> Packed:
    tensors = []
    for value in node.inputs[1:]:
        if value is None or value.const_value is None:
            raise VerificationError(f"an operand of '{node.name}' is no constant")
        tensors.append(torch.from_numpy(value.const_value.numpy().copy()))
    sizes = {name: int(node.attributes[name].as_int()) for name in ("N", "K", "bits", "block_size")}
    zeros = tensors[2] if len(tensors) > 2 else None
    rows, columns, bits, block = sizes.values()
    return Packed(tensors[0], tensors[1].reshape(rows, -1), zeros, rows, columns, bits, block)


def _traced(loaded: Loaded, task: Task, precision: Precision, accuracy_level: int) -> "onnx_ir.Model":
    """The graph of a loaded model, whose weights are replaced and cast on the way."""
    dtype = getattr(torch, precision)
    cache = sample_cache(loaded.model) if task.generates else None
    replace(loaded.model, loaded.matrices, dtype, accuracy_level)
    return trace(loaded.model.to(dtype), task, cache)


def _write(model: "onnx_ir.Model", folder: Path) -> None:
    """Write a graph, large weights into a file of their own."""
    import onnx_ir

    facts = _facts(model)
    model.metadata_props[FACTS_KEY] = json.dumps(facts, sort_keys=True)
    external = DATA_FILE if facts["weight_bytes"] > INLINE_LIMIT else None
    onnx_ir.save(model, folder / GRAPH_FILE, external_data=external)


def _facts(model: "onnx_ir.Model") -> dict[str, Any]:
    """What a graph holds: bytes of constants, those that a step reads whole, products by operator.

    Of a constant that is only looked up in, an embedding, a step reads a few rows.
    """
    sizes, read = 0, 0
    for value in model.graph.initializers.values():
        size = value.const_value.nbytes if value.const_value is not None else 0
        sizes += size
        looked_up = all(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses())
        read += 0 if looked_up else size
    products = Counter(node.op_type for node in model.graph if node.op_type in (OPERATOR, "MatMul", "Gemm"))
    return {"weight_bytes": sizes, "step_bytes": read, "products": dict(sorted(products.items()))}


def _carry(source: Artifact, folder: Path) -> None:
    """Copy everything that is no weight; the configuration no longer speaks of packed weights."""
    for file in source.companions:
        copy = folder / file.relative_to(source.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
