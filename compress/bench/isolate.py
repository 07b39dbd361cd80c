"""A measurement in a process of its own: JSON in, JSON out.

Whatever happens to a candidate (it crashes in native code, is killed, runs out of memory, hangs) happens
to its process alone and becomes a row that says so; the other arms stand. A fresh process is also the only
honest start of a timing: no allocator, cache or thread pool is warm from the arm before.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from compress.bench import cgroup
from compress.bench.results import Fault

WORKER: Final = (sys.executable, "-m", "compress.bench.worker")
_TAIL: Final = 2_000
"""Characters of a dying process's last words that are kept."""
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        document: the worker's answer; empty where it gave none.
        fault: how the process ended, if not well.
    """

    document: Mapping[str, Any] = field(default_factory=dict)
    fault: Fault | None = None


def run(
    request: Mapping[str, Any],
    *,
    stage: str,
    time_limit: float,
    threads: int,
    command: Sequence[str] = WORKER,
) -> Reply:
    """Run one request in a fresh process and wait for it.

    The process gets the request on its standard input and the path of its reply as its last argument. Its
    output is kept for the last words of a crash and shown to nobody.

    Args:
        request: anything that JSON can say.
        stage: what is measured, for the record.
        time_limit: seconds; then the process and all that it started are killed.
        threads: of its arithmetic libraries, set before they are imported.
        command: the worker.
    """
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as folder:
        answer = Path(folder) / "reply.json"
        words = Path(folder) / "output.txt"
        environment = {
            **os.environ,
            **dict.fromkeys(_THREADS, str(threads)),
            "TOKENIZERS_PARALLELISM": "false",
        }
        root = str(Path(__file__).resolve().parents[2])
        path = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{path}" if path else root
        with words.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(answer)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            late = False
            try:
                process.communicate(json.dumps(request).encode(), timeout=time_limit)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                # Also when we ourselves are interrupted: nothing may go on running behind.
                if process.poll() is None:
                    _kill(process)
                if request.get("cgroup") is not None:
                    cgroup.remove(request["cgroup"])
        if late:
            return Reply(fault=Fault(stage=stage, kind="timed-out", message=f"no end after {time_limit:g} s"))
        return _judged(process.returncode, answer, words, stage)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process and the session that it leads."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _judged(code: int, answer: Path, words: Path, stage: str) -> Reply:
    said = words.read_text(encoding="utf-8", errors="replace").strip()[-_TAIL:]
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else f"signal {-code}"
        if -code == signal.SIGKILL:
            message = f"ended by {name}, as the system does to a process that takes too much memory"
            return Reply(fault=Fault(stage=stage, kind="killed", message=message))
        return Reply(fault=Fault(stage=stage, kind="crashed", message=_joined(f"ended by {name}", said)))
    try:
        document = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Reply(
            fault=Fault(stage=stage, kind="crashed", message=_joined(f"ended with code {code}", said))
        )
    error = document.get("error")
    if error is not None:
        kind = "out-of-memory" if error["kind"] == "out-of-memory" else "failed"
        return Reply(document, Fault(stage=stage, kind=kind, message=error["message"]))
    return Reply(document)


def _joined(what: str, said: str) -> str:
    last = said.splitlines()[-1] if said else ""
    return f"{what}: {last}" if last else what
