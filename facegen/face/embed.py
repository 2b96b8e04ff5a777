"""ArcFace in torch: the recogniser whose gradients training and guidance need.

Three origins give the same module: an ONNX file of an insightface pack, a state dict of arcface_torch's IResNet, and
the embedded model's own net. Crops go in as RGB in [-1, 1], embeddings come out raw.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen import checkpoints
from facegen.errors import CheckpointBroken, WeightsMissing, WrongAdapter
from facegen.face.align import norm_crop_torch
from facegen.preprocessing import preprocessing

_BLOCKS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34, (3, 4, 14, 3): 50, (3, 13, 30, 3): 100, (6, 26, 60, 6): 200}


class ArcFace(nn.Module):
    """A recogniser with frozen weights, in evaluation mode; gradients flow through to its input."""

    def __init__(self, net: nn.Module, *, size: int = 112) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.size = size

    @classmethod
    def from_pretrained(cls, source: str | Path) -> ArcFace:
        """From a file, or a pack folder whose recogniser is found as insightface finds it.

        Beside an .onnx file of the embedded model lies the net itself (.safetensors and .json), which is taken then.
        Raises WeightsMissing, CheckpointBroken, WrongAdapter.
        """
        path = Path(source).expanduser()
        if path.is_dir():
            path = recogniser_file(path)
        if not path.is_file():
            raise WeightsMissing(f"{path} is not there; put the recogniser in that place or give another path.")
        if path.suffix != ".onnx":
            config = path.with_suffix(".json")
            return _own(path, config) if config.is_file() else cls.from_state_dict(checkpoints.read(path), path=path)
        twin, config = path.with_suffix(checkpoints.SAFE), path.with_suffix(".json")
        if twin.is_file() and config.is_file():
            return _own(twin, config)
        graph = OnnxGraph.from_file(path)
        return cls(graph, size=graph.size)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], *, path: Path = Path("the state dict")) -> ArcFace:
        """From the keys of arcface_torch's IResNet (`backbone.pth`), whose depth and widths are read from the keys."""
        for prefix in ("module.", "backbone."):
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        if "layer1.0.bn1.weight" not in tensors or "fc.weight" not in tensors:
            raise checkpoints.refuse(path, tensors, "a recogniser of the IResNet family")
        net = IResNet.of(tensors, path)
        counters = {key for key in net.state_dict() if key.endswith("num_batches_tracked")}
        weights = {key: value.float() for key, value in tensors.items() if key not in counters}
        weights |= {key: torch.tensor(0) for key in counters}
        checkpoints.load_into(net, weights, path=path)
        return cls(net, size=net.size)

    def forward(self, crops: Tensor) -> Tensor:
        """Aligned RGB crops (B, 3, size, size) in [-1, 1] to raw embeddings (B, D)."""
        embeddings: Tensor = self.net(crops)
        return embeddings

    def embed(self, images: Tensor, points: Tensor) -> Tensor:
        """RGB pictures (B, 3, H, W) in [0, 1] with their points (B, 5, 2) in pixels to raw embeddings (B, D)."""
        return self(preprocessing("recogniser").sight.normal(norm_crop_torch(images, points, self.size)))

    def train(self, mode: bool = True) -> ArcFace:
        """Stays in evaluation mode: batch statistics of generated faces would change who people are."""
        return super().train(False)


def _own(weights: Path, config: Path) -> ArcFace:
    """A small net of facegen.face.networks."""
    from facegen.face.networks import network

    try:
        sizes = json.loads(config.read_text(encoding="utf-8"))
        net = network(sizes)
    except (ValueError, TypeError) as error:
        raise CheckpointBroken(f"{config} does not describe a net ({error}); fetch the file again.") from error
    tensors = checkpoints.read(weights)
    for key, value in net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            tensors.setdefault(key, value)
    checkpoints.load_into(net, tensors, path=weights)
    return ArcFace(net, size=int(sizes.get("size", 112)))


# --- arcface_torch's IResNet ----------------------------------------------------------------------------------------


