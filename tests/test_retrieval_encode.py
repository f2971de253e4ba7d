"""Encoding: compaction, order of texts, modes, top-k, bad input; the index on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn
from transformers import AutoTokenizer

from datamodules.collate import TextTokenizer
from retrieval.encode import encode_texts, resolve_compute, to_csr
from retrieval.index import Index, load_index, matching_terms, vocabulary_of

TINY = Path(__file__).parents[1] / "data" / "tiny"


class BagOfWords(nn.Module):
    """An encoder without weights: the logarithm of how often each token occurs."""

    def __init__(self, max_length: int = 64):
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)
        self.vocab_size = len(self.tokenizer)
        self.query_tokenizer = TextTokenizer(self.tokenizer, 16, pool_special_tokens=False)
        self.doc_tokenizer = TextTokenizer(self.tokenizer, max_length, pool_special_tokens=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Dropout(0.5).eval()
        self.modes: list[bool] = []
        self.sizes: list[int] = []

    def forward(self, batch):
        self.modes.append(self.training or torch.is_grad_enabled())
        self.sizes.append(batch.input_ids.shape[1])
        counts = batch.cu_seqlens.diff()
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        rep = torch.zeros(len(counts), self.vocab_size)
        words = batch.input_ids.flatten()[batch.pool_index]
        rep.index_put_((rows, words), torch.ones(len(rows)), accumulate=True)
        return torch.log1p(rep) * self.scale


@pytest.fixture(scope="module")
def encoder():
    return BagOfWords()


TEXTS = ["cells", "protein binding in human cells and in mice", "vitamin d", "a longer text about gene expression " * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_csr(dtype):
    rep = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).relu().to(dtype)
    rep[3] = 0
    matrix = to_csr(rep.requires_grad_())
    assert matrix.dtype == np.float32
    assert matrix.shape == (7, 33)
    assert matrix.has_sorted_indices
    np.testing.assert_array_equal(matrix.toarray(), rep.detach().float().numpy())


def test_to_csr_rejects_a_vector():
    with pytest.raises(ValueError, match=r"rep: .*\(5,\)"):
        to_csr(torch.zeros(5))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_order_is_that_of_the_texts(encoder, batch_size):
    together = encode_texts(encoder, TEXTS, "doc", batch_size=batch_size).toarray()
    apart = np.vstack([encoder(encoder.doc_tokenizer([text])).detach().numpy() for text in TEXTS])
    np.testing.assert_array_equal(together, apart)


def test_longest_come_first_and_sides_have_their_lengths(encoder):
    encoder.sizes.clear()
    encode_texts(encoder, TEXTS, "doc", batch_size=1)
    assert encoder.sizes == sorted(encoder.sizes, reverse=True)
    encoder.sizes.clear()
    encode_texts(encoder, TEXTS, "query")
    assert encoder.sizes == [16]


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_restored(encoder, training):
    encoder.train(training)
    encoder.frozen.eval()
    encoder.modes.clear()
    encode_texts(encoder, TEXTS, "doc")
    assert encoder.modes == [False]
    assert encoder.training is training
    assert encoder.frozen.training is False
    encoder.eval()


def test_top_k_keeps_the_largest(encoder):
    full = encode_texts(encoder, TEXTS, "doc").toarray()
    cut = encode_texts(encoder, TEXTS, "doc", top_k=3)
    assert np.diff(cut.indptr).max() <= 3
    np.testing.assert_array_equal(np.sort(cut.toarray(), 1)[:, -3:], np.sort(full, 1)[:, -3:])


def test_bad_input(encoder):
    for arguments, message in (
        ((TEXTS, "passage"), "side: expected 'query' or 'doc', got 'passage'"),
        (([], "doc"), "at least one text"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_texts(encoder, *arguments)
    for name in ("batch_size", "top_k"):
        with pytest.raises(ValueError, match=f"{name}: expected a number >= 1, got 0"):
            encode_texts(encoder, TEXTS, "doc", **{name: 0})
    broken = BagOfWords()
    broken.scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="expected finite doc vectors"):
        encode_texts(broken, TEXTS, "doc")


def test_resolve_compute():
    assert resolve_compute("cpu", "bf16") == (torch.device("cpu"), torch.bfloat16)
    for device, precision, message in (
        ("cpu", "half", "precision: expected one of fp32, bf16, fp16"),
        ("cpu", "fp16", "precision=fp32"),
        ("gpu", "fp32", "device: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_compute(device, precision)


def test_index_on_disk(encoder, tmp_path):
    vectors = encode_texts(encoder, TEXTS, "doc")
    ids = ["1", "zwei drei", "c", "d"]
    Index(vectors, ids, vocabulary_of(encoder)).save(tmp_path / "index")
    index = load_index(tmp_path / "index")
    assert index.ids == ids
    assert (index.vectors != vectors).nnz == 0
    query = encode_texts(encoder, ["protein cells"], "query")
    terms = matching_terms(query, index.vectors[1], index.vocabulary, 8)
    assert sorted(word for word, _ in terms) == ["cells", "protein"]
    assert sum(share for _, share in terms) == pytest.approx((query @ index.vectors[1].T).sum())


def test_index_rejects(encoder, tmp_path):
    index = Index(sp.csr_matrix((1, encoder.vocab_size), dtype=np.float32), ["a"], vocabulary_of(encoder))
    with pytest.raises(FileNotFoundError, match="vectors.npz, ids.txt, vocabulary.json; make"):
        load_index(tmp_path)
    with pytest.raises(ValueError, match="line breaks"):
        Index(index.vectors, ["a\nb"], index.vocabulary).save(tmp_path)
    index.save(tmp_path)
    (tmp_path / "ids.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="encode again"):
        load_index(tmp_path)


def test_vocabulary_of_a_head_wider_than_the_tokenizer():
    encoder = BagOfWords()
    encoder.vocab_size += 2
    words = vocabulary_of(encoder)
    assert len(words) == encoder.vocab_size
    assert words[-1] == f"<{encoder.vocab_size - 1}>"
