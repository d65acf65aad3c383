"""edgekd: distil an ensemble of object detectors into one small student, and prove it on the device.

Importing this package costs nothing: torch, onnx, onnxruntime and tensorrt are imported only by the modules
that need them.
"""

__version__ = "0.1.0"
