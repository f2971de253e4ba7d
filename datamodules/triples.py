"""Triples in MS MARCO's form: a file of query<TAB>positive<TAB>negative, with more negatives behind if there are."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from datamodules.base import LoaderArguments
from datamodules.files import LineFile, line_error
from datamodules.rows import Row, RowDataModule


class TripleRows:
    """Rows of a triples file, plain or .gz.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path):
        self.lines = LineFile(path)
        self.name = self.lines.path.name

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Row:
        line = self.lines.line(index)
        fields = line.split("\t")
        if len(fields) < 2:
            raise line_error(self.lines.path, index + 1, "query<TAB>positive<TAB>negative", repr(line))
        return Row(fields[0], [fields[1]], fields[2:])

    def place(self, index: int) -> str:
        return f"{self.lines.path} line {index + 1}"


class TriplesDataModule(RowDataModule):
    """Trains on a triples file.

    Args:
        path: a file of tab-separated query, positive and negatives, plain or .gz. A plain file stays on disk.
        negatives, eval_path: see RowDataModule.
        loader: the keywords of RetrievalDataModule.
    """

    def __init__(
        self,
        path: str,
        *,
        negatives: int | None = None,
        eval_path: str | None = None,
        **loader: Unpack[LoaderArguments],
    ):
        super().__init__(negatives=negatives, eval_path=eval_path, **loader)
        self.path = path

    def open_rows(self) -> TripleRows:
        """Opens the file."""
        return TripleRows(self.path)
