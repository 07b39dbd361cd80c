"""Answers that a language model writes: the most likely token after token, never sampled."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from compress.bench.metrics import Subject
from compress.bench.metrics._likelihood import Reader, by_length
from compress.core.errors import ModelError, UsageError


def answers(
    subject: Subject,
    reader: Reader,
    prompts: Sequence[str],
    cut: Callable[[str], tuple[str, bool]],
    *,
    most: int | None = None,
) -> list[str]:
    """What a model writes after each prompt.

    Args:
        subject: whose session is a language model.
        reader: of its tokenizer.
        prompts: that lose their beginning where they and the answer do not fit into the model.
        cut: the answer in a text so far, and whether what follows can no longer change it.
        most: tokens of an answer; none takes the option's.

    Raises:
        ModelError: the model computes NaN.
        UsageError: the answer alone leaves no room for a prompt.
    """
    hint = "set bench option generated_tokens" if most is None else "take a task with shorter answers"
    most = subject.options.generated_tokens if most is None else most
    room = reader.longest - most
    if room < 1:
        raise UsageError(
            f"answers of {most} tokens leave no room for a question in {reader.longest} positions",
            hint,
        )
    encoded = [_prompt(reader, prompt)[-room:] for prompt in prompts]
    if not torch.isfinite(subject.running.outputs(torch.tensor([encoded[0]]))).all():
        # The most likely one of several tokens of which one is NaN is no answer.
        raise ModelError("the model computes NaN or infinite outputs")
    found = [""] * len(prompts)
    for numbers in by_length(encoded, subject.options.scoring_batch_size):
        tokens = torch.tensor([encoded[number] for number in numbers], dtype=torch.int64)
        for number, answer in zip(numbers, _written(subject, reader, tokens, most, cut), strict=True):
            found[number] = answer
    return found


def _prompt(reader: Reader, prompt: str) -> list[int]:
    tokens = reader.encode(prompt)
    if not tokens and reader.prefix is not None:
        return [reader.prefix[0]]
    return tokens


def _written(
    subject: Subject,
    reader: Reader,
    prompts: torch.Tensor,
    most: int,
    cut: Callable[[str], tuple[str, bool]],
) -> list[str]:
    """Answers to prompts ``[batch, length]``; a batch goes on until all of them are complete."""
    session, ends = subject.running, _ends(subject, reader)
    state = session.prefill(prompts)
    written: list[list[int]] = [[] for _ in range(len(prompts))]
    texts = [""] * len(prompts)
    complete = [False] * len(prompts)
    for step in range(most):
        if step:
            state = session.decode(state)
        for row, token in enumerate(state.tokens.tolist()):
            if complete[row]:
                continue
            if token in ends:
                complete[row] = True
                continue
            written[row].append(token)
            text = reader.tokenizer.decode(written[row], skip_special_tokens=True)
            texts[row], complete[row] = cut(text)
        if all(complete):
            break
    return texts


def _ends(subject: Subject, reader: Reader) -> frozenset[int]:
    """The tokens after which a model has no more to say; one made for talks has several."""
    found: set[int] = set()
    named = (subject.artifact.config.get("eos_token_id"), reader.tokenizer.eos_token_id)
    for value in (*named, _generation_settings(subject).get("eos_token_id")):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)


def _generation_settings(subject: Subject) -> Mapping[str, Any]:
    file = subject.artifact.path / "generation_config.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}
