"""What a GPU's driver says of it: who uses it, what held its clocks back, whose memory is whose.

Through NVML, by the GPU's UUID: torch's device 0 is the first that ``CUDA_VISIBLE_DEVICES`` allows, NVML's
index 0 is the first in the machine. The library (``nvidia-ml-py``) is optional; without it there is a
reason in place of each number. Units and meaning: NVML API reference, "Device Queries" and "Field Value
Queries".
"""

import importlib
from dataclasses import dataclass
from typing import Any, Final, final

SLOWDOWNS: Final = {
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "thermal slowdown by the driver",
    "nvmlClocksEventReasonHwThermalSlowdown": "thermal slowdown by the hardware",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}
"""Reasons for which a GPU runs slower than it does by itself."""
POWER_CAP: Final = "nvmlClocksEventReasonSwPowerCap"
"""The GPU is at its power limit: under load that is how many of them run all day."""
_COUNTERS: Final = {
    "NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN": "thermal slowdown by the driver",
    "NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN": "thermal slowdown by the hardware",
    "NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN": "power brake",
}
"""Nanoseconds for which each reason held, since the driver was loaded; newer drivers have them."""
_VALUES: Final = {1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal"}
"""Where a field's value lies, by nvmlValueType_t."""


@dataclass(frozen=True)
class Clocks:
    """What holds a GPU's clocks back.

    Attributes:
        slowdowns: reasons that hold now, in words.
        power_cap: whether it is at its power limit now.
        slowed: nanoseconds for which each reason has held so far; those that the driver counts.
    """

    slowdowns: tuple[str, ...]
    power_cap: bool
    slowed: dict[str, int]


@final
class Gpu:
    """One GPU. Use `open_gpu`."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library = library
        self._handle = handle

    def processes(self) -> dict[int, int | None] | str:
        """Processes that compute on it, with their bytes where the driver tells them; or why none are told.

        Process numbers are the host's: in a container they may be others than the process's own.
        """
        try:
            found = self._library.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._library.NVMLError as error:
            return f"NVML does not list the GPU's processes: {error}"
        return {int(entry.pid): entry.usedGpuMemory for entry in found}

    def clocks(self) -> Clocks | str:
        """What holds its clocks back, or why that is not known."""
        try:
            reasons = self._library.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
        except self._library.NVMLError as error:
            return f"NVML does not tell what slows the GPU down: {error}"
        holding = tuple(words for name, words in SLOWDOWNS.items() if reasons & getattr(self._library, name))
        return Clocks(holding, bool(reasons & getattr(self._library, POWER_CAP)), self._slowed())

    def described(self) -> dict[str, Any]:
        """Driver and power limit, for the record; those that the driver tells."""
        found: dict[str, Any] = {}
        try:
            found["driver"] = self._library.nvmlSystemGetDriverVersion()
            milliwatts = self._library.nvmlDeviceGetPowerManagementLimit(self._handle)
            found["power_limit_watts"] = milliwatts / 1e3
        except self._library.NVMLError as error:
            found["undescribed"] = str(error)
        return found

    def _slowed(self) -> dict[str, int]:
        known = {
            getattr(self._library, name): words
            for name, words in _COUNTERS.items()
            if hasattr(self._library, name)
        }
        if not known:
            return {}
        try:
            values = self._library.nvmlDeviceGetFieldValues(self._handle, list(known))
        except self._library.NVMLError:
            # An older driver; the reasons that hold now are all there is.
            return {}
        return {
            known[value.fieldId]: int(getattr(value.value, _VALUES[value.valueType]))
            for value in values
            if value.nvmlReturn == 0 and value.valueType in _VALUES
        }


def open_gpu(uuid: str, library: Any = None) -> Gpu | str:
    """The GPU with a UUID, or why it cannot be asked.

    Args:
        uuid: as torch spells it, or with NVML's prefix.
        library: in place of ``pynvml``; for tests.
    """
    if library is None:
        try:
            library = importlib.import_module("pynvml")
        except ImportError:
            return "nvidia-ml-py is not installed (pip install 'compress-models[gpu]')"
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        return f"NVML does not start: {error}"
    said = ""
    # A slice of a GPU has a UUID as well, under another prefix.
    for name in [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]:
        try:
            return Gpu(library, library.nvmlDeviceGetHandleByUUID(name))
        except library.NVMLError as error:
            said = str(error)
    return f"NVML does not know the GPU {uuid}: {said}"


@final
class Tenants:
    """Who is on a GPU while one process of ours is: which entry is ours, and who else was there.

    Made before the process has a context. Process numbers of a container are not those that NVML lists, so
    the entry that is ours is the one with our number, else the only one that came when our context was
    made; where several came, all of them count as foreign, since one is.

    Args:
        gpu: which one.
        own: our process number.
        parent: number of the process that started us: it may hold a context, and waits for us.
        parent_holds: whether it does; where its number is not in the list, one entry may then be its own.
    """

    def __init__(self, gpu: Gpu, own: int, parent: int, *, parent_holds: bool) -> None:
        self._gpu = gpu
        self._own = own
        self._entry: int | None = None
        self.unknown: str | None = None
        before = gpu.processes()
        if isinstance(before, str):
            self.unknown = before
            before = {}
        self._ignored = {parent} & set(before)
        strangers = set(before) - self._ignored
        if parent_holds and not self._ignored and len(strangers) == 1:
            self._ignored, strangers = strangers, set()
        self._before = frozenset(before)
        self.foreign = set(strangers)

    def look(self) -> None:
        """See who is there now; ``foreign`` grows by those who are not ours."""
        now = self._gpu.processes()
        if isinstance(now, str):
            self.unknown = now
            return
        new = set(now) - self._before - self._ignored
        if self._entry is None and self._own in new:
            self._entry = self._own
        elif self._entry is None and len(new) == 1:
            (self._entry,) = new
        listed = self._entry is not None or bool(now)
        self.unknown = None if listed else "NVML lists no process of the GPU, not even this one"
        self.foreign |= new - {self._entry}

    def own_bytes(self) -> int | str:
        """Bytes of the GPU's memory that our process holds, context included, or why that is not known."""
        self.look()
        now = self._gpu.processes()
        if isinstance(now, str):
            return now
        if self._entry is None or self._entry not in now:
            return self.unknown or "NVML does not list this process"
        held = now[self._entry]
        return "NVML does not tell the memory of single processes here" if held is None else held
