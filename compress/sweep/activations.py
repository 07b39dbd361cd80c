"""What the calibration batches have become after the last finished block, in memory and on disk.

There are up to two streams of them: behind the compressed blocks, which is what the next block will see, and
behind the blocks of the original model, for methods that compare with it.
"""

from pathlib import Path

import torch
from safetensors import safe_open

from compress.formats.shards import write_shard
from compress.models.blocks import Recording


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
    """

    def __init__(self, tokens: torch.Tensor, batch_size: int, *, original: bool = False) -> None:
        self.batches = [{"input_ids": part.contiguous()} for part in tokens.split(batch_size)]
        self.recordings = [Recording() for _ in self.batches]
        self.original = [Recording() for _ in self.batches] if original else []

    def _recording(self, index: int) -> Recording:
        """A recording by its number in the file: those of the original follow the compressed ones."""
        return [*self.recordings, *self.original][index]

    def save(self, file: Path) -> None:
        """Write all recordings, complete or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        for index, recording in enumerate([*self.recordings, *self.original]):
            for stack, hidden in recording.hidden.items():
                tensors[f"{index}.hidden.{stack}"] = hidden
            for position, extras in recording.extras.items():
                tensors[f"{index}.extras.{position}.length"] = torch.tensor(len(extras))
                for place, extra in enumerate(extras):
                    if isinstance(extra, torch.Tensor):
                        tensors[f"{index}.extras.{position}.{place}"] = extra
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_shard(file, layout, tensors.__getitem__, lambda _: None)

    def restore(self, file: Path) -> None:
        """Take up the recordings of a file; what a block returned beside tensors was ``None``."""
        with safe_open(file, framework="pt") as handle:
            extras: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                index, kind, *rest = name.split(".")
                # A copy, so that the memory is ours and not the file's, which will be deleted.
                tensor = handle.get_tensor(name).clone()
                if kind == "hidden":
                    self._recording(int(index)).hidden[int(rest[0])] = tensor
                else:
                    extras.setdefault((int(index), int(rest[0])), {})[rest[1]] = tensor
        for (batch, position), entries in extras.items():
            length = int(entries.pop("length"))
            self._recording(batch).extras[position] = tuple(
                entries.get(str(place)) for place in range(length)
            )
