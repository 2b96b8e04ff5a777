"""A photo whose scene stays and whose person goes: a ControlNet that sees the photo and whom to put into it.

It sees the photo as the autoencoder does, as latents: what stays need not be found in pixels first.

It learns from twins (facegen.training.twins), beside one identity adapter: that adapter's tokens say who, to the UNet
and to this net, which else could not know what of the photo is to go. Without guidance's person (the zero embedding)
it paints the photo as it is, so guidance leads away from the old face, towards the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from facegen.conditions import Condition, ControlCondition, Scale, TokenCondition
from facegen.errors import WrongRequest
from facegen.models.geometry import Geometry, check

if TYPE_CHECKING:
    from facegen.models.base import Model

KIND = "swap"
BESIDE = "ip_adapter_faceid"  # whose tokens it learnt to understand


@dataclass(frozen=True, eq=False)
class Swap(Geometry):
    """The ControlNet, in a folder called `swap` in diffusers' format."""

    kinds: ClassVar[tuple[str, ...]] = (KIND,)

    @classmethod
    def fresh(cls, kind: str, model: Model, *, seed: int = 0) -> Self:
        """To be trained: a copy of the UNet's encoder behind zero convolutions, so that it changes nothing yet."""
        from diffusers import ControlNetModel

        from facegen.models.streams import initialise

        check(kind, cls.kinds)
        net = ControlNetModel.from_unet(
            model.unet,
            conditioning_embedding_out_channels=model.unet.config["block_out_channels"][:1],
            conditioning_channels=model.latent_channels,
        )
        initialise(net.controlnet_cond_embedding, torch.Generator().manual_seed(seed))
        return cls(kind, net.to(model.device, torch.float32).requires_grad_(True).train())

    def beside(self, identity: Sequence[Condition], photo: Tensor, *, scale: Scale = 1.0) -> ControlCondition:
        """The photo's latents (B, C, h, w), read for the person whom `identity`, the adapter's conditions, brings in.

        Raises WrongRequest where there are no tokens of such an adapter.
        """
        tokens = next((one.tokens for one in identity if isinstance(one, TokenCondition)), None)
        if tokens is None:
            raise WrongRequest(f"A trained swap needs the person's tokens; let {BESIDE} bring the person in.")
        return ControlCondition(controlnet=self.net, image=photo, embeds=tokens, scale=scale)
