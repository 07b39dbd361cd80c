"""LLM.int8() of bitsandbytes: 8 bits with one scale a row, outlying inputs in float16 while it runs.

What stock transformers loads with ``bitsandbytes`` installed. Weights are rounded to nearest; which inputs
are multiplied apart in float16 is decided by the library at each forward pass, so it belongs to how the
model runs and not to its file. On servers `quantize.rtn` with 8 bits is read by more kernels. Models are
written shard by shard, in the bytes that transformers itself would save. Embeddings, the output head and
fused experts stay as they are: transformers loads these in floats only. Needs the extra ``bitsandbytes``.
"""

from typing import TYPE_CHECKING, ClassVar, final

from compress.core.passes import Paper
from compress.sweep.bitsandbytes_pass import Bitsandbytes

if TYPE_CHECKING:
    from compress.sweep.bitsandbytes import Form


@final
class BnbInt8(Bitsandbytes):
    """Round to 8 bits."""

    summary: ClassVar[str] = "8 bits as bitsandbytes has them (LLM.int8()); needs no data"
    paper: ClassVar[Paper | None] = Paper(
        title="LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        url="https://arxiv.org/abs/2208.07339",
        authors="Dettmers, Lewis, Belkada, Zettlemoyer",
        year=2022,
    )
    examples: ClassVar[tuple[str, ...]] = ("", "--ignore '*.down_proj'")

    def form(self) -> "Form":
        """8 bits."""
        from compress.sweep.bitsandbytes import Form

        return Form("int8")
