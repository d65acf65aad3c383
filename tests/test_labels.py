from __future__ import annotations

import numpy as np
import pytest

from edgekd.errors import ClassMapError
from edgekd.labels import COCO_BY_ID, COCO_CLASSES, VOC_CLASSES, map_classes


def test_the_published_sets() -> None:
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert (COCO_CLASSES[0], COCO_CLASSES[79]) == ("person", "toothbrush")
    ids = {"person": 1, "stop sign": 13, "backpack": 27, "dining table": 67, "tv": 72, "toothbrush": 90}
    assert {name: COCO_BY_ID.index(name) for name in ids} == ids  # as instances_val2017.json numbers them


def test_coco_covers_voc_by_name_alone() -> None:
    found = map_classes(COCO_CLASSES, VOC_CLASSES)
    assert found.unknown_classes == ()
    pairs = {VOC_CLASSES[t]: COCO_CLASSES[s[0]] for t, s in enumerate(found.sources)}
    assert pairs["aeroplane"] == "airplane"
    assert pairs["motorbike"] == "motorcycle"
    assert pairs["sofa"] == "couch"
    assert pairs["tvmonitor"] == "tv"
    assert pairs["diningtable"] == "dining table"
    assert pairs["pottedplant"] == "potted plant"
    other_way = map_classes(VOC_CLASSES, COCO_CLASSES)
    assert {label for found in other_way.sources for label in found} == set(range(20))


@pytest.mark.parametrize("name", ["Traffic Light", "traffic_light", "traffic-light", "TRAFFICLIGHT"])
def test_names_match_whatever_their_spelling(name: str) -> None:
    assert map_classes(["traffic light"], ["cat", name]).sources == ((), (0,))


@pytest.mark.parametrize(
    ("source", "target", "class_map", "sources"),
    [
        (["car", "bus", "cat"], ["vehicle", "cat"], {"car": "vehicle", "bus": "vehicle"}, ((0, 1), (2,))),
        (["car", "cat"], ["car", "cat"], {"car": "cat"}, ((), (0, 1))),  # explicit wins over the name
        (["car", "cat"], ["car", "cat"], {"car": ""}, ((), (1,))),  # dropped
        (["tv", "tvmonitor"], ["tvmonitor"], None, ((0, 1),)),
        (["a"], ["b", "A"], None, ((), (0,))),
        (["car", "Car", "-"], ["Car", "car", "_", "-"], None, ((1,), (0,), (), (2,))),  # as they stand
        (["A", "a", "1-1", "11"], ["A", "a", "1-1", "11"], None, ((0,), (1,), (2,), (3,))),  # letters of two cases
        (["b", "a", "A"], ["A", "a", "B"], None, ((2,), (1,), (0,))),
    ],
)
def test_class_maps(source, target, class_map, sources) -> None:  # type: ignore[no-untyped-def]
    found = map_classes(source, target, class_map)
    assert found.sources == sources
    assert found.known.tolist() == [bool(s) for s in sources]


def test_projection_takes_the_best_source_and_leaves_the_unknown_at_zero() -> None:
    found = map_classes(["car", "bus", "cat"], ["dog", "vehicle"], {"car": "vehicle", "bus": "vehicle"})
    scores = np.array([[0.2, 0.6, 0.9], [0.5, 0.1, 0.0]], np.float32)
    for layout in (scores, np.asfortranarray(scores)):
        np.testing.assert_array_equal(found.project(layout), np.array([[0, 0.6], [0, 0.5]], np.float32))
    assert found.project(np.zeros((0, 3), np.float32)).shape == (0, 2)
    assert map_classes(["a", "b"], ["a", "b"]).is_identity
    assert not map_classes(["b", "a"], ["a", "b"]).is_identity


def test_a_class_that_is_mapped_twice_is_refused_whatever_its_spelling() -> None:
    with pytest.raises(ClassMapError, match="twice"):
        map_classes(["car"], ["vehicle", "person"], {"Car": "vehicle", "car": "person"})


def test_what_a_map_changes_in_words() -> None:
    assert map_classes(["a", "b"], ["a", "b"]).changes() == ""
    assert map_classes(["cat", "dog", "cow"], ["dog", "animal"], {"cow": "animal"}).changes() == (
        "cat -> nothing, dog -> dog, cow -> animal"
    )


def test_nothing_in_common_lists_both_sides() -> None:
    with pytest.raises(ClassMapError) as caught:
        map_classes(["person"], ["rbc", "wbc"])
    assert "person" in str(caught.value)
    assert "rbc, wbc" in str(caught.value)


@pytest.mark.parametrize(
    ("class_map", "words"),
    [({"persn": "man"}, ("persn", "teacher", "'person'")), ({"person": "mann"}, ("mann", "student", "'man'"))],
)
def test_unknown_names_in_a_class_map_name_the_nearest(class_map: dict[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(ClassMapError) as caught:
        map_classes(["person", "cat"], ["man", "cat"], class_map)
    for word in words:
        assert word in str(caught.value)
