"""The options of methods that train low-rank adapters on a frozen model. Nothing here imports torch."""

from typing import Literal

from pydantic import Field

from compress.training.trainer import Trainer


class AdapterOptions(Trainer):
    """A pass that trains adapters alone."""

    rank: int = Field(default=16, ge=1, description="rank of each adapter")
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="adapters are multiplied by this over the rank; none is twice the rank",
    )
    targets: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="patterns of the linear layers inside the blocks that get an adapter, as `*.q_proj`",
    )
    result: Literal["merged", "adapter"] = Field(
        default="merged",
        description="`merged` adds the adapters to the weights, which are rounded again where they are "
        "integers; `adapter` leaves the model as it is, with the adapters beside it in the folder `adapter`, "
        "in the format of peft",
    )
