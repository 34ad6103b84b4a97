"""NCCL with one rank, and with two where there are so many GPUs: the run of one process.

Ranks that hang are told with the stacks of their threads. To see how far the ranks are:

    pytest tests/gpu/test_ranks.py -o log_cli=true --log-cli-level=INFO -k experts
"""

import dataclasses
import logging
import time
from collections.abc import Callable
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


def small(folder: Path) -> RunConfig:
    """A run of seconds, on a text that it writes into a folder."""
    text = folder / "text"
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


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return small(tmp_path)


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
    # Rounded otherwise, tokens near a tie go elsewhere, and Sinkhorn's balance moves others too.
    router = "softmax" if dtype == "bfloat16" else config.model.router
    model = dataclasses.replace(config.model, router=router)
    alone = dataclasses.replace(config, model=model, train=train)
    run(alone, tmp_path / "alone")
    ranked = dataclasses.replace(alone, parallel=ParallelConfig(**parallel))
    on_ranks(1, train_all, [(ranked, tmp_path / "ranked", False)], timeout_s=SILENT_S)
    assert len(losses(tmp_path / "ranked")) == STEPS
    assert losses(tmp_path / "ranked") == pytest.approx(losses(tmp_path / "alone"), abs=tolerance)


Layout = tuple[str, str, dict[str, object], float]
"""Dtype, weights, what a recipe says of the ranks, tolerance."""
TWO: dict[str, dict[str, Layout]] = {
    "copies": {
        "replicated": ("float32", "float32", {}, 1e-4),
        "hybrid": ("float32", "float32", {"shard": "hybrid", "shard_degree": 1}, 1e-4),
    },
    "shards": {
        "full": ("float32", "float32", {"shard": "full"}, 1e-4),
        "bfloat16-full": ("bfloat16", "float32", {"shard": "full"}, 2e-2),
    },
    "experts": {
        "experts": ("float32", "float32", {"expert": 2}, 1e-4),
        "full-experts": ("float32", "float32", {"shard": "full", "expert": 2}, 1e-4),
        "bfloat16-experts": ("bfloat16", "master", {"expert": 2}, 2e-2),
    },
    "pieces": {"pieces": ("float32", "float32", {"sequence": 2}, 1e-4)},
}
"""By what NCCL is asked to do: a group hangs alone."""
SILENT_S = 100.0
"""More than the kernels of a run take to build: ranks that say nothing for so long hang."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[RunConfig, Path]]:
    """The run of one process in a dtype, with such weights; once."""
    folder = tmp_path_factory.mktemp("alone")
    base = small(folder)
    # A router without a balance: that of a piece of a row would be of other tokens. A shared
    # expert is computed while tokens travel.
    model = dataclasses.replace(base.model, router="softmax", d_shared_expert=64)
    known: dict[tuple[str, str], tuple[RunConfig, Path]] = {}

    def find(dtype: str, weights: str) -> tuple[RunConfig, Path]:
        if (dtype, weights) not in known:
            train = dataclasses.replace(base.train, dtype=dtype, weights=weights)
            config = dataclasses.replace(base, model=model, train=train)
            out = folder / f"{dtype}-{weights}"
            begun = time.monotonic()
            run(config, out)
            _logger.info("%s in one process: %.1f s", out.name, time.monotonic() - begun)
            known[dtype, weights] = config, out
        return known[dtype, weights]

    return find


@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("group", TWO)
def test_two_ranks_are_one_process(
    group: str, alone: Callable[[str, str], tuple[RunConfig, Path]], tmp_path: Path
):
    for name, (dtype, weights, parallel, _) in TWO[group].items():
        one, _ = alone(dtype, weights)
        train = dataclasses.replace(one.train, accumulate=2 if "sequence" in parallel else 1)
        spread = dataclasses.replace(one, train=train, parallel=ParallelConfig(**parallel))
        # Processes of their own, as torchrun starts them: torch 2.11 crashes in `split_group` of
        # the second default group of a process.
        on_ranks(2, train_all, [(spread, tmp_path / name, False)], timeout_s=SILENT_S)
    apart: dict[str, float] = {}
    for name, (dtype, weights, _, tolerance) in TWO[group].items():
        pairs = zip(losses(tmp_path / name), losses(alone(dtype, weights)[1]), strict=True)
        apart[name] = max(abs(a - b) for a, b in pairs) / tolerance
    _logger.info("of the allowed difference: %s", apart)
    assert max(apart.values()) <= 1, apart
