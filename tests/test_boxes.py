from __future__ import annotations

import numpy as np
import pytest

from edgekd.boxes import area, cxcywh_from_xyxy, iou_matrix, xyxy_from_cxcywh


def f32(rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 4)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 10, 10], [0, 0, 10, 10], 1.0),
        ([0, 0, 10, 10], [5, 0, 15, 10], 50 / 150),
        ([0, 0, 10, 10], [10, 0, 20, 10], 0.0),  # touching
        ([0, 0, 10, 10], [20, 20, 30, 30], 0.0),
        ([0, 0, 10, 10], [2, 2, 4, 4], 4 / 100),  # inside
        ([3, 3, 3, 3], [3, 3, 3, 3], 0.0),  # two points: nothing over nothing
        ([5, 5, 1, 1], [0, 0, 10, 10], 0.0),  # negative extent has no area
    ],
)
def test_iou_of_a_pair(a: list[float], b: list[float], expected: float) -> None:
    assert iou_matrix(f32([a]), f32([b]))[0, 0] == pytest.approx(expected, abs=1e-6)
    assert iou_matrix(f32([b]), f32([a]))[0, 0] == pytest.approx(expected, abs=1e-6)


def test_iou_matrix_is_every_pair_and_leaves_its_inputs_alone() -> None:
    rng = np.random.default_rng(0)
    a, b = (np.sort(rng.uniform(0, 100, (n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32) for n in (7, 5))
    before = a.copy(), b.copy()
    matrix = iou_matrix(a, b)
    assert matrix.shape == (7, 5)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])
    for i in range(7):
        for j in range(5):
            assert matrix[i, j] == iou_matrix(a[i : i + 1], b[j : j + 1])[0, 0]


def test_empty_boxes_give_empty_results() -> None:
    none = f32([])
    assert iou_matrix(none, f32([[0, 0, 1, 1]])).shape == (0, 1)
    assert area(none).shape == (0,)
    assert xyxy_from_cxcywh(none).shape == (0, 4)


def test_centre_form_and_back() -> None:
    xyxy = f32([[0, 10, 20, 50], [-4, -4, 4, 8]])
    centre = cxcywh_from_xyxy(xyxy)
    np.testing.assert_array_equal(centre, [[10, 30, 20, 40], [0, 2, 8, 12]])
    np.testing.assert_array_equal(xyxy_from_cxcywh(centre), xyxy)
