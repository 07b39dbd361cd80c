"""What belongs to a run and not to a method: task, seed, calibration data, device, threads."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from compress.core.events import SILENT, Reporter

Device = Literal["cpu", "cuda"]
LogService = Literal["tensorboard", "mlflow"]

RESUMABLE = "resumable"
"""An empty file of this name in `Run.scratch` says that there is progress to resume from.

The engine clears the working folder of a step that failed without it, so that a run which had hardly begun
leaves nothing behind.
"""


@dataclass(frozen=True)
class CalibrationSource:
    """Which tokens a calibrated method sees; the same for every method of a run.

    Attributes:
        text: path, hub data set or ``builtin:NAME``, as `compress.data.corpora` resolves it.
        samples: number of sequences.
        sequence_length: tokens in each sequence; all are equally long, so nothing is padded.
        batch_size: sequences in one forward pass.
    """

    text: str
    samples: int = 128
    sequence_length: int = 512
    batch_size: int = 8


@dataclass(frozen=True)
class TrainingSource:
    """Which text a method trains on; the same for every method of a run.

    Attributes:
        text: path, hub data set or ``builtin:NAME``, as `compress.data.corpora` resolves it.
        validation: text to judge progress on; a part of ``text`` is held out where none is given.
    """

    text: str
    validation: str | None = None


@dataclass(frozen=True)
class Run:
    """The circumstances of one application of a pass.

    Attributes:
        task: name of a task (`compress.models.tasks`), or ``auto`` to take it from the model.
        seed: of every random draw.
        device: where blocks are computed.
        threads: torch's intra-operation threads; part of a step's identity, because other thread
            counts give other bytes.
        calibration: the calibration data, or none.
        activations_memory: bytes of calibration activations that stay in memory while others go to disk; none
            keeps all of them there. The result is the same.
        training: the training text, or none.
        models: folders of the other models that the method reads (a teacher), by the option that names them.
        log: where the progress of a training is shown beside its table, or nowhere.
        log_folder: of this step, for what such a log leaves behind; no part of the result.
        scratch: a folder for progress that outlives a crash but is no part of the result.
        trust_remote_code: whether code inside the model folder may run.
        reporter: who is told what happens.
    """

    task: str = "auto"
    seed: int = 0
    device: Device = "cpu"
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    calibration: CalibrationSource | None = None
    activations_memory: int | None = None
    training: TrainingSource | None = None
    models: Mapping[str, Path] = field(default_factory=dict)
    log: LogService | None = None
    log_folder: Path = Path(".")
    scratch: Path = Path(".")
    trust_remote_code: bool = False
    reporter: Reporter = SILENT
