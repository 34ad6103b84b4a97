"""Runs that begin with given weights, and parameters that are not trained."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import blackmamba
from blackmamba.checkpoint import convert
from blackmamba.cli.main import main
from blackmamba.config import ModelConfig
from blackmamba.data import Tokenizer
from blackmamba.errors import ConfigError
from blackmamba.model import BlackMamba
from blackmamba.train import RunConfig, load_recipe, run, trained_parameters
from blackmamba.train.mixed import MixedAdamW, narrow_weights
from blackmamba.train.optimizer import build_optimizer, optimizer_tensors
from blackmamba.train.start import freeze

Small = Callable[..., RunConfig]


@pytest.fixture
def recipe(tmp_path: Path, text: Path, source: Path) -> Callable[..., Path]:
    """A recipe file that begins with `source`; keyword arguments replace its sections' values."""

    def write(model: dict[str, Any] | None = None, **train: Any) -> Path:
        settings = {"init": str(source), "steps": 4, "batch_size": 4, "seq_len": 16, "lr": 1e-3,
                    "device": "cpu", "log_every": 2}  # fmt: skip
        plain: dict[str, Any] = {
            "data": {"text": [str(text)], "validation_fraction": 0.1},
            "train": settings | train,
        }
        if model is not None:
            plain["model"] = model
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(plain))
        return path

    return write


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return blackmamba.load(folder).state_dict()


def test_a_run_begins_with_the_given_bias(
    tmp_path: Path, source: Path, recipe: Callable[..., Path]
):
    """And counts what its routers choose; nothing of that lies in the model's folder."""
    made = {"router": "sigmoid", "selection_bias": True, "selection_bias_rate": 1e-3}
    config = dataclasses.replace(blackmamba.load(source).config, **made)
    model = blackmamba.model.BlackMamba(config)
    name = "layers.1.feed_forward.router.selection_bias"
    model.get_buffer(name).copy_(torch.tensor([0.5, 0.0, -0.5, 0.0]))
    tokenizer = Tokenizer.from_file(source / "model" / "tokenizer.json")
    blackmamba.save(model, tmp_path / "model", tokenizer=tokenizer)
    result = run(load_recipe(recipe(init=str(tmp_path / "model"), steps=1)), tmp_path / "out")
    moved = blackmamba.load(result.model).get_buffer(name) - model.get_buffer(name)
    assert set(moved.mul(1e3).round().tolist()) <= {-1.0, 0.0, 1.0}
    assert moved.any()


def test_a_run_begins_with_the_given_weights(
    tmp_path: Path, source: Path, recipe: Callable[..., Path]
):
    frozen = run(load_recipe(recipe(lr=1e-30, weight_decay=0.0)), tmp_path / "out")
    for name, tensor in weights(source).items():
        assert torch.equal(weights(frozen.model)[name], tensor), name
    given = Tokenizer.from_file(source / "model" / "tokenizer.json")
    assert Tokenizer.from_file(frozen.model / "tokenizer.json").fingerprint == given.fingerprint


def test_a_released_folder_is_a_beginning(
    tmp_path: Path, source: Path, recipe: Callable[..., Path]
):
    convert(source, tmp_path / "released", to="released")
    (tmp_path / "released" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"data.tokenizer='train'.*leave this key out"):
        load_recipe(recipe(init=str(tmp_path / "released")), ["data.tokenizer=train"])
    tokenizer = source / "model" / "tokenizer.json"
    config = load_recipe(
        recipe(init=str(tmp_path / "released"), lr=1e-30, weight_decay=0.0),
        [f"data.tokenizer={tokenizer}"],
    )
    assert config.model.layers == ("mamba", "moe")
    run(config, tmp_path / "out")
    assert torch.equal(
        weights(tmp_path / "out")["layers.1.feed_forward.fc1"],
        weights(source)["layers.1.feed_forward.fc1"],
    )


