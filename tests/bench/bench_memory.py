"""Peak memory on the device per configuration, as a Markdown table.

Computed: the whole path (prompt, faces, steps, decoding) runs on tensors that have a shape and a device but no
numbers, and every one of them that is alive on the device is counted. Attention counts as by a fused kernel, which
keeps no weights; what CUDA, cuDNN and the allocator's rounding take besides is not in it. Measured: the same path with
numbers, by `torch.cuda.max_memory_allocated`, where there is a CUDA device.
"""

from __future__ import annotations

import argparse
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.bench.cases import SCHEDULE, SD15, SDXL, SMALL, SMALL_XL, UNETS

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda:0")
COMPUTED = torch.device("meta:0")  # its tensors say "meta", so that a plan never finds them where it wants them
ADAPTERS = ("none", "faceid", "instantid", "two identities")
OFFLOADS = ("none", "model", "sequential")
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
NAMES = {SD15: "SD 1.5, 512 px", SDXL: "SDXL, 1024 px"}
TITLES = {
    "none": "no adapter",
    "faceid": "IP-Adapter-FaceID-PlusV2",
    "instantid": "InstantID",
    "two identities": "two people, FaceID-PlusV2 each",
}
# (width, layers, heads, inner, projected): CLIP ViT-L's text, OpenCLIP bigG's text, CLIP ViT-H's pictures; small ones.
TEXT, TEXT_2, VISION = (768, 12, 12, 3072, 768), (1280, 32, 20, 5120, 1280), (1280, 32, 16, 5120, 1024)
TINY = (48, 2, 2, 64, 32)


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors without numbers that are alive, but for those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._waiting = False
        self._known: set[int] = set()
        self._apart: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.device.type == "meta" and not self._waiting:
                self._count(one.untyped_storage())
        return out

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor is on the device."""
        return tensor.untyped_storage()._cdata in self._known

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is made inside is not on the device."""
        before, self._waiting = self._waiting, True
        try:
            yield
        finally:
            self._waiting = before

    def like(self, tensor: Tensor, dtype: torch.dtype, there: bool) -> Tensor:
        """A tensor of this shape, on the device or not."""
        with nullcontext() if there else self.waiting():
            made = torch.empty_like(tensor, dtype=dtype, device="meta")
        if not there:  # a view of it, made later, is not on the device either
            storage = made.untyped_storage()
            self._apart.add(storage._cdata)
            weakref.finalize(storage, self._apart.discard, storage._cdata)
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._apart:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


@contextmanager
def shapes_alone() -> Iterator[Meter]:
    """Modules of tensors without numbers can be moved, and attention is a fused kernel's."""
    meter = Meter()

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        for part in self.modules():
            for store in (part._parameters, part._buffers):
                for name, value in store.items():
                    if value is not None:
                        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
                        there = meter.knows(value) if device is None else device == COMPUTED
                        moved = meter.like(value, kind, there)
                        store[name] = nn.Parameter(moved, False) if isinstance(value, nn.Parameter) else moved
        return self

    def lend(value: Tensor, device: torch.device) -> Tensor:
        if meter.knows(value):  # a loan inside a loan
            return value
        moved = meter.like(value, value.dtype, True)
        return nn.Parameter(moved, False) if isinstance(value, nn.Parameter) else moved

    def attention(query: Tensor, key: Tensor, value: Tensor, *more: Any, **further: Any) -> Tensor:
        assert query.device == key.device == value.device
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "to", to))
        stack.enter_context(mock.patch("facegen.lending._copy", lend))
        for name in ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_", "zeros_", "ones_", "trunc_normal_"):
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *more, **further: tensor))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        yield stack.enter_context(meter)


@dataclass(frozen=True)
class Configuration:
    """One row and column of the table; model: one of UNETS."""

    model: str
    adapter: str
    offload: str
    dtype: torch.dtype


