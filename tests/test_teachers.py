from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from edgekd.checkpoint import save_detector
from edgekd.detectors.base import TapSpec
from edgekd.errors import (
    ArtifactError,
    ClassMapError,
    DistillationSetupError,
    MissingDependencyError,
    RuntimeFailure,
    UserError,
)
from edgekd.preprocess import normalise
from edgekd.recipe import (
    BenchConfig,
    CheckpointTeacher,
    DataConfig,
    EnsembleConfig,
    ModelConfig,
    ModuleTeacher,
    OnnxTeacher,
    Recipe,
    TorchvisionTeacher,
    TrainedTeacher,
)
from edgekd.teachers import build_teacher
from edgekd.teachers.ensemble import Ensemble
from edgekd.teaching import answering_identity, teacher_identity
from edgekd.types import PreprocessSpec
from tests.toy import CLASSES, toy_detector
from tests.toy_onnx import write_constant_detector

NAMES = ("cat", "dog")
BOXES = np.array([[16, 0, 48, 32], [17, 0, 48, 32], [60, 40, 80, 64]], np.float32)
SCORES = np.array([[0.9, 0.1], [0.6, 0.2], [0.005, 0.4]], np.float32)
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def onnx_file(path: Path, batch: int = 1) -> Path:
    arrays = {"boxes": np.stack([BOXES] * batch), "scores": np.stack([SCORES] * batch)}
    return write_constant_detector(path, arrays, (batch, 3, 64, 96))


def onnx_config(path: Path, **changes: object) -> OnnxTeacher:
    return OnnxTeacher(name="t", onnx=str(path), class_names=NAMES, box_format="xyxy", **changes)  # type: ignore[arg-type]


@pytest.fixture
def native_run(tmp_path: Path) -> Path:
    save_detector(tmp_path / "run" / "model.pt", toy_detector(), {})
    return tmp_path / "run"


def test_a_native_teacher_gives_boxes_raw_outputs_and_taps(native_run: Path) -> None:
    teacher = build_teacher(CheckpointTeacher(name="t", checkpoint=str(native_run)), CLASSES)
    detector = teacher.detector
    assert detector is not None
    assert not detector.training
    assert not any(p.requires_grad for p in detector.parameters())
    tap = next(iter(teacher.tap_specs))
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    output = teacher.respond(images, [tap])
    assert output.dense is not None
    assert output.dense.cls_logits.shape[:2] == (2, len(detector.prior_boxes()))
    assert output.taps[tap].shape == (2, teacher.tap_specs[tap].channels, *teacher.tap_specs[tap].grid_hw)
    assert not output.taps[tap].requires_grad
    assert not output.taps[tap].is_inference()  # the student's loss must be able to save it for backward
    assert len(output.soft.boxes_xyxy) == len(output.soft.class_probs) == 2
    for boxes, probs in zip(output.soft.boxes_xyxy, output.soft.class_probs, strict=True):
        assert boxes.shape == (len(probs), 4)
        assert probs.shape[1] == len(CLASSES)


