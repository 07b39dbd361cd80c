"""The process in which one arm is measured: a request on standard input, a reply into a file.

Run as ``python -m compress.bench.worker REPLY``. It answers in JSON: measurements by quantity and the
runtime's facts, or that the runtime cannot run the model, or an error. Anything worse (a crash, a kill, a
hang) is seen by the process that started it (`compress.bench.isolate`).
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compress.bench import cgroup
from compress.bench.nursery import end_with
from compress.core.errors import CompressError

if TYPE_CHECKING:
    from compress.bench.nvml import Gpu, Tenants
    from compress.core.measurement import Measurement


LIBRARIES: Final = (
    "torch",
    "transformers.modeling_utils",
    "compress.bench.log_probabilities",
    "compress.bench.metrics",
    "compress.models.load",
    "compress.runtimes",
)
"""What every request needs and takes seconds to import."""


def main() -> None:
    """Answer one request."""
    end_with(os.getppid())
    request = json.loads(sys.stdin.readline())
    reply = Path(sys.argv[1])
    if request.get("cgroup") is not None:
        # Before torch is imported, so that its memory counts too.
        entered = cgroup.enter(request["cgroup"])
        request["charged" if isinstance(entered, Path) else "uncharged"] = str(entered)
    # Other libraries' warnings are not for the reader of a report.
    warnings.simplefilter("ignore")
    document = answer(request, _turns(request["turns"]))
    partial = reply.with_suffix(".partial")
    partial.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    partial.replace(reply)


def _turns(descriptor: int) -> Callable[[], None]:
    """What waits until it is this process's turn; the counterpart of `compress.bench.isolate.run`."""

    def take_turn() -> None:
        os.write(descriptor, b"\n")
        if not sys.stdin.readline():
            # Nobody is there any more who could give a turn.
            os._exit(1)

    return take_turn


def _none() -> None:
    """No process waits for this one."""


def answer(request: Mapping[str, Any], take_turn: Callable[[], None] = _none) -> dict[str, Any]:
    """Measure what a request asks for.

    Args:
        request: ``artifact``, ``loaded`` (the folder to load, if another), ``runtime``, ``task``,
            ``stage``, ``metrics``, ``device``, ``threads``, ``options``, ``material`` (path), for a
            comparison ``reference`` and ``reference_loaded`` (paths) and ``reference_runtime``, and
            ``stored``: whether the options' file of log-probabilities is of the reference, or without one of
            the artifact itself. Of a process of its own also ``charged``, the folder of its cgroup, or
            ``uncharged``, why it has none. On a GPU ``gpu``: its ``uuid``, and ``shared``, whether the
            process that asks holds a context there. At the stage ``preparing`` nothing is measured, and
            ``folder`` says where to write.
        take_turn: returns when no other process of the experiment works. It is called before the model is
            loaded, and from then on before each sample.

    Returns:
        ``prepared``, the folder to load; or ``measurements`` and ``facts``, and of a timed launch
        ``launch``: what was watched around it, and why it cannot be trusted; or ``unavailable``, a reason;
        or ``error`` with kind and message.
    """
    import torch

    from compress.runtimes import Unavailable

    torch.set_num_threads(int(request["threads"]))
    try:
        if request["stage"] == "preparing":
            return _prepared(request)
        return _measured(request, take_turn)
    except Unavailable as error:
        return {"unavailable": error.message}
    except CompressError as error:
        return {"error": {"kind": type(error).__name__, "message": str(error)}}
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {
            "error": {"kind": "out-of-memory", "message": str(error).splitlines()[0] if str(error) else ""}
        }
    except RuntimeError as error:
        # torch says that host memory ran out in no other way.
        kind = "out-of-memory" if "can't allocate memory" in str(error) else "RuntimeError"
        return {"error": {"kind": kind, "message": f"{type(error).__name__}: {error}"}}
    except Exception as error:  # noqa: BLE001 - a candidate may fail in any way; the report says which
        return {"error": {"kind": type(error).__name__, "message": f"{type(error).__name__}: {error}"}}


def _prepared(request: Mapping[str, Any]) -> dict[str, Any]:
    from compress.core.artifact import Artifact
    from compress.core.bench import Bench
    from compress.models.tasks import resolve
    from compress.runtimes import find as find_runtime

    artifact = Artifact.open(Path(request["artifact"]))
    found = find_runtime(request["runtime"]).prepared(
        artifact,
        resolve(request["task"], artifact.config),
        Path(request["folder"]),
        trust_remote_code=Bench.of(request["options"]).trust_remote_code,
    )
    return {"prepared": str(found)}


