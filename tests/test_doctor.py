"""The doctor tells what works from what is missing and what is broken."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgekd
from edgekd import doctor
from edgekd.doctor import TINY_MODEL, Examination, Finding, examine, probe, show
from edgekd.errors import install_extra
from tests.sysfs_trees import nano, orin, thor, xavier


@pytest.fixture(scope="module")
def examination() -> Examination:
    return examine()


def by_name(examination: Examination) -> dict[str, Finding]:
    return {finding.name: finding for finding in examination.findings}


def test_this_machine_can_work(examination: Examination) -> None:
    assert examination.ok, [f for f in examination.findings if f.needed and f.status != "ok"]
    found = by_name(examination)
    assert found["torch"].status == "ok"
    assert found["CPUExecutionProvider"].detail == "starts"
    json.dumps(examination.to_dict(), allow_nan=False)


def test_what_does_not_work_says_how_to_get_it(examination: Examination) -> None:
    for finding in examination.findings:
        assert finding.status == "ok" or finding.fix, finding


def test_the_tiny_model_is_a_convolution_of_ones() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(base64.b64decode(TINY_MODEL), providers=["CPUExecutionProvider"])
    image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    (out,) = session.run(None, {"x": image})
    expected = [[image[0, 0, y : y + 3, x : x + 3].sum() for x in range(2)] for y in range(2)]
    np.testing.assert_allclose(out[0, 0], expected)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('{\"a\": 1}')", {"a": 1}),
        ("print('noise'); print('{}')", {}),
        ("import no_such_module", {"error": "ModuleNotFoundError: No module named 'no_such_module'", "absent": True}),
        ("raise OSError('libcudart.so is missing')", {"error": "OSError: libcudart.so is missing", "absent": False}),
        ("import os; os.abort()", "crashed with signal 6"),
        ("import sys; sys.exit(3)", "ended with code 3"),
        ("print('not json')", "ended with code 0"),
    ],
)
def test_probe_turns_crashes_into_findings(code: str, expected: object) -> None:
    answer = probe(code)
    if isinstance(expected, str):
        assert expected in answer["error"]
    else:
        assert answer == expected


def test_a_probe_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.3)
    assert "no answer" in probe("import time; time.sleep(60)")["error"]


def test_a_broken_provider_is_failed_and_a_broken_base_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(code: str, argument: str = "") -> dict[str, object]:
        if "all" in code and "get_available" in code:
            return {"version": "1", "all": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
        return {"error": "RuntimeError: it silently fell back to CPUExecutionProvider"}

    monkeypatch.setattr(doctor, "probe", broken)
    found = Examination(tuple(doctor._onnxruntime()))
    assert by_name(found)["CUDAExecutionProvider"].status == "failed"
    assert not found.ok


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_sensors_are_found_where_the_system_shows_them(tmp_path: Path) -> None:
    write(tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj", "123456")
    write(tmp_path / "sys/class/powercap/intel-rapl:0/name", "package-0")
    found = {finding.name: finding for finding in doctor._sensors(tmp_path)}
    assert (found["RAPL"].status, found["RAPL"].detail) == ("ok", "package-0")


@pytest.mark.parametrize(("board", "rail"), [(nano, "POM_5V_IN"), (xavier, "GPU"), (orin, "VDD_IN"), (thor, "VIN")])
def test_the_rails_of_every_jetson_are_found(tmp_path: Path, board: Callable[[Path], Path], rail: str) -> None:
    found = {finding.name: finding for finding in doctor._sensors(board(tmp_path))}
    assert found["Jetson rails"].status == "ok"
    assert rail in found["Jetson rails"].detail.split(", ")


def test_sensors_that_are_absent_are_missing(tmp_path: Path) -> None:
    found = {finding.name: finding for finding in doctor._sensors(tmp_path)}
    assert found["RAPL"].status == found["Jetson rails"].status == "missing"


def test_show_prints_every_finding(capsys: pytest.CaptureFixture[str], examination: Examination) -> None:
    show(examination)
    out = capsys.readouterr().out
    for finding in examination.findings:
        assert finding.name in out


def test_no_cure_asks_the_package_index_for_edgekd() -> None:
    """It is not there: extras come from a checkout, in quotes, since shells read brackets."""
    for file in Path(edgekd.__file__).parent.rglob("*.py"):
        assert not re.search(r"pip install '?edgekd", file.read_text(encoding="utf-8")), file
    assert "pip install '.[gpu]'" in install_extra("gpu")
