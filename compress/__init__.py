"""Make language models smaller, faster and cheaper, and prove it.

The public names load when they are first used, so that ``import compress`` costs nothing and the
command line answers at once:

- `run`: run a recipe, the same way as ``compress run``.
- `Recipe`, `Step`, `Data`, `Bench`: what to run.
- `build`, `find`, `names`: passes by name (``quantize.gptq``).
- `Artifact`: a model folder with its lineage.
- `verify`, `inspect`: look at a finished artifact.
- `CompressError`: every error that a user can act on.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.bench import Bench
    from compress.core.errors import CompressError
    from compress.core.passes import Pass, build, find, names
    from compress.core.recipe import Data, Recipe, Step
    from compress.engine import inspect, run, verify

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "compress.core.artifact",
    "Bench": "compress.core.bench",
    "CompressError": "compress.core.errors",
    "Data": "compress.core.recipe",
    "Pass": "compress.core.passes",
    "Recipe": "compress.core.recipe",
    "Step": "compress.core.recipe",
    "build": "compress.core.passes",
    "find": "compress.core.passes",
    "inspect": "compress.engine",
    "names": "compress.core.passes",
    "run": "compress.engine",
    "verify": "compress.engine",
}

__all__ = [
    "Artifact",
    "Bench",
    "CompressError",
    "Data",
    "Pass",
    "Recipe",
    "Step",
    "__version__",
    "build",
    "find",
    "inspect",
    "names",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
