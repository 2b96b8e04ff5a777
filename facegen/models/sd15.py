"""Stable Diffusion 1.x: one text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from facegen.conditions import LoraCondition, TextCondition, pair
from facegen.memory import Memory, MemoryPlan
from facegen.models.base import Model
from facegen.models.prepared import Prepared
from facegen.models.text import negatives


class SD15Model(Model):
    """Stable Diffusion 1.x, its inpainting variants, and the embedded mini."""

    family = "Stable Diffusion 1.x"
    text_parts = ("text_encoder",)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], memory: MemoryPlan | Memory) -> SD15Model:
        """See Model.from_parts."""
        return cls(
            parts["unet"],
            parts["vae"],
            parts["text_encoder"],
            parts["tokenizer"],
            parts["scheduler_config"],
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
        """See Model.encode_text; embeds (2, B, L, D) after the final LayerNorm."""
        with self.memory.using(self.text_encoder), self._dressed(loras, "text_encoder", self.text_encoder):
            texts = [*negatives(negative, len(prompts)), *prompts]
            if weighted:
                uncond, cond = self.read_weighted(texts)[0].chunk(2)
            else:
                cond, uncond = self._embed(prompts), self._embed(texts[: len(prompts)])
        return TextCondition(embeds=pair(uncond, cond))

    def read(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, None]:
        """See Model.read; there is one text encoder, which reads `ids`."""
        embeds: Tensor = self.text_encoder(ids).last_hidden_state
        return embeds, None

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D)."""
        ids = self.tokenize(prompts)
        return self.read(ids, ids)[0]

    def added(self, text: TextCondition, prepared: Prepared, sample: Tensor) -> dict[str, Tensor]:
        """Nothing more than the prompt."""
        return {}
