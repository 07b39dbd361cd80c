"""From a model in memory to an ONNX graph: a thin layer over `transformers.exporters`.

A decoder becomes one graph for reading a prompt and for every step after it: keys and values of the past go
in and come out, and the past may be empty. Names are those that users of optimum and onnxruntime-genai
know: ``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values.N.key`` and ``.value`` in;
``logits``, ``present.N.key`` and ``.value`` out. Batch, length and length of the past are free.

The sample that is traced with is padded: where every position counts, the attention mask is dropped from
the traced graph as if it had no part in it, and padded batches are then silently wrong.
"""

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers.cache_utils import DynamicCache

from compress.core.errors import ModelError, PlanError, VerificationError
from compress.models.load import quiet
from compress.models.tasks import Task

if TYPE_CHECKING:
    import onnx_ir

OPSET: Final = 20
BATCH, LENGTH, PAST = 2, 3, 4
"""Sizes of the sample. All are above one, which the tracer would take for fixed, and all are different."""

_CACHE = re.compile(r"^(?:input\.|output\.)?past_key_values\.layers\.(\d+)\.(key|value)s$")
_AUTO = torch.export.Dim.AUTO


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters


def takes_segments(model: Any) -> bool:
    """Whether the model tells the first text of a pair from the second."""
    return takes(model, "token_type_ids") and (getattr(model.config, "type_vocab_size", 0) or 0) > 1


def pad_token(model: Any) -> int:
    """The token that fills up shorter sequences: 0 where the model names none, which the mask then hides."""
    named = getattr(model.config.get_text_config(), "pad_token_id", None)
    return int(named) if isinstance(named, int) and named >= 0 else 0


@torch.no_grad()
def sample_cache(model: Any) -> DynamicCache:
    """Keys and values of a past of `PAST` tokens, from a forward pass of a model that can compute.

    Raises:
        PlanError: the model keeps something else between steps than keys and values for each layer.
    """
    cache = DynamicCache()
    tokens = torch.full((BATCH, PAST), pad_token(model))
    try:
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise PlanError(f"{type(model).__name__} keeps no cache of keys and values: {error}") from error
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    if not keys or any(held is None or held.dim() != 4 or held.shape[2] != PAST for held in keys):
        raise PlanError(
            f"{type(model).__name__} keeps something else between steps than keys and values of every token",
            "only such decoders are exported",
        )
    return cache


def trace(model: Any, task: Task, cache: DynamicCache | None) -> "onnx_ir.Model":
    """The graph of a model.

    Args:
        model: in the dtype that the graph's floats shall have.
        task: decides what goes in and what comes out.
        cache: `sample_cache` of the model, for a task that generates.

    Raises:
        PlanError: the model's forward cannot be traced.
        VerificationError: an input or output was lost on the way.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    sample = _sample(model, cache)
    shapes = {
        name: [{0: _AUTO, 2: _AUTO} for _ in range(2 * len(value.layers))]
        if isinstance(value, DynamicCache)
        else {0: _AUTO, 1: _AUTO}
        for name, value in sample.items()
    }
    wanted = list(sample)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=OPSET)
    try:
        with _silence():
            graph: onnx_ir.Model = OnnxExporter().export(model, sample, config).program
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlanError(
            f"{type(model).__name__} cannot be traced: {first}",
            "does transformers.exporters support this architecture?",
        ) from error
    _rename(graph, task)
    _require(graph, wanted, task)
    _share_transposed(graph)
    _tidy(graph)
    return graph


def output_name(task: Task) -> str:
    """The graph's output by which two models are compared."""
    return "last_hidden_state" if task.name == "feature-extraction" else "logits"


def _sample(model: Any, cache: DynamicCache | None) -> dict[str, Any]:
    """Keyword arguments for one forward pass, the first sequence padded."""
    past = 0 if cache is None else PAST
    length = LENGTH if cache is not None else LENGTH + 2
    mask = torch.ones(BATCH, past + length, dtype=torch.int64)
    # A decoder's prompts are padded before they begin, an encoder's texts behind their end.
    mask[0, slice(0, 2) if cache is not None else slice(-2, None)] = 0
    pad = pad_token(model)
    tokens = torch.arange(BATCH * length).reshape(BATCH, length) % 3 + pad + 1
    tokens = torch.where(tokens < model.config.get_text_config().vocab_size, tokens, 0)
    sample: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if cache is None:
        sample["input_ids"] = tokens.masked_fill(mask == 0, pad)
        if takes_segments(model):
            sample["token_type_ids"] = torch.zeros_like(tokens)
    else:
        if takes(model, "position_ids"):
            sample["position_ids"] = positions(mask)[:, past:]
        sample["past_key_values"] = cache
    return sample


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions of tokens, int64 ``[batch, total]``: masked ones do not count, as `generate` has it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporters' progress, printed to standard output, and their remarks out of a command's own."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _rename(model: "onnx_ir.Model", task: Task) -> None:
    """Inputs and outputs by the names that users know; outputs that the task does not have are dropped."""
    graph = model.graph
    for value in graph.inputs:
        found = _CACHE.match(value.name or "")
        if found is not None:
            value.name = f"past_key_values.{found[1]}.{found[2]}"
    kept = []
    for value in graph.outputs:
        found = _CACHE.match(value.name or "")
        if found is not None and task.generates:
            value.name = f"present.{found[1]}.{found[2]}"
        elif value.name != output_name(task):
            continue
        kept.append(value)
    graph.outputs[:] = kept
    _name_products(model)


