"""Hard negatives in JSON lines, with a teacher's scores where there are some."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from datamodules.base import LoaderArguments
from datamodules.files import LineFile, line_error, parse_object
from datamodules.rows import Row, RowDataModule


class HardNegativeRows:
    """Rows of a file of {"query", "pos", "neg", "pos_scores", "neg_scores"} objects, plain or .gz.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path):
        self.lines = LineFile(path)
        self.name = self.lines.path.name

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Row:
        path, number = self.lines.path, index + 1
        entry = parse_object(path, number, self.lines.line(index))
        query = entry.get("query")
        if not isinstance(query, str):
            raise line_error(path, number, "text under the key 'query'", repr(query))
        texts: dict[str, list[str]] = {}
        for key in ("pos", "neg"):
            texts[key] = entry.get(key, [])
            if not isinstance(texts[key], list) or not all(isinstance(text, str) for text in texts[key]):
                raise line_error(path, number, f"a list of texts under the key '{key}'", repr(texts[key]))
        return Row(query, texts["pos"], texts["neg"], self._scores(entry, texts, number))

    def place(self, index: int) -> str:
        return f"{self.lines.path} line {index + 1}"

    def _scores(self, entry: dict, texts: dict[str, list[str]], number: int) -> list[float] | None:
        """Scores of positives, then of negatives; None if the row has neither key (or null under both)."""
        given = {key: entry.get(f"{key}_scores") for key in ("pos", "neg")}
        if all(value is None for value in given.values()):
            return None
        for key, value in given.items():
            value = [] if value is None else value
            if not isinstance(value, list) or len(value) != len(texts[key]) or not all(map(_is_number, value)):
                raise line_error(
                    self.lines.path, number, f"{len(texts[key])} numbers under the key '{key}_scores'", repr(value)
                )
        return [float(score) for value in given.values() for score in value or []]


class HardNegativesDataModule(RowDataModule):
    """Trains on a file of hard negatives; with scores, batches carry them for MarginMSE and KL distillation.

    Args:
        path: a JSON-lines file, plain or .gz. A plain file stays on disk.
        negatives: negatives drawn for each example; None takes as many as every line has.
        eval_path: see RowDataModule.
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

    def open_rows(self) -> HardNegativeRows:
        """Opens the file."""
        return HardNegativeRows(self.path)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
