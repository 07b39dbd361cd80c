"""How a model does a task of lm-evaluation-harness: ``lm_eval.piqa.acc`` for ``lm-eval:piqa``.

The task, with its prompts, few-shot examples, filters and metrics, is the harness's own; the model runs on
our sessions. What each document gave is kept, so that two models are compared document by document. A metric
that the harness computes from all documents at once gives no such samples, and no value here.
"""

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._columns import Column
from compress.core.errors import CompressError
from compress.core.measurement import Direction, Measurement, Summary

_TEMPLATE: Final = Quantity("lm_eval.*", "lm-evaluation-harness", "", "higher")
_BETTER: Final[Mapping[bool | None, Direction]] = {True: "higher", False: "lower", None: "neither"}


@final
class HarnessScores(Metric):
    """The scores of one task.

    Args:
        source: its file, which `metrics_of` has found and checked; without one, the metric stands for all
            tasks and measures nothing.

    Raises:
        EnvironmentFault, DataError: the task's data cannot be had.
    """

    title = "task of lm-evaluation-harness"
    stage = Stage.SCORING
    of_examples = True
    quantities: tuple[Quantity, ...] = (_TEMPLATE,)

    def __init__(self, source: str = "") -> None:
        self._file = Path(source) if source else None
        if self._file is not None:
            from compress.bench.metrics._harness_tasks import load

            found = load(self._file)
            better = found.task.higher_is_better()
            self.quantities = tuple(
                replace(_TEMPLATE.of(name), better=_BETTER[better[metric]])
                for name, (metric, _) in found.columns.items()
            )

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """One pass over the documents.

        Raises:
            ValueError: there is no task.
        """
        if self._file is None:
            raise ValueError("a metric without a source stands for all tasks and measures none")
        if not subject.task.generates:
            return self.missing(f"the task needs a language model, and this is a {subject.task.title}")
        from compress.bench.metrics._harness_tasks import TASK_ERRORS

        try:
            return self._measured(subject, self._file)
        except CompressError as error:
            return self.missing(error.message)
        except TASK_ERRORS as error:
            return self.missing(f"the task's own code fails: {type(error).__name__}: {error}")

    def _measured(self, subject: Subject, file: Path) -> dict[str, Measurement]:
        from lm_eval.evaluator import evaluate

        from compress.bench.metrics._harness_model import SessionModel
        from compress.bench.metrics._harness_tasks import load, quiet, seeded
        from compress.bench.metrics._likelihood import Reader

        found, reader = load(file), Reader.of(subject)
        model = SessionModel(subject, reader)
        limit = subject.options.suite_limit
        with quiet(), seeded(found.task):
            results = evaluate(
                model, {"tasks": {found.name: found.task}}, limit=limit, bootstrap_iters=0, log_samples=True
            )
        rows = results["samples"][found.name]
        protocol = {
            "suite": found.examples(limit).digest,
            "task": found.name,
            "version": found.version,
            "few_shot": found.task.get_config("num_fewshot"),
            "requests": _digest([row["arguments"] for row in rows]),
            "examples": len({row["doc_id"] for row in rows}),
            "lm_eval": importlib.metadata.version("lm_eval"),
            "longest": reader.longest,
            "dtype": subject.options.scoring_dtype,
        }
        measurements = {}
        for quantity, (metric, kept) in zip(self.quantities, found.columns.values(), strict=True):
            ordered = sorted((row for row in rows if row["filter"] == kept), key=lambda row: row["doc_id"])
            whole = results["results"][found.name].get(f"{metric},{kept}")
            column = _column(quantity, found.task, metric, ordered, whole)
            answered = replace(column, answers=_answers(found.task, metric, ordered, model.said, column))
            measurements[quantity.name] = answered.measurement(protocol, complete=limit is None)
        return measurements


def _column(
    quantity: Quantity, task: Any, metric: str, rows: Sequence[Mapping[str, Any]], whole: Any
) -> Column:
    """What a metric gave for each document, so that its summary is what the harness makes of all of them."""
    from lm_eval.api.registry import get_aggregation

    if not rows or any(metric not in row for row in rows):
        return Column(quantity, reason=f"the task gives no '{metric}' for its documents")
    values = [row[metric] for row in rows]
    aggregation = task.aggregation().get(metric)
    if aggregation in (get_aggregation("mean"), get_aggregation("nanmean")):
        if not all(isinstance(value, int | float | np.number | np.bool_) for value in values):
            return Column(quantity, reason=f"the task gives no number as '{metric}' of a document")
        return Column(quantity, tuple(float(value) for value in values))
    if aggregation == get_aggregation("perplexity"):
        return Column(quantity, tuple(-float(value) for value in values), "exponential-mean")
    weighted: dict[Any, tuple[float, Summary]] = {
        get_aggregation("weighted_perplexity"): (1.0, "exponential-mean"),
        get_aggregation("bits_per_byte"): (math.log(2), "mean"),
    }
    if aggregation in weighted:
        unit, summary = weighted[aggregation]
        each = tuple(-nats / weight / unit for nats, weight in values)
        return Column(quantity, each, summary, tuple(float(weight) for _, weight in values))
    value = f" ({whole:.5g})" if isinstance(whole, float) else ""
    return Column(
        quantity,
        reason=f"the harness makes '{metric}'{value} from all documents at once, which leaves no sample "
        "to compare",
    )


def _answers(
    task: Any,
    metric: str,
    rows: Sequence[Mapping[str, Any]],
    said: Mapping[tuple[str, str], str],
    column: Column,
) -> list[str] | None:
    """What was answered to each document, where an answer is right or wrong by it."""
    if not set(column.samples) <= {0.0, 1.0}:
        return None
    if task.OUTPUT_TYPE == "generate_until":
        return [str(row["filtered_resps"][0]) for row in rows]
    if task.OUTPUT_TYPE == "loglikelihood":
        return [said[tuple(row["arguments"][0])] for row in rows]
    length = _LENGTHS.get(metric)
    if task.OUTPUT_TYPE != "multiple_choice" or length is None:
        return None
    chosen = []
    for row in rows:
        choices = task.doc_to_choice(row["doc"])
        nats = [response[0] for response in row["filtered_resps"]][: len(choices)]
        scores = [one / length(choice) for one, choice in zip(nats, choices, strict=True)]
        chosen.append(str(choices[int(np.argmax(scores))]))
    return chosen


_LENGTHS: Final[Mapping[str, Any]] = {
    "acc": lambda _: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
