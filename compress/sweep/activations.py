"""What the calibration batches have become after the last finished block, in memory and on disk.

There are up to two streams of them: behind the compressed blocks, which is what the next block will see, and
behind the blocks of the original model, for methods that compare with it.
"""

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open

from compress.formats.shards import write_shard
from compress.models.blocks import Recording
from compress.sweep.spill import Kept, Shelf, Spill


class Activations:
    """The calibration batches with their recordings, and the file from which a run resumes.

    Attributes:
        batches: the inputs of the model.
        recordings: of each batch, behind the compressed blocks.
        original: of each batch, behind the original blocks; empty where nobody asked for it.

    Args:
        tokens: int64 ``[samples, length]``.
        batch_size: sequences in one forward pass.
        original: whether the original model's activations are kept too.
        spill: where all of them are kept; in memory by default.
    """

    def __init__(
        self, tokens: torch.Tensor, batch_size: int, *, original: bool = False, spill: Spill | None = None
    ) -> None:
        self._spill = spill or Spill(Path("."))
        self.batches = [{"input_ids": part.contiguous()} for part in tokens.split(batch_size)]
        self.recordings = self.beside()
        self.original = self.beside() if original else []

    def beside(self) -> list[Recording]:
        """An empty recording for each batch, kept where the others are."""
        return [Recording(Shelf(self._spill), Shelf(self._spill)) for _ in self.batches]

    def shorten(self, batches: int) -> None:
        """Go on with the first batches alone."""
        self.batches = self.batches[:batches]
        self.recordings = self.recordings[:batches]
        self.original = self.original[:batches]

    def _recording(self, index: int) -> Recording:
        """A recording by its number in the file: those of the original follow the compressed ones."""
        return [*self.recordings, *self.original][index]

    def save(self, file: Path) -> None:
        """Write all recordings, complete or not at all."""
        tensors: dict[str, Kept] = {}
        lengths: dict[str, torch.Tensor] = {}
        for index, recording in enumerate([*self.recordings, *self.original]):
            hidden, extras = _shelf(recording.hidden), _shelf(recording.extras)
            for stack in hidden:
                tensors[f"{index}.hidden.{stack}"] = hidden.kept(stack)
            for position in extras:
                entries = extras.kept(position)
                lengths[f"{index}.extras.{position}.length"] = torch.tensor(len(entries))
                for place, extra in enumerate(entries):
                    if isinstance(extra, Kept):
                        tensors[f"{index}.extras.{position}.{place}"] = extra
        layout = {name: (kept.dtype, kept.shape) for name, kept in tensors.items()}
        layout |= {name: (length.dtype, ()) for name, length in lengths.items()}
        write_shard(
            file,
            layout,
            lambda name: lengths[name] if name in lengths else tensors[name].read(),
            lambda _: None,
        )

    def restore(self, file: Path) -> None:
        """Take up the recordings of a file; what a block returned beside tensors was ``None``."""
        with safe_open(file, framework="pt") as handle:
            extras: dict[tuple[int, int], list[str]] = defaultdict(list)
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                index, kind, *rest = name.split(".")
                if kind == "hidden":
                    # A copy, so that the memory is ours and not the file's, which will be deleted.
                    self._recording(int(index)).hidden[int(rest[0])] = handle.get_tensor(name).clone()
                else:
                    extras[int(index), int(rest[0])].append(rest[1])
            for (batch, position), places in extras.items():
                prefix = f"{batch}.extras.{position}"
                self._recording(batch).extras[position] = tuple(
                    handle.get_tensor(f"{prefix}.{place}").clone() if str(place) in places else None
                    for place in range(int(handle.get_tensor(f"{prefix}.length")))
                )


def _shelf(values: object) -> Shelf:
    if not isinstance(values, Shelf):
        raise TypeError(f"the recordings of a run lie on shelves, got {type(values).__name__}")
    return values
