"""What tests/ops/test_sequence.py runs on several processes: one process's answers are compared
with those of ranks that hold pieces of the same rows."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from many_ranks import say
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.errors import BlackMambaError
from blackmamba.model import BlackMamba
from blackmamba.ops import causal_conv1d, selective_scan
from blackmamba.ops.sequence import Pieces, inputs_before, selective_scan_of_pieces

RANKS = 4
Differences = dict[str, float]


def lengths_of(l: int, size: int) -> list[int]:
    """Pieces of different lengths that make up l."""
    odd = [l // size + (-1) ** i * (i + 1) for i in range(size - 1)]
    return [*odd, l - sum(odd)]


def own(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's piece of (b, l, ...)."""
    pieces = lengths_of(tensor.shape[1], dist.get_world_size(group))
    return tensor.split(pieces, dim=1)[dist.get_rank(group)]


def difference(actual: Tensor, exact: Tensor) -> float:
    """Relative; infinite where a shape differs."""
    if actual.shape != exact.shape:
        return torch.inf
    return ((actual - exact).abs().max() / exact.abs().max()).item()


def documents(b: int, l: int, size: int) -> Tensor:
    """(b, l): row 0 has documents that begin where pieces do and where they do not, and one that
    holds a whole piece; every other row is one document but for its last token."""
    seq_idx = torch.zeros(b, l, dtype=torch.int32)
    seq_idx[1:, -1] = 4
    cuts = [0, *itertools.accumulate(lengths_of(l, size))]
    starts = [cuts[1], cuts[1] + 1, cuts[-2] + 3] if size > 2 else [2, cuts[1], cuts[1] + 5]
    for i, start in enumerate(starts):
        seq_idx[0, start:] = (9, -3, 5)[i]
    return seq_idx


