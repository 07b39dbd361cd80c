"""Tasks of lm-evaluation-harness: where they are, what they would run, and what they ask.

A task is a YAML file, one of those that come with the package ``lm-eval`` or one of the user's own. The file
is looked at before anything is made of it: what cannot be scored, or would run code that nobody allowed, is
refused before a model is compressed. Nothing here imports ``lm_eval`` before a task is loaded.
"""

import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from compress.bench.metrics import HARNESS
from compress.core.errors import DataError, EnvironmentFault, UsageError
from compress.data.suites import QuestionAnswering, Shape, Suite

FIRST_VERSION: Final = (0, 4, 13)
_INSTALL: Final = "pip install 'compress-models[lm-eval]'"
_NAMED: Final = re.compile(
    rb"^[\"']?(task|group)[\"']?:[ \t]*[\"']?([^\s\"'\[{][^\n\"']*?)[\"']?[ \t\r]*(?: #.*)?$", re.MULTILINE
)
_SEED: Final = 1234
"""Of the choice of few-shot examples, the harness's own default."""
_NOT_A_NAME: Final = re.compile(r"[^A-Za-z0-9_+@-]+")
_MOST_TOKENS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GREEDY: Final = frozenset({"until", "do_sample", "temperature", "top_p", "top_k", *_MOST_TOKENS})
_DEFAULT_TOKENS: Final = 256


class _Function(str):
    """A Python function that a task file names."""


class _Loader(yaml.SafeLoader):
    """YAML in which functions are names, so that reading a file runs nothing."""


_Loader.add_constructor("!function", lambda _, node: _Function(node.value))


@dataclass(frozen=True)
class Writing:
    """How the harness has an answer written.

    Attributes:
        most: tokens of the answer.
        stops: texts that end it, and are no part of it.
    """

    most: int
    stops: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Writing":
        """From the ``generation_kwargs`` of a task.

        Raises:
            UsageError: they ask for anything but the most likely token after token.
        """
        sampled = arguments.get("do_sample")
        if sampled or (sampled is None and float(arguments.get("temperature") or 0)):
            raise UsageError(
                "the task has its answers sampled, and the difference of two samples is mostly chance",
                "take a task whose generation_kwargs say do_sample: false",
            )
        unknown = sorted(arguments.keys() - _GREEDY)
        if unknown:
            raise UsageError(
                f"the task generates with {', '.join(unknown)}, and only greedy answers are measured",
                f"its generation_kwargs may hold {', '.join(sorted(_GREEDY))}",
            )
        lengths = [arguments[name] for name in _MOST_TOKENS if arguments.get(name) is not None]
        until = arguments.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(map(str, until))
        return cls(int((lengths or [_DEFAULT_TOKENS])[0]), tuple(stop for stop in stops if stop))

    def cut(self, text: str) -> tuple[str, bool]:
        """A text up to the first stop in it, and whether there was one."""
        answer = text
        for stop in self.stops:
            answer = answer.split(stop, 1)[0]
        return answer, len(answer) < len(text)


@dataclass(frozen=True)
class HarnessTask:
    """One task with its documents.

    Attributes:
        name: of the task, as quantities spell it.
        task: of the harness.
        columns: the metric and the filter behind each figure, by the name that ``lm_eval.`` goes before.
    """

    name: str
    task: Any
    columns: Mapping[str, tuple[str, str]]

    @classmethod
    def of(cls, task: Any) -> "HarnessTask":
        """From a task of the harness, before it is scored: scoring may add figures."""
        name = _spelt(task.task_name)
        filters = [each["name"] for each in task.get_config("filter_list") or ()] or ["none"]
        columns = {
            ".".join([name, *([] if kept == "none" else [_spelt(kept)]), _spelt(metric)]): (metric, kept)
            for kept in filters
            for metric in task.higher_is_better()
            if metric != "bypass"
        }
        return cls(name, task, columns)

    @property
    def version(self) -> str:
        """What the task's authors raise when its figures change."""
        return str(self.task.VERSION)

    def examples(self, limit: int | None) -> Suite:
        """What the task asks, for people, with a digest of its documents.

        Args:
            limit: the first so many documents.
        """
        digest = hashlib.sha256()
        examples = []
        for _, document in self.task.doc_iterator(limit=limit):
            example = _example(self.task, document)
            data = [document, example.question, example.answers]
            encoded = json.dumps(data, sort_keys=True, default=str).encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
            examples.append(example)
        return Suite(self.name, Shape.QUESTION_ANSWERING, tuple(examples), digest.hexdigest())


