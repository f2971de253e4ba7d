"""Writes a report as Markdown, with its figures as files beside it."""

from __future__ import annotations

from reporting.document import Block, Commands, Picture, Points, Report, Settings, Table

FIGURES = "figures"


def markdown(report: Report) -> str:
    """The whole report as GitHub's Markdown; pictures are ``figures/NAME.png``."""
    parts = [f"# {report.title}", _escaped(report.about)]
    if report.settings:
        parts.append(_escaped(report.settings))
    if report.findings:
        parts.append(_list(report.findings))
    for section in report.sections:
        parts.append(f"## {section.title}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Picture):
        return f"![{_escaped(block.alt)}]({FIGURES}/{block.name}.png)\n\n{_escaped(block.caption)}"
    if isinstance(block, Settings):
        return "\n\n".join(map(_escaped, block.lines()))
    if isinstance(block, Points):
        return _list(block.lines)
    if isinstance(block, Commands):
        return "\n".join(f"    {line}" for line in block.lines)
    return _escaped(block)


def _table(table: Table) -> str:
    head = _row([_escaped(column.title) for column in table.columns])
    rule = _row(["---:" if column.numeric else "---" for column in table.columns])
    rows = [_row([_escaped(cell) for cell in row]) for row in table.cells()]
    return "\n".join([f"**{_escaped(table.caption)}**", "", head, rule, *rows])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
    """Text of runs that would otherwise be read as a cell's border, a tag or emphasis."""
    for mark in "\\|*`[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("<", "&lt;").split())