def test_a_native_teacher_sees_in_a_batch_what_it_sees_alone(native_run: Path) -> None:
    teacher = build_teacher(CheckpointTeacher(name="t", checkpoint=str(native_run)), CLASSES)
    detector = teacher.detector
    assert detector is not None
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    dense = teacher.respond(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).dense
    assert dense is not None
    for index, image in enumerate(images):
        with torch.no_grad():
            alone = detector(torch.from_numpy(normalise(image, teacher.preprocess)))
        torch.testing.assert_close(dense.cls_logits[index], alone.cls_logits[0], rtol=1e-3, atol=1e-4)
    one = torch.from_numpy(images[:1].transpose(0, 3, 1, 2).copy())
    assert len(teacher.answer(images[0])) == len(teacher.respond(one).soft.boxes_xyxy[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_an_onnx_teacher_answers_batches_of_any_size(tmp_path: Path, batch: int) -> None:
    teacher = build_teacher(onnx_config(onnx_file(tmp_path / "t.onnx", batch)), ("dog", "bird"))
    assert teacher.detector is None
    assert teacher.unknown_classes == ("bird",)
    assert teacher.known.tolist() == [True, False]
    output = teacher.respond(torch.zeros((3, 3, 64, 96), dtype=torch.uint8))
    assert output.dense is None
    assert len(output.soft.boxes_xyxy) == 3
    for boxes, probs in zip(output.soft.boxes_xyxy, output.soft.class_probs, strict=True):
        np.testing.assert_allclose(boxes, BOXES[[2, 1]])
        np.testing.assert_allclose(probs, [[0.4, 0], [0.2, 0]])
    np.testing.assert_allclose(teacher.answer(IMAGE).boxes_xyxy, BOXES[[2, 1]])


def test_answers_leave_out_what_is_too_weak_to_teach_but_detections_do_not(tmp_path: Path) -> None:
    config = onnx_config(onnx_file(tmp_path / "t.onnx"), class_map={"dog": ""})
    teacher = build_teacher(config, NAMES)
    assert len(teacher.answer(IMAGE)) == 1
    np.testing.assert_allclose(teacher.detect(IMAGE).scores, [0.9, 0.005], rtol=1e-6)


def test_taps_of_an_onnx_teacher(tmp_path: Path) -> None:
    teacher = build_teacher(onnx_config(onnx_file(tmp_path / "t.onnx"), taps={"neck": "inner"}), NAMES)
    assert teacher.tap_specs == {"neck": TapSpec("neck", "neck", 3, (64, 96))}
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    taps = teacher.respond(images, ["neck"]).taps
    torch.testing.assert_close(taps["neck"], images / 255.0)
    with pytest.raises(DistillationSetupError, match="neck"):
        teacher.respond(images, ["head"])


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    teacher = build_teacher(onnx_config(onnx_file(tmp_path / "t.onnx")), NAMES)
    for images in (torch.zeros((1, 3, 96, 64), dtype=torch.uint8), torch.zeros((1, 3, 64, 96))):
        with pytest.raises(DistillationSetupError, match="input size"):
            teacher.respond(images)


def test_a_teacher_that_knows_nothing_of_the_students_classes(tmp_path: Path) -> None:
    with pytest.raises(ClassMapError, match="rbc"):
        build_teacher(onnx_config(onnx_file(tmp_path / "t.onnx")), ("rbc",))


@pytest.mark.parametrize("fails", [False, True], ids=["answers for the first image only", "fails on two"])
def test_a_batch_that_is_dynamic_in_name_only(tmp_path: Path, fails: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """As of exports with an NMS or a reshape for one image inside."""
    import onnx
    from onnx import helper, numpy_helper

    arrays = {"boxes": BOXES[None], "scores": SCORES[None]}
    path = write_constant_detector(tmp_path / "t.onnx", arrays, ("batch", 3, 64, 96))
    if fails:
        model = onnx.load(str(path))
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 3, 64, 96]), "one_image"))
        model.graph.node.insert(0, helper.make_node("Reshape", ["images", "one_image"], ["reshaped"]))
        for node in model.graph.node[1:]:
            node.input[:] = ["reshaped" if name == "images" else name for name in node.input]
        onnx.save(model, str(path))
    teacher = build_teacher(onnx_config(path), NAMES)
    output = teacher.respond(torch.zeros((3, 3, 64, 96), dtype=torch.uint8))
    assert [len(boxes) for boxes in output.soft.boxes_xyxy] == [len(output.soft.boxes_xyxy[0])] * 3
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "config",
    [CheckpointTeacher(name="t", checkpoint="nowhere"), OnnxTeacher(name="t", onnx="nowhere.onnx")],
    ids=["checkpoint", "onnx"],
)
def test_a_missing_file(config: CheckpointTeacher | OnnxTeacher) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        build_teacher(config, NAMES)


def test_a_teacher_that_is_still_to_be_trained() -> None:
    with pytest.raises(DistillationSetupError, match="still to be trained"):
        build_teacher(TrainedTeacher(name="t", train=ModelConfig(model="yolo-nano")), NAMES)


