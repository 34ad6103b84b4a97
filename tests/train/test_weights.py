"""Training with weights of 16 bits, and with less memory."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import largest_difference

import blackmamba
from blackmamba.errors import ConfigError
from blackmamba.model import BlackMamba, keeps_float32
from blackmamba.model.embedding import Embedding
from blackmamba.ops import native
from blackmamba.ops.backend import forcing
from blackmamba.train import Progress, RunConfig, load_recipe, run, train_step
from blackmamba.train.metrics import read_metrics
from blackmamba.train.mixed import MixedAdamW, narrow_weights
from blackmamba.train.optimizer import build_optimizer, optimizer_tensors, restore_optimizer

Small = Callable[..., RunConfig]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def narrow(small: Small, weights: str) -> tuple[BlackMamba, Any]:
    """A model of bfloat16 matrices, and its optimizer."""
    torch.manual_seed(0)
    config = small(dtype="bfloat16", weights=weights)
    model = BlackMamba(config.model, compute_dtype=torch.bfloat16)
    return model, build_optimizer(model, config.train, narrow_weights(model, torch.bfloat16))


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 300, (4, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("weights", ["master", "stochastic"])
def test_narrow_weights_learn_like_wide_ones(weights: str, small: Small, tmp_path: Path):
    run(small(steps=25, dtype="bfloat16"), tmp_path / "wide")
    run(small(steps=25, dtype="bfloat16", weights=weights), tmp_path / "narrow")
    # at first only the embedding is rounded where it was not
    assert losses(tmp_path / "narrow")[0] == pytest.approx(losses(tmp_path / "wide")[0], rel=1e-3)
    rel = 0.03 if weights == "master" else 0.1
    assert losses(tmp_path / "narrow") == pytest.approx(losses(tmp_path / "wide"), rel=rel)
    for name, parameter in blackmamba.load(tmp_path / "narrow").named_parameters():
        assert keeps_float32(name) or torch.equal(parameter, parameter.bfloat16().float())


@pytest.mark.parametrize("weights", ["master", "stochastic"])
def test_a_stopped_run_goes_on_bit_for_bit(weights: str, small: Small, tmp_path: Path):
    class Stop(Progress):
        def on_step(self, row: dict[str, Any]) -> None:
            if row["step"] == 7:
                raise InterruptedError

    config = small(dtype="bfloat16", weights=weights, checkpoint_every=5, recompute="cheap")
    run(config, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(config, tmp_path / "cut", progress=Stop())
    run(config, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = (blackmamba.load(tmp_path / name) for name in ("cut", "whole"))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match=f"train.weights .was '{weights}', now 'float32'"):
        run(small(dtype="bfloat16", steps=20), tmp_path / "cut", resume=True)


def test_auto_is_masters_where_a_kernel_updates_them(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a GPU, and on a CPU with native kernels; a run goes on as it began all the same."""
    fast = "master" if native.missing() is None else "float32"
    for backend, weights, dtype in (
        ("auto", fast, "bfloat16"),
        ("auto", "float32", "float32"),
        ("reference", "float32", "bfloat16"),
    ):
        out = tmp_path / f"{backend}-{dtype}"
        monkeypatch.setenv("BLACKMAMBA_BACKEND", backend)
        run(small(steps=1, dtype=dtype, weights="auto"), out)
        assert load_recipe(out / "recipe.yaml").train.weights == weights
        monkeypatch.setenv("BLACKMAMBA_BACKEND", "auto")
        run(small(steps=2, dtype=dtype, weights="auto"), out, resume=True)
        assert load_recipe(out / "recipe.yaml").train.weights == weights


def test_the_embedding_of_16_bits_adds_up_what_a_frequent_token_gets():
    """512 times 2^-7 is 4; in bfloat16 the sum would stay at 2, where 2^-7 is half a unit."""
    table = Embedding(3, 4, dtype=torch.bfloat16)
    ids = torch.tensor([1] * 512 + [2])
    (table(ids).float() * 2**-7).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.dtype == torch.bfloat16
    assert table.weight.grad[:, 0].tolist() == [0.0, 4.0, 2**-7]
    assert torch.equal(table(ids), table.weight.detach()[ids])


