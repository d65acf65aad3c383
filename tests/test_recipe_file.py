"""Recipes are checked whole: every mistake at once, with its line and the nearest valid name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekd.errors import RecipeError
from edgekd.recipe import LOSSES, MODELS, TEACHER_KINDS, OnnxTeacher, Recipe, TrainedTeacher
from edgekd.recipe_file import dump_recipe, load_recipe, recipe_schema

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path for pattern in ("*.yaml", "*.yml") for path in (ROOT / "recipes").rglob(pattern))

GOOD = """\
name: good
data:
  root: data
student:
  model: mobilenetv2-ssd-lite
teachers:
  - name: box
    onnx: box.onnx
  - name: own
    train: {model: vgg16-ssd}
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(folder: Path, text: str | bytes, overrides: tuple[str, ...] = (), **options: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides, **options)  # type: ignore[arg-type]
    return [str(problem).replace(str(folder), "") for problem in caught.value.problems] or [str(caught.value)]


def edit(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_recipe_loads(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert isinstance(recipe.teachers[0], OnnxTeacher)
    assert isinstance(recipe.teachers[1], TrainedTeacher)
    assert recipe.train.epochs == Recipe.model_fields["train"].default.epochs


# name: (what is replaced in GOOD, by what, line:column and key, the message)
CASES = {
    "unknown key": (
        "  model: mob",
        "  modell: x\n  model: mob",
        "5:3: student.modell",
        "unknown key; did you mean model?",
    ),
    "key of another section": (
        "name: good",
        "name: good\nepochs: 3",
        "2:1: epochs",
        "unknown key; did you mean train.epochs?",
    ),
    "model": (
        "mobilenetv2-ssd-lite",
        "mobilenet2-ssdlite",
        "5:10: student.model",
        "unknown model 'mobilenet2-ssdlite', expected one of <models>; did you mean mobilenetv2-ssd-lite?",
    ),
    "missing": (
        "  root: data\n",
        "  train: train\n",
        "2:1: data.root",
        "missing: Folder of the data set (VOC, COCO or YOLO layout).",
    ),
    "enum": (
        "    onnx: box.onnx",
        "    onnx: box.onnx\n    resize: letterbx",
        "9:13: teachers.0.resize",
        'got "letterbx", expected one of auto, stretch, letterbox, letterbox-corner; did you mean letterbox?',
    ),
    "union": (
        "  root: data",
        "  root: data\n  workers: many",
        "4:12: data.workers",
        'got "many", expected a whole number or auto',
    ),
    "list in a union": (
        "    onnx: box.onnx",
        "    onnx: box.onnx\n    class_names: [a, 2]",
        "9:22: teachers.0.class_names.1",
        'got 2, expected a text; write "2" in quotes',
    ),
    "mapping in a union": (
        "    onnx: box.onnx",
        "    onnx: box.onnx\n    anchors: {yolov4: [[1, 2], [3, x]]}",
        "9:36: teachers.0.anchors.yolov4.1.1",
        'got "x", expected a number',
    ),
    "two entries where one is wanted": (
        "    onnx: box.onnx",
        "    onnx: box.onnx\n    anchors: {yolov4: [], yolov5: []}",
        "9:14: teachers.0.anchors",
        "one set's name with its sizes is wanted, such as {yolov4-tiny: [[23, 27], ...]}",
    ),
    "number of a few": (
        "name: good",
        "name: good\ntrain: {freeze_stride: 3}",
        "2:24: train.freeze_stride",
        "got 3, expected one of 0, 2, 4, 8",
    ),
    "bool for int": (
        "name: good",
        "name: good\nseed: true",
        "2:7: seed",
        "got true, expected a whole number",
    ),
    "text for int": (
        "name: good",
        "name: good\nseed: '1'",
        "2:7: seed",
        'got "1", expected a whole number',
    ),
    "number for text, as it was written": (
        "name: good",
        "name: 08",
        "1:7: name",
        'got 08, expected a text; write "08" in quotes',
    ),
    "number for text": (
        "name: good",
        "name: 7",
        "1:7: name",
        'got 7, expected a text; write "7" in quotes',
    ),
    "bound": (
        "name: good",
        "name: good\ntrain: {lr: 0}",
        "2:13: train.lr",
        "got 0, expected a number greater than 0",
    ),
    "nan": (
        "name: good",
        "name: good\ntrain: {lr: .nan}",
        "2:13: train.lr",
        "got .nan, expected a finite number",
    ),
    "infinity": (
        "name: good",
        "name: good\ntrain: {lr: -.inf}",
        "2:13: train.lr",
        "got -.inf, expected a finite number",
    ),
    "empty section": (
        "name: good",
        "name: good\nbench:",
        "2:7: bench",
        "got null, expected a mapping",
    ),
    "two kinds": (
        "    onnx: box.onnx",
        "    onnx: box.onnx\n    checkpoint: c.pt",
        "7:5: teachers.0",
        "has checkpoint and onnx, expected exactly one of <kinds>",
    ),
    "no kind": (
        "    onnx: box.onnx",
        "    onxx: box.onnx",
        "7:5: teachers.0",
        "says not what the teacher is, expected one of <kinds>; did you mean onnx?",
    ),
    "same names": (
        "name: own",
        "name: box",
        "9:11: teachers.1.name",
        "teacher 0 is called 'box' too",
    ),
    "name of another row": (
        "name: own",
        "name: distilled-int8",
        "9:11: teachers.1.name",
        "'distilled-int8' is taken: it names a row of the benchmark",
    ),
    "reserved name": (
        "name: own",
        "name: student",
        "9:11: teachers.1.name",
        "'student' is taken: it names a row of the benchmark",
    ),
    "unsafe name": (
        "name: own",
        "name: ../own",
        "9:11: teachers.1.name",
        "got \"../own\", expected letters, digits, '.', '_' and '-', starting with a letter or digit",
    ),
    "duplicate key": (
        "name: good",
        "name: good\nname: bad",
        "2:1: name",
        "given twice; the first is on line 1",
    ),
    "tag": (
        "root: data",
        "root: !!python/name:os.system x",
        "3:9: data.root",
        "tags such as 'tag:yaml.org,2002:python/name:os.system' are not understood",
    ),
    "bytes that are no UTF-8": (
        "root: data",
        'root: "b\\udcfcd"',
        "3:9: data.root",
        "not text in UTF-8: a file or folder of such a name must be renamed first",
    ),
    "both weights": (
        "name: good",
        "name: good\ndistill: {terms: [{loss: response, weight: 1, gradient_ratio: 1}]}",
        "2:19: distill.terms.0",
        "give weight or gradient_ratio, not both",
    ),
    "a share of nothing": (
        "name: good",
        "name: good\ndistill: {detection_weight: 0, terms: [{loss: response, gradient_ratio: 1}]}",
        "2:10: distill",
        "gradient_ratio is a share of the detection loss's pull, and detection_weight is 0: give weight",
    ),
    "nothing to learn": (
        "name: good",
        "name: good\ndistill: {detection_weight: 0, terms: [{loss: response, weight: 0}]}",
        "2:10: distill",
        "detection_weight and every term's weight are 0: nothing would be learned",
    ),
    "learned weights of raw outputs": (
        "name: good",
        "name: good\nensemble: {fusion: mean-outputs, weights: learned}",
        "2:11: ensemble",
        "weights: learned are fitted on boxes, which mean-outputs has none of; use fusion: wbf",
    ),
    "loss": (
        "name: good",
        "name: good\ndistill: {terms: [{loss: respons}]}",
        "2:26: distill.terms.0.loss",
        "unknown loss 'respons', expected one of <losses>; did you mean response?",
    ),
    "mean": (
        "    onnx: box.onnx",
        "    onnx: box.onnx\n    mean: [1, 2]",
        "9:11: teachers.0.mean.2",
        "expected 3 values or more, got [1, 2]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_is_told_with_its_place(tmp_path: Path, name: str) -> None:
    old, new, place, message = CASES[name]
    for short, names in (("<models>", MODELS), ("<losses>", LOSSES), ("<kinds>", TEACHER_KINDS)):
        message = message.replace(short, ", ".join(names))
    assert problems(tmp_path, edit(old, new)) == [f"/recipe.yaml:{place}: {message}"]


def test_a_tilde_that_is_nobodys_home_is_a_plain_name(tmp_path: Path) -> None:
    (tmp_path / "~no-such-user").mkdir()
    recipe = load_recipe(write(tmp_path, edit("root: data", "root: ~no-such-user")))
    assert Path(recipe.data.root) == tmp_path / "~no-such-user"


def test_all_mistakes_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD
    for old, new in (("root: data", "rot: data"), ("mobilenetv2", "mobile"), ("onnx: box.onnx", "onnx: 3")):
        text = text.replace(old, new)
    found = problems(tmp_path, text + "train: {epochs: -1, lr: x}\nzzz: 1\n")
    keys = ["data.root", "data.rot", "student.model", "teachers.0.onnx", "train.epochs", "train.lr", "zzz"]
    assert [entry.split(": ")[1] for entry in found] == keys


UNREADABLE = {
    "empty": ("", "the file is empty"),
    "only comments": ("# nothing\n", "the file is empty"),
    "list": ("- a\n- b\n", "got a list as the whole file"),
    "text": ("hello", "got a text as the whole file"),
    "tab": ("data:\n\troot: x\n", "/recipe.yaml:2:1: a tab"),
    "unclosed": ("data: [1, 2\n", "/recipe.yaml:2:1: not YAML"),
    "colon": ("name: a: b\n", "/recipe.yaml:1:8: not YAML: a second ': '"),
    "two documents": ("name: a\n---\nname: b\n", "/recipe.yaml:2:1: a second document"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "not a text file in UTF-8"),
    "control characters": ("name: \x00x", "U+0000 is not allowed"),
    "deep": ("[" * 3000, "nested too deeply"),
    "recursive alias": ("a: &a [*a]", "an alias contains itself"),
    "unknown alias": ("a: *b", "undefined alias"),
    "large": ("#" * (2 << 20), "at most"),
    "billion laughs": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
        "aliases expand to more than",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_recipe_is_refused_in_words(tmp_path: Path, name: str) -> None:
    text, expected = UNREADABLE[name]
    assert expected in "\n".join(problems(tmp_path, text))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=80), st.text(alphabet="ab:-[]{}&*!%\n\t '\"#,?|>0.", max_size=60).map(str.encode)))
def test_no_bytes_give_a_traceback(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, raw))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"did you mean .*recipe.yaml"):
        load_recipe(tmp_path / "recpe.yaml")
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "no" / "such.yaml")


