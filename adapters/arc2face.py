"""Arc2Face: the face embedding takes the place of one token of the prompt.

The unit embedding, padded with zeros to the width of a token, replaces the token `id` of "photo of a id person"; a text
encoder tuned together with the UNet reads it. No projector, no further attention. Source: github foivospar/Arc2Face,
hub FoivosPar/Arc2Face (MIT), arXiv 2403.11641.

Three parts may lie beside it, each asked for by a field of the request: `controlnet/` (pose: `normals`, the rendered
surface normals of the head as it is to be), `exp_adapter/` (`expression`, SMIRK's 50 numbers of the expression, 2 of
the eyelids, 3 of the jaw) and `ref_adapter/` (`reference`, a picture whose look is kept). For three steps instead of 25
wear the LoRA latent-consistency/lcm-lora-sdv1-5 with the scheduler "lcm" and guidance 1.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import Adapter, AdapterRequest, given, halves, ready, refuse, trainable, with_zeros
from facegen.attention.processor import install
from facegen.checkpoints import SAFE, Shapes, base_name, section
from facegen.conditions import (
    Condition,
    ControlCondition,
    LoraCondition,
    ReferenceCondition,
    Scale,
    TextCondition,
    TokenCondition,
    pair,
)
from facegen.errors import CheckpointBroken, WrongBaseModel, WrongRequest
from facegen.models.control import load_controlnet
from facegen.models.lora import load_lora
from facegen.models.projections import FaceProjection, LinearProjection
from facegen.models.streams import Streams, dtype_of
from facegen.models.text import each, rewriting, single_token
from facegen.preprocessing import preprocessing

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel

    from facegen.models.base import Model

PROMPT = "photo of a id person"
TOKEN = "id"
ENCODER, UNET = "encoder", "arc2face"
POSE, EXPRESSION, REFERENCE = (
    "controlnet",
    "exp_adapter/exp_adapter.bin",
    "ref_adapter/pytorch_lora_weights.safetensors",
)
STRENGTHS: Mapping[str, Scale] = {"pose": 1.0, "expression": 1.0, "reference": 0.8}
SMIRK = {"expression": 50, "eyelid": 2, "jaw": 3}
OFFICIAL_EMBEDDING = 512
OLD_PREFIX = "text_model."

# "a close up portrait of", "photo,": says nothing of the person.
FRAME = re.compile(
    r"(?:an?\s+)?(?:close[ -]up\s+)?(?:photo|photograph|portrait|picture|headshot)\b(?:\s+of)?[\s,]*", re.I
)
# "a young smiling woman …" -> ("young smiling", "…")
PERSON = re.compile(
    r"(?:(?:an?|the)\s+)?((?:(?!with\b|in\b|on\b|of\b|an?\b|the\b|and\b)[\w-]+\s+)*?)"
    r"(?:person|woman|man|adult|lady|guy|gentleman|girl|boy|face)\b(.*)",
    re.I | re.S,
)
WITH = re.compile(r"(?:with|in|on|wearing|against|and)\b", re.I)


class Expression(nn.Module):
    """The expression adapter: numbers of an expression as tokens in a decoupled attention."""

    def __init__(self, projector: LinearProjection | FaceProjection, streams: Streams) -> None:
        super().__init__()
        self.image_proj = projector
        self.ip_adapter = streams

    @property
    def width(self) -> int:
        """How many numbers it reads."""
        projector = self.image_proj
        return projector.input_dim if isinstance(projector, LinearProjection) else projector.sizes.embedding

    @classmethod
    def from_file(cls, path: Path, model: Model) -> Expression:
        """In the layouts of IP-Adapter (one linear layer) or FaceID (two); raises as an adapter's from_pretrained."""
        tensors = checkpoints.read(path)
        parts = section(tensors, "image_proj")
        shapes = {key: tuple(value.shape) for key, value in parts.items()}
        checkpoints.require(shapes, "norm.weight", path=path)
        linear = "proj.weight" in shapes
        checkpoints.require(shapes, *(["proj.weight"] if linear else ["proj.0.weight", "proj.2.weight"]), path=path)
        projector = LinearProjection.from_shapes(shapes) if linear else FaceProjection.from_shapes(shapes)
        checkpoints.load_into(projector, parts, path=path, prefix="image_proj.")
        streams = Streams.from_tensors(section(tensors, "ip_adapter"), model, path, section="ip_adapter")
        return cls(projector, streams)

    def tokens(self, numbers: Tensor, guidance: bool) -> Tensor:
        """Numbers (B, 55) -> Pair (2, B, tokens, width); the other half sees zeros."""
        if numbers.shape[-1] != self.width:
            raise WrongRequest(f"An expression has {self.width} numbers here, not {numbers.shape[-1]}.")
        inputs = numbers.reshape(-1, 1, self.width).to(*dtype_of(self.image_proj))
        return halves(self.image_proj(with_zeros(inputs, guidance)), guidance)