def test_a_graph_needs_a_gpu(small: Small, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"train.capture=true"):
        run(small(capture=True), tmp_path)


def test_masters_are_what_is_updated_and_rounded(small: Small):
    model, optimizer = narrow(small, "master")
    wide = BlackMamba(small().model, compute_dtype=torch.bfloat16)
    wide.load_state_dict(model.state_dict())
    masters = {n: optimizer.state[p]["master"] for n, p in model.named_parameters()
               if not keeps_float32(n)}  # fmt: skip
    for name, parameter in wide.named_parameters():
        if name in masters and name != "embedding.weight":
            parameter.data.copy_(masters[name])
    with forcing("reference"):
        theirs = build_optimizer(wide, small(weights="float32").train)
    assert isinstance(theirs, torch.optim.AdamW)
    outcomes = [
        train_step(m, o, *batch(), lr=1e-2, grad_clip=0.1)
        for m, o in ((model, optimizer), (wide, theirs))
    ]
    assert outcomes[0].loss == outcomes[1].loss
    assert outcomes[0].grad_norm == pytest.approx(outcomes[1].grad_norm, rel=1e-3)  # the embedding
    for name, parameter in wide.named_parameters():
        own = dict(model.named_parameters())[name]
        if name in masters:
            assert torch.equal(own, masters[name].bfloat16())
            # a wide gradient of a narrow product has the narrow one's numbers
            if name != "embedding.weight":
                assert largest_difference(masters[name], parameter) < 1e-6, name
        else:
            assert largest_difference(own, parameter) < 1e-6, name


@pytest.mark.parametrize("weights", ["master", "stochastic"])
def test_a_bad_step_changes_nothing_and_is_not_counted(weights: str, small: Small):
    model, optimizer = narrow(small, weights)
    assert train_step(model, optimizer, *batch(), lr=1e-2).is_finite
    handle = model.final_norm.weight.register_hook(lambda g: g * math.inf)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    memory = {n: t.clone() for n, t in optimizer_tensors(model, optimizer).items()}
    outcome = train_step(model, optimizer, *batch(), lr=1e-2, grad_clip=1.0)
    assert not outcome.is_finite
    assert math.isfinite(outcome.loss)
    for old, new in ((before, model.state_dict()), (memory, optimizer_tensors(model, optimizer))):
        assert all(torch.equal(old[n], new[n]) for n in old)
    handle.remove()
    train_step(model, optimizer, *batch(), lr=1e-2)
    assert optimizer_tensors(model, optimizer)["embedding.weight/step"] == 2


def test_micro_batches_are_added_up_in_float32(small: Small):
    results: list[dict[str, torch.Tensor]] = []
    layers = ("mamba", "mlp")  # without experts, which Sinkhorn balances for each micro-batch
    config = small(dataclasses.replace(small().model, layers=layers, d_mlp=16))
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = BlackMamba(config.model, compute_dtype=torch.bfloat16)
        optimizer = build_optimizer(model, config.train, narrow_weights(model, torch.bfloat16))
        assert isinstance(optimizer, MixedAdamW)
        train_step(model, optimizer, *batch(), lr=1e-2, accumulate=accumulate)
        results.append({n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()})
    for name, expected in results[0].items():
        error = largest_difference(results[1][name], expected)
        assert error < 0.02 * expected.abs().max(), name  # four roundings to bfloat16, of quarters


def test_memory_of_another_way_to_keep_weights_is_refused(small: Small):
    model, optimizer = narrow(small, "master")
    train_step(model, optimizer, *batch(), lr=1e-2)
    tensors = optimizer_tensors(model, optimizer)
    assert tensors["layers.0.mixer.in_proj.weight/master"].dtype == torch.float32
    other, stochastic = narrow(small, "stochastic")
    with pytest.raises(ValueError, match="do not fit"):
        restore_optimizer(other, stochastic, tensors)
