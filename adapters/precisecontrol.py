"""PreciseControl: StyleGAN's code of a face as two words of the prompt, which are others at every step.

A mapper turns the code and the timestep into two vectors; a tenth of them is added to the embedding of the word "face",
and the pair takes the place of the word `sks` (of a second person: `ks`). Adding a direction of StyleGAN to the code
edits the face. LoRA made for one person can be worn besides. The base is Stable Diffusion 2.1. Source: github
rishubhpar/PreciseControl, ECCV 2024.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import (
    Adapter,
    AdapterRequest,
    FaceLike,
    Guest,
    ready,
    seen,
    stacked,
    trainable,
    weight_files,
)
from facegen.attention.weights import GatedFeedForward, SelfProjections
from facegen.checkpoints import SAFE, Shapes, base_name, section
from facegen.conditions import Condition, LoraCondition, LowRankWeights, TextCondition, pair
from facegen.errors import CheckpointBroken, WrongBaseModel, WrongRequest
from facegen.face.align import ffhq_crop
from facegen.models.directions import Directions
from facegen.models.lora import fits
from facegen.models.streams import dtype_of, initialise
from facegen.models.text import each, rewriting, single_token
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from facegen.models.base import Model
    from facegen.models.e4e import E4E

ROWS, VECTORS = 18, 2
WORDS = ("sks", "ks")  # for the first and the second person
DOMAIN, SHARE = "face", 0.1
HEAD_WIDTH = 64
SECTION = "meta_id_net.stylegan_mlp"
ENCODER = "e4e_ffhq_encode.pt"
LORA = "lora_params*.pt"
LORA_STRENGTH = 0.2
FIRST_STEP = 999  # the timestep at which a run begins
PROMPT = "a photo of sks person"


class _Block(nn.Module):
    """Twice attention of the rows to one another, then a feed-forward, each with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn1 = SelfProjections(width)
        self.ff = GatedFeedForward(width)
        self.attn2 = SelfProjections(width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + _attend(self.attn1, self.norm1(x))
        x = x + _attend(self.attn2, self.norm2(x))
        out: Tensor = x + self.ff(self.norm3(x))
        return out


def _attend(weights: SelfProjections, x: Tensor) -> Tensor:
    heads = max(x.shape[-1] // HEAD_WIDTH, 1)
    query, key, value = (
        part(x).unflatten(-1, (heads, -1)).transpose(1, 2) for part in (weights.to_q, weights.to_k, weights.to_v)
    )
    found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    out: Tensor = weights.to_out(found)
    return out


class _Leaky(nn.Linear):
    """Linear, then leaky ReLU with slope 0.2; with a LayerNorm before it where it stands in a residual."""

    def __init__(self, inputs: int, outputs: int, *, normed: bool) -> None:
        super().__init__(inputs, outputs)
        self.norm = nn.LayerNorm(inputs) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x if self.norm is None else self.norm(x)), 0.2)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fn = _Leaky(width, width, normed=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fn(x)
        return out


class _Final(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        layers = [_Leaky(inputs, outputs, normed=False), *(_Residual(outputs) for _ in range(depth - 1))]
        self.net = nn.Sequential(*layers)


class Mapper(nn.Module):
    """Codes (B, 18, D) and timesteps (B,) -> (B, 2, width)."""

    def __init__(self, row_width: int, outputs: int, *, time_width: int = 512, depth: int = 4) -> None:
        super().__init__()
        self.row_width, self.outputs = row_width, outputs
        self.self_attn = _Block(row_width)
        self.time_embed = nn.Sequential(nn.Linear(time_width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.final_mlp = _Final(ROWS * row_width + time_width, outputs, depth)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> Mapper:
        depth = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("final_mlp.net."))
        return cls(
            shapes["self_attn.norm1.weight"][0],
            shapes["final_mlp.net.0.weight"][0],
            time_width=shapes["time_embed.0.weight"][1],
            depth=depth,
        )

    def forward(self, codes: Tensor, timesteps: Tensor) -> Tensor:
        rows = self.self_attn(codes).flatten(1)
        first = self.time_embed[0]
        assert isinstance(first, nn.Linear)
        half = first.in_features // 2
        speeds = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=codes.device) / half)
        angles = timesteps[:, None].float() * speeds
        times = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1).to(codes.dtype))
        out: Tensor = self.final_mlp.net(torch.cat([rows, times.expand(rows.shape[0], -1)], dim=1))
        return out.unflatten(1, (VECTORS, -1))


