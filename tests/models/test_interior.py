"""What is recorded of real architectures, against their own hidden states, attention and matrices."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.core.artifact import Artifact
from compress.core.errors import ModelError
from compress.models.interior import Heads, Recorder, survey
from compress.models.load import skeleton
from tests import models_zoo

EAGER_ONLY = ("gemma2", "gpt-oss")
"""Architectures for which transformers has no fused attention."""


def distilbert(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=models_zoo.VOCABULARY,
        dim=32,
        n_heads=4,
        n_layers=3,
        hidden_dim=64,
        max_position_embeddings=64,
    )
    return transformers.DistilBertModel(config).eval()


def recorded(model: Any, tokens: torch.Tensor, **options: Any) -> Recorder:
    recorder = Recorder(model, attention=True)
    with recorder.recording(), torch.no_grad():
        model(tokens, use_cache=False, **options) if hasattr(model.config, "use_cache") else model(
            tokens, **options
        )
    return recorder


@pytest.mark.parametrize("name", models_zoo.CONFIGURATIONS)
def test_a_survey_finds_layers_and_heads_without_weights(name: str, tmp_path: Path) -> None:
    found = survey(skeleton(Artifact.open(models_zoo.write(name, tmp_path))))
    assert (found.layers, found.width) == (3, 32)
    config = models_zoo.configuration(name)
    keys = getattr(config, "num_key_value_heads", None) or 4
    assert found.heads == dict.fromkeys((1, 2, 3), Heads(4, keys, 8, 8))


@pytest.mark.parametrize("name", [*models_zoo.CONFIGURATIONS, "distilbert"])
def test_hidden_states_and_attention_are_the_models_own(name: str) -> None:
    model = distilbert() if name == "distilbert" else models_zoo.build(name)
    tokens = models_zoo.tokens(2, 12)
    record = recorded(model, tokens).record
    model.set_attn_implementation("eager")
    with torch.no_grad():
        said = model(tokens, output_hidden_states=True, output_attentions=True)
    assert record.embedded is not None
    torch.testing.assert_close(record.embedded, said.hidden_states[0])
    for layer in (1, 2):
        # The last one of transformers' list has gone through the final norm.
        torch.testing.assert_close(record.hidden[layer], said.hidden_states[layer], rtol=1e-4, atol=1e-5)
    assert sorted(record.hidden) == sorted(record.attended) == [1, 2, 3]
    for layer, found in record.attended.items():
        keys = found.keys.repeat_interleave(found.queries.shape[1] // found.keys.shape[1], dim=1)
        scores = found.queries @ keys.transpose(-1, -2) * found.scale
        own = said.attentions[layer - 1]
        if name in EAGER_ONLY:
            assert own.shape == scores.shape  # Capped, or with a sink: no plain softmax.
            continue
        ours = scores.masked_fill(own == 0, -torch.inf).softmax(-1)
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


def test_queries_keys_and_values_are_those_of_the_matrices() -> None:
    tokens = models_zoo.tokens(2, 12)
    bert = models_zoo.build("bert")
    record = recorded(bert, tokens).record
    layer = bert.encoder.layer[1].attention.self
    own = [part(record.hidden[1]) for part in (layer.query, layer.key, layer.value)]
    gpt2 = models_zoo.build("gpt2")
    other = recorded(gpt2, tokens).record
    block = gpt2.transformer.h[1]
    fused = block.attn.c_attn(block.ln_1(other.hidden[1])).split(32, dim=-1)
    for found, expected in ((record.attended[2], own), (other.attended[2], fused)):
        parts = (found.queries, found.keys, found.values)
        for part, matrix in zip(parts, expected, strict=True):
            torch.testing.assert_close(part.transpose(1, 2).flatten(2), matrix)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recording_changes_nothing_and_leaves_nothing_behind(implementation: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS)
    model = models_zoo.build("llama")
    model.set_attn_implementation(implementation)
    tokens = models_zoo.tokens(2, 12)
    with torch.no_grad():
        plain = model(tokens).logits
        recorder = Recorder(model, attention=True)
        with recorder.recording():
            watched = model(tokens).logits
        again = model(tokens).logits
    assert torch.equal(plain, watched)
    assert torch.equal(plain, again)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    with pytest.raises(KeyError), recorder.recording():
        raise KeyError
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.model.layers)


def test_only_wanted_layers_are_kept() -> None:
    model = models_zoo.build("bert")
    recorder = Recorder(model, attention=True, layers=frozenset({2}))
    with recorder.recording():
        model(models_zoo.tokens(1, 4))
    assert list(recorder.record.hidden) == list(recorder.record.attended) == [2]
    assert recorder.record.layers == 3
    assert recorder.record.hidden[2].requires_grad


def test_a_model_of_two_stacks_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5Model(config)
    with pytest.raises(ModelError, match="2 stacks"):
        Recorder(model, attention=False)
