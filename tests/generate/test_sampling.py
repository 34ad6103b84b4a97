"""Each filter against its slow definition, the draw against exact probabilities."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, currently_in_test_context, given
from hypothesis import strategies as st
from torch import Tensor

from blackmamba.errors import ConfigError, InputError
from blackmamba.generate.sampling import (
    RowUniforms,
    SamplingConfig,
    apply_temperature,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    probabilities,
    sample,
)

INF = math.inf
# Quarters make ties and numbers that float32 holds exactly; -inf is an id that cannot come.
ROWS = st.lists(
    st.one_of(st.integers(-12, 12).map(lambda i: i / 4), st.just(-INF)), min_size=1, max_size=12
).filter(lambda row: max(row) > -INF)


# ---- the definitions: one row, plain Python ---------------------------------------------------


def clear(enough: bool):
    """Leave out inputs so near a border that float32 may rightly round to the other side."""
    assert enough or currently_in_test_context()
    if currently_in_test_context():
        assume(enough)


def softmax(row: Sequence[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [w / math.fsum(weights) for w in weights]


def likeliest_first(row: Sequence[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def keep(row: Sequence[float], kept: Sequence[int]) -> list[float]:
    return [x if i in kept else -INF for i, x in enumerate(row)]


def slow_penalty(row: Sequence[float], seen: Sequence[bool], penalty: float) -> list[float]:
    return [
        x if not s else x / penalty if x > 0 else x * penalty
        for x, s in zip(row, seen, strict=True)
    ]


def slow_top_k(row: Sequence[float], k: int) -> list[float]:
    return keep(row, likeliest_first(row)[:k])


def slow_top_p(row: Sequence[float], p: float) -> list[float]:
    share, total, kept = softmax(row), 0.0, []
    for i in likeliest_first(row):
        kept.append(i)
        total += share[i]
        clear(abs(total - p) > 1e-5)
        if total >= p:
            break
    return keep(row, kept)


def slow_min_p(row: Sequence[float], min_p: float) -> list[float]:
    share = softmax(row)
    clear(all(abs(p - min_p * max(share)) > 1e-6 or p == max(share) for p in share))
    return keep(row, [i for i, p in enumerate(share) if p >= min_p * max(share)])


def slow_probabilities(
    row: Sequence[float], seen: Sequence[bool], config: SamplingConfig
) -> list[float]:
    row = slow_penalty(row, seen, config.repetition_penalty)
    row = [x / config.temperature for x in row]
    if config.top_k > 0:
        row = slow_top_k(row, config.top_k)
    if config.top_p < 1:
        row = slow_top_p(row, config.top_p)
    if config.min_p > 0:
        row = slow_min_p(row, config.min_p)
    return softmax(row)


def as_batch(row: Sequence[float]) -> Tensor:
    return torch.tensor([row], dtype=torch.float32)


# ---- filters ----------------------------------------------------------------------------------


@given(ROWS, st.integers(1, 14))
def test_top_k_is_its_definition_also_with_ties_and_k_above_v(row: list[float], k: int):
    assert keep_top_k(as_batch(row), k)[0].tolist() == slow_top_k(row, k)


@given(ROWS, st.floats(0, 1))
def test_top_p_is_its_definition(row: list[float], p: float):
    assert keep_top_p(as_batch(row), p)[0].tolist() == slow_top_p(row, p)


@given(ROWS, st.floats(1e-6, 1))
def test_min_p_is_its_definition(row: list[float], min_p: float):
    assert keep_min_p(as_batch(row), min_p)[0].tolist() == slow_min_p(row, min_p)


@given(ROWS, st.data(), st.floats(0.25, 4))
def test_repetition_penalty_is_its_definition(
    row: list[float], data: st.DataObject, penalty: float
):
    seen = data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    actual = penalise_repetition(as_batch(row), torch.tensor([seen]), penalty)
    assert actual[0].tolist() == pytest.approx(slow_penalty(row, seen, penalty), rel=1e-6)


def test_repetition_penalty_never_makes_an_id_likelier():
    logits = torch.linspace(-5, 5, 11)[None]
    everything = torch.ones_like(logits, dtype=torch.bool)
    assert (penalise_repetition(logits, everything, 1.3) <= logits).all()


@given(ROWS, st.floats(0.01, 100))
def test_temperature_is_softmax_of_the_quotient(row: list[float], temperature: float):
    actual = apply_temperature(as_batch(row), temperature).softmax(-1)[0].tolist()
    assert actual == pytest.approx(softmax([x / temperature for x in row]), abs=1e-6)


def test_ids_exactly_at_a_border_stay():
    assert keep_top_p(torch.zeros(1, 4), 0.5).isfinite().sum() == 2  # 0.25 + 0.25 reaches it
    assert keep_top_p(torch.zeros(1, 4), 0.25).isfinite().sum() == 1
    halves = torch.tensor([[1.0, 0.5, 0.25, 1.0]]).log()
    assert keep_min_p(halves, 0.5).isfinite().tolist() == [[True, True, False, True]]
    assert keep_min_p(halves, 1.0).isfinite().tolist() == [[True, False, False, True]]


def test_top_p_that_rounding_never_reaches_keeps_everything():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    assert (logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)[:, -1] < 1).any()
    assert keep_top_p(logits, math.nextafter(1.0, 0.0)).isfinite().sum(-1).min() > 990


def test_filters_do_not_mix_rows():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for kept in (keep_top_k(logits, 7), keep_top_p(logits, 0.6), keep_min_p(logits, 0.2)):
        sizes = kept.isfinite().sum(-1)
        assert (sizes >= 1).all()
    for i in range(5):
        row = logits[i : i + 1]
        assert torch.equal(keep_top_k(logits, 7)[i], keep_top_k(row, 7)[0])
        assert torch.equal(keep_top_p(logits, 0.6)[i], keep_top_p(row, 0.6)[0])
        assert torch.equal(keep_min_p(logits, 0.2)[i], keep_min_p(row, 0.2)[0])
    assert len(set(keep_top_p(logits, 0.6).isfinite().sum(-1).tolist())) > 1


CONFIGS = st.builds(
    SamplingConfig,
    temperature=st.floats(0.2, 5),
    top_k=st.integers(0, 14),
    top_p=st.one_of(st.just(1.0), st.floats(0, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(1e-3, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2)),
)


@given(ROWS, st.data(), CONFIGS)
def test_probabilities_are_all_filters_in_their_order(
    row: list[float], data: st.DataObject, config: SamplingConfig
):
    seen = data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    penalised = [x / config.temperature for x in slow_penalty(row, seen, config.repetition_penalty)]
    gaps = {abs(a - b) for a in penalised for b in penalised if a > -INF and b > -INF}
    assume(all(g == 0 or g > 1e-4 for g in gaps))  # a tie in float32 is one in the definition
    actual = probabilities(as_batch(row), config, seen=torch.tensor([seen]))
    assert actual.dtype == torch.float32
    assert actual[0].tolist() == pytest.approx(slow_probabilities(row, seen, config), abs=1e-5)


def test_the_order_of_the_filters_shows():
    # After top_k=2 the two left hold 0.5 each, so top_p=0.4 keeps one; before it, p 0.3 each, two.
    logits = torch.tensor([[0.3, 0.3, 0.2, 0.2]]).log()
    config = SamplingConfig(temperature=1.0, top_k=2, top_p=0.4)
    assert probabilities(logits, config)[0].tolist() == pytest.approx([1, 0, 0, 0])
    # The temperature comes before top-p: hot logits need more ids to reach 0.5.
    logits = torch.tensor([[0.6, 0.2, 0.1, 0.1]]).log()
    hot = SamplingConfig(temperature=100.0, top_p=0.5)
    assert (probabilities(logits, hot) > 0).sum() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_probabilities_are_float32_or_wider(dtype: torch.dtype):
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    config = SamplingConfig(temperature=1.0, top_k=3, top_p=0.99, min_p=0.01)
    actual = probabilities(logits, config)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    assert actual[0].tolist() == pytest.approx(softmax([1, 2, 3]), abs=1e-6)


# ---- choosing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=1.0),
        SamplingConfig(temperature=0.7, top_k=9),
        SamplingConfig(temperature=1.5, top_p=0.8),
        SamplingConfig(temperature=1.0, min_p=0.1),
        SamplingConfig(temperature=1.2, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
    ],
    ids=str,
)
def test_sample_hits_the_exact_probabilities(config: SamplingConfig):
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(1, 20, generator=generator)
    seen = torch.rand(1, 20, generator=generator) < 0.3
    exact = torch.tensor(slow_probabilities(logits[0].tolist(), seen[0].tolist(), config))
    n = 2**14
    # Evenly spaced numbers fall into an interval of length p between n p - 1 and n p + 1 times.
    ids = sample(
        logits.expand(n, -1),
        config,
        seen=seen.expand(n, -1),
        uniforms=(torch.arange(n) + 0.5) / n,
    )
    assert (torch.bincount(ids, minlength=20) - n * exact).abs().max() < 1.1


@pytest.mark.parametrize("which", ["one row", "first of each row"])
def test_random_numbers_are_uniform(which: str):
    n = 20_000
    if which == "one row":
        stream = RowUniforms(0, 1)
        values = torch.cat([stream.next([0]) for _ in range(n)])
    else:
        values = RowUniforms(0, n).next(range(n))
    assert values.dtype == torch.float32
    assert 0 <= values.min() <= values.max() < 1
    logits = torch.tensor([0.05, 0.1, 0.1, 0.25, 0.5]).log()
    ids = sample(logits.expand(n, -1), SamplingConfig(temperature=1.0), uniforms=values)
    expected = n * logits.exp()
    chi_square = ((torch.bincount(ids, minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded by 1 seed in 1000


def test_random_numbers_of_a_row_know_nothing_of_other_rows():
    together, apart = RowUniforms(5, 3), RowUniforms(7, 1)
    first = together.next([0, 1, 2])
    second = together.next([2])
    third = together.next([0, 2])
    mine = torch.cat([apart.next([0]) for _ in range(3)])
    assert mine.tolist() == [first[2], second[0], third[1]]
    assert RowUniforms(2**32 - 1, 2).next([1]) == RowUniforms(0, 1).next([0])


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any),
    st.one_of(st.sampled_from([0, 2**24 - 1]), st.integers(0, 2**24 - 1)),
)
def test_draw_inverts_the_cumulative_distribution(weights: list[int], u: int):
    uniform = u / 2**24
    expected = next(
        i for i in range(len(weights)) if sum(weights[: i + 1]) > uniform * sum(weights)
    )
    assert weights[expected] > 0
    drawn = draw(torch.tensor([weights], dtype=torch.float32), torch.tensor([uniform]))
    assert drawn.tolist() == [expected]


@given(st.integers(1, 2**24), st.integers(-140, 100))
def test_draw_finds_an_id_for_the_largest_number_whatever_the_total(mantissa: int, exponent: int):
    total = torch.tensor([[0.0, mantissa * 2.0**-24 * 2.0**exponent, 0.0]])
    assume(total.max() > torch.finfo(torch.float32).tiny)
    assert draw(total, torch.tensor([1 - 2.0**-24])).tolist() == [1]


def test_draw_leaves_out_probability_0_also_where_a_sum_is_not_monotonic(
    monkeypatch: pytest.MonkeyPatch,
):
    # As a parallel sum on a GPU may round: the id of probability 0 seems to add something.
    rounded = torch.tensor([[0.5, 0.50000012, 1.0]])
    monkeypatch.setattr(Tensor, "cumsum", lambda *_: rounded)
    drawn = draw(torch.tensor([[0.5, 0.0, 0.5]]), torch.tensor([0.50000006]))
    assert drawn.tolist() == [2]


@given(ROWS, st.data())
def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie(row: list[float], data: st.DataObject):
    best = likeliest_first(row)[0]
    u = torch.tensor([data.draw(st.integers(0, 2**24 - 1)) / 2**24])
    assert sample(as_batch(row), SamplingConfig()).tolist() == [best]
    for config in (
        SamplingConfig(temperature=2.0, top_k=1),
        SamplingConfig(temperature=2.0, top_p=0.0),
        SamplingConfig(temperature=1e-30, top_k=1),
    ):
        assert sample(as_batch(row), config, uniforms=u).tolist() == [best], config


def test_greedy_obeys_the_repetition_penalty():
    logits = torch.tensor([[2.0, 1.9, 0.0], [-0.1, -0.2, -9.0]])
    seen = torch.tensor([[True, False, False], [True, False, False]])
    assert sample(logits, SamplingConfig(repetition_penalty=3.0), seen=seen).tolist() == [1, 1]
    assert sample(logits, SamplingConfig(), seen=seen).tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0, 1e30])
def test_one_possible_id_is_always_chosen(temperature: float):
    logits = torch.full((3, 9), -INF)
    logits[torch.arange(3), torch.tensor([0, 4, 8])] = torch.tensor([-3.0e38, 0.0, 3.0e38])
    config = SamplingConfig(temperature=temperature, top_k=5, top_p=0.5, min_p=0.5)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2.0**-24])
    assert sample(logits, config, uniforms=uniforms).tolist() == [0, 4, 8]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e30])
def test_ids_without_a_token_are_never_chosen(temperature: float):
    n, logits = 512, torch.zeros(1, 12)
    logits[:, 9:] = 50.0  # a damaged head loves them
    logits[:, 11] = math.nan
    config = SamplingConfig(temperature=temperature)
    uniforms = torch.arange(n) / n
    ids = sample(logits.expand(n, -1), config, n_tokens=9, uniforms=uniforms)
    assert set(ids.tolist()) == ({0} if temperature == 0 else set(range(9)))


def test_a_row_is_chosen_as_if_it_were_alone():
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(6, 50, generator=generator), torch.rand(6, generator=generator)
    config = SamplingConfig(temperature=1.3, top_k=30, top_p=0.9, min_p=0.01)
    together = sample(logits, config, uniforms=uniforms)
    for i in range(6):
        one = slice(i, i + 1)
        assert sample(logits[one], config, uniforms=uniforms[one]) == together[i]


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", INF),
        ("temperature", 1e-40),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", INF),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", None),
    ],
)
def test_config_names_the_field_and_value_that_is_wrong(name: str, value: object):
    with pytest.raises(ConfigError, match=f"^{name}=.*must be") as caught:
        SamplingConfig(**{name: value})  # pyright: ignore[reportArgumentType]
    assert repr(value) in str(caught.value)


def test_config_takes_numbers_of_numpy():
    config = SamplingConfig(
        temperature=np.float32(0.5),
        top_k=np.int64(2),
        seed=np.uint8(255),  # pyright: ignore
    )
    ids = sample(torch.zeros(1, 5), config, uniforms=RowUniforms(config.seed, 1).next([0]))
    assert ids < 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_logits_that_cannot_be_chosen_from_are_an_error(bad: float, temperature: float):
    logits = torch.zeros(3, 4)
    logits[1] = bad
    if bad != -INF:
        logits[1, 1:] = 0.0
    with pytest.raises(InputError, match="logits of 1 of 3 rows hold NaN or"):
        sample(logits, SamplingConfig(temperature=temperature), uniforms=torch.zeros(3))


@pytest.mark.parametrize(
    ("logits", "arguments", "message"),
    [
        (torch.zeros(4), {}, r"logits of shape \(4,\)"),
        (torch.zeros(2, 4, dtype=torch.int64), {}, "torch.int64: must be"),
        (torch.zeros(2, 4), {"n_tokens": 0}, r"n_tokens=0: must be 1 \.\. 4"),
        (torch.zeros(2, 4), {"n_tokens": 5}, "n_tokens=5"),
        (torch.zeros(2, 4), {"uniforms": None}, "uniforms of shape None"),
        (torch.zeros(2, 4), {"uniforms": torch.zeros(3)}, r"uniforms of shape \(3,\)"),
        (torch.zeros(2, 4), {"seen": None}, "seen of None"),
        (torch.zeros(2, 4), {"seen": torch.ones(2, 3, dtype=torch.bool)}, r"seen of \(\(2, 3\)"),
        (torch.zeros(2, 4), {"seen": torch.ones(2, 4)}, "float32"),
    ],
)
def test_sample_names_the_argument_that_is_wrong(
    logits: Tensor, arguments: dict[str, object], message: str
):
    good = {"uniforms": torch.zeros(2), "seen": torch.zeros(2, 4, dtype=torch.bool)}
    config = SamplingConfig(temperature=1.0, repetition_penalty=1.1)
    with pytest.raises(InputError, match=message):
        sample(logits, config, **(good | arguments))  # pyright: ignore[reportArgumentType]


def test_greedy_has_no_distribution():
    with pytest.raises(ConfigError, match="temperature=0"):
        probabilities(torch.zeros(1, 3), SamplingConfig())
