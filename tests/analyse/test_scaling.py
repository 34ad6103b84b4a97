"""The formulas for runs on many GPUs: exact where they count, near what was measured elsewhere."""

import dataclasses
from typing import Any

import pytest

from blackmamba.analyse.machines import H100, MACHINES
from blackmamba.analyse.scaling import Grid, activation_bytes_per_token, held, plan
from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.model import BlackMamba, keeps_float32
from blackmamba.model.layer import Layer
from blackmamba.ops.recompute import Recompute
from blackmamba.presets import presets
from blackmamba.train import TrainConfig
from blackmamba.train.parallel.mesh import gathered_together

ONE = Grid(gpus=1, node_gpus=8)


def settings(**changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 10, "batch_size": 16, "seq_len": 2048, "lr": 1e-4,
        "dtype": "bfloat16", "weights": "master",
    }  # fmt: skip
    return TrainConfig(**(usual | changes))


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        presets["tiny"],
        presets["blackmamba-1.5b"],
        presets["moe-transformer-tiny"],
        dataclasses.replace(presets["mamba-tiny"], tie_embeddings=False, head_bias=True),
        ModelConfig(
            layers=("mamba+moe", "moe:2", "attention+mlp"), d_model=32, vocab_size=40, d_expert=24,
            d_mlp=8, n_heads=2, n_kv_heads=1, gated=False, linear_bias=True, final_norm="rms_norm",
            mamba_norm=True, experts_per_token=2, d_shared_expert=8,
        ),
    ],
    ids=("tiny", "1.5b", "moe-transformer", "mamba", "mixed"),
)  # fmt: skip
def test_parameters_are_those_of_the_built_model(config: ModelConfig, experts: int):
    model = BlackMamba(config, device="meta")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    float32 = sum(n for name, n in sizes.items() if keeps_float32(name))
    routed = sum(n for name, n in sizes.items() if is_routed(model, name))
    root = sum(n for name, n in sizes.items() if name.split(".")[0] in ("embedding", "head"))
    root += sizes.get("head_bias", 0)
    counts = held(config, experts)
    assert (counts.float32, counts.experts, counts.root) == (float32, routed, root)
    assert counts.dense == sum(sizes.values()) - float32 - routed

    def gathered(group: list[int]) -> float:
        own = {n: p for i in group for n, p in sizes.items() if n.startswith(f"layers.{i}.")}
        grid = sum(n for name, n in own.items() if is_routed(model, name))
        rest = sum(n for name, n in own.items() if not keeps_float32(name)) - grid
        return rest + grid / experts

    assert counts.largest_group == max(map(gathered, gathered_together(config)))


def is_routed(model: BlackMamba, name: str) -> bool:
    """Whether a parameter is one of stacked experts."""
    if ".feed_forward.fc" not in name:
        return False
    layer = model.layers[int(name.split(".")[1])]
    assert isinstance(layer, Layer)
    return hasattr(layer.feed_forward, "router")


def test_activations_are_the_table_of_the_documents():
    both = dataclasses.replace(presets["blackmamba-1.5b"], layers=("mamba", "moe"))
    table = (4608 + 2304 + 9216 + 4608 + 4816 + 4608) + (4608 + 2304 + 12288)
    states = 2304 * 16 // 16 * 2  # in bfloat16, of every 16th token
    assert activation_bytes_per_token(both, settings()) == table + states
    cheap = activation_bytes_per_token(both, settings(recompute="cheap"))
    assert cheap == table + states - 2304 - 4608 - 2304
    layers = activation_bytes_per_token(both, settings(recompute="layers"))
    mamba = table + states - 4608 - 4608 - 2304 - 12288
    assert layers == 2 * (4608 + 2304) + mamba


MEASURED = {  # benchmarks/RESULTS.md: milliseconds of a step, and gigabytes
    ("h200", "1.5b", 16, "none"): (196.0, 48.5),
    ("h200", "1.5b", 16, "cheap"): (199.8, 44.1),
    ("h200", "2.8b", 8, "none"): (190.9, 60.5),
    ("h200", "2.8b", 8, "cheap"): (193.6, 57.1),
    ("h200", "2.8b", 16, "none"): (341.2, 81.6),
    ("h200", "2.8b", 16, "cheap"): (347.3, 74.7),
    # Without 13.2 ms of a kernel that was mended after the run, and 2.3 GB, the half of states of
    # the scan that are bfloat16 now.
    ("h100", "1.5b", 16, "none"): (223.8 - 13.2, 50.8 - 2.3),
}


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_one_gpu_is_predicted_near_what_was_measured(case: tuple[str, str, int, Recompute]):
    gpu, size, rows, recompute = case
    ms, gigabytes = MEASURED[case]
    train = settings(batch_size=rows, recompute=recompute)
    found = plan(presets[f"blackmamba-{size}"], train, ONE, MACHINES[gpu])
    assert found.step_s == (found.compute_s, found.compute_s)
    # Too little by 0.7 to 2.0 % and by 1.8 to 12.1 %: what is not modelled takes memory and time.
    assert 0.975 < found.memory_bytes / gigabytes / 1e9 < 1
    assert 0.87 < 1e3 * found.compute_s / ms < 1


