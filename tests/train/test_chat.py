"""Training on conversations, and talking to the result."""

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

import blackmamba
from blackmamba.cli.main import main
from blackmamba.data import ChatData, ChatTemplate, Message
from blackmamba.errors import ConfigError
from blackmamba.train import load_recipe, run, validate
from blackmamba.train.config import check_ranks
from blackmamba.train.metrics import read_metrics
from blackmamba.train.parallel.ranks import Ranks

SKY, GRASS = "sky?", "grass?"
ANSWERS = {SKY: "blue", GRASS: "green"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions, asked in all orders, and some small talk that differs each time."""
    chance, folder = random.Random(0), tmp_path_factory.mktemp("chat")
    lines: list[str] = []
    for i in range(60):
        turns: list[dict[str, str]] = []
        for question in chance.choices(list(ANSWERS), k=chance.randint(1, 4)):
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": ANSWERS[question]})
        lines.append(json.dumps({"messages": turns, "id": i}))
    (folder / "chat.jsonl").write_text("\n".join(lines))
    plain: dict[str, Any] = {
        "model": {"layers": ["mamba", "moe", "mamba"], "d_model": 32, "d_state": 4, "n_experts": 2,
                  "d_expert": 32},
        "data": {"text": [str(folder / "chat.jsonl")], "vocab_size": 300,
                 "validation_fraction": 0.2},
        "train": {"chat": True, "steps": 40, "batch_size": 8, "seq_len": 48, "lr": 1e-2,
                  "accumulate": 2, "warmup_steps": 3, "device": "cpu", "checkpoint_every": 20},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    result = run(load_recipe(recipe), out)
    assert result.nats_per_token < 0.15  # 0.34 if the question is not read
    return out


@pytest.mark.parametrize("question", list(ANSWERS))
def test_it_answers_and_ends_its_turn(
    trained: Path, question: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", str(trained), "--chat", question, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"{ANSWERS[question]}\n"


def test_a_conversation_line_by_line(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{GRASS}\n{SKY}\n"))
    assert main(["generate", str(trained), "--chat", "interactive", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "> green\n> blue\n> \n"


def test_the_template_goes_with_the_model(trained: Path, tmp_path: Path):
    assert (trained / "model" / "chat.json").read_text() == ChatTemplate().to_json()
    blackmamba.checkpoint.convert(trained, tmp_path / "released", to="released")
    tokenizer = blackmamba.checkpoint.load_tokenizer(tmp_path / "released")
    assert tokenizer is not None
    assert tokenizer.chat == ChatTemplate()


def test_resume(recipe: Path, trained: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "checkpoints" / "step-00000040")
    run(load_recipe(recipe), out, resume=True)
    assert [r["loss"] for r in read_metrics(out / "metrics.jsonl")] == [
        r["loss"] for r in read_metrics(trained / "metrics.jsonl")
    ]
    one, other = (f / "model" / "model.safetensors" for f in (out, trained))
    assert one.read_bytes() == other.read_bytes()


def test_validation_is_the_loss_of_answers_alone(trained: Path):
    """Whatever is read at once: as each conversation read by itself."""
    data, model = ChatData.open(trained / "data"), blackmamba.load(trained, dtype=torch.float64)
    nats, n = 0.0, 0
    for i in range(len(data.validation)):
        ids, answers = (torch.tensor(x) for x in data.validation[i])
        losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        nats += losses[answers[1:]].sum().item()
        n += int(answers.sum())
    for batch_size, seq_len in ((1, 7), (5, 64)):
        found = validate(model, data, batch_size=batch_size, seq_len=seq_len)
        assert found.n_tokens == n
        assert found.nats == pytest.approx(nats, rel=1e-5)


def test_what_cannot_be(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = ["generate", str(trained)]
    assert main([*model, "--system", "x", "--prompt", "y"]) == 2
    assert main([*model, "--chat", "x", "--prompt", "y"]) == 2
    shutil.copytree(trained / "model", tmp_path / "plain")
    (tmp_path / "plain" / "chat.json").unlink()
    assert main(["generate", str(tmp_path / "plain"), "--chat", "x"]) == 2
    error = capsys.readouterr().err
    assert "--system is of a conversation" in error
    assert "--chat is another way than --prompt" in error
    assert "has no chat.json, as it was not trained on conversations" in error


def test_rows_are_not_cut_over_ranks(recipe: Path):
    config = load_recipe(recipe, ["parallel.sequence=2"])
    with pytest.raises(ConfigError, match=r"parallel.sequence=2: with train.chat=true"):
        check_ranks(config, Ranks(size=2, node_size=2))


def test_a_system_turn_is_read(trained: Path, capsys: pytest.CaptureFixture[str]):
    """It changes the ids that the model is given, in front of all others."""
    tokenizer = blackmamba.checkpoint.load_tokenizer(trained)
    assert tokenizer is not None
    assert tokenizer.chat is not None
    said = [Message("system", "be kind"), Message("user", SKY)]
    ids = tokenizer.chat.prompt(tokenizer, said)
    expected = blackmamba.generate(blackmamba.load(trained), [ids], 8, stop_ids=[tokenizer.eot_id])
    options = ["--system", "be kind", "--temperature", "0", "--max-new-tokens", "8"]
    assert main(["generate", str(trained), "--chat", SKY, *options]) == 0
    assert capsys.readouterr().out == tokenizer.decode(expected[0]) + "\n"
