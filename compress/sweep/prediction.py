"""What a sweep will take, predicted from headers and one short timing of this machine."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from compress.core.passes import Needs
from compress.core.run import Run
from compress.formats.weight_format import WeightFormat
from compress.models.blocks import Block
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype
from compress.sweep.matrices import Matrix
from compress.sweep.rounder import BlockRounder, Rounder
from compress.sweep.selection import Selection

# Python with torch and transformers, measured as the resident set after importing both.
IMPORT_BYTES = 700 * 2**20


def predict(
    rounder: Rounder,
    selection: Selection,
    model: Any,
    checkpoint: Checkpoint,
    weight_format: WeightFormat,
    run: Run,
) -> Needs:
    """Disk from the format's layout, memory from the largest block, time from the products of the sweep."""
    scale_bytes = loaded_dtype(checkpoint.source).itemsize
    rounded = {name for matrix in selection.schemes for name in matrix.on_disk}
    packed = sum(weight_format.encoded_bytes(held, scale_bytes) for held in selection.held())
    copied = sum(_bytes(checkpoint, name) for name in checkpoint.names if name not in rounded)
    compute = 4 if run.device == "cpu" else scale_bytes
    largest = _largest(selection.blocks)
    embeddings = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not any(name.startswith(f"{block.name}.") for block in selection.blocks)
    )
    width = max((matrix.columns for matrix in selection.schemes), default=0)
    working = compute * (largest + embeddings)
    recordings = 0
    seconds = 0.0
    if rounder.reads_calibration and run.calibration is not None:
        calibration = run.calibration
        tokens = calibration.samples * calibration.sequence_length
        hidden = model.get_input_embeddings().weight.shape[1]
        recordings = tokens * hidden * compute
        body = sum(matrix.rows * matrix.columns for matrix in selection.schemes)
        # Two to three forward passes: calibrate stage by stage, advance.
        operations = 2 * tokens * 3 * body
        if rounder.calibrated:
            # One product of every input with itself for its second moments; ranges of inputs alone take none.
            working += 4 * 4 * width * width
            moments = sum(matrix.columns**2 for matrix in selection.schemes)
            operations += 2 * tokens * moments + sum(
                2 * matrix.columns**2 * (matrix.rows + matrix.columns) for matrix in selection.schemes
            )
        if isinstance(rounder, BlockRounder):
            # The original model's activations, and one pass more for them.
            recordings *= 2
            batch = min(calibration.batch_size, calibration.samples) * calibration.sequence_length
            # Going back costs twice what going forward does.
            operations += 2 * body * (3 * rounder.work.steps * batch + (rounder.work.looks + 1) * tokens)
            working += _joint_bytes(rounder, selection, batch, compute)
        seconds = operations / rate(torch.device(run.device))
    host = IMPORT_BYTES + recordings + (working if run.device == "cpu" else compute * largest)
    disk = packed + copied + 2 * recordings
    # Reading, writing and reading again to verify, at a disk that gives 500 MB a second.
    seconds += 3 * disk / 500e6
    device = 0 if run.device == "cpu" else working + recordings
    return Needs(disk, host, device, seconds, activation_bytes=recordings)


def _joint_bytes(rounder: BlockRounder, selection: Selection, tokens: int, compute: int) -> int:
    """What working on a whole block takes beside the block: copies, gradients, and what a step back needs.

    Args:
        tokens: in one batch.
    """
    most = 0
    for matrices in selection.inside.values():
        weights = sum(matrix.rows * matrix.columns for matrix in matrices)
        # Inputs and outputs of every matrix stay until the way back, and about as much between them.
        kept = 2 * tokens * sum(matrix.rows + matrix.columns for matrix in matrices)
        most = max(most, weights * (4 * rounder.work.copies + 2 * compute) + kept * compute)
    return most


def predict_masking(
    matrices: Iterable[Matrix],
    blocks: Iterable[Block],
    model: Any,
    checkpoint: Checkpoint,
    run: Run,
    *,
    passes: float = 2.0,
    products: int = 0,
) -> Needs:
    """What a sweep takes that keeps every shape: the source's bytes again, and passes over the text.

    Args:
        passes: over the text.
        products: how often a matrix is multiplied with the second moments of its input; 0 where they are not
            gathered.
    """
    entries = list(matrices)
    disk = sum(_bytes(checkpoint, name) for name in checkpoint.names)
    extra = 4 * 4 * max((matrix.rows * matrix.columns for matrix in entries), default=0)
    if not products:
        return _dense(disk, extra, passes, blocks, model, checkpoint, run)
    extra += 4 * 4 * max(matrix.columns for matrix in entries) ** 2
    needs = _dense(disk, extra, passes, blocks, model, checkpoint, run)
    calibration = run.calibration
    tokens = 0 if calibration is None else calibration.samples * calibration.sequence_length
    # The moments themselves, their factor, and what is done with them.
    operations = sum(
        2 * matrix.columns**2 * (tokens + matrix.columns + products * matrix.rows) for matrix in entries
    )
    return replace(needs, seconds=needs.seconds + operations / rate(torch.device(run.device)))