def test_yaml_means_what_it_looks_like(tmp_path: Path) -> None:
    text = GOOD + "train: {lr: 1e-3, epochs: 010}\naugment: &a {flip: 0}\nexport: {precisions: [fp32]}\n"
    recipe = load_recipe(write(tmp_path, text.replace("root: data", "root: data\n  classes: [no, on, 2024-01-01]")))
    assert recipe.train.lr == 0.001
    assert recipe.train.epochs == 10
    assert recipe.data.classes == ("no", "on", "2024-01-01")


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = GOOD.replace("    train: {model: vgg16-ssd}", "    train: &m {model: vgg16-ssd, width: 0.5}")
    text += "  - name: third\n    train: {<<: *m, width: 2}\n"
    third = load_recipe(write(tmp_path, text)).teachers[2]
    assert isinstance(third, TrainedTeacher)
    assert (third.train.model, third.train.width) == ("vgg16-ssd", 2.0)
    wrong = problems(tmp_path, text.replace("width: 0.5", "wdth: 0.5"))
    assert [entry.split(": ")[1] for entry in wrong] == ["teachers.1.train.wdth", "teachers.2.train.wdth"]


# -- overrides ----------------------------------------------------------------------------------------------------


def test_overrides_are_yaml(tmp_path: Path) -> None:
    given = ("train.epochs=3", "teachers.0.weight=2", "data.classes=[a, b]", "seed=1", "seed=2", "student.weights=")
    recipe = load_recipe(write(tmp_path, GOOD), given)
    assert (recipe.train.epochs, recipe.teachers[0].weight, recipe.seed) == (3, 2.0, 2)
    assert recipe.data.classes == ("a", "b")
    assert recipe.student.weights is None