@dataclass(eq=False)
class Parts:
    """What may lie beside the encoder: the ControlNet for poses, the expression adapter, the reference's LoRA."""

    pose: ControlNetModel | None = None
    expression: Expression | None = None
    reference: LoraCondition | None = None

    def modules(self) -> dict[str, nn.Module]:
        """Those that are networks, by name."""
        found: dict[str, nn.Module | None] = {"pose": self.pose, "expression": self.expression}
        return {name: part for name, part in found.items() if part is not None}


class Arc2Face(Adapter):
    """See the module's text; needs a base model with one text encoder.

    encoder: the tuned text encoder. Its config may hold two entries of ours: face_embedding_dim (512 when missing) and
    face_free_prompts: whether it was trained with other prompts than the official one (the official was not).
    unet: one that was tuned with the encoder; None where the base model's own was (the embedded mini).
    """

    name = "arc2face"
    title = "Arc2Face"
    sees = preprocessing("arc2face")
    pack = sees.pack
    needs = frozenset({"face"})
    writes_prompt: ClassVar[bool] = True

    def __init__(
        self,
        encoder: CLIPTextModel,
        model: Model,
        unet: UNet2DConditionModel | None = None,
        parts: Parts | None = None,
    ) -> None:
        self.encoder = encoder
        self.unet = unet
        self.parts = parts or Parts()
        self.token = single_token(model.tokenizer, TOKEN, self.title)
        if encoder.config.hidden_size != model.text_width:
            raise WrongBaseModel(
                f"Arc2Face's encoder was made for {base_name(encoder.config.hidden_size)} (tokens"
                f" {encoder.config.hidden_size} wide), the loaded base model is {base_name(model.text_width)} (tokens"
                f" {model.text_width} wide); load the base model it was made for."
            )
        if encoder.config.vocab_size < len(model.tokenizer):
            raise WrongBaseModel(
                f"Arc2Face's encoder knows {encoder.config.vocab_size} words, the loaded base model's tokenizer"
                f" {len(model.tokenizer)}; load the base model it was made for."
            )

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, shapes: Shapes, file_name: str) -> bool:
        """Its encoder is a CLIP text encoder like any other: only the folder's layout tells; see `find`."""
        return False

    @classmethod
    def sizes(cls, shapes: Shapes, file_name: str) -> Mapping[str, int | str]:
        width = next(shape[1] for key, shape in shapes.items() if key.endswith("token_embedding.weight"))
        return {"base": base_name(width), "token width": width}

    @classmethod
    def find(cls, folder: Path) -> list[Path]:
        """The folder `encoder` in it, or the folder itself when it is called that."""
        places = (folder / ENCODER, folder)
        return [place for place in places if place.name == ENCODER and (place / "config.json").is_file()][:1]

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Model) -> Arc2Face:
        """From a folder with `encoder/` and, where the base model was not tuned with it, the UNet `arc2face/`.

        Of the parts those that are there: `controlnet/`, `exp_adapter/exp_adapter.bin`,
        `ref_adapter/pytorch_lora_weights.safetensors`.
        """
        place = cls.choose(source, model)
        unet = _load_unet(place.parent / UNET, model) if (place.parent / UNET).is_dir() else None
        adapter = cls(_load_encoder(place), model, unet, _load_parts(place.parent, model))
        ready(adapter.modules(), model)
        for net in (unet, adapter.parts.pose):
            if net is not None:
                model.memory.place(net)
        return adapter

    @classmethod
    def fresh(
        cls, model: Model, embedding_dim: int, *, encoder: CLIPTextModel | None = None, free_prompts: bool = True
    ) -> Arc2Face:
        """To be trained together with the model's UNet, in float32.

        encoder: None for a copy of the model's text encoder; the model's own may be given to tune both as one.
        """
        encoder = encoder or copy.deepcopy(model.text_encoder)
        encoder.config.face_embedding_dim = embedding_dim
        encoder.config.face_free_prompts = free_prompts
        adapter = cls(encoder, model)
        if embedding_dim > model.text_width:
            raise WrongRequest(
                f"An embedding of {embedding_dim} does not fit into a token of {model.text_width} numbers."
            )
        trainable(encoder, model)
        return adapter

    def save(self, folder: Path, *, dtype: torch.dtype | None = None, safe: bool = False) -> Path:
        """`encoder/` and, when it has a UNet of its own, `arc2face/`; see Adapter.save."""
        weights = {OLD_PREFIX + key: value for key, value in self.encoder.state_dict().items()}
        name = "model" + SAFE if safe else "pytorch_model.bin"
        checkpoints.write(folder / ENCODER / name, checkpoints.cast(weights, dtype), {"format": "pt"})
        self.encoder.config.save_pretrained(str(folder / ENCODER))
        if self.unet is not None:
            path = folder / UNET / "diffusion_pytorch_model.safetensors"
            checkpoints.write(path, checkpoints.cast(self.unet.state_dict(), dtype), {"format": "pt"})
            self.unet.save_config(str(folder / UNET))
        _save_parts(self.parts, folder, dtype)
        return folder

    # --- work -----------------------------------------------------------------------------------------------------

    @property
    def embedding_dim(self) -> int:
        return int(getattr(self.encoder.config, "face_embedding_dim", OFFICIAL_EMBEDDING))

    @property
    def free_prompts(self) -> bool:
        """Whether the encoder understands other prompts than PROMPT."""
        return bool(getattr(self.encoder.config, "face_free_prompts", False))

    def modules(self) -> nn.Module:
        own: dict[str, nn.Module] = {ENCODER: self.encoder}
        if self.unet is not None:
            own[UNET] = self.unet
        return nn.ModuleDict(own | self.parts.modules())

    def host(self, model: Model) -> Model:
        """A second model around the own UNet; VAE, tokenizer, schedulers and turns (`busy`) are shared."""
        if self.unet is None:
            return model
        twin = copy.copy(model)
        twin.unet = self.unet
        twin.attention_layers = install(self.unet)
        return twin

    def conditions_from_embeddings(
        self, embeddings: Tensor, model: Model, request: AdapterRequest | None = None
    ) -> list[Condition]:
        """See Adapter. Any number of people in one batch, each with the same or its own prompt.

        A prompt without the word `id` gets it; the prompt of a zero row ("no person") is read as it is.
        """
        request = request or AdapterRequest()
        self.check_embeddings(embeddings)
        if embeddings.ndim != 2:
            raise WrongRequest("Arc2Face takes one embedding per picture; fuse several photos into one.")
        if request.scale not in (None, 1.0) or request.span not in (None, (0.0, 1.0)) or request.mask is not None:
            raise WrongRequest(
                "Arc2Face writes the prompt and has neither strength, span nor mask; use another adapter."
            )
        present = (embeddings != 0).any(dim=-1).tolist()
        prompts = each(request.prompt, len(present), "prompts")
        count = len(prompts)
        phrases = [self.phrase(text) if present[place % len(present)] else text for place, text in enumerate(prompts)]
        cond = self.encode(phrases, model, embeddings.expand(count, -1))
        if request.guidance:
            negative = each(request.negative_prompt, 1, "negative prompts")
            uncond = self.encode(negative, model)
            if len(negative) not in (1, count):
                raise WrongRequest(
                    f"There are {count} prompts but {len(negative)} negative prompts; give 1 or {count}."
                )
        else:
            uncond = cond
        text = TextCondition(embeds=pair(uncond.expand_as(cond), cond))
        return [text, *self.further(text, model, request)]

    @property
    def knows(self) -> frozenset[str]:
        there = {"normals": self.parts.pose, "expression": self.parts.expression, "reference": self.parts.reference}
        return frozenset(name for name, part in there.items() if part is not None)

    def expression_of(self, names: Mapping[str, float]) -> Tensor:
        """SMIRK's numbers by name, the others 0: expression_0 … expression_49, eyelid_0, eyelid_1, jaw_0 … jaw_2."""
        places = [f"{part}_{number}" for part, count in SMIRK.items() for number in range(count)]
        for name in names:
            if name not in places:
                raise WrongRequest(f"{self.title} knows the expression by {places[0]} … {places[-1]}, not by {name!r}.")
        return torch.tensor([[names.get(place, 0.0) for place in places]])

    def further(self, text: TextCondition, model: Model, request: AdapterRequest) -> list[Condition]:
        """What the parts that the request asks for add; WrongRequest for a part that is not there."""
        conditions: list[Condition] = []
        parts, strengths = self.parts, {**STRENGTHS, **request.parts}
        if strange := strengths.keys() - STRENGTHS.keys():
            raise WrongRequest(f"{self.title} has the parts {', '.join(STRENGTHS)}, not {min(strange)!r}.")
        if request.normals is not None:
            controlnet = _there(parts.pose, "normals", POSE)
            conditions.append(ControlCondition(controlnet=controlnet, image=request.normals, scale=strengths["pose"]))
        if request.expression is not None:
            expression = _there(parts.expression, "an expression", EXPRESSION)
            conditions.append(
                TokenCondition(
                    tokens=expression.tokens(request.expression, request.guidance),
                    layers=expression.ip_adapter.layers,
                    scale=strengths["expression"],
                )
            )
        if request.reference is not None:
            lora = _there(parts.reference, "a reference", REFERENCE)
            latents = model.encode_image(request.reference)
            conditions += self.referring(latents, text, model)
            conditions.append(LoraCondition(layers=lora.layers, scale=strengths["reference"]))
        return conditions

    def referring(self, latents: Tensor, text: TextCondition, model: Model) -> list[Condition]:
        """Clean latents (B, 4, h, w) of a picture, for the conditional half alone to look at.

        The UNet sees them at timestep 0, with the person's prompt on both halves and without LoRA.
        """
        both = TextCondition(embeds=pair(text.embeds[1], text.embeds[1]))
        with torch.no_grad():
            states = self.host(model).reference_states(latents, 0, both)
        return [ReferenceCondition(states=states, both=False)]

    def phrase(self, prompt: str) -> str:
        """The prompt as such an encoder was trained: "photo of a id person" and then what is said of the picture.

        "a smiling woman with red hair" becomes "photo of a id person with red hair, smiling". Raises WrongRequest for
        an encoder that understands PROMPT alone.
        """
        prompt = prompt.strip(" ,.")
        if prompt in ("", PROMPT):
            return PROMPT
        if not self.free_prompts:
            raise WrongRequest(
                f"Arc2Face's encoder only understands {PROMPT!r}; leave the prompt empty, or combine the face with"
                " another adapter."
            )
        if re.search(rf"\b{TOKEN}\b", prompt):
            return prompt
        said = FRAME.sub("", prompt)
        before: list[str] = []
        if found := PERSON.match(said):
            before, said = found[1].split(), found[2]
        said = said.strip(" ,")
        whole = f"{PROMPT} {said}" if WITH.match(said) else f"{PROMPT}, {said}" if said else PROMPT
        return ", ".join([whole, *before])

    def encode(self, prompts: Sequence[str], model: Model, embeddings: Tensor | None = None) -> Tensor:
        """Prompts (B) and RAW embeddings (B, D), None for none -> (B, L, width), after the final LayerNorm."""
        ids = model.tokenize(prompts)  # (B, L)
        if embeddings is None:
            hidden: Tensor = self.encoder(ids).last_hidden_state
            return hidden
        vectors = given(embeddings, self.sees).to(ids.device)
        vectors = nn.functional.pad(vectors, (0, self.encoder.config.hidden_size - vectors.shape[-1]))

        def replace(looked_up: Tensor) -> Tensor:
            return torch.where((ids == self.token)[..., None], vectors[:, None].to(looked_up.dtype), looked_up)

        with rewriting(self.encoder, replace):
            hidden = self.encoder(ids).last_hidden_state
        return hidden


