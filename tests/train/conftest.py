"""A text and a run small enough to be trained many times."""

import dataclasses
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from blackmamba.config import ModelConfig
from blackmamba.data import DataConfig
from blackmamba.train import RunConfig, TrainConfig, load_recipe, run, runner

SMALL = ModelConfig(
    layers=("mamba", "moe"), d_model=16, vocab_size=300, d_state=4, n_experts=4, d_expert=16
)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences that are easy to learn, 40 documents of them."""
    chance = random.Random(0)
    folder = tmp_path_factory.mktemp("text")
    nouns, verbs = ("the cat", "a dog", "my horse", "one snake"), ("sees", "likes", "follows")
    for number in range(40):
        sentences = (
            f"{chance.choice(nouns)} {chance.choice(verbs)} {chance.choice(nouns)}."
            for _ in range(30)
        )
        (folder / f"{number:02}.txt").write_text("\n".join(sentences))
    return folder


@pytest.fixture
def small(text: Path) -> Callable[..., RunConfig]:
    """A run configuration; keyword arguments are fields of its TrainConfig, or `model`."""

    def build(model: ModelConfig = SMALL, **train: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "steps": 12, "batch_size": 4, "seq_len": 16, "lr": 1e-2, "warmup_steps": 3,
            "log_every": 4, "evaluate_seq_len": 64, "device": "cpu",
        }  # fmt: skip
        return RunConfig(
            model=model,
            data=DataConfig(text=(str(text),), vocab_size=300, validation_fraction=0.1),
            train=TrainConfig(**settings | train),
        )

    return build


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run folder: a model that has learnt a little, and its tokenizer. Not to be changed."""
    out = tmp_path_factory.mktemp("source") / "run"
    recipe: dict[str, Any] = {
        "model": {"layers": ["mamba", "moe"], "d_model": 16, "d_state": 4, "n_experts": 4,
                  "d_expert": 16},
        "data": {"text": [str(text)], "vocab_size": 300, "validation_fraction": 0.1},
        "train": {"steps": 6, "batch_size": 4, "seq_len": 16, "lr": 1e-2, "device": "cpu"},
    }  # fmt: skip
    path = out.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run(load_recipe(path), out)
    return out


@pytest.fixture
def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures would take as long as the runs."""
    for name in ("draw_loss", "draw_experts"):
        monkeypatch.setattr(runner, name, lambda *_: None)


@pytest.fixture
def narrower() -> ModelConfig:
    return dataclasses.replace(SMALL, d_model=8)


@pytest.fixture
def signals() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where the test run was started with it ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
