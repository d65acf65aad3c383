"""The /sys and /etc files of real boards, as far as edgekd reads them, written out as small trees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

I2C = "sys/bus/i2c/devices"


def write_tree(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


def _thermal(zones: Mapping[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    for index, (name, temperature) in enumerate(zones.items()):
        found[f"sys/class/thermal/thermal_zone{index}/type"] = name
        found[f"sys/class/thermal/thermal_zone{index}/temp"] = temperature
    return found


def _hwmon(address: str, number: int, channels: Mapping[str, tuple[int, int]]) -> dict[str, object]:
    folder = f"{I2C}/{address}/hwmon/hwmon{number}"
    found: dict[str, object] = {f"{folder}/name": "ina3221"}
    for index, (label, (millivolts, milliamperes)) in enumerate(channels.items(), 1):
        found[f"{folder}/in{index}_label"] = label
        found[f"{folder}/in{index}_input"] = millivolts
        found[f"{folder}/curr{index}_input"] = milliamperes
    found[f"{folder}/in7_label"] = "sum of shunt voltages"
    found[f"{folder}/in7_input"] = 12
    return found


def _iio(address: str, channels: Mapping[str, int]) -> dict[str, object]:
    folder = f"{I2C}/{address}/iio:device0"
    found: dict[str, object] = {}
    for index, (label, milliwatts) in enumerate(channels.items()):
        found[f"{folder}/rail_name_{index}"] = label
        found[f"{folder}/in_power{index}_input"] = milliwatts
    return found


def nano(root: Path) -> Path:
    """Jetson Nano, JetPack 4.6.1: L4T 32, INA3221 under iio."""
    return write_tree(
        root,
        {
            "etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64",
            "sys/firmware/devicetree/base/model": "NVIDIA Jetson Nano Developer Kit\0",
            "var/lib/nvpmodel/status": "pmode:0000",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=5W >",
            **_iio("6-0040", {"POM_5V_IN": 2500, "POM_5V_GPU": 400, "POM_5V_CPU": 700}),
            **_thermal({"AO-therm": 42500, "CPU-therm": 31000, "PMIC-Die": 100000}),
            "sys/class/devfreq/57000000.gpu/cur_freq": 921600000,
            "sys/class/devfreq/57000000.gpu/min_freq": 921600000,
            "sys/class/devfreq/57000000.gpu/max_freq": 921600000,
            "sys/class/devfreq/57000000.gpu/governor": "nvhost_podgov",
        },
    )


def xavier(root: Path) -> Path:
    """Jetson AGX Xavier, JetPack 5.1.2: two INA3221 under hwmon, none of which has the whole input."""
    return write_tree(
        root,
        {
            "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64",
            "sys/firmware/devicetree/base/model": "Jetson-AGX\0",
            "var/lib/nvpmodel/status": "pmode:0003",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=3 NAME=MODE_30W_ALL >",
            **_hwmon("1-0040", 3, {"GPU": (19000, 100), "CPU": (19000, 50), "SOC": (19000, 80)}),
            **_hwmon("1-0041", 4, {"CV": (19000, 0), "VDDRQ": (19000, 20), "SYS5V": (19000, 110)}),
            **_thermal({"CPU-therm": 41000, "GPU-therm": -256000, "Tboard_tegra": 39000}),
            "sys/class/devfreq/17000000.gv11b/cur_freq": 318750000,
            "sys/class/devfreq/17000000.gv11b/min_freq": 114750000,
            "sys/class/devfreq/17000000.gv11b/max_freq": 905250000,
            "sys/class/hwmon/hwmon3/name": "ina3221",
        },
    )


def orin(root: Path) -> Path:
    """Jetson Orin NX, JetPack 6.2: INA3221 under hwmon with the whole input, over-current counters, alerts."""
    return write_tree(
        root,
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
            "sys/firmware/devicetree/base/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
            "var/lib/dpkg/status": (
                "Package: nvidia-jetpack\nStatus: install ok installed\nArchitecture: arm64\nVersion: 6.2+b77\n\n"
                "Package: nvidia-jetpack-dev\nVersion: 9.9\n"
            ),
            "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN_SUPER >\n< POWER_MODEL ID=2 NAME=15W >",
            **_hwmon("1-0040", 1, {"VDD_IN": (5000, 1200), "VDD_CPU_GPU_CV": (5000, 300), "VDD_SOC": (5000, 280)}),
            **_thermal({"cpu-thermal": 48500, "gpu-thermal": 47000, "cv0-thermal": -256000}),
            "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": 1510400,
            "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": 115200,
            "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": 1510400,
            "sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": 1984000,
            "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil",
            "sys/class/devfreq/17000000.gpu/cur_freq": 306000000,
            "sys/class/devfreq/17000000.gpu/min_freq": 306000000,
            "sys/class/devfreq/17000000.gpu/max_freq": 918000000,
            "sys/class/hwmon/hwmon2/name": "soctherm_oc",
            "sys/class/hwmon/hwmon2/oc1_event_cnt": 0,
            "sys/class/hwmon/hwmon2/oc3_event_cnt": 7,
            "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0",
            "sys/class/thermal/cooling_device0/cur_state": 3,
            "sys/class/thermal/cooling_device5/type": "cpu-throttle-alert",
            "sys/class/thermal/cooling_device5/cur_state": 0,
        },
    )


def thor(root: Path) -> Path:
    """Jetson AGX Thor, JetPack 7.0: an INA238 for the whole input beside an INA3221."""
    return write_tree(
        root,
        {
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64",
            "sys/firmware/devicetree/base/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
            **_hwmon(
                "2-0040", 5, {"VDD_GPU": (20000, 200), "VDD_CPU_SOC_MSS": (20000, 300), "VIN_SYS_5V0": (5000, 900)}
            ),
            f"{I2C}/2-0044/hwmon/hwmon6/name": "ina238",
            f"{I2C}/2-0044/hwmon/hwmon6/power1_input": 31500000,
            f"{I2C}/2-0044/hwmon/hwmon6/in1_input": 20000,
            f"{I2C}/2-0044/hwmon/hwmon6/curr1_input": 1575,
            **_thermal({"cpu-thermal": 51000, "gpu-thermal": 50000}),
            "sys/class/devfreq/gpu-gpc-0/cur_freq": 1575000000,
            "sys/class/devfreq/gpu-gpc-0/min_freq": 306000000,
            "sys/class/devfreq/gpu-gpc-0/max_freq": 1575000000,
        },
    )


def intel(root: Path) -> Path:
    """A two-socket server with readable RAPL counters, which are also a sensor called "NC" away from a Jetson."""
    powercap = "sys/class/powercap"
    return write_tree(
        root,
        {
            f"{powercap}/intel-rapl:0/name": "package-0",
            f"{powercap}/intel-rapl:0/energy_uj": 5_000_000,
            f"{powercap}/intel-rapl:0/max_energy_range_uj": 262_143_328_850,
            f"{powercap}/intel-rapl:0:0/name": "dram",
            f"{powercap}/intel-rapl:0:0/energy_uj": 1_000_000,
            f"{powercap}/intel-rapl:0:1/name": "core",
            f"{powercap}/intel-rapl:0:1/energy_uj": 2_000_000,
            f"{powercap}/intel-rapl:1/name": "psys",
            f"{powercap}/intel-rapl:1/energy_uj": 9_000_000,
            "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": 3,
            f"{I2C}/0-0048/hwmon/hwmon0/name": "tmp102",
            f"{I2C}/0-0048/hwmon/hwmon0/in1_label": "Vbat",
            f"{I2C}/0-0048/hwmon/hwmon0/in1_input": 3000,
            f"{I2C}/0-0048/hwmon/hwmon0/curr1_input": 10,
        },
    )
