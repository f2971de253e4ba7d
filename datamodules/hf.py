"""Hugging Face data sets, on disk or by id, with columns for query, positive and negatives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from datamodules.base import LoaderArguments
from datamodules.rows import Row, RowDataModule

if TYPE_CHECKING:
    from datasets import Dataset


def load_dataset(path: str, name: str | None, split: str) -> Dataset:
    """One split of a data set.

    Args:
        path: a folder written by ``save_to_disk``, or else an id on the hub (or anything ``datasets`` loads).
        name: the configuration of a data set by id.
        split: which split; a folder that holds a single split ignores it.

    Raises:
        ValueError: if ``datasets`` is not installed, the data set cannot be had, or there is no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data=hf: expected the package 'datasets', got none installed; pip install datasets, or convert the data"
            " to data=hard_negatives"
        ) from error
    try:
        loaded = datasets.load_from_disk(path) if Path(path).is_dir() else datasets.load_dataset(path, name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"data.path: expected a folder written by save_to_disk or the id of a reachable data set, got '{path}'"
            f" ({reason}); save it with datasets.load_dataset(...).save_to_disk(folder) where there is a network"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"data.split: expected one of {sorted(loaded)}, got '{split}'; set data.split")
        return loaded[split]
    return loaded


class DatasetRows:
    """Rows of a data set.

    Args:
        dataset: anything with ``column_names``, ``len()`` and rows that are dictionaries.
        name: for messages.
        query: column of the query.
        positive: column of a relevant text or a list of them.
        negative: column of a text or a list of them; None if there are no negatives.

    Raises:
        ValueError: if a column is missing.
    """

    def __init__(self, dataset: Dataset, name: str, query: str, positive: str, negative: str | None):
        columns = {"query": query, "positive": positive, "negative": negative}
        for role, column in columns.items():
            if column is not None and column not in dataset.column_names:
                raise ValueError(
                    f"data.{role}: expected one of the columns {dataset.column_names}, got '{column}';"
                    f" set data.{role}"
                )
        if not len(dataset):
            raise ValueError(f"data.path: expected at least one row in {name}, got none; choose another split")
        self.dataset = dataset
        self.name = name
        self.query = query
        self.positive = positive
        self.negative = negative

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> Row:
        entry = self.dataset[index]
        query = self._texts(entry, self.query, index)
        if len(query) != 1:
            raise ValueError(
                f"{self.place(index)}: expected one text in '{self.query}', got {len(query)}; split the row"
            )
        negatives = self._texts(entry, self.negative, index) if self.negative is not None else []
        return Row(query[0], self._texts(entry, self.positive, index), negatives)

    def place(self, index: int) -> str:
        return f"{self.name} row {index}"

    def _texts(self, entry: dict, column: str, index: int) -> list[str]:
        value = entry[column]
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{self.place(index)}: expected a text or a list of texts in '{column}', got {str(value)[:60]!r};"
                " correct the row or choose another column"
            )
        return texts


class HFDatasetDataModule(RowDataModule):
    """Trains on a data set of the ``datasets`` library.

    Args:
        path: a folder written by ``save_to_disk`` or an id.
        name: the configuration of a data set by id.
        split: the split to train on.
        query: column of the query.
        positive: column of a relevant text or a list of them.
        negative: column of a text or a list of them, or None.
        negatives, eval_path: see RowDataModule.
        loader: the keywords of RetrievalDataModule.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        query: str = "query",
        positive: str = "positive",
        negative: str | None = None,
        negatives: int | None = None,
        eval_path: str | None = None,
        **loader: Unpack[LoaderArguments],
    ):
        super().__init__(negatives=negatives, eval_path=eval_path, **loader)
        self.path = path
        self.dataset_name = name
        self.split = split
        self.columns = (query, positive, negative)

    def open_rows(self) -> DatasetRows:
        """Loads the data set."""
        dataset = load_dataset(self.path, self.dataset_name, self.split)
        return DatasetRows(dataset, Path(self.path).name, *self.columns)
