"""Seconds per picture and peak memory: facegen's loop beside plain diffusers, on the same weights, in one process.

    python -m tests.bench.bench_generate --model facegen/assets/mini/base --steps 20 --out bench.json

Both sides make the same picture from the same noise (the difference is reported), in turn, so that a busy machine
slows both alike. Times are medians of what each side took; `ratio` is the median of diffusers/facegen over the pairs
(above 1: facegen is faster).
Peak memory is measured in a child process for each side: CUDA's peak where there is a GPU, else the process's largest
resident set, loading included.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("bench_generate")

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("facegen", "diffusers")
CASES = ("text", "control", "faces")


@dataclass(frozen=True)
class Setup:
    """What is run: a model folder, a case, steps, pictures at a time, height and width in pixels, guidance scale."""

    model: str
    case: str
    steps: int
    pictures: int
    size: int | None
    scale: float = 6.0
    scheduler: str = "ddim"

    @property
    def device(self) -> str:
        """The GPU where there is one."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Half precision on a GPU."""
        return torch.float16 if self.device == "cuda" else torch.float32


def draw(seed: int, *shape: int) -> Tensor:
    """Unit-variance numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_model(folder: Path) -> Path:
    """A small random Stable Diffusion 1.x, for machines without weights; its pictures mean nothing, its arithmetic
    does.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    pieces = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    words = folder / "words"
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(words, model_max_length=77)
    ends = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1, "pad_token_id": len(pieces) - 1}
    width = 96
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(pieces),
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=3,
                intermediate_size=192,
                **ends,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 96),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=4,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


# --- what both sides share ------------------------------------------------------------------------------------------


