"""Fixtures of every test: the shared golden data, and tiny random models in the formats of the real ones."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "facegen" / "assets" / "mini"


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data that lies beside the checkout (golden outputs, formats, photographs)."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared beside the checkout")
    return folder


@pytest.fixture(scope="session")
def mini() -> Path:
    """The embedded model, once its base is there."""
    if not (MINI / "base" / "model_index.json").is_file():
        pytest.skip("facegen/assets/mini has no base model yet")
    return MINI


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion 1.5 in diffusers' folder format: 64 px, VAE factor 8, cross-attention width 32."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    _seed(15)
    folder = tmp_path_factory.mktemp("tiny_sd15")
    tokenizer = _tokenizer(folder / "tokenizer_source")
    text = CLIPTextModel(CLIPTextConfig(projection_dim=32, **_text_sizes(tokenizer)))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL(**_vae_sizes()),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**_scheduler(), clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL in diffusers' folder format: 64 px, VAE factor 8, two text encoders of width 32."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    _seed(10)
    folder = tmp_path_factory.mktemp("tiny_sdxl")
    tokenizer = _tokenizer(folder / "tokenizer_source")
    config = CLIPTextConfig(projection_dim=32, **_text_sizes(tokenizer))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(**_vae_sizes()),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_scheduler(), timestep_spacing="leading"),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random insightface pack in the SCRFD and ArcFace formats (embedding of 16).

    Its detector answers with one face where the picture is reddest (red over blue, averaged over 32 px), and with none
    where nothing is red: enough for a path through the code, not for a photograph.
    """
    import onnx

    folder = tmp_path_factory.mktemp("insightface") / "models" / "tiny"  # insightface's own layout: root/models/name
    folder.mkdir(parents=True)
    onnx.save(_tiny_detector(), folder / "det.onnx")
    onnx.save(_tiny_recogniser(), folder / "rec.onnx")
    return folder


def has(module: str) -> bool:
    """Whether an optional package is installed."""
    return importlib.util.find_spec(module) is not None


def _seed(seed: int) -> None:
    # Freshly built modules take their weights from the global generator; nothing else in the tests draws from it.
    import torch

    torch.manual_seed(seed)


def _tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer over single letters: every text is encodable, none is one token."""
    from transformers import CLIPTokenizer

    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,.;:!?'\"()-+*/ ")
    pieces = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _text_sizes(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _vae_sizes() -> dict[str, Any]:
    return {
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    }


def _scheduler() -> dict[str, Any]:
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }


def _tiny_detector() -> Any:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: dict[str, Any] = {}

    def constant(name: str, value: Any) -> str:
        constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    # Red minus blue per pixel, whichever order the channels come in is insightface's: RGB after its own swap.
    weight = np.zeros((1, 3, 1, 1), np.float32)
    weight[0, 0], weight[0, 2] = 1.0, -1.0
    red = add("Conv", ["input.1", constant("red", weight)], "redness")
    outputs: dict[str, list[str]] = {"score": [], "box": [], "points": []}
    flat = constant("flat", np.array([-1, 1], np.int64))
    for stride in (8, 16, 32):
        cells = add("AveragePool", [red], f"cells{stride}", kernel_shape=[stride, stride], strides=[stride, stride])
        if stride == 32:
            highest = add("ReduceMax", [cells], "highest", keepdims=1)
            is_highest = add("Equal", [cells, highest], "is_highest")
            # 0.15 of the normalised range is about 19 grey levels of red over blue.
            is_red = add("Greater", [cells, constant("threshold", np.float32(0.15))], "is_red")
            found = add("Cast", [add("And", [is_highest, is_red], "found")], "found_number", to=TensorProto.FLOAT)
            score = add("Mul", [found, constant("certain", np.float32(0.9))], "score_map")
        else:
            score = add("Mul", [cells, constant(f"never{stride}", np.float32(0.0))], f"score_map{stride}")
        # Two anchors per cell, the second silent: (1, 2, h, w) -> (h * w * 2, 1).
        silent = add("Mul", [score, constant(f"silent{stride}", np.float32(0.0))], f"silence{stride}")
        both = add("Concat", [score, silent], f"both{stride}", axis=1)
        rows = add("Transpose", [both], f"rows{stride}", perm=[0, 2, 3, 1])
        outputs["score"].append(add("Reshape", [rows, flat], f"score_{stride}"))
        zero = add("Mul", [f"score_{stride}", constant(f"zero{stride}", np.float32(0.0))], f"zero_rows{stride}")
        # Distances in strides: a face of 64 x 64 px around the cell's corner.
        side = np.full((1, 4), 32.0 / stride, np.float32)
        outputs["box"].append(add("Add", [zero, constant(f"side{stride}", side)], f"box_{stride}"))
        points = np.array([[-12, -9, 12, -9, 0, 3, -9, 15, 9, 15]], np.float32) / stride
        outputs["points"].append(add("Add", [zero, constant(f"face{stride}", points)], f"points_{stride}"))
    named = outputs["score"] + outputs["box"] + outputs["points"]
    widths = [1] * 3 + [4] * 3 + [10] * 3
    graph = helper.make_graph(
        nodes,
        "tiny_detector",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "height", "width"])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, w]) for n, w in zip(named, widths, strict=True)],
        list(constants.values()),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _tiny_recogniser() -> Any:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(3)
    weight = generator.standard_normal((16, 3 * 7 * 7)).astype(np.float32) / 12
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["input.1"], ["cells"], kernel_shape=[16, 16], strides=[16, 16]),
            helper.make_node("Flatten", ["cells"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight"], ["683"], transB=1),
        ],
        "tiny_recogniser",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [None, 3, 112, 112])],
        [helper.make_tensor_value_info("683", TensorProto.FLOAT, [None, 16])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
