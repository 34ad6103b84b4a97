"""`blackmamba reproduce` at toy scale, its report in a browser, and the parts it is made of."""

import csv
import dataclasses
import json
import math
import multiprocessing
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from blackmamba.analyse import ablations, runs
from blackmamba.analyse.architectures import NAMES, four_architectures
from blackmamba.analyse.intervals import mean
from blackmamba.analyse.lab import Lab
from blackmamba.analyse.latency import latencies
from blackmamba.analyse.parts.ladder import _rate_words
from blackmamba.analyse.report import Section, write_report
from blackmamba.analyse.reproduce import PARTS, reproduce
from blackmamba.analyse.runs import windowed_loss
from blackmamba.analyse.scales import SCALES
from blackmamba.checkpoint import load
from blackmamba.cli import reproduce as command
from blackmamba.cli.main import build_parser, main
from blackmamba.data import (
    DataConfig,
    PreparedData,
    ShardConfig,
    SourceConfig,
    prepare,
    prepare_shards,
)
from blackmamba.errors import ConfigError, OutOfTimeError
from blackmamba.model import BlackMamba
from blackmamba.model.size import parameters, training_flops_per_token
from blackmamba.presets import presets
from blackmamba.train import Progress, load_recipe, run
from blackmamba.train.metrics import read_metrics

_BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, _BROWSERS)), None)
# matplotlib and its helpers warn of what is not ours to repair
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"word{i % 37} and {i * i % 101}," for i in range(3000)))
    return path