def face_weights(unet: Any, seed: int) -> dict[str, dict[str, Tensor]]:
    """Random IP-Adapter weights in the official key format, 4 tokens."""
    from facegen.attention.weights import layer_widths

    width = int(unet.config["cross_attention_dim"])
    names = list(unet.attn_processors)
    widths = layer_widths(names, tuple(unet.config["block_out_channels"]))
    tensors = {
        f"{index}.to_{part}_ip.weight": draw(seed + index, widths[index], width) / width**0.5
        for index, name in enumerate(names)
        if ".attn2." in name
        for part in "kv"
    }
    head = {
        "proj.weight": draw(seed, 4 * width, 64) / 8,
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": head, "ip_adapter": tensors}


def control_net(unet: Any) -> Any:
    """A ControlNet with random weights."""
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(unet)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in net.named_parameters():
        if name.startswith("controlnet_"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.02
    return net.eval().requires_grad_(False)


FACES = 2


def facegen_side(setup: Setup) -> Callable[[], Tensor]:
    """A function that makes the pictures' latents with facegen."""
    from facegen.attention.weights import KV
    from facegen.conditions import Condition, ControlCondition, TokenCondition
    from facegen.denoise import Guidance, denoise
    from facegen.models.base import Model
    from facegen.schedulers import build, start

    model = Model.from_pretrained(setup.model, dtype=setup.dtype, device=setup.device)
    height, width = (setup.size, setup.size) if setup.size else model.default_size
    latents = draw(1, setup.pictures, *model.latent_shape(height, width))
    more: list[Condition] = []
    if setup.case == "control":
        net = control_net(model.unet).to(setup.device, setup.dtype)
        image = draw(2, setup.pictures, 3, height, width).sigmoid().to(setup.device)
        more.append(ControlCondition(controlnet=net, image=image, scale=0.7, span=(0.0, 0.5)))
    if setup.case == "faces":
        for seed in range(FACES):
            state = face_weights(model.unet, 100 * seed)
            layers = {}
            for layer in model.attention_layers:
                if layer.cross:
                    kv = KV(model.text_width, layer.width).to(setup.device, setup.dtype)
                    kv.to_k.weight.data.copy_(state["ip_adapter"][f"{layer.index}.to_k_ip.weight"])
                    kv.to_v.weight.data.copy_(state["ip_adapter"][f"{layer.index}.to_v_ip.weight"])
                    layers[layer.index] = kv
            head = state["image_proj"]
            embeds = torch.cat([torch.zeros(setup.pictures, 64), draw(seed, 1, 64).expand(setup.pictures, -1)])
            rows = torch.nn.functional.linear(embeds, head["proj.weight"], head["proj.bias"]).reshape(
                2 * setup.pictures, 4, -1
            )
            tokens = torch.nn.functional.layer_norm(rows, rows.shape[-1:], head["norm.weight"], head["norm.bias"])
            pair = tokens.unflatten(0, (2, setup.pictures))
            more.append(TokenCondition(tokens=pair, layers=layers, scale=0.6))

    def make() -> Tensor:
        scheduler = build(setup.scheduler, model.scheduler_config, setup.steps, device=setup.device)
        text = model.encode_text(["a face"] * setup.pictures, ["blurry"])
        begin = start(scheduler, latents.to(setup.device, setup.dtype))
        return denoise(model, begin, scheduler, [text, *more], Guidance(setup.scale))

    return make


def diffusers_side(setup: Setup) -> Callable[[], Tensor]:
    """The same with diffusers' own pipeline."""
    import diffusers
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

    from facegen.schedulers import SCHEDULERS

    load: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "dtype": setup.dtype}
    pipe: Any = StableDiffusionPipeline.from_pretrained(setup.model, **load)
    name, changes = SCHEDULERS[setup.scheduler]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changes)
    factor = pipe.vae_scale_factor
    side = setup.size or pipe.unet.config["sample_size"] * factor
    latents = draw(1, setup.pictures, pipe.unet.config["in_channels"], side // factor, side // factor)
    more: dict[str, Any] = {}
    if setup.case == "control":
        net = control_net(pipe.unet)
        parts = {key: part for key, part in pipe.components.items() if key != "image_encoder"}
        pipe = StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
        image = draw(2, setup.pictures, 3, side, side).sigmoid()
        more = {"image": image, "controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.5}
    if setup.case == "faces":
        states = [face_weights(pipe.unet, 100 * seed) for seed in range(FACES)]
        blank = [""] * FACES
        pipe.load_ip_adapter(states, subfolder=blank, weight_name=blank, image_encoder_folder=None)
        pipe.set_ip_adapter_scale([0.6] * FACES)
        embeds = [torch.stack([torch.zeros(1, 64), draw(seed, 1, 64)]) for seed in range(FACES)]
        more = {"ip_adapter_image_embeds": [e.to(setup.device, setup.dtype) for e in embeds]}
    pipe.to(setup.device)
    pipe.set_progress_bar_config(disable=True)

    def make() -> Tensor:
        return pipe(
            prompt=["a face"] * setup.pictures,
            negative_prompt=["blurry"] * setup.pictures,
            num_inference_steps=setup.steps,
            guidance_scale=setup.scale,
            height=side,
            width=side,
            latents=latents.to(setup.device, setup.dtype),
            output_type="latent",
            **more,
        ).images

    return make


BUILD = {"facegen": facegen_side, "diffusers": diffusers_side}


# --- measuring ------------------------------------------------------------------------------------------------------


def timed(make: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Wall seconds of one call, and what it made."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    made = make()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, made


def compare(setup: Setup, repeats: int) -> dict[str, Any]:
    """Both sides in turn, `repeats` times after a warm-up."""
    makers = {side: BUILD[side](setup) for side in SIDES}
    warm = {side: timed(make)[1] for side, make in makers.items()}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for place in range(repeats):
        order = SIDES if place % 2 == 0 else SIDES[::-1]
        for side in order:
            seconds[side].append(timed(makers[side])[0] / setup.pictures)
    difference = (warm["facegen"] - warm["diffusers"]).abs().max() / warm["diffusers"].abs().max()
    pairs = [theirs / ours for ours, theirs in zip(seconds["facegen"], seconds["diffusers"], strict=True)]
    return {
        **asdict(setup),
        "repeats": repeats,
        "seconds_per_picture": {side: round(statistics.median(found), 4) for side, found in seconds.items()},
        "ratio": round(statistics.median(pairs), 3),
        "ratios": [round(pair, 3) for pair in pairs],
        "relative_difference": float(difference),
    }


def peak(setup: Setup, side: str) -> float:
    """Peak memory in MiB: of one call on a GPU; elsewhere the process's largest resident set, loading included."""
    make = BUILD[side](setup)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        make()
        return torch.cuda.max_memory_allocated() / 2**20
    make()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_in_a_child(setup: Setup, side: str) -> float:
    """The same in a process of its own, so that the sides do not hide one another."""
    arguments = ["--model", setup.model, "--case", setup.case, "--steps", str(setup.steps), "--peak-of", side]
    arguments += ["--pictures", str(setup.pictures), *(["--size", str(setup.size)] if setup.size else [])]
    run = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_generate", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout.strip().splitlines()[-1])


def main() -> None:
    """Parse, measure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="diffusers folder of a Stable Diffusion 1.x; default: a small random one")
    parser.add_argument("--case", choices=(*CASES, "all"), default="all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=1, help="pictures made at a time")
    parser.add_argument("--size", type=int, help="side in pixels; default: the model's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the JSON; default: standard output")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(random_model(Path(folder) / "random"))
        results = []
        for case in CASES if options.case == "all" else (options.case,):
            setup = Setup(model, case, options.steps, options.pictures, options.size)
            if options.peak_of:
                sys.stdout.write(f"{peak(setup, options.peak_of)}\n")
                return
            found = compare(setup, options.repeats)
            found["peak_mib"] = {side: round(peak_in_a_child(setup, side), 1) for side in SIDES}
            logger.info(
                "%-8s facegen %.3f s, diffusers %.3f s per picture, ratio %.2f, memory %s MiB",
                case,
                found["seconds_per_picture"]["facegen"],
                found["seconds_per_picture"]["diffusers"],
                found["ratio"],
                found["peak_mib"],
            )
            results.append(found)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    machine["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    text = json.dumps({"machine": machine, "results": results}, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