ADAPTER = """
import numpy as np, torch
from edgekd.types import PreprocessSpec
from edgekd.detectors.base import TapSpec

class Adapter:
    preprocess = PreprocessSpec((64, 96), "stretch", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    class_names = ["cat", "dog"]

    def __init__(self, score=0.7, fault=""):
        self.score, self.fault = score, fault

    def __call__(self, images):
        assert images.shape[1:] == (3, 64, 96) and images.dtype == torch.float32 and not torch.is_grad_enabled()
        if self.fault == "raise":
            raise ValueError("broken inside")
        if self.fault == "classes":
            return [(torch.zeros(1, 4), torch.zeros(1, 3)) for _ in images]
        if self.fault == "count":
            return []
        if self.fault == "none":
            return None
        if self.fault == "empty":
            return [(torch.tensor([]), []) for _ in images]
        if self.fault == "shares":
            rows = torch.rand(3, 4) * 0.4 + torch.tensor([0, 0, 0.5, 0.5])
            return [(rows, torch.full((3, 2), 0.5)) for _ in images]
        if self.fault == "dictionaries":
            return [{"boxes": torch.zeros(1, 4), "labels": torch.ones(1), "scores": torch.ones(1)} for _ in images]
        box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
        brightness = [float((image.mean() + 1) / 2) for image in images]
        return [(box, np.array([[self.score, value]], np.float32)) for value in brightness]

class Tapped(Adapter):
    tap_specs = {"mean": TapSpec("mean", "neck", 3, (1, 1))}

    def call_with_taps(self, images, taps):
        mean = images.mean((2, 3), keepdim=True)
        if self.fault == "tap-raise":
            raise KeyError("f")
        if self.fault == "tap-alone":
            return mean
        maps = {
            "": {"mean": mean},
            "tap-none": {},
            "tap-channels": {"mean": mean[:, :2]},
            "tap-nan": {"mean": mean * float("nan")},
        }
        return self(images), maps[self.fault]

def tapped(fault=""): return Tapped(fault=fault)
def listed():
    adapter = Tapped()
    adapter.tap_specs = [TapSpec("mean", "neck", 3, (1, 1))]
    return adapter
def renamed():
    adapter = Tapped()
    adapter.tap_specs = {"p3": TapSpec("mean", "neck", 3, (1, 1))}
    return adapter
def nameless():
    adapter = Adapter()
    adapter.class_names = [1, 2]
    return adapter
class InBytes(Adapter):
    preprocess = PreprocessSpec((64, 96), "stretch", (123.7, 116.3, 103.5), (58.4, 57.1, 57.4))

class Prepared(Adapter):
    def __init__(self, **changed):
        super().__init__()
        usual = {"input_hw": (64, 96), "resize": "stretch", "mean": (0.5,) * 3, "std": (0.5,) * 3}
        self.preprocess = PreprocessSpec(**{**usual, **changed})

class Reversed(Tapped):
    preprocess = PreprocessSpec((64, 96), "stretch", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), channels="bgr")

def lazy():
    import sys
    import my_helper
    sys.path.pop(0)
    return my_helper.make(Adapter)
def network(form):
    # Every cell of 32 pixels an object, its scores behind a batch norm; in train mode, as `load_state_dict` leaves it.
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    if form == "exported":
        images = torch.zeros(2, 3, 64, 96)
        program = torch.export.export(layers.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch", max=8)},))
        return program.module()
    return torch.jit.script(layers.train()) if form == "scripted" else layers.train()

def answers_of(maps):
    ys, xs = torch.meshgrid(torch.arange(2) * 32.0, torch.arange(3) * 32.0, indexing="ij")
    corners = torch.stack([xs, ys, xs + 30, ys + 30], -1).reshape(-1, 4)
    return [(corners, scores.flatten(1).T.sigmoid()) for scores in maps]

class Plain:
    preprocess, class_names = Adapter.preprocess, Adapter.class_names
    def __init__(self, form): self.networks = {"first": [network(form)]}
    def __call__(self, images): return answers_of(self.networks["first"][0](images))

class Module(torch.nn.Module):
    preprocess, class_names = Adapter.preprocess, Adapter.class_names
    def __init__(self, form):
        super().__init__()
        self.network, self.dropout = network(form), torch.nn.Dropout(0.5)
    def forward(self, images): return answers_of(self.dropout(self.network(images)))

def exits(): raise SystemExit("usage: my_adapters.py --weights FILE")
def refuses(): raise RuntimeError("no licence")
def nothing(): return object()
"""


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_adapters.py").write_text(ADAPTER)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_helper.py").write_text("def make(kind): return kind()")
    (tmp_path / "my_script.py").write_text(
        "import argparse\nargparse.ArgumentParser().parse_args(['--weights', 'mine'])"
    )
    for name in ("my_adapters", "my_helper", "my_script"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_adapters"


def test_a_factory_that_imports_its_neighbours_when_it_is_called(adapters: str) -> None:
    before = list(sys.path)
    assert build_teacher(ModuleTeacher(name="t", module=f"{adapters}:lazy"), NAMES).class_map is None
    assert sys.path == before


def test_a_module_of_the_users_own(adapters: str) -> None:
    before = list(sys.path)
    config = ModuleTeacher(name="t", module=f"{adapters}:Adapter", args={"score": 0.6})
    teacher = build_teacher(config, ("dog", "cat"))
    assert sys.path == before
    images = torch.stack([torch.full((3, 64, 96), 255), torch.zeros(3, 64, 96)]).to(torch.uint8)
    output = teacher.respond(images)
    np.testing.assert_allclose(output.soft.class_probs[0], [[1.0, 0.6]], atol=1e-5)  # white is 1 after (x - 0.5) / 0.5
    np.testing.assert_allclose(output.soft.class_probs[1], [[0.0, 0.6]], atol=1e-5)
    answer = teacher.answer(np.full((128, 192, 3), 255, np.uint8))
    np.testing.assert_allclose(answer.boxes_xyxy, [[16, 16, 80, 80]])
    assert teacher.tap_specs == {}
    teacher.close()
    with pytest.raises(RuntimeFailure, match="closed"):
        teacher.respond(images)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", ["as it is", "scripted", "exported"])
@pytest.mark.parametrize("adapter", ["Plain", "Module"])
def test_a_torch_module_answers_in_eval_mode_however_it_is_held(adapters: str, adapter: str, form: str) -> None:
    teacher = build_teacher(ModuleTeacher(name="t", module=f"{adapters}:{adapter}", args={"form": form}), NAMES)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96), dtype=np.uint8))
    together = teacher.respond(images).soft.class_probs[0]
    alone = teacher.respond(images[:1]).soft.class_probs[0]
    torch.testing.assert_close(alone, together)
    assert len(alone) == 6


