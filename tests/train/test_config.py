"""Settings, recipes, the schedule and what AdamW decays: all exact."""

import dataclasses
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.model import BlackMamba
from blackmamba.presets import presets
from blackmamba.train import (
    RunConfig,
    TrainConfig,
    load_recipe,
    origin,
    recipe_names,
    write_recipe,
)
from blackmamba.train.config import check_resumable
from blackmamba.train.optimizer import (
    build_optimizer,
    decays,
    optimizer_tensors,
    restore_optimizer,
)
from blackmamba.train.schedule import learning_rate

BASE: dict[str, Any] = {"steps": 10, "batch_size": 4, "seq_len": 8, "lr": 1e-3}


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"batch_size": 0}, {"accumulate": 0}, {"accumulate": 3}, {"seq_len": 0},
        {"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}, {"adam_eps": 0.0}, {"warmup_steps": -1},
        {"min_lr_ratio": 1.1}, {"min_lr_ratio": math.nan},
        {"weight_decay": -0.1}, {"weight_decay": math.nan}, {"beta1": 1.0}, {"beta2": -0.1},
        {"grad_clip": -1.0}, {"grad_clip": math.inf}, {"seed": -1}, {"evaluate_every": -1},
        {"evaluate_batch_size": 0}, {"evaluate_seq_len": 0}, {"checkpoint_every": -1},
        {"keep_checkpoints": 0}, {"log_every": 0}, {"max_bad_steps": 0},
        {"decay_fraction": 1.1}, {"decay_fraction": -0.1}, {"ema_decay": 1.0}, {"ema_decay": -0.1},
        {"spike_window": 1}, {"spike_threshold": 0.0}, {"max_rollbacks": -1},
        {"adamw_lr_ratio": 0.5}, {"muon_momentum": 1.0},
        {"spikes": "rollback"}, {"loggers": ("wandb", "wandb")},
    ],
    ids=str,
)  # fmt: skip
def test_every_number_is_checked(wrong: dict[str, Any]):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"train.{name}="):
        TrainConfig(**BASE | wrong)


def test_muon_needs_wide_weights():
    with pytest.raises(ConfigError, match=r"train.weights='stochastic': .*use 'master'"):
        TrainConfig(**BASE, optimizer="muon", weights="stochastic")
    with pytest.raises(ConfigError, match=r"train.adamw_lr_ratio=0: must be positive"):
        TrainConfig(**BASE, optimizer="muon", adamw_lr_ratio=0)


def test_tokenizer_must_fit_the_model(small: Callable[..., RunConfig]):
    config = small()
    with pytest.raises(ConfigError, match=r"data.vocab_size=301.*model.vocab_size=300"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, vocab_size=301))


def test_schedule_rises_in_a_line_and_falls_in_a_cosine():
    config = TrainConfig(**BASE | {"steps": 14, "warmup_steps": 4, "min_lr_ratio": 0.2, "lr": 1.0})
    rates = [learning_rate(config, step) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.6)  # half-way between 1 and 0.2
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[13] == pytest.approx(0.2 + 0.8 * (1 + math.cos(0.9 * math.pi)) / 2)
    short = TrainConfig(**BASE | {"warmup_steps": 20})  # ends before the peak
    assert [learning_rate(short, s) for s in (0, 9)] == [5e-5, 5e-4]
    flat = TrainConfig(**BASE | {"min_lr_ratio": 1.0, "warmup_steps": 10})
    assert [learning_rate(flat, s) for s in (9, 10)] == [1e-3, 1e-3]


def test_stable_then_decay_and_constant():
    flat = {"steps": 20, "warmup_steps": 4, "min_lr_ratio": 0.2, "lr": 1.0}
    constant = TrainConfig(**BASE | flat | {"schedule": "constant"})
    assert [learning_rate(constant, s) for s in (0, 3, 4, 19)] == [0.25, 1.0, 1.0, 1.0]
    for shape, at_quarter in (("linear", 0.75), ("1-sqrt", 0.5)):
        options = {"schedule": "wsd", "decay_fraction": 0.4, "decay_shape": shape}
        config = TrainConfig(**BASE | flat | options)
        assert config.decay_steps == 8
        rates = [learning_rate(config, step) for step in range(21)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4:13] == [1.0] * 9  # the first step of the decay has the peak still
        assert rates[14] == pytest.approx(0.2 + 0.8 * at_quarter)
        assert rates[12:] == sorted(rates[12:], reverse=True)
        assert rates[20] == pytest.approx(0.2)
        longer = dataclasses.replace(config, steps=40)
        assert [learning_rate(longer, s) for s in range(24)] == [*rates[:13], *[1.0] * 11]
    whole = TrainConfig(**BASE | flat | {"schedule": "wsd", "decay_fraction": 1.0})
    assert learning_rate(whole, 3) == 1.0
    assert learning_rate(whole, 8) == pytest.approx(0.2 + 0.8 * 0.5)  # a quarter of 16 steps


