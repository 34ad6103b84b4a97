"""The experts' products by Hopper's matrix units (products.cu) against float64."""

import dataclasses

import pytest
import torch
from numerics import relative_error
from torch import Tensor
from torch.nn import functional as F

from blackmamba.generate.prompt import PromptPass
from blackmamba.model import BlackMamba
from blackmamba.ops.expert_mlp import gpu as experts
from blackmamba.ops.expert_mlp import hopper
from blackmamba.ops.expert_mlp.order import gathered, sort_by_expert
from blackmamba.ops.gpu import hopper as units
from blackmamba.ops.prompt.gpu import norm_and_choice, norm_and_places
from blackmamba.presets import presets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not units.runs_on(torch.device("cuda")),
        reason="needs a GPU of NVIDIA's Hopper generation",
    ),
]
CASES = [  # rows of each group, m, n
    ([5, 0, 130, 1, 300, 129, 0], 64, 64),
    ([0, 0, 1], 8, 8),
    ([1000, 3, 129], 200, 136),
    ([64, 63, 65, 128], 72, 392),
    ([257], 1472, 264),
    ([300, 2100, 0, 700] * 4, 1152, 384),
]
EXACT = 2**-8  # half of bfloat16's last place, and the sum's own error


def drawn(sizes: list[int], m: int, n: int) -> dict[str, Tensor]:
    g = torch.Generator("cuda").manual_seed(sum(sizes) + m)
    t, e = sum(sizes), len(sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device="cuda").bfloat16()

    return {
        "x": normal(t, m),
        "w": (normal(e, 2 * n, m) / m**0.5),
        "other": normal(t, n),
        "ends": torch.tensor(sizes, device="cuda").cumsum(0).int(),
        "order": torch.randperm(t, generator=g, device="cuda").int(),
        "gate": torch.rand(t, generator=g, device="cuda"),
    }


def groups(sizes: list[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.double().split(sizes) for t in tensors), strict=True))


