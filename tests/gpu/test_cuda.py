"""The same numbers on a GPU as on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import largest_difference, relative_error

import blackmamba
from blackmamba.model import BlackMamba
from blackmamba.ops import causal_conv1d, expert_mlp, linear_cross_entropy, selective_scan, sinkhorn
from blackmamba.presets import presets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
FIXTURES = Path(__file__).parent.parent / "fixtures"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["released-dev", "released-bias"])
def test_golden_logits_and_continuations(name: str):
    model = blackmamba.load(FIXTURES / name, device="cuda")
    with np.load(FIXTURES / name / "expected.npz") as file:
        ids = torch.from_numpy(file["input_ids"])
        logits = torch.from_numpy(file["gelu/logits"])
        greedy = file["gelu/greedy_tokens"].tolist()
    with torch.inference_mode():
        assert largest_difference(model(ids.cuda()).cpu(), logits) < 2e-4
    assert blackmamba.generate(model, ids.tolist(), max_new_tokens=len(greedy[0])) == greedy


@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (2, 65, 48, 16), (4, 1000, 96, 16)], ids=str)
def test_scan_and_its_gradients(shape: tuple[int, int, int, int]):
    b, l, d, n = shape
    inputs = [normal(b, l, d), normal(b, l, d) - 2, -normal(d, n).exp(), normal(b, l, n)]
    inputs.append(normal(b, l, n, seed=1))
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
        y, state = selective_scan(*leaves, dt_softplus=True)
        (y.square().sum() + state.square().sum()).backward()
        results.append([y.detach(), state.detach(), *(t.grad for t in leaves)])
    for exact, actual in zip(*results, strict=True):
        assert relative_error(actual.cpu(), exact) < 3e-5


def test_conv_sinkhorn_and_cross_entropy():
    x, weight = normal(2, 33, 8), normal(8, 4)
    y, _ = causal_conv1d(x.cuda().float(), weight.cuda().float())
    assert relative_error(y.cpu(), causal_conv1d(x, weight)[0]) < 1e-5
    logits = normal(512, 8)
    assert largest_difference(sinkhorn(logits.cuda()).plan.cpu(), sinkhorn(logits).plan) < 1e-9
    head, labels = normal(50, 8), torch.arange(66) % 50
    loss = linear_cross_entropy(x.view(-1, 8).cuda(), head.cuda(), labels.cuda())
    torch.testing.assert_close(loss.cpu(), linear_cross_entropy(x.view(-1, 8), head, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [0, 1, 7, 1000])
def test_experts_and_their_gradients(t: int, dtype: torch.dtype):
    x, fc1, fc2 = normal(t, 64), normal(4, 96, 64) / 8, normal(4, 64, 48) / 8
    ids = torch.arange(t) % 3  # the last expert idles
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        leaves = [p.to(device, kind, copy=True).requires_grad_() for p in (x, fc1, fc2)]
        y = expert_mlp(leaves[0], ids.to(device), *leaves[1:])
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in leaves)])
    for exact, actual in zip(*results, strict=True):
        assert relative_error(actual.cpu(), exact) < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("name", ["tiny", "transformer-tiny"])
def test_training_step(name: str):
    torch.manual_seed(0)
    model = BlackMamba(presets[name])
    ids = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(1))
    model.eval()  # the routing of inference: the same experts on both
    expected = model.loss(ids, ids)
    expected.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda()
    loss = model.loss(ids.cuda(), ids.cuda())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative_error(parameter.grad.cpu(), grads[key]) < 1e-3, key