def test_which_parameters_decay():
    config = dataclasses.replace(
        presets["tiny"], layers=("mamba+moe", "attention", "mlp"), d_mlp=8, n_heads=2,
        n_kv_heads=1, linear_bias=True, head_bias=True, tie_embeddings=False,
    )  # fmt: skip
    model = BlackMamba(config, device="meta")
    names = {re.sub(r"^layers\.\d+\.", "", name) for name, _ in model.named_parameters()}
    assert {name for name in names if not decays(name)} == {
        "norm.weight", "feed_forward_norm.weight", "final_norm.weight", "final_norm.bias",
        "mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.conv_bias", "mixer.in_proj.bias",
        "mixer.out_proj.bias", "mixer.q_proj.bias", "mixer.k_proj.bias", "mixer.v_proj.bias",
        "feed_forward.router.bias", "feed_forward.fc1_bias", "feed_forward.fc2_bias",
        "feed_forward.fc1.bias", "feed_forward.fc2.bias", "head_bias",
    }  # fmt: skip
    assert {name for name in names if decays(name)} == {
        "embedding.weight", "head.weight", "mixer.conv_weight", "mixer.in_proj.weight",
        "mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.out_proj.weight",
        "mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight",
        "feed_forward.router.weight", "feed_forward.fc1", "feed_forward.fc2",
        "feed_forward.fc1.weight", "feed_forward.fc2.weight",
    }  # fmt: skip


