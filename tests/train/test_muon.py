"""Muon: against its definition, against torch's on matrices, on stacks, and in whole runs."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import largest_difference
from torch import Tensor, nn

import blackmamba
from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.model import BlackMamba
from blackmamba.ops.native import bfloat16
from blackmamba.presets import presets
from blackmamba.train import Progress, RunConfig, run, train_step
from blackmamba.train.folder import with_dtype
from blackmamba.train.metrics import read_metrics
from blackmamba.train.mixed import narrow_weights
from blackmamba.train.muon import Muon, is_muons, orthogonal
from blackmamba.train.optimizer import build_optimizer, optimizer_tensors

Small = Callable[..., RunConfig]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def muon(parameters: list[nn.Parameter], **options: Any) -> Muon:
    groups = [{"params": parameters, "weight_decay": 0.1, "is_muons": True}]
    settings = {"momentum": 0.9, "scale": "moonlight", "dtype": torch.float32}
    return Muon(groups, 0.02, (0.9, 0.95), 1e-8, {}, **settings | options)


@pytest.mark.parametrize("shape", [(8, 8), (3, 7), (7, 3), (1, 5), (5, 1), (2, 6, 4)], ids=str)
def test_singular_values_become_about_one(shape: tuple[int, ...]):
    x = random(*shape)
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    for _ in range(5):  # of x / norm, what the iteration does to each singular value
        s = s / s.square().sum(-1, keepdim=True).sqrt() if _ == 0 else s
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    exact = u @ torch.diag_embed(s) @ vt
    assert largest_difference(orthogonal(x, torch.float32), exact) < 1e-4
    assert 0.6 < s.min() <= s.max() < 1.3
    # Every product rounds to 8 bits, and the iteration's slope at 0, 3.4 a turn, makes it grow.
    assert largest_difference(orthogonal(x, torch.bfloat16), exact) < 0.1
    assert torch.equal(orthogonal(torch.zeros(shape), torch.float32), torch.zeros(shape))


@pytest.mark.parametrize("scale", ["moonlight", "jordan"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (5, 5)], ids=str)
def test_a_matrix_moves_as_by_torchs(
    scale: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    # torch's iteration is in bfloat16 always; here both shall be in float32
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    start = random(*shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    adjust = {"moonlight": "match_rms_adamw", "jordan": "original"}[scale]
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust
    )
    optimizer = muon([ours], scale=scale)
    for seed in range(1, 5):
        ours.grad, theirs.grad = random(*shape, seed=seed), random(*shape, seed=seed)
        optimizer.step()
        reference.step()
        assert largest_difference(ours.detach(), theirs.detach()) < 1e-5
    assert largest_difference(ours.detach(), start) > 0.02


def test_each_expert_of_a_stack_moves_as_if_alone():
    start = random(3, 4, 6)
    stack = nn.Parameter(start.clone())
    alone = [nn.Parameter(matrix.clone()) for matrix in start]
    optimizer, others = muon([stack]), muon(alone)
    for seed in (1, 2, 3):
        g = random(3, 4, 6, seed=seed) * torch.tensor([1.0, 1000.0, 0.0])[:, None, None]
        stack.grad = g
        for parameter, part in zip(alone, g, strict=True):
            parameter.grad = part.clone()
        optimizer.step()
        others.step()
    for matrix, parameter in zip(stack, alone, strict=True):
        assert largest_difference(matrix.detach(), parameter.detach()) < 1e-6
    # The expert that saw no token has only decayed.
    assert largest_difference(stack[2].detach(), start[2] * (1 - 0.02 * 0.1) ** 3) < 1e-6


@pytest.mark.parametrize("on_device", [False, True])
def test_matrices_of_one_shape_move_together_as_if_alone(on_device: bool):
    shapes = [(4, 6), (3, 4, 6), (6, 4), (4, 6), (2, 40, 900), (40, 900)]
    together, alone = (
        [nn.Parameter(random(*s, seed=i)) for i, s in enumerate(shapes)] for _ in "ab"
    )
    optimizer, others = muon(together), [muon([p]) for p in alone]
    assert [len(members) for members in optimizer._together(together)] == [3, 1, 1, 1]
    for seed in (1, 2):
        gradients = [random(*s, seed=10 * seed + i) for i, s in enumerate(shapes)]
        for q, g, other in zip(alone, gradients, others, strict=True):
            other.update({q: g}, gradient_scale=0.5)
        if on_device:  # where the host does not look
            given = dict(zip(together, gradients, strict=True))
            for members in optimizer._together(together):
                found = [0.5 * given[p] for p in members]
                optimizer._move(members, found, optimizer.param_groups[0], torch.tensor(True))
        else:
            optimizer.update(dict(zip(together, gradients, strict=True)), gradient_scale=0.5)
    for p, q in zip(together, alone, strict=True):
        assert largest_difference(p.detach(), q.detach()) < 1e-5


def test_which_parameters_are_muons():
    config = dataclasses.replace(
        presets["tiny"], layers=("mamba+moe", "attention", "mlp"), d_mlp=8, n_heads=2,
        n_kv_heads=1, linear_bias=True, head_bias=True, tie_embeddings=False,
    )  # fmt: skip
    model = BlackMamba(config, device="meta")
    names = {
        re.sub(r"^layers\.\d+\.", "", n) for n, p in model.named_parameters() if is_muons(n, p)
    }
    assert names == {
        "mixer.in_proj.weight", "mixer.x_proj.weight", "mixer.dt_proj.weight",
        "mixer.out_proj.weight", "mixer.q_proj.weight", "mixer.k_proj.weight",
        "mixer.v_proj.weight", "feed_forward.fc1", "feed_forward.fc2", "feed_forward.fc1.weight",
        "feed_forward.fc2.weight",
    }  # fmt: skip


def test_the_rest_is_adamws_at_its_own_rate(small: Small):
    torch.manual_seed(0)
    model = BlackMamba(small().model)
    twin = BlackMamba(small().model)
    twin.load_state_dict(model.state_dict())
    ids = torch.arange(34).view(2, 17)
    config = small(optimizer="muon", adamw_lr_ratio=0.5)
    optimizer = build_optimizer(model, config.train)
    for seed in range(2):
        batch = ids[:, :-1] + seed, ids[:, 1:]
        train_step(model, optimizer, *batch, lr=0.02)
        if seed == 0:  # after one step both saw the same gradients
            adamw = build_optimizer(twin, small().train)
            train_step(twin, adamw, *batch, lr=0.01)
            for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                difference = largest_difference(p.detach(), q.detach())
                assert (difference < 1e-6) == (not is_muons(name, p)), name
    kinds = {name.split("/")[1] for name in optimizer_tensors(model, optimizer)}
    assert kinds == {"momentum", "exp_avg", "exp_avg_sq", "step"}


def test_steps_are_as_large_as_adamws():
    for scale, expected in (("moonlight", 0.2), ("jordan", 1 / math.sqrt(64))):
        parameter = nn.Parameter(torch.zeros(32, 64))
        optimizer = muon([parameter], scale=scale)
        parameter.grad = random(32, 64)
        optimizer.step()
        assert parameter.detach().square().mean().sqrt().item() == pytest.approx(
            0.02 * expected,
            rel=0.25,  # singular values of 0.7 to 1.2
        )


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("weights", ["float32", "master"])
def test_a_step_that_is_not_taken_changes_nothing(
    weights: str, on_device: bool, small: Small, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    settings = small(optimizer="muon", weights=weights, dtype="bfloat16").train
    model = BlackMamba(small().model, compute_dtype=torch.bfloat16)
    masters = narrow_weights(model, torch.bfloat16) if weights == "master" else {}
    optimizer = build_optimizer(model, settings, masters)
    ids = torch.arange(34).view(2, 17)
    train_step(model, optimizer, ids[:, :-1], ids[:, 1:], lr=0.01)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    memory = {n: t.clone() for n, t in optimizer_tensors(model, optimizer).items()}
    bad = {p: torch.full_like(p, math.nan) for p in model.parameters()}
    assert isinstance(optimizer, Muon)
    if on_device:  # where the host does not look
        for name, parameter in model.named_parameters():
            if is_muons(name, parameter):
                optimizer._move(
                    [parameter], [bad[parameter].float()], optimizer.param_groups[0],
                    torch.tensor(False),
                )  # fmt: skip
    else:
        optimizer.update(bad, go=torch.tensor(False))
    for old, new in ((before, model.state_dict()), (memory, optimizer_tensors(model, optimizer))):
        assert all(torch.equal(old[n], new[n]) for n in old)


def test_a_narrow_matrix_without_a_master_is_refused():
    with pytest.raises(ValueError, match="no float32 master"):
        muon([nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))])


def test_products_are_narrow_where_the_processor_has_them(
    small: Small, monkeypatch: pytest.MonkeyPatch
):
    def chosen(config: RunConfig, checkpoint: Any = None) -> str:
        return with_dtype(config, checkpoint, torch.device("cpu")).train.muon_dtype

    config = small(optimizer="muon")
    for has_it in (True, False):
        monkeypatch.setattr(bfloat16, "_by", "pairs" if has_it else "floats")
        assert chosen(config) == ("bfloat16" if has_it else "float32")
        assert chosen(small(optimizer="muon", muon_dtype="float32")) == "float32"
        assert chosen(small()) == "auto"
        for begun in ("float32", "auto"):
            old = small(optimizer="muon", muon_dtype=begun)
            assert chosen(config, SimpleNamespace(config=old)) == begun
    model = BlackMamba(config.model)
    for given, dtype in (("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        optimizer = build_optimizer(model, small(optimizer="muon", muon_dtype=given).train)
        assert isinstance(optimizer, Muon)
        assert optimizer._dtype == dtype


class Stop(Progress):
    def on_step(self, row: dict[str, Any]) -> None:
        if row["step"] == 8:
            raise InterruptedError


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "weights": "master"}], ids=str)
def test_a_run_learns_and_goes_on_bit_for_bit(
    options: dict[str, Any], small: Small, tmp_path: Path
):
    model = ModelConfig(
        layers=("mamba", "moe", "attention", "mlp"), d_model=16, vocab_size=300, d_state=4,
        n_experts=4, d_expert=16, d_mlp=16, n_heads=2, n_kv_heads=1, d_head=8,
    )  # fmt: skip
    config = small(model, steps=20, optimizer="muon", lr=0.02, checkpoint_every=5, **options)
    run(config, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(config, tmp_path / "cut", progress=Stop())
    run(config, tmp_path / "cut", resume=True)
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.75 * losses[0][0]
    one, other = (blackmamba.load(tmp_path / name) for name in ("whole", "cut"))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match=r"train.optimizer \(was 'muon', now 'adamw'\)"):
        run(small(model, steps=20, checkpoint_every=5, lr=0.02, **options), tmp_path / "cut",
            resume=True)  # fmt: skip
