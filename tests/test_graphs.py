"""The Triton head inside of larger graphs: CUDA graphs that are replayed, modules under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparton
from sparton.losses import FLOPS, InfoNCE

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()


def head_and_gradients(leaves: list[Tensor], grad: Tensor, layout: dict) -> list[Tensor]:
    """Output and all three gradients."""
    out = sparton.lsr_head(*leaves, **layout, impl="triton")
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("hopper", ["1", "0"])  # the Gluon kernel where the card has it, and the plain one
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_a_replayed_cuda_graph_gives_what_eager_gives(padded, dtype, hopper, device, monkeypatch):
    monkeypatch.setenv("SPARTON_HOPPER", hopper)
    monkeypatch.delenv("SPARTON_CHECK", raising=False)  # a check of values waits for the device
    batch, longest, dim, vocab = 12, 90, 256, 3001
    lengths = torch.tensor([longest, 0, 1] + [40] * (batch - 3), device=device)

    def contents(lengths: Tensor) -> dict[str, Tensor]:
        """New values for everything that a step may change."""
        tokens = batch * longest
        drawn = {
            "hidden": torch.randn(tokens, dim, device=device).to(dtype),
            "weight": (torch.randn(vocab, dim, device=device) / dim**0.5).to(dtype),
            "bias": torch.randn(vocab, device=device).to(dtype),
            "grad": torch.randn(batch, vocab, device=device).to(dtype),
        }
        if padded:
            drawn["hidden"] = drawn["hidden"].view(batch, longest, dim)
            drawn["attention_mask"] = (torch.arange(longest, device=device) < lengths[:, None]).long()
        else:
            drawn["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        return drawn

    def step(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = [tensors[name] for name in ("hidden", "weight", "bias")]
        layout = {name: tensors[name] for name in ("attention_mask", "cu_seqlens") if name in tensors}
        return head_and_gradients(leaves, tensors["grad"], layout | ({} if padded else {"max_seqlen": longest}))

    static = contents(lengths)
    for name in ("hidden", "weight", "bias"):
        static[name].requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles what there is to compile
        for _ in range(2):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(static)
    for i in range(3):
        drawn = contents(lengths.roll(i + 1).clamp_max(longest - 7 * i))
        with torch.no_grad():
            for name, value in drawn.items():
                static[name].copy_(value)
            for result in results:
                result.fill_(float("nan"))
        graph.replay()
        fresh = {name: value.detach().clone() for name, value in drawn.items()}
        for name in ("hidden", "weight", "bias"):
            fresh[name].requires_grad_()
        expected = step(fresh)
        assert all(result.any() for result in expected)
        for name, got, want in zip(("output", "hidden", "weight", "bias"), results, expected, strict=True):
            assert torch.equal(got, want), f"{name} of replay {i}"


class Retriever(nn.Module):
    """A bag-of-embeddings encoder, the head, and the loss of queries against documents."""

    def __init__(self, words: int = 60, dim: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, dim)
        self.linear = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(words))
        self.ranking, self.regularizer = InfoNCE(), FLOPS(weight=0.1)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.linear(self.embedding(ids))
        return sparton.lsr_head(hidden, self.embedding.weight, self.bias, mask, impl="triton")

    def forward(self, queries: Tensor, query_mask: Tensor, docs: Tensor, doc_mask: Tensor) -> Tensor:
        query, doc = self.encode(queries, query_mask), self.encode(docs, doc_mask)
        return self.ranking(query, doc) + 0.1 * self.regularizer(doc)


def draw_batch(batch: int, query_length: int, doc_length: int, device: torch.device) -> list[Tensor]:
    """Token ids and masks of ``batch`` queries and two documents for each."""
    tensors = []
    for texts, length in ((batch, query_length), (2 * batch, doc_length)):
        lengths = torch.randint(1, length + 1, (texts, 1))
        tensors += [torch.randint(60, (texts, length)), (torch.arange(length) < lengths).long()]
    return [tensor.to(device) for tensor in tensors]


def test_encoder_head_and_loss_compile_to_one_dynamic_graph(device):
    torch._dynamo.reset()
    model = Retriever().to(device)
    counter = CompileCounterWithBackend("inductor" if ON_GPU else "aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counts = []
    for batch, query_length, doc_length in ((3, 5, 9), (4, 7, 12), (2, 6, 15), (6, 3, 10)):
        inputs = draw_batch(batch, query_length, doc_length, device)
        expected, got = model(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        parameters = list(model.parameters())
        gradients = [torch.autograd.grad(loss, parameters) for loss in (got, expected)]
        for one, other in zip(*gradients, strict=True):
            assert one.any()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts == [1, 2, 2, 2], "graphs compiled: one, and one more whatever the sizes"
