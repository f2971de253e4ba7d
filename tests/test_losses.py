"""Ranking losses against numbers computed by hand, gradcheck, and sentence-transformers' classes."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from sparton.losses import InfoNCE, KLDistillation, MarginMSE, WarmupWeight, WeightedSum
from sparton.losses.scores import all_scores

CONF = Path(__file__).resolve().parent.parent / "conf"

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Two queries with two documents each (positive, hard negative); V = 3. All scores by hand:
#            d00  d01  d10  d11
#   q0        2    1    0    3
#   q1        1    0    4    2
QUERY = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.5]]
DOC = [[1.0, 0.5, 1.0], [1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [2.0, 1.5, 1.0]]
SCORES = [[2.0, 1.0, 0.0, 3.0], [1.0, 0.0, 4.0, 2.0]]
TEACHER = [[5.0, 2.0], [1.0, 3.0]]


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(QUERY, dtype=dtype), torch.tensor(DOC, dtype=dtype)


def reps(batch: int, per_query: int, vocab: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.rand(batch, vocab, generator=generator, dtype=torch.float64)
    doc = torch.rand(batch * per_query, vocab, generator=generator, dtype=torch.float64)
    return query.requires_grad_(), doc.requires_grad_()


def minus_log_softmax(scores: list[float], target: int) -> float:
    return math.log(sum(math.exp(s) for s in scores)) - scores[target]


def test_scores_of_the_example_are_as_stated():
    query, doc = pair()
    assert (query @ doc.T).tolist() == SCORES


def test_infonce_by_hand():
    # -log e^2/(e^2+e^1+e^0+e^3) = 1.440190; -log e^4/(e^1+e^0+e^4+e^2) = 0.185183 for the second.
    expected = (minus_log_softmax(SCORES[0], 0) + minus_log_softmax(SCORES[1], 2)) / 2
    assert minus_log_softmax(SCORES[0], 0) == pytest.approx(1.4401897, abs=1e-6)
    assert minus_log_softmax(SCORES[1], 2) == pytest.approx(0.1851830, abs=1e-6)
    assert InfoNCE()(*pair()).item() == pytest.approx(expected, abs=1e-12)


def test_infonce_temperature_divides_and_scale_multiplies():
    hot = [[s / 2 * 3 for s in row] for row in SCORES]
    expected = (minus_log_softmax(hot[0], 0) + minus_log_softmax(hot[1], 2)) / 2
    assert InfoNCE(temperature=2.0, scale=3.0)(*pair()).item() == pytest.approx(expected, abs=1e-12)


def test_infonce_leaves_false_negatives_out():
    mask = torch.tensor([[False, False, False, True], [True, False, False, False]])
    expected = (minus_log_softmax([2.0, 1.0, 0.0], 0) + minus_log_softmax([0.0, 4.0, 2.0], 1)) / 2
    assert InfoNCE()(*pair(), false_negatives=mask).item() == pytest.approx(expected, abs=1e-12)


def test_infonce_never_masks_the_own_positive():
    query, doc = pair()
    query.requires_grad_()
    loss = InfoNCE()(query, doc, false_negatives=torch.ones(2, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.isfinite(query.grad).all()


def test_infonce_with_own_documents_only():
    expected = (minus_log_softmax([2.0, 1.0], 0) + minus_log_softmax([4.0, 2.0], 0)) / 2
    assert InfoNCE(in_batch=False)(*pair()).item() == pytest.approx(expected, abs=1e-12)
    mask = torch.tensor([[False, True, False, False], [True, True, False, False]])
    masked = (0.0 + minus_log_softmax([4.0, 2.0], 0)) / 2
    assert InfoNCE(in_batch=False)(*pair(), false_negatives=mask).item() == pytest.approx(masked, abs=1e-12)


def test_margin_mse_by_hand():
    # Margins: student 2-1=1 and 4-2=2; teacher 5-2=3 and 1-3=-2. ((1-3)^2 + (2+2)^2) / 2 = 10.
    loss = MarginMSE()(*pair(), teacher_scores=torch.tensor(TEACHER))
    assert loss.item() == pytest.approx(10.0, abs=1e-12)


def test_margin_mse_takes_every_negative():
    query = torch.tensor([[1.0]])
    doc = torch.tensor([[5.0], [3.0], [1.0]])
    # Margins: student 2 and 4; teacher 1 and 1. (1 + 9) / 2 = 5.
    loss = MarginMSE()(query, doc, teacher_scores=torch.tensor([[2.0, 1.0, 1.0]]))
    assert loss.item() == pytest.approx(5.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_by_hand(temperature):
    def softmax(scores):
        powers = [math.exp(s / temperature) for s in scores]
        return [p / sum(powers) for p in powers]

    expected = 0.0
    for student, teacher in (([2.0, 1.0], TEACHER[0]), ([4.0, 2.0], TEACHER[1])):
        expected += sum(p * math.log(p / q) for p, q in zip(softmax(teacher), softmax(student), strict=True)) / 2
    loss = KLDistillation(temperature=temperature)(*pair(), teacher_scores=torch.tensor(TEACHER))
    assert loss.item() == pytest.approx(expected * temperature**2, abs=1e-10)


def test_kl_is_zero_for_the_teacher_itself():
    loss = KLDistillation()(*pair(), teacher_scores=torch.tensor([[2.0, 1.0], [4.0, 2.0]]))
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("loss", [InfoNCE(temperature=0.5), InfoNCE(in_batch=False), MarginMSE(), KLDistillation()])
def test_gradcheck(loss):
    query, doc = reps(3, 2)
    teacher = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 3] = True
    assert torch.autograd.gradcheck(
        lambda q, d: loss(q, d, teacher_scores=teacher, false_negatives=mask), (query, doc)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [InfoNCE(), MarginMSE(), KLDistillation()])
def test_scores_are_float32_for_half_precision_and_under_autocast(loss, dtype):
    query, doc = (rep.detach().to(dtype) for rep in reps(4, 3, vocab=600))
    teacher = torch.zeros(4, 3)
    expected = loss(query.float(), doc.float(), teacher_scores=teacher)
    plain = loss(query, doc, teacher_scores=teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = loss(query.float(), doc.float(), teacher_scores=teacher)
    assert plain.dtype == torch.float32
    assert plain.item() == expected.item()
    assert autocast.item() == pytest.approx(expected.item(), rel=1e-6)


def bfloat16_scores(device: torch.device, compiled: bool = False) -> tuple[torch.Tensor, ...]:
    """Scores of bfloat16 representations, their gradients for a random one of the scores, and what these should be."""
    generator = torch.Generator().manual_seed(0)
    query, doc = (torch.rand(rows, 500, generator=generator).bfloat16().to(device) for rows in (24, 96))
    grad = torch.randn(24, 96, generator=generator).to(device)
    leaves = query.requires_grad_(), doc.requires_grad_()
    product = torch.compile(all_scores, fullgraph=True) if compiled else all_scores
    scores = product(*leaves)
    scores.backward(grad)
    return scores.detach(), query, doc, grad


def assert_scores_and_gradients(scores, query, doc, grad):
    wide_query, wide_doc, wide_grad = query.detach().double(), doc.detach().double(), grad.double()
    torch.testing.assert_close(scores.double(), wide_query @ wide_doc.T, rtol=1e-6, atol=0.0)
    for rep, left, right in ((query, wide_grad, wide_doc), (doc, wide_grad.T, wide_query)):
        assert rep.grad.dtype == torch.bfloat16
        # Half a unit of bfloat16's last place, and what 16 bits of the scores' gradient leave out.
        bound = 2**-8 * (left @ right).abs() + 2**-16 * (left.abs() @ right.abs())
        assert ((rep.grad.double() - left @ right).abs() <= bound).all()


def test_bfloat16_scores_and_gradients_are_summed_in_float32(device, monkeypatch):
    monkeypatch.setattr("sparton.losses.scores.COLUMNS", 200)
    assert_scores_and_gradients(*bfloat16_scores(device))


@on_cuda
def test_bfloat16_scores_compile_into_one_graph():
    assert_scores_and_gradients(*bfloat16_scores(torch.device("cuda"), compiled=True))


def test_a_gradient_is_computed_only_where_it_is_asked_for():
    query, doc = torch.rand(2, 9).bfloat16(), torch.rand(4, 9).bfloat16().requires_grad_()
    all_scores(query, doc).sum().backward()
    assert query.grad is None
    torch.testing.assert_close(doc.grad, query.sum(0).expand(4, 9), rtol=2**-7, atol=0.0)


def test_bfloat16_losses_keep_no_wider_copy_of_the_representations():
    query, doc = (torch.rand(rows, 500).bfloat16().requires_grad_() for rows in (4, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        WeightedSum({"contrastive": InfoNCE()})(query, doc)
    assert {t.dtype for t in kept if t.shape[-1:] == (500,)} == {torch.bfloat16}


def test_weighted_sum_gives_parts_and_total():
    loss = WeightedSum({"contrastive": InfoNCE(), "margin_mse": MarginMSE()}, {"contrastive": 2.0, "margin_mse": 0.5})
    teacher = torch.tensor(TEACHER)
    parts = loss.parts(*pair(), teacher_scores=teacher)
    assert list(parts) == ["contrastive", "margin_mse"]
    assert parts["margin_mse"].item() == pytest.approx(10.0)
    total = loss(*pair(), teacher_scores=teacher)
    assert total.item() == pytest.approx(2.0 * InfoNCE()(*pair()).item() + 5.0)
    assert loss.combine(parts).item() == total.item()
    assert WeightedSum({"a": InfoNCE()})(*pair()).item() == InfoNCE()(*pair()).item()


def bad_calls():
    query, doc = pair()
    teacher = torch.tensor(TEACHER)
    return {
        "temperature": lambda: InfoNCE(temperature=0.0),
        "scale": lambda: InfoNCE(scale=float("nan")),
        "kl temperature": lambda: KLDistillation(temperature=-1.0),
        "vocabularies": lambda: InfoNCE()(query, doc[:, :2]),
        "rows": lambda: InfoNCE()(query, doc[:3]),
        "three dimensions": lambda: InfoNCE()(query[None], doc),
        "integers": lambda: InfoNCE()(query.long(), doc),
        "no query": lambda: InfoNCE()(query[:0], doc),
        "mask shape": lambda: InfoNCE()(query, doc, false_negatives=torch.zeros(2, 2, dtype=torch.bool)),
        "mask dtype": lambda: InfoNCE()(query, doc, false_negatives=torch.zeros(2, 4)),
        "no hard negative": lambda: InfoNCE(in_batch=False)(query, doc[:2]),
        "no teacher": lambda: MarginMSE()(query, doc),
        "one document": lambda: KLDistillation()(query, doc[:2], teacher_scores=teacher[:, :1]),
        "teacher shape": lambda: MarginMSE()(query, doc, teacher_scores=teacher[:, :1]),
        "no losses": lambda: WeightedSum({}),
        "weights of others": lambda: WeightedSum({"a": InfoNCE()}, {"b": 1.0}),
        "negative weight": lambda: WeightedSum({"a": InfoNCE()}, {"a": -1.0}),
        "name with a dot": lambda: WeightedSum({"a.b": InfoNCE()}),
    }


@pytest.mark.parametrize("case", sorted(bad_calls()))
def test_bad_arguments_raise_one_line(case):
    with pytest.raises(ValueError) as error:
        bad_calls()[case]()
    assert "\n" not in str(error.value)
    assert "got" in str(error.value)


def test_warmup_by_hand():
    quadratic = WarmupWeight(2.0, 10)
    assert [quadratic.at(step, 100) for step in (0, 1, 5, 9, 10, 99)] == pytest.approx([0, 0.02, 0.5, 1.62, 2.0, 2.0])
    linear = WarmupWeight(2.0, 0.5, "linear")
    assert [linear.at(step, 100) for step in (0, 25, 50, 51)] == pytest.approx([0, 1.0, 2.0, 2.0])
    assert WarmupWeight(3.0).at(0, 100) == 3.0
    assert WarmupWeight(3.0, 0.0).at(0, 100) == 3.0
    assert WarmupWeight(4.0, 1).at(0, 100) == 0.0
    assert WarmupWeight(4.0, 1.0).at(50, 100) == 1.0
    assert WarmupWeight(1.0, 10).at(5, -1) == 0.25


@pytest.mark.parametrize(
    "arguments", [(-1.0,), (float("inf"),), ("1",), (1.0, -1), (1.0, 1.5), (1.0, True), (1.0, 0, "cubic")]
)
def test_warmup_refuses_bad_arguments(arguments):
    with pytest.raises(ValueError, match="got"):
        WarmupWeight(*arguments)


@pytest.mark.parametrize("total", [0, -1, float("inf")])
def test_a_fractional_warmup_needs_the_length_of_the_run(total):
    with pytest.raises(ValueError, match="total_steps"):
        WarmupWeight(1.0, 0.5).at(0, total)


@pytest.fixture(scope="module")
def st_losses():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sentence_transformers.sparse_encoder")
        from sentence_transformers.sparse_encoder import losses
    return losses


def columns(doc: torch.Tensor, per_query: int) -> list[torch.Tensor]:
    return list(doc.view(-1, per_query, doc.shape[1]).unbind(1))


def test_infonce_equals_sentence_transformers(st_losses):
    query, doc = (rep.detach().float() for rep in reps(4, 3, vocab=20))
    theirs = st_losses.SparseMultipleNegativesRankingLoss(nn.Identity(), scale=2.0)
    expected = theirs.compute_loss_from_embeddings([query, *columns(doc, 3)], None)
    assert InfoNCE(scale=2.0)(query, doc).item() == pytest.approx(expected.item(), rel=1e-5)


def test_margin_mse_equals_sentence_transformers(st_losses):
    query, doc = (rep.detach().float() for rep in reps(4, 3, vocab=20))
    teacher = torch.rand(4, 3, generator=torch.Generator().manual_seed(3))
    theirs = st_losses.SparseMarginMSELoss(nn.Identity())
    expected = theirs.compute_loss_from_embeddings([query, *columns(doc, 3)], teacher)
    assert MarginMSE()(query, doc, teacher_scores=teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_kl_equals_sentence_transformers(st_losses):
    query, doc = (rep.detach().float() for rep in reps(4, 3, vocab=20))
    teacher = torch.rand(4, 3, generator=torch.Generator().manual_seed(3)) * 9
    theirs = st_losses.SparseDistillKLDivLoss(nn.Identity(), temperature=2.0)
    expected = theirs.compute_loss_from_embeddings([query, *columns(doc, 3)], teacher)
    ours = KLDistillation(temperature=2.0)(query, doc, teacher_scores=teacher)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("path", sorted((CONF / "loss").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_loss_config_builds_and_runs(path):
    loss = instantiate(OmegaConf.load(path))
    assert isinstance(loss, WeightedSum)
    assert torch.isfinite(loss(*pair(), teacher_scores=torch.tensor(TEACHER)))
