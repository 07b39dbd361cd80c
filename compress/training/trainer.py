"""The contract of methods that train: the numbers of an optimisation, which are the same for all.

A method says what is learned; what is drawn, in which steps, how it is checkpointed, resumed and judged is
the loop's (`compress.training.loop`). Nothing here imports torch.
"""

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from compress.core.errors import PlanError
from compress.core.facts import Fact
from compress.core.passes import Pass

Precision = Literal["auto", "float32", "bfloat16"]

ORIGIN = "origin"
"""The option of every trainer that names the float model behind integers."""
_SECONDS = re.compile(r"^(?P<count>[1-9]\d*)s$")


class Trainer(Pass):
    """A pass that optimises all weights of a model on training text, with AdamW."""

    needs_one_of: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.GPTQ_CHECKPOINT})
    other_models: ClassVar[tuple[str, ...]] = ()
    """Options that name another model; the engine finds it and hands it over in `Run.models`."""
    other_folders: ClassVar[tuple[str, ...]] = ()
    """Options that may name a folder of something else; what it holds is part of what is computed."""

    tokens: int = Field(default=1_000_000, ge=1, description="tokens to train on in all, at most")
    window: int = Field(default=512, ge=2, description="tokens in one training sequence")
    batch: int = Field(default=8, ge=1, description="training sequences in one forward and backward pass")
    accumulation: int = Field(
        default=1, ge=1, description="passes whose gradients are added up for one optimisation step"
    )
    learning_rate: float = Field(default=2e-4, gt=0, description="the highest learning rate")
    warmup: float = Field(
        default=0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises to it"
    )
    floor: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the learning rate that is left at the end of its fall along a cosine",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="AdamW's decay of matrices; norms and biases do not decay"
    )
    clip: float = Field(
        default=1.0, ge=0, description="largest norm of the gradient of a step; 0 does not limit it"
    )
    documents: Literal["joined", "apart"] = Field(
        default="joined",
        description="documents that share a sequence: `joined`, a later one sees those before it, or "
        "`apart`, each with attention and positions of its own and no prediction across the border",
    )
    activations: Literal["keep", "recompute"] = Field(
        default="keep",
        description="what the blocks computed is kept for the backward pass, or recomputed there (gradient "
        "checkpointing), which takes about a third more time and far less memory",
    )
    zeros: Literal["keep", "train"] = Field(
        default="keep",
        description="zeros inside matrices, as pruning leaves them: `keep` them so, or `train` them as well; "
        "integers that stand for zero are levels like others, unless `origin` says that the float was zero",
    )
    scales: Literal["keep", "train"] = Field(
        default="keep", description="of a student that is stored as integers: `train` their scales as well"
    )
    origin: str | None = Field(
        default=None,
        min_length=1,
        description="of a student that is stored as integers: the float model that they were rounded from "
        "(`$model` in a recipe). Training starts from its weights, as far as they round to the integers; "
        "else from what the integers stand for",
    )
    precision: Precision = Field(
        default="auto",
        description="arithmetic of the passes: `auto` is bfloat16 where the device is faster with it; "
        "weights and moments are float32 in any case",
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between two evaluations on the validation text; none evaluates ten times",
    )
    evaluation_tokens: int = Field(
        default=16_384, ge=1, description="tokens of the validation text that an evaluation reads, at most"
    )
    checkpoint_every: int | str = Field(
        default="300s",
        description="what lies between two checkpoints: a number of steps, or seconds as in `300s`",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="evaluations in a row that may be no better than the best one before training stops; "
        "none takes all steps",
    )
    keep: Literal["best", "last"] = Field(
        default="best",
        description="weights that are saved: the `best` on the validation text, or the `last`",
    )

    @field_validator("checkpoint_every")
    @classmethod
    def _steps_or_seconds(cls, value: int | str) -> int | str:
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if value == 0 or (isinstance(value, str) and _SECONDS.match(value) is None):
            raise ValueError("must be a positive number of steps, or of seconds such as '300s'")
        return value

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimisation step."""
        return self.window * self.batch * self.accumulation

    @property
    def steps(self) -> int:
        """Optimisation steps that the budget pays for.

        Raises:
            PlanError: it pays for none.
        """
        count = self.tokens // self.step_tokens
        if count == 0:
            raise PlanError(
                f"a budget of {self.tokens:,} tokens does not pay for one step of {self.step_tokens:,} "
                f"(window {self.window} x batch {self.batch} x accumulation {self.accumulation})",
                "raise --tokens, or lower --batch or --window",
            )
        return count

    @property
    def evaluation_interval(self) -> int:
        """Steps between two evaluations."""
        return self.evaluate_every or max(1, self.steps // 10)

    @property
    def evaluation_windows(self) -> int:
        """Sequences of the validation text that an evaluation reads, at most."""
        return max(1, self.evaluation_tokens // self.window)

    @property
    def checkpoint_steps(self) -> int | None:
        """Steps between two checkpoints, or ``None`` where time decides."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else None

    @property
    def checkpoint_seconds(self) -> float | None:
        """Seconds between two checkpoints, or ``None`` where steps decide."""
        return None if isinstance(self.checkpoint_every, int) else float(self.checkpoint_every[:-1])
