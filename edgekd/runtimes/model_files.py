"""The files that make up a model: an ONNX file may keep its weights in others beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from edgekd.artifact import is_onnx, sha256_file


def external_files(file: Path, model: Any = None) -> list[Path]:
    """Files beside an ONNX file that hold its large tensors; none for another kind of file, or without onnx.

    Args:
        model: the file's `ModelProto` if it has been read already.
    """
    if model is None:
        if not is_onnx(file):
            return []
        try:
            import onnx

            model = onnx.load(str(file), load_external_data=False)
        except Exception:  # whoever runs the file says what is wrong with it
            return []
    tensors = (tensor for _, tensor in _stored(model))
    places = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return [part for part in (file.parent / place for place in sorted(places)) if part.is_file()]


def _stored(model: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor that a `ModelProto` holds, by name; some exporters write weights as nodes."""
    yield from ((tensor.name, tensor) for tensor in model.graph.initializer)
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], entry.t) for entry in node.attribute if entry.name == "value")


def sha256_model(file: Path) -> str:
    """The SHA-256 of a model's file; of all its files together where the weights lie in others.

    An ONNX file with external weights stays the same, byte for byte, when these are trained on.
    """
    parts = external_files(file)
    if not parts:
        return sha256_file(file)
    return hashlib.sha256("".join(sha256_file(part) for part in (file, *parts)).encode()).hexdigest()


def weights_precision(model: Any) -> str:
    """The type of most weights of an ONNX `ModelProto`: "int8", "fp16" or "fp32", whatever type its inputs have.

    Weights that are stored as floats and go through a QuantizeLinear, as NVIDIA's tools write them, are int8.
    """
    import onnx

    quantised = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    names = {onnx.TensorProto.INT8: "int8", onnx.TensorProto.UINT8: "int8", onnx.TensorProto.FLOAT16: "fp16"}
    volumes = {"fp32": 0, "fp16": 0, "int8": 0}
    for name, tensor in _stored(model):
        if tensor.data_type == onnx.TensorProto.FLOAT or tensor.data_type in names:
            kind = "int8" if name in quantised else names.get(tensor.data_type, "fp32")
            volumes[kind] += prod(tensor.dims)
    return max(volumes, key=lambda name: volumes[name])


def may_be_foreign(path: Path) -> bool:
    """Whether a file is, or may be, an ONNX file that edgekd did not make, about which things can be declared.

    False of folders, checkpoints and engines, which say everything themselves; what cannot be read is for others to refuse.
    """
    if not is_onnx(path) or not path.is_file():
        return not path.exists()
    try:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # whoever runs the file says what is wrong with it
        return True
    return all(entry.key != "edgekd.schema" for entry in model.metadata_props)
