"""Sensors on recorded boards, and energy out of what they say."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgekd.device.conditions import ConditionWatch, clocks, snapshot, summary, temperatures, throttled
from edgekd.device.facts import machine_facts
from edgekd.device.jetson import jetson_facts, jetson_rails, parse_power_mode
from edgekd.device.nvml import nvml_conditions, nvml_facts, nvml_rails, open_nvml
from edgekd.device.power import PowerSampler, choose_group, energy_per_inference, idle_reading, power_rails
from edgekd.device.rails import PowerRail, RailGroup
from edgekd.device.rapl import rapl_rails
from edgekd.device.target import steady_clocks
from tests.sysfs_trees import I2C, intel, nano, orin, thor, write_tree, xavier


@pytest.mark.parametrize(
    ("build", "l4t", "jetpack", "mode", "rails", "total"),
    [
        (
            nano,
            "32.7.1",
            "4.6.1",
            {"id": 0, "name": "MAXN"},
            {"POM_5V_IN": 2.5, "POM_5V_GPU": 0.4, "POM_5V_CPU": 0.7},
            ("POM_5V_IN",),
        ),
        (
            xavier,
            "35.4.1",
            "5.1.2",
            {"id": 3, "name": "MODE_30W_ALL"},
            {"GPU": 1.9, "CPU": 0.95, "SOC": 1.52, "CV": 0.0, "VDDRQ": 0.38, "SYS5V": 2.09},
            ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
        ),
        (
            orin,
            "36.4.3",
            "6.2",
            {"id": 2, "name": "15W"},
            {"VDD_IN": 6.0, "VDD_CPU_GPU_CV": 1.5, "VDD_SOC": 1.4},
            ("VDD_IN",),
        ),
        (
            thor,
            "38.2.0",
            "7.0",
            None,
            {"VDD_GPU": 4.0, "VDD_CPU_SOC_MSS": 6.0, "VIN_SYS_5V0": 4.5, "VIN": 31.5},
            ("VIN",),
        ),
    ],
    ids=["nano", "xavier", "orin", "thor"],
)
def test_jetsons(
    tmp_path: Path,
    build: Callable[[Path], Path],
    l4t: str,
    jetpack: str,
    mode: dict[str, Any] | None,
    rails: dict[str, float],
    total: tuple[str, ...],
) -> None:
    root = build(tmp_path)
    facts = jetson_facts(root)
    assert facts is not None
    assert (facts["l4t"], facts["jetpack"], facts["power_mode"]) == (l4t, jetpack, mode)
    assert not facts["model"].endswith("\0")
    group = jetson_rails(root)
    assert group is not None
    assert {rail.name: pytest.approx(rail.read()) for rail in group.rails} == rails
    assert group.total == total
    assert machine_facts(root)["jetson"] == facts


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert jetson_facts(tmp_path) is None
    assert power_rails(tmp_path) == ()
    assert snapshot(tmp_path) == {
        "temperatures_c": {},
        "clocks": {},
        "throttle": {"counters": {}, "alerts": {}},
        "gpus": None,
    }
    facts = machine_facts(tmp_path)
    assert [facts[key] for key in ("jetson", "nvml", "governor", "board", "memory_bytes")] == [None] * 5


def test_an_unknown_release_is_no_jetpack(tmp_path: Path) -> None:
    write_tree(tmp_path, {"etc/nv_tegra_release": "# R99 (release), REVISION: 1.0, GCID: 1"})
    facts = jetson_facts(tmp_path)
    assert facts == {"model": None, "l4t": "99.1.0", "jetpack": None, "power_mode": None}


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN\n0\n", {"id": 0, "name": "MAXN"}),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MODE_15W\n2\n", {"id": 2, "name": "MODE_15W"}),
        ("NVPM ERROR: not allowed\n", None),
    ],
)
def test_nvpmodel(text: str, mode: dict[str, Any] | None) -> None:
    assert parse_power_mode(text) == mode


def test_rails_that_do_not_answer_are_left_out(tmp_path: Path) -> None:
    root = orin(tmp_path)
    (root / I2C / "1-0040/hwmon/hwmon1/curr2_input").write_text("broken", encoding="utf-8")
    group = jetson_rails(root)
    assert group is not None
    assert [rail.name for rail in group.rails] == ["VDD_IN", "VDD_SOC"]
    assert group.total == ("VDD_IN",)


@pytest.mark.parametrize(
    ("build", "broken"),
    [
        (orin, f"{I2C}/1-0040/hwmon/hwmon1/curr1_input"),
        (thor, f"{I2C}/2-0044/hwmon/hwmon6/power1_input"),
        (xavier, f"{I2C}/1-0041/hwmon/hwmon4/in3_input"),
        (intel, "sys/class/powercap/intel-rapl:0:0/energy_uj"),
    ],
    ids=["orin", "thor", "xavier", "intel"],
)
def test_what_is_left_of_the_rails_does_not_pass_for_all(
    tmp_path: Path, build: Callable[[Path], Path], broken: str
) -> None:
    """Without the whole input, or a part of the sum, the rest is less than the device draws: that is not known then."""
    (build(tmp_path) / broken).write_text("-61 garbage", encoding="utf-8")
    (group,) = power_rails(tmp_path)
    assert group.rails
    reading = idle_reading(replace(group, rails=tuple(PowerRail(rail.name, lambda: 1.0) for rail in group.rails)), 0.01)
    assert reading is not None
    assert reading.total_w is None


def test_rapl(tmp_path: Path) -> None:
    root = intel(tmp_path)
    group = rapl_rails(root)
    assert group is not None
    assert {rail.name: rail.read() for rail in group.rails} == {
        "package-0": 5.0,
        "package-0/dram": 1.0,
        "package-0/core": 2.0,
        "psys": 9.0,
    }
    assert group.total == ("package-0", "package-0/dram"), "cores lie within the package, psys around it"
    assert jetson_rails(root) is None, "another chip's voltages are no power rails"


def test_temperatures_and_clocks(tmp_path: Path) -> None:
    root = orin(tmp_path)
    found = snapshot(root)
    assert found["temperatures_c"] == {"cpu-thermal": 48.5, "gpu-thermal": 47.0, "cv0-thermal": None}
    assert found["clocks"]["cpu0"] == {
        "now_mhz": 1510.4,
        "min_mhz": 115.2,
        "max_mhz": 1510.4,
        "limit_mhz": 1984.0,
        "governor": "schedutil",
        "pinned": False,
    }
    assert found["clocks"]["gpu"]["max_mhz"] == 918.0
    assert snapshot(nano(tmp_path / "nano"))["clocks"]["gpu"]["pinned"] is True
    hot = write_tree(xavier(tmp_path / "xavier"), {"sys/class/thermal/thermal_zone0/temp": 2**31 - 1})
    assert temperatures(hot) == {"CPU-therm": None, "GPU-therm": None, "Tboard_tegra": 39.0}


def test_only_what_jetson_clocks_pins_is_called_free(tmp_path: Path) -> None:
    """Video engines scale by themselves, pinned or not: the advice to pin would never end."""
    root = orin(tmp_path)
    engine = "sys/class/devfreq/15480000.nvdec"
    write_tree(
        root, {f"{engine}/cur_freq": 115200000, f"{engine}/min_freq": 115200000, f"{engine}/max_freq": 524800000}
    )
    free = snapshot(root)
    assert {name: clock["pinned"] for name, clock in free["clocks"].items()} == {
        "cpu0": False,
        "gpu": False,
        "nvdec": None,
    }
    for path in ("sys/class/devfreq/17000000.gpu/min_freq", "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq"):
        write_tree(root, {path: 918000000 if "gpu" in path else 1510400})
    assert steady_clocks({"conditions": {"before": snapshot(root)}}) == "clocks are pinned there"
    assert "jetson_clocks" in steady_clocks({"conditions": {"before": free}})


@pytest.mark.parametrize("name", ["17000000.ga10b", "17000000.gv11b", "17000000.gp10b", "57000000.gpu", "gpu-gpc-0"])
def test_gpus_by_their_names(tmp_path: Path, name: str) -> None:
    write_tree(tmp_path, {f"sys/class/devfreq/{name}/min_freq": 10**6, f"sys/class/devfreq/{name}/max_freq": 2 * 10**6})
    assert [clock["pinned"] for clock in clocks(tmp_path).values()] == [False]


def test_throttling(tmp_path: Path) -> None:
    root = orin(tmp_path)
    quiet = [snapshot(root), snapshot(root)]
    assert throttled(quiet) == [], "a cooling device that is at work is no throttling by itself"
    write_tree(root, {"sys/class/hwmon/hwmon2/oc3_event_cnt": 9})
    assert throttled([*quiet, snapshot(root)]) == ["hwmon2/oc3_event_cnt"]
    write_tree(root, {"sys/class/thermal/cooling_device5/cur_state": 1})
    alarmed = snapshot(root)
    write_tree(root, {"sys/class/thermal/cooling_device5/cur_state": 0})
    assert throttled([quiet[0], alarmed, snapshot(root)]) == ["cpu-throttle-alert", "hwmon2/oc3_event_cnt"]
    rose = [
        {**snapshot(root), "throttle": {"counters": {} if n is None else {"cpu3": n}, "alerts": {}}}
        for n in (0, 4, None)
    ]
    assert throttled(rose) == ["cpu3"], "though its CPU is gone at the end"
    assert throttled(rose[:0:-1]) == [], "what was counted before it came is not ours"
    assert throttled([snapshot(tmp_path / "none")] * 2) is None, "no sensor is not the same as no throttling"


@pytest.mark.parametrize(("bits", "expected"), [("0x0", []), ("0x50000", []), ("0x4", ["throttled"])])
def test_raspberry_pi(tmp_path: Path, bits: str, expected: list[str]) -> None:
    write_tree(tmp_path, {"sys/devices/platform/soc/soc:firmware/get_throttled": bits})
    assert throttled([snapshot(tmp_path)] * 2) == expected


def test_conditions_before_during_and_after(tmp_path: Path) -> None:
    root = orin(tmp_path)
    with ConditionWatch(root, every_s=60) as watch:
        write_tree(root, {"sys/class/thermal/thermal_zone0/temp": 71000})
    assert watch.result["before"]["temperatures_c"]["cpu-thermal"] == 48.5
    assert watch.result["after"]["temperatures_c"]["cpu-thermal"] == 71.0
    assert watch.result["during"]["max_temperatures_c"]["cpu-thermal"] == 71.0
    assert watch.result["throttled"] == []
    slow = snapshot(root)
    slow["clocks"]["gpu"]["now_mhz"] = 100.0
    assert summary([snapshot(root), slow, snapshot(root)])["during"]["min_clocks_mhz"]["gpu"] == 100.0


class FakeNvml(SimpleNamespace):
    """pynvml as far as it is used, for one GPU; what `lacks` names raises as NVML does."""

    lacks: tuple[str, ...] = ()
    energy_mj = 5_000

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "lacks"):
            raise RuntimeError("Not Supported")
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        assert index == 0
        return "handle"

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return b"550.54"

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(total=150_000_000_000)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:  # noqa: N802
        return 700_000

    def nvmlDeviceGetPersistenceMode(self, handle: str) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        return 35

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return 1980

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        return 0x1 | 0x4  # idle, and power cap

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        return self.energy_mj

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return 75_000


def test_nvml() -> None:
    nvml = FakeNvml()
    facts = {"name": "NVIDIA H200", "driver": "550.54", "memory_bytes": 150_000_000_000, "power_limit_w": 700.0}
    assert nvml_facts(nvml) == [{**facts, "persistence": True}]
    assert nvml_conditions(nvml)[0]["throttle"] == ["power cap"]
    group = nvml_rails(nvml)
    assert group is not None
    assert (group.rails[0].counts, group.rails[0].read()) == (True, 5.0)


def test_the_gpu_of_several_is_the_one_that_computes_here() -> None:
    """CUDA counts them in an order of its own, and may be shown only some."""
    users = {"0": [1], "1": [1, os.getpid()], "2": []}
    nvml = FakeNvml(
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=str,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=pid) for pid in users[handle]],
    )
    assert (group := nvml_rails(nvml)) is not None
    assert (len(group.rails), group.total) == (3, ("gpu1",))
    users["2"] = [os.getpid()]
    assert (group := nvml_rails(nvml)) is not None
    assert group.total == (), "which of the two measured the last inference cannot be told"
    assert (group := nvml_rails(FakeNvml())) is not None
    assert group.total == ("gpu0",), "the only one needs no process, whose numbers a container changes"


def test_an_old_gpu_gives_power_and_no_energy() -> None:
    nvml = FakeNvml(lacks=("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetCurrentClocksThrottleReasons"))
    group = nvml_rails(nvml)
    assert group is not None
    assert (group.rails[0].counts, group.rails[0].read()) == (False, 75.0)
    assert nvml_conditions(nvml)[0]["throttle"] is None


def test_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml() is None
    broken = FakeNvml(lacks=("nvmlInit",))
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert open_nvml() is None
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert open_nvml() is not None


@pytest.mark.parametrize(
    ("sources", "uses_gpu", "chosen"),
    [
        (["jetson", "rapl"], False, "jetson"),
        (["nvml", "rapl"], True, "nvml"),
        (["nvml", "rapl"], False, "rapl"),
        (["rapl"], True, None),
        ([], False, None),
    ],
)
def test_whose_energy(sources: list[str], uses_gpu: bool, chosen: str | None) -> None:
    group = choose_group([RailGroup(source, (), ()) for source in sources], uses_gpu)
    assert (group.source if group else None) == chosen


class Script:
    """A clock and a rail that say what they are told, one step a reading."""

    def __init__(self, steps: list[tuple[float, float | None]]) -> None:
        self.steps, self.at = steps, -1

    def read(self) -> float | None:
        self.at = min(self.at + 1, len(self.steps) - 1)
        return self.steps[self.at][1]

    def clock(self) -> float:
        return self.steps[self.at][0]


def mean_of(steps: list[tuple[float, float | None]], **rail: Any) -> float | None:
    script = Script(steps)
    group = RailGroup("test", (PowerRail("r", script.read, **rail),), ("r",))
    sampler = PowerSampler(group, clock=script.clock)
    for _ in steps:
        sampler._take()
    sampler._stop.set()
    sampler._thread.start()
    sampler._thread.join()
    script.at -= 1  # leaving takes one more reading: the last again, no time later
    sampler.__exit__()
    assert sampler.reading is not None
    return sampler.reading.total_w


def test_integration_against_what_paper_says() -> None:
    # 10 W for 1 s, a ramp to 20 W in 2 s, then 20 W for 1 s: 10 + 30 + 20 J over 4 s.
    assert mean_of([(0, 10), (1, 10), (3, 20), (4, 20)]) == pytest.approx(15.0)
    # A counter that wraps at 100 J: 95 -> 99 -> 4 (5 J more) -> 11.
    counter = [(0.0, 95.0), (1.0, 99.0), (2.0, 4.0), (4.0, 11.0)]
    assert mean_of(counter, counts=True, wraps_at=100.0) == pytest.approx((4 + 5 + 7) / 4)
    # One missed reading of twenty is bridged; half of them missing is nothing to go by.
    steady: list[tuple[float, float | None]] = [(float(i), 5.0) for i in range(20)]
    assert mean_of([*steady[:10], (10.0, None), *steady[11:]]) == pytest.approx(5.0)
    assert mean_of([(float(i), 5.0 if i % 2 else None) for i in range(20)]) is None


@pytest.mark.parametrize(
    ("steps", "rail", "mean"),
    [
        ([(0, 5), (1, 5), (2, 5)], {"counts": True, "wraps_at": 100.0}, None),  # stands still, as in a virtual machine
        ([(0, 500), (1, 510), (2, 1), (3, 11)], {"counts": True}, None),  # begins again, and has no end to wrap at
        (
            [(0, 500), (1, 510), (2, 1), (3, 11)],
            {"counts": True, "wraps_at": 262_143.3},
            None,
        ),  # begins again elsewhere
        ([(0, 262_140), (0.1, 2), (0.2, 4)], {"counts": True, "wraps_at": 262_143.0}, 35.0),
        ([(0, 5), (0, 105), (0.1, 110)], {"counts": True}, 1050.0),  # one that steps: much at once, but no nonsense
        ([*((i, 5) for i in range(20)), (20, 4_294_967.3), (21, 5)], {}, 5.0),
        ([(0, 5), (1, float("nan")), (2, 5)], {}, None),
        ([(0, 0), (1, 0), (2, 0)], {}, None),
    ],
)
def test_what_no_rail_can_give_is_not_taken(
    steps: list[tuple[float, float | None]], rail: dict[str, Any], mean: float | None
) -> None:
    assert mean_of(steps, **rail) == (mean if mean is None else pytest.approx(mean))


def test_energy_per_inference() -> None:
    group = RailGroup("test", (PowerRail("A", lambda: 3.0), PowerRail("B", lambda: 2.0)), ("A", "B"))
    idle = idle_reading(RailGroup("test", (PowerRail("A", lambda: 1.0), PowerRail("B", lambda: 1.0)), ("A", "B")), 0.05)
    energy = energy_per_inference(lambda: None, group, 0.1, idle)
    assert energy is not None
    each_s = energy["seconds"] / energy["inferences"]
    assert energy["rail"] == "A + B"
    assert energy["mean_w"] == pytest.approx(5.0)
    assert energy["gross_mj"] == pytest.approx(5000 * each_s, rel=0.05, abs=1e-3)
    assert energy["above_idle_mj"] == pytest.approx(3000 * each_s, rel=0.05, abs=1e-3)
    without = energy_per_inference(lambda: None, group, 0.02, None)
    assert without is not None
    assert without["above_idle_mj"] is None


def test_a_total_needs_all_its_rails() -> None:
    group = RailGroup("test", (PowerRail("A", lambda: 3.0), PowerRail("B", lambda: None)), ("A", "B"))
    assert energy_per_inference(lambda: None, group, 0.02, None) is None


def test_energy_of_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.bench import energy

    rapl = RailGroup("rapl", (PowerRail("package-0", lambda: 8.0),), ("package-0",))
    gpu = RailGroup("nvml", (PowerRail("gpu0", lambda: 90.0),), ("gpu0",))
    monkeypatch.setattr(energy, "power_rails", lambda nvml: (gpu, rapl))
    monkeypatch.setattr(energy, "IDLE_SECONDS", 0.02)
    on_cpu, on_gpu = energy.measure_energy([lambda: None] * 2, [False, True], 0.05)
    assert on_cpu is not None
    assert on_gpu is not None
    assert (on_cpu["rail"], on_gpu["rail"]) == ("package-0", "gpu0")
    assert (on_cpu["mean_w"], on_gpu["mean_w"]) == (8.0, 90.0)
    monkeypatch.setattr(energy, "power_rails", lambda nvml: (rapl,))
    assert energy.measure_energy([lambda: None], [True], 0.02) == [None], "a CPU's power is not a GPU's"
    assert energy.measure_energy([lambda: None], [False], 0) == [None]


@pytest.mark.parametrize(
    ("name", "provider", "expected"),
    [
        ("torch", "cpu", False),
        ("torch", "cuda:0", True),
        ("onnxruntime", "CPUExecutionProvider", False),
        ("onnxruntime", "CUDAExecutionProvider", True),
        ("onnxruntime", "TensorrtExecutionProvider", True),
        ("tensorrt", "Orin", True),
    ],
)
def test_who_computes_on_a_gpu(name: str, provider: str, expected: bool) -> None:
    from edgekd.bench.energy import uses_gpu

    assert uses_gpu(SimpleNamespace(name=name, provider=provider)) == expected  # type: ignore[arg-type]
