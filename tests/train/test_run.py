"""Whole runs on a small text: they learn, record, and say what is wrong."""

import dataclasses
import io
import json
import lzma
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import largest_difference
from rich.console import Console
from torch.nn import functional as F

import blackmamba
from blackmamba.config import ModelConfig
from blackmamba.data import Tokenizer, prepare
from blackmamba.errors import ConfigError, DataError, TrainingError
from blackmamba.model import BlackMamba, Losses
from blackmamba.ops.backend import Backend, forcing
from blackmamba.presets import presets
from blackmamba.train import (
    Progress,
    RichProgress,
    RunConfig,
    Validation,
    load_recipe,
    run,
    train_step,
    validate,
)
from blackmamba.train.metrics import MetricsLog, read_metrics
from blackmamba.train.optimizer import build_optimizer, optimizer_tensors
from blackmamba.train.report import xz_bits_per_byte
from blackmamba.train.step import GradientsOfBatch

Small = Callable[..., RunConfig]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


class Recorder(Progress):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_start(self, step: int, steps: int) -> None:
        self.events.append(f"start {step} {steps}")

    def on_step(self, row: dict[str, Any]) -> None:
        self.events.append(f"step {row['step']}")

    def on_evaluation(self, step: int, validation: Validation) -> None:
        assert 0 < validation.nats_per_token < 10
        self.events.append(f"evaluation {step}")

    def on_checkpoint(self, folder: Path) -> None:
        assert (folder / "trainer.json").is_file()
        self.events.append(f"checkpoint {folder.name}")


# ---- a run ---------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything(small: Small, tmp_path: Path):
    random_state = torch.get_rng_state()
    progress = Recorder()
    config = small(steps=40, evaluate_every=30, checkpoint_every=15, keep_checkpoints=2)
    result = run(config, tmp_path, progress=progress)

    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[0]["loss"] == pytest.approx(math.log(300), abs=0.1)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert [row["step"] for row in rows if "validation" in row] == [30, 40]
    assert [row["step"] for row in rows if "experts" in row] == list(range(4, 41, 4))
    experts = rows[3]["experts"]
    assert experts.keys() == {"1"}
    assert 1 <= experts["1"]["max_load"] <= 4
    assert 0 <= experts["1"]["load_entropy"] <= math.log(4) + 1e-9
    assert 0 <= experts["1"]["argmax_agreement"] <= 1
    assert 0 < experts["1"]["mean_gate"] < 1
    assert all(0 < row["lr"] <= 1e-2 and row["grad_norm"] > 0 for row in rows)
    assert all(row["tokens"] == 64 * row["step"] and row["tokens_per_s"] > 0 for row in rows)
    assert not any(row["skipped"] for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)

    assert progress.events[:2] == ["start 0 40", "step 1"]
    assert [e for e in progress.events if e[:4] not in ("star", "step")] == [
        "checkpoint step-00000015", "evaluation 30", "checkpoint step-00000030",
        "evaluation 40", "checkpoint step-00000040",
    ]  # fmt: skip

    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"recipe.yaml", "data", "metrics.jsonl", "checkpoints", "model", "loss.png",
                     "summary.json", "expert-load.png"}  # fmt: skip
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_recipe(tmp_path / "recipe.yaml") == config
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == ["step-00000030", "step-00000040"]
    for folder in (*(tmp_path / "checkpoints").iterdir(), tmp_path / "model", tmp_path):
        model = blackmamba.load(folder)
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert model.config.n_tokens == tokenizer.n_tokens <= 300

    data = prepare(config.data, tmp_path / "data")
    again = validate(model, data, batch_size=16, seq_len=64)
    assert (again.nats_per_token, again.bits_per_byte) == (
        result.nats_per_token,
        result.bits_per_byte,
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (
        summary["bits_per_byte"] == result.bits_per_byte == rows[-1]["validation"]["bits_per_byte"]
    )
    assert (result.steps, result.tokens, result.bad_steps) == (40, 40 * 64, 0)
    assert result.model == tmp_path / "model"
    assert f"{result.bits_per_byte:.3f} bits per byte (xz -9e: {result.xz_bits_per_byte:.3f})" in (
        result.report()
    )
    assert torch.equal(torch.get_rng_state(), random_state)


def test_equal_seeds_give_equal_runs_and_others_do_not(small: Small, tmp_path: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(name))  # whatever others drew must not matter
        run(small(steps=4, seed=seed), tmp_path / name)
    a, b, c = (losses(tmp_path / name) for name in "abc")
    assert a == b
    assert a[0] != c[0]


@pytest.mark.parametrize("architecture", ["mamba", "transformer", "moe-transformer"])
def test_the_other_architectures_learn_too(architecture: str, small: Small, tmp_path: Path):
    twin = presets[f"{architecture}-tiny"]
    width = {"d_model": 16, "d_head": 8, "n_heads": 2 if twin.n_heads else 0,
             "n_kv_heads": 1 if twin.n_heads else 0, "vocab_size": 300}  # fmt: skip
    run(small(dataclasses.replace(twin, **width), steps=25), tmp_path)
    assert losses(tmp_path)[-1] < 0.75 * losses(tmp_path)[0]


def test_bfloat16_products_with_float32_weights(small: Small, tmp_path: Path):
    run(small(steps=25), tmp_path / "wide")
    run(small(steps=25, dtype="bfloat16"), tmp_path / "narrow")
    wide, narrow = losses(tmp_path / "wide"), losses(tmp_path / "narrow")
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.03)
    model = blackmamba.load(tmp_path / "narrow")
    assert not torch.equal(model.embedding.weight, model.embedding.weight.bfloat16().float())


