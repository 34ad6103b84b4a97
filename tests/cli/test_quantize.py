"""`blackmamba quantize` and what the other commands make of its folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from blackmamba.checkpoint import load, load_quantization, load_tokenizer, save
from blackmamba.cli.main import main
from blackmamba.config import QuantizationConfig
from blackmamba.data import Tokenizer
from blackmamba.model import BlackMamba
from blackmamba.presets import presets

TEXT = "In the beginning God created the heaven and the earth. Grüße, 世界!\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training run leaves, as far as it matters here; random weights."""
    path = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model, tokenizer = BlackMamba(presets["tiny"]), Tokenizer.train([TEXT], 300)
    save(model, path / "model", tokenizer=tokenizer)
    save(model, path / "checkpoints" / "step-00000001", tokenizer=tokenizer)
    (path / "recipe.yaml").write_text("")
    (path / "data").mkdir()
    (path / "data" / "validation.txt").write_text(TEXT * 3, encoding="utf-8")
    return path


def test_measures_on_the_text_that_the_run_held_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for place in (run, run / "model", run / "checkpoints" / "step-00000001"):
        out = tmp_path / "out"
        command = ["quantize", str(place), "--bits", "4", "--what", "all", "--out", str(out)]
        assert main(command) == 0
        shown = capsys.readouterr().out.splitlines()
        assert shown[0].startswith("perplexity on ")
        assert shown[0].endswith("validation.txt, at most 4,096 tokens:")
        assert shown[1].startswith("  before  ")
        assert shown[2].startswith("  after   ")
        assert shown[2].endswith(" %)")
        assert shown[3] == f"wrote {out}: all in 4 bits, 0.3 MB of weights instead of 2.0"
        config = QuantizationConfig(bits=4, group_size=32, what="all")
        assert load_quantization(out) == config
        assert load_tokenizer(out) is not None


def test_a_text_of_ones_own_and_none(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 5, encoding="utf-8")
    command = ["quantize", str(tmp_path / "model"), "--bits", "8", "--group-size", "128"]
    command += ["--out", str(tmp_path / "out")]
    assert main([*command, "--text", str(tmp_path / "text.txt"), "--max-tokens", "20"]) == 0
    assert "text.txt, at most 20 tokens" in capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("perplexity not measured: MODEL is in no run")
    assert load(tmp_path / "out").quantization == QuantizationConfig(bits=8, group_size=128)


def test_other_commands_take_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "int8"
    assert main(["quantize", str(run), "--bits", "8", "--what", "all", "--out", str(out)]) == 0
    assert main(["generate", str(out), "--prompt", "In the", "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "quantised: all large matrices to 8 bits, groups of 64" in shown
    assert "8.25 bits each" in shown  # a scale of 16 bits for each 64
    assert main(["info", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["quantization"]
    stored = load(out)
    assert facts["bytes"] == sum(b.nbytes for b in stored.buffers())
    assert facts["other_parameters"] == sum(p.numel() for p in stored.parameters())
    text = str(run / "data" / "validation.txt")
    assert main(["doctor", str(out), "--text", text]) == 0
    assert main(["convert", str(out), str(tmp_path / "copy")]) == 0
    assert load_quantization(tmp_path / "copy") == stored.quantization


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere", "--bits", "8", "--out", "out"], "nowhere: no such folder"),
        (["MODEL", "--bits", "8", "--out", "MODEL"], "holds the model to quantise"),
        (["MODEL", "--bits", "8", "--out", "FILE", "--text", "no.txt"], "config.json: a file; a"),
        (["MODEL", "--bits", "8", "--out", "out", "--text", "no.txt"], "no.txt: No such file"),
        (["MODEL", "--bits", "8", "--out", "out", "--max-tokens", "0"], "--max-tokens 0"),
        (["INT8", "--bits", "4", "--out", "out"], "quantised already, to 8 bits"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes(
    words: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(run), "--bits", "8", "--out", "int8"]) == 0
    capsys.readouterr()
    known = {"MODEL": run / "model", "INT8": tmp_path / "int8"}
    known["FILE"] = run / "model" / "config.json"
    assert main(["quantize", *(str(known.get(word, word)) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
