"""The packed backbone against the padded one: vectors and every gradient, by family; what packs where, and why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_families import TEXTS, WORDS, make_tokenizer, naive_reps, save_family
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from datamodules.collate import TextBatch
from lightning_modules import packed
from lightning_modules.encoder import SparseEncoder
from retrieval.export import export_model

LENGTHS = {"max_query_length": 16, "max_doc_length": 38}
# One text reaches the last of the 38 positions that every family has; one has nothing but its special tokens.
DOCS = [*TEXTS, "", " ".join(WORDS * 3)]
WIDTHS = {"hidden_size": 32}  # heads of 16 dimensions: the least that FlexAttention takes
CHANGES = {
    "distilbert": {"dim": 32},
    "modernbert": WIDTHS | {"local_attention": 8, "global_attn_every_n_layers": 2},  # sees four tokens on each side
}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=packed.FAMILIES)
def saved(request, tmp_path_factory) -> Path:
    return save_family(request.param, tmp_path_factory.mktemp(request.param), **CHANGES.get(request.param, WIDTHS))


def load(directory: Path, *, packed: bool | str, **changes: object) -> SparseEncoder:
    """An encoder in training mode without dropout, so that packed and padded may be compared."""
    options = LENGTHS | {"head": "naive", "dropout": 0.0} | changes
    return SparseEncoder(str(directory), packed=packed, **options)


def step(encoder: SparseEncoder, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Vectors and every gradient, in float32, of a step on queries and documents."""
    device = encoder.logit_scale.device
    batches = encoder.query_tokenizer(TEXTS[:2]).to(device), encoder.doc_tokenizer(DOCS).to(device)
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        reps = torch.cat(encoder(*batches))
    slopes = torch.linspace(-1, 1, reps.numel(), device=device).view_as(reps)
    (reps.float() * slopes).sum().backward()
    return {"reps": reps.detach().float()} | {name: p.grad.float() for name, p in encoder.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(actual[name], value, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n} {m}")


def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of packed attention that ran from now on."""
    kinds = []
    for name, function in list(packed._KINDS.items()):
        monkeypatch.setitem(packed._KINDS, name, lambda *a, f=function, n=name: (kinds.append(n), f(*a))[1])
    return kinds


def test_vectors_and_gradients_are_the_padded_models(saved, monkeypatch):
    encoder, kinds = load(saved, packed=True), used(monkeypatch)
    result = step(encoder)
    assert encoder.packed == "text" and kinds == ["text"] * 2  # one call of two layers for queries and documents
    reference = load(saved, packed=False)
    assert_same(result, step(reference), 2e-5)
    assert reference.packed == "padded" and len(kinds) == 2


def test_vectors_are_the_naive_formula_on_stock_logits(saved):
    encoder = load(saved, packed=True).eval()
    batch = encoder.doc_tokenizer(DOCS)
    torch.testing.assert_close(encoder(batch), naive_reps(saved, batch), atol=1e-5, rtol=1e-5)


def test_states_and_their_gradients_are_not_copied(tmp_path, monkeypatch):
    """Between projections and attention, both ways: copies took 8% of the backbone's time on a GPU."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *states):
            assert all(state.is_contiguous() for state in states)
            return sum(states)

        @staticmethod
        def backward(ctx, gradient):
            return tuple(gradient.contiguous() * 1 for _ in range(3))

    monkeypatch.setattr(packed, "varlen_attn", lambda *arguments, **options: Attention.apply(*arguments[:3]))
    monkeypatch.setitem(packed._KINDS, "text", packed._varlen)
    encoder = load(save_family("bert", tmp_path, **WIDTHS), packed=True)
    rows = encoder.pooled_rows(encoder.doc_tokenizer(DOCS))
    with torch.profiler.profile(record_shapes=True) as profile:
        rows.sum().backward()
    copies = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert [shape for shape in copies if len(shape) > 2 and shape[-1] == 16] == []


@pytest.mark.parametrize(("checkpointing", "calls"), [(True, 4), (1000, 2), (60, 4)])
def test_recomputed_layers_are_packed_too(saved, monkeypatch, checkpointing, calls):
    """Two layers, each again in the backward pass; not where all texts are fewer than 1,000 tokens, in pieces of 60."""
    encoder, kinds = load(saved, packed=True, gradient_checkpointing=checkpointing), used(monkeypatch)
    batches = encoder.query_tokenizer(TEXTS[:2]), encoder.doc_tokenizer(DOCS)
    pieces = sum(len(batch.split(60, padded=False)) for batch in batches) if checkpointing == 60 else 1
    result = step(encoder)
    assert kinds == ["text"] * calls * pieces
    assert_same(result, step(load(saved, packed=False)), 2e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_with_its_masks_is_the_padded_models(saved, monkeypatch):
    monkeypatch.setattr(packed, "_compiled_flex", lambda: flex_attention)  # uncompiled, for the CPU
    monkeypatch.setitem(packed._KINDS, "text", packed._flex)
    encoder, reference = load(saved, packed=True).eval(), load(saved, packed=False).eval()
    with torch.no_grad():
        result = encoder(encoder.doc_tokenizer(DOCS))
    torch.testing.assert_close(result, reference(reference.doc_tokenizer(DOCS)), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_neighbours_do_not_matter(saved, side):
    encoder = load(saved, packed=True, pool_special_tokens=False).eval()
    encoder.tokenizer.padding_side = side
    alone = torch.cat([encoder(encoder.doc_tokenizer([text])) for text in DOCS])
    torch.testing.assert_close(encoder(encoder.doc_tokenizer(DOCS)), alone, atol=1e-5, rtol=1e-5)


def test_a_text_without_tokens_has_an_empty_vector(saved):
    encoder = load(saved, packed=True).eval()
    full = encoder.doc_tokenizer(DOCS)
    mask = full.attention_mask.clone()
    mask[1] = 0
    result = encoder(TextBatch.from_masks(full.input_ids, mask, mask))
    expected = encoder(full)
    assert result[1].count_nonzero() == 0
    keep = [i for i in range(len(DOCS)) if i != 1]
    torch.testing.assert_close(result[keep], expected[keep], atol=1e-5, rtol=1e-5)


def test_roberta_does_not_count_padding_tokens():
    ids = torch.tensor([0, 5, 1, 6, 0, 7])  # the third is the padding token, as a word of the text
    positions = torch.tensor([0, 1, 2, 3, 0, 1])
    assert packed.position_ids(ids, positions, 2).tolist() == [2, 3, 1, 4, 2, 3]
    assert packed.position_ids(ids, positions, 0).tolist() == positions.tolist()


@pytest.mark.parametrize("window", [None, 3, 130])
@pytest.mark.parametrize("lengths", [[1], [128], [3, 0, 128, 300, 1], [700, 5]])
def test_block_mask_lets_tokens_see_their_text(lengths, window):
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(tokens)
    sees = text[:, None] == text
    if window is not None:
        sees &= (place[:, None] - place).abs() <= window
    mask = packed.block_mask(bounds, tokens, window)
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, place[:, None], place), sees)
    blocks = mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)[:tokens, :tokens]
    assert not bool((sees & ~blocks).any())


