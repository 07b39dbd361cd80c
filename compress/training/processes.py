"""Several processes that train one model: each takes a share of a step's windows, and they add up gradients.

Plain all-reduces of torch, and no wrapper around the model. The loss is computed chunk by chunk with several
backward passes for one forward pass (`compress.training.imitation`), and the model is cut in two by hooks; a
wrapper such as DDP or FSDP counts on one forward and one backward pass through its own `forward`. A sum needs
no such thing: an objective divides by the positions of the whole step, so that the sum of the processes'
gradients is the gradient that one process would have had, however the windows are shared.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, final

import torch
from torch import distributed

from compress.core.errors import EnvironmentFault
from compress.core.launch import Launch
from compress.training.objective import Losses

TIMEOUT = timedelta(minutes=10)
"""How long one process waits for the others in a sum: longer than the first of them writes a checkpoint."""
PERIOD = 0.1
"""Seconds between two looks at what another process has to say."""
_BUCKET = 2**24
"""Numbers that are added up in one go."""


class Released(Exception):
    """Ends a helper's part of `Pass.apply`: the training is over, and the first process goes on alone."""


@contextlib.contextmanager
def joined(store: Any, here: Launch, device: str, threads: int) -> Iterator[None]:
    """Inside, `Processes` speaks to all processes that share a store.

    Args:
        store: `torch.distributed.Store` under a name that is used once.
        here: which process this is.
        device: ``cpu`` (gloo) or ``cuda`` (nccl, one device a process).
        threads: of the machine, shared by its processes.

    Raises:
        EnvironmentFault: the machine has fewer devices than processes, or the others do not come.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // here.local_count))
    backend, placed = "gloo", None
    if device == "cuda":
        available = torch.cuda.device_count()
        if here.local_count > available:
            raise EnvironmentFault(
                f"{here.local_count} processes on this machine, and torch sees {available} GPUs",
                "start one process a GPU",
            )
        backend, placed = "nccl", torch.device("cuda", here.local_rank)
        torch.cuda.set_device(placed)
        # A sum that does not come to an end is an error here, and no abort of the process elsewhere.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    with _told_of_loss(here.count):
        distributed.init_process_group(
            backend,
            store=store,
            rank=here.rank,
            world_size=here.count,
            timeout=TIMEOUT,
            device_id=placed,
        )
    try:
        yield
        _part(store, here)
    except BaseException:
        # Whoever waits for this process need not; where the store is gone nobody does.
        with contextlib.suppress(RuntimeError):
            store.set(_parting(here.rank), "")
        raise
    finally:
        distributed.destroy_process_group()
        torch.set_num_threads(before)


def _parting(rank: int) -> str:
    return f"parting/{rank}"


def _part(store: Any, here: Launch) -> None:
    """Wait until nobody needs a connection any more: one that closes early can spoil the last sum of another.

    The first process comes last, when it has written what was trained, however long that takes.
    """
    with _told_of_loss(here.count):
        store.set(_parting(here.rank), "")
        all_of_them = [_parting(rank) for rank in range(here.count)]
        if here.leads:
            store.wait(all_of_them, TIMEOUT)
        while not store.check(all_of_them):
            time.sleep(PERIOD)


@final
class Processes:
    """The processes that train together: those of torch's process group, or this one alone.

    Attributes:
        rank: which one this is, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.count = distributed.get_world_size() if together else 1

    @property
    def leads(self) -> bool:
        """Whether this one writes and reports."""
        return self.rank == 0

    def share(self, windows: torch.Tensor) -> torch.Tensor:
        """The windows that this process takes, ``[share, length]``: none is taken twice, none left out."""
        return windows[self.rank :: self.count]

    def add_up(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Give all processes the sum of their gradients.

        A weight that got a gradient in none of them, such as an expert that no token chose, keeps none.

        Raises:
            EnvironmentFault: another process is gone, or does not answer.
        """
        if self.count == 1:
            return
        device = weights[0].device
        seen = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32, device=device)
        self._sum(seen)
        reached = [weight for weight, count in zip(weights, seen.tolist(), strict=True) if count]
        for weight in reached:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        for bucket in _buckets([weight.grad for weight in reached if weight.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            self._sum(flat)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def total(self, losses: Losses | None, names: Sequence[str], device: torch.device) -> Losses:
        """The sums over all processes; a process that had no window gives ``None``.

        Raises:
            EnvironmentFault: another process is gone, or does not answer.
        """
        sums: Mapping[str, Any] = losses.sums if losses is not None else dict.fromkeys(names, 0.0)
        positions = losses.positions if losses is not None else 0
        values = [*(sums[name] for name in names), positions]
        flat = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
        self._sum(flat)
        return Losses(dict(zip(names, flat, strict=False)), round(float(flat[-1])))

    def _sum(self, values: torch.Tensor) -> None:
        if self.count > 1:
            with _told_of_loss(self.count):
                distributed.all_reduce(values)


@contextlib.contextmanager
def _told_of_loss(count: int) -> Iterator[None]:
    """Say in our words what torch says of a connection that broke; inside nothing else can go wrong."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # Gloo has no kind of error of its own.
        raise EnvironmentFault(
            f"another of the {count} processes that train together is gone, or did not answer within "
            f"{TIMEOUT.total_seconds() / 60:.0f} minutes: {str(error).splitlines()[0]}",
            "see what it said; the same command goes on from the last checkpoint, also with another number "
            "of processes",
        ) from error


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Gradients of one dtype each, so many that a sum is worth its latency and its copy stays small."""
    bucket: list[torch.Tensor] = []
    held = 0
    for gradient in gradients:
        if bucket and (held + gradient.numel() > _BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += gradient.numel()
    if bucket:
        yield bucket