@pytest.fixture(scope="module")
def report(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reproduced")
    return reproduce(out, "toy", text=[str(text)], command="blackmamba reproduce --scale toy")


def test_every_part_has_its_section_tables_and_pictures(report: Path):
    page = report.read_text()
    for part in PARTS:
        assert f'<section id="{part}">' in page
    assert page.count("data:image/png;base64,") == page.count("<img ") >= 6
    assert "http" not in page  # it needs nothing but itself
    numbers = ("ladder-curves", "experts-shares", "sinkhorn-errors", "ablations-seeds")
    assert not any(name in page for name in numbers)  # files alone
    tables = ("sizes", "ladder", "latency-1", "experts", "sinkhorn", "ablations", "better")
    for name in (*tables, *numbers):
        rows = list(csv.reader((report.parent / f"{name}.csv").read_text().splitlines()))
        assert len(rows) > 1
        assert len({len(row) for row in rows}) == 1


def test_each_network_has_the_best_of_its_own_learning_rates(report: Path):
    assert "for each network the learning rate that was best in its own" in report.read_text()
    assert _rate_words(is_tuned=False) == "one learning rate"
    folder, rates = report.parent, SCALES["toy"].lrs
    rows = list(csv.DictReader((folder / "ladder.csv").read_text().splitlines()))
    trials = csv.DictReader((folder / "rates-blackmamba.csv").read_text().splitlines())
    taken = {row["network"]: row["taken"] for row in trials}
    assert tuple(taken) == NAMES
    for name, row in zip(NAMES, rows, strict=True):
        ends = {
            lr: json.loads((folder / "runs" / f"rate-{name}-{lr:g}-seed0/final.json").read_text())
            for lr in rates
        }
        best = min(rates, key=lambda lr: ends[lr]["nats"])
        run = load_recipe(folder / "runs" / f"{name}-32x1-seed0" / "recipe.yaml")
        assert f"{run.train.lr:g}" == f"{best:g}" == taken[name] == row["learning rate"]


class Cut(Progress):
    def on_step(self, row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise InterruptedError


def test_a_run_that_was_cut_goes_on(text: Path, tmp_path: Path):
    scale = dataclasses.replace(SCALES["toy"], cuts=3)
    data = DataConfig(text=(str(text),), vocab_size=300)
    lab, other = (Lab(tmp_path / name, scale, data, 1, lambda _: None) for name in ("a", "b"))
    plan = lab.plan("blackmamba", (32, 1), 0)
    assert (plan.settings.steps, plan.settings.checkpoint_every) == (6, 2)
    whole = other.bench.curve(plan)
    folder = lab.bench._of(plan)
    prepare(data, lab.out / "runs" / "data")
    with pytest.raises(InterruptedError):
        run(lab.bench._run_config(plan), folder, progress=Cut())
    begun = read_metrics(folder / "metrics.jsonl")
    curve = lab.bench.curve(plan)
    assert curve.losses == whole.losses
    assert curve.final_nats == whole.final_nats
    assert read_metrics(folder / "metrics.jsonl")[:4] == begun[:4]  # with their seconds
    assert not (folder / "checkpoints").exists()


def test_when_the_time_is_over_a_bench_is_cut(text: Path, tmp_path: Path):
    data = DataConfig(text=(str(text),), vocab_size=300)
    scale = dataclasses.replace(SCALES["toy"], lrs=(1e-2,))
    lab = Lab(tmp_path, scale, data, 1, lambda _: None, seconds=0.01)
    plan = lab.plan("mamba", (32, 1), 0)
    with pytest.raises(OutOfTimeError, match=r"0 of 1 runs are finished and kept in .*runs; to go"):
        lab.bench.train([plan])
    again = Lab(tmp_path, scale, data, 1, lambda _: None)
    assert again.bench.curve(plan).tokens[-1] == 6 * 4 * 32
    lab.bench.train([plan])  # nothing is left to be done


def test_each_process_of_a_bench_is_given_the_next_gpu(monkeypatch: pytest.MonkeyPatch):
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    begun = multiprocessing.Value("i", 0)
    runs._begin(begun, 1)  # no GPU: none is asked for
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for _ in range(5):
        runs._begin(begun, 1)
    assert taken == [1, 2, 0, 1, 2]


def test_a_seed_is_complete_before_the_next_begins(text: Path, tmp_path: Path):
    scale = dataclasses.replace(SCALES["toy"], ladder=((32, 1), (64, 1)), seeds=(2, 2), lrs=(1e-2,))
    told: list[str] = []
    data = DataConfig(text=(str(text),), vocab_size=300)
    lab = Lab(tmp_path, scale, data, 1, told.append)
    plans = [lab.plan("mamba", rung, seed) for rung in scale.ladder for seed in (1, 0)]
    lab.bench.train(plans)
    assert [line.split(":")[0] for line in told] == [
        f"training mamba-{rung}, seed {seed}" for seed in (0, 1) for rung in ("64x1", "32x1")
    ]


def test_wider_rungs_take_smaller_steps(tmp_path: Path):
    scale = dataclasses.replace(
        SCALES["toy"], ladder=((32, 1), (64, 1)), seeds=(1, 1), lrs=(4e-3,), muon_lrs=(2e-2,)
    )
    lab = Lab(tmp_path, scale, DataConfig(text=("corpus:bible",)), 1, lambda _: None)
    assert lab.trials([*NAMES, ablations.BETTER]) == []
    assert lab.plan("mamba", (32, 1), 0).settings.lr == 4e-3
    assert lab.plan("mamba", (64, 1), 0).settings.lr == 2e-3
    muon = lab.plan(ablations.BETTER, (64, 1), 0, share=0.5).settings
    assert (muon.optimizer, muon.lr, muon.steps) == ("muon", 1e-2, 3)


def shards(text: Path, folder: Path, tokenizer: str = "train") -> Path:
    """A prepared folder of 20 documents, some held out."""
    pieces, words = folder.with_suffix(".pieces"), text.read_text().split()
    pieces.mkdir()
    for i in range(20):
        (pieces / f"{i}.txt").write_text(" ".join(words[i * 200 : i * 200 + 200]))
    prepare_shards(
        ShardConfig(
            text=(str(pieces),), tokenizer=tokenizer, vocab_size=300, validation_fraction=0.3
        ),
        folder,
    )
    return folder


def test_experts_are_looked_at_by_source(text: Path, tmp_path: Path):
    prose = shards(text, tmp_path / "prose")
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"{i % 7} = {i % 11};" for i in range(3000)))
    code = shards(other, tmp_path / "code", tokenizer=str(prose))
    folders = [str(prose), str(code)]
    reproduce(tmp_path / "out", "toy", prepared=folders, only=["experts"])
    rows = csv.DictReader((tmp_path / "out" / "experts-shares.csv").read_text().splitlines())
    shares = {row["domain"]: [float(v) for k, v in row.items() if "expert" in k] for row in rows}
    assert list(shares) == ["prose", "code"]
    assert shares["prose"] != shares["code"]
    assert all(sum(share) == pytest.approx(1, abs=1e-3) for share in shares.values())


