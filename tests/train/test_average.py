"""The moving average of the weights, and the checkpoint of the best validation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import blackmamba
from blackmamba.data import prepare
from blackmamba.errors import ConfigError
from blackmamba.model import BlackMamba
from blackmamba.train import Progress, RunConfig, run, validate
from blackmamba.train.average import WeightAverage
from blackmamba.train.metrics import read_metrics
from blackmamba.train.mixed import narrow_weights
from blackmamba.train.optimizer import build_optimizer

Small = Callable[..., RunConfig]


@pytest.mark.parametrize("weights", ["float32", "master", "stochastic"])
def test_the_average_is_the_written_one(weights: str, small: Small):
    torch.manual_seed(0)
    model = BlackMamba(small().model)
    masters = narrow_weights(model, torch.bfloat16) if weights != "float32" else {}
    settings = small(weights=weights, dtype="bfloat16").train
    optimizer = build_optimizer(model, settings, masters)
    model.layers[0].requires_grad_(False)
    average = WeightAverage(model, optimizer, 0.5)
    name = "layers.1.feed_forward.fc1"
    parameter = dict(model.named_parameters())[name]
    assert not any(key.startswith("layers.0") for key in average.tensors)
    source = optimizer.state[parameter]["master"] if weights == "master" else parameter.data
    expected = source.double()
    if weights == "master":
        assert not torch.equal(parameter.double(), expected)
    for step in (1, 2, 30):
        source += 0.01  # as an optimizer does
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * source.double()
        average.update(step)
    assert average.tensors[name].dtype == torch.float32
    torch.testing.assert_close(average.tensors[name].double(), expected, rtol=1e-6, atol=1e-7)
    inside = parameter.data
    with average.in_place():
        assert parameter.data is not inside
        assert torch.equal(parameter, average.tensors[name])
    assert parameter.data_ptr() == inside.data_ptr()
    assert parameter.dtype == inside.dtype


class Stop(Progress):
    def on_step(self, row: dict[str, Any]) -> None:
        if row["step"] == 8:
            raise InterruptedError


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "weights": "master"}], ids=str)
def test_validated_saved_and_resumed(options: dict[str, str], small: Small, tmp_path: Path):
    config = small(ema_decay=0.8, checkpoint_every=5, evaluate_every=6, **options)
    result = run(config, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(config, tmp_path / "cut", progress=Stop())
    run(config, tmp_path / "cut", resume=True)
    for name in ("model", "model_ema", "checkpoints/step-00000012"):
        file = "optimizer.safetensors" if "/" in name else "model.safetensors"
        one, other = ((tmp_path / run / name / file).read_bytes() for run in ("whole", "cut"))
        assert one == other, name

    plain = blackmamba.load(tmp_path / "whole")
    model = blackmamba.load(tmp_path / "whole/model_ema")
    compute = torch.bfloat16 if options else torch.float32
    model = BlackMamba(model.config, compute_dtype=compute)
    model.load_state_dict(blackmamba.load(tmp_path / "whole/model_ema").state_dict())
    fc1 = "layers.1.feed_forward.fc1"
    assert not torch.equal(model.state_dict()[fc1], plain.state_dict()[fc1])
    assert not torch.equal(model.state_dict()[fc1].bfloat16().float(), model.state_dict()[fc1])
    data = prepare(config.data, tmp_path / "whole/data")
    found = validate(model, data, batch_size=16, seq_len=64).bits_per_byte
    last = read_metrics(tmp_path / "whole/metrics.jsonl")[-1]
    assert found == result.ema_bits_per_byte == last["validation_ema"]["bits_per_byte"]
    assert found != result.bits_per_byte
    assert f"average of weights: {found:.3f} bits per byte" in result.report()

    with pytest.raises(ConfigError, match=r"train.ema_decay \(was 0.8, now 0.9\)"):
        run(small(ema_decay=0.9, **options), tmp_path / "whole", resume=True)


def test_the_best_checkpoint_stays(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from blackmamba.train import trainer

    fakes = iter([5.0, 3.0, 4.0, 3.5, 3.0, 6.0])

    def fake(*args: Any, **options: Any) -> Any:
        found = validate(*args, **options)
        return type(found)(next(fakes) * found.n_tokens, found.n_tokens, found.n_bytes)

    monkeypatch.setattr(trainer, "validate", fake)
    config = small(evaluate_every=2, checkpoint_every=5, keep_checkpoints=1, keep_best=True)
    result = run(config, tmp_path)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000012"]  # no checkpoint was due at 4
    assert (result.best_step, result.best_nats_per_token) == (4, 3.0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["best_step"], summary["best_nats_per_token"]) == (4, 3.0)
    trainer_json = json.loads((tmp_path / "checkpoints/step-00000012/trainer.json").read_text())
    assert trainer_json["counters"]["best_step"] == 4
    assert blackmamba.load(tmp_path / "checkpoints/step-00000004").config.d_model == 16
