"""GPTQ: the checkpoint that vLLM, SGLang, GPTQModel, and transformers with GPTQModel load.

The integers, scales and zero points that a quantize pass made are laid out the way GPTQ's kernels read them
(`quantize_config.json` and the `quantization_config` of `config.json` say how). Nothing is rounded: 2, 3, 4
and 8 bits, symmetric and asymmetric, groups of 16 to 1024 or whole rows, scales of either sign, bits and
groups that differ between layers. `g_idx` is the trivial one, because our activation order leaves groups in
place.

Version 1 stores zero points less one and is what every reader knows; version 2 stores them as they are.
GPTQModel loads asymmetric layers in version 1 only where it wrote them itself, so `auto` takes version 1 for
a symmetric model and version 2 for one with zero points.

Scales are float16. Those of a model in bfloat16 or float16 nearly always are; where one is not exact the
conversion stops and names the layer, unless `--inexact round` allows the nearest.

A float layer among quantized ones is written down twice, as a rule of GPTQModel's (`dynamic`) and as
optimum's list of what is quantized. vLLM fuses queries, keys and values, and gates and ups, into layers of
its own names: there, give those that it fuses one scheme.

Without GPTQModel no stock transformers reads the folder; `compress verify` reads it back by the documented
layout and compares every weight. The alternative without a conversion, compressed-tensors, is what the
quantize passes write: keep it where the engine reads it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.formats.gptq import Gptq as Format

_CONFIG_FILE = "quantize_config.json"


@final
class Gptq(Pass):
    """Export to a GPTQ checkpoint."""

    summary: ClassVar[str] = "the same integers as a GPTQ checkpoint, for GPTQModel, vLLM and SGLang"
    paper: ClassVar[Paper | None] = None
    examples: ClassVar[tuple[str, ...]] = ("", "--version v2")
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.INTEGER_WEIGHTS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.GPTQ_CHECKPOINT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS})

    version: Literal["auto", "v1", "v2"] = Field(
        default="auto",
        description="of the checkpoint: v1 stores zero points less one, v2 as they are; auto takes v1 for "
        "symmetric models and v2 for others",
    )
    inexact: Literal["refuse", "round"] = Field(
        default="refuse",
        description="a scale that float16 cannot hold exactly: refuse the model, or round it to the nearest",
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what the format cannot hold, and predict the work."""
        from compress.conversion import packed

        return packed.check(source, run, self._format(source))

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Rewrite the shards, and say in both files what they hold."""
        import json

        from compress.conversion import packed

        outcome = packed.apply(source, target, run, self._format(source))
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        (target / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return outcome

    def _format(self, source: "Artifact") -> "Format":
        from compress.formats.gptq import Gptq as Format

        if self.version != "auto":
            return Format(self.version, self.inexact)
        groups = (source.config.get("quantization_config") or {}).get("config_groups") or {}
        symmetric = all((group.get("weights") or {}).get("symmetric", True) for group in groups.values())
        return Format("v1" if symmetric else "v2", self.inexact)
