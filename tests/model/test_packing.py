"""Rows that hold several documents, and training that computes some things twice."""

import itertools

import pytest
import torch
from numerics import largest_difference, relative_error

from blackmamba.config import ModelConfig
from blackmamba.errors import InputError
from blackmamba.model import BlackMamba
from blackmamba.ops import recompute as recomputing

CUTS = (0, 1, 3, 4, 20, 21, 33)  # documents shorter than the convolution, and long ones

PATTERNS = {
    "blackmamba": ("mamba", "moe", "mamba", "moe"),
    "transformer": ("attention", "mlp", "attention", "moe"),
    "parallel": ("mamba+moe", "attention+mlp", "mamba+moe:3"),
}


def build(pattern: str) -> BlackMamba:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "vocab_size": 61, "n_experts": 4, "d_expert": 24, "d_mlp": 40}
    heads = {"n_heads": 4, "n_kv_heads": 2, "d_head": 8}
    model = BlackMamba(ModelConfig(layers=PATTERNS[pattern], **sizes, **heads))  # pyright: ignore
    with torch.no_grad():  # random enough that every part matters
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(b: int, l: int) -> torch.Tensor:
    return torch.randint(0, 61, (b, l), generator=torch.Generator().manual_seed(1))


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row of six documents and one of two, labels, and whose each token is."""
    ids = tokens(2, CUTS[-1])
    seq_idx = torch.zeros(2, CUTS[-1], dtype=torch.int32)
    for i, (start, end) in enumerate(itertools.pairwise(CUTS)):
        seq_idx[0, start:end] = (7, 2, 9, 1, -1, 3)[i]
    seq_idx[1, 10:] = 1
    return ids, ids.roll(-1, 1), seq_idx


def documents(ids: torch.Tensor) -> list[torch.Tensor]:
    pieces = [ids[:1, a:b] for a, b in itertools.pairwise(CUTS)]
    return [*pieces, ids[1:, :10], ids[1:, 10:]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_equal_documents_alone(pattern: str):
    model = build(pattern)
    ids, labels, seq_idx = packed()
    with torch.inference_mode():
        together = model(ids, seq_idx=seq_idx)
        pieces = documents(together)
        for alone, piece in zip(documents(ids), pieces, strict=True):
            assert largest_difference(model(alone), piece) < 1e-5
        assert torch.equal(model(ids, seq_idx=torch.full_like(seq_idx, 5)), model(ids))
    # and so do loss and gradients
    total = sum(
        model.loss(a, b) * a.numel() for a, b in zip(documents(ids), documents(labels), strict=True)
    )
    assert isinstance(total, torch.Tensor)
    (total / ids.numel()).backward()
    expected = gradients(model)
    loss = model.loss(ids, labels, seq_idx=seq_idx)
    loss.backward()
    assert abs(loss.item() - total.item() / ids.numel()) < 1e-5 * loss.item()
    for name, gradient in gradients(model).items():
        # sums of a few hundred float32 terms in another order
        assert relative_error(gradient, expected[name]) < 2e-5, name


def gradients(model: BlackMamba) -> dict[str, torch.Tensor]:
    """Those that there are, which are taken away."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("seq_idx", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"seq_idx has shape \(2, 3\), must be \(2, 5\)"),
        (torch.zeros(2, 5), r"seq_idx is torch.float32, must be an integer dtype"),
    ],
)
def test_bad_documents_are_named(seq_idx: torch.Tensor, message: str):
    with pytest.raises(InputError, match=message):
        build("blackmamba")(tokens(2, 5), seq_idx=seq_idx)


@pytest.mark.parametrize("what", ["cheap", "layers"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_recomputing_changes_no_bit(pattern: str, what: recomputing.Recompute):
    model = build(pattern).train()
    ids, labels, seq_idx = packed()
    results = []
    for model.recompute in ("none", what):
        loss = model.loss(ids, labels, seq_idx=seq_idx)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert model.recompute == what
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_an_output_is_computed_once_for_all_that_saved_it_and_let_go():
    x = torch.randn(5, 4, requires_grad=True)
    calls = 0

    def double() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x.detach() * 2

    y = x * 2
    with recomputing.not_kept(y, double):
        z = (y.view(4, 5) * y.view(4, 5)).sum() + (y.exp() * y).sum()
    assert calls == 0
    (grad,) = torch.autograd.grad(z, x, retain_graph=True)
    assert calls == 1
    exact = 8 * x + 2 * torch.exp(2 * x) * (1 + 2 * x)
    torch.testing.assert_close(grad, exact.detach())
    torch.testing.assert_close(torch.autograd.grad(z, x)[0], exact.detach())
    assert calls == 2
    with recomputing.not_kept(y, double, False), torch.no_grad():
        y.square()