def _measured(request: Mapping[str, Any], take_turn: Callable[[], None]) -> dict[str, Any]:
    import torch

    from compress.bench import log_probabilities
    from compress.bench.bandwidth import Probe
    from compress.bench.clock import clock_of
    from compress.bench.material import Material
    from compress.bench.metrics import Stage, Subject, find
    from compress.bench.metrics.memory import host_memory
    from compress.bench.validity import Watch
    from compress.core.artifact import Artifact
    from compress.core.bench import Bench
    from compress.core.facts import Fact
    from compress.models.load import skeleton
    from compress.models.tasks import resolve
    from compress.runtimes import Placement
    from compress.runtimes import find as find_runtime

    options = Bench.of(request["options"])
    artifact = Artifact.open(Path(request["artifact"]))
    task = resolve(request["task"], artifact.config)
    dtype = options.scoring_dtype if request["stage"] == Stage.SCORING else options.dtype
    placement = Placement(request["device"], dtype, options.trust_remote_code)
    runtime = find_runtime(request["runtime"])
    material = Material.load(Path(request["material"]))
    if Fact.TRANSFORMERS in artifact.facts:
        # Imports the code of this architecture: importing is neither loading nor the model's memory.
        skeleton(artifact, task=task.name, trust_remote_code=options.trust_remote_code)
    gpu, tenants = _gpu(request)
    timed = request["stage"] == Stage.TIMING
    take_turn()
    baseline = host_memory()
    watch = Watch(options.steal_limit, gpu, tenants) if timed else None
    start = time.perf_counter()
    session = runtime.load(Artifact.open(Path(request.get("loaded", request["artifact"]))), task, placement)
    session.synchronize()
    seconds = time.perf_counter() - start
    reference, stored, recorder = None, None, None
    if request.get("reference") is not None:
        before = Artifact.open(Path(request["reference"]))
        named = request["reference_runtime"]
        if request.get("stored"):
            stored = log_probabilities.stored(before, named, material, options)
        if stored is None:
            loaded = Artifact.open(Path(request.get("reference_loaded", request["reference"])))
            reference = find_runtime(named).load(loaded, task, placement)
    elif request.get("stored"):
        recorder = log_probabilities.recorder(artifact, request["runtime"], material, options)
    clock = clock_of(session)
    subject = Subject(
        artifact=artifact,
        task=task,
        options=options,
        session=session,
        reference=reference,
        stored=stored,
        recorder=recorder,
        material=material,
        load_seconds=seconds,
        baseline=baseline,
        charged=request.get("charged"),
        uncharged=request.get("uncharged", "the model ran in the process that asked"),
        clock=clock,
        probe=Probe(str(session.facts.get("device", "")), clock, session) if timed else None,
        tenants=tenants,
        take_turn=take_turn,
    )
    measurements: dict[str, Measurement] = {}
    # Once for all, because entering this mode takes as long as some operations of a small model.
    with torch.inference_mode():
        for name in request["metrics"]:
            measurements |= find(name).measure(subject)
            if watch is not None:
                watch.look()
    if recorder is not None:
        recorder.save()
    reply: dict[str, Any] = {"facts": dict(session.facts)}
    if watch is not None:
        watched = watch.finish()
        conditions = {**watched.conditions, **subject.observed}
        reply["launch"] = {"conditions": conditions, "distrust": list(watched.distrust)}
        for reason in watched.distrust:
            measurements = {name: found.doubted(reason) for name, found in measurements.items()}
    reply["measurements"] = {name: found.model_dump(mode="json") for name, found in measurements.items()}
    return reply


def _gpu(request: Mapping[str, Any]) -> "tuple[Gpu | str | None, Tenants | str]":
    """The GPU of a request and who is on it, before this process is; or why that is not known."""
    from compress.bench.nvml import Tenants, open_gpu

    if request["device"] != "cuda":
        return None, "the model does not run on a GPU"
    asked = request.get("gpu") or {}
    gpu = open_gpu(asked["uuid"]) if asked else "the request does not name the GPU"
    if isinstance(gpu, str):
        return gpu, gpu
    return gpu, Tenants(gpu, os.getpid(), os.getppid(), parent_holds=asked["shared"])


if __name__ == "__main__":
    main()
