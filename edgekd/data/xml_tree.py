"""XML with line numbers, and without the parts of XML that let a small file exhaust a machine."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from edgekd.artifact import stand_in
from edgekd.data.layout import read_regular

_MAX_BYTES = 32 << 20
_MAX_DEPTH = 64


class XmlError(ValueError):
    """The file is no XML that edgekd reads; `line` is 1-based, None if it concerns the whole file."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class Element:
    """One element: its tag, its own text (stripped at the ends), its children in order, its 1-based line."""

    tag: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        """The direct children with this tag."""
        return [child for child in self.children if child.tag == tag]

    def first(self, tag: str) -> Element | None:
        """The first direct child with this tag."""
        return next((child for child in self.children if child.tag == tag), None)

    def walk(self) -> Iterator[Element]:
        """The element and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def parse_xml(path: Path) -> Element:
    """Parse a file into its root element. Entity declarations are refused, unread.

    Raises:
        XmlError: empty, too large, too deep, malformed, or with entity declarations.
        OSError: the file cannot be read.
    """
    data = read_regular(path)
    if not data.strip():
        raise XmlError("the file is empty")
    if len(data) > _MAX_BYTES:
        raise XmlError(f"the file has {len(data):,} bytes; annotations over 32 MiB are refused")
    data, encoding = _readable(data)
    parser = expat.ParserCreate(encoding)
    parser.buffer_text = True
    builder = _Builder(parser)
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.text
    parser.EntityDeclHandler = builder.entity
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        if found := stand_in(path):
            raise XmlError(f"{found[0]}: {found[1]}") from error
        raise XmlError(
            f"malformed XML: {expat.ErrorString(error.code)}{_doubt(data, encoding)}", error.lineno
        ) from error
    except (ValueError, LookupError) as error:
        if isinstance(error, XmlError):
            raise
        raise XmlError(f"its encoding is not understood: {error}", 1) from error
    assert builder.root is not None  # expat has refused documents without a root element
    return builder.root


def _readable(data: bytes) -> tuple[bytes, str | None]:
    """The bytes, and their encoding where expat is not to believe the declaration: it knows no multi-byte encodings
    (GBK, Shift-JIS), and .NET declares UTF-16 in files of UTF-8."""
    declared = re.match(
        rb"""\s*<\?xml[^>]*\sencoding\s*=\s*["']([\w.-]+)""", data
    )  # in UTF-16 proper, this finds nothing
    if not declared:
        return data, None
    name = declared[1].decode()
    try:
        codec = codecs.lookup(name).name
    except LookupError:
        return data, None
    if codec.startswith("utf-16"):
        return data, "utf-8"
    if codec.startswith(("utf", "iso8859", "ascii", "cp125", "koi8")):
        return data, None
    try:
        return data.decode(codec).encode(), "utf-8"
    except (UnicodeError, LookupError) as error:
        raise XmlError(f"its encoding is not understood: declared {name}, but {error}", 1) from error


def _doubt(data: bytes, encoding: str | None) -> str:
    """A likely reason for what looks malformed."""
    if encoding is None and not re.search(rb"<\?xml[^>]*encoding", data[:200]):
        try:
            data.decode()
        except UnicodeDecodeError as error:
            if not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return f"; byte {error.start} is no UTF-8, and no other encoding is declared"
    return ""


class _Builder:
    def __init__(self, parser: expat.XMLParserType) -> None:
        self.parser = parser
        self.root: Element | None = None
        self.open: list[Element] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, self.parser.CurrentLineNumber)
        if len(self.open) >= _MAX_DEPTH:
            raise XmlError(f"more than {_MAX_DEPTH} levels of elements", element.line)
        if self.open:
            self.open[-1].children.append(element)
        else:
            self.root = element
        self.open.append(element)

    def end(self, tag: str) -> None:
        element = self.open.pop()
        element.text = element.text.strip()

    def text(self, text: str) -> None:
        self.open[-1].text += text

    def entity(self, *declaration: object) -> None:
        raise XmlError("entity declarations are refused", self.parser.CurrentLineNumber)
