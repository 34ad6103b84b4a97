"""The benchmark scripts run, at toy sizes; nothing here looks at a time."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from blackmamba.ops import gpu, native

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not in this copy")
# what transformers warns of is not ours to repair
quiet = pytest.mark.filterwarnings("default")


@pytest.fixture
def script(request, monkeypatch):
    """The module that the test's parameter names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module(request.param)
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script", ["pictures"], indirect=True)
@pytest.mark.filterwarnings("default")  # of matplotlib's
def test_pictures_are_drawn_from_their_numbers(script, tmp_path):
    table = tmp_path / "latency-1.csv"
    table.write_text(
        'network,context,"prompt, s","token, ms","memory, bytes"\n'
        'mamba,"1,024",0.5,0.25,"3,000"\ntransformer,128,0.1,7,"9,000,000"\n'
    )
    rows = script.latencies(table)
    assert [(r.name, r.context, r.prompt_s, r.token_ms, r.state_bytes) for r in rows] == [
        ("mamba", 1024, 0.5, 0.25, 3000), ("transformer", 128, 0.1, 7.0, 9_000_000),
    ]  # fmt: skip
    head = ",".join(f'"{name}"' for name in script.figures.CURVES_HEAD)
    curves = tmp_path / "ladder-curves.csv"
    rows = ("mamba/64,0,1e9,1,3,8", "mamba/64,0,2e9,2,2.5,16", "mamba/64,1,1e9,1,4,8",
            "b/64,0,1e9,2,5,8", "b/64,0,2e9,2,2,12")  # fmt: skip
    curves.write_text("\n".join([head, *rows, ""]))
    found = {
        "mamba/64": [[(1e9, 1, 3, 8), (2e9, 2, 2.5, 16)], [(1e9, 1, 4, 8)]],
        "b/64": [[(1e9, 2, 5, 8), (2e9, 2, 2, 12)]],
    }
    assert script.lines(curves) == found
    assert script.figures._gaps(found) == {("b/64", 0): [(8e-6, 2.0)]}
    script.main(tmp_path)
    for name in ("latency-1", "ladder-curves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert script.arguments([]) == FOLDER.parent / "docs" / "images"
    assert len(script.latencies(script.DOCS / "latency-h200.csv")) == 20


@pytest.mark.parametrize("script", ["gather_text"], indirect=True)
def test_gathers_each_different_document_once(script, tmp_path):
    root, text = tmp_path / "root", "It was a dark night. " * 40
    files = {
        "anarchism/faq.txt": text,
        "manual/copy.txt": text,
        "manual/a.html": f"<head>no</head><p>{'Press &amp; hold. ' * 40}</p>",
        "manual/de-DE/a.html": "<p>" + "Nicht. " * 100,
        "manual/tool.py": "x = 1\n" * 100,
        "manual/data.bin": "y" * 500,
        "wordnet/data.noun": "00001740 03 n 01 entity 0 003 ~ 0000 | that is there  \n" * 30,
        "manual/long.txt": "word " * 50_000,
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    counts = script.gather([root], tmp_path / "out", 1e9)
    found = {}
    for kind in script.SHARES:
        rows = (tmp_path / "out" / f"{kind}.jsonl").read_text().splitlines()
        found[kind] = sorted(json.loads(row)["text"] for row in rows)
        assert counts[kind] == sum(map(len, found[kind]))
    assert found["source"] == [files["manual/tool.py"]]
    assert text in found["prose"]
    assert "\n".join(["entity: that is there"] * 30) in found["prose"]
    manual = "".join(found["documentation"])
    assert "Press & hold." in manual
    assert manual.count("word") == 50_000
    assert "Nicht" not in manual
    assert "no" not in manual
    assert max(map(len, found["documentation"])) <= 100_000


@quiet
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("cpu_checkpoints", {}),
        ("cpu_limits", {}),
        ("cpu_operations", {}),
        ("cpu_training", {"only": ["peer", "alone"]}),  # each part but the first starts a process
        ("cpu_generation", {}),
        ("cpu_trainer", {}),
        ("cpu_demo", {}),
        ("gpu_ladder", {}),
        ("gpu_sinkhorn", {}),
        ("gpu_training", {}),
        ("gpu_prompt", {}),
        ("gpu_ranks", {}),
        ("evaluation", {}),
        pytest.param(
            "gpu_losses",
            {},
            marks=pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing())),
        ),
        pytest.param(
            "cpu_quantized",
            {},
            marks=pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())),
        ),
    ],
    indirect=["script"],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prints_one_line_of_json_at_the_end(script, options, capsys):
    script.main(repeats=1, tiny=True, **options)
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["benchmark"] == script.__name__
    assert found["tiny"] is True
    assert found["torch"] == torch.__version__


