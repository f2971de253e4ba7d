"""What each data module trains and validates on, and its errors."""

from __future__ import annotations

import gzip
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch

from datamodules.beir import load_collection
from datamodules.beir_module import BeirDataModule, split_train_dev
from datamodules.collate import TextTokenizer, TrainBatch
from datamodules.examples import LabelledPairs, TitlePairs
from datamodules.hard_negatives import HardNegativesDataModule
from datamodules.hf import HFDatasetDataModule
from datamodules.pool import build_pool
from datamodules.synthetic import SyntheticDataModule, read_lengths
from datamodules.triples import TriplesDataModule
from tests.data_helpers import ROOT, bundled_tokenizer, loader_arguments, words, write_collection, write_lines


@pytest.fixture
def folder(tmp_path):
    return write_collection(tmp_path / "small")


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_dev_split_is_a_fixed_hash_of_the_query_id():
    split = split_train_dev(load_collection(ROOT / "data" / "scifact"))
    assert split.derived and len(split.dev) == 74 and len(split.train) == 735
    assert sorted(split.dev, key=int)[:5] == ["2", "30", "52", "74", "155"]


def test_dev_file_is_used_where_there_is_one(tmp_path):
    split = split_train_dev(load_collection(write_collection(tmp_path / "c", splits=("train", "dev", "test"))))
    assert not split.derived and len(split.train) == len(split.dev) == 20


def test_neither_train_nor_dev(tmp_path):
    module = BeirDataModule(write_collection(tmp_path / "c", splits=("test",)), **loader_arguments())
    assert module.test_split == "test"
    with pytest.raises(ValueError) as caught:
        module.setup("fit")
    assert "expected qrels/train.tsv or qrels/dev.tsv in c" in one_line(caught)


def test_dev_alone_trains_on_titles_only(tmp_path):
    path = write_collection(tmp_path / "c", splits=("dev",))
    with pytest.raises(ValueError, match="got only a dev split; set data.title_pairs=1"):
        BeirDataModule(path, title_pairs=0.5, **loader_arguments()).setup("fit")
    module = BeirDataModule(path, title_pairs=1, **loader_arguments())
    assert next(iter(module.train_dataloader())).query.input_ids.shape[0] == 4


def test_judgements_of_the_test_split_change_nothing(folder, tmp_path):
    def everything(path):
        module = BeirDataModule(path, title_pairs=0.5, negatives=2, **loader_arguments())
        batches = [(batch.doc.input_ids, batch.false_negatives) for batch in module.train_dataloader()]
        return batches, module.val_query_ids, module.val_doc_ids, module.val_qrels

    first = everything(folder)
    write_lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", "test0\td9\t1"])
    second = everything(folder)
    assert first[1:] == second[1:]
    assert all(torch.equal(a, b) for x, y in zip(first[0], second[0], strict=True) for a, b in zip(x, y, strict=True))


def test_labelled_and_title_pairs(folder):
    collection = load_collection(folder)
    labelled = LabelledPairs(collection, collection.documents(), collection.qrels["train"])
    example = labelled.example(0, random.Random(0))
    assert example.query == collection.queries["train0"]
    assert example.docs == [f"{collection.titles[0]} {collection.texts[0]}"] and example.relevant == {0, 1}
    titles = TitlePairs(collection, range(len(collection.doc_ids)), 3)
    example = titles.example(4, random.Random(0))
    assert example.query == collection.titles[4] and example.docs[0] == collection.texts[4]
    assert collection.titles[4] not in example.docs[0]
    assert len(set(example.doc_keys)) == 4 and example.relevant == {4}
    arguments = loader_arguments()
    assert len(labelled.lengths(arguments["tokenize_query"], arguments["tokenize_doc"])) == 40


def test_false_negatives_of_a_collection(folder):
    module = BeirDataModule(folder, title_pairs=0.5, **loader_arguments(batch_size=16))
    source, titles = module.load_training().sources
    batch_plan = next(iter(module.train_dataloader().plan.batches(0)))
    batch = next(iter(module.train_dataloader()))
    keys = [((source, titles)[s].example(i, random.Random(0))) for s, i in batch_plan]
    for row, own in enumerate(keys):
        for column, other in enumerate(keys):
            expected = row != column and other.doc_keys[0] in own.relevant
            assert bool(batch.false_negatives[row, column]) == expected
    assert batch.false_negatives.any()


