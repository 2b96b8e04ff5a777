"""Stable Diffusion XL: two text encoders, a pooled prompt, and the picture's size as conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from facegen.attention.backends import Backend, sdpa
from facegen.conditions import LoraCondition, TextCondition, pair
from facegen.errors import WrongRequest
from facegen.memory import Memory, MemoryPlan
from facegen.models.base import Model
from facegen.models.prepared import Prepared
from facegen.models.text import negatives

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class SDXLModel(Model):
    """Stable Diffusion XL and its inpainting variants."""

    family = "Stable Diffusion XL"
    text_parts = ("text_encoder", "text_encoder_2")

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: Mapping[str, Any],
        *,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        memory: MemoryPlan | Memory | None = None,
        backend: Backend = sdpa,
        zero_empty_prompt: bool = True,
    ) -> None:
        super().__init__(unet, vae, text_encoder, tokenizer, scheduler_config, memory=memory, backend=backend)
        self.text_encoder_2 = text_encoder_2
        self.tokenizer_2 = tokenizer_2
        self.zero_empty_prompt = zero_empty_prompt

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], memory: MemoryPlan | Memory) -> SDXLModel:
        """See Model.from_parts."""
        return cls(
            parts["unet"],
            parts["vae"],
            parts["text_encoder"],
            parts["tokenizer"],
            parts["scheduler_config"],
            text_encoder_2=parts["text_encoder_2"],
            tokenizer_2=parts["tokenizer_2"],
            memory=memory,
        )

    def encode_text(
        self,
        prompts: Sequence[str],
        negative: Sequence[str] | str | None = None,
        *,
        loras: Sequence[LoraCondition] = (),
        weighted: bool = False,
    ) -> TextCondition:
        """See Model.encode_text; embeds (2, B, L, D1 + D2) of the last layer but one, pooled (2, B, P).

        Without a negative prompt the unconditional half is zero, as SDXL was trained (diffusers'
        force_zeros_for_empty_prompt).
        """
        with (
            self.memory.using(self.text_encoder, self.text_encoder_2),
            self._dressed(loras, "text_encoder", self.text_encoder),
            self._dressed(loras, "text_encoder_2", self.text_encoder_2),
        ):
            if weighted:
                embeds, pools = self.read_weighted([*negatives(negative, len(prompts)), *prompts])
                assert pools is not None
                (uncond, cond), (negative_pooled, pooled) = embeds.chunk(2), pools.chunk(2)
                return TextCondition(embeds=pair(uncond, cond), pooled=pair(negative_pooled, pooled))
            cond, pooled = self._embed(prompts)
            if negative is None and self.zero_empty_prompt:
                uncond, negative_pooled = torch.zeros_like(cond), torch.zeros_like(pooled)
            else:
                uncond, negative_pooled = self._embed(negatives(negative, len(prompts)))
        return TextCondition(embeds=pair(uncond, cond), pooled=pair(negative_pooled, pooled))

    def _embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.read(self.tokenize(prompts), self.tokenize(prompts, self.tokenizer_2))

    def read(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) of the first and the second tokenizer -> embeddings (B, L, D1 + D2), pooled (B, P)."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds

    def added(self, text: TextCondition, prepared: Prepared, sample: Tensor) -> dict[str, Tensor]:
        """text_embeds (R, P) and time_ids (R, 6) = [height, width, 0, 0, height, width] unless the TextCondition says
        other.
        """
        if text.pooled is None:
            raise WrongRequest("Stable Diffusion XL needs TextCondition.pooled; Model.encode_text gives it.")
        ids = text.time_ids
        if ids is None:
            height, width = (side * self.vae_factor for side in sample.shape[-2:])
            ids = torch.tensor([height, width, 0, 0, height, width]).expand(2, 1, 6)
        return {"text_embeds": prepared.rows(text.pooled), "time_ids": prepared.rows(ids.to(self.dtype))}
