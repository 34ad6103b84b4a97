"""Every shipped recipe is valid, says where its values are from, and trains when it is shrunk."""

import importlib.resources
import math
from pathlib import Path

import pytest
import yaml

from blackmamba.model.size import parameters
from blackmamba.train import load_recipe, recipe_names, run

PLACES = ("[config]", "[tokenizer]", "[megatron]", "[moe-mamba]", "[summaries]", "[abstract]")
OURS = [name for name in recipe_names() if name not in ("tiny", "demo")]
SMALL = (
    "model.d_model=16", "model.d_expert=24", "model.layers=[mamba, moe]", "model.vocab_size=300",
    "model.unused_vocab=0", "data.tokenizer=train", "data.vocab_size=300",
    "data.validation_fraction=0.2", "train.steps=2", "train.batch_size=4", "train.seq_len=16",
    "train.warmup_steps=1", "train.evaluate_every=0", "train.device=cpu", "train.loggers=[]",
)  # fmt: skip


def text_of(name: str) -> str:
    folder = importlib.resources.files("blackmamba") / "recipes"
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", recipe_names())
def test_a_shrunk_twin_trains(name: str, tmp_path: Path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(f"In the beginning was text number {i}. " * 12)
    config = load_recipe(name)
    assert parameters(config.model).total > 100_000
    accumulate = 2 if config.train.accumulate > 1 else 1
    changes = (*SMALL, f"data.text=[{text}]", f"train.accumulate={accumulate}")
    result = run(load_recipe(name, changes), tmp_path / "run")
    assert result.steps == 2
    assert result.bad_steps == 0
    assert math.isfinite(result.nats_per_token)


@pytest.mark.parametrize("name", OURS)
def test_every_value_has_its_source(name: str):
    lines = text_of(name).splitlines()
    documented = Path(__file__).parents[2] / "docs" / "recipes.md"
    known = documented.read_text(encoding="utf-8") if documented.exists() else None
    for line in lines:
        value, _, comment = line.partition("#")
        if not value.strip() or (value.strip().endswith(":") and not comment):
            continue  # a comment of its own, or the head of a section
        if value.strip().startswith(("-", "mamba", "]")):
            continue  # of a list whose head is marked
        notes = [part.strip() for part in comment.split(";")]
        assert notes[0].startswith(("sourced: ", "ours: ")), line
        assert len(notes[0].split(": ", 1)[1]) > 3, line
        if notes[0].startswith("sourced"):
            places = [place for place in PLACES if place in notes[0]]
            assert places, line
            assert known is None or all(f"| {place} |" in known for place in places), line
    assert set(yaml.safe_load(text_of(name))) >= {"model", "data", "train"}
