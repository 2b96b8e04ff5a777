from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from facegen.errors import CheckpointBroken, WeightsMissing, WrongAdapter
from facegen.face.embed import ArcFace, IResNet
from facegen.face.networks import RecogniserNet

# The exporter that insightface packs are made with; its successor needs onnxscript.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*legacy TorchScript:DeprecationWarning", "ignore:The feature will be removed:DeprecationWarning"
)


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of the size training leaves, statistics of batch norms off their starting point."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            fan = parameter[0].numel()
            parameter.data.normal_(0, fan**-0.5, generator=generator)
        elif "prelu" not in name:
            parameter.data.uniform_(0.5, 1.2, generator=generator)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.6, 1.5, generator=generator)
    return net.eval()


def export(net: nn.Module, path: Path) -> Path:
    torch.onnx.export(
        net, (torch.zeros(1, 3, 112, 112),), str(path), dynamo=False, opset_version=17,
        input_names=["input.1"], output_names=["embedding"], dynamic_axes={"input.1": {0: "n"}, "embedding": {0: "n"}},
    )  # fmt: skip
    return path


def onnx_answer(path: Path, crops: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    answer = session.run(None, {session.get_inputs()[0].name: crops.numpy()})[0]
    return np.asarray(answer)


def crops(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def iresnet18() -> nn.Module:
    return randomised(IResNet((2, 2, 2, 2), widths=(16, 24, 32, 48), dim=64))


def test_the_onnx_twin_agrees_with_onnxruntime(iresnet18: nn.Module, tmp_path: Path) -> None:
    path = export(iresnet18, tmp_path / "arcface.onnx")
    twin = ArcFace.from_pretrained(path)
    expected = onnx_answer(path, crops())
    assert np.abs(twin(crops()).numpy() - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
    assert expected.std() > 0.05  # the nets answer something
    from_keys = ArcFace.from_state_dict(iresnet18.state_dict())
    assert np.abs(from_keys(crops()).numpy() - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


@pytest.mark.slow
def test_a_whole_iresnet18_agrees_with_onnxruntime(tmp_path: Path) -> None:
    net = randomised(IResNet.of_depth(18))
    path = export(net, tmp_path / "r18.onnx")
    expected = onnx_answer(path, crops(2))
    for twin in (ArcFace.from_pretrained(path), ArcFace.from_state_dict(net.state_dict())):
        assert np.abs(twin(crops(2)).numpy() - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(("depth", "keys"), [(18, 187), (50, 475), (100, 925)])
def test_depths_and_key_counts(depth: int, keys: int) -> None:
    with torch.device("meta"):
        net = IResNet.of_depth(depth)
    names = [name for name in net.state_dict() if not name.endswith("num_batches_tracked")]
    counters = len(net.state_dict()) - len(names)
    assert keys in (len(names), len(names) + counters)
    assert net.depth == depth
    assert net.fc.weight.shape == (512, 25088)


def test_gradients_reach_the_picture_through_crop_and_net(iresnet18: nn.Module) -> None:
    twin = ArcFace.from_state_dict(iresnet18.state_dict())
    images = torch.rand(2, 3, 96, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
    points = torch.tensor([[[25.0, 40], [52, 40], [38, 55], [28, 68], [50, 68]]]).expand(2, -1, -1)
    goal = torch.randn(64, generator=torch.Generator().manual_seed(1))
    similarity = torch.cosine_similarity(twin.embed(images, points), goal[None])
    similarity.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    with torch.no_grad():
        better = torch.cosine_similarity(twin.embed(images + 0.02 * images.grad.sign(), points), goal[None])
    assert (better > similarity).all()
    assert all(not parameter.requires_grad for parameter in twin.parameters())
    assert not twin.train().net.training


def test_mini_nets_agree_with_their_onnx_file(tmp_path: Path) -> None:
    net = randomised(RecogniserNet(dim=32, widths=(8, 16, 24)))
    path = export(net, tmp_path / "rec.onnx")
    expected = onnx_answer(path, crops())
    scale = max(1.0, float(np.abs(expected).max()))
    assert np.abs(ArcFace.from_pretrained(path)(crops()).numpy() - expected).max() <= 1e-4 * scale
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "rec.safetensors")
    (tmp_path / "rec.json").write_text(json.dumps(net.config))
    own = ArcFace.from_pretrained(tmp_path)
    assert isinstance(own.net, RecogniserNet)
    assert np.abs(own(crops()).numpy() - expected).max() <= 1e-4 * scale


def test_a_pack_folder_gives_its_recogniser(tiny_pack: Path) -> None:
    twin = ArcFace.from_pretrained(tiny_pack)
    expected = onnx_answer(tiny_pack / "rec.onnx", crops())
    assert np.abs(twin(crops()).numpy() - expected).max() <= 1e-4


def test_state_dicts_with_a_prefix_and_half_precision(iresnet18: nn.Module) -> None:
    state = {f"module.{key}": value for key, value in iresnet18.state_dict().items()}
    expected = ArcFace.from_state_dict(iresnet18.state_dict())(crops())
    assert torch.equal(ArcFace.from_state_dict(state)(crops()), expected)
    half = {k: v.half() if v.is_floating_point() else v for k, v in iresnet18.state_dict().items()}
    assert torch.cosine_similarity(ArcFace.from_state_dict(half)(crops()), expected).min() > 0.999


def test_bad_files(tmp_path: Path, iresnet18: nn.Module) -> None:
    with pytest.raises(WeightsMissing):
        ArcFace.from_pretrained(tmp_path / "nothing.onnx")
    with pytest.raises(WeightsMissing):
        ArcFace.from_pretrained(tmp_path)
    (tmp_path / "bad.onnx").write_bytes(b"not a graph at all")
    with pytest.raises(CheckpointBroken):
        ArcFace.from_pretrained(tmp_path / "bad.onnx")
    with pytest.raises(WrongAdapter):
        ArcFace.from_state_dict({"image_proj.proj.weight": torch.zeros(1)})
    state = dict(iresnet18.state_dict())
    del state["layer3.1.conv2.weight"]
    with pytest.raises(CheckpointBroken, match=r"layer3\.1\.conv2"):
        ArcFace.from_state_dict(state)


def test_other_graphs_are_refused(tmp_path: Path) -> None:
    path = export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1)), tmp_path / "other.onnx")
    with pytest.raises(WrongAdapter, match="Softmax"):
        ArcFace.from_pretrained(path)
