"""One walk over a model's blocks from disk to disk: what every sweep has in common, whatever it does there.

It knows where the calibration batches have got to, which units are finished, what lies outside the blocks,
and which files make an artifact complete. Every finished unit is a point to resume from.
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch

from compress.core.artifact import LAYERS_FILE, Artifact
from compress.core.passes import Outcome
from compress.core.run import Run
from compress.data.calibration import draw
from compress.formats.shards import write_index
from compress.models.blocks import Block, Reentry, find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton, tokenizer
from compress.sweep.activations import Activations
from compress.sweep.memory import return_freed, return_large_at_once
from compress.sweep.spill import Spill
from compress.sweep.unit import UnitRecord

OUTSIDE = "outside"


def placed_skeleton(source: Artifact, run: Run) -> Any:
    """A skeleton in the precision in which blocks are computed, with its buffers where they are computed.

    That is float32 on a CPU, where it is as fast as anything and the most exact, and the model's own
    precision on a GPU.
    """
    compute = torch.float32 if run.device == "cpu" else loaded_dtype(source)
    model = skeleton(source, task=run.task, dtype=compute, trust_remote_code=run.trust_remote_code)
    for name, buffer in list(model.named_buffers()):
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = buffer.to(run.device)
    return model


@final
@dataclass
class Walk:
    """A model on its way through a sweep.

    Attributes:
        source: the artifact that is read.
        target: the folder that is written; it may hold earlier progress.
        run: the circumstances.
        model: a skeleton of the source's model.
        checkpoint: the source's weights beside the skeleton.
        device: where blocks are computed.
        blocks: of the model, in order.
    """

    source: Artifact
    target: Path
    run: Run
    model: Any
    checkpoint: Checkpoint
    device: torch.device
    blocks: list[Block] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = find_blocks(self.model)

    def begin(self) -> None:
        """Make ready for progress to be kept."""
        return_large_at_once()
        self.run.scratch.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def reentry(self) -> Iterator[Reentry]:
        """What runs single blocks of the model while the context lasts."""
        with Reentry(self.model, self.blocks, self.device) as reentry:
            yield reentry

    def calibration(self, *, original: bool = False) -> Activations | None:
        """The calibration batches at the start of the model; ``None`` where the run has none.

        Args:
            original: whether the activations of the original model are kept beside the compressed ones.
        """
        if self.run.calibration is None:
            return None
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        # A file of tokens needs none, and a model without a tokenizer can still be calibrated with one.
        words = None
        if not self.run.calibration.text.endswith(".safetensors"):
            words = tokenizer(self.source, trust_remote_code=self.run.trust_remote_code)
        drawn = draw(self.run.calibration, words, self.run.seed, vocabulary)
        spill = Spill(self.run.scratch, self.run.activations_memory)
        return Activations(drawn.tokens, self.run.calibration.batch_size, original=original, spill=spill)

    # -- what lies outside the blocks ----------------------------------------------------------------

    def is_outside(self, name: str) -> bool:
        """Whether a tensor on disk belongs to no block."""
        target = self.checkpoint.target[name]
        return not any(target.startswith(f"{block.name}.") for block in self.blocks)

    def outside_names(self) -> list[str]:
        """Names on disk of everything that belongs to no block."""
        return [name for name in self.checkpoint.names if self.is_outside(name)]

    def head(self) -> str | None:
        """The module that turns hidden states into logits; a sweep stops before it, so it stays on disk."""
        head = self.model.get_output_embeddings()
        if head is None or head.weight is self.model.get_input_embeddings().weight:
            return None
        names: list[str] = [name for name, module in self.model.named_modules() if module is head]
        return names[0]

    def load_outside(self) -> None:
        """Bring everything outside the blocks but the head: what a forward pass needs to reach them.

        A last stack of one block is not stopped behind, as a model may run the block again: its output meets
        the head, which comes too.
        """
        head = self.head()
        alone = [block.stack for block in self.blocks].count(self.blocks[-1].stack) == 1
        waiting = [] if head is None or alone else self.checkpoint.names_of(head)
        self.checkpoint.load([name for name in self.outside_names() if name not in waiting], self.device)
        self.model.tie_weights()

    def load_head(self) -> None:
        """Bring the head, where it has a weight of its own."""
        head = self.head()
        if head is not None:
            self.checkpoint.load_module(head, self.device)

    # -- records and resume ------------------------------------------------------------------------

    def through(
        self, title: str, block: Callable[[Block], UnitRecord], outside: Callable[[], UnitRecord]
    ) -> list[UnitRecord]:
        """The record of every unit, the blocks in order and then what lies outside them.

        What an earlier run finished is not done again.

        Args:
            title: for the person who waits.
            block: does one block.
            outside: does everything that belongs to no block.
        """
        records: list[UnitRecord] = []
        with self.run.reporter.progress(title, len(self.blocks) + 1, "block") as advance:
            for each in self.blocks:
                records.append(self.finished(each.name, each.position) or block(each))
                return_freed()
                advance(1)
            records.append(self.finished(OUTSIDE, len(self.blocks)) or outside())
            advance(1)
        return records

    def finished(self, name: str, position: int) -> UnitRecord | None:
        """The record of a unit that an earlier run finished."""
        record = UnitRecord.read(self._record_file(position))
        if record is not None and (self.target / record.file).is_file():
            self.run.reporter.event("block.resume", block=name, position=position)
            return record
        return None

    def restore(self, position: int, activations: Activations | None) -> None:
        """Take up the recordings of the block before, when they are not in memory already."""
        if activations is None or position == 0 or activations.recordings[0].hidden:
            return
        activations.restore(self._activation_file(position - 1))

    def finish(self, position: int, record: UnitRecord, activations: Activations | None) -> None:
        """Note that a unit's shard is written, and where the batches have got to.

        The record comes last: its existence is the point from which a run resumes.
        """
        if activations is not None:
            activations.save(self._activation_file(position))
        record.write(self._record_file(position))
        self._activation_file(position - 1).unlink(missing_ok=True)
        self.run.reporter.event("block.finish", position=position)

    def complete(self, records: Sequence[UnitRecord], config: Mapping[str, Any]) -> None:
        """Write what makes the shards a model: configuration, index, table of layers, companions."""
        (self.target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_index(
            self.target, {record.file: record.names for record in records}, sum(r.bytes for r in records)
        )
        _write_layers(self.target / LAYERS_FILE, (row for record in records for row in record.layers))
        for file in self.source.companions:
            copy = self.target / file.relative_to(self.source.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)

    def _record_file(self, position: int) -> Path:
        return self.run.scratch / f"unit-{position:05d}.json"

    def _activation_file(self, position: int) -> Path:
        return self.run.scratch / f"activations-{position:05d}.safetensors"


def outcome_of(records: Sequence[UnitRecord], decisions: Mapping[str, Any]) -> Outcome:
    """What a finished walk says: what was decided, how many tensors changed, and the table of layers.

    Args:
        records: of all units.
        decisions: what the method has to say beside.
    """
    tensors = {name: meant for record in records for name, meant in record.tensors.items()}
    changed = sum(meant.changed for meant in tensors.values())
    layers = decided(row for record in records for row in record.layers)
    return Outcome({**decisions, "changed": changed, "layers": layers}, tensors)


def decided(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table of layers as it goes into the lineage: by name, and without what a clock said."""
    return {
        row["layer"]: {key: value for key, value in row.items() if key not in ("layer", "seconds")}
        for row in rows
    }


def _write_layers(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """The table of layers: one row a matrix, with its error, the tokens it saw and what the method noted."""
    entries = list(rows)
    columns = list(dict.fromkeys(key for row in entries for key in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