def test_layers_computed_twice_take_a_third_more():
    once = plan(presets["blackmamba-1.5b"], settings(), ONE, H100).seconds
    twice = plan(presets["blackmamba-1.5b"], settings(recompute="layers"), ONE, H100).seconds
    assert twice["experts' products"] == pytest.approx(once["experts' products"] * 4 / 3)
    assert once["products"] * 1.2 < twice["products"] < once["products"] * 4 / 3
    assert (twice["loss"], twice["optimizer"]) == (once["loss"], once["optimizer"])


def test_what_ranks_share_is_divided_and_what_they_repeat_is_not():
    config, train = presets["blackmamba-1.5b"], settings(batch_size=1024, weights="float32")
    one = plan(config, settings(), ONE, H100)
    counts = held(config)
    hybrid = plan(config, train, Grid(gpus=64, node_gpus=8, shards=8), H100)
    assert hybrid.micro_tokens == one.micro_tokens
    assert hybrid.memory["activations"] == one.memory["activations"]
    matrices = counts.dense + counts.experts
    assert hybrid.memory["moments"] == matrices + 8 * counts.float32  # 8 bytes on 8 ranks
    # A batch of a sixteenth of the tokens: more of the step is communication.
    small = plan(config, settings(batch_size=64), Grid(gpus=64, node_gpus=8, shards=8), H100)
    share = [p.communication_s(overlaps=True) / p.compute_s for p in (hybrid, small)]
    assert share[1] > 8 * share[0]
    # Across nodes a copy's gradients go through each GPU's own port, within them through NVLink.
    sent = {t.what: t for t in hybrid.traffic}
    across, near = sent["sum gradients"], sent["reduce gradients"]
    assert (across.group, across.stride) == (8, 8)
    assert across.sent_bytes == 2 * 7 / 8 * 4 * matrices / 8
    assert across.seconds(H100, hybrid.grid) == pytest.approx(across.sent_bytes / 40e9)
    assert near.seconds(H100, hybrid.grid) == pytest.approx(7 / 8 * 4 * matrices / 360e9)
    assert hybrid.step_s[0] < hybrid.step_s[1]
    assert hybrid.utilisation(hybrid.step_s[1]) < hybrid.utilisation(hybrid.step_s[0]) < 1


def test_grid_experts_move_tokens_in_place_of_parameters():
    config, train = presets["blackmamba-1.5b"], settings(batch_size=1024, weights="float32")
    kept = plan(config, train, Grid(gpus=64, node_gpus=8, shards=8), H100)
    grid = plan(config, train, Grid(gpus=64, node_gpus=8, shards=8, experts=8), H100)
    sent = {t.what: t.sent_bytes for t in grid.traffic}
    assert sent["tokens to experts"] == 4 * 15 * 7 / 8 * 32768 * 1152 * 2
    gathers = [sum(t.sent_bytes for t in p.traffic if "gather" in t.what) for p in (kept, grid)]
    assert gathers[1] < gathers[0] / 4
    assert grid.memory_bytes < kept.memory_bytes


def test_a_row_over_ranks_hands_on_states():
    config = presets["mamba-1.5b"]
    long = settings(batch_size=8, seq_len=1 << 20)
    cut = plan(config, long, Grid(gpus=64, node_gpus=8, sequence=8, shards=8), H100)
    assert cut.micro_tokens == 1 << 17
    sent = {t.what: t.sent_bytes for t in cut.traffic}["states of rows"]
    # (state and sum of delta) forward, gradient of the state backward, to seven others; tails twice
    assert sent == 34 * (4 * 2304 * 33 * 7 + 2 * 2 * 2304 * 3)
    rows = settings(batch_size=64 * 64)
    whole = plan(config, rows, Grid(gpus=64, node_gpus=8, shards=8), H100)
    assert cut.micro_tokens == whole.micro_tokens
    assert cut.seconds["scan"] == pytest.approx(1.4 * whole.seconds["scan"])


@pytest.mark.parametrize(
    ("train", "grid", "message"),
    [
        ({"batch_size": 12}, {"gpus": 8}, "train.batch_size=12: must be a multiple of 8 ranks"),
        ({"batch_size": 8, "accumulate": 2}, {"gpus": 8}, "times accumulate=2"),
        ({"batch_size": 8}, {"gpus": 8, "shards": 3}, "shards=3: must divide the 8 GPUs"),
        ({"batch_size": 8, "seq_len": 9}, {"gpus": 8, "sequence": 2}, "train.seq_len=9: must be a"),
        ({}, {"gpus": 0}, "gpus=0: must be at least 1"),
        ({"optimizer": "muon"}, {"gpus": 1}, "train.optimizer='muon': the plan knows 'adamw'"),
    ],
)
def test_what_does_not_divide_is_named(train: dict[str, Any], grid: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        plan(presets["tiny"], settings(**train), Grid(**({"node_gpus": 8} | grid)), H100)
