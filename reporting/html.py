"""Writes a report as one HTML page that needs nothing else: no script, no network, figures inside."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping
from pathlib import Path

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
except ImportError as error:
    raise SystemExit(f"report.py needs jinja2 ({error}): pip install -c constraints.txt -e '.[report]'") from error

from reporting.document import Block, Report, Section, Table
from reporting.style import FILE_DPI, PAGE_DPI

TEMPLATE = "report.html.j2"


def html(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The whole page; ``pictures`` has a PNG for each picture's name."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"kind": _kind, "anchor": _anchor}
    environment.tests["across"] = _across
    images = {name: _image(png) for name, png in pictures.items()}
    return environment.get_template(TEMPLATE).render(report=report, images=images)


def _image(png: bytes) -> dict[str, str | int]:
    """Source and size on the page, in CSS pixels, of a picture with more pixels than that."""
    width, height = struct.unpack(">II", png[16:24])
    scale = PAGE_DPI / FILE_DPI
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return {"source": source, "width": round(width * scale), "height": round(height * scale)}


def _across(section: Section) -> bool:
    """Whether it is printed in landscape: a section of nothing but tables, one of them with many columns."""
    tables = [block for block in section.blocks if isinstance(block, Table)]
    return len(tables) == len(section.blocks) and any(len(table.columns) > 13 for table in tables)


def _kind(block: Block) -> str:
    return type(block).__name__.lower()


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
