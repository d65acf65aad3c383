"""What a Jetson says of itself without root: model, L4T, JetPack, power mode, power rails.

Layouts: INA3221 under hwmon (L4T 34 and later: Orin, Xavier on JetPack 5), INA3221 under iio (L4T 32: Nano, TX2,
Xavier), and INA238 beside INA3221 (Thor), whose one channel is the whole input.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekd.device.rails import PowerRail, RailGroup
from edgekd.machine import read_int, read_text, scaled

WHOLE_INPUT = ("VIN", "VDD_IN", "POM_5V_IN")
"""Rails that feed the whole module or board; where there is one of them, it is the total."""

_NOT_CONNECTED = ("NC", "")
_JETPACK = {
    "32.7.1": "4.6.1",
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "38.2.0": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
}
"""NVIDIA's release table, L4T to JetPack, for where the `nvidia-jetpack` package is not installed."""

_RELEASE = re.compile(r"#?\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)")
_MODE = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>")


def jetson_facts(root: Path = Path("/")) -> dict[str, Any] | None:
    """Model, L4T, JetPack and power mode as plain JSON types; None where this is no Jetson."""
    l4t = l4t_release(root)
    model = read_text(root / "sys/firmware/devicetree/base/model") or read_text(root / "proc/device-tree/model")
    if l4t is None and "jetson" not in (model or "").lower():
        return None
    return {"model": model, "l4t": l4t, "jetpack": jetpack(root, l4t), "power_mode": power_mode(root)}


def l4t_release(root: Path = Path("/")) -> str | None:
    """The L4T release, such as "36.4.3"; None elsewhere."""
    found = _RELEASE.match(read_text(root / "etc/nv_tegra_release") or "")
    return f"{found.group(1)}.{found.group(2)}" if found else None


def jetpack(root: Path, l4t: str | None) -> str | None:
    """The JetPack version: of the installed package, else by NVIDIA's table of releases, else None."""
    status = read_text(root / "var/lib/dpkg/status") or ""
    found = re.search(r"^Package: nvidia-jetpack\n(?:\S.*\n|\s.*\n)*?Version: (\S+)", status + "\n", re.MULTILINE)
    if found:
        return found.group(1).split("-b")[0].split("+")[0]
    return _JETPACK.get(l4t or "")


def power_mode(root: Path = Path("/")) -> dict[str, Any] | None:
    """{"id", "name"} of the nvpmodel mode in force; None where it cannot be told.

    Read from nvpmodel's own files; `nvpmodel -q` is asked only of the running system.
    """
    status = re.search(r"pmode:\s*(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    if status:
        number = int(status.group(1))
        names = {int(n): name for n, name in _MODE.findall(read_text(root / "etc/nvpmodel.conf") or "")}
        return {"id": number, "name": names.get(number)}
    return _asked_power_mode() if root == Path("/") else None


def _asked_power_mode() -> dict[str, Any] | None:
    try:
        done = subprocess.run(
            ["nvpmodel", "-q"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_power_mode(done.stdout.decode("utf-8", "replace"))


def parse_power_mode(text: str) -> dict[str, Any] | None:
    """What `nvpmodel -q` printed: a name after "NV Power Mode:", the number on a line of its own."""
    name = re.search(r"NV Power Mode:\s*(\S+)", text)
    number = re.search(r"^(\d+)\s*$", text, re.MULTILINE)
    if name is None and number is None:
        return None
    return {"id": int(number.group(1)) if number else None, "name": name.group(1) if name else None}


def jetson_rails(root: Path = Path("/")) -> RailGroup | None:
    """The board's power rails; None where there are none that can be read."""
    found: list[PowerRail] = []
    for device in sorted(root.glob("sys/bus/i2c/devices/*")):
        for folder in sorted(device.glob("hwmon/hwmon*")):
            found += _hwmon_rails(folder)
        for folder in sorted(device.glob("iio:device*")):
            found += _iio_rails(folder)
    names = tuple(dict.fromkeys(rail.name for rail in found))
    rails = tuple({rail.name: rail for rail in found if rail.read() is not None}.values())
    if not rails:
        return None
    # With those that do not answer: without them the sum, or the sum instead of the whole, would be less than it draws.
    whole = tuple(name for name in names if name in WHOLE_INPUT)
    return RailGroup("jetson", rails, whole[:1] or names)


def _hwmon_rails(folder: Path) -> list[PowerRail]:
    """Channels of an INA3221 (voltage times current) or the one of an INA238 (power in microwatts)."""
    chip = read_text(folder / "name") or ""
    if (folder / "power1_input").exists() and chip.startswith(("ina238", "ina237", "sq52206")):
        name = read_text(folder / "power1_label") or read_text(folder / "in1_label") or "VIN"
        return [PowerRail(name, _power(folder / "power1_input", 1e-6))]
    if chip and not chip.startswith("ina3221"):
        return []
    rails = []
    for label in sorted(folder.glob("in[0-9]*_label")):
        number = label.name[2 : -len("_label")]
        name = read_text(label) or ""
        if name.upper() in _NOT_CONNECTED or not (folder / f"curr{number}_input").exists():
            continue
        rails.append(PowerRail(name, _channel(folder, number)))
    return rails


def _channel(folder: Path, number: str) -> Callable[[], float | None]:
    def watts() -> float | None:
        millivolts, milliamperes = read_int(folder / f"in{number}_input"), read_int(folder / f"curr{number}_input")
        return None if millivolts is None or milliamperes is None else millivolts * milliamperes * 1e-6

    return watts


def _iio_rails(folder: Path) -> list[PowerRail]:
    """Channels of an INA3221 under L4T 32: a name and milliwatts each."""
    rails = []
    for label in sorted(folder.glob("rail_name_*")):
        number = label.name.rsplit("_", 1)[1]
        name = read_text(label) or ""
        if name.upper() not in _NOT_CONNECTED:
            rails.append(PowerRail(name, _power(folder / f"in_power{number}_input", 1e-3)))
    return rails


def _power(path: Path, factor: float) -> Callable[[], float | None]:
    return lambda: scaled(path, factor)
