"""What TRL and DistillKit share: both train with the trainer of transformers, so rows, padding and marks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from lesson import LENGTHS, TOKENS, Lesson, Watch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

IGNORED = -100
PADDING = "0"


def arguments_of(lesson: Lesson) -> dict[str, Any]:
    """Numbers of an optimisation like ours, and nothing that is not training."""
    return {
        "output_dir": str(lesson.out / "trained"),
        "per_device_train_batch_size": lesson.batch,
        "gradient_accumulation_steps": lesson.accumulation,
        "max_steps": lesson.steps,
        "learning_rate": lesson.learning_rate,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": lesson.steps,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer that a trainer asks for and nobody reads with."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {str(number): number for number in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="1")), pad_token=PADDING, eos_token="1"
    )


def rows_of(lesson: Lesson) -> Dataset:
    """The tokens of each row, without padding."""
    tensors = load_file(lesson.tokens)
    tokens = tensors[TOKENS]
    lengths = tensors.get(LENGTHS, torch.full((len(tokens),), tokens.shape[1]))
    rows = [row[:length].tolist() for row, length in zip(tokens, lengths.tolist(), strict=True)]
    return Dataset.from_dict({TOKENS: rows})


class Collator:
    """Pads rows to the longest of a batch, as the programs do; the first token of a row is not predicted."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = [torch.tensor(row[TOKENS]) for row in rows]
        self._watch.counts.append(sum(map(len, tokens)))
        labels = [torch.cat([torch.tensor([IGNORED]), row[1:]]) for row in tokens]
        padded = torch.nn.utils.rnn.pad_sequence
        return {
            TOKENS: padded(tokens, batch_first=True),
            "attention_mask": padded([torch.ones_like(row) for row in tokens], batch_first=True),
            "labels": padded(labels, batch_first=True, padding_value=IGNORED),
        }


class Marks(TrainerCallback):
    """Marks the steps."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._watch.mark()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._watch.mark()


def listen(trainer: Any, lesson: Lesson, watch: Watch) -> None:
    """Take note of the loss of each pass; one that is a share of a step's is multiplied by its passes."""
    compute = trainer.compute_loss

    def heard(*arguments: Any, **options: Any) -> Any:
        loss = compute(*arguments, **options)
        shared = options.get("num_items_in_batch") is not None and trainer.model_accepts_loss_kwargs
        watch.losses.append(float(loss.detach()) * (lesson.accumulation if shared else 1))
        return loss

    trainer.compute_loss = heard