def test_what_packs_on_the_cpu_and_why_not(tmp_path):
    directory = save_family("bert", tmp_path)  # its attention dropout is 0.1
    auto = SparseEncoder(str(directory), head="naive", **LENGTHS)
    assert auto.packing(CPU, torch.float32, training=False) == ("padded", "on the CPU")
    forced = SparseEncoder(str(directory), head="naive", packed=True, **LENGTHS)
    with pytest.raises(ValueError, match="rate is 0.1, set model.attention_dropout=0") as caught:
        forced(forced.doc_tokenizer(TEXTS))
    assert "\n" not in str(caught.value)
    assert forced.eval().packed == "text"
    without = SparseEncoder(str(directory), head="naive", packed=True, attention_dropout=0.0, **LENGTHS)
    assert without.packed == "text" and without.backbone.config.hidden_dropout_prob == 0.1
    with pytest.raises(ValueError, match="model.packed: expected auto, true or false, got 'yes'"):
        SparseEncoder(str(directory), packed="yes", **LENGTHS)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_other_families_and_attentions_stay_padded(tmp_path):
    deberta = save_family("deberta-v2", tmp_path / "deberta")
    bert = save_family("bert", tmp_path / "bert")
    for directory, changes, why in (
        (deberta, {}, "deberta-v2 has no packed attention"),
        (bert, {"attn_implementation": "eager"}, "model.attn_implementation=eager"),
    ):
        auto = load(directory, packed="auto", **changes)
        assert why in auto.packing(torch.device("cuda"), torch.bfloat16, training=True).reason
        with pytest.raises(ValueError, match=f"model.packed.*{why}") as caught:
            load(directory, packed=True, **changes)
        assert "\n" not in str(caught.value)


