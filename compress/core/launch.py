"""Which of several processes this is, as a launcher (torchrun, accelerate) says in the environment.

A run that trains may be launched several times at once: the first process plans, writes and reports, and the
others help it train (`compress.engine.team`). Everything else runs in one process, and says so.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from compress.core.errors import UsageError

LAUNCHING = "torchrun --nproc-per-node 2 -m compress distill logits ..."
"""How a training is started in several processes."""

_OTHER_WAYS: Mapping[str, str] = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
"""What `accelerate launch` can be told to divide a model by."""


@dataclass(frozen=True)
class Launch:
    """One of the processes that a launcher started; alone where none did.

    Attributes:
        rank: which one, from 0.
        count: how many.
        local_rank: which one on this machine.
        local_count: how many on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process plans, writes and reports."""
        return self.rank == 0


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """What the environment says.

    Raises:
        UsageError: it says nothing that makes sense, or asks for what is not done here.
    """
    count = _number(environment, "WORLD_SIZE", 1)
    if count == 1:
        return Launch()
    _check_accelerate(environment)
    rank = _number(environment, "RANK", None)
    here = Launch(
        rank,
        count,
        _number(environment, "LOCAL_RANK", rank),
        _number(environment, "LOCAL_WORLD_SIZE", count),
    )
    if not (0 <= here.rank < here.count and 0 <= here.local_rank < here.local_count):
        raise UsageError(
            f"the environment says process {here.rank} of {here.count} "
            f"({here.local_rank} of {here.local_count} on this machine)",
            f"use a launcher: {LAUNCHING}",
        )
    return here


def require_alone(what: str) -> None:
    """Refuse to be launched in several processes.

    Args:
        what: the command or function, for the message.

    Raises:
        UsageError: a launcher started several.
    """
    count = launch().count
    if count > 1:
        raise UsageError(
            f"{what} runs in one process, and a launcher started {count}",
            "without the launcher it does the same; only runs that train (compress distill ..., compress "
            "run with such a step) can be shared by several processes",
        )


def _number(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        came = f"is '{text}'" if text else "is missing"
        raise UsageError(
            f"{name} {came} in the environment, expected a number as a launcher sets it",
            f"use a launcher: {LAUNCHING}",
        )
    return int(text)


def _check_accelerate(environment: Mapping[str, str]) -> None:
    """Refuse what `accelerate launch` was told and nothing here would do."""
    for name, way in _OTHER_WAYS.items():
        if environment.get(name, "").lower() == "true":
            raise UsageError(
                f"accelerate was told to use {way}; here every process holds the whole student, "
                "16 bytes a parameter, and takes its share of the windows",
                "give `accelerate launch --multi_gpu`; memory is saved with --activations recompute and a "
                "smaller --batch",
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", ""):
        raise UsageError(
            f"accelerate was told --mixed_precision {precision}, which is an option of the method here",
            "give the method --precision bfloat16, and accelerate --mixed_precision no",
        )
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("no", ""):
        raise UsageError(
            f"accelerate was told --dynamo_backend {compiler}; nothing is compiled here",
            "leave --dynamo_backend out",
        )
