"""Rolling likelihood against lm-evaluation-harness itself, run by the Python of its own environment.

Set ``COMPRESS_LM_EVAL_PYTHON`` to a Python that has ``lm-eval`` 0.4.13.
"""

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest

from compress.data.corpora import documents
from tests.bench.metrics.test_scores import measured

pytestmark = pytest.mark.peer

PROGRAM = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

asked = json.load(sys.stdin)
model = HFLM(pretrained=asked["model"], device="cpu", dtype="float32", batch_size=1)
requests = [
    Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=number)
    for number, text in enumerate(asked["texts"])
]
print("FOUND " + json.dumps([float(value) for value in model.loglikelihood_rolling(requests)]))
"""


@pytest.mark.parametrize(
    ("model", "source", "most"),
    [
        ("gutenberg-4m", "gutenberg_valid.txt.gz", 3_000),
        ("stories260K", "tinystories_sample.txt", 5_000),
    ],
)
def test_rolling_likelihood(shared: Path, tmp_path: Path, model: str, source: str, most: int) -> None:
    """Three documents, one of them longer than the model's 512 positions."""
    python = os.environ.get("COMPRESS_LM_EVAL_PYTHON")
    if not python:
        pytest.skip("set COMPRESS_LM_EVAL_PYTHON to a Python that has lm-eval")
    folder = shared / "models" / model
    # The first is made long of several, so that it takes windows of all three kinds.
    found = [each[:most] for each in documents(str(shared / "data" / source), limit=12).texts]
    texts = ["\n".join(found[:10])[: 3 * most].strip(), *(each.strip() for each in found[10:12])]
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(texts), encoding="utf-8")
    answer = subprocess.run(
        [python, "-c", PROGRAM],
        input=json.dumps({"model": str(folder), "texts": texts}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2_000:]
    line = next(each for each in answer.stdout.splitlines() if each.startswith("FOUND "))
    theirs = -math.fsum(json.loads(line.removeprefix("FOUND ")))
    ours = measured(folder, str(text), "perplexity", protocol="lm-eval", tokens=1_000_000)
    assert ours["perplexity"].conditions["protocol"]["window"] == 512
    assert len(ours["perplexity"].samples) >= 5
    words = sum(len(re.split(r"\s+", each)) for each in texts)
    octets = sum(len(each.encode()) for each in texts)
    assert ours["perplexity.word"].value == pytest.approx(math.exp(theirs / words), rel=1e-4)
    assert ours["perplexity.byte"].value == pytest.approx(math.exp(theirs / octets), rel=1e-5)
    assert ours["perplexity.bits_per_byte"].value == pytest.approx(theirs / octets / math.log(2), rel=1e-5)
