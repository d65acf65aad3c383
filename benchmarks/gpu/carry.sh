#!/usr/bin/env bash
# What a bare GPU machine needs, in parts that fit its transfers: see README.md beside this file.
#
#   carry.sh TRT VOC STUDENT BUNDLE OUT [MIB]
#
# TRT: parts of a real TensorRT 8.6 with a Python 3.10 (files *.part-*, tar by zstd --long=27, and the program zstd).
# VOC: a data set in VOC layout, of which 256 images of `train` and 500 of `val` go along. STUDENT: a run or checkpoint.
# BUNDLE: `edgekd bundle` of the student and its teachers. Writes OUT/first (for the torch stages) and OUT/part-NN of MIB
# MiB each (58): TensorRT, what edgekd's engine stages import under Python 3.10, and the bundle.
set -euo pipefail
[ $# -ge 5 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
trt=$1 voc=$2 student=$3 bundle=$4 out=$5 mib=${6:-58}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir -p "$out/first/wheels" "$work/rest"
platforms=()
for version in _2_28 _2_27 _2_17 2014 1; do platforms+=(--platform "manylinux${version}_x86_64"); done
fetch() { python3 -m pip "$@" --only-binary=:all: --implementation cp "${platforms[@]}"; }

# Without torch: engines are built from ONNX files. OpenCV and ONNX are the last that take NumPy 1, as TensorRT 8.6 does.
fetch install -q --no-compile --target "$work/rest" --python-version 3.10 'numpy<2' 'opencv-python-headless<4.12' \
  onnx==1.17.0 'onnxruntime<1.24' faster-coco-eval pydantic pyyaml pillow simplejpeg psutil typer nvidia-ml-py
rm -rf "$work"/rest/{numpy,numpy.libs,numpy-*,sympy*,mpmath*,isympy*,bin,share} "$work"/rest/onnx/backend/test
cp -r "$bundle" "$work/rest/bundle"
{ cat "$trt"/*.part-*; tar c -C "$work/rest" . | zstd -q -T0 -12 --long=27; } | split -d -b "${mib}M" - "$out/part-"

# For the machine's own Python 3.12, which has torch, ONNX and OpenCV already.
fetch download -q -d "$out/first/wheels" --python-version 3.12 pydantic
fetch download -q -d "$out/first/wheels" --python-version 3.12 --no-deps \
  lightning-fabric lightning-utilities faster-coco-eval simplejpeg
rm -f "$out"/first/wheels/typing_extensions-*
cp "$trt/zstd" "$out/first/zstd"
cp -r "$student" "$out/first/student"
python3 - "$voc" "$out/first/data" <<'PY'
import pathlib, shutil, sys
voc, out = map(pathlib.Path, sys.argv[1:])
for split, count in (("train", 256), ("val", 500)):
    names = (voc / f"ImageSets/Main/{split}.txt").read_text().split()
    chosen = names[:: max(1, len(names) // count)][:count]
    for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for name in chosen:
            shutil.copy(voc / folder / (name + suffix), out / folder)
    (out / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    (out / f"ImageSets/Main/{split}.txt").write_text("\n".join(chosen) + "\n")
PY
du -sh "$out"/*
