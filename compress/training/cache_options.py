"""How a teacher is cached; nothing here imports torch."""

from typing import final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.core.passes import invalid
from compress.training.trainer import Precision


@final
class CacheOptions(BaseModel):
    """What is kept of a teacher, and of how much text."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    k: int = Field(
        default=64,
        ge=1,
        description="most likely tokens whose log-probabilities are kept of each position, beside the sum of "
        "all others",
    )
    draws: int = Field(
        default=12,
        ge=0,
        description="tokens drawn from all others by their chances, with which the forward divergence is "
        "learned over the whole vocabulary on average",
    )
    tokens: int = Field(default=1_000_000, ge=1, description="tokens of the training text, at most")
    window: int = Field(
        default=512, ge=2, description="tokens in one training sequence; that of the runs which will use it"
    )
    evaluation_tokens: int = Field(default=16_384, ge=1, description="tokens of the validation text, at most")
    batch: int = Field(default=8, ge=1, description="training sequences in one forward pass")
    precision: Precision = Field(
        default="auto",
        description="arithmetic of the passes: `auto` is bfloat16 where the device is faster with it",
    )

    @classmethod
    def of(cls, given: dict[str, object]) -> "CacheOptions":
        """Options from plain data.

        Raises:
            UsageError: a value does not fit.
        """
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise invalid(error, "teacher cache", cls.model_fields) from error