Part = TypeVar("Part")


def _there(part: Part | None, what: str, place: str) -> Part:
    if part is None:
        raise WrongRequest(f"{what.capitalize()} cannot be used without Arc2Face's {place}; put it beside the encoder.")
    return part


def _load_parts(folder: Path, model: Model) -> Parts:
    parts = Parts()
    if (folder / POSE).is_dir():
        parts.pose = load_controlnet(folder / POSE, model.unet)
    if (folder / EXPRESSION).is_file():
        parts.expression = Expression.from_file(folder / EXPRESSION, model)
    if (folder / REFERENCE).is_file():
        parts.reference = load_lora(folder / REFERENCE, model)
    return parts


def _save_parts(parts: Parts, folder: Path, dtype: torch.dtype | None) -> None:
    if parts.pose is not None:
        path = folder / POSE / "diffusion_pytorch_model.safetensors"
        checkpoints.write(path, checkpoints.cast(parts.pose.state_dict(), dtype), {"format": "pt"})
        parts.pose.save_config(str(folder / POSE))
    if parts.expression is not None:
        nested = {
            "image_proj": parts.expression.image_proj.state_dict(),
            "ip_adapter": parts.expression.ip_adapter.tensors(),
        }
        checkpoints.write(folder / EXPRESSION, checkpoints.cast(nested, dtype))
    if parts.reference is not None:
        tensors = {}
        for name, low in parts.reference.layers.items():
            tensors[f"unet.{name}.lora.down.weight"] = low.down
            tensors[f"unet.{name}.lora.up.weight"] = low.up * low.gain
        checkpoints.write(folder / REFERENCE, checkpoints.cast(tensors, dtype), {"format": "pt"})