def test_negatives_of_bm25_are_never_relevant(folder):
    module = BeirDataModule(folder, title_pairs=0.5, negatives=3, **loader_arguments())
    labelled, _ = module.load_training().sources
    for index in range(len(labelled)):
        example = labelled.example(index, random.Random(index))
        assert len(set(example.doc_keys)) == 4 and not example.relevant & set(example.doc_keys[1:])
    assert next(iter(module.train_dataloader())).doc.input_ids.shape[0] == 16


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"title_pairs": 1.5}, "data.title_pairs: expected a share from 0 to 1, got 1.5"),
        ({"weights": [1, 2]}, "data.weights: expected 1 numbers"),
        ({"negatives": 101}, "data.negatives: expected a number from 0 to"),
        ({"negatives": 30}, "data.negatives: expected fewer than the 30 documents"),
        ({"val_pool": 0}, "data.val_pool: expected a number >= 1"),
        ({"path": []}, "data.path: expected at least one folder"),
        ({"num_workers": -1}, "data.num_workers: expected a number >= 0, got -1"),
        ({"eval_batch_size": 0}, "data.eval_batch_size: expected a number >= 1, got 0"),
    ],
)
def test_wrong_arguments(folder, changes, part):
    with pytest.raises(ValueError) as caught:
        module = BeirDataModule(**{"path": folder, **loader_arguments(), **changes})
        module.train_dataloader()
        module.val_dataloader()
    assert part in one_line(caught)


@pytest.mark.parametrize(
    ("device", "cores", "processes", "workers"),
    [("cpu", 16, 1, 0), ("cuda", 16, 1, 4), ("cuda", 3, 1, 2), ("cuda", 16, 8, 1), ("cuda", 4, 8, 0)],
)
def test_workers_beside_a_gpu_unless_told_otherwise(folder, monkeypatch, device, cores, processes, workers):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    strategy = SimpleNamespace(root_device=torch.device(device))
    for asked, expected in ((None, workers), (0, 0), (3, 3)):
        module = BeirDataModule(folder, title_pairs=0.5, num_workers=asked, **loader_arguments(batch_size=2))
        module.trainer = SimpleNamespace(strategy=strategy, world_size=processes, global_rank=0)
        assert module.train_dataloader().num_workers == expected


def test_titles_are_asked_for_but_absent(folder):
    lines = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    write_lines(folder / "corpus.jsonl", [json.dumps({**line, "title": ""}) for line in lines])
    with pytest.raises(ValueError, match="expected documents with a title and a text, got none in small"):
        BeirDataModule(folder, title_pairs=0.5, **loader_arguments()).setup("fit")


def test_mixture_by_weights(tmp_path):
    paths = [write_collection(tmp_path / name) for name in ("a", "b")]
    module = BeirDataModule(paths, weights=[3, 1], title_pairs=0.5, **loader_arguments())
    training = module.load_training()
    judged = sum(len(source) for source in training.sources[:2])
    assert training.per_epoch[0] == round(judged * 0.75) and sum(training.per_epoch) == 2 * judged
    assert module.collection.doc_ids[0] == "a/d0" and len(module.collection.doc_ids) == 60
    single = BeirDataModule(paths[1], **loader_arguments())
    single.setup("fit")
    assert {f"b/{name}" for name in single.val_qrels} <= {name for split in module._splits for name in split.dev}
    assert training.sources[3].example(0, random.Random(0)).doc_keys[0] >= 30
    assert isinstance(next(iter(module.train_dataloader())), TrainBatch)


def test_pool_holds_relevant_similar_and_random_documents(folder):
    collection = load_collection(folder)
    dev = {name: collection.qrels["train"][name] for name in ("train0", "train5")}
    pool = build_pool(collection, dev, 28, 5, seed=0)
    assert len(pool.doc_ids) == len(set(pool.doc_ids)) == 28
    assert {doc for grades in dev.values() for doc in grades} <= set(pool.doc_ids)
    assert set(pool.qrels) == set(pool.query_ids) == set(dev)
    assert build_pool(collection, dev, 28, 5, seed=0) == pool
    assert len(build_pool(collection, dev, 1, 5, seed=0).doc_ids) == 4  # relevant ones all stay
    assert len(build_pool(collection, dev, 99, 1, seed=0).query_ids) == 1
    assert len(build_pool(collection, dev, 99, 1, seed=0).doc_ids) == 30


def test_validation_batches_follow_the_ids(folder):
    module = BeirDataModule(folder, **loader_arguments())
    loader = module.val_dataloader()
    sides = [side for side, _ in loader]
    assert sides == sorted(sides, reverse=True) and len(loader) == len(sides)
    texts = dict(zip(module.collection.doc_ids, module.collection.documents(), strict=True))
    rows = [row for side, batch in loader if side == "doc" for row in batch.input_ids.tolist()]
    assert len(rows) == len(module.val_doc_ids) == 12
    for doc_id, row in zip(module.val_doc_ids, rows, strict=True):
        expected = bundled_tokenizer()(texts[doc_id], truncation=True, max_length=32)["input_ids"]
        assert row[: len(expected)] == expected
    assert set(module.val_qrels) == set(module.val_query_ids)
    assert "pool of 12 documents" in module.describe() and "\n" not in module.describe()


