"""Distillation of next-token distributions: a student learns to say what its teacher says of every position.

The way to win back what pruning took, and, with a text that is like what will be served, to fit a smaller
model to it. A distribution says of each position more than the one token that came next, so that a few
million tokens go a long way; cross-entropy alone needs many more, and pulls a student away from its teacher
towards the text.

The loss is a weighted sum (`loss`): the forward divergence KL(teacher || student), which covers all that the
teacher says; the reverse one, which leaves out what the student cannot say; the generalised Jensen-Shannon
divergence between them (`beta`); the total variation; and plain cross-entropy on the text. Distributions are
softened by a temperature, and divergences are multiplied by its square (section 2 of the paper). The loss of
the validation text is measured without it. `compress.training.csv` has the forward divergence and the
cross-entropy in any case, as `divergence` and `cross_entropy`.

Any artifact can teach, a quantized one too: it is run as the bench would run it. It must have the student's
tokenizer, since probabilities are compared token by token; rows that pad a table behind the tokenizer's last
token are left out on both sides where tables differ. A teacher with another tokenizer is compared only on
request (`vocabulary`), after every token at whose end both have read the same text: by the tokens that stand
for the same characters and all others together (`aligned`), or by probabilities in the order of their size
(`uld`, https://arxiv.org/abs/2402.12030, whose loss is `total_variation=3,cross_entropy=1`).

Its logits are computed as it is asked, and never stored: for a vocabulary of 150,000 a million tokens of them
would be 600 GB. What can be stored, once and for every later run, is its most likely tokens, the sum of all
others, and a few drawn from these (`compress teacher cache`, `cache`). The student's tokens are then put
together in the same way; the forward divergence learns from the drawn ones what is inside the sum, so that on
average it is that over the whole vocabulary, and the other divergences leave the proportions inside it to the
student. Windows are those of the cache.

A student that is stored as integers (compressed-tensors or GPTQ) is trained on its own grid: each pass
multiplies with the rounded weights that a reader of the artifact sees, gradients go straight through the
rounding to floats behind them (Bengio et al. 2013, https://arxiv.org/abs/1308.3432), and the result has the
same format, bits and groups. Its `scales` can be trained too; `origin` starts from the float weights.

What is trained is all float weights, in float32, without dropout; they are saved in the precision that they
had. Zeros that pruning left in a matrix stay zero (`zeros`). Windows of the text hold documents one after
the other with an end of text between, joined or apart (`documents`), and no padding. The best weights on
the validation text are kept, and a run that was killed goes on from its last checkpoint to the same bytes, on
the same kind of device with the same number of threads. `compress.training.csv` in the result has one row a
step. Several processes share the windows of a step: `torchrun --nproc-per-node 2 -m compress distill ...`.
"""

from typing import ClassVar, final

from compress.core.passes import Paper
from compress.training.imitator import Imitator


@final
class Logits(Imitator):
    """Learn a teacher's next-token distributions."""

    summary: ClassVar[str] = "train the model to predict what a teacher predicts; wins back what pruning took"
    paper: ClassVar[Paper | None] = Paper(
        title="Distilling the Knowledge in a Neural Network",
        url="https://arxiv.org/abs/1503.02531",
        authors="Hinton, Vinyals, Dean",
        year=2015,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--teacher TEACHER --train TEXT --tokens 5_000_000",
        "--teacher TEACHER --train TEXT --temperature 2 --loss forward_kl=0.9,cross_entropy=0.1",
        "--teacher TEACHER --train TEXT --loss jensen_shannon=1 --beta 0.1",
        "--teacher TEACHER --train TEXT --cache CACHE",
        "--teacher OTHER --train TEXT --vocabulary aligned --loss forward_kl=0.8,cross_entropy=0.2",
    )
