"""Fine-tune an exported yolo11n or yolov8n on your data, so that it can be compared at equal accuracy.

    python benchmarks/peers/finetune.py yolo11n.onnx RECIPE --out runs/yolo11n --set data.root=DIR

The published network starts from COCO, with its batch norms put back where the exporter had folded them; it is trained
by edgekd's own loop and losses on the recipe's data, augmentation and schedule (its `student.model` must be yolo-nano,
whose head codes boxes in the same way), and written as ONNX with the data's classes: OUT/peer.onnx, for
`run.py --onnx yolo11n=OUT/peer.onnx`. For measurement only: weights of Ultralytics' networks are AGPL-3.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from edgekd.checkpoint import load_detector
from edgekd.data.images import load_image
from edgekd.detectors import DETECTORS
from edgekd.detectors.base import DetectorOutput
from edgekd.detectors.yolo_free import YoloFree
from edgekd.preprocess import prepare
from edgekd.recipe_file import load_recipe
from edgekd.stages import train_student
from edgekd.types import DetectorSpec
from edgekd.workspace import open_workspace

_BINS = 16
_IMAGES_FOR_STATISTICS = 32


class Peer(nn.Module):
    """The network of an exported yolo11n or yolov8n up to its raw maps, its convolutions trainable.

    Attributes:
        head: per level, the names of its last convolutions: (distances, classes).
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        made_by = {output: node for node in model.graph.node for output in node.output}
        levels = [
            node
            for node in model.graph.node
            if node.op_type == "Concat"
            and len(node.input) == 2
            and all(name in made_by and made_by[name].op_type == "Conv" for name in node.input)
            and self.constants[made_by[node.input[0]].input[1]].shape[0] == 4 * _BINS
        ]
        if len(levels) != 3:
            raise SystemExit(f"not yolo11n or yolov8n: {len(levels)} levels of distances and classes, not 3")
        self.published_classes = len(self.constants[made_by[levels[0].input[1]].input[1]])
        self.head = [tuple(made_by[name].output[0] for name in node.input) for node in levels]
        wanted = {name for level in self.head for name in level}
        self.nodes = _ancestors(model, wanted)
        self.input = model.graph.input[0].name
        self.convs = nn.ModuleDict(
            {
                _key(node.output[0]): self._conv(node, node.output[0] in wanted)
                for node in self.nodes
                if node.op_type == "Conv"
            }
        )

    def _conv(self, node: onnx.NodeProto, last: bool) -> nn.Module:
        weight, bias = (torch.from_numpy(self.constants[name].copy()) for name in node.input[1:3])
        attributes = _attributes(node)
        conv = nn.Conv2d(
            weight.shape[1] * attributes.get("group", 1),
            len(weight),
            tuple(weight.shape[2:]),
            tuple(attributes.get("strides", (1, 1))),
            tuple(attributes.get("pads", (0, 0))[:2]),
            groups=attributes.get("group", 1),
            bias=last,
        )
        conv.weight.data.copy_(weight)
        if last:
            conv.bias.data.copy_(bias)
            return conv
        norm = nn.BatchNorm2d(len(weight), eps=1e-3)
        norm.bias.data.copy_(bias)
        return nn.Sequential(conv, norm)

    def restore_norms(self, images: Tensor) -> None:
        """Batch norms that change nothing on `images` (N, 3, H, W): statistics as measured, scale and shift to match."""

        def measured(norm: nn.BatchNorm2d) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                shift = norm.bias.data.clone()
                mean, var = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3))
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(var)
                norm.weight.data.copy_((var + norm.eps).sqrt())
                norm.bias.data.copy_(shift + mean)

            return hook

        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        hooks = [norm.register_forward_pre_hook(measured(norm)) for norm in norms]
        self.eval()
        with torch.no_grad():
            self(images)
        for handle in hooks:
            handle.remove()

    def new_classes(self, count: int) -> None:
        """Class convolutions of `count` outputs, starting as YOLO's do: few objects, whatever the picture."""
        for (_, name), stride in zip(self.head, (8, 16, 32), strict=True):
            old = self.convs[_key(name)]
            assert isinstance(old, nn.Conv2d)
            new = nn.Conv2d(old.in_channels, count, 1)
            nn.init.constant_(new.bias, float(np.log(5 / count / (640 / stride) ** 2)))
            self.convs[_key(name)] = new

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, 3, H, W) to (distances (B, 64, h, w), classes (B, C, h, w)) of the levels, fine to coarse."""
        values: dict[str, Tensor] = {self.input: images}

        def value(name: str) -> Tensor:
            if name not in values:
                values[name] = torch.from_numpy(np.array(self.constants[name]))
            return values[name]

        for node in self.nodes:
            if node.op_type == "Conv":
                values[node.output[0]] = self.convs[_key(node.output[0])](value(node.input[0]))
                continue
            results = _OPS[node.op_type](_attributes(node), [value(name) for name in node.input if name])
            values.update(zip(node.output, results, strict=True))
        return [(values[reg], values[cls]) for reg, cls in self.head]

    def write(self, model: onnx.ModelProto, class_names: Sequence[str]) -> onnx.ModelProto:
        """`model` with this network's weights (norms folded again) and classes."""
        out = onnx.ModelProto()
        out.CopyFrom(model)
        held = {i.name: i for i in out.graph.initializer}

        def put(name: str, array: np.ndarray) -> None:
            held[name].CopyFrom(numpy_helper.from_array(array, name))

        for node in self.nodes:
            if node.op_type == "Conv":
                weight, bias = _folded(self.convs[_key(node.output[0])])
                put(node.input[1], weight.numpy())
                put(node.input[2], bias.numpy())
        whole, new = 4 * _BINS + self.published_classes, 4 * _BINS + len(class_names)
        for name, array in self.constants.items():  # the head's reshapes and splits
            if array.dtype == np.int64 and array.tolist() == [4 * _BINS, self.published_classes]:
                put(name, np.array([4 * _BINS, len(class_names)], np.int64))
            elif array.dtype == np.int64 and array.ndim == 1 and whole in array:
                put(name, np.where(array == whole, new, array))
        out.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4 + len(class_names)
        for entry in out.metadata_props:
            if entry.key == "names":
                entry.value = str(dict(enumerate(class_names)))
        del out.graph.value_info[:]
        onnx.checker.check_model(out, full_check=True)
        return out


