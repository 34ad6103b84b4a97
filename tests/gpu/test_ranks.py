"""NCCL with one rank, and with two where there are so many GPUs: the run of one process."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from many_ranks import on_ranks
from ranks_train import train_all

from blackmamba.config import ModelConfig
from blackmamba.data import DataConfig
from blackmamba.train import RunConfig, TrainConfig, run
from blackmamba.train.metrics import read_metrics
from blackmamba.train.parallel.config import ParallelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 12
_logger = logging.getLogger(__name__)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"{number} bottles of beer on the wall.\n" * 40)
    return RunConfig(
        model=ModelConfig(
            layers=("mamba", "moe") * 2, d_model=64, vocab_size=320, n_experts=4, d_expert=64
        ),
        data=DataConfig(text=(str(text),), vocab_size=300, validation_fraction=0.1),
        train=TrainConfig(
            steps=STEPS, batch_size=8, accumulate=2, seq_len=64, lr=1e-3, warmup_steps=3,
            evaluate_seq_len=64, device="cuda", checkpoint_every=6,
        ),
    )  # fmt: skip


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("dtype", "parallel", "tolerance"),
    [
        ("float32", {}, 1e-4),
        ("float32", {"shard": "full"}, 1e-4),
        ("float32", {"shard": "full", "cpu_offload": True}, 1e-4),
        # The embedding is gathered in bfloat16, where one process reads it in float32.
        ("bfloat16", {"shard": "full"}, 2e-2),
    ],
    ids=("replicated", "sharded", "offloaded", "bfloat16"),
)
def test_one_rank_is_one_process(
    config: RunConfig, tmp_path: Path, dtype: str, parallel: dict[str, object], tolerance: float
):
    train = dataclasses.replace(config.train, dtype=dtype, weights="float32")
    alone = dataclasses.replace(config, train=train)
    run(alone, tmp_path / "alone")
    ranked = dataclasses.replace(alone, parallel=ParallelConfig(**parallel))
    on_ranks(1, train_all, [(ranked, tmp_path / "ranked", False)], timeout_s=300)
    assert len(losses(tmp_path / "ranked")) == STEPS
    assert losses(tmp_path / "ranked") == pytest.approx(losses(tmp_path / "alone"), abs=tolerance)


TWO: dict[str, tuple[str, str, dict[str, object], float]] = {
    "replicated": ("float32", "float32", {}, 1e-4),
    "full": ("float32", "float32", {"shard": "full"}, 1e-4),
    "hybrid": ("float32", "float32", {"shard": "hybrid", "shard_degree": 1}, 1e-4),
    "experts": ("float32", "float32", {"expert": 2}, 1e-4),
    "full-experts": ("float32", "float32", {"shard": "full", "expert": 2}, 1e-4),
    "pieces": ("float32", "float32", {"sequence": 2}, 1e-4),
    "bfloat16-full": ("bfloat16", "float32", {"shard": "full"}, 2e-2),
    "bfloat16-experts": ("bfloat16", "master", {"expert": 2}, 2e-2),
}
"""Dtype, weights, layout, tolerance."""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_are_one_process(config: RunConfig, tmp_path: Path):
    # A router without a balance: that of a piece of a row would be of other tokens.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, router="softmax"))
    alone = {
        (dtype, weights): dataclasses.replace(
            config, train=dataclasses.replace(config.train, dtype=dtype, weights=weights)
        )
        for dtype, weights, _, _ in TWO.values()
    }
    for (dtype, weights), one in alone.items():
        run(one, tmp_path / f"{dtype}-{weights}")
    runs: list[tuple[RunConfig, Path, bool]] = []
    for name, (dtype, weights, parallel, _) in TWO.items():
        one = alone[dtype, weights]
        train = dataclasses.replace(one.train, accumulate=2 if "sequence" in parallel else 1)
        spread = dataclasses.replace(one, train=train, parallel=ParallelConfig(**parallel))
        runs.append((spread, tmp_path / name, False))
    on_ranks(2, train_all, runs, timeout_s=300)
    apart: dict[str, float] = {}
    for name, (dtype, weights, _, tolerance) in TWO.items():
        pairs = zip(losses(tmp_path / name), losses(tmp_path / f"{dtype}-{weights}"), strict=True)
        apart[name] = max(abs(a - b) for a, b in pairs) / tolerance
    _logger.info("of the allowed difference: %s", apart)
    assert max(apart.values()) <= 1, apart