def test_text_with_few_words_leaves_ids_unused(text: Path, small: Small, tmp_path: Path):
    config = small(dataclasses.replace(small().model, vocab_size=320), steps=1)
    run(config, tmp_path)
    model, tokenizer = blackmamba.load(tmp_path), Tokenizer.load(tmp_path / "model")
    assert model.config.unused_vocab == 320 - tokenizer.n_tokens > 0


def test_a_given_tokenizer_must_fit(small: Small, tmp_path: Path):
    Tokenizer.train(["a b c"], 257).save(tmp_path / "tokenizer.json")
    config = small()
    data = dataclasses.replace(config.data, tokenizer=str(tmp_path / "tokenizer.json"))
    config = dataclasses.replace(
        config, data=data, model=dataclasses.replace(config.model, vocab_size=256)
    )
    with pytest.raises(ConfigError, match=r"model.vocab_size=256: the tokenizer has 257 tokens"):
        run(config, tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_learns_the_same(dtype: str, small: Small, tmp_path: Path):
    class Stop(Progress):
        def on_step(self, row: dict[str, Any]) -> None:
            if row["step"] == 18:
                raise InterruptedError

    run(small(steps=25), tmp_path / "cpu")
    config = small(steps=25, device="cuda", dtype=dtype, checkpoint_every=15)
    with pytest.raises(InterruptedError):
        run(config, tmp_path / "gpu", progress=Stop())
    run(config, tmp_path / "gpu", resume=True)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=0.05)


# ---- one step ------------------------------------------------------------------------------


def one_step(model: BlackMamba, small: Small, accumulate: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (4, 17), generator=generator)
    optimizer = build_optimizer(model, small().train)
    outcome = train_step(model, optimizer, ids[:, :-1], ids[:, 1:], lr=1e-3, accumulate=accumulate)
    return outcome.loss, outcome.grad_norm


