"""What `blackmamba tune` finds is used, kept and read again; every cut computes the same."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from numerics import relative_error
from torch import Tensor

from blackmamba.cli.tune import measure
from blackmamba.generate import narrow
from blackmamba.ops import causal_conv1d, expert_mlp, gpu, selective_scan
from blackmamba.ops.backend import ENVIRONMENT_VARIABLE
from blackmamba.ops.causal_conv1d import gpu as conv
from blackmamba.ops.expert_mlp import gpu as experts
from blackmamba.ops.gpu import cuda, tuning
from blackmamba.ops.selective_scan import plan as scan
from blackmamba.presets import presets

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
Cut = TypeVar("Cut", bound=tuning.Cut)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Rows:
    rows: int


CUTS = [Rows(n) for n in (1, 2, 3, 4)]


@pytest.fixture(autouse=True)
def kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._kept.cache_clear()
    yield tuning.path()
    tuning._kept.cache_clear()


class Clock:
    """Seconds that a cut is said to take, of calls that note what they ran."""

    def __init__(self, **times: float):
        self.ran: list[Rows] = []
        self._times = {int(name[1:]): seconds for name, seconds in times.items()}

    def run(self, cut: Rows) -> None:
        if cut.rows not in self._times:
            raise RuntimeError("too much shared memory")
        self.ran.append(cut)

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        return self._times[self.ran[-1].rows]

    def pick(self, size: str = "l=1") -> Rows:
        return tuning.pick("sort", size, CUTS[0], lambda: CUTS, self.run)


def test_without_measuring_the_default_is_taken():
    clock = Clock(_1=1.0)
    assert clock.pick() == CUTS[0]
    assert clock.ran == []


def test_the_fastest_is_found_once_and_kept(kept_here: Path):
    clock = Clock(_1=1.0, _2=0.5, _3=0.4)  # 4 cannot run
    with tuning.measuring(tuning.Session(clock)) as session:
        assert clock.pick() == Rows(3)
        assert clock.pick() == Rows(3)
    assert clock.ran == CUTS[:3]
    assert session.found["sort", "l=1"].n_candidates == 3
    tuning.keep(session)
    assert json.loads(kept_here.read_text())["choices"] == {"sort": {"l=1": {"rows": 3}}}
    assert (clock.pick(), clock.pick(), clock.pick("l=2")) == (Rows(3), Rows(3), CUTS[0])
    assert tuning.describe().startswith("1 sizes, ")
    assert tuning.forget()
    assert not tuning.forget()
    assert clock.pick() == CUTS[0]


def test_what_is_kept_is_added_to_and_corrected(kept_here: Path):
    for size, times in (("l=1", {"_2": 0.5}), ("l=2", {"_4": 0.5}), ("l=1", {"_2": 0.99})):
        clock = Clock(_1=1.0, **times)
        with tuning.measuring(tuning.Session(clock)) as session:
            clock.pick(size)
        tuning.keep(session)
    assert json.loads(kept_here.read_text())["choices"] == {"sort": {"l=2": {"rows": 4}}}


def test_a_default_that_cannot_run_is_an_error():
    with tuning.measuring(tuning.Session(Clock(_2=1.0))), pytest.raises(RuntimeError, match="too"):
        Clock(_2=1.0).pick()


@pytest.mark.parametrize(
    ("change", "warns"),
    [
        (lambda content: content["made_with"].update(triton="0"), False),
        (lambda content: content["choices"]["sort"].update({"l=1": {"rows": 9}}), False),
        (lambda content: content["choices"].update(sort=[]), True),
        (lambda content: content.clear(), True),
    ],
    ids=["of another version", "no candidate any more", "odd", "empty"],
)
def test_what_does_not_fit_is_not_used(
    change: Callable[[Any], object], warns: bool, kept_here: Path, caplog: pytest.LogCaptureFixture
):
    clock = Clock(_1=1.0, _2=0.5)
    with tuning.measuring(tuning.Session(clock)) as session:
        clock.pick()
    tuning.keep(session)
    content = json.loads(kept_here.read_text())
    change(content)
    kept_here.write_text(json.dumps(content))
    tuning._kept.cache_clear()
    assert clock.pick() == CUTS[0]
    assert ["cut by default" in record.getMessage() for record in caplog.records] == [True] * warns


# ---- every cut computes the same -----------------------------------------------------------------


@pytest.fixture
def cut_by(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """By kernel, the cut that is taken."""
    forced: dict[str, Any] = {}

    def pick(kernel: str, size: str, default: Any, candidates: Any, run: Any) -> Any:
        return forced.get(kernel, default)

    monkeypatch.setattr(tuning, "pick", pick)
    return forced


def apart(cuts: Sequence[Cut], *ignored: str) -> list[Cut]:
    """On a GPU all; the interpreter, for which many are alike, has seen one of each kind."""
    if not gpu.interpreted():
        return list(cuts)
    alike = {"warps": 1, "stages": 1, "numbers": 4, "block": 128}
    kept = {dataclasses.replace(c, **{n: alike[n] for n in ignored}): c for c in cuts}
    return list(kept.values())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gradients(inputs: dict[str, Tensor], run: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    outputs = run(**leaves)
    loss = sum((y * normal(*y.shape, seed=9).to(y)).sum() for y in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    return [
        *(y.detach() for y in outputs),
        *(t.grad for t in leaves.values() if t.grad is not None),
    ]


def assert_alike(actual: list[Tensor], exact: list[Tensor], what: object) -> None:
    assert len(actual) == len(exact)
    for found, expected in zip(actual, exact, strict=True):
        assert relative_error(found, expected) < 3e-6, what


def test_convolution(cut_by: dict[str, Any]):
    inputs = {"x": normal(1, 21, 6), "weight": normal(6, 4), "bias": normal(6)}
    wide = {name: t.double() for name, t in inputs.items()}
    exact = gradients(wide, lambda **t: causal_conv1d(**t, backend="reference")[:1])
    kinds = [apart(cuts, "warps", "block") for cuts in (conv.FORWARD_CUTS, conv.BACKWARD_CUTS)]
    for i in range(max(map(len, kinds))):
        cuts = [kind[i % len(kind)] for kind in kinds]
        cut_by["causal_conv1d forward"], cut_by["causal_conv1d backward"] = cuts
        found = gradients(inputs, lambda **t: causal_conv1d(**t, backend="triton")[:1])
        assert_alike(found, exact, cuts)


def test_scan(cut_by: dict[str, Any]):
    inputs = {"x": normal(1, 37, 9), "dt": normal(1, 37, 9) - 1, "A": -normal(9, 3).exp()}
    inputs |= {"B": normal(1, 37, 3, seed=1), "C": normal(1, 37, 3, seed=2), "D": normal(9)}

    def run(backend: str) -> Callable[..., tuple[Tensor, ...]]:
        return lambda **t: selective_scan(**t, dt_softplus=True, backend=backend)  # pyright: ignore

    exact = gradients({name: t.double() for name, t in inputs.items()}, run("reference"))
    for i, tried in enumerate(apart(scan.OTHERS, "numbers")):
        found = scan.cuts(1, 37, 9, 4, 1, tried)
        assert {cut.block for cut in found} == {tried.block}
        plan = scan.planned(dataclasses.replace(found[0], n_chunks=1 + 2 * (i % 2)), 37)
        assert (plan.n_chunks - 1) * plan.chunk < 37 <= plan.n_chunks * plan.chunk
        cut_by["selective_scan forward"] = cut_by["selective_scan backward"] = plan
        assert_alike(gradients(inputs, run("triton")), exact, plan)


def test_few_tokens_of_experts(cut_by: dict[str, Any]):
    x, ids = normal(20, 40), torch.arange(20, device=DEVICE) % 3
    fc1, fc2 = normal(3, 2 * 72, 40) / 40**0.5, normal(3, 40, 72) / 72**0.5
    exact = expert_mlp(x.double(), ids, fc1.double(), fc2.double(), backend="reference")
    for cut in apart(experts.FEW_CUTS, "warps", "stages"):
        cut_by["expert_mlp of few"] = cut
        with torch.no_grad():
            y = expert_mlp(x, ids, fc1, fc2, backend="triton")
        assert relative_error(y, exact) < 3e-6, cut


def test_all_kernels_of_a_model_are_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    times = (0.9**i for i in itertools.count())  # the last is the fastest
    config = dataclasses.replace(presets["tiny"], vocab_size=40)
    session = tuning.Session(lambda _: next(times))
    assert measure(config, torch.float32, [1], 5, [1, 4], session) is session
    names = {name for name, _ in session.found}
    products = ("norm_linear_kernel", "add_linear_kernel", "expert_in_kernel")
    assert names >= {f"decode, {name}" for name in products}
    assert names >= {"causal_conv1d forward", "causal_conv1d backward", "expert_mlp of few"}
    kernels = ", CUDA" if cuda.runs_on(torch.empty(0, device=DEVICE)) else ""
    assert names >= {f"selective_scan {way}{kernels}" for way in ("forward", "backward")}
    assert all(found.chosen != found.default for found in session.found.values())
    shown = capsys.readouterr().out
    assert "training, 1 x 5" in shown
    assert "generation of 4" in shown
    assert shown.count(" tried)") == len(session.found)


def test_cuts_of_a_step_are_some_and_fit():
    for rows, width in ((1, 1), (4608, 1152), (50304, 1472)):
        cuts = narrow._cuts(rows, width)
        assert len(set(cuts)) == len(cuts)
        assert all(cut.rows <= max(1, rows) for cut in cuts)
    assert narrow.RowCut(4, 4) in narrow._cuts(4608, 1152)


def test_steps_are_cut_as_was_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(narrow.gpu, "interpreted", lambda: False)
    assert narrow._cut(4608, 1152, 1, 2) == narrow.RowCut(8, 4)
    assert narrow._cut(50304, 1152, 2, 2) == narrow.RowCut(16, 4)
    assert narrow._cut(1152, 3072, 1, 2) == narrow.RowCut(2, 4)
    assert narrow._cut(4608, 1152, 1, 4) == narrow.RowCut(4, 4)
    assert narrow._cut(600, 1152, 1, 2) == narrow.RowCut(2, 4)  # 300 programs for 132 processors
    assert narrow._cut(100, 20_000, 1, 2) == narrow.RowCut(1, 8)