def triples(path, count=30):
    return write_lines(path, ["\t".join([words(i, 4), words(i, 8), words(i + 100, 8)]) for i in range(count)])


def test_triples(tmp_path):
    plain = triples(tmp_path / "triples.tsv")
    packed = tmp_path / "triples.tsv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    first, second = (TriplesDataModule(str(path), **loader_arguments()) for path in (plain, packed))
    assert all(
        torch.equal(a.doc.input_ids, b.doc.input_ids)
        for a, b in zip(first.train_dataloader(), second.train_dataloader(), strict=True)
    )
    batch = next(iter(first.train_dataloader()))
    assert batch.doc.input_ids.shape[0] == 8 and batch.teacher_scores is None
    assert len(first.train_documents(3)) == 3 and first.collection is None and first.test_split is None
    held = len(first.val_query_ids)
    assert 1 <= held <= 5 and len(first.val_doc_ids) == 12
    assert all(set(grades) <= set(first.val_doc_ids) and grades for grades in first.val_qrels.values())
    assert f"{30 - held} rows with 1 negatives without teacher" in first.describe()


def test_the_same_query_in_two_rows_masks_its_positives(tmp_path):
    lines = [f"{words(i % 2)}\t{words(i, 9)}\t{words(i + 200, 9)}" for i in range(8)]
    path = str(write_lines(tmp_path / "t.tsv", lines))
    eval_path = str(write_collection(tmp_path / "c"))
    module = TriplesDataModule(path, eval_path=eval_path, **loader_arguments(batch_size=8))
    batch = next(iter(module.train_dataloader()))
    assert batch.false_negatives.sum(1).tolist() == [3] * 8
    assert not batch.false_negatives[:, 1::2].any()
    assert module.test_split == "test" and all(name.startswith("train") for name in module.val_query_ids)


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["a\tb\tc", "only a query"], "t.tsv line 2: expected query<TAB>positive<TAB>negative"),
        (["a\tb\tc", "a\t\tc"], "t.tsv line 2: expected texts, got an empty one"),
        (["a\tb\tc", "a\td\tc"], "at least 2 different queries in t.tsv"),
        ([], "which is empty"),
    ],
)
def test_malformed_triples(tmp_path, lines, part):
    with pytest.raises(ValueError) as caught:
        TriplesDataModule(str(write_lines(tmp_path / "t.tsv", lines)), **loader_arguments()).setup("fit")
    assert part in one_line(caught)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file, got .*absent.tsv, which does not exist"):
        TriplesDataModule(str(tmp_path / "absent.tsv"), **loader_arguments()).setup("fit")


def scored(i: int, **changes) -> str:
    row = {
        "query": words(i, 4),
        "pos": [words(i, 6)],
        "neg": [words(i + k, 6) for k in (100, 200, 300)],
        "pos_scores": [i + 0.5],
        "neg_scores": [i + 1.0, i + 2.0, i + 3.0],
    }
    return json.dumps({key: value for key, value in {**row, **changes}.items() if value is not None})


def test_hard_negatives_keep_scores_beside_their_documents(tmp_path):
    path = write_lines(tmp_path / "h.jsonl", [scored(i) for i in range(20)])
    module = HardNegativesDataModule(str(path), negatives=2, **loader_arguments())
    source = module.load_training().sources[0]
    for index in range(len(source)):
        row = json.loads(path.read_text().splitlines()[int(source.chosen[index])])
        known = dict(zip(row["pos"] + row["neg"], row["pos_scores"] + row["neg_scores"], strict=True))
        example = source.example(index, random.Random(index))
        assert [known[doc] for doc in example.docs] == example.scores and example.docs[0] == row["pos"][0]
    assert next(iter(module.train_dataloader())).teacher_scores.shape == (4, 3)
    every = HardNegativesDataModule(str(path), **loader_arguments())
    assert "with 3 negatives with teacher scores" in every.load_training().description
    budget = HardNegativesDataModule(str(path), negatives=1, **loader_arguments(batch_tokens=100))
    assert budget.steps_per_epoch == len(list(budget.train_dataloader())) > 1


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("nonsense", "h.jsonl line 3: expected a JSON object"),
        (scored(2, query=None), "line 3: expected text under the key 'query', got None"),
        (scored(2, pos=None), "line 3: expected 0 numbers under the key 'pos_scores'"),
        (scored(2, pos=[], pos_scores=[]), "line 3: expected at least one positive"),
        (scored(2, neg="text"), "line 3: expected a list of texts under the key 'neg'"),
        (scored(2, neg_scores=[1]), "line 3: expected 3 numbers under the key 'neg_scores', got [1]"),
        (scored(2, pos_scores=None, neg_scores=None), "line 3: expected scores in every row or in none"),
        (scored(2, neg=["x"], neg_scores=[1]), "data.negatives: expected at most 1, which is what"),
    ],
)
def test_malformed_hard_negatives(tmp_path, line, part):
    path = write_lines(tmp_path / "h.jsonl", [scored(0), scored(1), line])
    with pytest.raises(ValueError) as caught:
        HardNegativesDataModule(str(path), negatives=3, **loader_arguments()).setup("fit")
    assert part in one_line(caught)


