"""The best candidates alone leave a graph, and NMS afterwards finds the same."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.errors import ExportError, UserError
from edgekd.export.topk import with_top_candidates
from edgekd.postprocess import select
from tests.engine_doubles import IMAGES, moving_detector, run_onnx


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("batch", [1, 4, "batch"])
def test_topk_keeps_the_best_rows_and_selection_the_same(batch: int | str, opset: int) -> None:
    model = moving_detector(batch, opset=opset)
    cut = with_top_candidates(model, ("boxes", "scores"))
    images = IMAGES[: 1 if batch == 1 else 4]
    whole, top = run_onnx(model, images), run_onnx(cut, images)
    assert top["boxes"].shape == (len(images), 1000, 4)
    assert top["scores"].shape == (len(images), 1000, 3)
    for item in range(len(images)):
        order = np.argsort(-whole["scores"][item].max(1), kind="stable")[:1000]
        np.testing.assert_allclose(top["scores"][item].max(1), whole["scores"][item][order].max(1))
        settings = {"score_threshold": 0.3, "nms_iou": 0.5, "max_detections": 100}
        wanted, found = (select(side["boxes"][item], side["scores"][item], **settings) for side in (whole, top))
        np.testing.assert_array_equal(found.boxes_xyxy, wanted.boxes_xyxy)
        np.testing.assert_array_equal(found.labels, wanted.labels)


def test_topk_leaves_small_models_alone_and_refuses_what_tensorrt_would() -> None:
    small = moving_detector(candidates=200)
    assert with_top_candidates(small, ("boxes", "scores")) is small
    with pytest.raises(UserError, match="3839"):
        with_top_candidates(small, ("boxes", "scores"), 3840)
    small.graph.output[1].type.tensor_type.shape.dim[1].dim_param = "open"
    with pytest.raises(ExportError, match="not fixed"):
        with_top_candidates(small, ("boxes", "scores"))
