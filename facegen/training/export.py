"""From trained nets to the files that the embedded model ships: an insightface pack, and the judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from facegen.face.networks import DetectorNet, KeypointNet, RecogniserNet
from facegen.files import atomic
from facegen.training.checkpoint import save_tensors

OPSET = 17
JUDGES = ("judge", "attributes", "parsing")


class _Pack(nn.Module):
    """The detector in insightface's order: nine outputs of one picture, scores as probabilities."""

    def __init__(self, net: DetectorNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        scores, boxes, points = self.net(pictures)
        return tuple([score[0].sigmoid() for score in scores] + [b[0] for b in boxes] + [p[0] for p in points])


_STEMS = {"detector": "det", "recogniser": "rec"}


def stem_of(name: str, assets: Path) -> Path:
    """Where a net's ``.safetensors`` and ``.json`` are in the folder of a finished model."""
    return assets / "judges" / name if name in JUDGES else assets / "pack" / _STEMS.get(name, name)


def export(name: str, net: nn.Module, assets: Path) -> list[Path]:
    """Write one net's files below ``assets``: ``pack/`` for perception, ``judges/`` for the judges.

    All weights are kept in half precision; ``net`` itself is rounded, so that it equals what was written.
    """
    net = net.eval()
    _round(net)
    if name in JUDGES:
        return [_weights(net, assets / "judges" / name)]
    if isinstance(net, RecogniserNet):
        size, weights = net.config["size"], _weights(net, assets / "pack" / "rec")
        path, example = weights.with_suffix(".onnx"), torch.zeros(1, 3, size, size)
        _onnx(net, example, path, {0: "batch"}, ["embedding"], weights)
        return [path, weights]
    if isinstance(net, DetectorNet):
        names = [f"{kind}_{stride}" for kind in ("score", "box", "points") for stride in (8, 16, 32)]
        pack, example = _Pack(net).eval(), torch.zeros(1, 3, 320, 320)
        weights = _weights(net, assets / "pack" / "det")
        path = weights.with_suffix(".onnx")
        _onnx(pack, example, path, {2: "height", 3: "width"}, names, weights)
        return [path, weights]
    assert isinstance(net, KeypointNet), name
    if net.count != 5:
        return [_weights(net, assets / "pack" / name)]
    size = net.config["size"]
    _onnx(net, torch.zeros(1, 1, size, size), assets / "pack" / "points.onnx", {0: "batch"}, ["points"])
    return [assets / "pack" / "points.onnx"]


@torch.no_grad()
def _round(net: nn.Module) -> None:
    """Weights to the nearest number of half precision; statistics of batch norms keep theirs."""
    for weight in net.parameters():
        weight.copy_(weight.half().float())


def _weights(net: nn.Module, stem: Path) -> Path:
    """``stem.safetensors`` and ``stem.json``, its config."""
    weights = {name for name, _ in net.named_parameters()}
    state = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    halved = {name: value.half() if name in weights else value for name, value in state.items()}
    save_tensors(halved, stem.with_suffix(".safetensors"))
    config: dict[str, Any] = net.config  # type: ignore[assignment]
    stem.with_suffix(".json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return stem.with_suffix(".safetensors")


def _onnx(
    net: nn.Module, example: Tensor, path: Path, free: dict[int, str], outputs: list[str], weights: Path | None = None
) -> None:
    """Export by tracing; ``free`` names the input's axes that may have any length, ``weights`` as in :func:`_halve`."""
    axes = {"input": free}
    if 0 in free:
        axes |= {name: {0: free[0]} for name in outputs}
    else:
        axes |= {name: {0: f"cells_{name}"} for name in outputs}
    net = net.to(memory_format=torch.contiguous_format).float()  # type: ignore[call-overload]
    with atomic(path) as temporary:
        torch.onnx.export(
            net, (example,), str(temporary), dynamo=False, opset_version=OPSET,
            input_names=["input"], output_names=outputs, dynamic_axes=axes,
            # Folding batch norms would move the weights off the half-precision grid; onnxruntime folds by itself.
            training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        )  # fmt: skip
        _halve(temporary, weights)


def _halve(path: Path, weights: Path | None, smallest: int = 512) -> None:
    """Store the large weights of an ONNX file in half precision, each with a cast that onnxruntime folds at loading.

    With ``weights``, a file beside it that holds the same bytes, they are kept there alone (ONNX's external data).
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnx.external_data_helper import set_external_data

    kept = b"" if weights is None else weights.read_bytes()
    model = onnx.load(str(path))
    casts = []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or array.size < smallest:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(array.astype("float16"), f"{name}.half"))
        if weights is not None:
            set_external_data(tensor, weights.name, offset=kept.index(tensor.raw_data), length=len(tensor.raw_data))
            tensor.ClearField("raw_data")
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"/cast/{name}", to=TensorProto.FLOAT))
    # insightface looks for mxnet's normalisation among the first eight nodes: the casts may come first, they are none.
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)
    onnx.save(model, str(path))