def products(sizes: list[int], x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([g @ w[i].double().t() for i, (g,) in enumerate(groups(sizes, x))])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_gated(case: tuple[list[int], int, int], gelu: bool):
    sizes, _, n = case
    made = drawn(*case)
    exact = products(sizes, made["x"], made["w"])
    y, h = hopper.gated(made["x"], made["w"], made["ends"], gelu, keep=True)
    again, none = hopper.gated(made["x"], made["w"], made["ends"], gelu, keep=False)
    assert torch.equal(y, again)
    assert h is not None
    assert none is None
    assert relative_error(h, exact) < EXACT
    g, u = h.double().split(n, 1)  # what is activated is in bfloat16
    assert relative_error(y, (F.gelu if gelu else F.silu)(g) * u) < EXACT


@pytest.mark.parametrize(
    ("case", "has_gate", "by_columns"),
    [
        (case, has_gate, by_columns)
        for case in CASES
        for has_gate in (False, True)
        for by_columns in (False, True)
        # nothing asks for both, and each is a kernel of its own to compile
        if case is CASES[-1] or not (has_gate and by_columns)
    ],
    ids=str,
)
def test_placed(case: tuple[list[int], int, int], has_gate: bool, by_columns: bool):
    made = drawn(*case)
    x, w, ends, order = (made[name] for name in ("x", "w", "ends", "order"))
    gate = made["gate"] if has_gate else None
    exact = products(case[0], x, w)
    exact[order.long()] = exact * (gate[order.long(), None].double() if gate is not None else 1)
    w = w.transpose(1, 2).contiguous() if by_columns else w
    found = hopper.placed(x, w, ends, order, gate, by_columns=by_columns)
    assert relative_error(found, exact) < EXACT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_and_gradient(case: tuple[list[int], int, int]):
    sizes = case[0]
    made = drawn(*case)
    x, w, ends = made["x"], made["w"], made["ends"]
    turned = w.transpose(1, 2).contiguous()
    assert relative_error(hopper.product(x, turned, ends), products(sizes, x, w)) < EXACT
    found = hopper.gradient(made["other"], x, ends)
    for i, (rows, others) in enumerate(groups(sizes, x, made["other"])):
        exact = others.t() @ rows
        assert relative_error(found[i], exact) < EXACT if len(rows) else not found[i].any()


def test_rows_that_lie_apart_and_numbers_that_are_none():
    made = drawn([200, 100], 64, 128)
    x, w, ends = made["x"], made["w"], made["ends"]
    apart = torch.cat([x, x], 1)[:, :64]
    plain, _ = hopper.gated(x, w, ends, False, False)
    assert torch.equal(hopper.gated(apart, w, ends, False, False)[0], plain)
    x[3, 5], x[250, 0] = torch.nan, torch.inf
    found, _ = hopper.gated(x, w, ends, False, False)
    assert found[3].isnan().all()
    kept = torch.ones(300, dtype=torch.bool, device="cuda")
    kept[[3, 250]] = False
    assert torch.equal(found[kept], plain[kept])
    x[3, 5], x[250, 0] = torch.nan, 0
    found = hopper.gradient(x, x, ends)
    assert found[0].isnan().any()
    assert not found[1].isnan().any()
    x[3, 5], x[250, 0] = 0, torch.nan
    found = hopper.gradient(x, x, ends)
    assert found[1].isnan().any()
    assert not found[0].isnan().any()
    assert not hopper.gated(x[:0], w, ends * 0, False, False)[0].numel()


def test_numbers_of_the_next_matrix_that_are_none():
    made = drawn([200, 100, 30], 200, 136)  # 200 is not a whole number of parts
    x, ends = made["x"], made["ends"]
    w = made["w"].transpose(1, 2).contiguous()
    plain = hopper.product(x, w, ends)
    w[1, :60] = torch.nan
    found = hopper.product(x, w, ends)
    assert found[200:300].isnan().all()
    assert torch.equal(found[:200], plain[:200])
    assert torch.equal(found[300:], plain[300:])
    placed = hopper.placed(x, w, ends, made["order"], by_columns=True)
    assert torch.equal(placed[made["order"].long()].isnan(), found.isnan())


def test_what_does_not_fit():
    x = torch.zeros(16, 16, device="cuda", dtype=torch.bfloat16)
    assert hopper.fits(x)
    assert not hopper.fits(x.float())
    assert not hopper.fits(x[:, 1:9])
    assert not hopper.fits(x[:, :12])
    assert not hopper.fits(x.t())


@pytest.mark.parametrize(
    ("t", "m", "f", "e"), [(257, 136, 72, 3), (2048, 1152, 3072, 8), (16_384, 1472, 3872, 8)]
)
@torch.inference_mode()
def test_rows_from_the_norm_added_to_the_stream(t: int, m: int, f: int, e: int):
    g = torch.Generator("cuda").manual_seed(t)
    x, router = (torch.randn(n, m, generator=g, device="cuda") for n in (t, e))
    update, fc1, fc2 = (
        torch.randn(shape, generator=g, device="cuda").bfloat16() / shape[-1] ** 0.5
        for shape in ((t, m), (e, 2 * f, m), (e, m, f))
    )
    weight, bias = torch.ones(m, device="cuda"), torch.zeros(e, device="cuda")
    choice = (update, weight, 1e-5, (router / m**0.5, bias))

    expected = x.clone()
    y, routes = norm_and_choice(expected, *choice)
    order, ends = sort_by_expert(routes.expert_ids, e)
    (rows,) = gathered(order, y)
    hidden, _ = hopper.gated(rows, fc1, ends, gelu=False, keep=False)
    expected += hopper.placed(hidden, fc2, ends, order, routes.gate)
    for _ in range(3):  # whatever the order of an expert's rows
        counts, found = torch.zeros(e, dtype=torch.int32, device="cuda"), x.clone()
        places_y, places = norm_and_places(found, *choice, counts)
        assert torch.equal(counts, routes.expert_ids.bincount(minlength=e).int())
        hopper.add_routed_(found, places_y, counts, places.order, places.gate, fc1, fc2, gelu=False)
        assert torch.equal(found, expected)

    some = slice(0, t, t // 16)
    total = x[some].double() + update[some].double()
    ids = routes.expert_ids[some]
    h = torch.einsum("tm,tfm->tf", y[some].double(), fc1[ids].double())
    h = F.silu(h[:, :f]) * h[:, f:]
    exact = routes.gate[some, None].double() * torch.einsum("tf,tmf->tm", h, fc2[ids].double())
    assert relative_error(found[some].double() - total, exact) < 2 * EXACT


@torch.inference_mode()
def test_prompts_are_read_to_the_same_bits_either_way(monkeypatch: pytest.MonkeyPatch):
    layers = ("mamba", "moe") * 3 + ("mamba",)
    config = dataclasses.replace(presets["blackmamba-1.5b"], layers=layers)
    torch.manual_seed(0)
    model = BlackMamba(config, device="cuda", dtype=torch.bfloat16).eval()
    ids = torch.randint(0, config.n_tokens, (3, 700), device="cuda")
    run, found = PromptPass(model), []
    for most in (0, 4096, 4096):
        monkeypatch.setattr(experts, "MOST_ADDED", most)
        logits, state = run(model, ids, None, None)
        found.append([logits, *state.to_tensors().values()])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
