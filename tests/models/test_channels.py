"""Channels and heads found by poison are those of the architecture, whatever it calls them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.models.channels import Channels, dissect
from compress.models.load import skeleton
from tests import models_zoo

WIDTH, MIDDLE = 8, 6


def found(name: str, folder: Path) -> dict[str, Channels]:
    anatomy = dissect(skeleton(Artifact.open(models_zoo.write(name, folder))))
    return {channels.reader: channels for channels in anatomy.channels}


def test_gated_channels_and_grouped_heads(tmp_path: Path) -> None:
    channels = found("llama", tmp_path)
    assert len(channels) == 3 * 2
    mlp = channels["model.layers.1.mlp.down_proj"]
    assert (mlp.kind, mlp.shape) == ("channels", (64, 1, 1))
    for number, group in enumerate(mlp.groups):
        assert group.shared == {}
        assert group.parts[0].columns == (number,)
        assert group.parts[0].rows == {"mlp.gate_proj": (number,), "mlp.up_proj": (number,)}
    heads = channels["model.layers.2.self_attn.o_proj"]
    assert (heads.kind, heads.shape) == ("heads", (2, 2, 8))
    for number, group in enumerate(heads.groups):
        rows = tuple(range(8 * number, 8 * number + 8))
        assert group.shared == {"self_attn.k_proj": rows, "self_attn.v_proj": rows}
        for place, part in enumerate(group.parts):
            own = tuple(range(8 * (2 * number + place), 8 * (2 * number + place) + 8))
            assert part.columns == own
            assert part.rows == {"self_attn.q_proj": own}


def test_queries_keys_and_values_one_after_the_other(tmp_path: Path) -> None:
    heads = found("gpt2", tmp_path)["transformer.h.0.attn.c_proj"]
    assert heads.shape == (4, 1, 8)
    head = heads.groups[1].parts[0]
    expected = [*range(8, 16), *range(40, 48), *range(72, 80)]
    assert head.rows == {"attn.c_attn": tuple(expected)}


def test_queries_keys_and_values_head_by_head(tmp_path: Path) -> None:
    heads = found("gpt-neox", tmp_path)["gpt_neox.layers.0.attention.dense"]
    assert heads.groups[1].parts[0].rows == {"attention.query_key_value": tuple(range(24, 48))}
    assert heads.groups[1].parts[0].columns == tuple(range(8, 16))


def test_a_gate_fused_with_what_it_gates(tmp_path: Path) -> None:
    mlp = found("modernbert", tmp_path)["layers.0.mlp.Wo"]
    assert mlp.groups[5].parts[0].rows == {"mlp.Wi": (5, 64 + 5)}


def test_norms_of_whole_heads_do_not_tie_heads_together(tmp_path: Path) -> None:
    assert found("qwen3", tmp_path)["model.layers.0.self_attn.o_proj"].shape == (2, 2, 8)


def test_a_block_run_again_and_again_counts_once(tmp_path: Path) -> None:
    channels = found("albert", tmp_path)
    assert sorted(entry.kind for entry in channels.values()) == ["channels", "heads"]


class Toy(nn.Module):
    """A model of one kind of block, as small as `dissect` takes it."""

    def __init__(self, block: Callable[[], nn.Module], blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Mlp(nn.Module):
    """Something between two linear layers, around which the input goes."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor], rows: int = MIDDLE) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, rows)
        self.down = nn.Linear(MIDDLE, WIDTH)
        self.between = between

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(self.between(self.up(hidden)))


def test_a_gate_in_every_other_row() -> None:
    model = Toy(lambda: Mlp(lambda x: x[..., ::2] * x[..., 1::2].sigmoid(), 2 * MIDDLE))
    anatomy = dissect(model)
    assert [channels.reader for channels in anatomy.channels] == ["blocks.0.down", "blocks.1.down"]
    rows = [group.parts[0].rows["up"] for group in anatomy.channels[0].groups]
    assert rows == [(2 * number, 2 * number + 1) for number in range(MIDDLE)]


def test_channels_in_another_order() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    anatomy = dissect(Toy(lambda: Mlp(lambda x: x.relu()[..., order])))
    rows = [group.parts[0].rows["up"][0] for group in anatomy.channels[0].groups]
    assert rows == order.tolist()


def test_blocks_that_are_alike_share_what_was_found() -> None:
    first, second = dissect(Toy(lambda: Mlp(torch.relu))).channels
    assert first.groups is second.groups


@pytest.mark.parametrize(
    ("between", "rows", "reason"),
    [
        (lambda x: x.softmax(-1), MIDDLE, "all its columns depend on one another"),
        (lambda x: nn.functional.pad(x, (0, 2)), MIDDLE - 2, "2 of its 6 columns come from no linear layer"),
    ],
)
def test_what_cannot_be_taken_apart_says_why(
    between: Callable[[torch.Tensor], torch.Tensor], rows: int, reason: str
) -> None:
    anatomy = dissect(Toy(lambda: Mlp(between, rows)))
    assert anatomy.channels == ()
    assert [entry.reader for entry in anatomy.held] == ["blocks.0.down", "blocks.1.down"]
    assert reason in anatomy.held[0].reason


class Leaking(Mlp):
    """What widens also goes out of the block by another way."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        middle = self.up(hidden)
        return hidden + self.down(middle) + middle.sum(-1, keepdim=True)


class Doubled(Mlp):
    """Two layers narrow the same channels."""

    def __init__(self) -> None:
        super().__init__(torch.relu)
        self.also = nn.Linear(MIDDLE, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        middle = self.up(hidden).relu()
        return hidden + self.down(middle) + self.also(middle)


class Uneven(nn.Module):
    """Two heads of different width."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, MIDDLE)
        self.down = nn.Linear(MIDDLE, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first, second = self.up(hidden).split([2, 4], -1)
        return hidden + self.down(torch.cat([first.softmax(-1), second.softmax(-1)], -1))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: Leaking(torch.relu), "up also feeds what lies beyond it"),
        (Doubled, "what feeds it also feeds also"),
        (Uneven, "its heads differ in size"),
    ],
)
def test_entangled_layers_are_held_with_the_reason(block: Callable[[], nn.Module], reason: str) -> None:
    anatomy = dissect(Toy(block))
    assert anatomy.channels == ()
    assert reason in anatomy.held[0].reason
