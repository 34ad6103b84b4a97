"""What a run lets one see: numbers by part and layer, pictures, comparisons, loggers."""

import dataclasses
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blackmamba.cli.main import main
from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError, TrainingError
from blackmamba.model import BlackMamba, Trace
from blackmamba.model.size import training_flops_per_token
from blackmamba.presets import presets
from blackmamba.train import (
    RunConfig,
    differing_settings,
    draw_comparison,
    read_runs,
    run,
    train_step,
    write_recipe,
)
from blackmamba.train.compare import smoothed
from blackmamba.train.metrics import ExpertLoad, read_metrics
from blackmamba.train.optimizer import build_optimizer
from blackmamba.train.parallel.ranks import Ranks
from blackmamba.train.parts import parameters_by_part
from blackmamba.train.pictures import draw_experts, draw_loss, expert_loads
from blackmamba.train.speed import peak_memory, product_rate, slow_ranks

Small = Callable[..., RunConfig]


def test_every_parameter_is_of_one_part():
    config = dataclasses.replace(
        presets["tiny"], layers=("mamba+moe", "attention", "mlp"), d_mlp=8, n_heads=2,
        n_kv_heads=1, linear_bias=True, head_bias=True, tie_embeddings=False,
    )  # fmt: skip
    model = BlackMamba(config, device="meta")
    model.embedding.requires_grad_(False)
    names = {p: n for n, p in model.named_parameters()}
    parts = {k: {names[p] for p in v} for k, v in parameters_by_part(model).items()}
    assert parts["head"] == {"head.weight", "head_bias"}
    assert parts["router"] == {f"layers.0.feed_forward.router.{n}" for n in ("weight", "bias")}
    assert parts["experts"] == {
        f"layers.0.feed_forward.{n}" for n in ("fc1", "fc2", "fc1_bias", "fc2_bias")
    }
    assert parts["norms"] == {
        "final_norm.weight", "final_norm.bias", "layers.0.norm.weight", "layers.1.norm.weight",
        "layers.0.feed_forward_norm.weight", "layers.2.norm.weight",
    }  # fmt: skip
    assert all(n.startswith("layers.0.mixer.") for n in parts["mamba"])
    assert all(n.startswith("layers.1.mixer.") for n in parts["attention"])
    assert all(n.startswith("layers.2.feed_forward.fc") for n in parts["mlp"])
    assert sum(map(len, parts.values())) == len(names) - 1  # the embedding is frozen


def test_norms_by_part_are_before_clipping_and_add_up(small: Small):
    torch.manual_seed(0)
    model = BlackMamba(small().model)
    optimizer = build_optimizer(model, small().train)
    ids = torch.arange(34).view(2, 17)
    parts, before = parameters_by_part(model), {}
    handles = [
        p.register_hook(lambda g, p=p: before.setdefault(p, g.clone())) for p in model.parameters()
    ]
    outcome = train_step(
        model, optimizer, ids[:, :-1], ids[:, 1:], lr=0.1, grad_clip=0.01, parts=parts
    )
    for handle in handles:
        handle.remove()
    norms = outcome.part_norms
    assert norms.keys() == {"embedding", "mamba", "router", "experts", "norms"}
    for name, members in parts.items():
        exact = torch.cat([before[p].flatten().double() for p in members]).norm().item()
        assert norms[name] == pytest.approx(exact, rel=1e-5), name
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total == pytest.approx(outcome.grad_norm, rel=1e-5)
    again = train_step(model, optimizer, ids[:, :-1], ids[:, 1:], lr=0.1)
    assert again.part_norms == {}


def test_expert_load_is_what_the_routing_says(small: Small):
    torch.manual_seed(0)
    model, trace = BlackMamba(small().model), Trace()
    model(torch.arange(32).view(2, 16), trace=trace)
    (layer,) = ExpertLoad(trace.routing).by_layer().values()
    counts = torch.bincount(trace.routing[1].expert_ids, minlength=4)
    assert layer["share"] == pytest.approx((counts / 32).tolist(), abs=1e-6)
    assert layer["max_load"] == pytest.approx(counts.max().item() / 8)
    stats = trace.routing[1].statistics()
    for name in ("load_entropy", "router_entropy", "argmax_agreement", "mean_gate"):
        assert layer[name] == pytest.approx(getattr(stats, name).item()), name


