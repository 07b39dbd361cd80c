"""What the calibration batches have become after the last finished block, in memory and on disk."""

from pathlib import Path

import torch
from safetensors import safe_open

from compress.formats.shards import write_shard
from compress.models.blocks import Recording


class Activations:
    """The calibration batches with their recordings, and the file from which a run resumes.

    Args:
        tokens: int64 ``[samples, length]``.
        batch_size: sequences in one forward pass.
    """

    def __init__(self, tokens: torch.Tensor, batch_size: int) -> None:
        self.batches = [{"input_ids": part.contiguous()} for part in tokens.split(batch_size)]
        self.recordings = [Recording() for _ in self.batches]

    def save(self, file: Path) -> None:
        """Write all recordings, complete or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        for index, recording in enumerate(self.recordings):
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
                    self.recordings[int(index)].hidden[int(rest[0])] = tensor
                else:
                    extras.setdefault((int(index), int(rest[0])), {})[rest[1]] = tensor
        for (batch, position), entries in extras.items():
            length = int(entries.pop("length"))
            self.recordings[batch].extras[position] = tuple(
                entries.get(str(place)) for place in range(length)
            )
