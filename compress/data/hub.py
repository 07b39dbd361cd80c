"""Data sets of the Hugging Face hub, through the optional package ``datasets``."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compress.core.errors import DataError, EnvironmentFault, UsageError, did_you_mean

_FORM = "hf:NAME[:CONFIG][:SPLIT][:COLUMN]"


@dataclass(frozen=True)
class HubName:
    """What is asked of the hub; an empty part takes the default."""

    name: str
    config: str = ""
    split: str = ""
    column: str = ""

    @classmethod
    def parse(cls, source: str) -> "HubName":
        """Read ``hf:NAME[:CONFIG][:SPLIT][:COLUMN]``; the ``hf:`` may be left out.

        Raises:
            UsageError: it has no name or more than four parts. A slice in brackets may hold colons.
        """
        parts: list[str] = []
        for part in source.removeprefix("hf:").split(":"):
            if parts and parts[-1].count("[") > parts[-1].count("]"):
                parts[-1] += ":" + part
            else:
                parts.append(part)
        if not parts[0] or len(parts) > 4:
            raise UsageError(f"'{source}' does not name a data set", f"expected {_FORM}")
        return cls(*parts)


def hub_records(wanted: HubName) -> Iterator[dict[str, Any]]:
    """The rows of a data set, one at a time; the data set lies in the cache of ``datasets``.

    Raises:
        EnvironmentFault: the package is missing, or the hub cannot be reached.
        DataError: there is no such data set, configuration, split or column.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
    except ImportError as error:
        raise EnvironmentFault(
            f"hub data set '{wanted.name}' needs the package datasets, which is not installed",
            "pip install datasets, or give a text file",
        ) from error
    try:
        with _quiet():
            loaded = datasets.load_dataset(wanted.name, wanted.config or None, split=wanted.split or None)
    except DatasetNotFoundError as error:
        raise DataError(
            f"no text file and no hub data set is called '{wanted.name}': {_first_line(error)}",
            "check the spelling, or give the path of a file",
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise EnvironmentFault(
            f"'{wanted.name}' is no file, and the hub cannot be reached for a data set of that name",
            "give the path of a text file, or connect to the hub",
        ) from error
    except (DatasetsError, ValueError, OSError) as error:
        raise DataError(f"hub data set '{wanted.name}' cannot be read: {_first_line(error)}") from error
    if isinstance(loaded, dict):
        loaded = loaded[_split(wanted, list(loaded))]
    for row in loaded:
        yield dict(row)


def _split(wanted: HubName, splits: list[str]) -> str:
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise DataError(
        f"hub data set '{wanted.name}' has the splits {', '.join(splits)} and none is called 'train'",
        f"name one: {_FORM}; {did_you_mean('train', splits)}",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub client's notes on every retry: the error at the end says it once."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
