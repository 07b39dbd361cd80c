"""GGUF: one file with weights, configuration and tokenizer, for llama.cpp and everything built on it.

Integers that a quantize pass made keep their values: symmetric 4 bits in groups of 32 are a `Q4_0`, symmetric
8 bits a `Q8_0`, asymmetric 4 bits a `Q4_1` where float16 holds `zero * scale`. 2 and 3 bits are stored in 4,
and a group that is a multiple of 32 repeats its scale; both are exact, in more bytes. Scales of either sign
are the format's own. What is not exact stops the export with the layer's name, unless `--inexact round`
allows the nearest float16; zero points often need that, because a product with a scale has more digits than
float16.

Floats, of a model that was not quantized or of its embedding, are written as they are or as `--type` says.
`q8_0` rounds by llama.cpp's own rule. `q2_k` to `q6_k` are k-quants, super-blocks of 256 weights in 2.6 to
6.6 bits each, found by a search of ours for the least squared error: it begins as llama.cpp's does and goes
on where that ends. The matrix that makes the logits is a `Q6_K` then, and one whose rows 256 does not divide
a `Q8_0`, as llama.cpp has it. Norms and biases are float32.

Known are Llama, Mistral, Qwen2 and Qwen3, with positions scaled by `linear`, `yarn` or `llama3`, byte-level
tokenizers that llama.cpp splits like the model (GPT-2, Llama 3, Qwen2, SmolLM, Tekken) and Llama 2's kind. A
sliding window that llama.cpp does not have bounds the context length. Everything else is refused before
anything is written.

`from_pretrained(FOLDER, gguf_file="model.gguf")` loads it in transformers. What GGUF has no entry for has to
be told there, such as biases in a Llama or heads of another width in a Qwen3: add
`config=AutoConfig.from_pretrained(FOLDER)`. Importance matrices are llama.cpp's own: for them, export `f16`
or `bf16` and use its tools. Needs the extra `gguf`.
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
class Gguf(Pass):
    """Export to GGUF."""

    summary: ClassVar[str] = "one GGUF file for llama.cpp: integers kept, floats as they are or as k-quants"
    paper: ClassVar[Paper | None] = None
    examples: ClassVar[tuple[str, ...]] = ("", "--type f16", "--type q4_k")
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.GGUF_FILE})
    breaks: ClassVar[frozenset[Fact]] = frozenset(
        {Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS, Fact.INTEGER_WEIGHTS}
    )

    type: Literal["auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"] = Field(
        default="auto",
        description="of float matrices, embedding and head among them: auto keeps the dtype that they have, "
        "q8_0 rounds to 8 bits, q6_k to q2_k to k-quants of so many bits",
    )
    inexact: Literal["refuse", "round"] = Field(
        default="refuse",
        description="a scale or offset of integers that float16 cannot hold exactly: refuse the model, or "
        "round it to the nearest",
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what the format or llama.cpp cannot hold, and predict the work."""
        from compress.conversion import gguf

        return gguf.check(source, run, self.type)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Write the file."""
        from compress.conversion import gguf

        return gguf.apply(source, target, run, self.type, self.inexact)
