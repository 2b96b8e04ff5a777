"""PhotoMaker v1 and v2: the word for the person in the prompt becomes the person, once per photo; with a LoRA.

The prompt marks that word by the trigger behind it ("a woman img"). The first fifth of the run follows the prompt
alone. v1 reads photos, v2 photos and face embeddings. Source: github TencentARC/PhotoMaker, hub TencentARC/PhotoMaker
and TencentARC/PhotoMaker-V2 (Apache-2.0), arXiv 2312.04461.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import Adapter, AdapterRequest, FaceLike, delayed, ready, seen, stacked, trainable
from facegen.checkpoints import SAFE, Shapes, Tensors, base_name, section
from facegen.conditions import Condition, LoraCondition, LowRankWeights, Scale, TextCondition, pair
from facegen.errors import CheckpointBroken, WrongBaseModel, WrongRequest
from facegen.models.clip import centre, clip_pixels
from facegen.models.lora import lora_from_tensors
from facegen.models.resampler import PerceiverSizes
from facegen.models.sdxl import SDXLModel
from facegen.models.stacked_id import FaceReader, StackedID
from facegen.models.streams import dtype_of, initialise
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

    from facegen.models.base import Model

Version = Literal["v1", "v2"]

ENCODER, LORA = "id_encoder", "lora_weights"
TRIGGER = "img"
DELAY = 0.2
OFFICIAL_EMBEDDING = 512
NOBODY = "a portrait of a person"
PERSON = re.compile(
    r"\b(?:person|woman|man|girl|boy|lady|gentleman|guy|adult|child|people|face|actor|actress|model)\b", re.IGNORECASE
)


class Lora(nn.Module):
    """A file's low-rank weights under their own names, as parameters."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        self.weights = nn.ParameterList(nn.Parameter(tensors[name].clone()) for name in self.names)

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the file; they are the parameters themselves."""
        return dict(zip(self.names, self.weights, strict=True))


class PhotoMaker(Adapter):
    """See the module's text; needs Stable Diffusion XL.

    Embeddings (B, D) are one photo for each of B pictures, (B, n, D) are n photos of one person for each. `scale` of a
    request weighs the LoRA; at 0 the adapter is left out and the prompt, without the trigger, acts alone.
    """

    name = "photomaker"
    title = "PhotoMaker"
    sees = preprocessing("photomaker")
    pack = sees.pack
    needs = frozenset({"face", "points", "photo"})
    writes_prompt: ClassVar[bool] = True

    def __init__(self, encoder: StackedID, lora: Lora, model: Model, path: Path) -> None:
        """path: where the weights come from, for the errors."""
        if encoder.width != model.text_width:
            raise WrongBaseModel(
                f"{path} was made for {base_name(encoder.width)} (tokens {encoder.width} wide), but the loaded base"
                f" model is {base_name(model.text_width)} (tokens {model.text_width} wide); load the base model it was"
                " made for."
            )
        if not isinstance(model, SDXLModel):
            raise WrongBaseModel(
                f"{path} writes the prompt of two text encoders, but the loaded {model.family} model has one; load"
                " Stable Diffusion XL."
            )
        self.encoder = encoder
        self.lora = lora
        self.layers: Mapping[str, LowRankWeights] = (
            lora_from_tensors(lora.tensors(), model, path).layers if lora.names else {}
        )

    @property
    def version(self) -> Version:
        return "v1" if self.encoder.qformer_perceiver is None else "v2"

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        return any(key.startswith(f"{ENCODER}.") for key in shapes)

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        parts = section(shapes, ENCODER)
        width = parts["fuse_module.layer_norm.weight"][0]
        found: dict[str, int | str] = {"base": base_name(width), "token width": width}
        if "qformer_perceiver.token_proj.0.weight" not in parts:
            return {**found, "variant": "v1", "tokens": 1}
        tokens = parts["qformer_perceiver.token_proj.2.weight"][0] // width
        embedding = parts["qformer_perceiver.token_proj.0.weight"][1]
        return {**found, "variant": "v2", "tokens": tokens, "embedding": embedding}

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model, *, heads: int | None = None) -> PhotoMaker:
        """From `photomaker-v1.bin` or `photomaker-v2.bin` (or .safetensors), or a folder with one of them.

        heads: of the image encoder, which no file tells; None for that of the published encoder of its width. Raises
        WrongRequest where there is no such encoder.
        """
        file = cls.choose(source, model)
        tensors = checkpoints.read(file)
        parts = {key: value for key, value in section(tensors, ENCODER).items() if not key.endswith("position_ids")}
        lora = section(tensors, LORA)
        strange = [key for key in tensors if not key.startswith((f"{ENCODER}.", f"{LORA}."))]
        strange += [f"{LORA}.{key}" for key in lora if not key.endswith((".weight", ".alpha"))]
        if strange:
            raise CheckpointBroken(f"{file} holds keys that do not belong there: {strange[0]}.")
        if not lora:
            raise CheckpointBroken(f"{file} lacks {LORA}; fetch the file again.")
        try:
            encoder = StackedID.from_shapes({key: tuple(value.shape) for key, value in parts.items()}, heads)
        except KeyError as missing:
            raise CheckpointBroken(f"{file} lacks {ENCODER}.{missing.args[0]}; fetch the file again.") from missing
        checkpoints.load_into(encoder, parts, path=file, prefix=f"{ENCODER}.")
        adapter = cls(encoder, Lora(lora), model, file)
        ready(adapter.modules(), model)
        return adapter

    @classmethod
    def fresh(
        cls,
        model: Model,
        embedding_dim: int = OFFICIAL_EMBEDDING,
        *,
        version: Version = "v2",
        vision: CLIPVisionConfig | None = None,
        rank: int = 64,
        seed: int = 0,
    ) -> PhotoMaker:
        """To be trained, in float32; vision: None for the official ViT-L. The LoRA changes nothing at first."""
        from transformers import CLIPVisionConfig

        vision = vision or CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
        )
        widths = [int(encoder.config.hidden_size) for encoder in cast(Any, model.text_encoders()).values()]
        if len(widths) != 2:
            raise WrongBaseModel(f"PhotoMaker needs Stable Diffusion XL, not {model.family}; load that.")
        generator = torch.Generator().manual_seed(seed)
        width = sum(widths)
        heads = max(width // 128, 1)
        sizes = PerceiverSizes(vision.hidden_size, width, width, depth=4, heads=heads, dim_head=min(width, 128))
        reader = FaceReader(embedding_dim, 4 * embedding_dim, 2, sizes) if version == "v2" else None
        encoder = StackedID(vision, (widths[0], widths[1]), reader)
        initialise(encoder, generator)
        tensors: Tensors = {}
        for layer in model.attention_layers:
            for part in ("q", "k", "v", "out"):
                linear = layer.module.get_submodule("to_out.0" if part == "out" else f"to_{part}")
                out, inner = cast(Tensor, linear.weight).shape
                down = torch.randn(rank, inner, generator=generator) / rank
                tensors[f"unet.{layer.name}.to_{part}_lora.down.weight"] = down
                tensors[f"unet.{layer.name}.to_{part}_lora.up.weight"] = torch.zeros(out, rank)
        adapter = cls(encoder, Lora(tensors), model, Path("The adapter"))
        trainable(adapter.modules(), model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`photomaker-v1.bin` or `photomaker-v2.bin`; see Adapter.save."""
        # In this order: the official loader compares the list of the keys.
        nested = {ENCODER: self.encoder.state_dict(), LORA: self.lora.tensors()}
        name = f"photomaker-{self.version}{SAFE if safe else '.bin'}"
        return checkpoints.write(folder / name, checkpoints.cast(nested, dtype))

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        reader = self.encoder.qformer_perceiver
        return OFFICIAL_EMBEDDING if reader is None else reader.embedding

    def modules(self) -> nn.Module:
        return nn.ModuleDict({ENCODER: self.encoder, LORA: self.lora})

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """See Adapter; needs `request.clip`, (n or B · n, 3, S, S) CLIP's pixels of the whole photos.

        The prompt without the trigger acts until the span begins, by default after a fifth of the run; then the prompt
        with the person in it. A zero row ("no person") keeps the former.
        """
        request = request or AdapterRequest()
        if not isinstance(model, SDXLModel):
            raise WrongRequest(f"PhotoMaker needs Stable Diffusion XL, not {model.family}.")
        if request.mask is not None:
            raise WrongRequest("PhotoMaker writes the prompt and has no mask; use another adapter.")
        if self.version == "v2":
            self.check_embeddings(embeddings)
        people = embeddings if embeddings.ndim == 3 else embeddings[:, None]  # (B, n, D)
        prompts = [request.prompt] * len(people) if isinstance(request.prompt, str) else list(request.prompt)
        if len(people) not in (1, len(prompts)):
            raise WrongRequest(
                f"There are {len(people)} people but {len(prompts)} prompts; give one, or {len(people)}."
            )
        people = people.expand(len(prompts), -1, -1)
        present = (people != 0).flatten(1).any(dim=1)
        marked = [phrase(text) for text in prompts]
        plain_words = [
            without(text, model) if is_there else prompt
            for text, prompt, is_there in zip(marked, prompts, present.tolist(), strict=True)
        ]
        plain = model.encode_text(plain_words, _negative(request))
        scale: Scale = 1.0 if request.scale is None else request.scale
        if (isinstance(scale, (int, float)) and scale == 0) or not bool(present.any()):
            return [plain]
        span = request.acts(delayed(DELAY))
        return [plain, self.personal(plain, marked, people, model, replace(request, span=span)), self.worn(scale)]

    def worn(self, scale: Scale = 1.0) -> LoraCondition:
        """The LoRA, which acts from the first step on."""
        return LoraCondition(layers=self.layers, scale=scale)

    def personal(
        self, plain: TextCondition, prompts: Sequence[str], people: Tensor, model: SDXLModel, request: AdapterRequest
    ) -> TextCondition:
        """The prompts (B, each with the trigger) with the person of RAW embeddings (B, n, D) in them."""
        if request.clip is None:
            raise WrongRequest("PhotoMaker needs the photos of the person, not their embeddings alone.")
        batch, photos = people.shape[:2]
        if request.clip.shape[0] not in (photos, batch * photos):
            raise WrongRequest(f"{request.clip.shape[0]} photos do not fit {batch} pictures of {photos} photos each.")
        count = photos * self.encoder.per_photo
        with torch.no_grad(), model.memory.using(*model.text_encoders().values()):
            spelt = [[expanded(text, tokenizer, model, count) for text in prompts] for tokenizer in _tokenizers(model)]
            ids = [torch.tensor([one for one, _ in rows], device=model.device) for rows in spelt]
            embeds, pooled = model.read(ids[0], ids[1])
        first = torch.tensor([place for _, place in spelt[1]], device=model.device)[:, None]
        columns = torch.arange(embeds.shape[1], device=model.device)[None]
        places = (columns >= first) & (columns < first + count)
        where = dtype_of(self.encoder)
        pixels = request.clip.to(*where)
        if pixels.shape[0] != batch * photos:
            pixels = pixels.repeat(batch, 1, 1, 1)
        found = self.encoder.people(pixels, people.flatten(0, 1).to(*where)).reshape(batch, count, -1)
        fused = self.encoder.stack(embeds.to(*where), places, found).to(plain.embeds.dtype)
        present = (people != 0).flatten(1).any(dim=1).to(model.device)[:, None]
        fused = torch.where(present[..., None], fused, plain.embeds[1])
        assert plain.pooled is not None
        pooled = torch.where(present, pooled, plain.pooled[1])
        return TextCondition(
            embeds=pair(plain.embeds[0], fused), pooled=pair(plain.pooled[0], pooled), span=request.acts()
        )

    def gather(self, faces: Sequence[FaceLike]) -> Tensor:
        """The photos side by side, (1, n, D)."""
        return stacked(faces)

    def complete(self, faces: Sequence[FaceLike], request: AdapterRequest) -> AdapterRequest:
        """CLIP's pixels of the whole photos."""
        if request.clip is not None:
            return request
        size = int(self.encoder.vision_model.config.image_size)
        why = "PhotoMaker looks at the photos; give them, not embeddings alone."
        photos = [clip_pixels(centre(seen([face], why).image, size)) for face in faces]
        return replace(request, clip=torch.cat(photos))


