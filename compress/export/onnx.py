"""ONNX: one graph that ONNX Runtime serves, held against the model before it is called done.

A decoder becomes a single graph that reads prompts and every token after them: keys and values go in and
come out (`past_key_values.N.key` to `present.N.key`), the past may be empty, and batch and lengths are free.
Names are those of optimum and onnxruntime-genai. Classifiers and encoders are exported as they are.

Weights that a quantize pass made go into the graph as their own integers, scales and zero points
(`com.microsoft.MatMulNBits`), and nothing is rounded again; 2 and 3 bits are stored in 4. What the operator
cannot hold (an embedding, groups that no block of 16 to 256 divides) is stored as floats, and the lineage
names it. Tokenizer, configuration and chat template travel along.

Nothing is published before the graph agrees with torch on left and right padding, odd lengths, an empty and
a long past, one sequence and several, prompts read at once and in pieces, and 64 greedy tokens. Errors are
relative to the largest output of torch: 1e-4 in float32, 2e-2 in float16; integers are compared exactly, and
with exact products the graph is held to 1e-3 of its own dequantized weights. At accuracy level 4 ONNX
Runtime rounds the inputs of these products to 8 bits, many times faster on a CPU: there the next token's
distribution has to stay within 0.02 nats, and 90% of the likeliest tokens have to be torch's.

Tracing and checking run on the CPU, with the whole model in memory, also where the run is on a GPU. The
alternative that holds weights twice, a graph for prompts and one for steps, is not offered. Needs the extra
`onnx`, or `onnx-gpu` in its place for ONNX Runtime with CUDA.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run


@final
class Onnx(Pass):
    """Export to ONNX."""

    summary: ClassVar[str] = "one ONNX graph with cache, integers kept as integers, parity with torch checked"
    paper: ClassVar[Paper | None] = None
    examples: ClassVar[tuple[str, ...]] = ("--accuracy-level 0", "--precision float16")
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.ONNX_GRAPH})
    breaks: ClassVar[frozenset[Fact]] = frozenset(
        {Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS, Fact.INTEGER_WEIGHTS}
    )

    precision: Literal["float32", "float16"] = Field(
        default="float32",
        description="floats of the graph, its inputs and outputs; on a CPU float32 is the faster one",
    )
    accuracy_level: Literal[0, 4] = Field(
        default=4,
        description="products with integer weights: 4 rounds their inputs to 8 bits and is many times faster "
        "on a CPU, 0 multiplies floats",
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be exported, and predict the work; see `compress.graph.prediction`."""
        from compress.graph.prediction import predict

        return predict(source, run, self.precision)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Trace, write and compare; see `compress.graph.building`."""
        from compress.graph.building import export
        from compress.models.tasks import resolve

        decisions = export(
            source,
            resolve(run.task, source.config),
            target,
            precision=self.precision,
            accuracy_level=self.accuracy_level,
            trust_remote_code=run.trust_remote_code,
            reporter=run.reporter,
        )
        return Outcome(decisions=decisions)