def test_a_run_on_prepared_text_is_the_same_in_a_process_of_its_own(text: Path, tmp_path: Path):
    prepared = shards(text, tmp_path / "prepared")
    data = DataConfig(sources=(SourceConfig(name="text", path=str(prepared), weight=1.0),))
    ends: list[float] = []
    for jobs in (1, 2):
        lab = Lab(tmp_path / f"{jobs}", SCALES["toy"], data, jobs, lambda _: None)
        curve = lab.bench.curve(lab.plan(ablations.BETTER, (32, 1), 0))
        assert not (curve.folder / "checkpoints").exists()
        ends.append(curve.final_nats)
    assert ends[0] == ends[1]


def test_prepared_text_brings_its_vocabulary(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    size = dataclasses.replace(SCALES["toy"], vocab_size=999)
    monkeypatch.setitem(SCALES, "toy", size)
    prepared = report.parent / "runs" / "data"  # 300 tokens
    reproduce(tmp_path / "out", "toy", prepared=[str(prepared)], only=["sizes"])
    rows = list(csv.DictReader((tmp_path / "out" / "sizes.csv").read_text().splitlines()))
    config = four_architectures(32, 1, 300)["transformer"]
    assert rows[0]["parameters"] == f"{parameters(config).total:,}"


def test_closed_forms_are_said_to_agree(report: Path):
    assert "agree exactly with torch" in report.read_text()


def test_nothing_is_trained_twice(report: Path, text: Path, tmp_path: Path):
    lines: list[str] = []
    shutil.copytree(report.parent, tmp_path / "copy")
    copy = tmp_path / "copy"
    again = reproduce(copy, "toy", text=[str(text)], only=["ladder"], tell=lines.append)
    assert not [line for line in lines if line.startswith("training")]
    assert again.read_bytes() != report.read_bytes()  # only one part is in it now


def test_validation_reads_windows_from_an_empty_memory(report: Path, text: Path):
    run = report.parent / "runs" / "transformer-32x1-seed0"
    model, data = load(run / "model"), PreparedData.open(run / "data")
    ids = torch.from_numpy(data.validation.tokens[:].astype("int64"))
    losses = []
    with torch.inference_mode():
        for start in range(0, len(ids) - 32, 32):
            window = ids[start : start + 33]
            losses.append(float(model.loss(window[None, :-1], window[None, 1:])))
    found = windowed_loss(run, DataConfig(text=(str(text),)), 32)
    assert found.nats == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.training_nats == found.nats  # no experts
    assert found.bits == pytest.approx(
        found.nats / math.log(2) * data.validation.n_tokens / data.validation.n_bytes
    )
    moe = windowed_loss(run.with_name("blackmamba-32x1-seed0"), DataConfig(text=(str(text),)), 32)
    assert moe.training_nats != moe.nats


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed here")
def test_a_browser_shows_it_without_complaint(report: Path, tmp_path: Path):
    """What its console said is on the standard error; a picture that failed has no size."""
    page = tmp_path / "page.html"
    check = (
        "<script>addEventListener('load', () => { const all = [...document.images];"
        "document.body.dataset.shown = all.filter(i => i.complete && i.naturalWidth > 100).length"
        " + ' of ' + all.length; });</script></body>"
    )
    page.write_text(report.read_text().replace("</body>", check))
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    shown = re.search(r'data-shown="(\d+) of (\d+)"', done.stdout)
    assert shown is not None, done.stderr
    assert shown[1] == shown[2]
    assert int(shown[1]) >= 6
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize("scale", [name for name in SCALES if name != "toy"])
def test_scales_are_whole(scale: str):
    found = SCALES[scale]
    for rung in (*found.ladder, found.latency):
        active = [
            parameters(c).active for c in four_architectures(*rung, found.vocab_size).values()
        ]
        assert max(active) / min(active) < 1.06
    assert len(found.sinkhorn_tokens) * len(found.sinkhorn_experts) * 4 >= 20


def test_the_four_networks():
    found = four_architectures(128, 3, 1000)
    assert tuple(found) == NAMES
    assert set(found["moe-transformer"].layers) == {"attention", "moe"}
    with pytest.raises(ConfigError, match="d_model=100: must be a multiple of 32"):
        four_architectures(100, 3, 1000)


def test_variants_change_one_thing_and_are_built():
    base = four_architectures(64, 2, 256)["blackmamba"]
    found = ablations.variants(base, (1, 8, 16))
    assert len({v.name for v in found}) == len(found)
    assert found[0].config == base
    assert "experts-8" not in {v.name for v in found}
    ids = torch.randint(256, (1, 8))
    for variant in found:
        BlackMamba(variant.config).loss(ids, ids).backward()
        active = parameters(variant.config).active / parameters(base).active
        assert 0.9 < active < 1.1, variant.name
    better = ablations.better(base)
    assert 0.95 < training_flops_per_token(better, 64) / training_flops_per_token(base, 64) < 1.1
    assert parameters(better).active / parameters(base).active == pytest.approx(1, abs=0.05)
    fewer = ablations.with_fewer_steps(SCALES["ci"].settings, 0.5, lr=1e-3)
    assert fewer.steps == SCALES["ci"].settings.steps // 2
    assert fewer.lr == 1e-3


def test_intervals():
    assert str(mean([2.0])) == "2.0000"
    assert f"{mean([2.0]):+}" == "+2.0000"
    pair = mean([1.0, 3.0])
    assert (pair.value, pair.n) == (2, 2)
    assert pair.half_width == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), rel=1e-3)
    many = mean([float(i) for i in range(40)])
    assert many.half_width == pytest.approx(2.02 * 11.69 / math.sqrt(40), rel=0.02)


