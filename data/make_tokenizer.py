"""Makes data/tiny and data/multilingual: lower-cased WordPiece tokenizers of the bundled collections.

Run from the repository root: ``python data/make_tokenizer.py`` makes data/tiny, 16,000 words of SciFact's corpus and
training queries; with ``--multilingual``, data/multilingual, 32,000 words of the train split of data/xquad. Two runs
give identical files. The trainer of the ``tokenizers`` library breaks ties by hash order, which differs from run to run,
so the merges are chosen here. Test queries are never read into the vocabulary.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).resolve().parent
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PREFIX = "##"
MIN_CHARACTER_COUNT = 3  # rarer characters become [UNK]


def open_text(path: Path) -> TextIO:
    """``path`` or, where only that exists, ``path.gz``, opened to read text."""
    if path.exists():
        return open(path, encoding="utf-8")
    return gzip.open(path.with_name(path.name + ".gz"), "rt", encoding="utf-8")


def read_texts(collection: Path, *, train_documents: bool = False) -> Iterator[str]:
    """Titles and texts of the corpus, then the queries that occur in the training qrels.

    Args:
        collection: a BEIR folder.
        train_documents: leaves out documents that the training qrels don't name.
    """
    with open_text(collection / "qrels" / "train.tsv") as lines:
        rows = [line.split("\t") for line in lines][1:]
    train_queries, judged = {row[0] for row in rows}, {row[1] for row in rows}
    with open_text(collection / "corpus.jsonl") as lines:
        for document in map(json.loads, lines):
            if not train_documents or document["_id"] in judged:
                yield f"{document.get('title', '')} {document['text']}"
    with open_text(collection / "queries.jsonl") as lines:
        for query in map(json.loads, lines):
            if query["_id"] in train_queries:
                yield query["text"]


def count_words(texts: Iterable[str], tokenizer: Tokenizer) -> Counter[str]:
    """How often each word occurs after the tokenizer's own normalisation and word splitting."""
    counts: Counter[str] = Counter()
    for text in texts:
        normalized = tokenizer.normalizer.normalize_str(text)
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized))
    return counts


def learn_vocabulary(word_counts: Counter[str], size: int) -> list[str]:
    """Byte-pair merges over characters until ``size`` pieces exist; equal counts go in alphabetical order.

    Pieces that continue a word carry the prefix ``##``. A heap keeps the pairs by count; entries whose count has
    changed since they were pushed are skipped.
    """
    characters: Counter[str] = Counter()
    for word, count in word_counts.items():
        for character in word:
            characters[character] += count
    alphabet = {c for c, count in characters.items() if count >= MIN_CHARACTER_COUNT}
    words = sorted(word for word in word_counts if set(word) <= alphabet)
    pieces = [[word[0]] + [PREFIX + c for c in word[1:]] for word in words]
    vocabulary = SPECIAL_TOKENS + sorted(alphabet) + [PREFIX + c for c in sorted(alphabet)]
    known = set(vocabulary)

    pair_counts: Counter[tuple[str, str]] = Counter()
    words_with: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, symbols in enumerate(pieces):
        for pair in zip(symbols, symbols[1:], strict=False):
            pair_counts[pair] += word_counts[words[index]]
            words_with[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    while len(vocabulary) < size and heap:
        negative_count, pair = heapq.heappop(heap)
        if pair_counts[pair] != -negative_count or negative_count == 0:
            continue
        merged = pair[0] + pair[1].removeprefix(PREFIX)
        if merged not in known:
            known.add(merged)
            vocabulary.append(merged)
        changed: set[tuple[str, str]] = set()
        for index in words_with.pop(pair):
            old, count = pieces[index], word_counts[words[index]]
            new = merge_pair(old, pair, merged)
            pieces[index] = new
            for neighbours in zip(old, old[1:], strict=False):
                pair_counts[neighbours] -= count
                changed.add(neighbours)
            for neighbours in zip(new, new[1:], strict=False):
                pair_counts[neighbours] += count
                words_with[neighbours].add(index)
                changed.add(neighbours)
        for neighbours in changed:
            heapq.heappush(heap, (-pair_counts[neighbours], neighbours))
    return vocabulary


def merge_pair(symbols: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    """``symbols`` with every occurrence of ``pair``, from the left, replaced by ``merged``."""
    result: list[str] = []
    position = 0
    while position < len(symbols):
        if position + 1 < len(symbols) and (symbols[position], symbols[position + 1]) == pair:
            result.append(merged)
            position += 2
        else:
            result.append(symbols[position])
            position += 1
    return result


def build_tokenizer(collection: Path, size: int, *, multilingual: bool = False) -> Tokenizer:
    """The tokenizer with BERT's normalisation and its [CLS] text [SEP] template.

    Args:
        collection: a BEIR folder.
        size: words of the vocabulary, special tokens included.
        multilingual: reads the documents of the train split alone, and keeps accents, which BERT strips when it
            lower-cases: the vowels of Hindi and Thai and the tones of Vietnamese are such marks. A Thai sentence is
            written without spaces, one word of up to 1,000 characters here.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False if multilingual else None)
    tokenizer = Tokenizer(models.WordPiece(vocab={}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    vocabulary = learn_vocabulary(count_words(read_texts(collection, train_documents=multilingual), tokenizer), size)
    ids = {token: index for index, token in enumerate(vocabulary)}
    longest = 1000 if multilingual else 100
    tokenizer.model = models.WordPiece(
        vocab=ids, unk_token="[UNK]", continuing_subword_prefix=PREFIX, max_input_chars_per_word=longest
    )
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def main() -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--multilingual", action="store_true", help="data/multilingual from data/xquad")
    parser.add_argument("--collection", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--size", type=int)
    arguments = parser.parse_args()
    multilingual = arguments.multilingual
    collection = arguments.collection or HERE / ("xquad" if multilingual else "scifact")
    output = arguments.output or HERE / ("multilingual" if multilingual else "tiny")
    size = arguments.size or (32_000 if multilingual else 16_000)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(collection, size, multilingual=multilingual)
    tokenizer.save(str(output / "tokenizer.json"), pretty=not multilingual)
    config = {
        "tokenizer_class": "BertTokenizerFast",
        "do_lower_case": True,
        "model_max_length": 512,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    } | ({"strip_accents": False} if multilingual else {})
    text = json.dumps(config, indent=2) + "\n"
    (output / "tokenizer_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