def run(configuration: Configuration, device: torch.device, meter: Callable[[bool], int]) -> dict[str, int]:
    """Peak bytes up to the end of each part of the work; meter(anew): the peak so far, or since now."""
    found = {}
    with torch.no_grad():
        model = base(configuration, device)
        made = adapters(configuration, model)
        found["loaded"] = meter(True)
        side = int(model.default_size[0])
        conditions: list[Any] = [model.encode_text(["a face"], "blurry")]
        found["prompt"] = meter(False)
        for adapter, request in made:
            with model.memory.using(*adapter.nets(model)):
                conditions += adapter.conditions_from_embeddings(torch.zeros(1, 512), model, request)
        found["faces"] = meter(False)
        latents = torch.zeros(2, *model.latent_shape(side, side), device=device, dtype=configuration.dtype)
        networks = [model.unet, *(one.controlnet for one in conditions if hasattr(one, "controlnet"))]
        with model.memory.using(*networks), model.prepare(conditions, 1, True) as prepared:
            model.predict(latents, 500, prepared.throughout())
        del prepared
        found["steps"] = meter(False)
        model.decode(latents[:1])
        found["decoding"] = meter(False)
    return found


def base(configuration: Configuration, device: torch.device) -> Any:
    """The base model without training, placed as asked."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from facegen.memory import Memory, MemoryPlan
    from facegen.models.sd15 import SD15Model
    from facegen.models.sdxl import SDXLModel

    name = configuration.model
    small, xl = name in (SMALL, SMALL_XL), name in (SDXL, SMALL_XL)
    sizes = dict(UNETS[name])
    if small and not xl:
        sizes["cross_attention_dim"] = TINY[0]
    if small and xl:
        sizes |= {"cross_attention_dim": 2 * TINY[0], "projection_class_embeddings_input_dim": TINY[4] + 48}
    blocks = (32, 64) if small else (128, 256, 512, 512)
    vae = {
        "block_out_channels": blocks,
        "down_block_types": ("DownEncoderBlock2D",) * len(blocks),
        "up_block_types": ("UpDecoderBlock2D",) * len(blocks),
        "layers_per_block": 2,
        "sample_size": sizes["sample_size"] * 2 ** (len(blocks) - 1),
        "force_upcast": xl,
    }
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "facegen/assets/mini/base/tokenizer", model_max_length=77)

    def text(of: tuple[int, ...]) -> Any:
        width, layers, heads, inner, projected = of
        return CLIPTextConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            projection_dim=projected,
        )

    parts: dict[str, Any] = {
        "unet": empty(lambda: UNet2DConditionModel(**sizes), configuration.dtype, device),
        "vae": empty(lambda: AutoencoderKL(**vae), configuration.dtype, device),
        "text_encoder": empty(lambda: CLIPTextModel(text(TINY if small else TEXT)), configuration.dtype, device),
    }
    if xl:
        second = text(TINY if small else TEXT_2)
        parts["text_encoder_2"] = empty(lambda: CLIPTextModelWithProjection(second), configuration.dtype, device)
    memory = Memory(MemoryPlan(device, configuration.dtype, configuration.offload))  # type: ignore[arg-type]
    for part in parts.values():
        memory.place(part)
    parts |= {"tokenizer": tokenizer, "scheduler_config": SCHEDULE}
    parts |= {"tokenizer_2": tokenizer} if xl else {}
    return (SDXLModel if xl else SD15Model).from_parts(parts, memory)


def adapters(configuration: Configuration, model: Any) -> list[tuple[Any, Any]]:
    """The adapters without training, in their official sizes, and what each is asked."""
    from diffusers import ControlNetModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from facegen.adapter import AdapterRequest, ready
    from facegen.adapters.instantid import InstantID
    from facegen.adapters.ip_adapter_faceid import IPAdapterFaceID
    from facegen.models.clip import ClipView

    device, dtype = model.memory.device, configuration.dtype
    small = configuration.model in (SMALL, SMALL_XL)
    side = int(model.default_size[0])
    made: list[tuple[Any, Any]] = []
    if configuration.adapter in ("faceid", "two identities"):
        width, layers, heads, inner, projected = TINY if small else VISION
        config = CLIPVisionConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            projection_dim=projected,
            image_size=224,
            patch_size=14,
        )
        clip = ClipView(empty(lambda: CLIPVisionModelWithProjection(config), dtype, device))
        with torch.device("meta" if device == COMPUTED else device):
            faceid = IPAdapterFaceID.fresh(model, 512, variant="plusv2", clip=clip, rank=4 if small else 128)
        waiting(faceid.modules())
        ready(faceid.modules(), model)
        ready(clip.encoder, model)
        people = 1 if configuration.adapter == "faceid" else 2
        made += [(faceid, AdapterRequest(clip=torch.zeros(1, 3, 224, 224)))] * people
    if configuration.adapter == "instantid":
        with torch.device("meta" if device == COMPUTED else device):
            instantid = InstantID.fresh(model, 512)
        channels = (16, 32) if small else (16, 32, 96, 256)
        instantid.controlnet = empty(
            lambda: ControlNetModel.from_unet(
                model.unet, load_weights_from_unet=False, conditioning_embedding_out_channels=channels
            ),
            dtype,
            device,
        )
        waiting(instantid.projector)
        waiting(instantid.streams)
        ready(instantid.projector, model)
        ready(instantid.streams, model)
        model.memory.place(instantid.controlnet)
        made.append((instantid, AdapterRequest(control=torch.zeros(1, 3, side, side))))
    return made


def waiting(module: nn.Module) -> None:
    """Fresh adapters are where training wants them; these come from a file."""
    module.to("cpu")


def empty(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> Any:
    """A network that waits, with numbers only for a device that computes with them."""
    with torch.device("meta"):
        network = make().eval().requires_grad_(False)
    if device == COMPUTED:
        return network.to("cpu").to(dtype)
    network = network.to(dtype).to_empty(device="cpu")
    for value in (*network.parameters(), *network.buffers()):
        value.zero_()
    return network


def computed(configuration: Configuration) -> dict[str, int]:
    """Peaks without a device."""
    with shapes_alone() as meter:

        def peak(anew: bool) -> int:
            if anew:
                gc.collect()
                meter.peak = meter.now
            return meter.peak

        return run(configuration, COMPUTED, peak)


def measured(configuration: Configuration) -> dict[str, int]:
    """Peaks on the CUDA device."""

    def peak(anew: bool) -> int:
        if anew:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()

    return run(configuration, CUDA, peak)


def table(models: list[str], kinds: list[str], tell: Callable[[str], None]) -> str:
    """The Markdown table in GiB."""
    lines = [
        f"| model | adapter | precision | figures | {' | '.join(f'memory={one}' for one in OFFLOADS)} |",
        "|---|---|---|---|" + "---:|" * len(OFFLOADS),
    ]
    ways = {"computed": computed, "measured": measured}
    for model in models:
        for adapter in ADAPTERS:
            for precision, dtype in DTYPES.items():
                for kind in kinds:
                    peaks = []
                    for offload in OFFLOADS:
                        found = ways[kind](Configuration(model, adapter, offload, dtype))
                        tell(f"{kind} {model} {adapter} {precision} {offload} {found}")
                        peaks.append(f"{found['decoding'] / 2**30:.2f}")
                    row = (NAMES.get(model, model), TITLES[adapter], precision, kind, *peaks)
                    lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[SD15, SDXL], choices=list(UNETS))
    parser.add_argument("--out", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    kinds = ["computed", *(["measured"] if torch.cuda.is_available() else [])]
    made = table(arguments.models, kinds, lambda line: sys.stderr.write(f"{line}\n") and None)
    sys.stdout.write(made)
    if arguments.out:
        arguments.out.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
