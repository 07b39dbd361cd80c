"""A transformers artifact as an ONNX graph: how it is traced, run and held against the model it came from.

Both the pass that exports and the runtime that measures need it, and they do not know each other. What the
graph is made with (onnx, onnxscript) and run with (onnxruntime) are optional packages; nothing here
imports them, or torch, before they are needed.
"""

from importlib.util import find_spec
from typing import Final

from compress.core.errors import EnvironmentFault

GRAPH_FILE: Final = "model.onnx"
DATA_FILE: Final = "model.onnx.data"
FACTS_KEY: Final = "compress.facts"
"""Under which a graph's own metadata says, in JSON, what it holds: `compress.graph.running.Graph.facts`."""
INSTALL: Final = "pip install 'compress-models[onnx]', with a CUDA device 'compress-models[onnx-gpu]'"
_PACKAGES: Final = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")


def missing_packages() -> list[str]:
    """The optional packages of this room that are not installed."""
    return [name for name in _PACKAGES if find_spec(name) is None]


def require_packages() -> None:
    """Refuse to export where a package is missing.

    Raises:
        EnvironmentFault: naming the missing packages and how to install them.
    """
    absent = missing_packages()
    if absent:
        raise EnvironmentFault(f"ONNX needs {', '.join(absent)}, not installed here", INSTALL)
