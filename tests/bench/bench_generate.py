"""Seconds per picture and peak memory: facegen beside diffusers' own pipelines, same weights, noise and process.

    python -m tests.bench.bench_generate --model facegen/assets/mini/base --out bench.md
    python -m tests.bench.bench_generate --model random-sdxl --cases text face instantid regions --steps 10

All sides make the picture from the same noise, in turn, so that a busy machine slows all alike. Times are medians, of
whole pictures from the prompt to pixels (--latents: without decoding); `ratio` is the median of diffusers' time over
this side's, round by round (above 1: faster than diffusers), and `difference` the largest between the pictures, or
between the latents over diffusers' largest. Peak memory is measured in a child process for each side: CUDA's peak where
there is a GPU, else the process's largest resident set, loading included. With random models (random, random-sd15,
random-sdxl: the true sizes) prompts are given as embeddings.

diffusers takes --steps steps, and so does facegen, but for `fast` and `fastest`, which are the command line's --speed:
as many steps as the model says, with the LoRA that it brings; else as many, with parts left out.

diffusers' side is its ControlNet and IP-Adapter pipeline; InstantID's ControlNet reads the prompt there, and so it does
here. --clock cpu counts processor time of this process instead of wall time, for machines with other work.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.cases import CASES, SMALL, UNETS, Case, draw, load
from tests.bench.sheet import Sheet

logger = logging.getLogger("bench_generate")

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("diffusers", "facegen", "packed", "triton", "compiled", "graphs", "fast", "fastest", "int8", "fp8")
SCALE, CONTROL = 0.6, 0.7


@dataclass(frozen=True)
class Setup:
    """model: a folder or a random model; size: side in pixels, the model's own by default; clock: wall or cpu; decode:
    whether pictures are made, or latents.
    """

    model: str
    case: str
    steps: int
    pictures: int
    size: int | None
    guidance: float = 6.0
    clock: str = "wall"
    decode: bool = True

    @property
    def where(self) -> tuple[str, torch.dtype]:
        """The GPU in bfloat16 where there is one."""
        return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def facegen_side(setup: Setup, case: Case, side: str) -> Callable[[], Tensor]:
    """A function that makes the pictures with facegen; side: how."""
    from facegen.attention.backends import BACKENDS
    from facegen.attention.weights import KV
    from facegen.conditions import Condition, ControlCondition, ReferenceCondition, TextCondition, TokenCondition
    from facegen.denoise import Guidance, denoise
    from facegen.economy import PRESETS
    from facegen.eight_bits import shrink
    from facegen.few_steps import FewSteps, hurried
    from facegen.loading import Loading
    from facegen.memory import MemoryPlan
    from facegen.models.compiled import compile_networks
    from facegen.models.lora import load_lora
    from facegen.models.sd15 import SD15Model
    from facegen.models.sdxl import SDXLModel
    from facegen.schedulers import build, start

    device, dtype = setup.where
    parts = {"unet": case.unet, "vae": case.vae, "text_encoder": case.text_encoder, "tokenizer": case.tokenizer}
    further = {"text_encoder_2": None, "tokenizer_2": None} if case.xl else {}
    family = SDXLModel if case.xl else SD15Model
    model = family.from_parts(
        {**parts, **further, "scheduler_config": case.schedule}, MemoryPlan(torch.device(device), dtype)
    )
    speed = side if side in PRESETS else "exact"
    model.economy = PRESETS[speed]
    # On a CPU the approximations stand on packed weights, and on a GPU on the fused kernel.
    quickest = device == "cuda" and side in PRESETS
    model.backend = BACKENDS["triton" if quickest else side if side in BACKENDS else "sdpa"]
    people = []
    for person in case.people:
        layers = {}
        for layer in model.attention_layers:
            if layer.cross:
                kv = KV(model.text_width, layer.width).to(device, dtype).requires_grad_(False)
                kv.to_k.weight.data.copy_(person.weights[f"{layer.index}.to_k_ip.weight"])
                kv.to_v.weight.data.copy_(person.weights[f"{layer.index}.to_v_ip.weight"])
                layers[layer.index] = kv
        people.append((person, layers))
    walked = [model.unet, *([] if case.net is None else [case.net])]
    encoders = [] if case.text_encoder is None else [case.text_encoder]
    if side == "int8" or side == "fp8":
        for network in [*walked, *encoders]:
            shrink(network, side)
    elif side == "graphs":
        compile_networks(*walked, mode="reduce-overhead")
        _mark_steps(model)
    else:
        loading = Loading(speed=speed, packed=side == "packed", compiled=side == "compiled")
        loading.quicken(walked, [case.vae, *encoders])

    folder = None if setup.model in UNETS else Path(setup.model).parent
    worn, few = hurried(speed, folder, {})
    few = few or FewSteps("ddim", setup.steps, setup.guidance)
    loras = [load_lora(f"{folder}/loras/{name}.safetensors", model) for name in worn]

    @torch.no_grad()
    def make() -> Tensor:
        scheduler = build(few.scheduler, model.scheduler_config, few.steps, device=device)
        if case.text is None:
            text = model.encode_text(["a face"] * setup.pictures, ["blurry"])
        else:
            text = TextCondition(embeds=case.text, pooled=case.pooled)
        conditions: list[Condition] = [text, *loras]
        for person, layers in people:
            tokens = person.projector(person.embeds.flatten(0, 1)).unflatten(0, (2, -1))
            conditions.append(TokenCondition(tokens=tokens, layers=layers, scale=SCALE, mask=person.mask))
        if case.net is not None and case.image is not None:
            conditions.append(ControlCondition(controlnet=case.net, image=case.image, scale=CONTROL))
        for place in range(case.references):
            seen = draw(90 + place, 1, *case.latents.shape[1:]).to(case.latents)
            conditions.append(ReferenceCondition(states=model.reference_states(seen, 0, text)))
        generator = torch.Generator().manual_seed(5)
        begin = start(scheduler, case.latents)
        latents = denoise(model, begin, scheduler, conditions, Guidance(few.guidance), generator)
        return model.decode(latents) if setup.decode else latents

    return make


def _mark_steps(model: Any) -> None:
    """What a CUDA graph gave in one step may be overwritten in the next."""
    predict = model.predict

    def marked(*arguments: Any, **more: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return predict(*arguments, **more).clone()

    model.predict = marked


def diffusers_side(setup: Setup, case: Case, side: str) -> Callable[[], Tensor]:
    """The same with diffusers' own pipeline."""
    import diffusers

    parts: dict[str, Any] = {
        "unet": case.unet, "vae": case.vae, "text_encoder": case.text_encoder, "tokenizer": case.tokenizer,
        "scheduler": diffusers.DDIMScheduler.from_config(case.schedule),
    }  # fmt: skip
    name = "StableDiffusion" + ("XL" if case.xl else "") + ("ControlNet" if case.net is not None else "") + "Pipeline"
    if case.net is not None:
        parts["controlnet"] = case.net
    if case.xl:
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe: Any = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {}
    if case.people:
        width = int(case.unet.config["cross_attention_dim"])
        head = {
            "proj.weight": torch.zeros(4 * width, 512),
            "proj.bias": torch.zeros(4 * width),
            "norm.weight": torch.zeros(width),
            "norm.bias": torch.zeros(width),
        }  # of any size: the true ones are put in its place below
        blank = [""] * len(case.people)
        saved = [{"image_proj": head, "ip_adapter": person.weights} for person in case.people]
        pipe.load_ip_adapter(saved, subfolder=blank, weight_name=blank, image_encoder_folder=None)
        pipe.unet.to(*setup.where)
        for place, person in enumerate(case.people):
            pipe.unet.encoder_hid_proj.image_projection_layers[place] = person.projector
        pipe.set_ip_adapter_scale([SCALE] * len(case.people))
        more["ip_adapter_image_embeds"] = [person.embeds for person in case.people]
        masks = [person.mask[None] for person in case.people if person.mask is not None]
        if masks:
            more["cross_attention_kwargs"] = {"ip_adapter_masks": [mask.to(case.latents.device) for mask in masks]}
    if case.net is not None:
        more |= {"image": case.image, "controlnet_conditioning_scale": CONTROL}
    if case.text is None:
        more |= {"prompt": ["a face"] * setup.pictures, "negative_prompt": ["blurry"] * setup.pictures}
    else:
        more |= {"negative_prompt_embeds": case.text[0], "prompt_embeds": case.text[1]}
    if case.pooled is not None:
        more |= {"negative_pooled_prompt_embeds": case.pooled[0], "pooled_prompt_embeds": case.pooled[1]}

    def make() -> Tensor:
        return pipe(
            num_inference_steps=setup.steps,
            guidance_scale=setup.guidance,
            height=case.side,
            width=case.side,
            latents=case.latents,
            output_type="pt" if setup.decode else "latent",
            **more,
        ).images

    return make


