"""Runs with every kind of router: resumed they are the same, and a bias moves once a step."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blackmamba.checkpoint import load
from blackmamba.train import Progress, RunConfig, run
from blackmamba.train.metrics import read_metrics

Small = Callable[..., RunConfig]
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {"router": "sigmoid", "selection_bias": True, "experts_per_token": 2,
                "d_shared_expert": 8, "mamba_norm": True},
    "softmax": {"router": "softmax", "balance_loss": 0.1, "balance_scope": "global",
                "router_z_loss": 0.01},
}  # fmt: skip


class Dies(Progress):
    """At the end of this step."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            raise RuntimeError("died")


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same(kind: str, small: Small, tmp_path: Path):
    model = dataclasses.replace(small().model, **KINDS[kind])
    config = small(model, accumulate=2, checkpoint_every=4, log_every=1)
    run(config, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="died"):
        run(config, tmp_path / "cut", progress=Dies(7))
    run(config, tmp_path / "cut", resume=True)
    for name in ("model/model.safetensors", "checkpoints/step-00000012/optimizer.safetensors"):
        one, other = (tmp_path / out / name for out in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes(), name
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / out / "metrics.jsonl")]
        for out in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.9 * losses[0][0]
    # what is reported is the cross-entropy alone
    assert losses[0][0] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.1)


def test_the_bias_moves_once_a_step_whatever_the_micro_batches(small: Small, tmp_path: Path):
    model = dataclasses.replace(small().model, **KINDS["sigmoid"], selection_bias_rate=0.25)
    biases: list[torch.Tensor] = []
    for accumulate in (1, 2):
        out = tmp_path / str(accumulate)
        run(small(model, steps=1, warmup_steps=0, accumulate=accumulate), out)
        tensors = load(out / "model").state_dict()
        biases += [t for n, t in tensors.items() if n.endswith("selection_bias")]
    assert set(biases[0].tolist()) <= {-0.25, 0.0, 0.25}
    assert biases[0].any()
    assert torch.equal(*biases)
