"""`blackmamba data`: prepare, join, inspect, verify."""

import json
from pathlib import Path

import pytest

from blackmamba.cli.main import main
from blackmamba.data import Tokenizer

ROWS = [f"Row {i}: the quick brown fox jumps over {i} lazy dogs. " * 5 for i in range(200)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for part in range(2):
        lines = (json.dumps({"body": row}) + "\n" for row in ROWS[part::2])
        (tmp_path / "text" / f"{part}.jsonl").write_text("".join(lines))
    return tmp_path / "text"


def prepare(text: Path, out: Path, *options: str) -> int:
    return main([
        "data", "prepare", "--text", str(text), "--field", "body", "--vocab-size", "300",
        "--workers", "1", "--validation-fraction", "0.1", "--out", str(out), *options,
    ])  # fmt: skip


def test_prepare_inspect_verify(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert prepare(text, out) == 0
    printed = capsys.readouterr().out
    assert "MB/s" in printed
    assert "300 different tokens, ids in uint16" in printed
    assert main(["data", "inspect", str(out), "--samples", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("--- around token") == 2
    assert printed.count("quick brown fox") >= 2
    assert "Row" in printed
    assert main(["data", "verify", str(out)]) == 0
    assert "every shard is what was written" in capsys.readouterr().out
    shard = out / "train-000000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert main(["data", "verify", str(out)]) == 2
    message = capsys.readouterr().err
    assert "train-000000.bin: its SHA-256 is not the index's" in message
    assert message.count("\n") == 1
    assert main(["data", "inspect", str(out)]) == 2
    assert "wrong checksum of the block at byte 0" in capsys.readouterr().err


def test_parts(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer.train(ROWS, 300).save(tokenizer)
    out = tmp_path / "out"
    for part in ("0/2", "1/2"):
        assert prepare(text, out, "--tokenizer", str(tokenizer), "--part", part) == 0
    assert f"blackmamba data join {out}" in capsys.readouterr().out
    assert main(["data", "join", str(out)]) == 0
    assert f"{out}: 300 different tokens" in capsys.readouterr().out
    for wrong in ("2/2", "x", "1", "1/2/3", "-1/2"):
        assert prepare(text, out, "--tokenizer", str(tokenizer), f"--part={wrong}") == 2
        assert "part" in capsys.readouterr().err
    assert main(["data", "inspect", str(out), "--samples", "-1"]) == 2
