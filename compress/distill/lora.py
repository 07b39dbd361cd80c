"""Distillation into low-rank adapters: the model stays as it is, and small matrices beside it learn.

The cheapest way to win back what compression took: a percent of the weights is trained, so that gradients and
moments need next to no memory, and the model itself stays where it was. Beside each linear layer stands the
product of two thin matrices (`rank`), which begins at zero. What is learned, from whom and with which loss
is as in `distill.logits`; training all weights gets nearer to the teacher, and takes sixteen bytes a weight.

In the end adapters are added to the weights (`result: merged`), and the result is an ordinary checkpoint.
Zeros that pruning left stay zero (`zeros`), though the adapters were trained without: what adding them cost
stands in the lineage (`merging`: the losses on the validation text before and after).

A model that is stored as integers (compressed-tensors or GPTQ) is trained on top of what its integers stand
for, and rounded again onto the same grid when adapters are added. Most of what adapters do is smaller than a
step of the grid, so that this takes back a good part of what was won. `result: adapter` leaves the model to
the byte and saves the adapters in its folder `adapter` as peft does; peft, vLLM and others apply them while
the model runs, at some cost in speed. Or train the integers themselves: `distill.logits`.

Experts that transformers keeps in one tensor get no adapter. Needs peft (`[peft]`).
"""

from typing import ClassVar, final

from compress.core.passes import Paper
from compress.training.adapter_options import AdapterOptions
from compress.training.imitator import Imitator


@final
class Lora(Imitator, AdapterOptions):
    """Learn a teacher's next-token distributions with adapters."""

    summary: ClassVar[str] = "train low-rank adapters to predict what a teacher predicts; merge or keep them"
    paper: ClassVar[Paper | None] = Paper(
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        url="https://arxiv.org/abs/2106.09685",
        authors="Hu et al.",
        year=2021,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--teacher TEACHER --train TEXT --tokens 5_000_000 --learning-rate 1e-3",
        "--teacher TEACHER --train TEXT --rank 64 --target '*.q_proj' --target '*.v_proj' --result adapter",
    )