def test_a_run_records_it_every_so_often(small: Small, tmp_path: Path):
    config = small(steps=9, log_every=4)
    run(config, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for key in ("experts", "grad_norms", "machine"):
        assert [row["step"] for row in rows if key in row] == [4, 8], key
    machine, summary = rows[7]["machine"], json.loads((tmp_path / "summary.json").read_text())
    mean = 4 / sum(1 / row["tokens_per_s"] for row in rows[4:8])
    assert machine["tokens_per_s"] == pytest.approx(mean, rel=1e-2)
    flops = training_flops_per_token(config.model, 16)
    share = machine["tokens_per_s"] * flops / summary["product_flops_per_s"]
    assert machine["mfu"] == pytest.approx(share, abs=6e-5)
    assert 1e7 < machine["memory_bytes"] <= peak_memory("cpu")
    assert product_rate("cpu", torch.float32) == summary["product_flops_per_s"] > 1e8
    assert (tmp_path / "expert-load.png").read_bytes().startswith(b"\x89PNG")


# ---- pictures and comparisons --------------------------------------------------------------


def made_up(folder: Path, config: RunConfig, *, loss: float, experts: int = 3) -> Path:
    """The folder of a run that never was."""
    folder.mkdir()
    write_recipe(config, folder / "recipe.yaml")
    rows: list[dict[str, Any]] = []
    for step in range(1, 81):
        rows.append(
            {"step": step, "loss": loss + 1 / step, "lr": 0.1, "grad_norm": 1.0, "skipped": False,
             "tokens": 64 * step, "tokens_per_s": 100.0 + step % 2, "seconds": step / 2}
        )  # fmt: skip
        if step % 20 == 0:
            share = [1 / experts] * experts
            figures = {"max_load": 1.0, "argmax_agreement": 0.5, "share": share}
            rows[-1]["experts"] = {"1": figures, "3": figures | {"share": [0.75, 0.25]}}
        if step % 40 == 0:
            nats = loss + abs(step - 40) / 100
            rows[-1]["validation"] = {"nats_per_token": nats, "bits_per_byte": nats / 2}
    rows[6] |= {"loss": None, "grad_norm": None, "skipped": True}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_slow_rank_is_named():
    assert Ranks().all_told(0.1) == [0.1]
    assert slow_ranks([3.0]) == slow_ranks([5.0, 7.1]) == slow_ranks([10, 8, 9, 10]) == []
    (line,) = slow_ranks([10, 11, 6.0, 9])
    assert line.startswith("rank 2 multiplies at 67% of the rate of most ranks")
    assert [line.split()[1] for line in slow_ranks([1, 10, 2, 10, 10, 10])] == ["0", "2"]


def test_loads_are_shares_of_the_mean(small: Small, tmp_path: Path):
    folder = made_up(tmp_path / "a", small(), loss=2.0)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "experts" in row]
    expected = [[[1, 1, 1], [1.5, 0.5, np.nan]]] * 4
    np.testing.assert_allclose(expert_loads(rows), expected)


