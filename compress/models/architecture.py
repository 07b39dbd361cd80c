"""What can be found out from a model's architecture alone is found once in a process.

Where factors can go, who reads the residual stream and what heads are made of depend on the configuration
and on no weight, and finding them runs a skeleton many times. A plan needs the answer before a run starts,
the run needs it again, and so does the next step of a recipe whose model has the same shape.
"""

import json
from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch

from compress.core.artifact import Artifact
from compress.core.run import Run
from compress.models.load import skeleton

_REMEMBERED: Final = 32
"""Answers that are kept; the oldest goes first."""

Found = TypeVar("Found")
_found: dict[tuple[object, ...], Any] = {}


def found_in(
    search: Callable[[Any], Found], source: Artifact, run: Run, dtype: torch.dtype = torch.float64
) -> Found:
    """What a search finds in the skeleton of a model, from memory where the same was asked before.

    Args:
        search: of a skeleton, which is of no other use afterwards. It must look at nothing else, and what
            it gives must not be changed by who gets it.
        source: the model.
        run: its task, and whether its code may run.
        dtype: of the skeleton.

    Raises:
        CompressError: as the search or the building of the skeleton; nothing is remembered then.
    """
    # A model that brings its own code is told by where that lies, any other by its configuration.
    place = source.path.resolve() if run.trust_remote_code else None
    configuration = json.dumps(dict(source.config), sort_keys=True)
    key = (search, configuration, run.task, run.trust_remote_code, place, dtype)
    if key not in _found:
        model = skeleton(source, task=run.task, dtype=dtype, trust_remote_code=run.trust_remote_code)
        answer = search(model)
        while len(_found) >= _REMEMBERED:
            del _found[next(iter(_found))]
        _found[key] = answer
    known: Found = _found[key]
    return known


def forget() -> None:
    """Let go of every answer: what a search would find has changed with the code that it runs."""
    _found.clear()