def build_side(setup: Setup, side: str) -> Callable[[], Tensor]:
    """Each side has modules of its own: a pipeline may change what it is given."""
    case = load(setup.model, setup.case, setup.pictures, setup.size, setup.where)
    return (diffusers_side if side == "diffusers" else facegen_side)(setup, case, side)


# --- measuring ------------------------------------------------------------------------------------------------------


def timed(make: Callable[[], Tensor], clock: str) -> tuple[float, Tensor]:
    """Seconds of one call, and what it made."""
    read = time.process_time if clock == "cpu" else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = read()
    made = make()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return read() - begin, made


def compare(setup: Setup, sides: tuple[str, ...], repeats: int) -> list[dict[str, Any]]:
    """All sides in turn, `repeats` times after a warm-up, forwards and backwards."""
    makers = {side: build_side(setup, side) for side in sides}
    first = {side: timed(make, setup.clock)[1] for side, make in makers.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for place in range(repeats):
        for side in sides if place % 2 == 0 else sides[::-1]:
            seconds[side].append(timed(makers[side], setup.clock)[0] / setup.pictures)
    exact = first["diffusers"].float()
    largest = 1.0 if setup.decode else float(exact.abs().max())
    return [
        {
            **asdict(setup),
            "side": side,
            "repeats": repeats,
            "seconds": statistics.median(seconds[side]),
            "ratio": statistics.median(a / b for a, b in zip(seconds["diffusers"], seconds[side], strict=True)),
            "difference": float((first[side].float() - exact).abs().max()) / largest,
        }
        for side in sides
    ]


def peak(setup: Setup, side: str) -> float:
    """Peak memory in MiB: of one call on a GPU; elsewhere the process's largest resident set, loading included."""
    make = build_side(setup, side)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        make()
        return torch.cuda.max_memory_allocated() / 2**20
    make()
    # Not getrusage: a process inherits its largest set from the one that started it.
    status = Path("/proc/self/status")
    if status.is_file():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_in_a_child(setup: Setup, side: str) -> float:
    """The same in a process of its own, so that the sides do not hide one another."""
    arguments = ["--model", setup.model, "--cases", setup.case, "--steps", "2", "--peak-of", side]
    arguments += ["--pictures", str(setup.pictures), *(["--size", str(setup.size)] if setup.size else [])]
    arguments += [] if setup.decode else ["--latents"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_generate", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout.strip().splitlines()[-1])


def machine() -> dict[str, str]:
    """What the figures depend on."""
    import diffusers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    threads = "" if torch.cuda.is_available() else f", {torch.get_num_threads()} thread(s)"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return {"date": datetime.date.today().isoformat(), "device": name + threads, "versions": versions}


def heading(setup: Setup, repeats: int, where: dict[str, str]) -> str:
    """What stands above the rows."""
    return "\n".join(
        [
            f"## {Path(setup.model).as_posix()}, {setup.steps} steps, {setup.pictures} at a time",
            "",
            f"{', '.join(where.values())}; {setup.clock} time of {'pictures' if setup.decode else 'latents'}, median of"
            f" {repeats}.",
            "",
            "| case | side | s per picture | × diffusers | difference | peak MiB |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
            "",
        ]
    )


def lines(found: list[dict[str, Any]]) -> str:
    """The rows of a case."""
    told = []
    for row in found:
        memory = f"{row['peak_mib']:.0f}" if "peak_mib" in row else "–"
        told.append(
            f"| {row['case']} | {row['side']} | {row['seconds']:.3f} | {row['ratio']:.2f} |"
            f" {row['difference']:.1e} | {memory} |\n"
        )
    return "".join(told)


def main() -> None:
    """Parse, measure, write Markdown."""
    own = "triton" if torch.cuda.is_available() else "packed"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=SMALL, help=f"a diffusers folder, or {', '.join(UNETS)}")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["text", "face", "instantid", "regions"])
    parser.add_argument("--sides", nargs="+", choices=SIDES[1:], default=["facegen", own, "fast", "fastest"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1], help="pictures made at a time")
    parser.add_argument("--size", type=int, help="side in pixels; default: the model's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--latents", action="store_true", help="leave decoding out")
    parser.add_argument("--memory", nargs="*", choices=CASES, help="cases whose peak memory is measured; default: all")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    Sheet.flags(parser)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import diffusers

    diffusers.logging.set_verbosity_error()
    setup = Setup(
        options.model, options.cases[0], options.steps, options.pictures[0], options.size, decode=not options.latents
    )
    if options.peak_of:
        sys.stdout.write(f"{peak(setup, options.peak_of)}\n")
        return
    sheet, where = Sheet.of(options), machine()
    weighed = options.cases if options.memory is None else options.memory
    pieces = [(pictures, case) for pictures in options.pictures for case in options.cases]
    begun = 0
    for pictures, case in sheet.each(pieces):
        one = replace(setup, case=case, pictures=pictures, clock=options.clock)
        if pictures != begun:
            sheet.add(("\n" if begun else "") + heading(one, options.repeats, where))
            begun = pictures
        rows = compare(one, ("diffusers", *options.sides), options.repeats)
        for row in rows:
            logger.info("%-10s %-10s %.3f s, ratio %.2f", case, row["side"], row["seconds"], row["ratio"])
            if case in weighed:
                row["peak_mib"] = peak_in_a_child(one, row["side"])
        sheet.add(lines(rows))
    sheet.add("\n")


if __name__ == "__main__":
    main()
