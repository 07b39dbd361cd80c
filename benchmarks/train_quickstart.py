"""Trains ``builtin:quickstart``, the small model that ships with the package, on ``builtin:stories/train``.

    python benchmarks/train_quickstart.py WORK [--threads 2] [--steps 4000]

WORK receives the tokenizer, the checkpoints and the log. A run that was stopped (also by SIGTERM or
SIGINT, which end it after the step that is under way) goes on from its last checkpoint when it is started
again, with the numbers of a run that was never stopped: the rows of every step follow from its number,
and a checkpoint holds weights, moments and step. At its end the model's folder lies in WORK/model;
``report_quickstart.py`` judges it and puts it into the package.

To look back for what came before, and to go on as it did there, takes two heads that work on each other,
which a model finds late by itself (Olsson et al., 2022, "In-context learning and induction heads"): trained
on the text alone, one like this had learned to copy nothing after 3.6 million tokens. So one head begins by
looking at the token before (`look_back`), and the first rows are random tokens that repeat themselves, for
which nothing else helps: after 300 steps of them the model copies.

Most of the text is drawn at random and cannot be foreseen, so what follows from the text (answers, endings)
counts for more in the loss than the rest: the best model stays the same, and it is found with far fewer
tokens. The optimiser is AdamW (Loshchilov and Hutter, 2019). Arithmetic is float32: bfloat16 is slower on
processors without instructions for it.
"""

import argparse
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
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

    steps: int = 6_000
    batch_tokens: int = 2_048
    length: int = 128
    last_length: int = 512  # the model's positions, so that the far ones are trained as well
    last_share: float = 0.15
    periodic_steps: int = 450  # of short rows of random tokens that repeat themselves
    periodic_length: int = 32
    half_periodic_steps: int = 700  # after them, every other row of which does, as long as those of the text
    warmup: int = 50
    decay_share: float = 0.6
    rate: float = 0.003
    clip: float = 1.0  # largest norm of the whole gradient
    weight_decay: float = 0.05
    weight_of_rest: float = 0.1  # of tokens that are no answer, in the loss
    vocabulary: int = 768
    hidden: int = 256
    wide: int = 768
    layers: int = 3
    heads: int = 8
    key_value_heads: int = 4
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
    """AdamW with a schedule; its state is a flat mapping."""

    def __init__(self, model: LlamaForCausalLM, settings: Settings) -> None:
        self.settings = settings
        self.parameters = dict(model.named_parameters())
        self.adamw = torch.optim.AdamW(
            self.parameters.values(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
        )

    @property
    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, by their name and that of the parameter; empty before the first step."""
        return {
            f"{kind}.{name}": value
            for name, parameter in self.parameters.items()
            for kind, value in self.adamw.state[parameter].items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take a state up again."""
        for place, value in state.items():
            kind, _, name = place.partition(".")
            self.adamw.state[self.parameters[name]][kind] = value

    def step(self, number: int) -> None:
        """Update every parameter from its gradient, and forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        for group in self.adamw.param_groups:
            group["lr"] = self.settings.rate * self.settings.rate_at(number)
        self.adamw.step()
        self.adamw.zero_grad()


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


def periodic(settings: Settings, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of random tokens that repeat themselves, each with a period of its own, and what is said again.

    One period for all would be learned by its distance, and not by what is said.

    Args:
        count: of the rows.
        length: of a row; both results are [count, length].
        seed: of tokens and periods.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(settings.vocabulary, (count, length), generator=generator)
    periods = torch.randint(2, length // 2, (count, 1), generator=generator)
    at = torch.arange(length).expand(count, -1)
    return tokens.gather(1, at % periods), at >= periods


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
    look_back(model)
    model.train()
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Let the first head of the first block look at the token before, whatever the tokens are.

    All embeddings get the same large first component; the head's queries and keys read that alone, and so
    are vectors that only the rotary embedding tells apart. A query that is turned back by one position
    matches the key of the token before best. Every weight is trained like any other from there on.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    size, deviation = config.hidden_size // config.num_attention_heads, config.initializer_range
    constant = 5 * deviation
    model.model.embed_tokens.weight[:, 0] = constant
    # What the norm before the attention makes of it.
    normed = constant / math.sqrt(
        (constant**2 + (config.hidden_size - 1) * deviation**2) / config.hidden_size
    )
    pairs = min(8, size // 2)  # the fastest turning ones, which tell neighbours apart
    turns = torch.arange(pairs) * 2 / size
    angles = config.rope_parameters["rope_theta"] ** -turns
    length = math.sqrt(4.0 * math.sqrt(size))
    query, key = torch.zeros(size), torch.zeros(size)
    query[:pairs], query[size // 2 :][:pairs] = length * angles.cos(), -length * angles.sin()
    key[:pairs] = length
    head = slice(0, size)
    for weight, vector, share in (
        (attention.q_proj.weight, query, 0.1),
        (attention.k_proj.weight, key, 0.3),
    ):
        weight[head] *= share
        weight[head, 0] = vector / normed
    attention.v_proj.weight[head].normal_(std=config.hidden_size**-0.5)
    attention.v_proj.weight[head, 0] = 0
    attention.o_proj.weight[:, head].normal_(std=0.3 * size**-0.5)
    attention.o_proj.weight[0] = 0


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
            names = [name for name in opened.keys() if name.startswith("state.")]  # noqa: SIM118 - safe_open is no mapping
            optimizer.restore({name.removeprefix("state."): opened.get_tensor(name) for name in names})
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
        foreseen = answers.of(batch)
        if step < settings.periodic_steps:
            count = settings.batch_tokens // settings.periodic_length
            batch, foreseen = periodic(settings, count, settings.periodic_length + 1, step)
        elif step < settings.periodic_steps + settings.half_periodic_steps:
            batch[::2], foreseen[::2] = periodic(settings, *batch[::2].shape, step)
        nats, wanted = nats_of(model, batch), foreseen[:, 1:]
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
