"""NF4 of bitsandbytes: 4 bits on the quantiles of a normal distribution, without data.

What QLoRA trains on and what stock transformers loads with ``bitsandbytes`` installed. It costs one pass
over the weights, like `quantize.rtn`, whose even steps it beats at 4 bits where weights are distributed
normally; methods that see data (`quantize.gptq`, `quantize.autoround`) beat it, and their formats are the
ones that most servers take.

Blocks of 64 numbers share a magnitude; `double_quantization` rounds these magnitudes to 8 bits as well,
4.13 bits a weight in all instead of 4.5. Models are written shard by shard, in the bytes that transformers
itself would save. Embeddings, the output head and fused experts stay as they are: transformers loads these
in floats only. Needs the extra ``bitsandbytes``.
"""

from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field

from compress.core.passes import Paper
from compress.sweep.bitsandbytes_pass import Bitsandbytes

if TYPE_CHECKING:
    from compress.sweep.bitsandbytes import Form


@final
class BnbNf4(Bitsandbytes):
    """Round to NF4."""

    summary: ClassVar[str] = "4 bits as bitsandbytes and QLoRA have them (NF4); needs no data"
    paper: ClassVar[Paper | None] = Paper(
        title="QLoRA: Efficient Finetuning of Quantized LLMs",
        url="https://arxiv.org/abs/2305.14314",
        authors="Dettmers, Pagnoni, Holtzman, Zettlemoyer",
        year=2023,
    )
    examples: ClassVar[tuple[str, ...]] = ("", "--no-double-quantization --ignore '*.down_proj'")

    double_quantization: bool = Field(
        default=True, description="round the magnitudes of the blocks to 8 bits too"
    )

    def form(self) -> "Form":
        """NF4."""
        from compress.sweep.bitsandbytes import Form

        return Form("nf4", self.double_quantization)