def predict_rewriting(
    rounded: Mapping[str, int], blocks: Iterable[Block], model: Any, checkpoint: Checkpoint, run: Run
) -> Needs:
    """What a sweep takes that looks at no text.

    Args:
        rounded: bytes of what is written in place of a tensor, by its name on disk.
    """
    disk = sum(rounded.get(name, _bytes(checkpoint, name)) for name in checkpoint.names)
    return _dense(disk, 0, 0.0, blocks, model, checkpoint, replace(run, calibration=None))


def predict_narrowing(
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Iterable[Block],
    model: Any,
    checkpoint: Checkpoint,
    run: Run,
    *,
    passes: float = 1.0,
) -> Needs:
    """What narrowing takes: a smaller model, passes over the text, and two blocks at a time."""
    disk = 0
    for name in checkpoint.names:
        shape = shapes.get(checkpoint.target[name], checkpoint.shape(name))
        disk += checkpoint.dtype(name).itemsize * torch.Size(shape).numel()
    blocks = list(blocks)
    compute = 4 if run.device == "cpu" else loaded_dtype(checkpoint.source).itemsize
    return _dense(disk, compute * _largest(blocks), passes, blocks, model, checkpoint, run)


def predict_whole(
    needs: Needs, matrices: Iterable[Matrix], model: Any, checkpoint: Checkpoint, run: Run, choices: int
) -> Needs:
    """What a sweep takes before which the whole model runs again and again, once for each part and choice.

    Args:
        needs: of the sweep.
        matrices: that are tried.
        run: with the calibration text of these runs.
        choices: how often a part is tried.
    """
    compute = 4 if run.device == "cpu" else loaded_dtype(checkpoint.source).itemsize
    whole = compute * sum(parameter.numel() for parameter in model.parameters())
    calibration = run.calibration
    tokens = 0 if calibration is None else calibration.samples * calibration.sequence_length
    entries = list(matrices)
    body = sum(matrix.rows * matrix.columns for matrix in entries)
    # Three parts of four matrices share an input with another; a part is followed by half of the blocks.
    parts = len({(matrix.module, matrix.parameter) for matrix in entries}) / 2
    seconds = parts * choices * tokens * body / rate(torch.device(run.device))
    on_host = run.device == "cpu"
    return replace(
        needs,
        host_bytes=max(needs.host_bytes, IMPORT_BYTES + (whole if on_host else 0)),
        device_bytes=0 if on_host else max(needs.device_bytes, whole),
        seconds=needs.seconds + seconds,
    )


def _dense(
    disk: int,
    extra: int,
    passes: float,
    blocks: Iterable[Block],
    model: Any,
    checkpoint: Checkpoint,
    run: Run,
) -> Needs:
    """Needs of a sweep that writes floats: its recordings, one block, and what it holds beside them."""
    blocks = list(blocks)
    compute = 4 if run.device == "cpu" else loaded_dtype(checkpoint.source).itemsize
    prefixes = tuple(f"{block.name}." for block in blocks)
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(prefixes))
    body = sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
    working = compute * (_largest(blocks) + outside) + extra
    recordings, seconds = 0, 3 * disk / 500e6
    if run.calibration is not None:
        tokens = run.calibration.samples * run.calibration.sequence_length
        recordings = tokens * int(model.get_input_embeddings().weight.shape[1]) * compute
        seconds += passes * 2 * tokens * body / rate(torch.device(run.device))
    on_host = run.device == "cpu"
    host = IMPORT_BYTES + recordings + (working if on_host else compute * _largest(blocks))
    device = 0 if on_host else working + recordings
    return Needs(disk + 2 * recordings, host, device, seconds, activation_bytes=recordings)


def _largest(blocks: Iterable[Block]) -> int:
    return max(sum(parameter.numel() for parameter in block.module.parameters()) for block in blocks)


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    return checkpoint.dtype(name).itemsize * torch.Size(checkpoint.shape(name)).numel()


def rate(device: torch.device) -> float:
    """Floating-point operations a second of a float32 matrix product, timed for about a tenth of a second."""
    size = 512
    left = torch.ones(size, size, device=device)
    torch.mm(left, left)
    started = time.perf_counter()
    rounds = 0
    while time.perf_counter() - started < 0.1:
        float(torch.mm(left, left)[0, 0])
        rounds += 1
    return rounds * 2 * size**3 / (time.perf_counter() - started)
