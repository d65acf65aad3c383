"""One VOC annotation file. The frame of its numbers is stated in `voc`."""

from __future__ import annotations

import functools
from pathlib import Path

from edgekd.data.layout import RawObject, around
from edgekd.data.xml_tree import Element, XmlError, parse_xml

__all__ = ["AnnotationError", "XmlError", "read_annotation"]

_TRUE, _FALSE = {"1", "true", "yes"}, {"", "0", "false", "no", "unspecified"}


class AnnotationError(ValueError):
    """An annotation breaks the format; `line` is where."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line


def read_annotation(path: Path) -> tuple[tuple[int, int], str, tuple[RawObject, ...]]:
    """((height, width) as stated, or zeros; <filename>; objects in edgekd's frame).

    Raises:
        XmlError: no XML.
        AnnotationError: XML, but no VOC annotation.
        OSError: the file cannot be read.
    """
    stat = path.stat()
    return _read_annotation(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=32768)
def _read_annotation(path: Path, mtime_ns: int, size: int) -> tuple[tuple[int, int], str, tuple[RawObject, ...]]:
    root = parse_xml(path)
    if root.tag != "annotation":
        raise AnnotationError(f"the root element is <{root.tag}>, not <annotation>", root.line)
    objects = tuple(_object(element) for element in root.all("object"))
    _refuse_unread(root)
    name = root.first("filename")
    return _declared_hw(root.first("size")), name.text if name else "", objects


def _refuse_unread(root: Element) -> None:
    """Objects at another place or in other letters would make a picture of background."""
    for parent in root.walk():
        for element in parent.children:
            if element.tag.lower() == "object" and (parent is not root or element.tag != "object"):
                message = f"<{element.tag}> within <{parent.tag}>: objects are <object> directly within <annotation>"
                raise AnnotationError(message, element.line)


def _declared_hw(size: Element | None) -> tuple[int, int]:
    try:
        h, w = (int(float(_child(size, key).text)) if size else 0 for key in ("height", "width"))
    except (AnnotationError, ValueError, OverflowError):
        return 0, 0
    return h, w


def _object(element: Element) -> RawObject:
    name = _child(element, "name")
    if not name.text:
        raise AnnotationError("an object has an empty <name>", name.line)
    other = next((child.tag for child in element.children if child.tag in ("polygon", "robndbox")), "")
    if other and not element.first("bndbox"):
        raise AnnotationError(f"<object> has no <bndbox>, but a <{other}>, which is not read", element.line)
    box = _child(element, "bndbox")
    if len(element.all("bndbox")) > 1:
        raise AnnotationError("an <object> has more than one <bndbox>", element.all("bndbox")[1].line)
    xmin, ymin, xmax, ymax = (_number(_child(box, key)) for key in ("xmin", "ymin", "xmax", "ymax"))
    attributes = _attributes(element)
    rotation = attributes.get("rotation")
    return RawObject(
        around((xmin - 1, ymin - 1, xmax, ymax), _number(rotation) if rotation else 0),
        name.text,
        difficult=_flag(element.first("difficult")),
        crowd=_flag(element.first("crowd")) or _flag(attributes.get("is_crowd")),
        line=box.line,
        label_line=name.line,
    )


def _attributes(element: Element) -> dict[str, Element]:
    """What CVAT and Datumaro say of an object beyond the format: name -> its value."""
    found = {}
    for attribute in (child for group in element.all("attributes") for child in group.all("attribute")):
        name, value = attribute.first("name"), attribute.first("value")
        if name and value:
            found[name.text] = value
    return found


def _child(element: Element, tag: str) -> Element:
    child = element.first(tag)
    if child is None:
        raise AnnotationError(f"<{element.tag}> has no <{tag}>", element.line)
    return child


def _number(element: Element) -> float:
    try:
        return float(element.text)
    except ValueError:
        raise AnnotationError(f"<{element.tag}> is no number: {element.text!r}", element.line) from None


def _flag(element: Element | None) -> bool:
    text = element.text.lower() if element else ""
    if element and text not in _TRUE | _FALSE:
        raise AnnotationError(f"<{element.tag}> is neither 0 nor 1: {element.text!r}", element.line)
    return text in _TRUE
