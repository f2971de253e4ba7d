"""Collections in the BEIR layout: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, plain or gzipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.files import find_file, line_error, parse_object, read_lines

Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgements.

    Attributes:
        name: the folder's name.
        doc_ids: ids of the documents, in the corpus file's order.
        titles: their titles, "" where there is none.
        texts: their texts without the title.
        queries: text of each query id, all splits together.
        qrels: split -> query id -> document id -> grade.
        group_separator: stands between group and member in ids (``datamodules/groups.py``); None: no groups.
    """

    name: str
    doc_ids: list[str]
    titles: list[str]
    texts: list[str]
    queries: dict[str, str]
    qrels: dict[str, Qrels]
    group_separator: str | None = None

    def documents(self) -> list[str]:
        """What is encoded for each document: title and text with a space between."""
        return [f"{title} {text}".strip() for title, text in zip(self.titles, self.texts, strict=True)]


def load_collection(path: str | Path) -> Collection:
    """Reads a BEIR folder and checks it.

    Args:
        path: folder with corpus.jsonl, queries.jsonl (each plain or .gz) and, for training and evaluation,
            qrels/<split>.tsv with the header ``query-id corpus-id score``.

    Raises:
        FileNotFoundError: if the folder, the corpus or the queries are missing.
        ValueError: for a malformed line, an empty text, an id used twice, qrels that name unknown ids, and a query
            of a split without a relevant document.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.path: expected a folder with corpus.jsonl, queries.jsonl and qrels/, got {folder}, which is no"
            " folder; correct data.path"
        )
    corpus_file, queries_file = (_require(folder, name) for name in ("corpus.jsonl", "queries.jsonl"))
    doc_ids, titles, texts = _read_corpus(corpus_file)
    queries = _read_queries(queries_file)
    known_docs = set(doc_ids)
    qrels_folder = folder / "qrels"
    qrels_files = sorted(qrels_folder.glob("*.tsv")) + sorted(qrels_folder.glob("*.tsv.gz"))
    qrels = {file.name.split(".tsv")[0]: _read_qrels(file, queries, known_docs) for file in qrels_files}
    return Collection(folder.resolve().name, doc_ids, titles, texts, queries, qrels)


def merge_collections(collections: Sequence[Collection]) -> Collection:
    """One collection of several; every id is prefixed with its collection's name and a slash.

    Raises:
        ValueError: if two collections share a name.
    """
    names = [collection.name for collection in collections]
    if len(set(names)) < len(names):
        raise ValueError(
            f"data.path: expected folders of different names, because ids are prefixed with them, got {names};"
            " rename one"
        )
    merged = Collection("+".join(names), [], [], [], {}, {}, collections[0].group_separator)
    for part in collections:
        prefix = f"{part.name}/"
        merged.doc_ids.extend(prefix + doc_id for doc_id in part.doc_ids)
        merged.titles.extend(part.titles)
        merged.texts.extend(part.texts)
        merged.queries.update((prefix + query_id, text) for query_id, text in part.queries.items())
        for split, judged in part.qrels.items():
            merged.qrels.setdefault(split, {}).update(prefix_qrels(prefix, judged))
    return merged


def prefix_qrels(prefix: str, qrels: Qrels) -> Qrels:
    """The same judgements with ``prefix`` before every id."""
    return {
        prefix + query_id: {prefix + doc_id: grade for doc_id, grade in grades.items()}
        for query_id, grades in qrels.items()
    }


def _require(folder: Path, name: str) -> Path:
    found = find_file(folder, name)
    if found is None:
        present = sorted(entry.name for entry in folder.iterdir())[:5]
        raise FileNotFoundError(
            f"data.path: expected {name} or {name}.gz in {folder}, got {', '.join(present) or 'an empty folder'};"
            " point data.path at a BEIR folder"
        )
    return found


def _text_field(path: Path, number: int, entry: dict, key: str, default: str | None = None) -> str:
    value = entry.get(key, default)
    if key == "_id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or (key == "_id" and not value):
        raise line_error(path, number, f"text under the key '{key}'", repr(value) if key in entry else "no such key")
    return value


def _read_corpus(path: Path) -> tuple[list[str], list[str], list[str]]:
    doc_ids: list[str] = []
    titles: list[str] = []
    texts: list[str] = []
    known: set[str] = set()
    for number, line in read_lines(path):
        entry = parse_object(path, number, line)
        doc_id = _text_field(path, number, entry, "_id")
        title = _text_field(path, number, entry, "title", "")
        text = _text_field(path, number, entry, "text", "")
        if not title.strip() and not text.strip():
            raise line_error(path, number, "a title or a text", f"document '{doc_id}' with neither")
        if doc_id in known:
            raise line_error(path, number, "an id of its own for each document", f"'{doc_id}' a second time")
        known.add(doc_id)
        doc_ids.append(doc_id)
        titles.append(title)
        texts.append(text)
    if not doc_ids:
        raise ValueError(f"data.path: expected at least one document in {path}, got an empty file; fetch it again")
    return doc_ids, titles, texts


def _read_queries(path: Path) -> dict[str, str]:
    queries: dict[str, str] = {}
    for number, line in read_lines(path):
        entry = parse_object(path, number, line)
        query_id = _text_field(path, number, entry, "_id")
        text = _text_field(path, number, entry, "text", "")
        if not text.strip():
            raise line_error(path, number, "a text", f"query '{query_id}' with none")
        if query_id in queries:
            raise line_error(path, number, "an id of its own for each query", f"'{query_id}' a second time")
        queries[query_id] = text
    if not queries:
        raise ValueError(f"data.path: expected at least one query in {path}, got an empty file; fetch it again")
    return queries


def _read_qrels(path: Path, queries: dict[str, str], known_docs: set[str]) -> Qrels:
    qrels: Qrels = {}
    unknown: list[str] = []
    for number, line in read_lines(path):
        fields = line.split("\t")
        if number == 1:
            if fields != ["query-id", "corpus-id", "score"]:
                raise line_error(path, 1, "the header query-id<TAB>corpus-id<TAB>score", repr(line))
            continue
        if len(fields) != 3:
            raise line_error(path, number, "three fields with tabs between", f"{len(fields)}: {line!r}")
        query_id, doc_id, score = fields
        try:
            grade = int(score)
        except ValueError as error:
            raise line_error(path, number, "a whole number as score", repr(score)) from error
        if query_id not in queries:
            unknown.append(f"query '{query_id}' in line {number}")
        elif doc_id not in known_docs:
            unknown.append(f"document '{doc_id}' in line {number}")
        else:
            qrels.setdefault(query_id, {})[doc_id] = grade
    if unknown:
        raise ValueError(
            f"{path}: expected ids of the corpus and the queries, got {len(unknown)} unknown, the first:"
            f" {unknown[0]}; use qrels made for these files"
        )
    if not qrels:
        raise ValueError(f"{path}: expected at least one judgement, got none; remove the file or fetch it again")
    for query_id, grades in qrels.items():
        if max(grades.values()) < 1:
            raise ValueError(
                f"{path}: expected a document with score >= 1 for every query, got none for query '{query_id}';"
                " remove its lines"
            )
    return qrels
