"""Expert pruning: whole experts are taken out of mixtures, those that the model misses least first.

A mixture of experts holds all of them in memory and uses a few for each token, so its size is mostly experts
that a given text hardly needs. What is left is an ordinary, smaller mixture of the same class: the router
loses the rows of the experts that are gone, and shares each token among the others. A token uses as many
experts as before, so memory and loading get better, and the arithmetic of a token stays.

By `effect` an expert counts by what its mixture says without it: for every token that chooses it the mixture
is run again with its logit at minus infinity, and the squared change of the output is summed. That is the
error that Lu et al. minimise over sets of experts, here for one expert at a time, at the price of as many
passes through the experts as a token uses (of one for each expert, where a router's shares are those of
all). By `use` it counts by how many tokens choose it, which one pass tells; an expert that is chosen often
and adds little is overrated so. Both depend on the text: experts specialise, and what a calibration text
never asks for is the first to go. Each mixture chooses its own experts; how many stay is one number for all,
because configuration classes have one.

Which field of the configuration holds that number, which parameters are as long as it says, and which of
them is the router, is found from the model. Experts that lie on disk one by one get new numbers, those
in one tensor are cut out of it. Before a block is written it is run beside the block as it was with the
same experts barred, and both must agree. Routers that add something for each expert which is no parameter
(DeepSeek V3), or choose among groups of experts, are refused. For channels and heads, see `prune.width`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field, PositiveInt

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.sweep.expert_plan import AskedExperts


@final
class Experts(Pass):
    """Take out experts."""

    summary: ClassVar[str] = "take out the experts that a mixture of experts misses least"
    paper: ClassVar[Paper | None] = Paper(
        title="Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts "
        "Large Language Models",
        url="https://arxiv.org/abs/2402.14800",
        authors="Lu et al.",
        year=2024,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--keep 0.75 --calibration TEXT",
        "--keep 0.5 --by use --multiple 8 --calibration TEXT --samples 512",
    )
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    keep: float = Field(
        default=0.75, gt=0, lt=1, description="share of the experts of each mixture that stays; 2 at least"
    )
    by: Literal["effect", "use"] = Field(
        default="effect",
        description="what an expert counts by: `effect`, what its mixture's output changes by without it, or "
        "`use`, the tokens that choose it",
    )
    multiple: PositiveInt = Field(
        default=1,
        description="round the experts that stay to a multiple of this, such as the number of devices over "
        "which they are divided",
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be taken out, and predict the work; see `compress.sweep.expert_removal`."""
        from compress.sweep.expert_removal import check

        return check(self._asked(), self.by, source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Take experts out block by block; see `compress.sweep.expert_removal`."""
        from compress.sweep.expert_removal import remove

        return remove(self._asked(), self.by, source, target, run)

    def _asked(self) -> "AskedExperts":
        from compress.sweep.expert_plan import AskedExperts

        return AskedExperts(self.keep, self.multiple)
