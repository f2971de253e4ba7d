"""The head inside of larger graphs: CUDA graphs, compiled modules, tracers, checkpoints, ranks, several GPUs."""

from __future__ import annotations

import functools
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import sparton
from sparton.losses import FLOPS, InfoNCE

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
WORDS = 60 if ON_GPU else 24  # of the retriever that is compiled: they cost the interpreter most


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

    def __init__(self, words: int = WORDS, dim: int = 16) -> None:
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
        tensors += [torch.randint(WORDS, (texts, length)), (torch.arange(length) < lengths).long()]
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


@pytest.fixture
def leaves(device) -> list[Tensor]:
    """hidden (2, 5, 16), weight (21, 16) and bias (21,) that require gradients."""
    return [torch.randn(*shape, device=device).requires_grad_() for shape in ((2, 5, 16), (21, 16), (21,))]


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_a_second_derivative_is_refused(impl, leaves):
    out = sparton.lsr_head(*leaves, impl=impl).sum()
    (gradient,) = torch.autograd.grad(out, leaves[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative, use impl='naive'"):
        (out + gradient.square().sum()).backward()
    hidden, weight, bias = (leaf.detach().double().requires_grad_() for leaf in leaves)
    torch.autograd.gradgradcheck(lambda h: sparton.lsr_head(h, weight, bias, impl="naive"), hidden)


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_a_traced_graph_has_the_operators(impl, leaves):
    def gradients(*tensors):
        return torch.autograd.grad(sparton.lsr_head(*tensors, impl=impl).sum(), tensors)

    graph = make_fx(gradients)(*leaves)
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("sparton.lsr_forward.default") == names.count("sparton.lsr_backward.default") == 1
    with torch.no_grad():
        others = [leaf + 0.1 for leaf in leaves]
    for got, want in zip(graph(*others), gradients(*(t.requires_grad_() for t in others)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of Dynamo
@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_compiled_autograd_captures_the_backward_pass(impl, leaves):
    expected = torch.autograd.grad(sparton.lsr_head(*leaves, impl=impl).sum(), leaves)
    torch._dynamo.reset()
    with compiled_autograd._enable(functools.partial(torch.compile, backend="eager", fullgraph=True)):
        sparton.lsr_head(*leaves, impl=impl).sum().backward()
    torch._dynamo.reset()
    for leaf, want in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, want)


def test_a_selective_checkpoint_saves_the_operator(leaves, monkeypatch):
    hidden, weight, bias = leaves
    from sparton.kernels import forward

    launches = mock.Mock(side_effect=forward.triton_forward)
    monkeypatch.setattr(forward, "triton_forward", launches)
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.sparton.lsr_forward.default])

    def encode(states: Tensor) -> Tensor:
        return sparton.lsr_head(states.sin(), weight, bias, impl="triton").sum()

    expected = torch.autograd.grad(encode(hidden), leaves)
    launches.reset_mock()
    saved = torch.autograd.grad(checkpoint(encode, hidden, use_reentrant=False, context_fn=contexts), leaves)
    assert launches.call_count == 1
    for got, want in zip(saved, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_vmap_runs_the_head_for_each(impl, leaves):
    hidden, weight, bias = (leaf.detach() for leaf in leaves)
    several = torch.stack([hidden, hidden.flip(0), -hidden])
    out = torch.vmap(lambda states: sparton.lsr_head(states, weight, bias, impl=impl))(several)
    expected = [sparton.lsr_head(states, weight, bias, impl=impl) for states in several]
    torch.testing.assert_close(out, torch.stack(expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_tensors_of_a_gpu_that_is_not_the_current_one(impl, leaves):
    assert torch.cuda.current_device() == 0
    there = [leaf.detach().to("cuda:1").requires_grad_() for leaf in leaves]
    out, expected = (sparton.lsr_head(*tensors, impl=impl) for tensors in (there, leaves))
    gradients = torch.autograd.grad(out.sum(), there), torch.autograd.grad(expected.sum(), leaves)
    for got, want in zip((out, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert got.device == torch.device("cuda:1")
        torch.testing.assert_close(got.to(want.device), want)
    assert torch.cuda.current_device() == 0


def _one_rank(rank: int, store: str, results: str) -> None:
    """Trains a head on this rank's text under DDP and under FSDP2, each on the CPU."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    kind = sparton.TiledHead if ON_GPU else sparton.SpartonHead  # kernels run on the CPU in the interpreter only
    hidden, state, found = *_rank_inputs(), {}
    for name in ("ddp", "fsdp"):
        head = kind(16, 21)
        head.load_state_dict(state)
        if name == "ddp":
            wrapped = DistributedDataParallel(head)
        else:
            wrapped = fully_shard(head, mesh=dist.init_device_mesh("cpu", (2,)))
        wrapped(hidden[rank : rank + 1]).sum().backward()
        gradients = [parameter.grad for parameter in head.parameters()]
        found[name] = gradients if name == "ddp" else [gradient.full_tensor() for gradient in gradients]
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still drop tensors: asking a dying interpreter for its lock aborts the process


def _rank_inputs() -> tuple[Tensor, dict[str, Tensor]]:
    """hidden (2, 5, 16), a text for each rank, and the head's state."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 16), (21, 16), (21,)))
    return hidden, {"weight": weight, "bias": bias}


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_ranks_average_the_gradients_of_their_texts(tmp_path):
    mp.spawn(_one_rank, (str(tmp_path / "store"), str(tmp_path / "found.pt")), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    hidden, state = _rank_inputs()
    head = sparton.NaiveHead(16, 21)
    head.load_state_dict(state)
    (head(hidden).sum() / 2).backward()
    for gradients in found.values():
        for got, want in zip(gradients, (head.weight.grad, head.bias.grad), strict=True):
            torch.testing.assert_close(got, want)
