"""What every Stable Diffusion model shares: its parts, loading them, and one UNet call under any conditions."""

from __future__ import annotations

import copy
import json
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from facegen import checkpoints
from facegen.attention.backends import Backend, sdpa
from facegen.attention.processor import AttentionContext, install
from facegen.conditions import Condition, ControlCondition, LoraCondition, Pair, TextCondition
from facegen.economy import EXACT
from facegen.eight_bits import Weights, shrink
from facegen.errors import CheckpointBroken, WeightsMissing, WrongBaseModel, WrongRequest
from facegen.memory import Memory, MemoryPlan, Need, Placing
from facegen.models import control, door, quick, single_file
from facegen.models.lora import text_module, wearing
from facegen.models.prepared import Now, Prepared
from facegen.models.weighted import emphasised, spelled
from facegen.models.working import working

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

Generators = torch.Generator | Sequence[torch.Generator] | None


class Model(ABC):
    """UNet, VAE, text encoder(s) and tokenizer(s) of one base model.

    Our attention processor is set on the UNet here, once. A run never changes the model: adapters are data, LoRAs are
    worn for the length of a call, schedulers are built for each call from `scheduler_config`. Calls from several
    threads take turns (`busy`).
    """

    family: ClassVar[str]
    text_parts: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: Mapping[str, Any],
        *,
        memory: MemoryPlan | Memory | None = None,
        backend: Backend = sdpa,
    ) -> None:
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scheduler_config = dict(scheduler_config)
        self.memory = Memory.under(memory or MemoryPlan(unet.device, unet.dtype))
        self.backend = backend
        self.economy = EXACT
        self.tiny: nn.Module | None = None  # decodes in the VAE's place, where that was asked for
        self.source: Path | None = None
        self.busy = threading.RLock()
        self.attention_layers = install(unet)
        if self.memory.tiling:
            vae.enable_tiling()
        if self.memory.slicing:
            vae.enable_slicing()

    # --- loading ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "mini",
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        offload: Placing = "none",
        tiling: bool = False,
        slicing: bool = False,
        weights: Weights = "whole",
    ) -> Model:
        """A model by name ("mini", "sd15", "sdxl", a hub id), from a diffusers folder, or from one .safetensors/.ckpt
        file.

        Gives an SD15Model or SDXLModel, as the weights say. offload: see MemoryPlan; "auto" chooses by the memory that
        is free. weights: how UNet, ControlNets and text encoders keep theirs, see facegen.eight_bits.
        Raises WeightsMissing (nothing there, or a folder that lacks parts: all of them are listed),
        CheckpointBroken, WrongBaseModel (called on one class with weights of the other), NotEnoughMemory.
        """
        auto = offload == "auto"
        plan = MemoryPlan.choose(
            device, dtype, offload="none" if offload == "auto" else offload, tiling=tiling, slicing=slicing
        )
        memory = Memory(plan, auto, weights=weights)
        path = locate(source)
        parts = single_file.load(path, plan.dtype) if path.is_file() else _from_folder(path, plan.dtype)
        kind = _kind(parts["unet"].config)
        if not issubclass(kind, cls):
            raise WrongBaseModel(f"{source} holds a {kind.family} model, not a {cls.family} one; use {kind.__name__}.")
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                _check_finite(part, name, path)
                part.requires_grad_(False).eval()
        networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        for part in networks.values():
            shrink(part, weights)  # ahead of the choice of what fits
        memory.choose({name: Need.of(part, working(part)) for name, part in networks.items()})
        for part in networks.values():
            memory.place(part)
        model = kind.from_parts(parts, memory)
        model.source = path
        return model

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Mapping[str, Any], memory: MemoryPlan | Memory) -> Model:
        """The model made of these parts: diffusers' component names, and "scheduler_config"."""

    def with_unet(self, unet: UNet2DConditionModel) -> Self:
        """A second model around another UNet (Arc2Face's own), sharing VAE, text encoders and the rest."""
        if unet.config["cross_attention_dim"] != self.text_width:
            raise WrongBaseModel(
                f"The other UNet reads prompts of {unet.config['cross_attention_dim']} channels, the loaded model's"
                f" text encoder gives {self.text_width}."
            )
        other = copy.copy(self)
        self.memory.place(unet)
        other.unet = unet
        other.attention_layers = install(unet)
        return other

    def move(self, device: torch.device) -> None:
        """Work on another device from now on; the nets of adapters are moved by who has them."""
        self.memory.move(device)
        for part in (self.unet, self.vae, *self.text_encoders().values()):
            self.memory.place(part)

    # --- facts --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.memory.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's precision."""
        return next(self.unet.parameters()).dtype  # diffusers' own looks at every one, in each step

    @property
    def vae_factor(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        size = self.unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_factor, width * self.vae_factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents (4)."""
        return int(self.vae.config["latent_channels"])

    @property
    def extra_channels(self) -> int:
        """Channels a ChannelsCondition must bring (5 for inpainting UNets, otherwise 0)."""
        return int(self.unet.config["in_channels"]) - self.latent_channels

    @property
    def text_width(self) -> int:
        """Channels of the prompt tokens that the UNet looks at."""
        return int(self.unet.config["cross_attention_dim"])

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, h, w) of the latents of a picture; raises WrongRequest when the size does not fit."""
        factor = self.vae_factor
        if height % factor or width % factor or height < factor or width < factor:
            raise WrongRequest(f"Height and width must be multiples of {factor}, not {height} x {width}.")
        return self.latent_channels, height // factor, width // factor

    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by diffusers' component name."""
        return {name: getattr(self, name) for name in self.text_parts}

    # --- text ---------------------------------------------------------------------------------------------------

    def tokenize(self, prompts: Sequence[str], tokenizer: Any = None) -> Tensor:
        """Prompts → token ids (B, L), padded to the text encoder's length; longer ones are cut, with a warning."""
        tokenizer = tokenizer or self.tokenizer
        longest = min(int(tokenizer.model_max_length), int(self.text_encoder.config.max_position_embeddings))
        ids = tokenizer(list(prompts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        whole = tokenizer(list(prompts), padding="longest", return_tensors="pt")
        if whole.input_ids.shape[1] > longest:
            logger.warning("A prompt is longer than the model reads; what follows %d tokens is ignored.", longest)
        return ids.input_ids.to(self.device)

    @abstractmethod
    def encode_text(
        self,
        prompts: Sequence[str],
        negative: Sequence[str] | str | None = None,
        *,
        loras: Sequence[LoraCondition] = (),
        weighted: bool = False,
    ) -> TextCondition:
        """Prompts (B of them) and what to avoid (B, or one for all; None: the model's own empty prompt) → a
        TextCondition.

        loras: those whose text-encoder parts are worn while encoding, at their strength at the start of the run.
        weighted: the texts may say (word:1.3) and be of any length; see facegen.models.weighted.
        """

    @abstractmethod
    def read(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token ids (B, L) of each tokenizer → embeddings (B, L, D) and, where there is one, the pooled (B, P)."""

    def read_weighted(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Texts (B) that may hold weights → embeddings (B, L, D) of all their pieces and the last piece's pooled one.

        The first tokenizer spells for every encoder.
        """
        found, pooled = [], None
        for ids, weights in spelled(texts, self.tokenizer, int(self.text_encoder.config.max_position_embeddings)):
            embeds, pooled = self.read(ids.to(self.device), ids.to(self.device))
            found.append(emphasised(embeds, weights))
        return torch.cat(found, dim=1), pooled

    def _dressed(self, loras: Sequence[LoraCondition], prefix: str, encoder: nn.Module) -> Any:
        """The text encoder wearing the LoRAs' parts for it: a context manager."""
        sets, strengths = [], []
        for lora in loras:
            own = {
                text_module(name.removeprefix(prefix + "."), encoder): low
                for name, low in (lora.text_layers or {}).items()
                if name.startswith(prefix + ".")
            }
            sets.append(own)
            strengths.append(lora.strength(0, 1) if lora.constant else lora.strength(0, 1000))
        return _strong(encoder, sets, strengths)

    # --- pictures -----------------------------------------------------------------------------------------------

    def encode_image(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] → latents (B, 4, H/f, W/f), scaled as the UNet wants them.

        generator: draws the VAE's sample, one for all or one per picture; None takes the distribution's mode.
        """
        self.latent_shape(*images.shape[-2:])
        with self.memory.using(self.vae):
            dtype = self._vae_dtype()
            pixels = images.to(self.device, dtype) * 2 - 1
            if isinstance(generator, Sequence):
                drawn = [self._sample(pixels[i : i + 1], one) for i, one in enumerate(generator)]
                latents = torch.cat(drawn)
            else:
                latents = self._sample(pixels, generator)
        return (latents * self.vae.config["scaling_factor"]).to(torch.float32 if dtype != self.dtype else self.dtype)

    def _sample(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        spread = self.vae.encode(pixels, return_dict=False)[0]
        return spread.mode() if generator is None else spread.sample(generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) → pictures (B, 3, H, W) in [0, 1], float32."""
        with self.memory.using(self.tiny or self.vae):
            if self.tiny is not None:
                pixels = self.tiny(latents.to(self.device, self.dtype))
            else:
                scaled = latents.to(self.device, self._vae_dtype()) / self.vae.config["scaling_factor"]
                pixels = self.vae.decode(scaled, return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _vae_dtype(self) -> torch.dtype:
        """The VAE's precision: SDXL's overflows in float16 and is widened, for good, the first time it is used."""
        if self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            nn.Module.to(self.vae, torch.float32)
        return self.vae.dtype

    # --- the step -----------------------------------------------------------------------------------------------

    def prepare(
        self, conditions: Sequence[Condition], batch: int, guidance: bool, *, backend: Backend | None = None
    ) -> Prepared:
        """Everything that is constant over the steps, computed once: keys and values of tokens, control pictures'
        embeddings.

        batch: number of pictures; guidance: whether both halves run ([u1 … uB, c1 … cB]) or only the conditional one.
        Differentiable with respect to tokens, their weights, prompt embeddings and control pictures when called with
        gradients on. Use it in a `with` when LoRAs are among the conditions.
        """
        return Prepared(self, conditions, batch, guidance=guidance, backend=backend or self.backend)

    def predict(self, sample: Tensor, timestep: Tensor | int, now: Now, seen: list[quick.Deep] | None = None) -> Tensor:
        """One UNet call: scaled latents (R, 4, h, w) at timestep(s) () or (R,) → the model output (R, 4, h, w), in
        sample's dtype.

        now: `prepared.active(i, n)` in a run, `prepared.throughout()` for a single call or a training step. seen: gets
        what a later step may take over (facegen.models.shortcut), where the call takes the quick path.
        """
        size = (sample.shape[-2], sample.shape[-1])
        now = now.at(timestep)
        return self._call(sample, timestep, now, now.prepared.attention(now, size), seen)

    def _call(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        now: Now,
        context: AttentionContext,
        seen: list[quick.Deep] | None = None,
    ) -> Tensor:
        prepared = now.prepared
        steps = torch.as_tensor(timestep, device=sample.device)
        noisy = sample.to(self.dtype)
        text = now.text
        embeds = prepared.rows(text.embeds)
        added = self.added(text, prepared, sample)
        down, mid = self._control(noisy, steps, now, added)
        whole = prepared.channels(now, noisy)
        if whole.shape[1] != self.unet.config["in_channels"]:
            raise WrongRequest(
                f"The loaded UNet takes {self.unet.config['in_channels']} channels but the conditions make"
                f" {whole.shape[1]}; an inpainting model needs a ChannelsCondition with {self.extra_channels}."
            )
        route = quick.fits(self.unet, whole, context)
        if route is not None:
            look = quick.look(whole, self.embedding(whole, steps, embeds, added), embeds, context, prepared.guidance)
            output, deep = quick.unet(route, whole, look, down or (), mid)
            if seen is not None:
                seen.append(deep)
            return output.to(sample.dtype)
        output = self.unet(
            whole,
            steps,
            encoder_hidden_states=embeds,
            cross_attention_kwargs={"context": context},
            added_cond_kwargs=added or None,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return output.to(sample.dtype)

    def embedding(self, sample: Tensor, timestep: Tensor, embeds: Tensor, added: dict[str, Tensor]) -> Tensor:
        """The UNet's time embedding, (1 or R, E): one row where nothing tells the rows apart."""
        unet: Any = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample if timestep.ndim else sample[:1], timestep))
        further = unet.get_aug_embed(emb, embeds, added)
        return emb if further is None else emb + further

    def _control(
        self, sample: Tensor, timestep: Tensor, now: Now, added: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, ...] | None, Tensor | None]:
        """The summed residuals of the ControlNets that act in this step."""
        down: list[Tensor] | None = None
        mid: Tensor | None = None
        for condition, strength in now.of(ControlCondition):
            net, idle = condition.controlnet, now.prepared.idle(condition)
            with self.memory.using(net):
                like = next(net.parameters())
                extra = {name: value[idle:].to(like) for name, value in added.items()}
                own_down, own_mid = control.residuals(
                    net,
                    sample[idle:].to(like),
                    timestep[idle:] if timestep.ndim else timestep,
                    now.prepared.prompt(condition, now.text.embeds),
                    now.prepared.hint(condition),
                    extra,
                    guidance=now.prepared.guidance and not idle,
                )
            if idle:
                own_down = [_behind(state, idle) for state in own_down]
                own_mid = _behind(own_mid, idle)
            own_down = [now.prepared.confined(state * strength, condition.mask).to(sample) for state in own_down]
            own_mid = now.prepared.confined(own_mid * strength, condition.mask).to(sample)
            down = own_down if down is None else [a + b for a, b in zip(down, own_down, strict=True)]
            mid = own_mid if mid is None else mid + own_mid
        return None if down is None else tuple(down), mid

    @abstractmethod
    def added(self, text: TextCondition, prepared: Prepared, sample: Tensor) -> dict[str, Tensor]:
        """SDXL's further conditioning (pooled prompt, sizes) for a UNet call; {} for SD 1.x."""

    def reference_states(self, latents: Tensor, timestep: Tensor | int, text: TextCondition) -> dict[int, Pair]:
        """The input of each self-attention layer, by layer index, when the UNet sees a reference picture.

        latents (B, 4, h, w) at the noise level of `timestep` (0: clean), scaled for the model → Pairs (2, B, N, C)
        for a ReferenceCondition.
        """
        seen: dict[int, Tensor] = {}
        batch = latents.shape[0]
        prepared = self.prepare([text], batch, guidance=True)
        now = prepared.throughout().at(timestep)
        size = (latents.shape[-2], latents.shape[-1])
        with self.memory.using(self.unet):
            context = prepared.attention(now, size)._replace(record=seen)
            self._call(torch.cat([latents] * 2), timestep, now, context)
        return {index: state.unflatten(0, (2, batch)) for index, state in seen.items()}


def _behind(state: Tensor, idle: int) -> Tensor:
    """`idle` rows of nothing, and the state's behind them."""
    return torch.cat([state.new_zeros(idle, *state.shape[1:]), state])


class _strong:
    """`wearing` with fixed strengths."""

    def __init__(self, network: nn.Module, sets: Sequence[Any], strengths: Sequence[float]) -> None:
        self._context = wearing(network, sets)
        self._strengths = list(strengths)

    def __enter__(self) -> None:
        self._context.__enter__().strengths[:] = self._strengths

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


# --- loading --------------------------------------------------------------------------------------------------------


def locate(source: str | Path) -> Path:
    """A model's folder or file by path or by name; raises WeightsMissing."""
    path = Path(source).expanduser()
    if not path.exists():
        from facegen.hub import resolve

        path = Path(resolve(str(source)))
    # The embedded model keeps its base beside its adapters.
    if (path / "base" / "unet").is_dir():
        return path / "base"
    files = [file for file in path.glob("*") if file.suffix in checkpoints.SUFFIXES] if path.is_dir() else []
    return files[0] if len(files) == 1 and not (path / "unet").is_dir() else path


def _kind(unet_config: Mapping[str, Any]) -> type[Model]:
    from facegen.models.sd15 import SD15Model
    from facegen.models.sdxl import SDXLModel

    return SDXLModel if unet_config.get("addition_embed_type") == "text_time" else SD15Model


_WEIGHTS = ("safetensors", "bin")


def _weights_file(folder: Path, stem: str) -> str | None:
    """The variant of the weights that is there: "" for full precision, "fp16" for half; None for none."""
    for variant in ("", "fp16"):
        middle = f".{variant}" if variant else ""
        names = [f"{stem}{middle}.{suffix}" for suffix in _WEIGHTS]
        names += [f"{name}.index.json" for name in names] + [f"{stem}.safetensors.index{middle}.json"]
        if any((folder / name).is_file() for name in names):
            return variant
    return None


def _from_folder(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A diffusers folder's parts, by component name, and "scheduler_config"."""
    if not folder.is_dir():
        raise WeightsMissing(f"{folder} is no model: give a diffusers folder, a .safetensors file or a known name.")
    two = (folder / "text_encoder_2").is_dir() or (folder / "tokenizer_2").is_dir()
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    tokenizers = ["tokenizer"]
    if two or _wants_two(folder):
        stems["text_encoder_2"] = "model"
        tokenizers.append("tokenizer_2")
    missing, variants = [], {}
    for name, stem in stems.items():
        if not (folder / name / "config.json").is_file():
            missing.append(f"{name}/config.json")
        variants[name] = _weights_file(folder / name, stem)
        if variants[name] is None and name.startswith("text"):
            # transformers' old name for a pickle
            variants[name] = "" if (folder / name / "pytorch_model.bin").is_file() else None
        if variants[name] is None:
            missing.append(f"{name}/{stem}.safetensors")
    missing += [
        f"{name}/tokenizer.json (or vocab.json and merges.txt)"
        for name in tokenizers
        if not any((folder / name / file).is_file() for file in ("tokenizer.json", "vocab.json"))
    ]
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        missing.append("scheduler/scheduler_config.json")
    if missing:
        raise WeightsMissing(f"The model folder {folder} lacks: {', '.join(missing)}.")
    parts: dict[str, Any] = {
        name: _load_part(folder, name, dtype, variant or None) for name, variant in variants.items()
    }
    parts["scheduler_config"] = _json(folder / "scheduler" / "scheduler_config.json")
    from transformers import CLIPTokenizer

    for name in tokenizers:
        try:
            parts[name] = CLIPTokenizer.from_pretrained(str(folder / name), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointBroken(f"The tokenizer in {folder / name} cannot be read: {error}") from error
    return parts


def _wants_two(folder: Path) -> bool:
    config = folder / "unet" / "config.json"
    return config.is_file() and _json(config).get("addition_embed_type") == "text_time"


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointBroken(f"{path} is not valid JSON: {error}") from error


def _load_part(folder: Path, name: str, dtype: torch.dtype, variant: str | None) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from safetensors import SafetensorError
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    place = folder / name
    common: dict[str, Any] = {"variant": variant, "local_files_only": True}
    try:
        _check_part(place, name, variant or "")
        if name == "unet":
            return UNet2DConditionModel.from_pretrained(str(place), dtype=dtype, **common)
        if name == "vae":
            return AutoencoderKL.from_pretrained(str(place), dtype=dtype, **common)
        # transformers strips old key prefixes by class name; a subclass would silently keep random weights.
        kind: Any = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        encoder, report = kind.from_pretrained(str(place), dtype=dtype, output_loading_info=True, **common)
        lacking = [key for key in report["missing_keys"] if not key.endswith("position_ids")]
        if lacking:
            raise CheckpointBroken(f"{place} lacks {len(lacking)} weights, such as {sorted(lacking)[0]}.")
        return encoder
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise CheckpointBroken(f"The weights in {place} cannot be loaded: {_first_line(error)}") from error


def _check_part(place: Path, name: str, variant: str) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if name in ("unet", "vae"):
        network: Any = UNet2DConditionModel if name == "unet" else AutoencoderKL
        door.check(place, "diffusion_pytorch_model", variant, lambda config: network.from_config(dict(config)))
        return
    kind: Any = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
    for stem in ("model", "pytorch_model"):
        door.check(place, stem, variant, lambda config: kind(CLIPTextConfig(**config)))


def _check_finite(part: nn.Module, name: str, path: Path) -> None:
    for key, value in part.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointBroken(f"{path}: {name} holds NaN or infinite numbers ({key}); download it again.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


__all__ = ["Generators", "Model", "Now", "Prepared", "locate"]
