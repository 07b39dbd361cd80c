"""Seconds and peak GPU memory of RTN and GPTQ on a random model of the shape of Llama-3.1-8B.

A few blocks are enough: the sweep holds one at a time, so time grows by the block and memory does not.
Run it with ``PYTHONPATH=benchmarks python benchmarks/gpu/quantize.py``; results go to ``reports/gpu``.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from random_llama import write_model
from safetensors.torch import save_file
from transformers import LlamaConfig

from compress import engine
from compress.core.events import Reporter
from compress.core.identity import libraries
from compress.core.recipe import Recipe

FULL_DEPTH = 32


class Stopwatch(Reporter):
    """Notes when each block starts and ends."""

    def __init__(self) -> None:
        self.blocks: list[float] = []
        self._started = 0.0

    def event(self, name: str, **facts: object) -> None:
        if name == "block.start":
            self._started = time.perf_counter()
        elif name == "block.finish":
            torch.cuda.synchronize()
            self.blocks.append(time.perf_counter() - self._started)

    def message(self, text: str) -> None:
        print(text, flush=True)

    def begin(self, title: str, total: int, unit: str) -> None:
        print(f"{title}: {total} {unit}s", flush=True)

    def advance(self, by: int = 1) -> None:
        """Blocks are noted by their events."""

    def end(self) -> None:
        """Blocks are noted by their events."""


def configuration(layers: int) -> LlamaConfig:
    """The shapes that Meta published for Llama-3.1-8B, with fewer layers."""
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def measure(
    method: Mapping[str, Any], model: Path, tokens: Path, work: Path, samples: int, length: int
) -> Any:
    """One run: seconds of each block, of the whole, and the peak of the GPU's memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch()
    recipe = Recipe.of(
        {
            "model": str(model),
            "device": "cuda",
            "data": {"calibration": str(tokens), "samples": samples, "sequence_length": length},
            "steps": [dict(method)],
        }
    )
    started = time.perf_counter()
    engine.run(recipe, work / "out", single=True, fresh=True, reporter=watch)
    seconds = time.perf_counter() - started
    blocks = watch.blocks[:-1]
    # The first block also pays for the warm-up of the kernels.
    steady = sorted(blocks[1:])[len(blocks[1:]) // 2]
    return {
        "method": dict(method),
        "seconds": seconds,
        "seconds_per_block": blocks,
        "steady_seconds_per_block": steady,
        "extrapolated_seconds": seconds + (FULL_DEPTH - len(blocks)) * steady,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def render(document: Mapping[str, Any]) -> str:
    lines = [
        "# RTN and GPTQ of Llama-3.1-8B shapes on one GPU",
        "",
        f"{document['device']}, torch {document['libraries']['torch']}, {document['layers']} random blocks "
        f"in bfloat16, {document['samples']} x {document['sequence_length']} calibration tokens. The last "
        f"column is the whole command extrapolated to {FULL_DEPTH} blocks.",
        "",
        "| method | s a block | whole command s | peak allocated GiB | extrapolated min |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in document["readings"]:
        lines.append(
            f"| {row['method']} | {row['steady_seconds_per_block']:.2f} | {row['seconds']:.1f} "
            f"| {row['peak_allocated_bytes'] / 2**30:.2f} | {row['extrapolated_seconds'] / 60:.1f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--report", type=Path, default=Path("reports/gpu"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU, and torch sees none")
    methods = [{"use": "quantize.rtn"}, {"use": "quantize.gptq"}, {"use": "quantize.gptq", "refinement": 0}]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_model(work / "model", configuration(arguments.layers), torch.bfloat16)
        tokens = torch.randint(0, 128000, (arguments.samples, arguments.sequence_length))
        save_file({"input_ids": tokens}, work / "tokens.safetensors")
        readings = [
            measure(
                method,
                work / "model",
                work / "tokens.safetensors",
                work,
                arguments.samples,
                arguments.sequence_length,
            )
            for method in methods
        ]
    document = {
        "device": torch.cuda.get_device_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "libraries": libraries(),
        "layers": arguments.layers,
        "samples": arguments.samples,
        "sequence_length": arguments.sequence_length,
        "readings": readings,
    }
    arguments.report.mkdir(parents=True, exist_ok=True)
    (arguments.report / "quantize.json").write_text(json.dumps(document, indent=1) + "\n")
    (arguments.report / "quantize.md").write_text(render(document))
    print(render(document))


if __name__ == "__main__":
    main()
