"""Latents of a damaged face moved to where those of the clean face lie; the autoencoder stays as it is.

After LAFR (arXiv 2505.23462): the features at each place look up the nearest entry of a codebook of clean faces, and
what was found is added to the latents, which pass by. Better photos of the person steer it by their embedding.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from facegen.errors import CheckpointBroken, WeightsMissing, WrongBaseModel
from facegen.files import write_json
from facegen.models.streams import initialise

if TYPE_CHECKING:
    from facegen.models.base import Model

_STEM = "aligner"


@dataclass(frozen=True)
class AlignerSizes:
    """channels: of the latents; dim: of the embeddings; width, deep: of the features at the latents' size and half of
    it; codes, code: entries of the codebook and their length; factor: pixels a latent.
    """

    channels: int = 8
    dim: int = 128
    width: int = 80
    deep: int = 128
    codes: int = 512
    code: int = 16
    factor: int = 8


class _Block(nn.Module):
    """Two convolutions beside a shortcut; who it is scales and shifts the channels between them."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, width), nn.GroupNorm(8, width)])
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)])
        self.who = nn.Linear(dim, 2 * width, bias=False)

    def forward(self, x: Tensor, who: Tensor) -> Tensor:
        scale, shift = self.who(who)[..., None, None].chunk(2, 1)
        h = self.convs[0](F.silu(self.norms[0](x)))
        h = self.norms[1](h) * (1 + scale) + shift
        made: Tensor = x + self.convs[1](F.silu(h))
        return made


class _Look(nn.Module):
    """Every place looks at all others, and at who it is."""

    def __init__(self, width: int, dim: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.token = nn.Linear(dim, width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, who: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = torch.cat([self.norm(x).flatten(2).transpose(1, 2), self.token(who)[:, None]], 1)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, 2))
        seen = F.scaled_dot_product_attention(q[:, :, :-1], k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(seen).transpose(1, 2).reshape(b, c, h, w)


class Codebook(nn.Module):
    """At each place the nearest of some unit vectors, and the loss that brings both together (van den Oord et al. 2017;
    unit vectors of few dimensions as Yu et al. 2021, so that entries do not die)."""

    def __init__(self, width: int, codes: int, length: int) -> None:
        super().__init__()
        self.into, self.back = nn.Conv2d(width, length, 1), nn.Conv2d(length, width, 1)
        self.codes = nn.Parameter(torch.randn(codes, length))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, width, h, w) → the entries found, at the same size, and their loss, a scalar."""
        own = F.normalize(self.into(x).float(), dim=1)
        codes = F.normalize(self.codes.float(), dim=1)
        nearest = codes[self.nearest(own)].permute(0, 3, 1, 2)
        loss = F.mse_loss(nearest, own.detach()) + 0.25 * F.mse_loss(own, nearest.detach())
        through = own + (nearest - own).detach()  # the gradient passes as if nothing had been looked up
        return self.back(through.to(x)), loss * own.shape[1]

    def nearest(self, own: Tensor) -> Tensor:
        """(B, length, h, w) → numbers of the entries (B, h, w)."""
        return torch.einsum("bchw,kc->bhwk", own, F.normalize(self.codes.float(), dim=1)).argmax(-1)


class AlignerNet(nn.Module):
    """Latents (B, C, h, w) of a damaged picture (B, 3, H, W) in [-1, 1] to those of the clean one.

    Untrained it changes nothing. ``who`` (B, D) are RAW embeddings of better photos, zero where there are none.
    """

    def __init__(self, sizes: AlignerSizes = AlignerSizes()) -> None:
        super().__init__()
        self.sizes = sizes
        width, deep = sizes.width, sizes.deep
        stem: list[nn.Module] = []
        before, times = 3, sizes.factor.bit_length() - 1
        for step in range(times):
            after = width if step == times - 1 else min(width, 16 * 2**step)
            stem += [nn.Conv2d(before, after, 3, 2, 1), nn.SiLU()]
            before = after
        self.stem = nn.Sequential(*stem)
        self.start = nn.Conv2d(sizes.channels, width, 3, 1, 1)
        self.before, self.codebook = _Block(width, sizes.dim), Codebook(width, sizes.codes, sizes.code)
        self.down, self.up = nn.Conv2d(width, deep, 3, 2, 1), nn.Conv2d(deep, width, 3, 1, 1)
        self.place = nn.Parameter(torch.zeros(1, deep, 8, 8))
        self.inside, self.look = _Block(deep, sizes.dim), _Look(deep, sizes.dim)
        self.after = nn.ModuleList([_Block(width, sizes.dim) for _ in range(2)])
        self.end = nn.Conv2d(width, sizes.channels, 3, 1, 1)
        self.quieten()

    def quieten(self) -> None:
        """The last layers of all branches to zero, so that latents pass unchanged until something is learnt."""
        weights = [self.look.out.weight, self.end.weight, self.end.bias]
        for block in self.modules():
            if isinstance(block, _Block):
                weights += [block.who.weight, block.convs[-1].get_parameter("weight")]
        for weight in weights:
            assert weight is not None
            nn.init.zeros_(weight)

    def forward(self, latents: Tensor, picture: Tensor, who: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents, and the codebook's loss."""
        who = F.normalize(who, dim=1) * who.shape[1] ** 0.5  # zero stays zero
        x = self.before(self.start(latents) + self.stem(picture), who)
        found, loss = self.codebook(x)
        x = x + found
        deep = self.down(x)
        deep = deep + F.interpolate(self.place, deep.shape[-2:], mode="bilinear")
        deep = self.look(self.inside(deep, who), who)
        x = x + self.up(F.interpolate(deep, x.shape[-2:], mode="nearest"))
        for block in self.after:
            x = block(x, who)
        return latents + self.end(F.silu(x)), loss


