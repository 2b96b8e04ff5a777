"""A photo whose scene stays and whose person goes: a ControlNet that sees the photo and whom to put into it.

It learns from twins (facegen.training.twins), beside one identity adapter: that adapter's tokens say who, to the UNet
and to this net, which else could not know what of the photo is to go. Without guidance's person (the zero embedding)
it paints the photo as it is, so guidance leads away from the old face, towards the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from facegen.conditions import Condition, ControlCondition, Scale, TokenCondition
from facegen.errors import WrongRequest
from facegen.models.geometry import Geometry

KIND = "swap"
BESIDE = "ip_adapter_faceid"  # whose tokens it learnt to understand


@dataclass(frozen=True, eq=False)
class Swap(Geometry):
    """The ControlNet, in a folder called `swap` in diffusers' format."""

    kinds: ClassVar[tuple[str, ...]] = (KIND,)

    def beside(self, identity: Sequence[Condition], picture: Tensor, *, scale: Scale = 1.0) -> ControlCondition:
        """The photo (B, 3, H, W) in [0, 1], read for the person whom `identity`, the adapter's conditions, brings in.

        Raises WrongRequest where there are no tokens of such an adapter.
        """
        tokens = next((one.tokens for one in identity if isinstance(one, TokenCondition)), None)
        if tokens is None:
            raise WrongRequest(f"A trained swap needs the person's tokens; let {BESIDE} bring the person in.")
        return ControlCondition(controlnet=self.net, image=picture, embeds=tokens, scale=scale)
