"""Reading lines of text files, plain or gzipped, with errors that name the file and the line."""

from __future__ import annotations

import gzip
import json
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path


def find_file(folder: Path, name: str) -> Path | None:
    """``folder/name`` or, where only that exists, ``folder/name.gz``; None if there is neither."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def line_error(path: Path, number: int, expected: str, got: str) -> ValueError:
    """The one-line error for a malformed line."""
    got = got if len(got) <= 60 else got[:57] + "..."
    return ValueError(f"{path} line {number}: expected {expected}, got {got}; correct or remove that line")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its end); the file is UTF-8 text, gzipped if its name ends in .gz.

    Raises:
        ValueError: for bytes that are not UTF-8, and for a broken gzip file.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, decode(path, number, line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} after line {number}: expected a complete gzip file, got '{error}'; fetch the file again"
        ) from error


def decode(path: Path, number: int, line: bytes) -> str:
    """One line as text without its end (LF or CRLF)."""
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise line_error(path, number, "UTF-8 text", f"byte 0x{line[error.start]:02x}") from error


def parse_object(path: Path, number: int, line: str) -> dict:
    """One JSON object.

    Raises:
        ValueError: if the line is anything else.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise line_error(path, number, f"a JSON object ({error.msg} at column {error.colno})", repr(line)) from error
    if not isinstance(value, dict):
        raise line_error(path, number, "a JSON object", repr(line))
    return value


class LineFile:
    """Random access to the lines of a text file.

    A plain file stays on disk and costs eight bytes a line; a gzipped one, which cannot be entered in the middle, is
    held in memory. The file is opened anew for every read, so that worker processes never share a position.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty or a broken gzip file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"data.path: expected a file, got {self.path}, which does not exist; correct data.path"
            )
        self._lines: list[str] | None = None
        self._offsets = array("q")
        if self.path.suffix == ".gz":
            self._lines = [line for _, line in read_lines(self.path)]
        else:
            position = 0
            with open(self.path, "rb") as lines:
                for line in lines:
                    self._offsets.append(position)
                    position += len(line)
        if not len(self):
            raise ValueError(f"data.path: expected a file with at least one line, got {self.path}, which is empty")

    def __len__(self) -> int:
        return len(self._offsets) if self._lines is None else len(self._lines)

    def line(self, index: int) -> str:
        """Line ``index`` (from 0) without its end."""
        if self._lines is not None:
            return self._lines[index]
        with open(self.path, "rb") as file:
            file.seek(self._offsets[index])
            return decode(self.path, index + 1, file.readline())