def _name_products(model: "onnx_ir.Model") -> None:
    """Products with a weight by the module that they come from, so that a person finds a layer again."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        operand = node.inputs[1] if node.op_type.startswith("MatMul") else None
        if operand is not None and str(operand.name) in model.graph.initializers and len(scopes) > 1:
            # Inner scopes name the operation; the last but one is the module, which may run twice.
            seen[scopes[-2]] += 1
            again = seen[scopes[-2]]
            node.name = scopes[-2] if again == 1 else f"{scopes[-2]}#{again}"


def _require(model: "onnx_ir.Model", wanted: list[str], task: Task) -> None:
    """Hold the graph's inputs and outputs against those that it was traced with."""
    present = [str(value.name) for value in model.graph.inputs]
    lost = [name for name in wanted if not any(n == name or n.startswith(f"{name}.") for n in present)]
    if lost:
        raise VerificationError(
            f"the traced graph lost its input {', '.join(lost)}, so it would compute something else",
            "this architecture cannot be exported with this version of transformers",
        )
    outputs = [str(value.name) for value in model.graph.outputs]
    if output_name(task) not in outputs:
        raise ModelError(f"the traced graph has no output '{output_name(task)}', it has {', '.join(outputs)}")


def _share_transposed(model: "onnx_ir.Model") -> None:
    """Store a matrix once of which a transposed copy was folded: a head that is tied to the embedding."""
    import numpy
    import onnx_ir

    graph = model.graph
    matrices = {
        value.name: value.const_value.numpy()
        for value in graph.initializers.values()
        if value.const_value is not None and len(value.const_value.shape) == 2
    }
    read = {str(node.inputs[0].name) for node in graph if node.op_type == "Gather" and node.inputs[0]}
    for node in list(graph):
        operand = node.inputs[1] if node.op_type == "MatMul" else None
        if operand is None or operand.name not in matrices:
            continue
        mine = matrices[operand.name]
        for name in read & matrices.keys():
            if matrices[name].shape == mine.shape[::-1] and numpy.array_equal(matrices[name].T, mine):
                transposed = onnx_ir.node(
                    "Transpose",
                    [graph.initializers[name]],
                    attributes={"perm": [1, 0]},
                    name=f"{node.name}.T",
                )
                graph.insert_before(node, transposed)
                node.replace_input_with(1, transposed.outputs[0])
                break


def _tidy(model: "onnx_ir.Model") -> None:
    """Drop what is unused, and the traces of where and how the graph was made; name the free dimensions."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    names = _dimensions(model)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = type(value.shape)([_named(size, names) for size in value.shape])
    ends = {id(value) for value in [*model.graph.inputs, *model.graph.outputs]}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in ends:
                # ONNX Runtime infers them; the tracer's names would contradict ours.
                value.shape, value.type = None, None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None
    model.graph.name = "main"


def _dimensions(model: "onnx_ir.Model") -> dict[str, str]:
    """The tracer's names of free dimensions to ours."""
    names: dict[str, str] = {}
    inputs = {str(value.name): value for value in model.graph.inputs}
    for name, axes in (
        ("input_ids", ("batch_size", "sequence_length")),
        ("past_key_values.0.key", ("batch_size", "", "past_sequence_length", "")),
        ("attention_mask", ("batch_size", _total(inputs))),
    ):
        value = inputs.get(name)
        if value is not None and value.shape is not None:
            for size, axis in zip(value.shape, axes, strict=True):
                if not isinstance(size, int):
                    names.setdefault(str(size), axis)
    return names


def _total(inputs: Collection[str]) -> str:
    """What an attention mask covers: the past as well, where there is one."""
    return "total_sequence_length" if "past_key_values.0.key" in inputs else "sequence_length"


def _named(size: Any, names: dict[str, str]) -> Any:
    if isinstance(size, int):
        return size
    # What is no dimension of an input is a sum of two: past and present.
    return names.get(str(size), "total_sequence_length")