def test_taps_of_an_adapter(adapters: str) -> None:
    teacher = build_teacher(ModuleTeacher(name="t", module=f"{adapters}:tapped"), NAMES)
    output = teacher.respond(torch.full((2, 3, 64, 96), 255, dtype=torch.uint8), ["mean"])
    torch.testing.assert_close(output.taps["mean"], torch.ones(2, 3, 1, 1))


def test_online_too_a_bgr_teacher_gets_blue_first(adapters: str, tmp_path: Path) -> None:
    blue = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    blue[:, 2] = 255
    own = build_teacher(ModuleTeacher(name="t", module=f"{adapters}:Reversed"), NAMES)
    assert own.respond(blue, ["mean"]).taps["mean"].flatten().tolist() == [1, -1, -1]
    path = onnx_file(tmp_path / "t.onnx")
    file = build_teacher(onnx_config(path, channels="bgr", taps={"inner": "inner"}), NAMES)
    assert file.respond(blue, ["inner"]).taps["inner"].mean((0, 2, 3)).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("module", "args", "words"),
    [
        ("no_such_module_here:f", {}, "cannot be imported"),
        ("my_adapters", {}, "package.module:function"),
        ("my_adapters:Adaptr", {}, "Adapter"),
        ("my_adapters:refuses", {}, "no licence"),
        ("my_adapters:listed", {}, r"tap_specs.*\[TapSpec"),
        ("my_adapters:renamed", {}, "tap_specs.*'p3': TapSpec"),
        ("my_adapters:exits", {}, "usage: my_adapters.py"),
        ("my_script:main", {}, "cannot be imported.*SystemExit"),
        ("my_adapters:nothing", {}, "did not return an adapter"),
        ("my_adapters:nameless", {}, "no list of texts"),
        ("my_adapters:InBytes", {}, "by 255"),
        ("my_adapters:Prepared", {"channels": "RGB"}, "channels.*'RGB'.*rgb, bgr"),
        ("my_adapters:Prepared", {"resize": "pad"}, "resize.*'pad'.*stretch, letterbox"),
        ("my_adapters:Prepared", {"input_hw": 64}, r"input_hw.*64.*\(height, width\)"),
        ("my_adapters:Prepared", {"mean": (0.5,)}, "mean.*three numbers"),
        ("my_adapters:Prepared", {"pad_value": 300}, "pad_value.*300"),
        ("my_adapters.py:Adapter", {}, "leave `.py` out: my_adapters:Adapter"),
        ("my_adapters:Adapter", {"scores": 1}, "factory failed"),
    ],
)
def test_a_factory_that_does_not_work(adapters: str, module: str, args: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=f"(?s){words}"):
        build_teacher(ModuleTeacher(name="t", module=module, args=args), NAMES)


