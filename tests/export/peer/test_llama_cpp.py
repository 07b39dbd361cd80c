"""llama.cpp reads our files and says what our own dequantization says.

Set COMPRESS_LLAMA_CPP_PYTHON to a Python that has llama.cpp as the package xllamacpp (2026.10 or later).
On a CPU llama.cpp rounds activations to 8 bits in front of every quantized matrix, which is why
log-probabilities of such models differ by tenths where they are small; the divergence says how much that is.
Float32 has no such step and agrees to rounding. What was found is shown with `pytest -s`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from compress import engine
from compress.core.recipe import Recipe, Step

pytestmark = pytest.mark.peer

SCRIPT = Path(__file__).with_name("llama_cpp_log_probabilities.py")
LENGTHS = (1, 2, 5, 16, 64, 200)
RTN = "quantize.rtn"
CASES: dict[str, tuple[Step, ...]] = {
    "f32": (Step(use="export.gguf", type="f32"),),
    "f16": (Step(use="export.gguf", type="f16"),),
    "bf16": (Step(use="export.gguf", type="bf16"),),
    **{
        kind: (Step(use="export.gguf", type=kind),)
        for kind in ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
    },
    "int8 channel": (Step(use=RTN, bits=8, group_size="channel"), Step(use="export.gguf", inexact="round")),
    "int4 group 32": (Step(use=RTN, bits=4, group_size=32), Step(use="export.gguf", inexact="round")),
    "int4 group 32 asymmetric": (
        Step(use=RTN, bits=4, group_size=32, symmetric=False),
        Step(use="export.gguf", inexact="round"),
    ),
    "int3 group 64": (Step(use=RTN, bits=3, group_size=64), Step(use="export.gguf", inexact="round")),
}


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("COMPRESS_LLAMA_CPP_PYTHON")
    if found is None:
        pytest.skip("COMPRESS_LLAMA_CPP_PYTHON is not set")
    return found


@pytest.fixture(scope="module")
def prompts(shared: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "models" / "gutenberg-4m")
    text = (
        "It was a bright morning, and the whole household had gathered at the door to see the travellers "
        "leave. My father, who had said nothing since the letter came, walked to the gate and opened it. "
    )
    tokens = tokenizer(text * 8)["input_ids"]
    return [tokens[7 * number : 7 * number + length] for number, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("case", list(CASES))
def test_it_says_what_our_dequantization_says(
    case: str,
    python: str,
    prompts: list[list[int]],
    shared: Path,
    tmp_path: Path,
) -> None:
    source = shared / "models" / "gutenberg-4m"
    out = tmp_path / "out"
    engine.run(Recipe(model=str(source), threads=1, device="cpu", steps=CASES[case]), out)
    folder = next(path.parent for path in out.rglob("model.gguf"))
    asked, said = tmp_path / "tokens.json", tmp_path / "said.json"
    asked.write_text(json.dumps(prompts))
    subprocess.run([python, str(SCRIPT), str(folder / "model.gguf"), str(asked), str(said)], check=True)
    # Its matrices come from the format's own package, which the tests of the format hold against ours.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    differences, divergences = [], []
    for tokens, theirs in zip(prompts, json.loads(said.read_text()), strict=True):
        with torch.no_grad():
            ours = model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
        their = torch.tensor(theirs, dtype=torch.float64).log_softmax(-1)
        apart = float((their - ours).abs().max())
        # The same first choice, but where the first two are nearer to each other than the two programs.
        assert float(ours.max() - ours[their.argmax()]) <= 2 * apart
        differences.append(apart)
        divergences.append(float((ours.exp() * (ours - their)).sum()))
    sys.stdout.write(f"| {case} | {max(differences):.1e} | {max(divergences):.1e} |\n")
    if case == "f32":
        assert max(differences) < 1e-4
    elif case in ("f16", "bf16"):
        # Activations are rounded to the type of the matrix.
        assert max(divergences) < 1e-3
    else:
        assert max(divergences) < 1e-2
