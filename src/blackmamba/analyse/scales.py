"""How large the experiments of a report are."""

import dataclasses

from blackmamba.train import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    ladder: tuple[tuple[int, int], ...]
    """(d_model, pairs of layers) of each rung; the first is also that of the ablations."""
    seeds: tuple[int, ...]
    """How many at each rung."""
    vocab_size: int
    """Of a tokenizer that is trained; prepared text brings its own."""
    settings: TrainConfig
    """`lr` is of what is not tuned."""
    lrs: tuple[float, ...]
    """Learning rates that each network tries at the first rung, in short runs; one: that one is
    taken untried."""
    muon_lrs: tuple[float, ...]
    """The same of the better recipe."""
    tuning_steps: int
    """Of a short run."""
    ablation_seeds: int
    experts: tuple[int, ...]
    """Numbers of experts in the ablations."""
    latency: tuple[int, int]
    """(d_model, pairs)."""
    contexts: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    sinkhorn_tokens: tuple[int, ...]
    sinkhorn_experts: tuple[int, ...]
    probes: int
    """Checkpoints of one run that its experts are looked at in."""
    cuts: int = 0
    """How often a run saves what it goes on from if it is cut; 0: it is so short that it begins
    anew."""


def _settings(steps: int, batch_size: int, seq_len: int, lr: float, dtype: str) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        min_lr_ratio=0.05,
        warmup_steps=max(1, steps // 20),
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        weights="auto",
        evaluate_seq_len=128,  # many short streams: attention remembers little of each
        evaluate_batch_size=256,
        log_every=100,
    )


SCALES: dict[str, Scale] = {
    "toy": Scale(
        ladder=((32, 1),), seeds=(1,), vocab_size=300,
        settings=_settings(6, 4, 32, 5e-3, "float32"),
        lrs=(5e-3, 1e-2), muon_lrs=(1e-2,), tuning_steps=3,
        ablation_seeds=1, experts=(2,), latency=(32, 1), contexts=(8, 32), batch_sizes=(1,),
        sinkhorn_tokens=(64,), sinkhorn_experts=(4,), probes=2,
    ),
    "ci": Scale(
        ladder=((64, 2), (96, 3)), seeds=(2, 2), vocab_size=512,
        settings=_settings(160, 8, 128, 5e-3, "float32"),
        lrs=(5e-3,), muon_lrs=(1e-2,), tuning_steps=40,
        ablation_seeds=3, experts=(1, 4, 16, 64), latency=(128, 4), contexts=(128, 1024, 4096),
        batch_sizes=(1,), sinkhorn_tokens=(128, 1024, 4096), sinkhorn_experts=(8, 64), probes=4,
    ),
    "cpu-hour": Scale(
        ladder=((64, 2),), seeds=(2,), vocab_size=512,
        settings=_settings(5000, 16, 128, 5e-3, "float32"),
        lrs=(5e-3,), muon_lrs=(1e-2,), tuning_steps=400,
        ablation_seeds=1, experts=(1, 4, 16, 32), latency=(128, 4), contexts=(128, 1024, 4096),
        batch_sizes=(1,), sinkhorn_tokens=(128, 1024, 4096), sinkhorn_experts=(8, 64), probes=8,
        cuts=10,
    ),
    "laptop": Scale(
        ladder=((128, 3), (192, 4), (256, 6)), seeds=(3, 3, 3), vocab_size=4096,
        settings=_settings(1500, 8, 256, 5e-3, "auto"),
        lrs=(1.25e-3, 2.5e-3, 5e-3, 1e-2), muon_lrs=(2.5e-3, 5e-3, 1e-2, 2e-2), tuning_steps=300,
        ablation_seeds=3, experts=(1, 2, 4, 16, 32, 64), latency=(256, 6),
        contexts=(128, 1024, 8192, 32_768), batch_sizes=(1, 8),
        sinkhorn_tokens=(256, 2048, 16_384), sinkhorn_experts=(8, 64), probes=8, cuts=10,
    ),
    "gpu-minutes": Scale(
        ladder=((192, 4), (256, 8)), seeds=(3, 2), vocab_size=4096,
        settings=_settings(2200, 32, 512, 3e-3, "auto"),
        lrs=(1e-3, 2e-3, 4e-3, 8e-3), muon_lrs=(2.5e-3, 5e-3, 1e-2, 2e-2), tuning_steps=400,
        ablation_seeds=1, experts=(1, 4, 16, 32), latency=(640, 16),
        contexts=(128, 1024, 8192, 32_768, 65_536), batch_sizes=(1,),
        sinkhorn_tokens=(2048, 16_384, 65_536), sinkhorn_experts=(8, 64), probes=4, cuts=10,
    ),
    "gpu-half-hour": Scale(
        ladder=((192, 4), (256, 8)), seeds=(2, 2), vocab_size=4096,
        settings=_settings(9200, 32, 512, 3e-3, "auto"),
        lrs=(4e-3,), muon_lrs=(1e-2,), tuning_steps=400,
        ablation_seeds=1, experts=(1, 4, 16, 32), latency=(640, 16),
        contexts=(128, 1024, 8192, 32_768, 65_536), batch_sizes=(1,),
        sinkhorn_tokens=(2048, 16_384, 65_536), sinkhorn_experts=(8, 64), probes=4, cuts=4,
    ),
    "gpu": Scale(
        ladder=((256, 8), (384, 12), (640, 16)), seeds=(3, 3, 2), vocab_size=16_384,
        settings=_settings(6000, 64, 512, 3e-3, "auto"),
        lrs=(1e-3, 2e-3, 4e-3, 8e-3), muon_lrs=(2.5e-3, 5e-3, 1e-2, 2e-2), tuning_steps=1000,
        ablation_seeds=3, experts=(1, 2, 4, 16, 32, 64), latency=(640, 16),
        contexts=(128, 1024, 8192, 65_536), batch_sizes=(1, 16),
        sinkhorn_tokens=(2048, 16_384, 65_536), sinkhorn_experts=(8, 64), probes=8, cuts=10,
    ),
}  # fmt: skip
"""By name. "toy" is for trying the program; its numbers mean nothing. "cpu-hour" has tiny networks
and many tokens for each of their parameters, where the paper's claims are about such.
"gpu-half-hour" is "gpu-minutes" with four times the tokens, at learning rates that were found by
it."""
