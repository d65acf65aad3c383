"""A recipe in the making: its values, why each is what it is, and its YAML with the reasons as comments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgekd.yaml_document import yaml_text


@dataclass
class RecipeDraft:
    """A recipe in the making.

    Attributes:
        values: as they stand in the file. reasons: why, by the place of the value.
        notes, warnings: what the user should know besides.
    """

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[tuple[str | int, ...], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def put(self, section: str, key: str, value: object, why: str = "") -> None:
        """A key of a section, with its reason."""
        self.values.setdefault(section, {})[key] = value
        if why:
            self.reasons[section, key] = why

    @property
    def text(self) -> str:
        """The recipe's YAML, the reasons as comments."""
        return _yaml(self.values, self.reasons)


def _yaml(values: Mapping[str, Any], reasons: Mapping[tuple[str | int, ...], str]) -> str:
    """Sections as blocks, what is in them on one line each, with its reason behind it."""
    lines = []

    def line(lead: str, key: str, value: str, *path: str | int) -> None:
        why = " ".join(reasons.get(path, "").split())
        lines.append(f"{lead}{key}:{' ' if value else ''}{value}{f' # {why}' if why else ''}")

    for section, content in values.items():
        if isinstance(content, dict):
            line("", section, "", section)
            for key, value in content.items():
                line("  ", key, _flow(value), section, key)
        elif isinstance(content, list):
            line("", section, "", section)
            for number, entry in enumerate(content):
                for key, value in entry.items():
                    line("    " if key != "name" else "  - ", key, _flow(value), section, number, key)
        else:
            line("", section, _flow(content), section)
    return "\n".join(lines) + "\n"


def _flow(value: object) -> str:
    return yaml_text(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
