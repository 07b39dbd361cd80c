"""Norms over some channels, against norms of the smaller size."""

import pytest
import torch
import transformers
from torch import nn

from compress.models.poison import over_channels


def norms() -> list[nn.Module]:
    made = [nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)]
    made.append(transformers.models.llama.modeling_llama.LlamaRMSNorm(8))
    for norm in made:
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("place", range(3))
def test_a_norm_over_some_channels_is_that_of_a_smaller_model(place: int) -> None:
    torch.manual_seed(0)
    norm = norms()[place]
    kept = torch.tensor([0, 3, 4, 6])
    small = type(norm)(4, eps=1e-6) if isinstance(norm, nn.RMSNorm) else type(norm)(4)
    for own, wide in zip(small.parameters(), norm.parameters(), strict=True):
        own.data = wide.data[kept]
    values = torch.randn(2, 5, 8)
    model = nn.Sequential(norm)
    with over_channels(model, ["0"], kept, 8):
        found = model(values)
    torch.testing.assert_close(found[..., kept], small(values[..., kept]))
    # Behind the context the norm is what it was.
    assert not torch.allclose(model(values)[..., kept], found[..., kept])
