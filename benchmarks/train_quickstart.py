"""Trains ``builtin:quickstart``, the small model that ships with the package, on ``builtin:stories/train``.

    python benchmarks/train_quickstart.py WORK [--threads 2] [--steps 4000]

WORK receives the tokenizer, the checkpoints and the log. A run that was stopped (also by SIGTERM or
SIGINT, which end it after the step that is under way) goes on from its last checkpoint when it is started
again, with the numbers of a run that was never stopped: the rows of every step follow from its number,
and a checkpoint holds weights, moments and step. At its end the model's folder lies in WORK/model;
``report_quickstart.py`` judges it and puts it into the package.

Hidden matrices are trained by Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/),
which needs fewer steps than AdamW to the same loss here and is thirty lines; the embedding and the norms
by AdamW (Loshchilov and Hutter, 2019). Most of the text is drawn at random and cannot be foreseen, so what
follows from the text (answers, endings) counts for more in the loss than the rest: the best model stays
the same, and it is found with far fewer tokens. Arithmetic is float32: bfloat16 is slower on processors
without instructions for it.
"""

import argparse
import itertools
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.data.builtin import texts
from compress.data.builtin.splits import Split

END = "<|endoftext|>"
CUES = ("Answer:", " with the")
"""What an answer, or the last word of a story, comes after."""
STOPPED = 75
"""Exit code of a run that was stopped and can go on."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers, beside the thread count."""

    steps: int = 4_000
    batch_tokens: int = 3_072
    length: int = 256
    last_length: int = 512  # the model's positions, so that the far ones are trained as well
    last_share: float = 0.15
    warmup: int = 100
    decay_share: float = 0.5
    matrix_rate: float = 0.02
    other_rate: float = 0.0015
    clip: float = 1.0  # largest norm of a gradient that AdamW sees; Muon's updates have a size of their own
    momentum: float = 0.95
    weight_decay: float = 0.05
    weight_of_rest: float = 0.1  # of tokens that are no answer, in the loss
    vocabulary: int = 768
    hidden: int = 256
    wide: int = 768
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 2
    tokenizer_documents: int = 16_384
    seed: int = 0

    def length_at(self, step: int) -> int:
        """Tokens of a row."""
        return self.last_length if step >= self.steps * (1 - self.last_share) else self.length

    def rate_at(self, step: int) -> float:
        """The share of the full learning rate: warm-up, plateau, straight line to zero."""
        left = (self.steps - step) / (self.steps * self.decay_share)
        return min(1.0, (step + 1) / self.warmup, left)


class Optimizer:
    """Muon for matrices inside the blocks, AdamW for everything else; its state is a flat mapping."""

    def __init__(self, model: LlamaForCausalLM, settings: Settings) -> None:
        self.settings = settings
        self.parameters = dict(model.named_parameters())
        self.matrices = {n for n, p in self.parameters.items() if p.dim() == 2 and ".layers." in n}
        self.state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self.state[f"first.{name}"] = torch.zeros_like(parameter, requires_grad=False)
            if name not in self.matrices:
                self.state[f"second.{name}"] = torch.zeros_like(parameter, requires_grad=False)

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Update every parameter from its gradient, and forget the gradients."""
        rate = self.settings.rate_at(number)
        self._matrices(rate * self.settings.matrix_rate)
        self._others(rate * self.settings.other_rate, number + 1)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _matrices(self, rate: float) -> None:
        by_shape: dict[torch.Size, list[str]] = {}
        for name in sorted(self.matrices):
            by_shape.setdefault(self.parameters[name].shape, []).append(name)
        for shape, names in by_shape.items():
            looked_ahead = []
            for name in names:
                gradient, first = _gradient(self.parameters[name]), self.state[f"first.{name}"]
                first.lerp_(gradient, 1 - self.settings.momentum)
                looked_ahead.append(gradient.lerp(first, self.settings.momentum))
            updates = orthogonal(torch.stack(looked_ahead)) * max(1.0, shape[0] / shape[1]) ** 0.5
            for name, update in zip(names, updates, strict=True):
                self.parameters[name].mul_(1 - rate * self.settings.weight_decay).sub_(update, alpha=rate)

    def _others(self, rate: float, number: int) -> None:
        for name, parameter in self.parameters.items():
            if name in self.matrices:
                continue
            gradient = _gradient(parameter)
            gradient = gradient * (self.settings.clip / gradient.norm()).clamp(max=1.0)
            first, second = self.state[f"first.{name}"], self.state[f"second.{name}"]
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.05)
            size = (second / (1 - 0.95**number)).sqrt().add_(1e-8)
            parameter.sub_(first / size, alpha=rate / (1 - 0.9**number))


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a parameter without a gradient")
    return parameter.grad


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest matrices with orthogonal rows or columns, by five Newton-Schulz steps.

    Args:
        matrices: [count, rows, columns].
    """
    rows, columns = matrices.shape[1:]
    x = matrices.mT if rows > columns else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    found: Tensor = x.mT if rows > columns else x
    return found


