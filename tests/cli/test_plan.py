"""`blackmamba plan`."""

import json

import pytest

from blackmamba.cli.main import main


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "paper-1.5b-64gpu", "--gpus", "64", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["gpus"], facts["nodes"], facts["shards"]) == (64, 8, 8)
    assert facts["parameters"] == 1_458_462_072
    assert facts["tokens_per_step"] == 1152 * 2048
    assert sum(facts["memory_bytes"].values()) < facts["gpu_memory_bytes"]
    ranks = {row["what"]: row["ranks"] for row in facts["traffic"]}
    assert ranks == {
        "gather parameters": 8,
        "reduce gradients": 8,
        "sum gradients": 8,
        "sum float32 gradients": 64,
    }
    assert facts["step_seconds"]["all_hidden"] < facts["step_seconds"]["nothing_hidden"]


def test_a_plan_to_read(capsys: pytest.CaptureFixture[str]):
    changes = ["--set", "parallel.expert=8", "--set", "train.recompute=cheap"]
    assert main(["plan", "paper-2.8b-8gpu", "--gpus", "8", *changes]) == 0
    out = capsys.readouterr().out
    assert "2,783,213,584 parameters on 8 h100 in 1 nodes" in out
    assert "tokens to experts" in out
    assert "tokens a second" in out
    assert "too much" not in out
    assert main(["plan", "paper-2.8b-64gpu", "--set", "train.batch_size=64"]) == 0
    assert "too much: a GPU has 80 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--gpus", "0"], "--gpus 0: must be at least 1"),
        (["tiny", "--gpus", "8", "--nodes", "3"], "--nodes 3: must be at least 1 and divide"),
        (
            ["paper-1.5b-64gpu", "--gpus", "64", "--set", "train.batch_size=1000"],
            "train.batch_size=1000: must be a multiple of 64 ranks",
        ),
        (["tiny", "--gpus", "4", "--set", "parallel.expert=3"], "parallel.expert=3"),
    ],
)
def test_what_does_not_fit_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
