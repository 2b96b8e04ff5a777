"""The channels-last group normalisation agrees with PyTorch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from facegen.models.norms import ChannelsLastGroupNorm, quicken


@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_agrees_with_pytorch(groups: int, dtype: torch.dtype, limit: float) -> None:
    generator = torch.Generator().manual_seed(groups)
    plain = nn.GroupNorm(groups, 64, eps=1e-5)
    with torch.no_grad():
        plain.weight.normal_(generator=generator)
        plain.bias.normal_(generator=generator)
    quick = nn.Sequential(nn.GroupNorm(groups, 64, eps=1e-5))
    quick[0].load_state_dict(plain.state_dict())
    quicken(quick)
    assert type(quick[0]) is ChannelsLastGroupNorm
    values = 3 + 2 * torch.randn(3, 64, 5, 7, generator=generator)
    given = torch.randn(3, 64, 5, 7, generator=generator)
    x = values.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = values.to(dtype).float().requires_grad_()
    found, wanted = quick(x), plain(y)
    found.backward(given.to(dtype))
    wanted.backward(given.to(dtype).float())
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    pairs = [(found, wanted), (x.grad, y.grad), (quick[0].weight.grad, plain.weight.grad)]
    for mine, theirs in [*pairs, (quick[0].bias.grad, plain.bias.grad)]:
        assert mine is not None
        assert theirs is not None
        assert (mine.float() - theirs).abs().max() <= limit * theirs.abs().max()


def test_other_layouts_take_pytorch_s_path() -> None:
    layers = nn.Sequential(nn.GroupNorm(2, 4), nn.GroupNorm(2, 4, affine=False))
    quicken(layers)
    assert type(layers[1]) is nn.GroupNorm
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    plain = nn.GroupNorm(2, 4)
    assert torch.equal(layers[0](x), plain(x))
    assert torch.equal(layers[0](x.flatten(2)), plain(x.flatten(2)))
