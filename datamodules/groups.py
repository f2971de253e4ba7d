"""Collections whose documents come in groups, such as the translations of one passage: "p12/de" is p12 in German."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from datamodules.beir import Collection, Qrels

SAME_GROUP = ("relevant", "excluded")


def group_of(name: str, separator: str) -> str:
    """What stands before the last ``separator`` in an id; the whole id where there is none."""
    return name.rpartition(separator)[0] or name


def member_of(name: str, separator: str) -> str:
    """What stands after the last ``separator`` in an id, for example a language; "" where there is none."""
    group, _, member = name.rpartition(separator)
    return member if group else ""


def related_qrels(qrels: Qrels, doc_ids: Sequence[str], separator: str) -> Qrels:
    """The judgements, with every relevant document's grade given to its whole group.

    A document that is judged itself keeps its own grade; of several graded documents of a group the others get the
    highest grade.

    Args:
        qrels: query id -> document id -> grade.
        doc_ids: all documents of the collection.
        separator: stands between a group and its member in an id.
    """
    members: dict[str, list[str]] = {}
    for doc_id in doc_ids:
        members.setdefault(group_of(doc_id, separator), []).append(doc_id)
    related: Qrels = {}
    for query_id, grades in qrels.items():
        spread: dict[str, int] = {}
        for judged, grade in sorted(grades.items(), key=lambda item: item[1]):
            if grade >= 1:
                spread |= dict.fromkeys(members[group_of(judged, separator)], grade)
        related[query_id] = spread | grades
    return related


def with_groups(collection: Collection, separator: str | None, same_group: str = "relevant") -> Collection:
    """The collection, its judgements spread over groups where ``same_group`` says so.

    Args:
        collection: as it was read.
        separator: stands between a group and its member in ids of documents and queries; None: there are no groups.
        same_group: what the other members of a relevant document's group are. ``relevant``: relevant too, in every
            split. ``excluded``: as the files judge them; training leaves them out of the negatives.

    Raises:
        ValueError: for an empty separator, one that no document's id has, or an unknown ``same_group``.
    """
    if same_group not in SAME_GROUP:
        raise ValueError(f"data.same_group: expected one of {', '.join(SAME_GROUP)}, got {same_group!r}; choose one")
    if separator is None:
        return collection
    if not separator or not any(separator in doc_id for doc_id in collection.doc_ids):
        raise ValueError(
            f"data.group_separator: expected text that ids such as {collection.doc_ids[0]!r} contain, got"
            f" {separator!r}; set data.group_separator=null where documents come alone"
        )
    qrels = collection.qrels
    if same_group == "relevant":
        qrels = {split: related_qrels(judged, collection.doc_ids, separator) for split, judged in qrels.items()}
    return replace(collection, qrels=qrels, group_separator=separator)
