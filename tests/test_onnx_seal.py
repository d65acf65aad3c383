"""The checksum inside our ONNX files: it tells a changed byte, and leaves a file alone that another tool has written anew."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from edgekd.bench.entries import BenchArtifact
from edgekd.cli.bench_entries import doubts
from edgekd.errors import ArtifactError
from edgekd.export.onnx import write_model
from edgekd.predictor import load_predictor
from edgekd.runtimes.onnx_seal import CHANGED, SEAL_KEY
from tests.bench_doubles import GOOD_BOXES, GOOD_SCORES, make_dataset, write_detector

onnx = pytest.importorskip("onnx")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A detector as `edgekd export` writes it."""
    file = write_detector(tmp_path / "student.onnx", GOOD_BOXES, GOOD_SCORES)
    return write_model(onnx.load(str(file)), file)


def test_a_sound_file_opens_without_a_word(sealed: Path):
    assert SEAL_KEY.encode() in sealed.read_bytes()
    with load_predictor(sealed) as predictor:
        assert predictor.taken_for_granted() == ()


def test_a_file_read_and_written_again_is_the_same(sealed: Path):
    before = sealed.read_bytes()
    onnx.save(onnx.load(str(sealed)), str(sealed))
    assert sealed.read_bytes() == before
    assert write_model(onnx.load(str(sealed)), sealed).read_bytes() == before


def test_a_changed_weight_is_refused(sealed: Path):
    model = onnx.load(str(sealed))
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "weight")
    data = sealed.read_bytes()
    at = data.index(weight.raw_data) + 6
    sealed.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
    with pytest.raises(ArtifactError, match="damaged"):
        load_predictor(sealed)


@pytest.mark.parametrize("seed", range(20))
def test_no_changed_byte_goes_unseen(sealed: Path, seed: int):
    """Wherever it lies: in a weight, a name, the seal itself; ONNX Runtime refuses some of them before."""
    draw = random.Random(seed)
    data = bytearray(sealed.read_bytes())
    at = draw.randrange(len(data)) if seed else data.index(SEAL_KEY.encode()) + len(SEAL_KEY) + 20
    data[at] ^= 1 << draw.randrange(8)
    sealed.write_bytes(bytes(data))
    with pytest.raises(ArtifactError):
        load_predictor(sealed)


def test_a_file_that_another_tool_has_changed_is_used_and_said_to_be(sealed: Path):
    model = onnx.load(str(sealed))
    model.graph.node.add(op_type="Identity", input=["boxes"], output=["unused"], name="added")
    onnx.save(model, str(sealed))
    with load_predictor(sealed) as predictor:
        assert predictor.taken_for_granted() == (CHANGED,)
    told: list[str] = []
    assert doubts([BenchArtifact(sealed, "student")], make_dataset(sealed.parent / "data"), told.append) == []
    assert told == [f"student: {CHANGED}"]