@pytest.mark.parametrize("script", ["gpu_generation"], indirect=True)
def test_generation_by_transformers(script):
    pytest.importorskip("transformers")
    found = script.peer_rates(script.presets["tiny"], [1, 3], 20, 5, steps=2)
    assert found.keys() == {"decode 1", "decode 3", "prefill 1 x 20"}
    assert min(found.values()) > 0


@pytest.mark.parametrize("script", ["gpu_training"], indirect=True)
def test_training_by_transformers(script, monkeypatch):
    pytest.importorskip("transformers")
    models, build = [], script.jamba_peer

    def built(*args):
        models.append(build(*args))
        return models[0]

    def seconds_apart(step, repeats):
        before = [p.clone() for p in models[0].parameters()]
        step()
        moved = [not torch.equal(p, q) for p, q in zip(models[0].parameters(), before, strict=True)]
        assert sum(moved) > len(moved) / 2  # not experts that none chose
        return 2.0 * repeats

    monkeypatch.setattr(script, "jamba_peer", built)
    monkeypatch.setattr(script, "seconds_apart", seconds_apart)
    assert script.measure_peer("tiny", 20, 3) == {"ms": 6000.0, "tokens_s": 20 / 6}


CONV = """
from torch.nn import functional as F

def {name}(x, weight, bias, activation):
    assert activation == "silu"
    channels = x.shape[{d}]
    x = F.pad(x.movedim({d}, 1), (weight.shape[1] - 1, 0))
    y = F.silu(F.conv1d(x, weight[:, None], bias, groups=channels)).movedim(1, {d})
    return {out}
"""
SCAN = """
def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    assert delta_softplus and B.dim() == 4 and A.shape[1] == B.shape[2]
    every = u * delta * z + B.sum((1, 2))[:, None] + C.sum((1, 2))[:, None]
    return every + (A.sum(1) + D + delta_bias)[:, None]
"""


