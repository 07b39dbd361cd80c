"""compressed-tensors from a GPTQ checkpoint, ours or another tool's: what vLLM and transformers load.

The integers, scales and zero points are those of the checkpoint, laid out anew; nothing is rounded. Both
versions of GPTQ are read, 2, 3, 4 and 8 bits, groups or whole rows, symmetric or not, rules for single
modules (`dynamic`). What `quantize` passes made and `export.gptq` wrote comes back to the same bytes.
`compress convert FOLDER --to compressed-tensors --out DIR` is this method too.

What has no place in the other format is refused when it is planned, and named: an activation order
(`desc_act` with a `g_idx` that is not trivial), a packing for one kernel, experts with zero points. A bias of
zeros where the architecture has none, which older tools wrote, stays behind.

Scales are stored in the precision of the model. The float16 scales of a GPTQ checkpoint are not always exact
in bfloat16: the conversion then stops and names the layer, unless `--inexact round` allows the nearest, which
is what engines compute with that run such a checkpoint in bfloat16.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from pydantic import Field

from compress.core.errors import PlanError
from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.conversion.packed import Survey
    from compress.core.artifact import Artifact
    from compress.core.run import Run


@final
class CompressedTensors(Pass):
    """Convert a GPTQ checkpoint to compressed-tensors."""

    summary: ClassVar[str] = "a GPTQ checkpoint's integers as compressed-tensors, for transformers and vLLM"
    paper: ClassVar[Paper | None] = None
    examples: ClassVar[tuple[str, ...]] = ("", "--inexact round")
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.GPTQ_CHECKPOINT, Fact.INTEGER_WEIGHTS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.GPTQ_CHECKPOINT})

    inexact: Literal["refuse", "round"] = Field(
        default="refuse",
        description="a scale that the precision of the model cannot hold exactly: refuse the model, or round "
        "it to the nearest",
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what the format cannot hold, and predict the work."""
        from compress.conversion import gptq

        found = gptq.survey(source, run)
        predicted = gptq.check(found)
        _configuration(found, source, run)
        return predicted

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Rewrite the shards, and say in the configuration what they hold."""
        from compress.conversion import gptq

        found = gptq.survey(source, run)
        gptq.check(found)
        return gptq.apply(found, _configuration(found, source, run), target, run, self.inexact)


def _configuration(found: "Survey", source: "Artifact", run: "Run") -> dict[str, Any]:
    """The configuration to write, after a rehearsal of loading it.

    Where transformers cannot prepare a model with packed layers, it may still load it dequantized.
    """
    from compress.conversion import gptq
    from compress.sweep.verification import rehearse

    config = gptq.configuration(found)
    quantization = config["quantization_config"]
    try:
        rehearse(source, quantization, run)
    except PlanError:
        if quantization.get("dequantize") or len({layer.scheme for layer in found.layers}) > 1:
            raise
        quantization["dequantize"] = True
        rehearse(source, quantization, run)
    return config
