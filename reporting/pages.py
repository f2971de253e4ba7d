"""Writes ``report.md``, ``figures/*.png`` and ``report.html`` of some runs into a folder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from reporting.style import STYLE  # first: without matplotlib it says which extra has it

from matplotlib import rc_context  # isort: skip

from reporting.build import build
from reporting.document import Picture
from reporting.html import html
from reporting.markdown import FIGURES, markdown
from reporting.runs import Run


def write_pages(runs: Sequence[Run], problems: Sequence[str], out: Path) -> list[Path]:
    """Writes the report and returns its two pages.

    Args:
        runs: finished or not, at least one.
        problems: a line for each run that could not be read.
        out: a folder; created where it is missing.
    """
    with rc_context(STYLE):
        report = build(runs, problems)
        blocks = [block for section in report.sections for block in section.blocks]
        pictures = {block.name: _png(block) for block in blocks if isinstance(block, Picture)}
    folder = out / FIGURES
    (folder if pictures else out).mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    pages = {out / "report.md": markdown(report), out / "report.html": html(report, pictures)}
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return list(pages)


def _png(picture: Picture) -> bytes:
    file = io.BytesIO()
    # Without the version and the date, so that the same runs give the same file.
    picture.drawing.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
