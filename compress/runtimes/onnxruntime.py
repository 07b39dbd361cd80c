"""ONNX Runtime, with inputs and outputs bound in place: what an exported artifact is served with.

Keys and values stay in ONNX Runtime's own tensors from step to step. The graph gives the logits of every
position of a prompt, also where only the last is wanted; torch's runtimes leave the others out, so the
prefill of an ONNX artifact is compared with that of another ONNX artifact, as the bench does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch

from compress.core.artifact import Artifact
from compress.core.facts import Fact
from compress.graph import GRAPH_FILE, INSTALL, missing_packages
from compress.models.tasks import Task
from compress.runtimes import Generation, Placement, Runtime, Session, Unavailable


@final
class OnnxRuntime(Runtime):
    """One graph in one session of ONNX Runtime."""

    name = "onnxruntime"
    title = "ONNX Runtime, inputs and outputs bound in place"
    loads = Fact.ONNX_GRAPH

    def prepared(
        self, artifact: Artifact, task: Task, folder: Path, *, trust_remote_code: bool = False
    ) -> Path:
        """See `Runtime.prepared`: a transformers artifact is exported in float32, with its parity checked."""
        if Fact.ONNX_GRAPH in artifact.facts:
            return artifact.path
        _require_packages()
        from compress.graph.building import export

        folder.mkdir(parents=True, exist_ok=True)
        export(artifact, task, folder, trust_remote_code=trust_remote_code)
        return folder

    def load(self, artifact: Artifact, task: Task, placement: Placement) -> Session:
        """See `Runtime.load`. The graph's own floats are used, whatever dtype is asked for."""
        path = artifact.path / GRAPH_FILE
        if not path.is_file():
            raise Unavailable(f"{artifact.path.name} holds no {GRAPH_FILE}")
        _require_packages()
        from compress.graph.running import Graph

        graph = Graph(path, device=placement.device)
        if task.generates and not graph.caches:
            raise Unavailable(f"the graph of {artifact.path.name} has no cache, so it cannot decode")
        return OnnxSession(graph, sum(file.stat().st_size for file in artifact.weight_files))


@final
class OnnxSession(Session):
    """A graph that runs.

    Args:
        graph: ready to run.
        size: bytes of its files, which stand for its weights where the graph does not say how many it holds.
    """

    def __init__(self, graph: Any, size: int) -> None:
        self._graph = graph
        self._facts: dict[str, Any] = {
            "device": str(graph.device),
            "dtype": str(graph.dtype).removeprefix("torch."),
            "providers": graph.providers,
            "weight_bytes": size,
            **graph.facts,
        }

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Session.facts`."""
        return self._facts

    def outputs(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Session.outputs`."""
        outputs: torch.Tensor = self._graph.run(tokens)[0]
        return outputs.float()

    def prefill(self, tokens: torch.Tensor) -> Generation:
        """See `Session.prefill`."""
        return self._step(tokens, None)

    def decode(self, state: Generation) -> Generation:
        """See `Session.decode`."""
        return self._step(state.tokens[:, None], state.cache)

    def _step(self, tokens: torch.Tensor, past: Any) -> Generation:
        outputs, cache = self._graph.run(tokens, past)
        # A view would keep the logits of the whole prompt.
        logits = outputs[:, -1] if tokens.shape[1] == 1 else outputs[:, -1].clone()
        return Generation(logits.argmax(-1), cache, cache.length, logits)

    def synchronize(self) -> None:
        """See `Session.synchronize`. A pass returns when its outputs are there."""


def _require_packages() -> None:
    absent = missing_packages()
    if absent:
        raise Unavailable(f"not installed: {', '.join(absent)} ({INSTALL})")
