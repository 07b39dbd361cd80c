"""One timed run of GPTQ, of one program, in its own environment; or of rounding to nearest, or of a copy.

`--preset` names what runs. Before it is timed it runs once on a model of one small block, so that nothing is
imported, compiled or traced for the first time on the clock. Then everything from the folder of the
original to the folder of the result counts, in these regions:

- *forward*: inside a decoder block, in whichever thread, without what hooks do there;
- *Hessian*: the products of inputs;
- *solve*: from the Hessian to integers and scales;
- *input/output*: loading, packing and writing;
- *verification*: reading back what was written and comparing it, which only ours does;
- *other*: the rest of the process's processor time.
"""

from cell import Cell, Preset, parse_cell, processor_seconds  # first: it starts the clock

# ruff: isort: split
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from calibration import KEY, read_draw
from regions import Regions

REPOSITORY = Path(__file__).resolve().parents[2]
FORWARD, HESSIAN, SOLVE, DISK, CHECK = "forward", "Hessian", "solve", "input/output", "verification"

PLAIN = {"clip": "none", "signed_scales": False, "refinement": 0}
"""Ours without what goes beyond the paper, and so beyond what the peers do when nobody asks."""

QUICK = {"refinement": 0}
"""Ours with its search of ranges and without going over the integers again."""

PRESETS = {
    "compress": Preset("gptq"),
    "compress-quick": Preset("gptq", QUICK),
    "compress-plain": Preset("gptq", PLAIN),
    "llm-compressor": Preset("gptq"),
    "gptqmodel": Preset("gptq"),
    "compress-rtn": Preset("rtn", calibrated=False),
    "copy": Preset("copy", calibrated=False),
}

WARM_WINDOWS = 8


def time_forward(regions: Regions) -> None:
    """The same definition of a forward pass for every program."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    regions.wrap(LlamaDecoderLayer, "forward", FORWARD)


def compress_program(regions: Regions, preset: Preset) -> Callable[[Cell], None]:
    """Ours, as a library."""
    sys.path.insert(0, str(REPOSITORY))
    from compress import engine
    from compress.core.recipe import Recipe
    from compress.models.checkpoint import Checkpoint
    from compress.numerics.hessian import Hessian
    from compress.quantize.gptq import Gptq
    from compress.quantize.rtn import Rtn
    from compress.sweep import sweep, verification, walk
    from compress.sweep.activations import Activations

    for owner, name, region in (
        (Hessian, "add", HESSIAN),
        (Gptq, "round", SOLVE),
        (Rtn, "round", SOLVE),
        (Checkpoint, "load", DISK),
        (Activations, "save", DISK),
        (sweep, "write_unit", DISK),
        (sweep, "encode", DISK),
        (walk.Walk, "complete", DISK),
        (verification._Verification, "run", CHECK),
    ):
        regions.wrap(owner, name, region)

    def run(cell: Cell) -> None:
        step = {"use": f"quantize.{preset.method}", **cell.rounding.record}
        step |= preset.settings
        recipe: dict[str, Any] = {"model": str(cell.model), "threads": cell.threads, "steps": [step]}
        if cell.calibration is not None:
            samples, length = read_draw(cell.calibration).shape
            recipe["data"] = {
                "calibration": str(cell.calibration),
                "samples": samples,
                "sequence_length": length,
            }
        engine.run(Recipe.of(recipe), cell.out / "saved", single=True, fresh=True)

    return run


def at_its_defaults(runner: ModuleType) -> Callable[[Cell], None]:
    """What a peer's runner does with a cell, its functions looked up when they run: they are timed."""

    def run(cell: Cell) -> None:
        cell = replace(cell, preset="default")
        model = runner.load(cell)
        runner.quantize(cell, model)
        runner.save(cell, model)

    return run


def llm_compressor_program(regions: Regions) -> Callable[[Cell], None]:
    import run_llmcompressor
    from llmcompressor.modifiers.gptq import GPTQModifier, base

    regions.wrap(base, "accumulate_hessian", HESSIAN)
    regions.wrap(GPTQModifier, "on_sequential_epoch_end", SOLVE)
    regions.wrap(run_llmcompressor, "load", DISK)
    regions.wrap(run_llmcompressor, "save", DISK)

    return at_its_defaults(run_llmcompressor)


def gptqmodel_program(regions: Regions, cell: Cell) -> Callable[[Cell], None]:
    import run_gptqmodel

    run_gptqmodel.start(cell)
    from gptqmodel.looper.gptq_processor import GPTQProcessor
    from gptqmodel.quantization.gptq import GPTQ

    regions.wrap(GPTQ, "add_batch", HESSIAN)
    regions.wrap(GPTQ, "finalize_hessian", HESSIAN)
    regions.wrap(GPTQ, "quantize", SOLVE)
    regions.wrap(GPTQProcessor, "submodule_finalize", DISK)
    regions.wrap(run_gptqmodel, "load", DISK)
    regions.wrap(run_gptqmodel, "save", DISK)

    return at_its_defaults(run_gptqmodel)


def copy_files(cell: Cell) -> None:
    """Copy the files of the model, and wait for the disk as ours does."""
    target = cell.out / "saved"
    target.mkdir(parents=True)
    for file in sorted(cell.model.iterdir()):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as stream:
            os.fsync(stream.fileno())


def program(regions: Regions, cell: Cell) -> Callable[[Cell], None]:
    """What runs, with its functions wrapped."""
    if cell.preset == "copy":
        return copy_files
    time_forward(regions)
    if cell.preset == "llm-compressor":
        return llm_compressor_program(regions)
    if cell.preset == "gptqmodel":
        return gptqmodel_program(regions, cell)
    return compress_program(regions, PRESETS[cell.preset])


def warm_cell(cell: Cell) -> Cell:
    """The cell of the small model beside the one that is timed (`gptq_time.py` writes it)."""
    from safetensors.torch import save_file

    out = cell.out / "warm"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    draw = None
    if cell.calibration is not None:
        draw = out / "draw.safetensors"
        save_file({KEY: read_draw(cell.calibration)[:WARM_WINDOWS].contiguous()}, draw)
    return replace(cell, model=cell.model.parent / "warm", calibration=draw, out=out)


def main() -> None:
    cell = parse_cell((__doc__ or "").splitlines()[0], PRESETS)
    if not PRESETS[cell.preset].calibrated:
        cell = replace(cell, calibration=None)
    regions = Regions()
    run = program(regions, cell)
    run(warm_cell(cell))
    shutil.rmtree(cell.out / "saved", ignore_errors=True)
    regions.clear()
    started, busy = time.perf_counter(), processor_seconds()
    run(cell)
    total, seconds = processor_seconds() - busy, time.perf_counter() - started
    counted = dict(regions.seconds)
    counted["other"] = total - sum(counted.values())
    record = {
        "program": cell.preset,
        "regions": counted,
        "processor_seconds": total,
        "seconds": seconds,
        "threads": cell.threads,
        "model_bytes": sum(file.stat().st_size for file in cell.model.iterdir()),
    }
    (cell.out / "timed.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
