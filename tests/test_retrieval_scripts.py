"""evaluate.py, encode.py and search.py, each with a composed configuration, on a collection of a few documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import encode
import evaluate
import search
from lightning_modules.encoder import SparseEncoder
from lightning_modules.resolvers import register_resolvers
from retrieval.export import export_model
from retrieval.index import load_index

ROOT = Path(__file__).parents[1]
CONFIG = {
    "model_type": "bert",
    "vocab_size": 16000,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
DOCS = {"a": "vitamin d and falls", "b": "protein binding in cells", "c": "gene expression in mice"}


def configuration(name: str, output: Path, *overrides: str):
    """What the command line would give, with the output in ``output``."""
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, [f"paths.output_dir={output}", "device=cpu", *overrides])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    encoder = SparseEncoder(
        name_or_path="small",
        head="tiled",
        pretrained=False,
        config=CONFIG,
        tokenizer=str(ROOT / "data" / "tiny"),
        max_query_length=16,
        max_doc_length=32,
    )
    folder = tmp_path_factory.mktemp("model")
    export_model(encoder, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    lines = [json.dumps({"_id": name, "title": "", "text": text}) for name, text in DOCS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "protein in cells"}\n')
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tb\t1\n")
    return folder


def test_evaluate(model, data, tmp_path, capsys):
    evaluate.task(configuration("evaluate", tmp_path, f"model_path={model}", "data=beir", f"data.path={data}"))
    report = json.loads((tmp_path / "evaluate.json").read_text())
    assert report["bm25/test/ndcg@10"] == 1.0
    assert 0 <= report["test/ndcg@10"] <= 1
    assert report["test/active_dims_doc"] > 0
    assert (tmp_path / "run.trec").read_text().startswith("q Q0 ")
    assert "BM25" in capsys.readouterr().out


@pytest.mark.parametrize("side", ["doc", "query"])
def test_encode(model, data, tmp_path, side):
    overrides = (f"model_path={model}", "data=beir", f"data.path={data}", f"side={side}", "top_k=50")
    encode.task(configuration("encode", tmp_path, *overrides))
    index = load_index(tmp_path)
    assert index.ids == (list(DOCS) if side == "doc" else ["q"])
    assert index.vectors.shape[1] == CONFIG["vocab_size"]
    assert 0 < index.vectors.nnz <= 50 * len(index.ids)


def test_search(model, data, tmp_path, capsys):
    encode.task(configuration("encode", tmp_path, f"model_path={model}", "data=beir", f"data.path={data}"))
    capsys.readouterr()
    overrides = (f"index={tmp_path}", f"model_path={model}", "query=protein cells", "k=2")
    search.task(configuration("search", tmp_path, *overrides))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in lines if line.split()[1].isdigit()] == ["1", "2"]
    words = json.loads((tmp_path / "vocabulary.json").read_text())
    (tmp_path / "vocabulary.json").write_text(json.dumps(["other", *words[1:]]))
    with pytest.raises(ValueError, match="model_path: expected the model that made the index"):
        search.task(configuration("search", tmp_path, *overrides))


@pytest.mark.parametrize(
    ("script", "overrides", "message"),
    [
        (evaluate, [], "model_path: expected"),
        (encode, [], "model_path: expected"),
        (encode, ["model_path=x", "side=passage"], "side: expected one of query, doc, got 'passage'"),
        (evaluate, ["model_path=x", "data=synthetic"], "data.path: expected one folder"),
        (search, ["index=x"], "model_path: expected a value"),
        (search, ["index=x", "model_path=y"], "query: expected either"),
    ],
)
def test_bad_input(script, overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.task(configuration(script.__name__, tmp_path, *overrides))
