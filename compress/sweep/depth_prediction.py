"""What taking blocks out will take, predicted from headers and one short timing of this machine."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from compress.core.passes import Needs
from compress.core.run import Run
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype
from compress.models.probe import input_features, output_features
from compress.models.writers import Writer
from compress.sweep.depth_choice import windows
from compress.sweep.depth_plan import DepthPlan
from compress.sweep.prediction import IMPORT_BYTES, predict_narrowing, rate


def predict_depth(
    plan: DepthPlan,
    writers: Mapping[str, Writer],
    model: Any,
    checkpoint: Checkpoint,
    run: Run,
    measuring: Run | None,
) -> Needs:
    """A smaller model and one pass over the text; what repairs and measured losses add.

    Which blocks go is not known yet: it is reckoned with the last ones, as blocks hardly differ in size.

    Args:
        writers: layers that are fitted again, by block; empty where nothing is repaired.
        measuring: the run with the text of measured losses; ``None`` where none are measured.
    """
    left = plan.shapes_of(plan.without(plan.last()))
    shapes = {name: left.get(name, (0,)) for name in plan.shapes}
    blocks = find_blocks(model)
    needs = predict_narrowing(shapes, blocks, model, checkpoint, run)
    compute = 4 if run.device == "cpu" else loaded_dtype(checkpoint.source).itemsize
    if writers:
        needs = _with_repair(needs, writers, model, run, compute)
    if measuring is not None:
        needs = _with_losses(needs, plan, model, measuring, compute)
    return needs


def _with_repair(needs: Needs, writers: Mapping[str, Writer], model: Any, run: Run, compute: int) -> Needs:
    layers = [model.get_submodule(f"{block}.{writer.layer}") for block, writer in writers.items()]
    widest = max(map(input_features, layers))
    # Sums in single precision, and the system, its factor and the solution in double.
    sums = (4 + 8 + 8) * widest**2 + (4 + 8 + 8) * widest * max(map(output_features, layers))
    operations = 0
    recordings = 0
    if run.calibration is not None:
        tokens = run.calibration.samples * run.calibration.sequence_length
        hidden = int(model.get_input_embeddings().weight.shape[1])
        # The original model's activations beside the shortened one's.
        recordings = tokens * hidden * compute
        body = sum(entry.numel() for block in find_blocks(model) for entry in block.module.parameters())
        # The original model once, and the shortened one twice: for the sums, and with the new weights.
        operations += 3 * 2 * tokens * body
        operations += sum(
            2 * tokens * input_features(layer) * (input_features(layer) + output_features(layer))
            for layer in layers
        )
    seconds = needs.seconds + operations / rate(torch.device(run.device))
    on_host = run.device == "cpu"
    return replace(
        needs,
        disk_bytes=needs.disk_bytes + 2 * recordings,
        host_bytes=needs.host_bytes + recordings + (sums if on_host else 0),
        activation_bytes=needs.activation_bytes + recordings,
        device_bytes=needs.device_bytes + (0 if on_host else sums),
        seconds=seconds,
    )


def _with_losses(needs: Needs, plan: DepthPlan, model: Any, measuring: Run, compute: int) -> Needs:
    whole = compute * sum(entry.numel() for entry in model.parameters())
    calibration = measuring.calibration
    tokens = 0 if calibration is None else calibration.samples * calibration.sequence_length
    body = sum(entry.numel() for block in find_blocks(model) for entry in block.module.parameters())
    total = len(plan.blocks)
    # Every block in every round, or every window once; half of the blocks run, as the others are replayed.
    times = len(windows(plan)) if plan.contiguous else sum(total - place for place in range(plan.gone))
    seconds = times * tokens * body / rate(torch.device(measuring.device))
    on_host = measuring.device == "cpu"
    return replace(
        needs,
        host_bytes=max(needs.host_bytes, IMPORT_BYTES + (whole if on_host else 0)),
        device_bytes=0 if on_host else max(needs.device_bytes, whole),
        seconds=needs.seconds + seconds,
    )
