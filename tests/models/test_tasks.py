"""Tasks are found by name and from a configuration, and say what a batch, an output and a loss are."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.core.errors import ModelError, UsageError
from compress.models.tasks import TASKS, FeatureExtraction, TextClassification, TextGeneration, resolve


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertModel", "feature-extraction"),
        ("GPT2Model", "feature-extraction"),
        ("ModernBertForMaskedLM", "feature-extraction"),
        ("T5EncoderModel", "feature-extraction"),
        ("T5Model", "feature-extraction"),
    ],
)
def test_auto_reads_the_architecture(architecture: str, name: str) -> None:
    assert resolve("auto", {"architectures": [architecture]}).name == name


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "MarianMTModel"])
def test_an_encoder_decoder_writes_from_texts_and_other_models_may_not(architecture: str) -> None:
    config = {"architectures": [architecture], "is_encoder_decoder": True}
    assert resolve("auto", config).name == "text2text-generation"
    with pytest.raises(ModelError, match="--task"):
        resolve("auto", {"architectures": ["LlavaForConditionalGeneration"]})


def test_a_decoder_reads_what_its_encoder_reads() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    batch = TASKS["text2text-generation"].batch(tokens)
    assert torch.equal(batch["decoder_input_ids"], tokens)
    outputs = torch.zeros(2, 3, 7)
    loss = TASKS["text2text-generation"].loss(outputs, tokens)
    assert loss.item() == pytest.approx(math.log(7))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_name_wins_over_the_configuration(name: str) -> None:
    assert resolve(name, {"architectures": ["LlamaForCausalLM"]}).name == name


def test_an_unknown_name_is_corrected() -> None:
    with pytest.raises(UsageError, match="text-generation"):
        resolve("text-generatoin", {})


@pytest.mark.parametrize(
    "config",
    [{}, {"architectures": None}, {"architectures": []}, {"architectures": ["BertForQuestionAnswering"]}],
)
def test_auto_that_cannot_tell_asks(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="--task"):
        resolve("auto", config)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_each_task_names_a_transformers_class(name: str) -> None:
    assert hasattr(TASKS[name].model_class(), "from_pretrained")


def test_a_batch_has_no_padding() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    batch = TextGeneration().batch(tokens)
    assert torch.equal(batch["input_ids"], tokens)
    assert torch.equal(batch["attention_mask"], torch.ones_like(tokens))


def test_generation_loss_is_that_of_the_next_token() -> None:
    outputs = torch.zeros(1, 3, 7)
    loss = TextGeneration().loss(outputs, torch.tensor([[1, 2, 3]]))
    assert loss.item() == pytest.approx(math.log(7))
    outputs[0, 0, 2] = outputs[0, 1, 3] = 50.0
    assert TextGeneration().loss(outputs, torch.tensor([[1, 2, 3]])).item() == pytest.approx(0.0, abs=1e-6)


def test_classification_and_feature_losses() -> None:
    assert TextClassification().loss(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])).item() == pytest.approx(
        math.log(2)
    )
    vectors = torch.randn(2, 3, 5)
    assert FeatureExtraction().loss(vectors, 3.0 * vectors).item() == pytest.approx(0.0, abs=1e-6)


def test_outputs_are_float32() -> None:
    low = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    assert TextGeneration().outputs(SimpleNamespace(logits=low)).dtype == torch.float32
    assert TextClassification().outputs(SimpleNamespace(logits=low)).dtype == torch.float32
    assert FeatureExtraction().outputs(SimpleNamespace(last_hidden_state=low)).dtype == torch.float32