@pytest.mark.parametrize("layers", [("mamba", "mlp"), ("attention", "mlp")], ids=str)
def test_accumulation_is_a_large_batch(layers: tuple[str, ...], small: Small):
    config = ModelConfig(
        layers=layers, d_model=16, vocab_size=300, d_mlp=16, n_heads=2, n_kv_heads=1, d_head=8
    )
    models: list[BlackMamba] = []
    outcomes: list[tuple[float, float]] = []
    for accumulate in (1, 2, 4):
        torch.manual_seed(0)
        models.append(BlackMamba(config))
        outcomes.append(one_step(models[-1], small, accumulate))
    for model, outcome in zip(models[1:], outcomes[1:], strict=True):
        assert outcome == pytest.approx(outcomes[0], rel=1e-6)
        for (name, p), q in zip(models[0].named_parameters(), model.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert largest_difference(p.grad, q.grad) < 1e-6, name


def test_labels_weigh_the_same_in_every_micro_batch():
    """Rows with many, few and one label: as one large batch, whatever it is cut into."""
    torch.manual_seed(0)
    model = BlackMamba(presets["mamba-tiny"])
    ids = torch.randint(512, (4, 13))
    labels = ids[:, 1:].clone()
    for row, n_labels in enumerate((12, 3, 1, 7)):
        labels[row, : 12 - n_labels] = -100
    compute, outcomes = GradientsOfBatch(model), []
    for accumulate in (1, 2, 4):
        loss, found, norm = compute(ids[:, :-1], labels, None, accumulate, None)
        outcomes.append((loss, norm, found[model.embedding.weight].clone()))
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_clipping_limits_the_norm_of_all_gradients(backend: Backend, small: Small):
    torch.manual_seed(0)
    model = BlackMamba(small().model)
    ids = torch.arange(34).view(2, 17)
    with forcing(backend):  # the fastest that there is, and torch's optimizer
        optimizer = build_optimizer(model, small().train)
    outcome = train_step(model, optimizer, ids[:, :-1], ids[:, 1:], lr=0.1, grad_clip=0.01)
    # the first moment after one step is a tenth of the gradient
    norms = [optimizer.state[p]["exp_avg"].norm() * 10 for p in model.parameters()]
    assert outcome.grad_norm > 0.1
    assert torch.stack(norms).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where: str, backend: Backend, small: Small):
    torch.manual_seed(0)
    model = BlackMamba(small().model)
    with forcing(backend):
        optimizer = build_optimizer(model, small().train)
    ids = torch.arange(34).view(2, 17)
    train_step(model, optimizer, ids[:, :-1], ids[:, 1:], lr=0.01)
    if where == "gradient":
        model.final_norm.weight.register_hook(lambda g: g * math.inf)
    else:
        with torch.no_grad():
            model.final_norm.weight[0] = math.nan
    before = {n: t.clone() for n, t in model.state_dict().items()}
    memory = {n: t.clone() for n, t in optimizer_tensors(model, optimizer).items()}
    outcome = train_step(model, optimizer, ids[:, :-1], ids[:, 1:], lr=0.01, grad_clip=1.0)
    assert not outcome.is_finite
    assert math.isfinite(outcome.loss) == (where == "gradient")
    for old, new in (
        (before, model.state_dict()),
        (memory, optimizer_tensors(model, optimizer)),
    ):
        assert all(torch.equal(old[n].nan_to_num(7), new[n].nan_to_num(7)) for n in old)


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps, from 1, in which the loss shall be NaN."""
    wanted: set[int] = set()
    original, calls = BlackMamba.losses, iter(range(1, 1000))

    def losses(self: BlackMamba, *args: Any, **options: Any) -> Losses:
        found = original(self, *args, **options)
        if next(calls) not in wanted:
            return found
        return found._replace(
            total=found.total * math.nan, cross_entropy=found.cross_entropy * math.nan
        )

    monkeypatch.setattr(BlackMamba, "losses", losses)
    return wanted


def test_bad_steps_are_skipped_and_counted(bad_steps: set[int], small: Small, tmp_path: Path):
    bad_steps.update((3, 5, 6))
    result = run(small(max_bad_steps=3), tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["skipped"]] == [3, 5, 6]
    assert [row["step"] for row in rows if row["loss"] is None] == [3, 5, 6]
    assert result.bad_steps == 3
    assert "(3 skipped: not finite)" in result.report()


def test_too_many_bad_steps_in_a_row_end_the_run(bad_steps: set[int], small: Small, tmp_path: Path):
    bad_steps.update((2, 4, 5, 6))
    with pytest.raises(TrainingError, match=r"step 6: .* 3 steps in a row.*below 0.01"):
        run(small(max_bad_steps=3), tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6


def test_bad_steps_do_not_push_out_the_checkpoint_before_them(
    bad_steps: set[int], small: Small, tmp_path: Path
):
    bad_steps.update(range(6, 12))
    settings = small(checkpoint_every=2, keep_checkpoints=1, max_bad_steps=6)
    named = r"6 steps in a row.*gave a finite loss are in .*/step-00000004$"
    with pytest.raises(TrainingError, match=named):
        run(settings, tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000010"]


def test_weights_that_are_of_no_use_give_no_model(small: Small, tmp_path: Path):
    settings = small(steps=6, lr=1e30, warmup_steps=0, log_every=1, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"no model is written.*below 1e\+30"):
        run(settings, tmp_path)
    assert not (tmp_path / "model").exists()
    *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert last["skipped"]
    assert last["validation"]["nats_per_token"] is None
    assert last["experts"]["1"]["router_entropy"] is None


# ---- validation ----------------------------------------------------------------------------


def test_validation_predicts_every_token_once(small: Small, tmp_path: Path):
    data = prepare(small().data, tmp_path)
    torch.manual_seed(0)
    model = BlackMamba(small().model)
    found = validate(model, data, batch_size=1, seq_len=100)
    assert model.training  # as it was

    tokens = torch.from_numpy(data.validation.tokens.astype("int64"))[None]
    inputs = torch.cat((torch.tensor([[data.tokenizer.eot_id]]), tokens[:, :-1]), 1)
    with torch.no_grad():
        logits = model.eval()(inputs)
    nats = F.cross_entropy(logits[0], tokens[0], reduction="sum").item()
    assert found.n_tokens == data.validation.n_tokens
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.nats_per_token == pytest.approx(nats / data.validation.n_tokens, rel=1e-5)
    size = sum(len(t) for t in data.validation_text.read_bytes().split(b"\n")) + sum(
        29 for _ in range(data.validation.n_documents)
    )
    assert size == data.validation.n_bytes
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)

    pieces = validate(model, data, batch_size=3, seq_len=7)
    whole = validate(model, data, batch_size=3, seq_len=1000)
    assert not model.training
    assert pieces.n_tokens == data.validation.n_tokens
    assert pieces.nats == pytest.approx(whole.nats, rel=1e-5)


def test_xz_is_what_the_program_makes(tmp_path: Path):
    path = tmp_path / "text"
    path.write_bytes(b"hello hello " * 100)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    packed = lzma.compress(path.read_bytes(), lzma.FORMAT_XZ, lzma.CHECK_CRC64, filters=filters)
    assert xz_bits_per_byte(path) == 8 * len(packed) / 1200
    path.write_bytes(b"")
    assert xz_bits_per_byte(path) is None
    with path.open("wb") as file:
        file.truncate(32 * 2**20 + 1)
    assert xz_bits_per_byte(path) is None


# ---- what is optional ----------------------------------------------------------------------


def test_without_matplotlib_there_is_only_a_warning(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(small(steps=1), tmp_path)
    assert not (tmp_path / "loss.png").exists()
    assert "blackmamba[train]" in caplog.text


def test_tensorboard_gets_the_same_numbers(small: Small, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(small(loggers=("tensorboard",)), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    read = [event.value for event in events.Scalars("train/loss")]
    assert read == pytest.approx(losses(tmp_path), rel=1e-6)
    tags = set(events.Tags()["scalars"])
    assert {"train/lr", "validation/bits_per_byte", "experts/1/max_load"} <= tags


def test_tensorboard_must_be_installed(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ConfigError, match=r"train.loggers: tensorboard is not installed; .*blackmamba\[train\]"
    ):
        run(small(loggers=("tensorboard",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rich_progress_writes_to_its_console_only(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=False)
    for steps in (3, 5):
        with RichProgress(console) as progress:
            run(small(steps=steps, warmup_steps=1), tmp_path, resume=steps == 5, progress=progress)
    shown = output.getvalue()
    assert "step 3: validation" in shown
    assert "bits per byte" in shown
    assert "going on after step 3" in shown
    assert "5/5" in shown
    assert "tokens/s" in shown
    assert capsys.readouterr() == ("", "")


# ---- mistakes ------------------------------------------------------------------------------


def test_no_gpu_is_said_at_once(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train.device='cuda': no usable GPU"):
        run(small(device="cuda"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_text(small: Small, tmp_path: Path):
    with pytest.raises(DataError, match="seq_len=100000"):
        run(small(seq_len=100_000), tmp_path)


def test_a_folder_that_is_a_file(small: Small, tmp_path: Path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="out: not a folder"):
        run(small(), tmp_path / "out")


def test_a_summary_that_cannot_be_written(small: Small, tmp_path: Path):
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(TrainingError, match="cannot be written to"):
        run(small(steps=1), tmp_path)


def test_metrics_survive_a_line_cut_short_and_nothing_else(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    with MetricsLog(tmp_path, step=2) as log:
        log.write({"step": 3, "loss": 1.0})
    assert [row["loss"] for row in read_metrics(path)] == [3.0, 2.0, 1.0]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(TrainingError, match="line 2 is damaged"):
        read_metrics(path)
    with pytest.raises(TrainingError, match="cannot be read"):
        read_metrics(tmp_path)


def test_metrics_that_cannot_be_written(tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path, step=0) as log:
        log.write({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        try:
            with pytest.raises(TrainingError, match=r"cannot be written \(File too large\)"):
                log.write({"step": 2})
            resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
            with pytest.raises(TrainingError, match=r"cannot be written \(File too large\)"):
                MetricsLog(tmp_path, step=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
