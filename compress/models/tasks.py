"""What a model is for: its class, its batches, its loss, and what a bench can measure of it.

A task is asked for by name or found from the model's configuration. Methods, the sweep and the bench
speak to a `Task` and never branch on names, so a new task is one class here and its row in `TASKS`.
Nothing here imports torch or transformers before a method needs them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from compress.core.errors import ModelError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

AUTO: Final = "auto"

_EVERY_TASK = ("size", "load", "memory")
"""Metrics that need nothing but a model."""


class Task(ABC):
    """One kind of work that a model does.

    A task has no state, so it may be shared, compared and sent by name.
    """

    name: ClassVar[str]
    """The spelling in recipes and on the command line, the one of the Hugging Face hub."""
    title: ClassVar[str]
    """What it is, in a few words for a person."""
    architectures: ClassVar[tuple[str, ...]]
    """Suffixes of class names in ``config.json`` that mean this task."""
    metrics: ClassVar[tuple[str, ...]]
    """Stems of the files in ``compress/bench/metrics`` that apply."""
    generates: ClassVar[bool]
    """Whether the model writes token after token, so that prefill and decode are measured apart."""

    @abstractmethod
    def model_class(self) -> Any:
        """The transformers ``Auto`` class that builds the model with this task's head."""

    @abstractmethod
    def batch(self, tokens: "Tensor") -> dict[str, "Tensor"]:
        """The keyword arguments of one forward pass over sequences of equal length, without padding.

        Args:
            tokens: int64 ``[batch, length]``.
        """

    @abstractmethod
    def outputs(self, result: Any) -> "Tensor":
        """What a model says, in float32: the tensor by which two models are compared.

        Args:
            result: what the model's forward returned.
        """

    @abstractmethod
    def loss(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """The mean loss of `outputs` against `targets`, a scalar in nats where it is a likelihood."""


@final
class TextGeneration(Task):
    """Predicting the next token."""

    name = "text-generation"
    title = "causal language model"
    architectures = ("ForCausalLM", "LMHeadModel")
    metrics = (*_EVERY_TASK, "prefill", "decode", "perplexity", "fidelity")
    generates = True

    def model_class(self) -> Any:
        """``AutoModelForCausalLM``."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def batch(self, tokens: "Tensor") -> dict[str, "Tensor"]:
        """Tokens and an attention mask of ones, both ``[batch, length]``."""
        return _tokens_and_mask(tokens)

    def outputs(self, result: Any) -> "Tensor":
        """Logits, ``[batch, length, vocabulary]``."""
        logits: Tensor = result.logits
        return logits.float()

    def loss(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Cross-entropy of each position's logits against the token that follows it.

        Args:
            outputs: ``[batch, length, vocabulary]``.
            targets: the same tokens that went in, ``[batch, length]``.
        """
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


@final
class TextClassification(Task):
    """Choosing one of a few labels for a text."""

    name = "text-classification"
    title = "sequence classifier"
    architectures = ("ForSequenceClassification",)
    metrics = (*_EVERY_TASK, "encode", "accuracy", "fidelity")
    generates = False

    def model_class(self) -> Any:
        """``AutoModelForSequenceClassification``."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def batch(self, tokens: "Tensor") -> dict[str, "Tensor"]:
        """Tokens and an attention mask of ones, both ``[batch, length]``."""
        return _tokens_and_mask(tokens)

    def outputs(self, result: Any) -> "Tensor":
        """Logits, ``[batch, labels]``."""
        logits: Tensor = result.logits
        return logits.float()

    def loss(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Cross-entropy of ``[batch, labels]`` against label numbers ``[batch]``."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, targets)


@final
class FeatureExtraction(Task):
    """Turning a text into vectors: base encoders and sentence encoders."""

    name = "feature-extraction"
    title = "encoder of texts into vectors"
    # A masked-language or pre-training head is what an encoder was trained with, not what it is for.
    architectures = ("Model", "Encoder", "ForMaskedLM", "ForPreTraining")
    metrics = (*_EVERY_TASK, "encode", "fidelity")
    generates = False

    def model_class(self) -> Any:
        """``AutoModel``."""
        from transformers import AutoModel

        return AutoModel

    def batch(self, tokens: "Tensor") -> dict[str, "Tensor"]:
        """Tokens and an attention mask of ones, both ``[batch, length]``."""
        return _tokens_and_mask(tokens)

    def outputs(self, result: Any) -> "Tensor":
        """Hidden states after the last layer, ``[batch, length, width]``."""
        hidden: Tensor = result.last_hidden_state
        return hidden.float()

    def loss(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """One minus the mean cosine of each position's vector to its target of the same shape."""
        from torch.nn.functional import cosine_similarity

        return 1.0 - cosine_similarity(outputs, targets, dim=-1).mean()


@final
class TextToText(Task):
    """Writing one text from another: an encoder reads, a decoder writes."""

    name = "text2text-generation"
    title = "encoder-decoder"
    architectures = ("ForConditionalGeneration", "MTModel")
    metrics = _EVERY_TASK
    # What is timed as prefill and decode is a decoder alone.
    generates = False

    def model_class(self) -> Any:
        """``AutoModelForSeq2SeqLM``."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def batch(self, tokens: "Tensor") -> dict[str, "Tensor"]:
        """Tokens, an attention mask of ones, and the same tokens for the decoder, all ``[batch, length]``."""
        return {**_tokens_and_mask(tokens), "decoder_input_ids": tokens}

    def outputs(self, result: Any) -> "Tensor":
        """Logits of the decoder, ``[batch, length, vocabulary]``."""
        logits: Tensor = result.logits
        return logits.float()

    def loss(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Cross-entropy of each position's logits against what the decoder should write there.

        Args:
            outputs: ``[batch, length, vocabulary]``.
            targets: ``[batch, length]``.
        """
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs.flatten(0, 1), targets.flatten())


TASKS: Final[Mapping[str, Task]] = {
    task.name: task for task in (TextGeneration(), TextClassification(), FeatureExtraction(), TextToText())
}


def resolve(name: str, config: Mapping[str, Any]) -> Task:
    """The task with a name, or the one that a model was made for.

    Args:
        name: a key of `TASKS`, or ``auto``.
        config: the parsed ``config.json``, read only for ``auto``.

    Raises:
        UsageError: no task has this name.
        ModelError: ``auto``, and the configuration names no architecture or one of another kind of work.
    """
    if name != AUTO:
        if name not in TASKS:
            raise UsageError(f"unknown task '{name}'", did_you_mean(name, [AUTO, *TASKS]))
        return TASKS[name]
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not all(isinstance(item, str) for item in architectures):
        architectures = []
    for architecture in architectures:
        found = _of_architecture(architecture)
        # Models that see or hear write under conditions as well, and those are no texts.
        if isinstance(found, TextToText) and not config.get("is_encoder_decoder"):
            found = None
        if found is not None:
            return found
    came = ", ".join(architectures) if architectures else "no architecture"
    raise ModelError(
        f"cannot tell the task of this model: its config.json names {came}",
        f"say which with --task: {', '.join(TASKS)}",
    )


def _of_architecture(architecture: str) -> Task | None:
    """The task whose longest suffix ends a class name: ``GPT2LMHeadModel`` generates, ``GPT2Model`` not."""
    fitting = [
        (len(suffix), task)
        for task in TASKS.values()
        for suffix in task.architectures
        if architecture.endswith(suffix)
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def _tokens_and_mask(tokens: "Tensor") -> dict[str, "Tensor"]:
    import torch

    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