@pytest.mark.parametrize(
    ("text", "root"),
    [("my set #2", "my set #2"), ("#2", "#2"), ("a#b", "a#b"), ("'a #b'", "a #b"), ('"a"  # why', "a"), ("a", "a")],
)
def test_a_hash_belongs_to_an_override(tmp_path: Path, text: str, root: str) -> None:
    assert load_recipe(write(tmp_path, GOOD), (f"data.root={text}",)).data.root == str(Path.cwd() / root)


def test_an_override_can_add_to_a_list(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), ("teachers.2={name: more, onnx: m.onnx}",))
    assert [teacher.name for teacher in recipe.teachers] == ["box", "own", "more"]


def test_an_override_can_begin_a_list(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD.partition("teachers:")[0]), ("teachers.0.name=more", "teachers.0.onnx=m.onnx")
    )
    assert [teacher.name for teacher in recipe.teachers] == ["more"]


OVERRIDES = {
    "epochs": "expected KEY=VALUE, such as train.epochs=3 or teachers.0.weight=2",
    "=3": "expected KEY=VALUE, such as train.epochs=3 or teachers.0.weight=2",
    "train.epochs=x": 'train.epochs: got "x", expected a whole number',
    "train.epoch=3": "train.epoch: unknown key; did you mean epochs?",
    "teachers.7.weight=1": "teachers.7.weight: teachers is a list of 2: expected an index from 0 to 2, got '7'",
    "teachers.x.weight=1": "teachers.x.weight: teachers is a list of 2: expected an index from 0 to 2, got 'x'",
    "nosuch.key=1": "nosuch: unknown key; did you mean bench? expected one of name, seed",
    "trian.epochs=3": "trian: unknown key; did you mean train?",
    "data.nosuch.deep.key=1": "data.nosuch: unknown key; expected one of root",
    "epohcs=3": "epohcs: unknown key; did you mean train.epochs?",
    "teachers.2.onxn=a.onnx": "teachers.2: says not what the teacher is",
    "name.x=1": "name.x: name is not a mapping or a list, it has no 'x'",
    "train=3": "train: got 3, expected a mapping",
    "data.classes=[a, 1e3]": 'data.classes.1: got 1e3, expected a text; write "1e3" in quotes',
    "teachers.1.seed=-1": "teachers.1.seed: got -1, expected a number not below 0",
    "seed=99999999999999999999": "seed: got 99999999999999999999, expected a number less than",
    "train.lr=[": "train.lr: not YAML",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_is_named(tmp_path: Path, override: str) -> None:
    (found,) = problems(tmp_path, GOOD, (override,))
    assert found.startswith(f"--set {override}: {OVERRIDES[override]}")


# -- paths --------------------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_recipe_then_to_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, here = tmp_path / "recipes", tmp_path / "here"
    for made in (folder, here, here / "data"):
        made.mkdir()
    monkeypatch.chdir(here)
    path = write(folder, GOOD)
    assert Path(load_recipe(path).data.root) == here / "data"
    (folder / "data").mkdir()
    assert Path(load_recipe(path).data.root) == folder / "data"
    assert Path(load_recipe(path, ("data.root=data",)).data.root) == here / "data"


def test_files_are_looked_for_when_they_are_needed(tmp_path: Path) -> None:
    load_recipe(write(tmp_path, GOOD))
    found = problems(tmp_path, GOOD, needs=("data", "teachers"))
    assert [entry.split(": ")[1] for entry in found] == ["data.root", "teachers.0.onnx"]
    assert "there is no /data nor" in found[0]
    (tmp_path / "data").mkdir()
    (tmp_path / "box.onnx").touch()
    load_recipe(write(tmp_path, GOOD), needs=("data", "student", "teachers"))


def test_outputs_cannot_be_averaged_at_every_step(tmp_path: Path) -> None:
    text = GOOD + "ensemble: {fusion: mean-outputs}\ndistill: {answers: online}\n"
    (problem,) = problems(tmp_path, text)
    assert "use fusion: wbf, or answers: image" in problem


def test_distilling_needs_teachers(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("teachers")]
    load_recipe(write(tmp_path, text), needs=("teacher-files",))
    assert problems(tmp_path, text, needs=("teachers",)) == ["/recipe.yaml:1:1: teachers: needs at least one teacher"]


def test_a_written_recipe_reads_back_the_same_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    recipe = load_recipe(write(tmp_path, GOOD))
    out = tmp_path / "runs" / "one"
    out.mkdir(parents=True)
    text = dump_recipe(recipe, out)
    assert str(tmp_path) not in text
    assert load_recipe(write(out, text)) == recipe


def test_a_written_recipe_reads_back_through_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    recipe = load_recipe(write(tmp_path, GOOD))
    out = tmp_path / "scratch" / "of" / "mine"
    out.mkdir(parents=True)
    (tmp_path / "runs").symlink_to(out)
    write(out, dump_recipe(recipe, tmp_path / "runs"))
    for folder in (tmp_path / "runs", out):
        assert load_recipe(folder / "recipe.yaml", needs=("data",)).data.root == str(tmp_path / "data")


@pytest.mark.parametrize(
    "name", ["08", "1e3", ".5", "010", "on", "null", "2024-01-01", "a: b", "0x1f", "-", "12:30", "<<"]
)
def test_a_written_name_stays_a_name(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), (f'data.classes=["{name}", b]',))
    assert load_recipe(write(tmp_path, dump_recipe(recipe, tmp_path))).data.classes == (name, "b")


# -- what is published --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_in_the_tree_is_valid(path: Path) -> None:
    load_recipe(path)
    hint = path.read_text(encoding="utf-8").splitlines()[0]
    target = hint.partition("$schema=")[2]
    assert (path.parent / target).resolve() == ROOT / "docs" / "recipe.schema.json", f"{path}: no schema hint"


def test_recipes_are_found() -> None:
    assert RECIPES


def test_the_published_schema_is_up_to_date() -> None:
    published = json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert published == recipe_schema(), "run: edgekd recipe schema > docs/recipe.schema.json"


def test_the_written_out_names_are_those_that_can_be_built() -> None:
    from edgekd.detectors import DETECTORS
    from edgekd.losses import TERMS
    from edgekd.plan.recipes import FAMILIES

    assert tuple(DETECTORS) == MODELS
    assert set(FAMILIES) == set(MODELS)
    assert tuple(TERMS) == LOSSES


def test_reading_recipes_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, edgekd.recipe_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ).returncode == 0
