"""What is asked of a traced graph before anything is computed with it."""

import onnx_ir
import pytest
import torch
import transformers

from compress.core.errors import ModelError, PlanError, VerificationError
from compress.graph import tracing
from compress.models.tasks import TASKS
from tests import models_zoo

WRITES = TASKS["text-generation"]


def graph(inputs: list[str], outputs: list[str]) -> onnx_ir.Model:
    """A graph that copies its first input to every output."""
    values = [onnx_ir.Value(name=name) for name in inputs]
    nodes = [onnx_ir.node("Identity", [values[0]]) for _ in outputs]
    for node, name in zip(nodes, outputs, strict=True):
        node.outputs[0].name = name
    made = onnx_ir.Graph(values, [node.outputs[0] for node in nodes], nodes=nodes, opset_imports={"": 20})
    return onnx_ir.Model(made, ir_version=10)


def test_a_mask_that_was_pruned_is_an_error() -> None:
    kept = graph(["input_ids", "past_key_values.0.key"], ["logits"])
    wanted = ["input_ids", "attention_mask", "past_key_values"]
    with pytest.raises(VerificationError, match="lost its input attention_mask"):
        tracing._require(kept, wanted, WRITES)


def test_a_missing_output_is_an_error() -> None:
    with pytest.raises(ModelError, match="no output 'logits', it has scores"):
        tracing._require(graph(["input_ids"], ["scores"]), ["input_ids"], WRITES)


def test_names_and_outputs_are_those_of_the_task() -> None:
    names = ["input_ids", "input.past_key_values.layers.0.keys", "past_key_values.layers.10.values"]
    outputs = ["logits", "output.past_key_values.layers.0.keys", "hidden_states.0"]
    model = graph(names, outputs)
    tracing._rename(model, WRITES)
    assert [value.name for value in model.graph.inputs] == [
        "input_ids",
        "past_key_values.0.key",
        "past_key_values.10.value",
    ]
    assert [value.name for value in model.graph.outputs] == ["logits", "present.0.key"]


def test_positions_do_not_count_what_the_mask_hides() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])
    assert tracing.positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 1, 2]]


def test_samples_are_padded_and_of_different_sizes() -> None:
    model = models_zoo.build("llama")
    cache = tracing.sample_cache(model)
    sample = tracing._sample(model, cache)
    assert (sample["attention_mask"] == 0).any(), "a mask of ones would be pruned"
    sizes = {sample["input_ids"].shape[1], sample["attention_mask"].shape[1], cache.layers[0].keys.shape[2]}
    assert len(sizes) == 3
    assert min(sizes) > 1
    encoder = tracing._sample(models_zoo.build("bert"), None)
    assert set(encoder) == {"input_ids", "attention_mask", "token_type_ids"}
    assert (encoder["attention_mask"] == 0).any()


def test_a_model_that_keeps_no_keys_is_refused() -> None:
    config = transformers.MambaConfig(
        vocab_size=models_zoo.VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0
    )
    with pytest.raises(PlanError, match="MambaForCausalLM keeps"):
        tracing.sample_cache(transformers.MambaForCausalLM(config).eval())