def phrase(prompt: str) -> str:
    """The prompt with the trigger in it: where the user put it, else behind the first word for a person.

    Raises WrongRequest for several triggers, one with nothing before it, and a prompt without a word for a person.
    """
    prompt = prompt if prompt.strip() else NOBODY
    count = prompt.count(TRIGGER)
    if count > 1:
        raise WrongRequest(f"PhotoMaker's prompt may hold {TRIGGER!r} once, not {count} times; remove the others.")
    if count == 1:
        if not prompt.split(TRIGGER)[0].strip():
            raise WrongRequest(f"{TRIGGER!r} stands behind the word for the person, as in 'a woman {TRIGGER}'.")
        return prompt
    found = PERSON.search(prompt)
    if found is None:
        raise WrongRequest(
            f"PhotoMaker's prompt has no word for a person; put {TRIGGER!r} behind it, as in 'a woman {TRIGGER}'."
        )
    return f"{prompt[: found.end()]} {TRIGGER}{prompt[found.end() :]}"


def without(prompt: str, model: Model) -> str:
    """The prompt without the trigger, as the tokenizer spells what is left."""
    before, after = (model.tokenizer(part, add_special_tokens=False).input_ids for part in prompt.split(TRIGGER))
    return str(model.tokenizer.decode([*before, *after]))


