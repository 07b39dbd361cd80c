"""How well a model does the examples of a suite: ``suite.piqa.accuracy`` for ``piqa.jsonl.gz``.

One metric for each suite that the experiment names; which quantities it gives follows from the kind of
work that the suite is (`compress.data.suites`). Samples are examples, each independent of the others.
What was answered is kept beside each sample, so that answers that flipped can be counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import numpy as np

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._classification import calibration_error, macro
from compress.bench.metrics._columns import Column
from compress.bench.metrics._generation import answers
from compress.bench.metrics._likelihood import DELIMITER, Reader, for_each_batch, joined, likelihoods
from compress.bench.metrics._text_scores import bleu, exact_match, rouge, token_f1, word_errors
from compress.core.errors import CompressError, DataError, EnvironmentFault, ModelError
from compress.core.measurement import Measurement
from compress.data.labels import number_of
from compress.data.suites import (
    Classification,
    Cloze,
    Generation,
    MultipleChoice,
    QuestionAnswering,
    Shape,
    read_suite,
    shape_of,
    suite_name,
)
from compress.models.load import tokenizer as load_tokenizer

ACCURACY = Quantity("suite.*.accuracy", "accuracy", "", "higher")
PER_BYTE = Quantity("suite.*.accuracy_per_byte", "accuracy by likelihood a byte", "", "higher")
PER_CHARACTER = Quantity(
    "suite.*.accuracy_per_character", "accuracy by likelihood a character", "", "higher", shown=False
)
PERPLEXITY = Quantity("suite.*.perplexity", "perplexity of a continuation", "", "lower")
PRECISION = Quantity("suite.*.precision", "macro precision", "", "higher", shown=False)
RECALL = Quantity("suite.*.recall", "macro recall", "", "higher", shown=False)
F1 = Quantity("suite.*.f1", "macro F1", "", "higher")
CALIBRATION = Quantity("suite.*.calibration_error", "expected calibration error", "", "lower")
EXACT_MATCH = Quantity("suite.*.exact_match", "exact match", "", "higher")
TOKEN_F1 = Quantity("suite.*.token_f1", "token F1", "", "higher")
ROUGE_1 = Quantity("suite.*.rouge1", "ROUGE-1", "", "higher", shown=False)
ROUGE_2 = Quantity("suite.*.rouge2", "ROUGE-2", "", "higher", shown=False)
ROUGE_L = Quantity("suite.*.rougeL", "ROUGE-L", "", "higher")
BLEU = Quantity("suite.*.bleu", "BLEU", "", "higher")
WORD_ERRORS = Quantity("suite.*.word_error_rate", "word error rate", "", "lower")

_OF_SHAPE: Final[Mapping[Shape, tuple[Quantity, ...]]] = {
    Shape.MULTIPLE_CHOICE: (ACCURACY, PER_BYTE, PER_CHARACTER),
    Shape.CLOZE: (ACCURACY, PERPLEXITY),
    Shape.CLASSIFICATION: (ACCURACY, PRECISION, RECALL, F1, CALIBRATION),
    Shape.QUESTION_ANSWERING: (EXACT_MATCH, TOKEN_F1),
    Shape.GENERATION: (ROUGE_1, ROUGE_2, ROUGE_L, BLEU, WORD_ERRORS),
}
_LONGEST_CLASSIFIED: Final = 512


@dataclass(frozen=True)
class _Scored:
    """What a suite gave, and the rules under which it did, beside those of every suite."""

    columns: tuple[Column, ...]
    protocol: Mapping[str, Any]


@final
class SuiteScores(Metric):
    """The scores of one suite.

    Args:
        source: its file; without one, the metric stands for all suites and measures nothing.

    Raises:
        DataError: the file cannot be read or its first line does not fit.
    """

    title = "suite of examples"
    stage = Stage.SCORING
    of_examples = True
    quantities = tuple(dict.fromkeys(quantity for all_ in _OF_SHAPE.values() for quantity in all_))

    def __init__(self, source: str = "") -> None:
        self._source = source
        if source:
            name = suite_name(source)
            self.quantities = tuple(quantity.of(name) for quantity in _OF_SHAPE[shape_of(source)])

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """One pass over the examples.

        Raises:
            DataError: the suite cannot be read, or a line does not fit.
            ValueError: there is no suite.
        """
        if not self._source:
            raise ValueError("a metric without a source stands for all suites and measures none")
        suite = read_suite(self._source, limit=subject.options.suite_limit)
        try:
            scored = _SCORERS[suite.shape](subject, suite.examples)
        except CompressError as error:
            return self.missing(error.message)
        except _DoesNotApply as error:
            return self.missing(str(error))
        protocol = {
            "suite": suite.digest,
            "shape": suite.shape.value,
            "examples": len(suite.examples),
            "dtype": subject.options.scoring_dtype,
            **scored.protocol,
        }
        complete = subject.options.suite_limit is None
        columns = [replace(column, quantity=column.quantity.of(suite.name)) for column in scored.columns]
        return {column.quantity.name: column.measurement(protocol, complete=complete) for column in columns}


class _DoesNotApply(Exception):
    """A suite that a model of this kind cannot do; the message says why."""


def _language_model(subject: Subject) -> Reader:
    if not subject.task.generates:
        raise _DoesNotApply(f"the suite needs a language model, and this is a {subject.task.title}")
    return Reader.of(subject)


def _multiple_choice(subject: Subject, examples: Sequence[MultipleChoice]) -> _Scored:
    """Every choice after its query; the most likely one is the answer, by three ways of counting.

    As lm-evaluation-harness's ``acc``, ``acc_bytes`` and ``acc_norm`` with a prompt that is the query.
    """
    reader = _language_model(subject)
    pairs = [(example.query, DELIMITER + choice) for example in examples for choice in example.choices]
    found = iter(likelihoods(subject, reader, pairs))
    scores = [[next(found).nats for _ in example.choices] for example in examples]
    lengths: tuple[tuple[Quantity, Callable[[str], int]], ...] = (
        (ACCURACY, lambda _: 1),
        (PER_BYTE, lambda choice: len(choice.encode())),
        (PER_CHARACTER, len),
    )
    columns = []
    for quantity, length in lengths:
        chosen = [
            int(np.argmax([nats / length(choice) for nats, choice in zip(row, example.choices, strict=True)]))
            for row, example in zip(scores, examples, strict=True)
        ]
        right = [float(one == example.gold) for one, example in zip(chosen, examples, strict=True)]
        columns.append(Column(quantity, right, answers=[str(one) for one in chosen]))
    return _Scored(tuple(columns), {"delimiter": DELIMITER, "longest": reader.longest})


def _cloze(subject: Subject, examples: Sequence[Cloze]) -> _Scored:
    """Whether every token of the continuation is the most likely one, and the continuation's perplexity.

    The perplexity is that of lm-evaluation-harness for LAMBADA: ``exp(mean nats a continuation)``, however
    many tokens each has.
    """
    reader = _language_model(subject)
    found = likelihoods(
        subject, reader, [(example.context, joined(example.continuation)) for example in examples]
    )
    said = [str(reader.tokenizer.decode(list(one.choice))) for one in found]
    columns = (
        Column(ACCURACY, [float(one.greedy) for one in found], answers=said),
        Column(PERPLEXITY, [-one.nats for one in found], "exponential-mean"),
    )
    return _Scored(columns, {"delimiter": DELIMITER, "longest": reader.longest})


def _classification(subject: Subject, examples: Sequence[Classification]) -> _Scored:
    """The label with the highest probability, and whether that probability can be believed."""
    if subject.task.name != "text-classification":
        raise _DoesNotApply(
            f"labels without choices need a classifier, and this is a {subject.task.title}; "
            "for a language model give query, choices and gold"
        )
    config = subject.artifact.config
    gold = np.array([number_of(example.label, config) for example in examples], dtype=np.int64)
    tokenizer = load_tokenizer(subject.artifact, trust_remote_code=subject.options.trust_remote_code)
    longest = min(int(config.get("max_position_embeddings") or _LONGEST_CLASSIFIED), _LONGEST_CLASSIFIED)
    texts = [example.text for example in examples]
    encoded = tokenizer(texts, truncation=True, max_length=min(longest, tokenizer.model_max_length))
    rows: list[Any] = [None] * len(examples)

    def take(numbers: list[int], logits: Any) -> None:
        for number, probabilities in zip(numbers, logits.double().softmax(-1).cpu().numpy(), strict=True):
            rows[number] = probabilities

    for_each_batch(subject, encoded["input_ids"], take)
    probabilities = np.stack(rows)
    if int(gold.max()) >= probabilities.shape[1]:
        raise DataError(f"label {gold.max()}, and the model knows {probabilities.shape[1]} labels")
    if not np.isfinite(probabilities).all():
        raise ModelError("the model computes NaN or infinite outputs")
    chosen = probabilities.argmax(-1)
    right = (chosen == gold).astype(np.float64)
    whole = macro(gold, chosen)
    columns = (
        Column(ACCURACY, right.tolist(), answers=[str(one) for one in chosen.tolist()]),
        Column(PRECISION, whole["precision"]),
        Column(RECALL, whole["recall"]),
        Column(F1, whole["f1"]),
        Column(CALIBRATION, calibration_error(probabilities.max(-1), right)),
    )
    return _Scored(columns, {"longest": longest})


def _question_answering(subject: Subject, examples: Sequence[QuestionAnswering]) -> _Scored:
    """The first line that the model writes, against any one of the right answers (SQuAD's own scores)."""
    reader = _language_model(subject)
    prompt = "Context: {context}\n\nQuestion: {question}\n\nAnswer:"
    prompts = [prompt.format(context=example.context, question=example.question) for example in examples]
    said = answers(subject, reader, prompts, _first_line)
    pairs = [(answer, example.answers) for answer, example in zip(said, examples, strict=True)]
    columns = (
        Column(EXACT_MATCH, [exact_match(*pair) for pair in pairs], answers=said),
        Column(TOKEN_F1, [token_f1(*pair) for pair in pairs]),
    )
    return _Scored(columns, {"prompt": prompt, "stop": "\n", **_writing(subject, reader)})


def _generation(subject: Subject, examples: Sequence[Generation]) -> _Scored:
    """What the model writes after the source, up to a blank line, against the reference."""
    reader = _language_model(subject)
    said = answers(subject, reader, [example.source for example in examples], _first_paragraph)
    references = [example.reference for example in examples]
    columns = (
        *_where_installed((ROUGE_1, ROUGE_2, ROUGE_L), lambda: _rouge_columns(said, references)),
        *_where_installed((BLEU,), lambda: [Column(BLEU, bleu(said, references))]),
        *_where_installed((WORD_ERRORS,), lambda: [_word_error_column(said, references)]),
    )
    return _Scored(columns, {"prompt": "{source}", "stop": "\n\n", **_writing(subject, reader)})


def _rouge_columns(said: Sequence[str], references: Sequence[str]) -> list[Column]:
    scores = rouge(said, references)
    named = ((ROUGE_1, "rouge1"), (ROUGE_2, "rouge2"), (ROUGE_L, "rougeL"))
    return [Column(quantity, scores[name]) for quantity, name in named]


def _word_error_column(said: Sequence[str], references: Sequence[str]) -> Column:
    rates, words = word_errors(said, references)
    return Column(WORD_ERRORS, rates, weights=words)


def _where_installed(quantities: Sequence[Quantity], scored: Callable[[], list[Column]]) -> list[Column]:
    """Columns of an optional package, or the reason why there are none."""
    try:
        return scored()
    except EnvironmentFault as error:
        return [Column(quantity, reason=error.message) for quantity in quantities]


def _writing(subject: Subject, reader: Reader) -> dict[str, Any]:
    return {"longest": reader.longest, "generated": subject.options.generated_tokens}


def _first_line(text: str) -> tuple[str, bool]:
    return _until(text, "\n")


def _first_paragraph(text: str) -> tuple[str, bool]:
    return _until(text, "\n\n")


def _until(text: str, stop: str) -> tuple[str, bool]:
    """The text up to a stop, and whether the stop was there; white space around it does not count."""
    answer, found, _ = text.lstrip().partition(stop)
    return answer.strip(), bool(found)


_SCORERS: Final[Mapping[Shape, Callable[[Subject, Any], _Scored]]] = {
    Shape.MULTIPLE_CHOICE: _multiple_choice,
    Shape.CLOZE: _cloze,
    Shape.CLASSIFICATION: _classification,
    Shape.QUESTION_ANSWERING: _question_answering,
    Shape.GENERATION: _generation,
}