def train_tokenizer(settings: Settings) -> Tokenizer:
    """Byte-level BPE; every digit is a token of its own, so that arithmetic can be learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    some = itertools.islice(texts.documents(Split.TRAIN), settings.tokenizer_documents)
    tokenizer.train_from_iterator(some, trainer)
    if tokenizer.get_vocab_size() != settings.vocabulary:
        raise RuntimeError(f"the text fills {tokenizer.get_vocab_size()} tokens of {settings.vocabulary}")
    return tokenizer


def end_of(tokenizer: Tokenizer) -> int:
    """The end-of-text token."""
    end = tokenizer.token_to_id(END)
    if end is None:
        raise RuntimeError(f"the tokenizer knows no {END}")
    return int(end)


def documents_of(split: Split, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Tokens of one document after another, each closed by the end-of-text token."""
    end = end_of(tokenizer)
    stream = texts.documents(split)
    while batch := list(itertools.islice(stream, 1_024)):
        for encoding in tokenizer.encode_batch(batch):
            yield [*encoding.ids, end]


def rows_of(documents: Iterator[list[int]], lengths: list[int]) -> Iterator[np.ndarray]:
    """Rows of the given lengths, packed.

    Every other row starts with a document, as a prompt does, and the rest of the document that it cut is
    left out; the rows between go on where the one before stopped, as windows of a long text do.
    """
    held: list[int] = []
    for number, length in enumerate(lengths):
        if number % 2 == 0:
            held = []
        while len(held) < length:
            held.extend(next(documents))
        yield np.array(held[:length], dtype=np.int64)
        held = held[length:]


