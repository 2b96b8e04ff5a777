"""Arc2Face: the face embedding takes the place of one token of the prompt.

The unit embedding, padded with zeros to the width of a token, replaces the token `id` of "photo of a id person"; a text
encoder tuned together with the UNet reads it. No projector, no further attention. Source: github foivospar/Arc2Face,
hub FoivosPar/Arc2Face (MIT), arXiv 2403.11641.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import Adapter, AdapterRequest, ready, refuse, trainable, unit
from facegen.attention.processor import install
from facegen.checkpoints import SAFE, Shapes, base_name
from facegen.conditions import Condition, TextCondition
from facegen.errors import CheckpointBroken, WrongBaseModel, WrongRequest

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from facegen.models.base import Model

PROMPT = "photo of a id person"
TOKEN = "id"
ENCODER, UNET = "encoder", "arc2face"
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


class Arc2Face(Adapter):
    """See the module's text; needs a base model with one text encoder.

    encoder: the tuned text encoder. Its config may hold two entries of ours: face_embedding_dim (512 when missing) and
    face_free_prompts: whether it was trained with other prompts than the official one (the official was not).
    unet: one that was tuned with the encoder; None where the base model's own was (the embedded mini).
    """

    name = "arc2face"
    title = "Arc2Face"
    pack = "antelopev2"
    needs = frozenset({"face"})
    writes_prompt: ClassVar[bool] = True

    def __init__(self, encoder: CLIPTextModel, model: Model, unet: UNet2DConditionModel | None = None) -> None:
        self.encoder = encoder
        self.unet = unet
        self.token = _token(model)
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
        """From a folder with `encoder/` and, where the base model was not tuned with it, the UNet `arc2face/`."""
        place = cls.choose(source, model)
        unet = _load_unet(place.parent / UNET, model) if (place.parent / UNET).is_dir() else None
        adapter = cls(_load_encoder(place), model, unet)
        ready(adapter.modules(), model)
        if unet is not None:
            model.memory.place(unet)
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
        return nn.ModuleDict({ENCODER: self.encoder} if self.unet is None else {ENCODER: self.encoder, UNET: self.unet})

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
        if request.scale not in (None, 1.0) or request.span != (0.0, 1.0) or request.mask is not None:
            raise WrongRequest(
                "Arc2Face writes the prompt and has neither strength, span nor mask; use another adapter."
            )
        present = (embeddings != 0).any(dim=-1).tolist()
        prompts = _each(request.prompt, len(present), "prompts")
        count = len(prompts)
        phrases = [self.phrase(text) if present[place % len(present)] else text for place, text in enumerate(prompts)]
        cond = self.encode(phrases, model, embeddings.expand(count, -1))
        if request.guidance:
            negative = _each(request.negative_prompt, 1, "negative prompts")
            uncond = self.encode(negative, model)
            if len(negative) not in (1, count):
                raise WrongRequest(
                    f"There are {count} prompts but {len(negative)} negative prompts; give 1 or {count}."
                )
        else:
            uncond = cond
        return [TextCondition(embeds=torch.stack([uncond.expand_as(cond), cond]))]

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
        vectors = unit(embeddings).to(ids.device)
        vectors = nn.functional.pad(vectors, (0, self.encoder.config.hidden_size - vectors.shape[-1]))
        with replacing(self.encoder, ids == self.token, vectors):
            hidden = self.encoder(ids).last_hidden_state
        return hidden


@contextmanager
def replacing(encoder: CLIPTextModel, places: Tensor, vectors: Tensor) -> Iterator[None]:
    """Inside the `with` the token embeddings at `places` (B, L) are `vectors` (B, width).

    A hook, because the encoder takes ids alone and because everything behind the look-up (positions, causal mask, final
    LayerNorm) must stay the class's own.
    """

    def place(module: nn.Module, inputs: Any, looked_up: Tensor) -> Tensor:
        return torch.where(places[..., None], vectors[:, None].to(looked_up.dtype), looked_up)

    handle = encoder.get_input_embeddings().register_forward_hook(place)
    try:
        yield
    finally:
        handle.remove()


def _token(model: Model) -> int:
    ids = model.tokenizer(TOKEN, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise WrongBaseModel(
            f"Arc2Face replaces the word {TOKEN!r}, which the loaded base model's tokenizer splits into {len(ids)};"
            " load a Stable Diffusion 1.5 model or mini."
        )
    return int(ids[0])


def _each(text: str | Sequence[str], count: int, what: str) -> list[str]:
    """One text for each of `count` pictures; several texts make as many pictures of one embedding."""
    if isinstance(text, str):
        return [text] * count
    if count != 1 and len(text) != count:
        raise WrongRequest(f"There are {count} embeddings but {len(text)} {what}; give one, or {count}.")
    return list(text)


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
