"""A logger that keeps every metric in `<output_dir>/metrics.csv`, through resumption and crashes."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsCSV(Logger):
    """Appends one row per call to ``metrics.csv``, whose columns are the union of all names seen.

    Lightning's CSVLogger puts the file elsewhere, deletes an existing one and keeps up to 100 rows in memory. Here each
    row reaches the file before the call returns, rows of earlier runs in the folder stay, a line that a crash cut off
    is dropped, and a new column is added by replacing the file in one step. Numbers are written in full precision.

    Args:
        output_dir: folder of ``metrics.csv``; created with the first row.
    """

    def __init__(self, output_dir: str) -> None:
        super().__init__()
        self._dir = Path(output_dir)
        self._columns: list[str] | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self._dir / "metrics.csv"

    @property
    def name(self) -> str:
        """Empty: the file stands in the output folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the output folder is the version."""
        return ""

    @property
    def save_dir(self) -> str:
        """The output folder, where Lightning puts what has no place of its own."""
        return str(self._dir)

    @property
    def log_dir(self) -> str:
        """The output folder."""
        return str(self._dir)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the configuration is in ``.hydra/``."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Appends a row.

        Args:
            metrics: name to number (or to a tensor of one element); anything else, like a table, is left out.
            step: the step, the first column.
        """
        row = {name: number for name, value in metrics.items() if (number := _number(value)) is not None}
        if not row:
            return
        row["step"] = "" if step is None else int(step)
        if self._columns is None:
            self._columns = self._open()
        new = [name for name in row if name not in self._columns]
        if new:
            self._replace(self._rows(), self._columns + new)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            # One write of the whole line: a crash leaves it out or cuts it off, it never mixes two.
            file.write(_lines([row], self._columns))

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drops the rows from ``step`` on: a run resumed there will write them again."""
        if not self.path.exists():
            return
        if self._columns is None:
            self._columns = self._open()
        kept = [row for row in self._rows() if not row["step"].isdigit() or int(row["step"]) < step]
        self._replace(kept, self._columns)

    def _open(self) -> list[str]:
        """Makes the folder, drops a line that was cut off and returns the columns of the file, if there is one."""
        self._dir.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return ["step"]
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            _write_whole(self.path, whole)
        with self.path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), ["step"])

    def _rows(self) -> list[dict[str, str]]:
        """Reads what the file holds."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _replace(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        """Writes the file anew, with these columns, in one step."""
        header = {name: name for name in columns}
        _write_whole(self.path, _lines([header, *rows], columns).encode())
        self._columns = columns


def _write_whole(path: Path, content: bytes) -> None:
    """Replaces a file so that a crash leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _lines(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Renders rows as CSV."""
    buffer = io.StringIO()
    csv.DictWriter(buffer, columns, restval="", lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _number(value: Any) -> float | int | None:
    """Returns a number for a number or a tensor of one element, None for anything else."""
    if hasattr(value, "numel") and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, (int, float)) else None
