"""The command line: what it prints, and that every mistake is one line and exit status 2."""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blackmamba.checkpoint import load, load_config, save
from blackmamba.cli import main as main_module
from blackmamba.cli.main import build_parser, main
from blackmamba.data import Tokenizer
from blackmamba.model import BlackMamba
from blackmamba.presets import presets

FIXTURE = Path(__file__).parent.parent / "fixtures" / "released-dev"
TEXT = "In the beginning God created the heaven and the earth. Grüße, 世界!\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random weights with a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save(BlackMamba(presets["tiny"]), path, tokenizer=Tokenizer.train([TEXT], 300))
    return path


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for command in ("train", "runs", "generate", "eval", "convert", "info", "tune", "doctor"):
        assert command in shown
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([command, "--help"])
        assert stop.value.code == 0


def test_installed_program_answers():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from blackmamba.cli.main import entry_point; entry_point()",
            "info",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "blackmamba: error: give either a MODEL or --preset NAME\n"


def test_info_of_a_preset(capsys: pytest.CaptureFixture[str]):
    assert main(["info", "--preset", "blackmamba-2.8b"]) == 0
    shown = capsys.readouterr().out
    assert "2,783,213,584" in shown
    assert "628,770,832" in shown
    assert "experts 3872 wide, 1 for each token; router sinkhorn\n" in shown
    assert main(["info", "--preset", "transformer-tiny", "--context", "100", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    config = presets["transformer-tiny"]
    kv = 2 * 100 * config.n_kv_heads * config.d_head * 4 + 8
    assert facts["state_bytes_per_sequence"]["float32"] == 3 * kv
    assert facts["config"]["d_model"] == 64


def test_info_measures_the_memory_of_a_sequence(capsys: pytest.CaptureFixture[str]):
    assert main(["info", "--preset", "tiny", "--state-after", "10", "40"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "measured" in line]
    assert len(lines) == 2
    assert lines[0].split(":")[1] == lines[1].split(":")[1]  # the same number of bytes
    assert "after 40 generated tokens" in lines[1]


def test_info_of_folders(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["info", str(folder)]) == 0
    assert main(["info", str(FIXTURE)]) == 0
    assert "456,936" in capsys.readouterr().out


def test_generate_prints_prompt_and_continuation(folder: Path, capsys: pytest.CaptureFixture[str]):
    command = ["generate", str(folder), "--prompt", "In the", "--max-new-tokens", "20"]
    assert main([*command, "--seed", "3"]) == 0
    first = capsys.readouterr()
    assert first.out.startswith("In the")
    assert "tokens/s" in first.err
    assert main([*command, "--seed", "3", "--no-stats"]) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert again.err == ""


def test_generate_several_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "prompt.txt").write_text("the heaven", encoding="utf-8")
    command = ["generate", str(folder), "--prompt", "In the", "--temperature", "0"]
    command += ["--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "5"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.count("-" * 20) == 2
    assert "the heaven" in shown


def test_convert_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert", str(folder), str(tmp_path / "theirs"), "--to", "released"]) == 0
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert "492,688 parameters" in capsys.readouterr().out
    assert load_config(tmp_path / "ours") == presets["tiny"]
    original, back = load(folder).state_dict(), load(tmp_path / "ours").state_dict()
    assert all(torch.equal(original[k], back[k]) for k in original)


def test_doctor(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in ("torch", "processor", "operation selective_scan", "torch, reference)",
                 "bfloat16 on the CPU"):  # fmt: skip
        assert part in shown
    (tmp_path / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    tokenizer = ["--tokenizer", str(folder)]
    assert main(["doctor", str(folder), "--text", str(tmp_path / "text.txt")]) == 0
    shown = capsys.readouterr().out
    assert "gelu: perplexity" in shown
    assert "silu: perplexity" in shown
    assert "too close to tell" in shown  # random weights favour neither
    assert main(["doctor", str(FIXTURE), "--text", str(tmp_path / "text.txt"), *tokenizer]) == 0
    assert "read this text best with expert activation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info"], "give either a MODEL or --preset"),
        (["info", "--preset", "blackmamba-3b"], "did you mean 'blackmamba-2.8b'"),
        (["info", "--preset", "tiny", "--context", "-1"], "--context -1"),
        (["info", "--preset", "tiny", "--state-after", "0"], "--state-after [0]"),
        (["info", "./nowhere"], "nowhere: no such folder"),
        (["generate", "MODEL"], "no prompt"),
        (["generate", "MODEL", "--prompt", ""], "prompt"),
        (["generate", "MODEL", "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["generate", "MODEL", "--prompt-file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["generate", "MODEL", "--prompt", "x", "--device", "tpu"], "--device tpu"),
        (["generate", "MODEL", "--prompt", "x", "--tokenizer", "no.json"], "no.json"),
        (["generate", "./nowhere", "--prompt", "x"], "nowhere: no such folder"),
        (["generate", "EMPTY", "--prompt", "x"], "empty: a file, must be a model's folder"),
        (["generate", "BARE", "--prompt", "x"], "has no tokenizer.json; give --tokenizer"),
        (["convert", "./nowhere", "out"], "nowhere: no such folder"),
        (["convert", "BARE", "BARE"], "bare: holds the model to convert"),
        (["convert", "MODEL", "EMPTY"], "empty: a file; a model is written into a folder"),
        (["doctor", "MODEL"], "give both MODEL and --text"),
        (["doctor", "MODEL", "--text", "BINARY"], "not UTF-8 text"),
        (["doctor", "MODEL", "--text", "EMPTY"], "empty"),
        (["doctor", "MODEL", "--text", "EMPTY", "--max-tokens", "1"], "--max-tokens 1"),
        (["train", "demoo", "--out", "RUN"], "did you mean 'demo'"),
        (["train", "tiny", "--out", "RUN", "--set", "train.stepz=3"], "did you mean 'steps'"),
        (["train", "tiny", "--out", "RUN", "--set", "train.lr"], "train.lr"),
        (["train", "tiny", "--out", "RUN", "--set", "lr=1"], "did you mean 'train.lr'?"),
        (["train", "tiny", "--out", "RUN", "--text", "nowhere.txt"], "nowhere.txt"),
        (["train", "tiny", "--out", "RUN", "--text", "BINARY"], "UTF-8"),
        (["train", "tiny", "--out", "RUN", "--text", "EMPTY"], "empty"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_are_one_line_and_status_2(
    words: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"words \xff\xfe words")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").symlink_to(folder / "config.json")
    (tmp_path / "bare" / "model.safetensors").symlink_to(folder / "model.safetensors")
    known = {"MODEL": folder, "BINARY": tmp_path / "binary", "EMPTY": tmp_path / "empty",
             "RUN": tmp_path / "run", "BARE": tmp_path / "bare"}  # fmt: skip
    assert main([str(known.get(word, word)) for word in words]) == 2
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]
    assert last.startswith("blackmamba: error: ")
    assert message in last
    assert words[0] != "generate" or not shown.out
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("words", "program", "message"),
    [
        (["train", "tiny"], " train", "the following arguments are required: --out"),
        (["info", "--presett", "tiny"], "", "unrecognized arguments: --presett"),
        (["quantize", "m", "--bits", "3"], " quantize", "invalid choice: 3 (choose from 8, 4)"),
        (["nonsense"], "", "invalid choice: 'nonsense'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_words_are_one_line_too(
    words: list[str], program: str, message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"blackmamba{program}: error: ")
    assert message in line
    assert line.endswith(f"see `blackmamba{program} --help`")


TEXTS = {"--prompt", "--chat", "--system", "--stop", "--set", "--device", "--field", "--part",
         "--tasks"}  # fmt: skip
"""Options that name neither file nor folder nor model."""


def _names(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    """Command lines that give each argument which names something, and nothing else, as empty."""
    places = 0
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from ([word, *words] for words in _names(command))
        elif not action.option_strings:
            yield [*("x" for _ in range(places)), ""]
            places += 1
        elif (
            action.nargs != 0
            and action.choices is None
            and action.type not in (int, float)
            and action.option_strings[0] not in TEXTS
        ):
            yield [action.option_strings[0], ""]


def test_an_empty_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    tried = list(_names(build_parser()))
    for words in (["train", "--out", ""], ["data", "join", ""], ["convert", "x", ""]):
        assert words in tried
    for words in tried:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        name = words[-2] if words[-2].startswith("--") else ""
        assert "error: argument " in line, words
        assert f"{name}: must not be empty; " in line, words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory: a smaller model"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
         "out of memory on the GPU, 20.00 GiB more asked for: a smaller model"),
        (torch.OutOfMemoryError("HIP error"), "out of memory on the GPU: a smaller model"),
        (RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904, 8]"),
         "out of memory: a smaller model"),
        (None, " more asked for: a smaller model"),
    ],
    ids=str,
)  # fmt: skip
def test_too_little_memory_is_a_line(
    error: Exception | None,
    said: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def ask(*_: object, **__: object) -> None:
        if error is not None:
            raise error
        torch.empty(2**55, dtype=torch.uint8)  # no address space is as large

    monkeypatch.setattr(sys.modules["blackmamba.generate"], "generate_text", ask)
    assert main(["generate", str(folder), "--prompt", "In"]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.startswith("blackmamba: error: out of memory")
    assert shown.count("\n") == 1
    error = RuntimeError("another mistake")
    with pytest.raises(RuntimeError, match="another mistake"):
        main(["generate", str(folder), "--prompt", "In"])


def test_output_of_an_encoding_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(main_module, "main", lambda: sys.stdout.write("Grüße\n"))
    with pytest.raises(SystemExit):
        main_module.entry_point()
    sys.stdout.flush()
    assert written.getvalue() == b"Gr??e\n"


def test_a_model_and_tokenizer_that_do_not_match(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = " ".join(f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{i}" for i in range(2000))
    Tokenizer.train([text], 900).save(tmp_path / "tokenizer.json")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    for command in (
        ["generate", str(folder), "--prompt", text],
        ["doctor", str(folder), "--text", str(tmp_path / "text.txt")],
    ):
        assert main([*command, *tokenizer]) == 2
        assert "blackmamba: error: " in capsys.readouterr().err


def test_an_interrupt_is_status_130(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["blackmamba.generate"], "generate_text", interrupt)
    assert main(["generate", str(folder), "--prompt", "In"]) == 130
    assert "interrupted" in capsys.readouterr().err
