"""What can be learned of a model before it is compressed: nothing is kept but the answer."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.errors import UsageError
from compress.core.events import SILENT, Reporter
from compress.core.recipe import Recipe
from compress.engine.planning import examined, plan

if TYPE_CHECKING:
    from compress.sweep.importance import Importance
    from compress.sweep.sensitivity import Sensitivity


def sensitivity(recipe: Recipe | Mapping[str, Any], *, reporter: Reporter = SILENT) -> "list[Sensitivity]":
    """Round every part of a model alone, to each number of bits, and say what that does to its output.

    Args:
        recipe: of one step, ``quantize.auto``, whose candidates are the numbers of bits; nothing is rounded
            for good.
        reporter: who is told what happens.

    Raises:
        UsageError: the recipe's step is another.
        CompressError: of the kind that fits.
    """
    import torch

    from compress.quantize.auto import Auto

    recipe = recipe if isinstance(recipe, Recipe) else Recipe.of(recipe)
    method = recipe.steps[0].built()
    if len(recipe.steps) > 1 or not isinstance(method, Auto):
        raise UsageError(
            f"sensitivity is measured by quantize.auto alone, got {', '.join(s.use for s in recipe.steps)}"
        )
    with tempfile.TemporaryDirectory(prefix="compress-analysis-") as scratch:
        planned = plan(recipe, Path(scratch) / "nothing", reporter=reporter, single=True)
        torch.set_num_threads(planned.run.threads)
        return method.measured(planned.source, replace(planned.run, scratch=Path(scratch)))


def importance(
    recipe: Recipe | Mapping[str, Any], *, taylor: bool = False, reporter: Reporter = SILENT
) -> "Importance":
    """Measure how much the blocks, heads and channels of a model do.

    Args:
        recipe: of one step, ``prune.depth``, which says by what blocks are judged: with ``by: loss`` the
            model is run without each of them too. Nothing is taken out.
        taylor: whether gradients of the loss are taken for heads and channels.
        reporter: who is told what happens.

    Raises:
        UsageError: the recipe's step is another.
        CompressError: of the kind that fits.
    """
    import torch

    from compress.prune.depth import Depth
    from compress.sweep.importance import measure_importance

    recipe = recipe if isinstance(recipe, Recipe) else Recipe.of(recipe)
    method = recipe.steps[0].built()
    if len(recipe.steps) > 1 or not isinstance(method, Depth):
        raise UsageError(
            f"importance is measured as prune.depth alone does, got {', '.join(s.use for s in recipe.steps)}"
        )
    source, run = examined(recipe, reporter)
    torch.set_num_threads(run.threads)
    with tempfile.TemporaryDirectory(prefix="compress-analysis-") as scratch:
        run = replace(run, scratch=Path(scratch))
        return measure_importance(source, run, loss=method.by == "loss", taylor=taylor)
