"""AWQ: the checkpoint in `gemm` layout that vLLM, SGLang and GPTQModel load, with 4-bit kernels.

The integers, scales and zero points that a quantize pass made, in the order in which AWQ's kernels read them;
the name is that of the file format, and any method of rounding may have made the integers. A symmetric model
gets the zero point 8 everywhere, which computes the same. Nothing is rounded.

The format is narrow: 4 bits, one group size for all layers (16, 32, 64, 128 or whole rows), float16 scales,
embeddings and head in floats. What does not fit is refused before anything is written; a scale that float16
does not hold exactly stops the conversion with the layer's name, unless `--inexact round` allows the nearest.

`export.gptq` holds the same integers, other bits too, and is read by the same engines; take this one where a
kernel is faster on your hardware, or an engine reads nothing else.
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
class Awq(Pass):
    """Export to an AWQ checkpoint."""

    summary: ClassVar[str] = "the same 4-bit integers as an AWQ checkpoint, for vLLM, SGLang and GPTQModel"
    paper: ClassVar[Paper | None] = None
    examples: ClassVar[tuple[str, ...]] = ("", "--inexact round")
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.INTEGER_WEIGHTS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.AWQ_CHECKPOINT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS})

    inexact: Literal["refuse", "round"] = Field(
        default="refuse",
        description="a scale that float16 cannot hold exactly: refuse the model, or round it to the nearest",
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what the format cannot hold, and predict the work."""
        from compress.conversion import packed
        from compress.formats.awq import Awq as Format

        return packed.check(source, run, Format(self.inexact))

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Rewrite the shards, and say in the configuration what they hold."""
        from compress.conversion import packed
        from compress.formats.awq import Awq as Format

        return packed.apply(source, target, run, Format(self.inexact))
