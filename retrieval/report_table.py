"""The table that ends a training run or an evaluation: one row per system, one column per figure."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

# key of the figure -> heading, digits after the point
COLUMNS = {
    "ndcg@10": ("nDCG@10", 3),
    "mrr@10": ("MRR@10", 3),
    "recall@100": ("recall@100", 3),
    "active_dims_query": ("active dims query", 1),
    "active_dims_doc": ("active dims doc", 1),
    "flops": ("FLOPS", 2),
}


def results_table(rows: Mapping[str, Mapping[str, float]], title: str | None = None) -> Table:
    """A table of ``rows``: name of the system -> figures; "-" where a system lacks one.

    Args:
        rows: in the order to show, for example ``BM25``, ``untrained``, ``trained``.
        title: stands above.
    """
    table = Table(title=title)
    table.add_column("")
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right")
    for name, figures in rows.items():
        cells = (f"{figures[key]:.{digits}f}" if key in figures else "-" for key, (_, digits) in COLUMNS.items())
        table.add_row(name, *cells)
    return table