def test_an_adapter_whose_preprocessing_is_written_in_lists(adapters: str) -> None:
    args = {"input_hw": [64, 96], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    teacher = build_teacher(ModuleTeacher(name="t", module=f"{adapters}:Prepared", args=args), NAMES)
    assert len(Ensemble([teacher, teacher], EnsembleConfig()).detect(IMAGE)) > 0


def test_an_adapter_may_say_nothing_in_no_shape(adapters: str) -> None:
    teacher = build_teacher(ModuleTeacher(name="t", module=f"{adapters}:Adapter", args={"fault": "empty"}), NAMES)
    assert len(teacher.answer(IMAGE)) == 0
    assert [
        len(probs) for probs in teacher.respond(torch.zeros((2, 3, 64, 96), dtype=torch.uint8)).soft.class_probs
    ] == [0, 0]


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("raise", RuntimeFailure, "broken inside"),
        ("classes", UserError, r"Tensor \(1, 3\)"),
        ("count", UserError, "not of the adapter's form"),
        ("none", UserError, "NoneType"),
        ("dictionaries", UserError, "labels instead of class_probs"),
        ("shares", UserError, "pixels of its input, 96 wide and 64 high"),
    ],
)
def test_an_adapter_that_answers_wrongly(adapters: str, fault: str, error: type[Exception], words: str) -> None:
    teacher = build_teacher(ModuleTeacher(name="t", module=f"{adapters}:Adapter", args={"fault": fault}), NAMES)
    with pytest.raises(error, match=words):
        teacher.respond(torch.zeros((1, 3, 64, 96), dtype=torch.uint8))


@pytest.mark.parametrize("score", [90.0, -0.2, float("nan")])
def test_an_adapter_s_scores_must_be_probabilities(adapters: str, score: float) -> None:
    teacher = build_teacher(ModuleTeacher(name="t", module=f"{adapters}:Adapter", args={"score": score}), NAMES)
    with pytest.raises(UserError, match=r"no probabilities|not finite"):
        teacher.answer(np.zeros((128, 192, 3), np.uint8))


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("tap-raise", RuntimeFailure, "KeyError"),
        ("tap-alone", UserError, "an answer and maps"),
        ("tap-none", UserError, r"got:      none"),
        ("tap-channels", UserError, r"\(1, 2, 1, 1\)\n  expected: a tensor \(1, 3, 1, 1\)"),
        ("tap-nan", UserError, "not finite"),
    ],
)
def test_an_adapter_with_wrong_taps(adapters: str, fault: str, error: type[Exception], words: str) -> None:
    teacher = build_teacher(ModuleTeacher(name="t", module=f"{adapters}:tapped", args={"fault": fault}), NAMES)
    with pytest.raises(error, match=words):
        teacher.respond(torch.zeros((1, 3, 64, 96), dtype=torch.uint8), ["mean"])


def test_the_documented_adapter_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "teachers.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "my_teacher.py").write_text(code)
    torch.manual_seed(0)
    torch.save(torch.nn.Conv2d(3, 6, 3, stride=32).state_dict(), tmp_path / "mine.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_teacher", raising=False)
    config = ModuleTeacher(name="mine", module="my_teacher:build", args={"weights": "mine.pt"})
    answer = build_teacher(config, ("dog", "bird", "cat")).answer(np.full((240, 320, 3), 200, np.uint8))
    assert len(answer) > 0
    assert answer.class_probs[:, 1].max() == 0  # it knows no bird
    assert answer.class_probs[:, [0, 2]].min() > 0


def test_answers_of_more_boxes_than_usual_are_others() -> None:
    config = TorchvisionTeacher(name="t", torchvision="ssd300_vgg16")
    data, student = DataConfig(root="."), ModelConfig(model="yolo-nano")
    few, usual, many = (
        answering_identity(Recipe(name="r", data=data, student=student, bench=BenchConfig(max_detections=most)), config)
        for most in (50, 100, 300)
    )
    assert few == usual == teacher_identity(config)
    assert many == {**usual, "max_detections": 300}


