"""A stand-in for the ``pynvml`` module: one GPU whose state a test sets."""

from types import SimpleNamespace
from typing import Any

UUID = "8f3d2c1a-0000-4000-8000-000000000001"


REASONS = {
    "nvmlClocksEventReasonSwPowerCap": 0x4,
    "nvmlClocksEventReasonHwSlowdown": 0x8,
    "nvmlClocksEventReasonSwThermalSlowdown": 0x20,
    "nvmlClocksEventReasonHwThermalSlowdown": 0x40,
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": 0x80,
}


class FakeNvml:
    """Only what `compress.bench.nvml` calls; names and numbers are NVML's own."""

    class NVMLError(Exception):
        """What every call may raise."""

    NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN = 269
    NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN = 270
    NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN = 271

    def __init__(self, uuid: str = f"GPU-{UUID}") -> None:
        vars(self).update(REASONS)
        self.uuid = uuid
        self.processes: dict[int, int | None] = {}
        self.reasons = 0
        self.slowed = {269: 0, 270: 0, 271: 0}
        self.refuses: set[str] = set()

    def _may(self, call: str) -> None:
        if call in self.refuses:
            raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None:
        self._may("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        self._may("processes")
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.processes.items()]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        self._may("reasons")
        return self.reasons

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[Any]:
        self._may("fields")
        return [
            SimpleNamespace(
                fieldId=field,
                nvmlReturn=0 if field in self.slowed else 3,
                valueType=3,
                value=SimpleNamespace(ullVal=self.slowed.get(field, 0)),
            )
            for field in fields
        ]

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:
        self._may("power")
        return 700_000