def expanded(prompt: str, tokenizer: Any, model: Model, count: int) -> tuple[list[int], int]:
    """Token ids (L) without the trigger and with the token before it `count` times, and where these begin.

    The trigger splits the text as an added special token does. Raises WrongRequest where the prompt leaves no room.
    """
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in prompt.split(TRIGGER))
    longest = min(int(tokenizer.model_max_length), int(cast(Any, model).text_encoder.config.max_position_embeddings))
    place = len(before)  # of the word's last token, behind the token of the beginning
    # Counted with the trigger: what the text loses at its end, it loses before the trigger is taken out.
    kept = [*before, *after[: max(longest - 3 - len(before), 0)]]
    if place > longest - 3 or place + count > longest - 1:
        raise WrongRequest(
            f"The prompt has no room for {count} tokens of the person; put {TRIGGER!r} nearer to its beginning, or give"
            " fewer photos."
        )
    ids = [tokenizer.bos_token_id, *kept, tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (longest - 1 - len(ids))
    ids = [*ids[:place], *[ids[place]] * count, *ids[place + 1 :]][:longest]
    return ids + [tokenizer.pad_token_id] * (longest - len(ids)), place


def _tokenizers(model: SDXLModel) -> tuple[Any, Any]:
    return model.tokenizer, model.tokenizer_2


def _negative(request: AdapterRequest) -> Sequence[str] | str | None:
    return request.negative_prompt or None