def test_decay_alone_shrinks_matrices_and_nothing_else():
    torch.manual_seed(0)
    model = BlackMamba(presets["tiny"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, TrainConfig(**BASE | {"weight_decay": 0.5, "lr": 0.1}))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if decays(name) else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_optimizer_memory_of_another_model_is_refused(narrower: ModelConfig):
    settings = TrainConfig(**BASE)
    model = BlackMamba(narrower)
    optimizer = build_optimizer(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = optimizer_tensors(model, optimizer)
    other = BlackMamba(dataclasses.replace(narrower, d_model=16))
    with pytest.raises(ValueError, match="do not fit"):
        restore_optimizer(other, build_optimizer(other, settings), tensors)
    tensors.pop("embedding.weight/exp_avg")
    with pytest.raises(ValueError, match=r"embedding.weight/exp_avg"):
        restore_optimizer(model, build_optimizer(model, settings), tensors)


# ---- recipes -------------------------------------------------------------------------------


def test_shipped_recipes_that_train_a_tokenizer_have_its_vocabulary():
    assert {"demo", "tiny"} <= set(recipe_names())
    for name in ("demo", "tiny"):
        config = load_recipe(name)
        assert config.model.vocab_size == config.data.vocab_size


def test_overrides_are_typed_like_the_recipe():
    config = load_recipe(
        "tiny", ["train.lr=3e-4", "data.text=[a, b.txt]", "model.preset=mamba-tiny",
                 "train.loggers=[tensorboard]", " model.d_model =32"],
    )  # fmt: skip
    assert config.train.lr == 3e-4
    assert config.data.text == ("a", "b.txt")
    assert config.model.layers == ("mamba",) * 4
    assert config.model.d_model == 32
    assert config.train.loggers == ("tensorboard",)


def test_vocabulary_follows_the_trained_tokenizer_unless_it_is_given():
    assert load_recipe("tiny", ["data.vocab_size=700"]).model.vocab_size == 700
    given = load_recipe("tiny", ["data.vocab_size=700", "model.vocab_size=1024"])
    assert given.model.vocab_size == 1024
    own = load_recipe("tiny", ["data.tokenizer=some.json", "data.vocab_size=700"])
    assert own.model.vocab_size == presets["tiny"].vocab_size


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dmeo", [], "did you mean 'demo'"),
        ("missing.yaml", [], "missing.yaml: no such file"),
        ("tiny", ["train.lr"], "must look like train.lr=3e-4"),
        ("tiny", ["train..lr=1"], "must look like"),
        ("tiny", ["train.lr=fast"], "train.lr='fast': must be a number"),
        ("tiny", ["train.learning=1"], "unknown key 'train.learning'"),
        ("tiny", ["train.warmup=1"], "did you mean 'warmup_steps'"),
        ("tiny", ["train.lr.x=1"], "train.lr is no mapping"),
        ("tiny", ["tarin.lr=1"], "did you mean 'train'"),
        ("tiny", ["model.preset=tinny"], "did you mean 'tiny'"),
        ("tiny", ["model=tiny"], "model='tiny': must be a mapping"),
        ("tiny", ["train.lr=[1"], "not valid YAML"),
        ("tiny", ["train.dtype=float16"], "must be one of 'float32', 'bfloat16'"),
    ],
)
def test_mistakes_in_names_and_overrides(name: str, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(name, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping"),
        (b"- a\n- b\n", "must be a mapping"),
        (b"model: {preset: tiny\n", "not valid YAML"),
        (b"a: \xff", "not UTF-8"),
        (b"model: {preset: tiny}\ndata: {text: [x]}\n", "missing train"),
        (b"model: {preset: tiny}\ndata: {text: x}\ntrain: {}\n", "data.text='x': must be a list"),
        (b"x: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_mistakes_in_files(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="not readable"):
        load_recipe(tmp_path)


def test_written_recipe_reads_back_equal(small: Callable[..., RunConfig], tmp_path: Path):
    config = small(lr=1e-5, weight_decay=0.0)
    write_recipe(config, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == config
    assert (tmp_path / "recipe.yaml").read_text().startswith("# blackmamba version ")


def test_origin_needs_no_git(monkeypatch: pytest.MonkeyPatch):
    origin.commit.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert origin.origin().keys() == {"version"}
    origin.commit.cache_clear()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_origin_is_of_the_tree_that_the_package_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for place in (".", "copies/one"):
        folder = tmp_path / place / "src/blackmamba/train"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    own, copied = (tmp_path / p / "src/blackmamba/train" for p in (".", "copies/one"))
    assert origin.commit_of(own) == ""
    git("init", "--quiet")
    assert origin.commit_of(own) == ""  # there is no commit yet
    git("add", "src")
    git("commit", "--quiet", "--no-verify", "-m", "one")
    assert origin.commit_of(copied) == ""
    git("add", "copies")  # as other projects keep what they use
    git("commit", "--quiet", "--no-verify", "-m", "two")
    assert origin.commit_of(copied) == ""
    head = git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))
    assert origin.commit_of(own) == head
    (tmp_path / "notes").touch()
    assert origin.commit_of(own) == head
    (own.parent / "new.py").touch()
    assert origin.commit_of(own) == f"{head}-dirty"


# ---- resuming with other settings ----------------------------------------------------------


def test_what_only_watches_may_change(small: Callable[..., RunConfig]):
    check_resumable(
        small(),
        small(
            steps=99, evaluate_every=1, evaluate_batch_size=2, evaluate_seq_len=3, log_every=1,
            checkpoint_every=1, keep_checkpoints=9, max_bad_steps=1, loggers=("wandb",),
            device="auto", recompute="cheap", capture=True, keep_best=True, max_rollbacks=1,
        ),
    )  # fmt: skip


def test_every_other_difference_is_named(small: Callable[..., RunConfig], narrower: ModelConfig):
    old, new = small(), small(narrower, lr=0.5, seed=1)
    new = dataclasses.replace(new, data=dataclasses.replace(new.data, split_seed=7))
    with pytest.raises(ConfigError) as caught:
        check_resumable(old, new)
    assert str(caught.value).startswith(
        "this run began with other settings: model.d_model (was 16, now 8), "
        "data.split_seed (was 0, now 7), train.lr (was 0.01, now 0.5), train.seed (was 0, now 1);"
    )
