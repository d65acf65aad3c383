"""Run inside an environment with ultralytics: one of its detectors as ONNX, through its own `export`."""

import argparse
import os
import shutil

from ultralytics import YOLO

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--size", type=int, required=True)
parser.add_argument("--out", required=True)
arguments = parser.parse_args()

out = os.path.abspath(arguments.out)
os.chdir(os.path.dirname(out))  # it writes weights and exports to where it stands
try:
    model = YOLO(f"{arguments.model}.pt")
except (OSError, ConnectionError):  # no network: the same network without training is as fast
    model = YOLO(f"{arguments.model}.yaml")
    print("untrained: its weights could not be downloaded")
shutil.move(model.export(format="onnx", imgsz=arguments.size, opset=17, simplify=False), out)
