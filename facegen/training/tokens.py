"""InstantID's first lesson: to say of a face what IP-Adapter-FaceID says, with whose layers it begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen.adapter import AdapterRequest
from facegen.adapters.instantid import InstantID
from facegen.adapters.ip_adapter_faceid import IPAdapterFaceID
from facegen.errors import WrongRequest
from facegen.training.loop import Objective


class TokensObjective(Objective):
    """The resampler of ``pupil`` learns to give the tokens that ``master`` gives; its streams are the master's.

    The master has learnt together with the base model what of a face to say and where; the pupil learns beside a base
    that no longer moves. Each token is said by ``queries / tokens`` queries, which attention weighs like the one. The
    streams' values are enlarged so that at its own strength the pupil says as much as the master at its own.
    IdentityNet stays as it is.
    """

    name = "tokens"

    def __init__(
        self,
        pupil: InstantID,
        master: IPAdapterFaceID,
        embeddings: Tensor,
        held_out: Tensor | None = None,
        batch: int = 192,
        nobody: int = 2,
    ) -> None:
        """embeddings, held_out: RAW, (N, D) each; nobody: how many of a batch are zeros, as guidance asks for.

        Raises WrongRequest where the pupil's queries are no multiple of the master's tokens.
        """
        self.master, self.embeddings, self.held_out = master, embeddings, held_out
        self.size, self.nobody = batch, nobody
        queries, tokens = pupil.projector.latents.shape[1], self._wanted(embeddings[:1].float()).shape[1]
        if queries % tokens:
            raise WrongRequest(f"{queries} queries cannot say {tokens} tokens in equal shares; take a multiple.")
        self.projector, self.each = pupil.projector, queries // tokens
        self.module = nn.ModuleDict({"instantid": pupil.modules()})
        self.module.requires_grad_(False)
        self.projector.requires_grad_(True)
        theirs, share = master.streams.state_dict(), master.strength / pupil.strength
        sizes = master.projector.get_submodule("norm").state_dict()  # how large tokens are
        with torch.no_grad():
            for name, value in pupil.streams.state_dict().items():
                value.copy_(theirs[name] * (share if "to_v" in name else 1))
            for name, value in self.projector.norm_out.state_dict().items():
                value.copy_(sizes[name])

    def helpers(self) -> list[nn.Module]:
        return [self.master.modules()]

    def _wanted(self, embeddings: Tensor) -> Tensor:
        """The master's tokens (B, tokens, width) of RAW embeddings (B, D)."""
        return self.master.tokens(embeddings, AdapterRequest(guidance=False))[-1]

    def batch(self, step: int, generator: torch.Generator) -> Tensor:
        """RAW embeddings (B, D), the last of them nobody's."""
        rows = torch.randint(len(self.embeddings), (self.size - self.nobody,), generator=generator)
        return F.pad(self.embeddings[rows].float(), (0, 0, 0, self.nobody))

    def loss(self, batch: Tensor, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            wanted = self._wanted(batch)
        # Tokens of different people lie near each other: as a share of how they vary, so that 1 is knowing nobody.
        said = self.projector(batch[:, None])
        astray = (said - wanted.repeat(1, self.each, 1)).square().mean() / wanted.var(0).mean()
        return {"loss": astray}

    def figures(self) -> dict[str, float]:
        """How far held-out people's tokens are from the master's, squared, as a share of how these vary."""
        if self.held_out is None:
            return {}
        astray = self.loss(self.held_out.float(), 0, torch.Generator())["loss"]
        return {"held_out_astray": round(float(astray.detach()), 4)}
