"""How names on disk count the blocks of a stack, so that a block can be given another number."""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.core.errors import PlanError
from compress.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class DiskNames:
    """How names on disk count blocks: the part of a dotted name that is the number of its block."""

    place: int

    def renumbered(self, name: str, number: int) -> str:
        """The same name in another block."""
        parts = name.split(".")
        parts[self.place] = str(number)
        return ".".join(parts)


def disk_names(checkpoint: Checkpoint, blocks: Sequence[str]) -> DiskNames:
    """Find where names on disk count the blocks of a stack, and refuse what cannot be moved in it.

    Args:
        blocks: paths of all blocks of the stack, in order.

    Raises:
        PlanError: names do not count blocks in one place, or a block stores what is no parameter.
    """
    found: set[tuple[int, tuple[str, ...]]] | None = None
    parameters = {name for name, _ in checkpoint.model.named_parameters(remove_duplicate=False)}
    for number, block in enumerate(blocks):
        for name in checkpoint.names_of(block):
            if name in checkpoint.passed_over:
                continue
            if checkpoint.target[name] not in parameters:
                raise PlanError(
                    f"{name} is stored and is no weight: a block with it cannot be moved to another place",
                    "prune its width with prune.width",
                )
            parts = name.split(".")
            here = {(i, tuple(parts[:i])) for i, part in enumerate(parts) if part == str(number)}
            found = here if found is None else found & here
    if not found:
        raise PlanError(
            f"the names on disk in {checkpoint.source.path} do not number its blocks",
            "save the model with a current transformers first, and prune that",
        )
    return DiskNames(min(place for place, _ in found))