@dataclass(frozen=True, eq=False)
class Aligner:
    """A trained net beside its model."""

    net: AlignerNet

    @classmethod
    def fresh(cls, model: Model, dim: int, *, seed: int = 0, **sizes: int) -> Aligner:
        """To be trained; it changes nothing yet. dim: of the embeddings that steer it."""
        net = AlignerNet(AlignerSizes(model.latent_channels, dim, factor=model.vae_factor, **sizes))
        generator = torch.Generator().manual_seed(seed)
        initialise(net, generator)
        nn.init.normal_(net.codebook.codes, generator=generator)
        net.quieten()
        return cls(net.to(model.device))

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: Model) -> Aligner:
        """From the folder that `save` wrote; WeightsMissing, CheckpointBroken, WrongBaseModel."""
        weights, config = (Path(folder).expanduser() / f"{_STEM}.{kind}" for kind in ("safetensors", "json"))
        if not weights.is_file() or not config.is_file():
            raise WeightsMissing(f"{weights} is not there; train it: facegen train mini --stages restore.")
        try:
            net = AlignerNet(AlignerSizes(**json.loads(config.read_text("utf-8"))))
            net.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointBroken(f"{weights} does not hold the net that {config.name} describes ({error}).") from None
        if net.sizes.channels != model.latent_channels or net.sizes.factor != model.vae_factor:
            raise WrongBaseModel(
                f"{weights} is for latents of {net.sizes.channels} channels, {net.sizes.factor} pixels each; the model"
                f" has {model.latent_channels} and {model.vae_factor}."
            )
        return cls(net.to(model.device).requires_grad_(False).eval())

    def save(self, folder: Path) -> Path:
        """Write `folder` in half precision."""
        from facegen import checkpoints

        tensors = checkpoints.cast(self.net.state_dict(), torch.float16)
        checkpoints.write(folder / f"{_STEM}.safetensors", tensors, {"format": "pt"})
        write_json(folder / f"{_STEM}.json", asdict(self.net.sizes))
        return folder

    @torch.no_grad()
    def __call__(self, latents: Tensor, picture: Tensor, who: Tensor | None = None) -> Tensor:
        """latents (B, C, h, w) of picture (B, 3, H, W) in [0, 1], who (B, D) or nobody → aligned latents, alike."""
        if who is None:
            who = latents.new_zeros(len(latents), self.net.sizes.dim)
        net = self.net
        place = next(net.parameters()).device
        inputs = (one.to(place, torch.float32) for one in (latents, picture * 2 - 1, who))
        return net(*inputs)[0].to(latents)