class PreciseControl(Adapter):
    """See the module's text; needs a base model with one text encoder.

    Its embeddings are the codes, flat (B, 18 · 512) or (B, 18, 512), mean code added. encoder: e4e, to read photos;
    None where the faces bring the code. lora: of one person, worn at LORA_STRENGTH unless the request gives a scale.
    stand_in: what stands for "sks person" in the steps outside the request's span (in the official demo a celebrity's
    name).
    """

    name = "precisecontrol"
    title = "PreciseControl"
    sees = preprocessing("precisecontrol")
    pack = sees.pack  # only to find the face; who it is, e4e sees
    needs = frozenset({"face", "points", "photo"})
    writes_prompt: ClassVar[bool] = True
    stand_in = "person"
    together: ClassVar[int] = len(WORDS)

    def __init__(
        self, mapper: Mapper, model: Model, encoder: E4E | None = None, lora: LoraCondition | None = None
    ) -> None:
        if mapper.outputs != VECTORS * model.text_width:
            raise WrongBaseModel(
                f"{self.title} was made for {base_name(mapper.outputs // VECTORS)} (tokens"
                f" {mapper.outputs // VECTORS} wide), the loaded base model is {base_name(model.text_width)}; load the"
                " base model it was made for."
            )
        self.mapper = mapper
        self.encoder = encoder
        self.lora = lora
        self.directions = Directions({})
        for word in (WORDS[0], DOMAIN):
            single_token(model.tokenizer, word, self.title)

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        return any(key.startswith(f"{SECTION}.") for key in shapes)

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        width = shapes[f"{SECTION}.final_mlp.net.0.weight"][0] // VECTORS
        return {"tokens": VECTORS, "base": base_name(width), "token width": width}

    @classmethod
    def find(cls, folder: Path) -> list[Path]:
        """See Adapter.find; the encoder beside it, a gigabyte, is not looked into."""
        files = [path for path in weight_files(folder) if path.name != ENCODER]
        return [path for path in files if cls.detect(checkpoints.shapes(path), path.name)]

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model) -> PreciseControl:
        """From `embeddings_gs-<step>.pt`, or a folder with it.

        Beside it count `e4e_ffhq_encode.pt`, `lora_params-<step>.pt` and `all_delta_w_dict.json`.
        """
        file = cls.choose(source, model)
        tensors = checkpoints.read(file)
        parts = section(tensors, SECTION)
        strange = [key for key in tensors if not key.startswith(f"{SECTION}.")]
        if strange:
            raise CheckpointBroken(f"{file} holds keys that do not belong there: {strange[0]}.")
        sizes = ("self_attn.norm1.weight", "final_mlp.net.0.weight", "time_embed.0.weight")
        checkpoints.require(parts, *sizes, path=file)
        mapper = Mapper.from_shapes({key: tuple(value.shape) for key, value in parts.items()})
        checkpoints.load_into(mapper, parts, path=file, prefix=f"{SECTION}.")
        adapter = cls(mapper, model)
        adapter.directions = Directions.beside(file.parent)
        adapter.lora = _lora_beside(file, model)
        ready(adapter.modules(), model)
        if (place := file.parent / ENCODER).is_file():
            from facegen.models.e4e import E4E

            adapter.encoder = model.memory.keep(E4E.from_file(place))
        return adapter

    @classmethod
    def fresh(
        cls, model: Model, embedding_dim: int = ROWS * 512, *, time_width: int = 512, depth: int = 4, seed: int = 0
    ) -> PreciseControl:
        """To be trained, in float32; embedding_dim: numbers in a code, 18 times the width of a row."""
        if embedding_dim % ROWS:
            raise WrongRequest(f"A W+ code has {ROWS} rows; {embedding_dim} numbers cannot be one.")
        mapper = Mapper(embedding_dim // ROWS, VECTORS * model.text_width, time_width=time_width, depth=depth)
        initialise(mapper, torch.Generator().manual_seed(seed))
        adapter = cls(mapper, model)
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`embeddings_gs-0.pt`; see Adapter.save."""
        own = {f"stylegan_mlp.{key}": value for key, value in self.mapper.state_dict().items()}
        nested = {"meta_id_net": checkpoints.cast(own, dtype)}
        return checkpoints.write(folder / f"embeddings_gs-0{SAFE if safe else '.pt'}", nested)

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        return ROWS * self.mapper.row_width

    def modules(self) -> nn.Module:
        return nn.ModuleDict({"stylegan_mlp": self.mapper})

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """See Adapter. A prompt without the word `sks` gets it; that of a zero row ("no person") is read as it is."""
        return self.conditions_of_people([embeddings], model, request)

    def conditions_of_people(
        self, people: Sequence[Tensor], model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """One or two people in one prompt, as `sks` and `ks`: codes (B, 18 · D) or (B, 18, D) of each."""
        request = request or AdapterRequest()
        if not 1 <= len(people) <= len(WORDS):
            raise WrongRequest(f"{self.title} knows words for one or two people, not for {len(people)}.")
        if request.mask is not None or (request.scale is not None and self.lora is None):
            raise WrongRequest(
                f"{self.title} writes the prompt and has neither strength nor mask; use another adapter."
            )
        codes = []
        for one in people:
            self.check_embeddings(one.flatten(1))
            one = one.reshape(-1, ROWS, self.mapper.row_width).to(*dtype_of(self.mapper))
            codes.append(self.directions.edited(one, request.edits))
        present = (codes[0] != 0).flatten(1).any(dim=1).tolist()
        prompts = each(request.prompt, len(present), "prompts")
        phrases = [phrase(text) if present[place % len(present)] else text for place, text in enumerate(prompts)]
        uncond = model.encode_text([""] * len(phrases), request.negative_prompt).embeds[0]
        ids = model.tokenize(phrases)

        def at(steps: Tensor) -> Tensor:
            return pair(uncond, self.encode(ids, model, codes, steps).to(uncond.dtype))

        written = TextCondition(embeds=at(torch.tensor([FIRST_STEP])), at=at, span=request.acts())
        conditions: list[Condition] = [written]
        if request.acts() != (0.0, 1.0):
            plain = [re.sub(rf"\b({'|'.join(WORDS)})( person)?\b", self.stand_in, text) for text in phrases]
            conditions.insert(0, model.encode_text(plain, request.negative_prompt))
        if self.lora is not None:
            scale = LORA_STRENGTH if request.scale is None else request.scale
            conditions.append(LoraCondition(layers=self.lora.layers, scale=scale))
        return conditions

    def conditions_together(self, people: Sequence[Guest], request: AdapterRequest, model: Model) -> list[Condition]:
        """See Adapter: the first person is `sks` in the prompt, the second `ks`."""
        with torch.no_grad():
            return self.conditions_of_people([self.gather(one.faces) for one in people], model, request)

    @property
    def knows(self) -> frozenset[str]:
        return frozenset({"edits"})

    def encode(self, ids: Tensor, model: Model, codes: Sequence[Tensor], steps: Tensor) -> Tensor:
        """Prompts (B, L) with people's words, codes (1 or B, 18, D) at timesteps (1,) or (B,) -> (B, L, width)."""
        table = model.text_encoder.get_input_embeddings()
        places = {word: single_token(model.tokenizer, word, self.title) for word in (DOMAIN, *WORDS[: len(codes)])}
        face = table(torch.tensor([places[DOMAIN]], device=ids.device))  # (1, width)
        vectors = {
            places[word]: face + SHARE * self.mapper(one, steps.to(one.device)).to(ids.device, face.dtype)
            for word, one in zip(WORDS, codes, strict=False)
        }
        with model.memory.using(model.text_encoder), rewriting(model.text_encoder, lambda x: widened(x, ids, vectors)):
            hidden: Tensor = model.text_encoder(ids).last_hidden_state
        return hidden

    def gather(self, faces: Sequence[FaceLike]) -> Tensor:
        """The mean code of the photos, (1, 18 · D)."""
        if self.encoder is None:
            return stacked(faces).mean(dim=1)
        photos = [seen([face], f"{self.title} looks at the photo; give one.") for face in faces]
        view = self.sees.sight
        crops = [torch.tensor(np.asarray(ffhq_crop(photo.image, photo.points, view.side))) for photo in photos]
        pixels = torch.stack(crops).permute(0, 3, 1, 2).float() / 255  # (n, 3, 512, 512)
        small = F.interpolate(view.normal(pixels), size=view.seen, mode="bilinear")
        codes = self.encoder(small.to(next(self.encoder.parameters()).device))
        return codes.flatten(1).mean(dim=0, keepdim=True)


def phrase(prompt: str) -> str:
    """The prompt with the word `sks` in it."""
    prompt = prompt.strip(" ,")
    if re.search(rf"\b{WORDS[0]}\b", prompt):
        return prompt
    return f"{PROMPT}, {prompt}" if prompt else PROMPT


def widened(embeds: Tensor, ids: Tensor, vectors: Mapping[int, Tensor]) -> Tensor:
    """Each of the tokens `vectors` (B, 2, D) knows becomes two; what follows moves on, and the last fall off the end.

    embeds (B, L, D), ids (B, L) -> (B, L, D).
    """
    length = ids.shape[1]
    rows = []
    for row, (tokens, looked_up) in enumerate(zip(ids, embeds, strict=True)):
        known = torch.isin(tokens, torch.tensor(list(vectors), device=tokens.device))
        repeats = torch.where(known, VECTORS, 1)
        source = torch.arange(length, device=tokens.device).repeat_interleave(repeats)[:length]
        within = torch.arange(length, device=tokens.device) - (repeats.cumsum(0) - repeats)[source]
        out = looked_up[source]
        for token, two in vectors.items():
            out = torch.where((tokens[source] == token)[:, None], two[row % len(two)][within.clamp(max=1)], out)
        rows.append(out)
    return torch.stack(rows)


def _lora_beside(file: Path, model: Model) -> LoraCondition | None:
    """The LoRA of the same step, else the only one there is, as cloneofsimo's trainer saves it: a list of tensors."""
    step = file.stem.rpartition("-")[2]
    found = sorted(file.parent.glob(LORA))
    path = next((one for one in found if one.stem == f"lora_params-{step}"), found[0] if len(found) == 1 else None)
    return None if path is None else lora_from_list(path, model)


def lora_from_list(path: Path, model: Model, *, scale: float = LORA_STRENGTH) -> LoraCondition:
    """[up, down, up, down, …] of the UNet's attention layers in the order of the original Stable Diffusion code.

    That is down, middle, up; in each block first attention, feed-forward's gate, second attention. A UNet with xformers
    was not recognised as attention by the trainer: such a list holds the gates alone. Raises CheckpointBroken,
    WrongBaseModel.
    """
    tensors = checkpoints.content(path)
    if not isinstance(tensors, list) or len(tensors) % 2 or not all(isinstance(one, Tensor) for one in tensors):
        raise CheckpointBroken(f"{path} is no list of LoRA weights (up, down, …); fetch the file again.")
    blocks = [layer.name.removesuffix("attn1.processor") for layer in model.attention_layers if not layer.cross]
    blocks.sort(key=lambda name: ("down", "mid_", "up_b").index(name[:4]))  # stable: keeps the order inside each part
    parts = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    parts.insert(4, "ff.net.0.proj")
    whole = [block + part for block in blocks for part in parts]
    names = whole if len(tensors) == 2 * len(whole) else [f"{block}ff.net.0.proj" for block in blocks]
    if len(tensors) != 2 * len(names):
        raise WrongBaseModel(
            f"{path} holds weights for {len(tensors) // 2} layers, the loaded base model has {len(whole)}; load the"
            " base model it was made for."
        )
    layers = {
        name: LowRankWeights(down=tensors[2 * place + 1].detach().float(), up=tensors[2 * place].detach().float())
        for place, name in enumerate(names)
    }
    fits(model.unet, layers, path.name)
    return LoraCondition(layers=layers, scale=scale)