def test_resume_needs_no_source(tmp_path: Path, source: Path, recipe: Callable[..., Path]):
    """Stopped after two steps and resumed without the source: the same weights, bit for bit."""
    passing = tmp_path / "passing"
    shutil.copytree(source, passing)
    path = recipe(init=str(passing))
    run(load_recipe(path), tmp_path / "whole")
    half = load_recipe(path, ["train.steps=4", "train.checkpoint_every=2"])
    run(half, tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step-00000004")
    shutil.rmtree(passing)
    out = tmp_path / "halves"
    assert main(["train", str(path), "--out", str(out), "--resume"]) == 0
    for name in ("model/model.safetensors", "model/config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_contradictions_are_one_clear_error(
    tmp_path: Path, source: Path, recipe: Callable[..., Path], small: Small
):
    load_recipe(recipe(model={"d_model": 16, "layers": ["mamba", "moe"]}))  # agrees
    with pytest.raises(
        ConfigError,
        match=r"another model.*model.d_model \(here 32, there 16\), model.d_expert \(here 8, ",
    ):
        load_recipe(recipe(model={"d_model": 32, "d_expert": 8}))
    other = Tokenizer.train(["some quite different words"], 270)
    other.save(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"not the tokenizer that train.init=.* was trained with"):
        load_recipe(recipe(), [f"data.tokenizer={tmp_path / 'tokenizer.json'}"])
    with pytest.raises(ConfigError, match=r"data.tokenizer='train': a run from train.init"):
        small(init=str(source))
    own = load_recipe(recipe())
    wider = dataclasses.replace(own, model=dataclasses.replace(own.model, d_state=8))
    with pytest.raises(ConfigError, match=r"another model.*model.d_state \(here 8, there 4\)"):
        run(wider, tmp_path / "out")


def test_a_tokenizer_too_large_is_one_clear_error(
    tmp_path: Path, source: Path, recipe: Callable[..., Path]
):
    bare = tmp_path / "bare"
    shutil.copytree(source / "model", bare)
    (bare / "tokenizer.json").unlink()
    words = " ".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    Tokenizer.train([words], 310).save(tmp_path / "tokenizer.json")
    config = load_recipe(recipe(init=str(bare)), [f"data.tokenizer={tmp_path / 'tokenizer.json'}"])
    with pytest.raises(ConfigError, match=r"vocab_size=300: the tokenizer has 310 tokens"):
        run(config, tmp_path / "out")


def test_a_quantised_model_is_refused(tmp_path: Path, source: Path, recipe: Callable[..., Path]):
    model = blackmamba.quantize(blackmamba.load(source), 8, group_size=32)
    blackmamba.save(model, tmp_path / "int8")
    with pytest.raises(ConfigError, match=r"quantised to 8 bits.*the model that it was made from"):
        load_recipe(recipe(init=str(tmp_path / "int8")))


# ---- parameters that are not trained -------------------------------------------------------


def test_frozen_parameters_stay_and_have_no_moments(
    tmp_path: Path, source: Path, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    path, out = recipe(freeze=["embedding", "layers.0", "*.router.*"], lr=0.1), tmp_path / "out"
    assert main(["train", str(path), "--out", str(out), "--from", str(source)]) == 0
    before, after = weights(source), weights(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {"layers.1.norm.weight", "layers.1.feed_forward.fc1", "layers.1.feed_forward.fc2",
                "final_norm.weight", "final_norm.bias"}  # fmt: skip
    assert moved == expected
    n_trained = sum(before[name].numel() for name in expected)
    assert f"active per token, {n_trained:,} trained;" in capsys.readouterr().out
    assert trained_parameters(load_recipe(path)) == n_trained
    (step,) = (out / "checkpoints").iterdir()
    with (step / "optimizer.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {key.split("/")[0] for key in header if key != "__metadata__"} == expected


def test_a_frozen_run_resumes(tmp_path: Path, recipe: Callable[..., Path]):
    path = recipe(freeze=["layers.0"], checkpoint_every=2)
    run(load_recipe(path), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000004")
    run(load_recipe(path), tmp_path / "half", resume=True)
    one, other = (tmp_path / n / "model" / "model.safetensors" for n in ("whole", "half"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_freezing_leaves_the_other_gradients_as_they_are(
    backend: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BLACKMAMBA_BACKEND", backend)
    config = ModelConfig(
        layers=("mamba", "moe", "attention", "mlp"), d_model=16, vocab_size=40, d_state=4,
        n_experts=4, d_expert=8, d_mlp=8, n_heads=2, n_kv_heads=1, d_head=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BlackMamba(config)
    ids = torch.randint(40, (2, 9))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.loss(ids, ids.roll(1, dims=1)).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    every = gradients()
    for name in every:
        freeze(model, (name,))
        some = gradients()
        assert some.keys() == every.keys() - {name}
        for other, gradient in some.items():
            torch.testing.assert_close(gradient, every[other], rtol=1e-6, atol=1e-7)


def test_nothing_left_to_train_is_an_error():
    model = BlackMamba(ModelConfig(layers=("mamba",), d_model=16, vocab_size=40))
    with pytest.raises(ConfigError, match=r"train.freeze=\['\*'\]: leaves nothing to train"):
        freeze(model, ("*",))


def test_masters_are_kept_of_trained_parameters_alone():
    model = BlackMamba(ModelConfig(layers=("mamba",), d_model=16, vocab_size=40))
    freeze(model, ("embedding", "*.in_proj"))
    masters = narrow_weights(model, torch.bfloat16)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert not {"embedding.weight", "layers.0.mixer.in_proj.weight"} & masters.keys()
    settings = load_recipe("tiny", ["train.weights=master", "train.dtype=bfloat16"]).train
    optimizer = build_optimizer(model, settings, masters)
    assert isinstance(optimizer, MixedAdamW)
    assert {key.split("/")[0] for key in optimizer_tensors(model, optimizer)} == masters.keys()