def test_hf_dataset_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {
        "q": [words(i, 4) for i in range(20)],
        "p": [words(i, 6) for i in range(20)],
        "n": [[words(i + k, 6) for k in (50, 60)] for i in range(20)],
    }
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(tmp_path / "set")

    def module(**changes):
        names = {"query": "q", "positive": "p", "negative": "n"}
        return HFDatasetDataModule(str(tmp_path / "set"), **{**names, **loader_arguments(), **changes})

    assert next(iter(module(num_workers=1).train_dataloader())).doc.input_ids.shape[0] == 12
    assert next(iter(module(negative=None).train_dataloader())).doc.input_ids.shape[0] == 4
    with pytest.raises(ValueError, match=r"data.positive: expected one of the columns \['q', 'p', 'n'\], got 'z'"):
        module(positive="z").setup("fit")
    with pytest.raises(ValueError, match=r"data.split: expected one of \['train'\], got 'test'"):
        module(split="test").setup("fit")


def test_hf_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="expected the package 'datasets', got none installed; pip install datasets"):
        HFDatasetDataModule("some/id", **loader_arguments()).setup("fit")


def test_hf_folder_that_is_no_data_set(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError) as caught:
        HFDatasetDataModule(str(tmp_path), **loader_arguments()).setup("fit")
    assert "data.path: expected a folder written by save_to_disk" in one_line(caught)


@pytest.mark.parametrize("collection", ["scifact", "squad"])
def test_synthetic_lengths_of_a_real_collection(collection):
    path = ROOT / "data" / "lengths" / f"{collection}.csv"
    sides, longest = read_lengths(path), TextTokenizer(bundled_tokenizer(), 512)
    module = SyntheticDataModule(lengths=path, size=2000, **loader_arguments(tokenize_query=longest, tokenize_doc=longest))
    examples = module.load_training().sources[0]
    for drawn, real in ((examples.query_lengths, sides["query"]), (examples.doc_lengths, sides["doc"])):
        assert set(drawn.flatten()) <= set(real)
        assert drawn.mean() == pytest.approx(sum(real) / len(real), rel=0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("side,tokens,texts\nquery,3,x\n", "in line 2"),
        ("side,words\nquery,3\n", "in line 2"),
        ("side,tokens,texts\nother,3,1\n", "in line 2"),
        ("side,tokens,texts\nquery,3,1\n", "lengths of queries and of documents"),
    ],
)
def test_a_bad_table_of_lengths_is_one_line(text, message, tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_lengths(path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_lengths(tmp_path / "missing.csv")


def test_synthetic_lengths_and_order():
    shape = {"size": 200, "negatives": 1, "doc_mean": 20, "doc_std": 5, "query_lengths": [5]}
    module = SyntheticDataModule(**shape, **loader_arguments())
    batches = list(module.train_dataloader())
    again = list(SyntheticDataModule(**shape, **loader_arguments(num_workers=2)).train_dataloader())
    assert len(batches) == 50
    assert all(torch.equal(a.doc.input_ids, b.doc.input_ids) for a, b in zip(batches, again, strict=True))
    assert all(batch.query.max_seqlen == 5 and batch.doc.input_ids.shape[0] == 8 for batch in batches)
    lengths = torch.cat([batch.doc.cu_seqlens.diff() for batch in batches]).float()
    assert 19 < lengths.mean() < 21 and 4 < lengths.std() < 6 and lengths.max() <= 32
    special = torch.tensor(bundled_tokenizer().all_special_ids)
    assert not any(torch.isin(batch.doc.input_ids.flatten()[batch.doc.pool_index], special).any() for batch in batches)
    assert len(module.val_qrels) == 5 and len(module.val_doc_ids) == 12 and len(module.train_documents(3)) == 3


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"distribution": "uniform"}, "expected 'normal' or 'lognormal', got 'uniform'"),
        ({"doc_mean": 0}, "expected a mean > 0"),
        ({"doc_lengths": []}, "expected numbers >= 1"),
        ({"size": 0}, "data.size, data.negatives"),
    ],
)
def test_synthetic_errors(changes, part):
    with pytest.raises(ValueError) as caught:
        SyntheticDataModule(**loader_arguments(), **changes)
    assert part in one_line(caught)