def load_peer(path: Path) -> onnx.ModelProto:
    """The exported network, its constant nodes made initialisers."""
    model = onnx.load(path)
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    for node in constants:
        array = numpy_helper.to_array(_attributes(node)["value"])
        model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        model.graph.node.remove(node)
    return model


def _folded(module: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(module, nn.Conv2d):
        assert module.bias is not None
        return module.weight.detach(), module.bias.detach()
    conv, norm = module
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return conv.weight.detach() * scale[:, None, None, None], norm.bias.detach() - norm.running_mean * scale


def _key(name: str) -> str:
    return name.replace(".", "-")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _ancestors(model: onnx.ModelProto, wanted: set[str]) -> list[onnx.NodeProto]:
    needed, kept = set(wanted), []
    for node in reversed(_sorted(model)):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    return kept[::-1]


def _sorted(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    ready = {i.name for i in model.graph.input} | {i.name for i in model.graph.initializer} | {""}
    waiting, done = list(model.graph.node), []
    while waiting:
        now = [node for node in waiting if set(node.input) <= ready]
        if not now:
            raise SystemExit("the graph has a cycle, or an input that nothing makes")
        done += now
        ready |= {output for node in now for output in node.output}
        waiting = [node for node in waiting if not set(node.output) <= ready]
    return done


def _max_pool(a: Mapping[str, Any], x: list[Tensor]) -> list[Tensor]:
    return [F.max_pool2d(x[0], a["kernel_shape"], a["strides"], a["pads"][:2])]


def _resize(a: Mapping[str, Any], x: list[Tensor]) -> list[Tensor]:
    return [F.interpolate(x[0], scale_factor=[float(v) for v in x[-1][2:]], mode="nearest")]


def _reshape(_: Mapping[str, Any], x: list[Tensor]) -> list[Tensor]:
    return [x[0].reshape([x[0].shape[i] if v == 0 else v for i, v in enumerate(x[1].tolist())])]


_OPS: dict[str, Callable[..., Sequence[Tensor]]] = {
    "Sigmoid": lambda a, x: [x[0].sigmoid()],
    "Mul": lambda a, x: [x[0] * x[1]],
    "Add": lambda a, x: [x[0] + x[1]],
    "Concat": lambda a, x: [torch.cat([t.reshape(1) if t.ndim == 0 else t for t in x], a["axis"])],
    "Split": lambda a, x: x[0].split(x[1].tolist(), a["axis"]),
    "Transpose": lambda a, x: [x[0].permute(*a["perm"])],
    "MatMul": lambda a, x: [x[0] @ x[1]],
    "Softmax": lambda a, x: [x[0].softmax(a["axis"])],
    "Shape": lambda a, x: [torch.tensor(x[0].shape)],
    "Gather": lambda a, x: [x[0][x[1]]],
    "Unsqueeze": lambda a, x: [x[0].reshape(1)],  # of shapes only
    "MaxPool": _max_pool,
    "Resize": _resize,
    "Reshape": _reshape,
}


class PeerDetector(YoloFree):
    """The peer behind edgekd's anchor-free head: the same coding, assignment and losses."""

    def __init__(self, spec: DetectorSpec, model: onnx.ModelProto, pictures: Sequence[Path]) -> None:
        super().__init__(spec)
        self.backbone, self.neck, self.head = nn.Identity(), nn.Identity(), nn.ModuleList()
        self.tap_specs = {}
        self.peer = Peer(model)
        inputs = [prepare(load_image(path), spec.preprocess)[0] for path in pictures]
        self.peer.restore_norms(torch.from_numpy(np.concatenate(inputs)))
        self.peer.new_classes(self.num_classes)

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> DetectorOutput:
        """See `Detector.forward`; there are no taps."""
        levels = self.peer(images)
        return DetectorOutput(
            torch.cat([cls.flatten(2).transpose(1, 2) for _, cls in levels], dim=1),
            torch.cat([reg.flatten(2).transpose(1, 2) for reg, _ in levels], dim=1),
        )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("onnx", type=Path, help="the published network, as its own exporter wrote it")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of `edgekd train`; repeatable"
    )
    options = parser.parse_args()

    model = load_peer(options.onnx)
    recipe = load_recipe(options.recipe, ["student.model=yolo-nano", *options.set], needs=("data", "student"))
    fixed = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]]
    if any(fixed) and fixed != [recipe.student.input_size] * 2:
        raise SystemExit(
            f"{options.onnx} takes {fixed[0]} px only: --set student.input_size={fixed[0]}, or export it with dynamic axes"
        )
    with open_workspace(recipe, options.out) as work:
        pictures = [record.path for record in work.train.records[:_IMAGES_FOR_STATISTICS]]
        DETECTORS["yolo-nano"] = lambda spec: PeerDetector(spec, model, pictures)
        result = train_student(work, options.out)
        detector = load_detector(result.model)
    assert isinstance(detector, PeerDetector)
    file = options.out / "peer.onnx"
    onnx.save(detector.peer.write(model, detector.spec.class_names), file)
    print(f"{file}: {result.metrics}")


if __name__ == "__main__":
    main()
