"""How many bytes of weights a step of decoding reads."""

from pathlib import Path

import pytest
import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.models.tasks import resolve
from compress.runtimes import Placement, Session, find
from compress.runtimes._session import read_bytes
from tests import models_zoo, quantized_models


def decoding(folder: Path, runtime: str = "torch-eager") -> Session:
    artifact = Artifact.open(folder)
    session = find(runtime).load(artifact, resolve("text-generation", artifact.config), Placement())
    session.decode(session.prefill(models_zoo.tokens(samples=1, length=4)))
    return session


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_all_weights_but_an_embedding_that_is_looked_up(name: str, tmp_path: Path) -> None:
    model = models_zoo.build(name)
    # A tied head is the embedding, read whole by the product.
    looked_up = {
        module.weight.data_ptr(): module.weight.nbytes
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    }
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        looked_up[embedding.weight.data_ptr()] = embedding.weight.nbytes
    expected = sum(parameter.nbytes for parameter in model.parameters()) - sum(looked_up.values())
    assert decoding(models_zoo.write(name, tmp_path)).facts["step_bytes"] == expected


def test_fused_experts_are_not_counted(tmp_path: Path) -> None:
    model = models_zoo.build("mixtral")
    experts = sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() == 3)
    embedding = model.get_input_embeddings().weight.nbytes
    expected = sum(parameter.nbytes for parameter in model.parameters()) - experts - embedding
    assert experts > 0
    assert decoding(models_zoo.write("mixtral", tmp_path)).facts["step_bytes"] == expected


def test_packed_layers_count_what_they_hold(tmp_path: Path) -> None:
    folder = models_zoo.write("llama", tmp_path)
    packed = quantized_models.write(folder, tmp_path / "int4", bits=4, group=32)
    dense, small = decoding(folder), decoding(packed, "torch-int4")
    held = small.facts["weight_bytes"] - dense.facts["weight_bytes"]
    assert small.facts["step_bytes"] - dense.facts["step_bytes"] == held


def test_it_is_known_after_the_first_step_and_hooks_are_gone(tmp_path: Path) -> None:
    artifact = Artifact.open(models_zoo.write("llama", tmp_path))
    session = find("torch-eager").load(artifact, resolve("auto", artifact.config), Placement())
    state = session.prefill(models_zoo.tokens(samples=1, length=4))
    assert "step_bytes" not in session.facts
    first = session.decode(state)
    known = session.facts["step_bytes"]
    assert first.length == 5
    session.decode(first)
    assert session.facts["step_bytes"] == known
    model = session._model  # type: ignore[attr-defined]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_runs_twice_counts_once() -> None:
    shared = nn.Linear(4, 4, bias=False)
    twin = nn.Linear(4, 4, bias=False)
    twin.weight = shared.weight
    assert read_bytes([shared, shared, twin]) == 4 * 4 * torch.float32.itemsize