def test_a_module_teacher_is_known_by_its_source_and_its_files(adapters: str, tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"1")
    config = ModuleTeacher(name="t", module=f"{adapters}:Adapter", args={"files": [str(weights)]})
    first = teacher_identity(config)
    assert teacher_identity(config) == first
    weights.write_bytes(b"2")
    second = teacher_identity(config)
    assert second != first
    (tmp_path / "my_adapters.py").write_text(ADAPTER + "# changed")
    assert teacher_identity(config) != second
    package = tmp_path / "pack"
    package.mkdir()
    for name in ("__init__", "net"):
        (package / f"{name}.py").write_text("")
    inside = ModuleTeacher(name="t", module="pack:make")
    before = teacher_identity(inside)
    (package / "net.py").write_text("layers = 3")
    assert teacher_identity(inside) != before


class _BrokenFinder:
    """Stands for a torchvision whose compiled operators want libraries that are not there."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, *_: object) -> None:
        if name.startswith("torchvision"):
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no module"),
        OSError("libcudart.so.12: cannot open"),
        RuntimeError("operator torchvision::nms does not exist"),
    ],
)
def test_torchvision_that_does_not_import_for_any_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_BrokenFinder(error), *sys.meta_path])
    with pytest.raises(MissingDependencyError) as caught:
        build_teacher(TorchvisionTeacher(name="t", torchvision="ssd300_vgg16"), NAMES)
    assert str(error) in str(caught.value)


class _FakeSsd(torch.nn.Module):
    """Answers like torchvision's detectors: labels are COCO category ids."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.transform = SimpleNamespace(fixed_size=(96, 64), min_size=(64,))

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        boxes = torch.tensor([[10.0, 10, 50, 40], [12, 10, 50, 40], [1, 1, 9, 9]])
        labels, scores = torch.tensor([1, 3, 17]), torch.tensor([0.9, 0.8, 0.4])
        return [{"boxes": boxes, "labels": labels, "scores": scores} for _ in images]


@pytest.fixture
def fake_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    package, models, detection = (ModuleType(f"torchvision{part}") for part in ("", ".models", ".models.detection"))
    package.models, models.detection = models, detection  # type: ignore[attr-defined]
    models.list_models = lambda module: ["ssd300_vgg16"]  # type: ignore[attr-defined]
    models.get_model = lambda name, **kwargs: _FakeSsd()  # type: ignore[attr-defined]
    names = ["__background__", "person", "bicycle", "car", *["N/A"] * 13, "cat"]
    models.get_model_weights = lambda name: {"DEFAULT": SimpleNamespace(meta={"categories": names})}  # type: ignore[attr-defined]
    for module in (package, models, detection):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fake_torchvision")
@pytest.mark.parametrize("weights", [None, "file"])
def test_a_torchvision_detector(weights: str | None, tmp_path: Path) -> None:
    if weights:
        weights = str(tmp_path / "ssd.pth")
        torch.save(_FakeSsd().state_dict(), weights)
    config = TorchvisionTeacher(name="t", torchvision="ssd300_vgg16", weights=weights)
    teacher = build_teacher(config, ("car", "cat", "horse"))
    assert teacher.preprocess == PreprocessSpec((64, 96), "stretch", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    found = teacher.detect(IMAGE)
    np.testing.assert_array_equal(found.labels, [0, 1])  # the person is dropped
    np.testing.assert_allclose(found.scores, [0.8, 0.4])
    assert ("horse" in teacher.unknown_classes) == (weights is None)


@pytest.mark.usefixtures("fake_torchvision")
@pytest.mark.parametrize(
    ("model", "weights"), [("ssd301", None), ("ssd300_vgg16", "NO_SUCH"), ("ssd300_vgg16", "junk")]
)
def test_a_torchvision_detector_that_cannot_be_had(model: str, weights: str | None, tmp_path: Path) -> None:
    if weights == "junk":
        weights = str(tmp_path / "junk.pth")
        Path(weights).write_bytes(b"junk")
    with pytest.raises(UserError):
        build_teacher(TorchvisionTeacher(name="t", torchvision=model, weights=weights), NAMES)
