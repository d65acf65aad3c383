"""From a trained detector to a file for the device: ONNX, fp16, int8, each past a parity gate.

`export_run` is the whole of it. Imports are lazy, so that the command line starts without torch or onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.export.images import ExportData
    from edgekd.export.job import ExportResult, export_run
    from edgekd.export.onnx import export_onnx

__all__ = ["ExportData", "ExportResult", "export_onnx", "export_run"]

_HOMES = {
    "ExportData": "images",
    "ExportResult": "job",
    "export_onnx": "onnx",
    "export_run": "job",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