class IBasicBlock(nn.Module):
    """BN-conv-BN-PReLU-conv-BN beside a shortcut (arcface_torch `backbones/iresnet.py`)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride > 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, H, W) -> (B, width, H/stride, W/stride)
        shortcut = x if self.downsample is None else self.downsample(x)
        y: Tensor = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return shortcut + y


class IResNet(nn.Module):
    """The backbone of the ArcFace models, with arcface_torch's parameter names."""

    def __init__(
        self, blocks: Sequence[int], *, widths: Sequence[int] = (64, 128, 256, 512), dim: int = 512, size: int = 112
    ) -> None:
        super().__init__()
        self.size = size
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        inputs = widths[0]
        layers = []
        for count, width in zip(blocks, widths, strict=True):
            layers.append(
                nn.Sequential(*(IBasicBlock(width if i else inputs, width, 1 if i else 2) for i in range(count)))
            )
            inputs = width
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.bn2 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs * (size // 16) ** 2, dim)
        self.features = nn.BatchNorm1d(dim)

    @classmethod
    def of_depth(cls, depth: int) -> IResNet:
        """r18, r34, r50, r100 or r200 with random weights."""
        return cls({d: blocks for blocks, d in _BLOCKS.items()}[depth])

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: Path) -> IResNet:
        """The net that these weights belong to."""
        checkpoints.require(tensors, "conv1.weight", "bn2.weight", "fc.weight", "features.weight", path=path)
        blocks = [len({key.split(".")[1] for key in tensors if key.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
        if 0 in blocks:
            raise CheckpointBroken(f"{path} lacks layer{blocks.index(0) + 1}; fetch the file again.")
        first = [f"layer{i}.0.conv1.weight" for i in (1, 2, 3, 4)]
        checkpoints.require(tensors, *first, path=path)
        widths = [int(tensors[key].shape[0]) for key in first]
        dim, flat = tensors["fc.weight"].shape
        size = round((flat / widths[-1]) ** 0.5) * 16
        return cls(blocks, widths=widths, dim=dim, size=size)

    @property
    def depth(self) -> int | None:
        """18, 34, 50, 100 or 200; None for a net of other proportions."""
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        first, second, third, fourth = (len(layer) for layer in layers)
        return _BLOCKS.get((first, second, third, fourth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        embedding: Tensor = self.features(self.fc(self.bn2(x).flatten(1)))
        return embedding


# --- ONNX -----------------------------------------------------------------------------------------------------------


def recogniser_file(folder: Path) -> Path:
    """The recogniser of an insightface pack: the first .onnx file with one picture in and one vector out.

    Raises WeightsMissing.
    """
    from facegen.hub import pack_folder

    folder = pack_folder(folder)
    for path in sorted(folder.glob("*.onnx")):
        inputs, outputs = _interface(path)
        if len(inputs) == len(outputs) == 1:
            shape = inputs[0]
            if len(shape) == 4 and shape[2] == shape[3] and shape[2] >= 112 and shape[2] % 16 == 0 and shape[2] != 192:
                return path
    raise WeightsMissing(f"{folder} holds no recogniser; put the pack's ArcFace .onnx file there.")


def _load_onnx(path: Path, *, weights: bool) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    try:
        return onnx.load(str(path), load_external_data=weights)
    except (DecodeError, OSError, ValueError) as error:
        raise CheckpointBroken(f"{path} is truncated or no ONNX file; fetch the file again.") from error
    except onnx.checker.ValidationError as error:
        raise CheckpointBroken(
            f"The weights that belong to {path} are not beside it; fetch the files again."
        ) from error


def _interface(path: Path) -> tuple[list[list[int]], list[list[int]]]:
    graph = _load_onnx(path, weights=False).graph
    names = {tensor.name for tensor in graph.initializer}  # old exporters list the weights among the inputs

    def sizes(value: Any) -> list[int]:
        return [int(axis.dim_value) for axis in value.type.tensor_type.shape.dim]

    return [sizes(value) for value in graph.input if value.name not in names], [sizes(v) for v in graph.output]


class OnnxGraph(nn.Module):
    """An ONNX graph of the few operators recognisers are made of, walked in torch with its initialisers as buffers.

    It does not ask for names or for a certain structure, because exporters fold batch norms and rename what they fold.
    """

    def __init__(self, graph: Any, *, path: Path) -> None:
        super().__init__()
        from onnx import numpy_helper

        self._constants: dict[str, str] = {}  # ONNX name -> buffer
        for tensor in graph.initializer:
            self._constant(tensor.name, numpy_helper.to_array(tensor))
        self._steps: list[tuple[str, list[str], str, dict[str, Any]]] = []
        for node in graph.node:
            attributes = {a.name: _attribute(a) for a in node.attribute}
            if node.op_type == "Constant":
                self._constant(node.output[0], np.asarray(attributes["value"]))
            elif node.op_type in OPERATORS:
                self._steps.append((node.op_type, list(node.input), node.output[0], attributes))
            else:
                raise WrongAdapter(
                    f"{path} uses the operator {node.op_type}, which no ArcFace recogniser needs; "
                    "give the recogniser of a pack (w600k_r50.onnx, glintr100.onnx, arcface.onnx)."
                )
        inputs = [value for value in graph.input if value.name not in self._constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise WrongAdapter(f"{path} is no recogniser: one picture must go in and one vector come out.")
        self._input, self._output = inputs[0].name, graph.output[0].name
        sizes = [int(axis.dim_value) for axis in inputs[0].type.tensor_type.shape.dim]
        self.size = sizes[-1] if sizes and sizes[-1] > 0 else 112
        # MXNet exports normalise inside the graph and expect 0 … 255 (insightface `model_zoo/arcface_onnx.py`).
        names = [node.name for node in graph.node[:8]]
        self.pixels = any(n.startswith(("Sub", "_minus")) for n in names) and any(
            n.startswith(("Mul", "_mul")) for n in names
        )
        self._last_use = {name: i for i, (_, used, _, _) in enumerate(self._steps) for name in used}

    @classmethod
    def from_file(cls, path: Path) -> OnnxGraph:
        """Raises CheckpointBroken for a damaged file and WrongAdapter for a graph that is no recogniser."""
        return cls(_load_onnx(path, weights=True).graph, path=path)

    def _constant(self, name: str, value: np.ndarray[Any, Any]) -> None:
        tensor = torch.from_numpy(np.array(value))
        key = f"constant_{len(self._constants)}"
        self._constants[name] = key
        self.register_buffer(key, tensor.float() if tensor.is_floating_point() else tensor)

    def forward(self, crops: Tensor) -> Tensor:
        values = {self._input: crops * 127.5 + 127.5 if self.pixels else crops}
        for i, (kind, inputs, output, attributes) in enumerate(self._steps):
            arguments = [
                (values[name] if name in values else getattr(self, self._constants[name])) if name else None
                for name in inputs
            ]
            values[output] = OPERATORS[kind](attributes, *arguments)
            for name in inputs:  # what nobody needs again is let go: a deep net's activations are large
                if self._last_use.get(name) == i and name in values and name != self._output:
                    del values[name]
        return values[self._output]


def _attribute(attribute: Any) -> Any:
    import onnx
    from onnx import numpy_helper

    value = onnx.helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _conv(a: Mapping[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    top, left, bottom, right = a.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    stride, dilation = a.get("strides", [1, 1]), a.get("dilations", [1, 1])
    return F.conv2d(x, weight, bias, stride, (top, left), dilation, a.get("group", 1))


def _batch_norm(a: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, a.get("epsilon", 1e-5))


def _gemm(a: Mapping[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = x.T if a.get("transA", 0) else x
    product = a.get("alpha", 1.0) * (x @ (weight.T if a.get("transB", 0) else weight))
    return product if bias is None else product + a.get("beta", 1.0) * bias


def _reshape(_: Mapping[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])


def _average(a: Mapping[str, Any], x: Tensor) -> Tensor:
    kernel = a["kernel_shape"]
    top, left = a.get("pads", [0, 0, 0, 0])[:2]
    included = bool(a.get("count_include_pad", 0))
    return F.avg_pool2d(x, kernel, a.get("strides", [1, 1]), (top, left), count_include_pad=included)


OPERATORS: Mapping[str, Callable[..., Tensor]] = {
    "Add": lambda _, x, y: x + y,
    "AveragePool": _average,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Div": lambda _, x, y: x / y,
    "Dropout": lambda _, x, *__: x,
    "Flatten": lambda a, x: x.flatten(a.get("axis", 1)),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda _, x: x.mean((2, 3), keepdim=True),
    "Identity": lambda _, x: x,
    "MatMul": lambda _, x, y: x @ y,
    "Mul": lambda _, x, y: x * y,
    "PRelu": lambda _, x, slope: F.prelu(x, slope.flatten()),
    "Relu": lambda _, x: F.relu(x),
    "Reshape": _reshape,
    "Sigmoid": lambda _, x: torch.sigmoid(x),
    "Sub": lambda _, x, y: x - y,
    "Transpose": lambda a, x: x.permute(a["perm"]),
}
