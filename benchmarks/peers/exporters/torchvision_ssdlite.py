"""Run inside an environment with torchvision: its SSD-lite as ONNX, exported the way torchvision documents."""

import argparse

import torch
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights, ssdlite320_mobilenet_v3_large

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
arguments = parser.parse_args()

try:
    model = ssdlite320_mobilenet_v3_large(weights=SSDLite320_MobileNet_V3_Large_Weights.DEFAULT)
except OSError:  # no network: the same network without training is as fast
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    print("untrained: its weights could not be downloaded")
torch.onnx.export(
    model.eval(),
    (torch.rand(1, 3, 320, 320),),
    arguments.out,
    opset_version=17,
    input_names=["images"],
    output_names=["boxes", "scores", "labels"],
    dynamo=False,
)
