"""Drawing splits for a data set that has none."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.data import detect_format, list_splits, read_dataset
from edgekd.data.check import check_dataset
from edgekd.data.convert import convert_dataset
from edgekd.data.layout import split_folder
from edgekd.data.split import split_dataset, stratify
from edgekd.errors import DataError, UserError
from tests.data_layouts import picture, voc_xml

COUNT = 30
NAMES = ("cat", "dog", "eel")


def classes_of(index: int) -> list[str]:
    """Dogs everywhere, a cat on every fourth image, an eel on every tenth; every seventh shows nothing."""
    if index % 7 == 6:
        return []
    return ["dog"] + ["cat"] * (index % 4 == 0) + ["eel"] * (index % 10 == 5)


def annotation_xml(index: int) -> str:
    return voc_xml([(name, (2, 3, 30, 20)) for name in classes_of(index)])


def labels(index: int) -> str:
    return "".join(f"{NAMES.index(name)} 0.5 0.5 0.4 0.4\n" for name in classes_of(index))


def coco_json(names: list[str]) -> str:
    images = [{"id": i + 7, "file_name": name, "height": 40, "width": 60} for i, name in enumerate(names)]
    annotations = [
        {"id": 0, "image_id": i + 7, "category_id": 10 + NAMES.index(name), "bbox": [1, 2, 20, 10], "iscrowd": 0}
        for i in range(len(names))
        for name in classes_of(i)
    ]
    annotations = [{**entry, "id": number, "extra": "kept"} for number, entry in enumerate(annotations)]
    categories = [{"id": 10 + number, "name": name} for number, name in enumerate(NAMES)]
    return json.dumps({"info": {"year": 2026}, "images": images, "annotations": annotations, "categories": categories})


def stems() -> list[str]:
    return [f"image {index:02d} ü" for index in range(COUNT)]


def voc(root: Path) -> Path:
    for index, stem in enumerate(stems()):
        picture(root / "JPEGImages" / f"{stem}.png", seed=index)
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(annotation_xml(index))
    return root


def flat_voc(root: Path) -> Path:
    for index, stem in enumerate(stems()):
        picture(root / f"{stem}.png", seed=index)
        (root / f"{stem}.xml").write_text(annotation_xml(index))
    return root


def coco(root: Path) -> Path:
    for index, stem in enumerate(stems()):
        picture(root / "images" / f"{stem}.png", seed=index)
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_default.json").write_text(coco_json([f"{stem}.png" for stem in stems()]))
    return root


def flat_coco(root: Path) -> Path:
    for index, stem in enumerate(stems()):
        picture(root / f"{stem}.png", seed=index)
    (root / "_annotations.coco.json").write_text(coco_json([f"{stem}.png" for stem in stems()]))
    return root


def yolo(root: Path) -> Path:
    for index, stem in enumerate(stems()):
        picture(root / "images" / f"{stem}.png", seed=index)
        (root / "labels").mkdir(exist_ok=True)
        (root / "labels" / f"{stem}.txt").write_text(labels(index))
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def yolo_with_yaml(root: Path) -> Path:
    yolo(root)
    (root / "classes.txt").unlink()
    (root / "data.yaml").write_text(f"all: images\nnames: [{', '.join(NAMES)}]\n")
    return root


def yolo_with_names_alone(root: Path) -> Path:
    yolo_with_yaml(root)
    (root / "data.yaml").write_text(f"names: [{', '.join(NAMES)}]\n")
    return root


def flat_yolo(root: Path) -> Path:
    for index, stem in enumerate(stems()):
        picture(root / f"{stem}.png", seed=index)
        if classes_of(index):
            (root / f"{stem}.txt").write_text(labels(index))
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "voc": (voc, "voc"),
    "flat voc": (flat_voc, "voc"),
    "coco": (coco, "coco"),
    "flat coco": (flat_coco, "coco"),
    "yolo": (yolo, "yolo"),
    "yolo with yaml": (yolo_with_yaml, "yolo"),
    "yolo, yaml of names alone": (yolo_with_names_alone, "yolo"),
    "flat yolo": (flat_yolo, "yolo"),
}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_divided_and_reads_back(tmp_path: Path, name: str) -> None:
    make, form = LAYOUTS[name]
    root = make(tmp_path / "my data ü")
    assert detect_format(root) == form
    assert len(list_splits(root)) == 1
    before = contents(root)
    whole = read_dataset(root, list_splits(root)[0])
    assert len(whole) == COUNT
    report = split_dataset(root, val=0.2, test=0.1, seed=3)
    after = contents(root)
    assert {path: after[path] for path in before} == before, "nothing that was there is changed"
    assert {root / path for path in set(after) - set(before)} == set(report.files)
    assert {"train", "val", "test"} <= set(list_splits(root))
    parts = {split: read_dataset(root, split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == dict(report.images)
    paths = [record.path for part in parts.values() for record in part.records]
    assert sorted(paths) == sorted(record.path for record in whole.records), "each image once"
    boxes = {record.path: record.boxes_xyxy.tolist() for record in whole.records}
    assert all(record.boxes_xyxy.tolist() == boxes[record.path] for part in parts.values() for record in part.records)
    assert all(part.class_names == whole.class_names for part in parts.values())
    check = check_dataset(root)
    assert check.ok, check.text()
    for split, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
        assert abs(report.images[split] - share * COUNT) <= 2
    assert all(report.objects[split]["eel"] >= 1 for split in ("train", "val"))


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_ids_and_flags_of_a_converted_set_stay(tmp_path: Path, form: str) -> None:
    """What edgekd.json holds for layouts that have no place for it."""
    names = ["a.png", *(f"deep/{number}.png" for number in range(7))]
    data = json.loads(coco_json(names))
    for position, entry in enumerate(data["annotations"]):
        entry["iscrowd"], entry["difficult"] = position % 2, int(position % 3 == 0)
    for index, name in enumerate(names):
        picture(tmp_path / "set/images" / name, seed=index)
    (tmp_path / "set/all.json").write_text(json.dumps(data))
    out = convert_dataset(tmp_path / "set", tmp_path / "out", form).out
    whole = {record.path: record for record in read_dataset(out, "all").records}
    assert len({record.image_id for record in whole.values()}) == len(names)
    split_dataset(out, val=0.3)
    for split in ("train", "val"):
        for record in read_dataset(out, split).records:
            before = whole.pop(record.path)
            assert record.image_id == before.image_id
            assert record.crowd.tolist() == before.crowd.tolist()
            assert record.difficult.tolist() == before.difficult.tolist()
    assert not whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dry_run_writes_nothing_and_tells_the_same(tmp_path: Path, name: str) -> None:
    root = LAYOUTS[name][0](tmp_path / "data")
    before = contents(root)
    dry = split_dataset(root, val=0.2, dry_run=True)
    assert contents(root) == before
    assert not any(path.is_dir() and path.name == "ImageSets" for path in root.iterdir())
    assert split_dataset(root, val=0.2) == dry


def test_the_seed_decides(tmp_path: Path) -> None:
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        root = flat_voc(tmp_path / str(number))
        split_dataset(root, val=0.3, seed=seed)
        drawn.append((root / "ImageSets" / "Main" / "val.txt").read_text())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("seed", range(5))
def test_equal_pictures_stay_together(tmp_path: Path, seed: int) -> None:
    root = flat_voc(tmp_path / "data")
    names = sorted(path.stem for path in root.glob("*.png"))
    for first, second in zip(names[:10], names[10:20], strict=True):
        shutil.copy(root / f"{first}.png", root / f"{second}.png")
    report = split_dataset(root, val=0.4, seed=seed)
    assert report.duplicates == 10
    assert not [problem for problem in check_dataset(root).problems if problem.kind == "leak"]


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    (root / "val.txt").write_text("my notes")
    before = contents(root)
    with pytest.raises(DataError, match=r"val\.txt is there already"):
        split_dataset(root, val=0.2)
    assert contents(root) == before


def test_splits_that_are_there_stay(tmp_path: Path) -> None:
    root = voc(tmp_path / "data")
    split_dataset(root, val=0.2)
    before = contents(root)
    with pytest.raises(DataError, match="has splits already"):
        split_dataset(root, val=0.2)
    assert contents(root) == before


@pytest.mark.parametrize(("val", "test"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (-0.1, 0.0), (0.2, -0.1)])
def test_shares_that_leave_nothing_are_refused(tmp_path: Path, val: float, test: float) -> None:
    with pytest.raises(DataError, match="shares"):
        split_dataset(flat_voc(tmp_path / "data"), val=val, test=test)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(annotation_xml(0))
    with pytest.raises(DataError, match="too few"):
        split_dataset(tmp_path, val=0.2)


def test_a_layout_that_cannot_take_split_files_is_left_as_it_was(tmp_path: Path) -> None:
    root = tmp_path / "data"
    flat_voc(root / "export")
    before = contents(root)
    with pytest.raises(DataError, match=f"--out {root}-split writes a new data set instead; or name the folder"):
        split_dataset(root, val=0.2)
    assert contents(root) == before
    assert not (root / "ImageSets").exists()
    split_dataset(root, val=0.2, out=tmp_path / "data-split")
    assert list_splits(tmp_path / "data-split") == ("train", "val")
    split_dataset(root / "export", val=0.2)


def test_broken_annotations_are_told_before_anything_is_written(tmp_path: Path) -> None:
    root = flat_voc(tmp_path / "data")
    (root / f"{stems()[3]}.xml").write_text("<annotation>")
    with pytest.raises(DataError, match="must be mended first"):
        split_dataset(root, val=0.2)
    assert not (root / "ImageSets").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    root = yolo(tmp_path / "data")
    root.chmod(0o555)
    with pytest.raises(UserError, match="cannot be written"):
        split_dataset(root, val=0.2)


def test_coco_parts_keep_what_the_file_held(tmp_path: Path) -> None:
    root = coco(tmp_path / "data")
    split_dataset(root, val=0.2)
    whole = json.loads((root / "annotations" / "instances_default.json").read_text())
    parts = [json.loads((root / "annotations" / f"instances_{name}.json").read_text()) for name in ("train", "val")]
    for key in ("images", "annotations"):
        entries = [entry for part in parts for entry in part[key]]
        assert sorted(entries, key=lambda entry: entry["id"]) == whole[key]
    assert all(part["info"] == whole["info"] and part["categories"] == whole["categories"] for part in parts)


# -- stratification -----------------------------------------------------------------------------------------------


def random_labels(count: int, seed: int) -> list[set[int]]:
    rng = np.random.default_rng(seed)
    rates = [0.6, 0.3, 0.1, 0.03]
    return [{label for label, rate in enumerate(rates) if rng.random() < rate} for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_classes_are_spread_better_than_by_chance(seed: int) -> None:
    groups, shares = random_labels(200, seed), [0.7, 0.2, 0.1]

    def worst(chosen: list[int]) -> float:
        totals = [sum(label in group for group in groups) for label in range(4)]
        return max(
            abs(sum(label in groups[i] for i in range(200) if chosen[i] == part) - share * totals[label])
            for (part, share), label in itertools.product(enumerate(shares), range(4))
        )

    chosen = stratify(groups, [1] * 200, shares, np.random.default_rng(seed))
    chance = np.random.default_rng(seed).permutation([0] * 140 + [1] * 40 + [2] * 20).tolist()
    assert worst(chosen) <= 3 < worst(chance) + 3
    assert worst(chosen) < worst(chance)
    assert [abs(chosen.count(part) - 200 * share) <= 4 for part, share in enumerate(shares)] == [True] * 3


def test_groups_count_by_their_size() -> None:
    sizes = [10, *[1] * 30]
    chosen = stratify([{0}] * 31, sizes, [0.75, 0.25], np.random.default_rng(0))
    held = [sum(size for size, part in zip(sizes, chosen, strict=True) if part == number) for number in (0, 1)]
    assert held == [30, 10]


@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize("found", [set(), {0}, {0, 1}])
def test_no_part_stays_empty(count: int, found: set[int]) -> None:
    chosen = stratify([found] * count, [1] * count, [0.8, 0.1, 0.1], np.random.default_rng(0))
    assert set(chosen) == {0, 1, 2}


# -- command ------------------------------------------------------------------------------------------------------


def test_by_command(tmp_path: Path) -> None:
    root = flat_yolo(tmp_path / "data")
    words = ["data", "split", str(root), "--val", "0.2", "--seed", "1"]
    dry = CliRunner().invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0
    assert "would write" in dry.stdout
    assert list_splits(root) == ("all",)
    made = CliRunner().invoke(app, [*words, "--json"])
    body = json.loads(made.stdout)
    assert body["images"] == {"train": 24, "val": 6}
    assert body["files"] == [str(root / "train.txt"), str(root / "val.txt")]
    again = CliRunner().invoke(app, [*words, "--quiet"])
    assert again.exit_code == 2
    assert "has splits already" in again.stderr


# -- folders of images with their annotations beside them ---------------------------------------------------------


def test_both_kinds_beside_the_images_are_ambiguous(tmp_path: Path) -> None:
    flat_yolo(flat_voc(tmp_path / "data"))
    with pytest.raises(DataError, match="several formats: voc, yolo"):
        detect_format(tmp_path / "data")
    assert len(read_dataset(tmp_path / "data", "all", format="voc")) == COUNT


def test_a_folder_for_each_split_with_labels_beside_the_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        flat_yolo(tmp_path / split)
        (tmp_path / split / "classes.txt").rename(tmp_path / "classes.txt")
    assert list_splits(tmp_path) == ("train", "val")
    assert len(read_dataset(tmp_path, "val")) == COUNT
    assert read_dataset(tmp_path, "val").class_names == NAMES


def test_flat_labels_without_class_names_say_what_is_missing(tmp_path: Path) -> None:
    (flat_yolo(tmp_path) / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"does not name its classes[\s\S]*classes\.txt"):
        read_dataset(tmp_path, "all")


def test_images_without_xml_are_named(tmp_path: Path) -> None:
    root = flat_voc(tmp_path / "data")
    picture(root / "more.png", seed=99)
    assert len(read_dataset(root, "all")) == COUNT
    found = [problem for problem in check_dataset(root).problems if problem.kind == "unannotated-image"]
    assert [problem.path.name for problem in found] == ["more.png"]


def test_images_without_annotations_are_told_apart_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data set"):
        detect_format(tmp_path)
    picture(tmp_path / "deep" / "a.png")
    picture(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"holds 2 images but no annotations[\s\S]*edgekd data label"):
        detect_format(tmp_path)


# -- sets that have a split to train on and nothing else ----------------------------------------------------------


def roboflow_yolo(root: Path) -> Path:
    yolo(root / "train")
    (root / "train" / "classes.txt").unlink()
    places = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    (root / "data.yaml").write_text(f"{places}nc: 3\nnames: [{', '.join(NAMES)}]\n")
    return root


def cvat_yolo(root: Path) -> Path:
    yolo(root)
    (root / "Train.txt").write_text("".join(f"data/images/{stem}.png\n" for stem in stems()))
    return root


def lone_folder(root: Path) -> Path:
    flat_yolo(root / "train")
    (root / "train" / "classes.txt").rename(root / "classes.txt")
    return root


def roboflow_coco(root: Path) -> Path:
    flat_coco(root / "train")
    return root


def roboflow_voc(root: Path) -> Path:
    flat_voc(root / "train")
    return root


def voc_lists(root: Path) -> Path:
    voc(root)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, found in {"train": stems()[:24], "test": stems()[24:], "trainval": stems()[:24]}.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in found))
    return root


PARTIAL: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "roboflow yolo": (roboflow_yolo, ("val", "test")),
    "cvat yolo": (cvat_yolo, ()),
    "a folder train": (lone_folder, ()),
    "roboflow coco": (roboflow_coco, ()),
    "roboflow voc": (roboflow_voc, ()),
    "voc with a test split": (voc_lists, ("trainval",)),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_the_advice_for_a_set_with_a_training_split_alone_works(tmp_path: Path, name: str) -> None:
    make, left_out = PARTIAL[name]
    root = make(tmp_path / "my data ü")
    before = contents(root)
    refused = CliRunner().invoke(app, ["data", "split", str(root)])
    assert refused.exit_code == 2
    assert "has splits already" in refused.stderr
    advice = re.search("`edgekd (.*)`", refused.stderr)
    assert advice is not None
    made = CliRunner().invoke(app, [*shlex.split(advice[1]), "--json"])
    assert made.exit_code == 0, made.output
    assert tuple(json.loads(made.stdout)["left_out"]) == left_out
    assert contents(root) == before, "nothing of the user's is touched"
    new, whole = tmp_path / "my data ü-split", read_dataset(root, "train")
    test = ["test"] if name == "voc with a test split" else []
    assert sorted(list_splits(new)) == sorted(["train", "val", *test])
    parts = {split: read_dataset(new, split) for split in list_splits(new)}
    assert [len(parts[split]) for split in ("train", "val")] == [
        len(whole) - len(parts["val"]),
        round(0.2 * len(whole)),
    ]
    boxes = {record.path.stem: record.boxes_xyxy.tolist() for record in whole.records}
    found = {r.path.stem: r.boxes_xyxy.tolist() for split in ("train", "val") for r in parts[split].records}
    assert found == boxes
    assert all(part.class_names == whole.class_names for part in parts.values())
    if test:
        assert [record.path.stem for record in parts["test"].records] == stems()[24:]
    assert check_dataset(new).ok, check_dataset(new).text()
    again = split_dataset(root, val=0.2, part="train", out=tmp_path / "again", dry_run=True)
    assert not (tmp_path / "again").exists()
    assert again.images == {split: len(parts[split]) for split in ("train", "val")}


def test_advice_for_a_set_that_has_been_divided(tmp_path: Path) -> None:
    root = yolo_with_yaml(tmp_path / "data")
    split_dataset(root, val=0.2)
    with pytest.raises(DataError, match="--from all --val"):  # its data.yaml still names that
        split_dataset(root, val=0.2)
    report = split_dataset(root, val=0.3, part="all", out=tmp_path / "new")
    assert (report.left_out, report.images) == (("train", "val"), {"train": 21, "val": 9})
    with pytest.raises(DataError, match="use them as they are"):
        split_dataset(tmp_path / "new", val=0.2)


def test_what_cannot_be_divided_from_a_part(tmp_path: Path) -> None:
    root = voc(tmp_path / "data")
    split_dataset(root, val=0.2)
    with pytest.raises(DataError, match="has a split 'val' already"):
        split_dataset(root, val=0.2, part="train", out=tmp_path / "new")
    with pytest.raises(DataError, match="--from needs --out"):
        split_dataset(root, val=0.2, part="train")
    with pytest.raises(DataError, match="no split 'day'"):
        split_dataset(root, val=0.2, part="day", out=tmp_path / "new")
    with pytest.raises(DataError, match="lies within"):
        split_dataset(root, val=0.2, part="train", out=root / "new")
    shutil.copytree(root, other := tmp_path / "other")
    (other / "ImageSets" / "Main" / "val.txt").rename(other / "ImageSets" / "Main" / "test.txt")
    with pytest.raises(DataError, match=r"has a split 'test' already[\s\S]*leave --test away"):
        split_dataset(other, val=0.2, test=0.1, part="train", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_split_that_the_yaml_names_and_nobody_exported_is_told_how_to_be_made(tmp_path: Path) -> None:
    root = roboflow_yolo(tmp_path / "data")
    with pytest.raises(DataError, match=r"not there; without it, `edgekd data split \S* --from train --val 0\.2 --out"):
        read_dataset(root, "val")


def test_the_advice_names_a_folder_beside_the_set_however_that_is_called(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    assert split_folder(Path()) == tmp_path / "data-split"
    assert split_folder(tmp_path / "data" / "..") == tmp_path.parent / f"{tmp_path.name}-split"
    Path("set.yaml").touch()
    assert split_folder(Path("set.yaml")) == Path("set-split")