def batches(settings: Settings, tokenizer: Tokenizer, start: int) -> Iterator[Tensor]:
    """The batch of each step from ``start`` on, int64 [rows, length + 1]."""
    lengths = [settings.length_at(step) for step in range(settings.steps)]
    counts = [settings.batch_tokens // length for length in lengths]
    wanted = [length + 1 for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
    rows = rows_of(documents_of(Split.TRAIN, tokenizer), wanted)
    for step, count in enumerate(counts):
        batch = list(itertools.islice(rows, count))
        if step >= start:
            yield torch.from_numpy(np.stack(batch))


def nats_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Nats of every token but the first of rows [rows, length + 1]: [rows, length]."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(
        len(batch), -1
    )


class Answers:
    """Finds the tokens of a row that follow from those before: answers with their ends."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.cues = [tuple(tokenizer.encode(cue).ids) for cue in CUES]
        if any(len(cue) != 2 for cue in self.cues):
            raise RuntimeError(f"a cue is two tokens, got {self.cues}")
        self.ends = torch.tensor([end_of(tokenizer), *tokenizer.encode("\n").ids])

    def of(self, rows: Tensor) -> Tensor:
        """Which tokens are from a cue up to the next line break or end of text, that one included.

        Args:
            rows: int64 [rows, length].
        """
        at = torch.arange(rows.shape[1])
        begins = torch.zeros_like(rows, dtype=torch.bool)
        for first, second in self.cues:
            begins[:, 2:] |= (rows[:, :-2] == first) & (rows[:, 1:-1] == second)
        ended = torch.zeros_like(begins)
        ended[:, 1:] = torch.isin(rows, self.ends)[:, :-1]
        last_begin = torch.where(begins, at, -1).cummax(1).values
        last_end = torch.where(ended, at, -1).cummax(1).values
        return last_begin > last_end.where(~begins, -1)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean nats a token over validation rows [rows, length + 1]."""
    model.eval()
    parts = [nats_of(model, part).mean().item() * len(part) for part in rows.split(16)]
    model.train()
    return sum(parts) / len(rows)


def build(settings: Settings, end: int) -> LlamaForCausalLM:
    """The model before training."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.wide,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=settings.last_length,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
    )
    torch.manual_seed(settings.seed)
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.train()
    return model


class Work:
    """The folder of a run: tokenizer, checkpoint and log."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings = folder, settings
        self.checkpoint = folder / "checkpoint.safetensors"
        self.log = folder / "log.jsonl"

    def tokenizer(self) -> Tokenizer:
        """The trained tokenizer; trained once."""
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            train_tokenizer(self.settings).save(str(file))
        return Tokenizer.from_file(str(file))

    def save(self, step: int, model: LlamaForCausalLM, optimizer: Optimizer, spent: float) -> None:
        """Write the checkpoint of the first ``step`` steps; the one before stays whole until it is there."""
        tensors = {f"weight.{name}": value.detach() for name, value in optimizer.parameters.items()}
        tensors |= {f"state.{name}": value for name, value in optimizer.state.items()}
        about = {"step": str(step), "seconds": str(spent), "settings": json.dumps(asdict(self.settings))}
        partial = self.checkpoint.with_suffix(".partial")
        save_file(tensors, partial, about)
        partial.replace(self.checkpoint)

    def resume(self, optimizer: Optimizer) -> tuple[int, float]:
        """Bring back weights and state; steps and seconds that were spent, 0 for a new run."""
        if not self.checkpoint.is_file():
            self.log.unlink(missing_ok=True)
            return 0, 0.0
        with safe_open(self.checkpoint, framework="pt") as opened, torch.no_grad():
            about = opened.metadata()
            if json.loads(about["settings"]) != asdict(self.settings):
                raise SystemExit(f"{self.checkpoint} is of other settings: {about['settings']}")
            for name, parameter in optimizer.parameters.items():
                parameter.copy_(opened.get_tensor(f"weight.{name}"))
            for name, value in optimizer.state.items():
                value.copy_(opened.get_tensor(f"state.{name}"))
        step = int(about["step"])
        kept = [line for line in self.log.read_text().splitlines() if json.loads(line)["step"] <= step]
        self.log.write_text("".join(line + "\n" for line in kept))
        return step, float(about["seconds"])

    def note(self, record: dict[str, Any]) -> None:
        """A line for the log."""
        with self.log.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


def finish(work: Work, model: LlamaForCausalLM, tokenizer: Tokenizer) -> Path:
    """Write the folder that `from_pretrained` reads."""
    folder = work.folder / "model"
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.eval()
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id, max_new_tokens=128
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=work.settings.last_length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    # The class that every version of transformers knows; newer ones write a name of their own.
    file = folder / "tokenizer_config.json"
    document = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    return folder


def train(work: Work, *, save_seconds: float, log_steps: int = 10, validation_steps: int = 250) -> bool:
    """Train to the end or until a signal; whether the end was reached."""
    settings, tokenizer = work.settings, work.tokenizer()
    model = build(settings, end_of(tokenizer))
    optimizer = Optimizer(model, settings)
    done, spent = work.resume(optimizer)
    held_out = rows_of(documents_of(Split.VALIDATION, tokenizer), [settings.length + 1] * 64)
    validation = torch.from_numpy(np.stack(list(held_out)))
    stop, answers = _Stop(), Answers(tokenizer)
    begun = saved = time.monotonic()
    first, losses, answered = done, [], []
    for step, batch in enumerate(batches(settings, tokenizer, done), start=done):
        nats, wanted = nats_of(model, batch), answers.of(batch)[:, 1:]
        weights = torch.where(wanted, 1.0, settings.weight_of_rest)
        ((nats * weights).sum() / weights.sum()).backward()
        optimizer.step(step)
        losses.append(nats.mean().item())
        answered.append(nats[wanted].mean().item())
        done = step + 1
        now = time.monotonic()
        ended = done == settings.steps or stop.asked
        if done % log_steps == 0 or ended:
            record: dict[str, Any] = {
                "step": done,
                "loss": round(sum(losses) / len(losses), 4),
                "answers": round(sum(answered) / len(answered), 4),
            }
            if done % validation_steps == 0 or done == settings.steps:
                record["validation"] = round(validation_loss(model, validation), 4)
            losses, answered = [], []
            record["seconds"] = round(spent + now - begun, 1)
            work.note(record)
            _show(record, settings, (now - begun) / (done - first))
        if ended or now - saved >= save_seconds:
            work.save(done, model, optimizer, spent + now - begun)
            saved = now
        if stop.asked and done < settings.steps:
            print(f"stopped after step {done}; the same command goes on from there", flush=True)
            return False
    print(f"the model is in {finish(work, model, tokenizer)}", flush=True)
    return True


class _Stop:
    """Whether a signal has asked to stop; the step under way is finished first."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


def _show(record: dict[str, Any], settings: Settings, seconds: float) -> None:
    left = (settings.steps - record["step"]) * seconds / 60
    validation = f"  validation {record['validation']:.4f}" if "validation" in record else ""
    print(
        f"step {record['step']:>5}/{settings.steps}  loss {record['loss']:.4f}  "
        f"answers {record['answers']:.4f}{validation}  "
        f"{settings.batch_tokens / seconds:,.0f} tokens/s  {left:.1f} min left",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Train builtin:quickstart.")
    parser.add_argument("work", type=Path, help="folder for tokenizer, checkpoint, log and model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--save-seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = Work(arguments.work, Settings(steps=arguments.steps))
    return 0 if train(work, save_seconds=arguments.save_seconds) else STOPPED


if __name__ == "__main__":
    sys.exit(main())