def check_scan(
    group: dist.ProcessGroup, dtype: torch.dtype, packed: bool, softplus: bool
) -> Differences:
    """Outputs, states and gradients of the scan."""
    b, l, d, n = 3, 61, 5, 3
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(size)
    draw: dict[str, Tensor] = {
        name: torch.randn(shape, dtype=torch.float64)
        for name, shape in {
            "x": (b, l, d), "dt": (b, l, d), "B": (b, l, n), "C": (b, l, n), "z": (b, l, d),
            "A": (d, n), "D": (d,), "dt_bias": (d,), "gy": (b, l, d), "g_final": (b, d, n),
        }.items()
    }  # fmt: skip
    draw["A"] = -draw["A"].exp() / 4  # so that the state lives through several pieces
    draw["dt"] = draw["dt"] - 3 if softplus else draw["dt"].abs() / 20
    draw["dt"][:, l // 2, 0] = -torch.inf if softplus else -draw["dt_bias"][0]  # delta of 0
    seq_idx = documents(b, l, size) if packed else None
    gy, g_final = draw.pop("gy"), draw.pop("g_final")
    along = {"x", "dt", "B", "C", "z"}

    def leaves(of: Callable[[Tensor], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            k: (of(v) if k in along else v).to(dtype).clone().requires_grad_()
            for k, v in draw.items()
        }

    def gradients(
        inputs: dict[str, Tensor], y: Tensor, final: Tensor, gy: Tensor, g_final: Tensor
    ) -> dict[str, Tensor]:
        pairs = (y * gy.to(y.dtype)).sum() + (final * g_final.to(final.dtype)).sum()
        return dict(zip(inputs, torch.autograd.grad(pairs, list(inputs.values())), strict=True))

    whole = leaves(lambda t: t, torch.float64)
    options: dict[str, Any] = {"dt_softplus": softplus}
    y, final = selective_scan(**whole, **options, seq_idx=seq_idx, backend="reference")
    exact = gradients(whole, y, final, gy, g_final) | {"y": y, "final": final}

    mine = leaves(lambda t: own(t, group), dtype)
    own_idx = None if seq_idx is None else own(seq_idx, group)
    pieces = Pieces.cut(group, own_idx)
    y, final = selective_scan_of_pieces(**mine, pieces=pieces, **options, seq_idx=own_idx)
    is_last = rank == size - 1
    found = gradients(mine, y, final, own(gy, group), g_final if is_last else 0 * g_final)
    for name in ("A", "D", "dt_bias"):
        dist.all_reduce(found[name], group=group)
    found["y"] = y
    errors = {
        k: difference(v, own(exact[k], group) if k in along or k == "y" else exact[k])
        for k, v in found.items()
    }
    return errors | ({"final": difference(final, exact["final"])} if is_last else {})


def check_convolution(group: dist.ProcessGroup, packed: bool) -> Differences:
    """The same for the convolution."""
    b, l, d, k = 3, 41, 3, 4
    size = dist.get_world_size(group)
    torch.manual_seed(size)
    x, gy = torch.randn(2, b, l, d, dtype=torch.float64)
    weight = torch.randn(d, k, dtype=torch.float64)
    seq_idx = documents(b, l, size) if packed else None
    whole = x.clone().requires_grad_()
    y, _ = causal_conv1d(whole, weight, seq_idx=seq_idx, backend="reference")
    (exact,) = torch.autograd.grad(y, whole, gy)
    mine = own(x, group).clone().requires_grad_()
    own_idx = None if seq_idx is None else own(seq_idx, group)
    before = inputs_before(mine, k - 1, Pieces.cut(group, own_idx), own_idx)
    own_y, _ = causal_conv1d(mine, weight, initial_state=before, seq_idx=own_idx)
    (found,) = torch.autograd.grad(own_y, mine, own(gy, group))
    return {"y": difference(own_y, own(y, group)), "x": difference(found, own(exact, group))}


def check_model(
    group: dist.ProcessGroup,
    layers: tuple[str, ...],
    dtype: torch.dtype = torch.float64,
    b: int = 2,
    l: int = 53,
    packed: bool = True,
    recompute: Any = "none",
    **shape: Any,
) -> Differences:
    """Loss and gradients of a whole model; some labels are left out."""
    torch.manual_seed(0)
    config = ModelConfig(
        layers=layers, d_model=16, vocab_size=31, n_experts=3, d_expert=12, **shape
    )
    model = BlackMamba(config, dtype=dtype)
    with torch.no_grad():  # random enough that every part matters
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train("moe" not in layers)  # Sinkhorn would balance each rank's tokens by themselves
    model.recompute = recompute
    ids, labels = torch.randint(0, 31, (2, b, l))
    labels[0, ::3] = -100
    labels[:, : l // 3] = -100  # of four ranks the first has none that counts
    size = dist.get_world_size(group)
    seq_idx = documents(b, l, size) if packed else None
    exact: dict[str, Tensor] = {}
    if dist.get_rank(group) == 0:
        loss = model.loss(ids, labels, seq_idx=seq_idx)
        loss.backward()
        exact = _taken(model) | {"loss": loss.detach()}

    share = int((own(labels, group) != -100).sum()) / int((labels != -100).sum())
    loss = share * model.loss(
        own(ids, group),
        own(labels, group),
        seq_idx=None if seq_idx is None else own(seq_idx, group),
        sequence_group=group,
    )
    loss.backward()
    found = _taken(model) | {"loss": loss.detach()}
    errors: Differences = {}
    for name, value in found.items():
        dist.all_reduce(value, group=group)
        if exact:
            errors[name] = difference(value, exact[name])
    return errors


def check_logits(group: dist.ProcessGroup) -> Differences:
    """The logits of a model that is only asked for them."""
    torch.manual_seed(0)
    config = ModelConfig(layers=("mamba", "moe"), d_model=16, vocab_size=31, d_expert=12)
    model = BlackMamba(config, dtype=torch.float64).eval()
    ids = torch.randint(0, 31, (2, 29))
    with torch.no_grad():
        logits = model(own(ids, group), sequence_group=group)
        return {"logits": difference(logits, own(model(ids), group))}


def _taken(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, which are taken away."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check_refusals(group: dist.ProcessGroup) -> list[str]:
    """What is refused, before any rank waits for another."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    messages: list[str] = []
    heads = {"n_heads": 2, "n_kv_heads": 2, "d_head": 8}
    for layers in (("mamba", "attention"), ("mamba",)):
        model = BlackMamba(ModelConfig(layers=layers, d_model=16, vocab_size=31, **heads))
        try:
            model(ids, sequence_group=group)
        except BlackMambaError as error:
            messages.append(str(error))
    return messages


CHECKS: dict[str, Callable[[dist.ProcessGroup], Any]] = {
    "refusals": check_refusals,
    "scan": lambda g: check_scan(g, torch.float64, packed=False, softplus=True),
    "packed scan": lambda g: check_scan(g, torch.float64, packed=True, softplus=True),
    "scan of given delta": lambda g: check_scan(g, torch.float64, packed=True, softplus=False),
    "float32 scan": lambda g: check_scan(g, torch.float32, packed=True, softplus=True),
    "convolution": lambda g: check_convolution(g, packed=False),
    "packed convolution": lambda g: check_convolution(g, packed=True),
    "model": lambda g: check_model(g, ("mamba", "moe", "mamba+moe"), packed=False),
    "packed model": lambda g: check_model(g, ("mamba", "moe", "mamba+moe")),
    "model, cheap": lambda g: check_model(g, ("mamba", "mamba"), recompute="cheap"),
    "model, layers": lambda g: check_model(g, ("mamba", "mamba"), recompute="layers"),
    "model with norms": lambda g: check_model(g, ("mamba",), mamba_norm=True),
    "logits": check_logits,
    "long row": lambda g: (
        check_model(g, ("mamba", "moe"), torch.float32, b=1, l=65_536, packed=False)
        if dist.get_world_size(g) == 2
        else {}
    ),
}


def check_all() -> dict[str, Any]:
    """What a rank found; two of them do everything as a pair, too."""
    dist.init_process_group("gloo")
    pair = dist.new_group([0, 1])
    everyone = dist.group.WORLD
    assert everyone is not None
    found: dict[str, Any] = {}
    for name, check in CHECKS.items():
        say(name)
        found[f"{name}, {RANKS} ranks"] = check(everyone)
        if dist.get_rank() < 2:
            found[f"{name}, 2 ranks"] = check(pair)
    dist.barrier()
    dist.destroy_process_group()
    return found