def find_task(source: str, *, trusted: bool) -> Path:
    """The file of a task that can be measured here.

    Args:
        source: ``lm-eval:NAME`` for one that the harness ships, or ``lm-eval:FILE.yaml``.
        trusted: whether Python functions beside a file of the user's own, and metrics whose code lies on
            the hub, may run.

    Raises:
        EnvironmentFault: the harness is not installed, or is too old.
        UsageError: there is no such task, it is a group, or it asks for what is not measured or not trusted.
        DataError: the file cannot be read.
    """
    name = source.removeprefix(HARNESS)
    shipped = _shipped()
    if name.endswith((".yaml", ".yml")):
        file = Path(name).expanduser().resolve()
        if not file.is_file():
            raise DataError(f"there is no task file {file}", f"expected {HARNESS}NAME or {HARNESS}FILE.yaml")
    else:
        file = _named(name)
    configuration = _configuration(file, shipped)
    if "group" in configuration:
        raise UsageError(f"{source} is a group of tasks", "name its tasks one by one")
    if not isinstance(configuration.get("task"), str):
        raise DataError(f"{file} has no 'task', the name of a task", "see the harness's guide to new tasks")
    _check_scorable(source, configuration)
    if not trusted:
        _check_code(source, configuration)
    return file


@cache
def load(file: Path) -> HarnessTask:
    """Make a task, and read its data, from the hub where it names a data set there.

    Runs the Python functions that the file names: `find_task` says whether it may.

    Raises:
        EnvironmentFault: the data cannot be reached.
        DataError: there are no such data, or they do not fit the task.
    """
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from lm_eval.tasks import TaskManager

    try:
        with quiet(), seeded():
            task = TaskManager(include_defaults=False).load(str(file))["tasks"].popitem()[1]
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            documents = len(task.eval_docs)
    except (DatasetNotFoundError, ConnectionError, TimeoutError) as error:
        raise EnvironmentFault(
            f"the data of task {file.stem} are not in the cache and cannot be had: {_first_line(error)}",
            "connect to the hub once, or give a task file whose data_files are at hand",
        ) from error
    except (DatasetsError, OSError, *TASK_ERRORS) as error:
        raise DataError(
            f"task {file} cannot be loaded: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not documents:
        raise DataError(f"task {file} has no document")
    return HarnessTask.of(task)


TASK_ERRORS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    yaml.YAMLError,
)
"""How the code of a task fails, where neither memory nor the model is at fault."""


@contextmanager
def seeded(task: Any = None) -> Iterator[None]:
    """A task that draws at random draws what it draws in the harness's own runs, and nobody else does.

    Args:
        task: of the harness, whose few-shot examples are drawn anew.
    """
    if task is not None:
        task.set_fewshot_seed(seed=_SEED)
    numbers, arrays = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(_SEED)
    try:
        yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)


@contextmanager
def quiet() -> Iterator[None]:
    """Without notes on defaults and retries: what is wrong is said by the error at the end."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _shipped() -> Path:
    """The folder of the harness's own tasks."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise EnvironmentFault(
            "tasks of lm-evaluation-harness need the package lm-eval, which is not installed", _INSTALL
        )
    version = importlib.metadata.version("lm_eval")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < FIRST_VERSION:
        least = ".".join(map(str, FIRST_VERSION))
        raise EnvironmentFault(f"lm-eval {version} is installed, expected {least} or later", _INSTALL)
    return Path(spec.origin).resolve().parent / "tasks"