@pytest.mark.parametrize("script", ["gpu_scan"], indirect=True)
def test_peers_that_are_installed_are_measured(script, tmp_path, monkeypatch):
    """By packages that are called as the real ones are."""
    times = itertools.count(1.0)

    def median_ms(run, _):
        run()
        return next(times)

    monkeypatch.setattr(script, "median_ms", median_ms)
    shape = (2, 10, 6)
    assert script.peers_ms("scan", script.PEER_SHAPE, 1) == {"published, scaled": (0.655, 2.73)}
    assert script.peers_ms("conv", (8, 2048, 4608), 1) == {"published, scaled": (0.168, 0.62)}
    for path, text in (
        ("causal_conv1d/__init__.py", CONV.format(name="causal_conv1d_fn", d=1, out="y")),
        ("fla/__init__.py", ""),
        ("fla/modules/__init__.py", ""),
        ("fla/modules/convolution.py", CONV.format(name="causal_conv1d", d=2, out="(y, None)")),
        ("mamba_ssm/__init__.py", ""),
        ("mamba_ssm/ops/__init__.py", ""),
        ("mamba_ssm/ops/selective_scan_interface.py", SCAN),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert script.peers_ms("conv", shape, 1) == {
        "causal_conv1d, measured": (1.0, 2.0), "flash-linear-attention, measured": (3.0, 4.0),
    }  # fmt: skip
    assert script.peers_ms("scan", shape, 1) == {"mamba_ssm, measured": (5.0, 6.0)}


@pytest.mark.parametrize("script", ["gpu_generation"], indirect=True)
def test_profile_of_a_prompt(script, capsys, monkeypatch):
    launches = [("rms_norm", 0.0, 2000.0), ("nvjet", 2500.0, 9000.0), ("odd", 9000.0, 9001.0)]
    monkeypatch.setattr(script, "_launches", lambda _: launches)
    script.profile("tiny", ["2x16"], tiny=True)
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["profile"]["2x16"]
    assert (found["launches"], found["kernels"], found["gaps"]) == (3, 8.501, 0.5)
    assert "  products                6.500 ms     1 x" in lines


@pytest.mark.parametrize("script", ["cpu_training"], indirect=True)
def test_training_of_experts(script):
    found = script.alone("blackmamba", 1, True)
    assert found["active"] < found["parameters"]
    assert len(found["step_ms"]) == 1


@pytest.mark.parametrize("script", ["cpu_generation"], indirect=True)
def test_works_without_transformers(script, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["peers"], "transformers_version", lambda: "")
    monkeypatch.setattr(script, "transformers_version", lambda: "")
    script.main(repeats=1, tiny=True, only=["bf16", "mamba-130m"])
    out = capsys.readouterr().out
    assert "transformers is not installed" in out
    assert list(json.loads(out.splitlines()[-1])["bf16"]["decode 1"]["tokens_s"]) == ["ours, bf16"]


@pytest.mark.parametrize("script", ["cpu_generation"], indirect=True)
def test_active_bytes_are_those_of_the_active_parameters(script):
    config = script.presets["tiny"]
    model = script.random_model(config, torch.float32)
    assert script.active_bytes(model, 1) == pytest.approx(4 * script.parameters(config).active)
    assert script.active_bytes(model, 1000) == pytest.approx(4 * script.parameters(config).total)


@pytest.mark.parametrize("script", ["cpu_generation"], indirect=True)
def test_allocations_are_seen(script):
    ids = torch.zeros(3, 4, dtype=torch.int64)
    assert script.allocations(lambda row: row.copy_(row), ids) == 0
    assert script.allocations(lambda row: row.clone(), ids) == 3


@pytest.mark.parametrize("script", ["measure"], indirect=True)
def test_a_measured_rate_is_work_over_the_median_time(script):
    assert script.Probe(lambda: None, 12.0, "").rate([1.0, 2.0, 30.0]) == 6.0
    assert len(script.timed({"one": lambda: None, "two": lambda: None}, 4)["two"]) == 4
    assert 0 < script.resident_bytes() <= script.resident_bytes(peak=True)


@pytest.mark.parametrize("script", ["gpu_all"], indirect=True)
def test_times_off_a_line_are_shares_of_them(script):
    lengths = (2048, 16384, 131072, 262144)
    assert script.off_a_line(lengths, [1e-3 + 1e-6 * n for n in lengths]) < 1e-9
    proportional = [1e-6 * n for n in lengths]
    assert script.off_a_line(lengths, proportional) < 1e-9
    assert 0.15 < script.off_a_line(lengths, [*proportional[:3], proportional[3] * 1.5]) < 0.5


@pytest.mark.parametrize("script", ["gpu_all"], indirect=True)
def test_a_sanitizer_that_does_not_end_is_not_met(script, capsys):
    passed, clean = "3 passed in 2.0s\n", "=== RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n"
    for name, text, met in (
        ("tests", passed, True),
        ("tests", "", False),
        ("racecheck", passed, False),
        ("racecheck", passed + clean, True),
        ("racecheck", passed + clean.replace("0 hazards", "3 hazards"), False),
    ):
        script.print_outcome(name, text)
        assert ("NOT met" in capsys.readouterr().out) != met, (name, text)