def test_attention_dropout_keeps_auto_padded_in_training_on_a_gpu_and_says_why(tmp_path):
    encoder = SparseEncoder(str(save_family("bert", tmp_path)), head="naive", **LENGTHS)
    packing = encoder.packing(torch.device("cuda"), torch.bfloat16, training=True)
    assert packing.mode == "padded" and "model.attention_dropout=0" in packing.reason


def test_an_export_does_not_name_the_packed_attention(saved, tmp_path):
    export_model(load(saved, packed=True), tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".md", ".py")]
    assert files and not any(packed.ATTENTION in path.read_text() for path in files)
    configs = [json.loads(path.read_text()) for path in tmp_path.rglob("config.json")]
    assert not any("packed" in key for config in configs for key in config)


def test_the_backbone_gets_one_row_of_real_tokens(saved):
    encoder = load(saved, packed=True)
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"].shape), with_kwargs=True)
    query, doc = encoder.query_tokenizer(TEXTS[:2]), encoder.doc_tokenizer(DOCS)
    encoder(query, doc)
    assert seen == [(1, len(query.token_ids) + len(doc.token_ids))]
    assert len(doc.token_ids) == int(doc.attention_mask.sum()) < doc.input_ids.numel()


def test_what_the_host_knows_of_a_batch():
    encoder_tokenizer = make_tokenizer()
    ids = torch.tensor([[2, 5, 3, 0], [2, 5, 6, 3]])
    mask = (ids != encoder_tokenizer.pad_token_id).long()
    pooled = mask.bool() & (ids > 3)
    batch = TextBatch.from_masks(ids, mask, pooled)
    assert batch.token_ids.tolist() == [2, 5, 3, 2, 5, 6, 3]
    assert batch.token_positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.token_cu_seqlens.tolist() == [0, 3, 7] and batch.token_cu_seqlens.dtype == torch.int32
    assert batch.pooled_tokens.tolist() == [1, 4, 5] and batch.longest == 4
    with pytest.raises(ValueError, match="pooled: expected only positions where attention_mask is 1"):
        TextBatch.from_masks(ids, mask, torch.ones_like(mask))


@CUDA
@pytest.mark.parametrize("checkpointing", [False, True, 60])
def test_float32_is_the_padded_models_on_cuda(saved, checkpointing):
    encoder = load(saved, packed="auto", gradient_checkpointing=checkpointing).cuda()
    assert encoder.packed == "flex"
    assert_same(step(encoder), step(load(saved, packed=False).cuda()), 1e-4)


@CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True, 60])
def test_half_precision_is_as_close_as_the_padded_models_on_cuda(saved, dtype, checkpointing):
    exact = step(load(saved, packed=False).double())
    encoder = load(saved, packed="auto", gradient_checkpointing=checkpointing).cuda()
    with torch.autocast("cuda", dtype=dtype):
        assert encoder.packed == "varlen"
    varlen, padded = step(encoder, dtype), step(load(saved, packed=False).cuda(), dtype)
    for name, value in exact.items():
        errors = [(result[name].cpu() - value).norm() / value.norm().clamp(min=1e-6) for result in (varlen, padded)]
        assert errors[0] <= 1.5 * errors[1] + 0.01, (name, errors)