def _load_encoder(folder: Path) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    files = [path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).is_file()]
    if not files:
        raise refuse(folder, "Arc2Face's encoder (model.safetensors or pytorch_model.bin)")
    tensors = {
        key.removeprefix(OLD_PREFIX): value
        for key, value in checkpoints.read(files[0]).items()
        if not key.endswith("position_ids")
    }
    if "embeddings.token_embedding.weight" not in tensors:
        raise checkpoints.refuse(files[0], tensors, "Arc2Face's text encoder")
    try:
        config = CLIPTextConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointBroken(f"{folder / 'config.json'} is damaged ({error}); fetch the file again.") from error
    encoder = CLIPTextModel(config)
    checkpoints.load_into(encoder, tensors, path=files[0])
    return encoder


def _load_unet(folder: Path, model: Model) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    files = sorted(path for path in folder.glob("*") if path.suffix in checkpoints.SUFFIXES)
    if not files or not (folder / "config.json").is_file():
        raise refuse(folder, "Arc2Face's UNet (config.json and diffusion_pytorch_model.safetensors)")
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(folder / "config.json")))
    if unet.config["cross_attention_dim"] != model.text_width:
        raise WrongBaseModel(
            f"{folder} reads tokens {unet.config['cross_attention_dim']} wide, the loaded base model's are"
            f" {model.text_width} wide; load Stable Diffusion 1.5."
        )
    checkpoints.load_into(unet, checkpoints.read(files[0]), path=files[0])
    return cast("UNet2DConditionModel", unet)