def test_latency_of_each_network_at_each_length():
    models = {n: BlackMamba(presets[n]).eval() for n in ("mamba-tiny", "transformer-tiny")}
    rows = latencies(models, (4, 12), batch_size=2, new_tokens=4, repeats=1)
    assert [(row.name, row.context) for row in rows] == [
        ("mamba-tiny", 4), ("mamba-tiny", 12), ("transformer-tiny", 4), ("transformer-tiny", 12),
    ]  # fmt: skip
    assert rows[0].state_bytes == rows[1].state_bytes
    assert rows[2].state_bytes < rows[3].state_bytes
    assert all(row.prompt_s > 0 and row.token_ms > 0 for row in rows)


def test_text_in_a_report_is_escaped(tmp_path: Path):
    section = Section(key="k", title="<b>", claim="a & b", finding="'\"<script>")
    page = write_report(tmp_path, "t", [("x", "<i>")], [section]).read_text()
    assert "&lt;b&gt;" in page
    assert "<script>" not in page
    assert "<i>" not in page


def test_wrong_arguments(tmp_path: Path):
    with pytest.raises(ConfigError, match="scale='cl': valid are: toy, ci"):
        reproduce(tmp_path, "cl")
    with pytest.raises(ConfigError, match="jobs=0: must be at least 1"):
        reproduce(tmp_path, "toy", jobs=0)
    with pytest.raises(ConfigError, match="seconds=0: must be positive"):
        reproduce(tmp_path, "toy", seconds=0)
    with pytest.raises(ConfigError, match="part 'laddr': did you mean 'ladder'"):
        reproduce(tmp_path, "toy", only=["laddr"])


def test_on_the_command_line(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["reproduce", "--scale", "toy", "--only", "sizes", "--text", str(text), "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith(f"report: {tmp_path / 'out' / 'report.html'}\n")
    assert command.PARTS == PARTS  # written twice, so that the command line loads quickly
    for scale in SCALES:
        build_parser().parse_args(["reproduce", "--scale", scale, "--out", "out"])


def test_time_that_is_over_is_status_124(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["reproduce", "--scale", "toy", "--only", "ladder", "--text", str(text), "--out"]
    assert main([*words, str(tmp_path / "out"), "--seconds", "0.01"]) == 124
    said = capsys.readouterr().err
    assert said.startswith("blackmamba: time is up after 0.01 s: 0 of ")
    assert said.endswith("to go on, run the same again\n")
    assert not (tmp_path / "out" / "report.html").exists()
