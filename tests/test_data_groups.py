"""Groups of documents (translations of one passage): judgements, negatives, evaluation; the bundled SQuAD and XQuAD."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
import torch

from datamodules.beir import load_collection
from datamodules.beir_module import BeirDataModule
from datamodules.examples import make_train_batch
from datamodules.groups import group_of, member_of, related_qrels, with_groups
from retrieval.evaluate import effectiveness, evaluate_bm25, open_collection
from tests.data_helpers import ROOT, loader_arguments, words, write_lines

SHARED = ROOT.parent / "shared" / "data"
LANGUAGES = "ar de el en es hi ro ru th tr vi zh".split()


def write_passages(folder, passages: int = 6, languages=("de", "en")):
    """Passage p<i> in each language; question q<i> of each split and language asks for it in its own language."""
    ids = [(f"p{i}/{language}", words(10 * i + k, 8)) for i in range(passages) for k, language in enumerate(languages)]
    write_lines(folder / "corpus.jsonl", [json.dumps({"_id": name, "text": text}) for name, text in ids])
    splits = ("train", "dev", "test")
    asked = [(f"{split}{i}/{language}", i, language) for split in splits for i in range(passages) for language in languages]
    write_lines(folder / "queries.jsonl", [json.dumps({"_id": name, "text": words(7 * i, 4)}) for name, i, _ in asked])
    for split in splits:
        rows = [f"{name}\tp{i}/{language}\t1" for name, i, language in asked if name.startswith(split)]
        write_lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_passages(tmp_path / "passages")


def module(folder, **arguments) -> BeirDataModule:
    arguments = {"group_separator": "/"} | arguments
    return BeirDataModule(folder, **loader_arguments(), **arguments)


def test_an_id_is_cut_at_the_last_separator():
    assert [group_of(name, "/") for name in ("a/p1/de", "p1/de", "p1", "/de")] == ["a/p1", "p1", "p1", "/de"]
    assert [member_of(name, "/") for name in ("a/p1/de", "p1/de", "p1", "/de")] == ["de", "de", "", ""]


def test_grades_spread_over_a_group_and_judged_members_keep_their_own():
    docs = ["p1/de", "p1/en", "p1/fr", "p2/de", "p2/en", "p3"]
    qrels = {"q": {"p1/en": 1, "p1/fr": 2, "p3": 1}, "none": {"p2/de": 0}}
    related = related_qrels(qrels, docs, "/")
    assert related == {"q": {"p1/de": 2, "p1/en": 1, "p1/fr": 2, "p3": 1}, "none": {"p2/de": 0}}
    assert qrels["q"] == {"p1/en": 1, "p1/fr": 2, "p3": 1}


def test_relevant_gives_pairs_across_languages_and_no_translation_is_a_negative(folder):
    data = module(folder)
    training = data.load_training()
    (source,) = training.sources
    assert len(source) == 6 * 2 * 2  # passages, languages of the question, languages of the passage
    positives = {(query[-2:], data.collection.doc_ids[doc][-2:]) for query, doc in source.pairs}
    assert positives == {("de", "de"), ("de", "en"), ("en", "de"), ("en", "en")}
    assert data.collection.qrels["test"]["test3/de"] == {"p3/de": 1, "p3/en": 1}
    chosen = [next(k for k, pair in enumerate(source.pairs) if pair == (f"train{i}/de", 2 * i)) for i in (2, 4)]
    across = next(k for k, pair in enumerate(source.pairs) if pair == ("train2/en", 4))
    examples = [source.example(k, random.Random(0)) for k in (*chosen, across)]
    batch = make_train_batch(examples, data.tokenize_query, data.tokenize_doc)
    # questions about passages 2, 4 and 2 again: the two translations of passage 2 are no negatives of each other
    assert batch.false_negatives.tolist() == [[False, False, True], [False, False, False], [True, False, False]]


def test_excluded_keeps_the_judgements_and_leaves_translations_out_of_the_negatives(folder):
    data = module(folder, same_group="excluded", negatives=3, negatives_depth=12)
    (source,) = data.load_training().sources
    assert len(source) == 6 * 2
    assert data.collection.qrels["test"]["test3/de"] == {"p3/de": 1}
    for index, (query, positive) in enumerate(source.pairs):
        example = source.example(index, random.Random(index))
        translations = {2 * (positive // 2), 2 * (positive // 2) + 1}
        assert example.relevant == translations, query
        assert not translations & set(example.doc_keys[1:])
    within = [k for k, (query, _) in enumerate(source.pairs) if query in ("train2/de", "train2/en")]
    batch = make_train_batch(
        [source.example(k, random.Random(0)) for k in within], data.tokenize_query, data.tokenize_doc
    )
    assert batch.false_negatives[0, 4] and batch.false_negatives[1, 0]
    assert not batch.false_negatives[0, 0] and not batch.false_negatives[1, 4]


@pytest.mark.parametrize("same_group", ["relevant", "excluded"])
def test_groups_of_joined_collections_stay_apart(folder, tmp_path, same_group):
    other = write_passages(tmp_path / "other", passages=4)
    data = module([folder, other], same_group=same_group)
    first, second = data.load_training().sources
    names = {data.collection.doc_ids[doc] for doc in first.relevant["passages/train1/de"]}
    assert names == {"passages/p1/de", "passages/p1/en"}
    assert {data.collection.doc_ids[doc] for doc in second.relevant["other/train1/de"]} == {"other/p1/de", "other/p1/en"}
    assert data.collection.group_separator == "/"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_separator": "|"}, "data.group_separator: expected text that ids such as 'p0/de' contain, got '|'"),
        ({"group_separator": ""}, "data.group_separator: expected text"),
        ({"same_group": "related"}, "data.same_group: expected one of relevant, excluded, got 'related'"),
        ({"title_pairs": 0.5}, "data.title_pairs: expected 0 with data.group_separator"),
    ],
)
def test_wrong_options_are_one_line(folder, arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        module(folder, **arguments).load_training()
    assert "\n" not in str(caught.value)


def test_effectiveness_of_each_language(folder):
    collection = open_collection(folder, "/")
    qrels = {"a/de": {"p1/de": 1, "p1/en": 1}, "b/en": {"p2/de": 1, "p2/en": 1}, "c/en": {"p3/de": 1}}
    run = {"a/de": {"p1/de": 2.0, "p1/en": 1.0}, "b/en": {"p1/de": 3.0}, "c/en": {"p3/de": 1.0}}
    figures = effectiveness(collection, qrels, run)
    assert figures["ndcg@10/de"] == pytest.approx(1.0) and figures["ndcg@10/en"] == pytest.approx(0.5)
    assert figures["ndcg@10"] == pytest.approx(2 / 3)
    assert "ndcg@10/de" not in effectiveness(replace(collection, group_separator=None), qrels, run)
    assert set(evaluate_bm25(collection, "test")[0]) >= {"ndcg@10/de", "ndcg@10/en"}


def test_questions_about_one_paragraph_are_no_negatives_of_each_other():
    data = BeirDataModule(ROOT / "data" / "squad", **loader_arguments())
    (source,) = data.load_training().sources
    paragraph = source.pairs[0][1]
    same = [k for k, (_, doc) in enumerate(source.pairs) if doc == paragraph][:2]
    other = next(k for k, (_, doc) in enumerate(source.pairs) if doc != paragraph)
    batch = make_train_batch(
        [source.example(k, random.Random(0)) for k in (*same, other)], data.tokenize_query, data.tokenize_doc
    )
    expected = torch.tensor([[False, True, False], [True, False, False], [False, False, False]])
    assert torch.equal(batch.false_negatives, expected)


def test_bundled_squad():
    collection = load_collection(ROOT / "data" / "squad")
    assert len(collection.doc_ids) == 1043 and len(collection.queries) == 7520
    assert {s: len(q) for s, q in collection.qrels.items()} == {"train": 4945, "dev": 635, "test": 1940}


def test_bundled_xquad():
    collection = load_collection(ROOT / "data" / "xquad")
    assert len(collection.doc_ids) == 12 * 240 and len(collection.queries) == 12 * 1190
    assert {s: len(q) for s, q in collection.qrels.items()} == {"train": 12 * 676, "dev": 12 * 140, "test": 12 * 374}
    for name in (*collection.doc_ids, *collection.queries):
        assert member_of(name, "/") in LANGUAGES
    for judged in collection.qrels.values():  # in the files a question asks for the paragraph in its own language
        for query, grades in judged.items():
            assert [member_of(doc, "/") for doc in grades] == [member_of(query, "/")] and set(grades.values()) == {1}
    splits = [{group_of(d, "/") for grades in q.values() for d in grades} for q in collection.qrels.values()]
    assert sum(map(len, splits)) == len(set.union(*splits))  # no paragraph in two splits
    test = with_groups(collection, "/").qrels["test"]
    assert all(len(grades) == 12 for grades in test.values())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the collections that data/ was made from are not here")
@pytest.mark.parametrize("language", LANGUAGES)
def test_bundled_xquad_says_what_its_source_says(language):
    bundled, source = load_collection(ROOT / "data" / "xquad"), load_collection(SHARED / f"xquad-{language}")

    def renamed(name: str) -> str:
        return name.removeprefix(f"{language}-") + f"/{language}"

    documents = dict(zip(bundled.doc_ids, bundled.documents(), strict=True))
    assert [documents[renamed(name)] for name in source.doc_ids] == source.documents()
    assert all(bundled.queries[renamed(name)] == text for name, text in source.queries.items())
    for split, judged in source.qrels.items():
        for query, grades in judged.items():
            assert bundled.qrels[split][renamed(query)] == {renamed(doc): grade for doc, grade in grades.items()}
