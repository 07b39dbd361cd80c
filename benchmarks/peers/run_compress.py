"""One cell of our own GPTQ, through the command line that users have.

The dense weights are read from the compressed-tensors folder that the command wrote, by the
same lines that read llm-compressor's. They must equal what stock transformers computes with
after loading that folder.
"""

from cell import Clock, parse_cell, write_cell  # first: it starts the clock

# ruff: isort: split
import os
import shutil
import subprocess
import sys
from pathlib import Path

from calibration import read_draw
from dequantize import compressed_tensors

REPOSITORY = Path(__file__).resolve().parents[2]

PRESETS: dict[str, list[str]] = {
    "default": [],
    "plain": ["--clip", "none", "--no-signed-scales", "--refinement", "0"],
}


def main() -> None:
    cell = parse_cell((__doc__ or "").splitlines()[0], PRESETS)
    samples, length = read_draw(cell.calibration).shape
    saved = cell.out / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    command = [sys.executable, "-m", "compress", "quantize", "gptq", str(cell.model)]
    command += ["--out", str(saved), "--calibration", str(cell.calibration)]
    command += ["--samples", str(samples), "--sequence-length", str(length)]
    command += ["--bits", str(cell.bits), "--group-size", str(cell.group_size)]
    command += ["--threads", str(cell.threads), *PRESETS[cell.preset]]
    clock = Clock()
    with clock.measure():  # the package of this repository, also where another one is installed
        subprocess.run(command, check=True, env=dict(os.environ, PYTHONPATH=str(REPOSITORY)))

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    dense = compressed_tensors(saved, cell.bits, cell.group_size)
    loaded = AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    served = loaded.state_dict()
    for name, tensor in dense.items():
        if not torch.equal(tensor.to(served[name].dtype), served[name]):
            raise ValueError(f"{name}: the saved weight is not what transformers loads")
    write_cell(
        cell,
        dense,
        settings=PRESETS[cell.preset],
        clock=clock,
        packages=("compressed-tensors", "transformers", "torch"),
        source="compressed-tensors pack-quantized, read from disk in float32",
        compared_with=f"the weights that stock transformers loads ({loaded.dtype}), equal",
        of_children=True,
    )


if __name__ == "__main__":
    main()