def _named(name: str) -> Path:
    known = _index(_shipped())
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else "`lm-eval ls tasks` lists all of them"
    raise UsageError(f"lm-evaluation-harness has no task '{name}'", hint)


@cache
def _index(folder: Path) -> dict[str, Path]:
    """The file of every task and group by name.

    Their names are searched as text: the harness's own index parses some ten thousand files for it.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml"), key=Path.as_posix):
        names = {key: name.decode(errors="replace") for key, name in _NAMED.findall(file.read_bytes())}
        name = names.get(b"group", names.get(b"task"))
        if name is not None:
            found.setdefault(name, file)
    return found


def _configuration(file: Path, shipped: Path, seen: frozenset[Path] = frozenset()) -> dict[str, Any]:
    """A task file and what it includes, without running anything.

    A function of the user's own is a `_Function`, one that comes with the harness is plain text.
    """
    if file in seen:
        raise DataError(f"{file} includes itself")
    try:
        own: Any = yaml.load(file.read_bytes(), Loader=_Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"task file {file} cannot be read: {_first_line(error)}") from error
    if not isinstance(own, dict):
        raise DataError(f"task file {file} holds {type(own).__name__}, expected keys and values")
    if file.is_relative_to(shipped):
        own = _without_functions(own)
    whole: dict[str, Any] = {}
    included = own.pop("include", [])
    for part in included if isinstance(included, list) else [included]:
        whole |= _configuration((file.parent / part).resolve(), shipped, seen | {file})
    whole |= own
    return whole


def _without_functions(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_functions(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_functions(part) for part in value]
    return str(value) if isinstance(value, _Function) else value


def _functions(value: Any) -> Iterator[str]:
    if isinstance(value, _Function):
        yield str(value)
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _functions(part)


def _check_scorable(source: str, configuration: Mapping[str, Any]) -> None:
    if configuration.get("unsafe_code"):
        raise UsageError(f"{source} runs code that the model writes, which is not done here")
    if configuration.get("doc_to_image") or configuration.get("doc_to_audio"):
        raise UsageError(f"{source} shows images or plays sounds, and only text is measured")
    if configuration.get("output_type", "generate_until") == "generate_until":
        try:
            Writing.of(configuration.get("generation_kwargs") or {})
        except UsageError as error:
            raise UsageError(f"{source}: {error.message}", error.hint) from error


def _check_code(source: str, configuration: Mapping[str, Any]) -> None:
    """Refuse code that comes neither with us nor with the harness."""
    function = next(_functions(configuration), None)
    if function is not None:
        raise UsageError(
            f"{source} runs the Python function {function}",
            "set trust_remote_code: true if you trust the files beside it",
        )
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import METRIC_REGISTRY

    for each in configuration.get("metric_list") or ():
        computed_here = each.get("metric") in METRIC_REGISTRY or configuration.get("process_results")
        if each.get("hf_evaluate") or not computed_here:
            raise UsageError(
                f"{source}: the code of metric '{each.get('metric')}' lies on the hub",
                "set trust_remote_code: true if you trust it",
            )


def _example(task: Any, document: Any) -> QuestionAnswering:
    """A document as a question with its right answers, to be shown."""
    text, target = task.doc_to_text(document), task.doc_to_target(document)
    choices = task.doc_to_choice(document) if task.get_config("doc_to_choice") is not None else []
    if isinstance(text, int):
        # The choices are the contexts, and all of them go on alike.
        text, target = str(target), text
    right = target if isinstance(target, list) else [target]
    named = [
        choices[one] if isinstance(one, int) and 0 <= one < len(choices) else one for one in right or [""]
    ]
    return QuestionAnswering(str(text), "", tuple(map(str, named)))


def _spelt(name: str) -> str:
    """A name as part of a quantity's name."""
    return _NOT_A_NAME.sub("-", name).strip("-")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