def test_pictures_show_the_data(small: Small, tmp_path: Path):
    pictures: list[bytes] = []
    for name, loss, experts in (("a", 2.0, 3), ("b", 2.0, 3), ("c", 3.0, 4)):
        folder = made_up(tmp_path / name, small(), loss=loss, experts=experts)
        draw_loss(folder)
        draw_experts(folder)
        draw_comparison(read_runs([folder]), folder / "compared.png")
        files = [folder / f for f in ("loss.png", "expert-load.png")]
        assert all(f.read_bytes().startswith(b"\x89PNG") for f in [*files, folder / "compared.png"])
        pictures.append(b"".join(f.read_bytes() for f in files))
    assert pictures[0] == pictures[1] != pictures[2]
    dense = tmp_path / "dense"
    made_up(dense, small(), loss=1.0)
    lines = (dense / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if "experts" not in line]
    (dense / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    draw_experts(dense)
    assert not (dense / "expert-load.png").exists()


def test_smoothing_has_no_lean():
    assert smoothed([3.0] * 500) == pytest.approx([3.0] * 500)
    assert smoothed([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]  # too short to smooth
    assert smoothed([0.0] * 250 + [1.0] * 250)[260] == pytest.approx(1 - 0.9**11, rel=1e-6)


def test_runs_side_by_side(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    one = made_up(tmp_path / "adamw", small(), loss=2.0)
    other = made_up(tmp_path / "muon", small(optimizer="muon", lr=0.02), loss=1.5)
    records = read_runs([one, other])
    assert [record.name for record in records] == ["adamw", "muon"]
    assert differing_settings(records) == {
        "train.lr": ["0.01", "0.02"], "train.optimizer": ['"adamw"', '"muon"'],
    }  # fmt: skip
    assert records[0].best == (40, 2.0, 1.0)
    assert records[0].tokens_per_s == 100.5
    assert records[0].skipped == 1
    assert records[0].loss == pytest.approx(2 + sum(1 / s for s in range(31, 81)) / 50)

    assert main(["runs", str(one), str(other), "--png", str(tmp_path / "both.png")]) == 0
    shown = capsys.readouterr().out
    for expected in ("adamw", "muon", "5,120", "0:40", "2.000", "1.500", "0.750", "train.lr"):
        assert expected in shown
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")

    for where in ("x", "y"):
        (tmp_path / where).mkdir()
    twins = [made_up(tmp_path / where / "same", small(), loss=1.0) for where in ("x", "y")]
    assert [r.name for r in read_runs(twins)] == [str(path) for path in twins]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nothing", "no run's folder: it has no metrics.jsonl"),
        ("empty", "this run has no step yet"),
        ("recipe", "recipe.yaml: damaged or missing"),
    ],
)
def test_what_is_no_run(
    damage: str, message: str, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = made_up(tmp_path / "a", small(), loss=2.0)
    if damage == "nothing":
        (folder / "metrics.jsonl").unlink()
    elif damage == "empty":
        (folder / "metrics.jsonl").write_text("")
    else:
        (folder / "recipe.yaml").write_text("{")
    with pytest.raises(TrainingError, match=message):
        read_runs([folder])
    assert main(["runs", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- loggers -------------------------------------------------------------------------------


class FakeRun:
    """What both wandb.init and trackio.init give."""

    def __init__(self, **options: Any):
        self.options, self.finished = options, False
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.metrics: list[tuple[str, str]] = []

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, numbers: dict[str, float], step: int | None = None) -> None:
        assert not self.finished
        self.logged.append((numbers, step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[FakeRun]]:
    """Stands in for the packages; the runs that were begun."""
    begun: dict[str, list[FakeRun]] = {"wandb": [], "trackio": []}
    for name, runs in begun.items():
        module = types.ModuleType(name)

        def init(runs: list[FakeRun] = runs, **options: Any) -> FakeRun:
            runs.append(FakeRun(**options))
            return runs[-1]

        module.init = init  # type: ignore[attr-defined]
        module.finish = lambda runs=runs: runs[-1].finish()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return begun


def test_loggers_get_the_same_numbers(
    fakes: dict[str, list[FakeRun]], small: Small, tmp_path: Path
):
    config = small(steps=5, log_every=4, loggers=("wandb", "trackio"))
    run(config, tmp_path / "mine")
    losses = [row["loss"] for row in read_metrics(tmp_path / "mine/metrics.jsonl")]
    (wandb,), (trackio,) = fakes["wandb"], fakes["trackio"]
    assert wandb.finished
    assert trackio.finished
    assert [n["train/loss"] for n, _ in wandb.logged] == losses
    assert [(n["step"], s) for n, s in wandb.logged] == [(i, None) for i in range(1, 6)]
    assert [(n["train/loss"], s) for n, s in trackio.logged] == list(
        zip(losses, range(1, 6), strict=True)
    )
    assert wandb.metrics == [("*", "step")]
    for fake in (wandb, trackio):
        assert fake.options["project"] == "blackmamba"
        assert fake.options["name"] == "mine"
        assert fake.options["resume"] == "allow"
        assert fake.options["config"]["train"]["steps"] == 5
        fourth = fake.logged[3][0]
        assert {"grad_norms/experts", "machine/mfu", "experts/1/max_load"} <= fourth.keys()
        assert "validation/bits_per_byte" in fake.logged[4][0]
        assert all(isinstance(v, int | float) for n, _ in fake.logged for v in n.values())
    run(small(steps=6, log_every=4, loggers=("wandb",)), tmp_path / "mine", resume=True)
    again = fakes["wandb"][1]
    assert again.options["id"] == wandb.options["id"]
    assert [n["step"] for n, _ in again.logged] == [6]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_must_be_installed(
    name: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed; .*blackmamba\[{name}\]"):
        run(small(loggers=(name,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_has_no_picture_of_them(small: Small, tmp_path: Path):
    model = ModelConfig(layers=("mamba",), d_model=16, vocab_size=300, d_state=4)
    run(small(model, steps=4), tmp_path)
    assert (tmp_path / "loss.png").exists()
    assert not (tmp_path / "expert-load.png").exists()
