"""The key of a step: what it would compute, from everything that can change a byte of the result."""

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.core.passes import Delegating, Pass, find, name_of

# Libraries whose version may change the bytes of a result.
_LIBRARIES = ("torch", "transformers", "compressed-tensors", "tokenizers", "safetensors")


def step_key(parent: str, method: Pass, circumstances: Mapping[str, Any]) -> str:
    """SHA-256 over the parent's digest, the pass with all options, and the circumstances of the run."""
    code = [code_digest(type(method))]
    if isinstance(method, Delegating):
        code.append(code_digest(type(method.delegate)))
    document = {
        "parent": parent,
        "use": name_of(method),
        "options": method.model_dump(mode="json"),
        "circumstances": dict(circumstances),
        "code": code,
        "libraries": libraries(),
        "machine": platform.machine(),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@cache
def libraries() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


@cache
def code_digest(method: type[Pass]) -> str:
    """SHA-256 over our own code as far as it can change a result, and over a foreign method's file.

    The command line and the benchmark read results and do not make them.
    """
    root = Path(__file__).resolve().parent.parent
    rooms = (
        *("core", "numerics", "models", "data", "formats", "graph"),
        *("sweep", "training", "runtimes", "conversion"),
    )
    family, _, own = name_of(method).partition(".")
    files = [file for room in rooms for file in sorted((root / room).rglob("*.py"))]
    files.append(root / family / f"{own}.py")
    module = find(name_of(method)).__module__
    if not module.startswith("compress."):
        import inspect

        files.append(Path(inspect.getfile(method)))
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
