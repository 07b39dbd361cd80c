"""How much memory a model takes while it works.

Read after decoding (or encoding) at the timed shape, in a process that did nothing else. Anonymous memory
is what the process owns; file-backed memory are mapped weights that the system may drop and read again.
What the imports alone need is told apart, or small models would all look alike. Where a cgroup may be made,
its peak says what a container would need, page cache included. On a GPU, allocated memory is what tensors
take, reserved memory what torch keeps for them, and the process's memory holds the context and the kernels
as well: this is what must fit.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, final

import torch

from compress.bench.cgroup import peak_bytes
from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics.decode import decoded
from compress.core.measurement import Measurement

PEAK = Quantity("memory.peak_bytes", "peak memory", "B", "lower")
ABOVE_IMPORTS = Quantity("memory.peak_above_imports_bytes", "peak memory above imports", "B", "lower")
ANONYMOUS = Quantity("memory.anonymous_bytes", "anonymous memory", "B", "lower", shown=False)
FILE_BACKED = Quantity("memory.file_backed_bytes", "file-backed memory", "B", "lower", shown=False)
CHARGED = Quantity("memory.cgroup_peak_bytes", "peak of a memory cgroup", "B", "lower", shown=False)
WEIGHTS = Quantity("memory.weight_bytes", "weights in memory", "B", "lower")
ALLOCATED = Quantity("memory.device_allocated_bytes", "GPU memory allocated", "B", "lower")
RESERVED = Quantity("memory.device_reserved_bytes", "GPU memory reserved", "B", "lower", shown=False)
PROCESS = Quantity("memory.device_process_bytes", "GPU memory of the process", "B", "lower")
_DEVICE: Final = (ALLOCATED, RESERVED, PROCESS)

_STATUS: Final = Path("/proc/self/status")
_ROWS: Final = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file_backed"}


@final
class Memory(Metric):
    """Peak host memory, its parts, and the device's."""

    title = "memory"
    stage = Stage.MEMORY
    quantities = (PEAK, ABOVE_IMPORTS, ANONYMOUS, FILE_BACKED, CHARGED, WEIGHTS, *_DEVICE)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """After one pass over the timed shape."""
        session, prompts = subject.running, subject.given.prompts
        shape = {"batch": prompts.shape[0], "prompt": prompts.shape[1]}
        if subject.task.generates:
            decoded(session, session.prefill(prompts), subject.options.new_tokens)
            shape["new"] = subject.options.new_tokens
        else:
            session.outputs(prompts)
        session.synchronize()
        now, before = host_memory(), subject.baseline or {}
        found: dict[str, Measurement] = {}
        for quantity, kind in ((PEAK, "peak"), (ANONYMOUS, "anonymous"), (FILE_BACKED, "file_backed")):
            found[quantity.name] = _known(quantity, now.get(kind), shape)
        above = now["peak"] - before["resident"] if "peak" in now and "resident" in before else None
        found[ABOVE_IMPORTS.name] = _known(ABOVE_IMPORTS, above, shape)
        found[CHARGED.name] = _charged(subject, shape)
        found[WEIGHTS.name] = WEIGHTS.exact(session.facts["weight_bytes"])
        device = str(session.facts.get("device", ""))
        if not device.startswith("cuda"):
            reason = "the model does not run on a GPU"
            return found | {quantity.name: quantity.missing(reason) for quantity in _DEVICE}
        return found | _on_gpu(subject, torch.cuda.memory_stats(device), shape)


def _on_gpu(
    subject: Subject, statistics: Mapping[str, int], shape: Mapping[str, int]
) -> dict[str, Measurement]:
    """Peaks of torch's allocator, and what the driver counts for the process now.

    The allocator gives nothing back by itself, so the process holds its peak until it ends.
    """
    found = {
        quantity.name: quantity.exact(statistics[f"{kind}_bytes.all.peak"], shape)
        for quantity, kind in ((ALLOCATED, "allocated"), (RESERVED, "reserved"))
    }
    tenants = subject.tenants
    held = tenants if isinstance(tenants, str) else tenants.own_bytes()
    found[PROCESS.name] = PROCESS.missing(held) if isinstance(held, str) else PROCESS.exact(held, shape)
    return found


def _known(quantity: Quantity, value: int | None, shape: Mapping[str, int]) -> Measurement:
    if value is None:
        return quantity.missing(f"{_STATUS} does not say it on this system")
    return quantity.exact(value, shape)


def _charged(subject: Subject, shape: Mapping[str, int]) -> Measurement:
    if subject.charged is None:
        return CHARGED.missing(subject.uncharged)
    peak = peak_bytes(Path(subject.charged))
    return (
        CHARGED.missing("the cgroup does not tell its peak") if peak is None else CHARGED.exact(peak, shape)
    )


def host_memory() -> dict[str, int]:
    """Bytes of this process by kind: ``peak``, ``resident``, ``anonymous``, ``file_backed``.

    Empty where the system keeps no such account.
    """
    try:
        text = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    found = re.findall(r"^(\w+):\s+(\d+) kB$", text, flags=re.MULTILINE)
    return {_ROWS[name]: 1024 * int(count) for name, count in found if name in _ROWS}
