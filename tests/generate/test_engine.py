"""A batch gives what each prompt gives alone: what a slow loop over whole texts gives."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError, InputError
from blackmamba.generate import engine, generate, stream
from blackmamba.generate.engine import Batch
from blackmamba.generate.sampling import SamplingConfig, sample
from blackmamba.model import BlackMamba

PATTERNS = {
    "blackmamba": ("mamba", "moe", "mamba", "moe"),
    "transformer": ("attention", "mlp", "attention", "moe"),
    "parallel": ("mamba+moe", "mamba+mlp"),
}
N_UNUSED = 5
GREEDY = {}
SAMPLED = {"temperature": 1.3, "seed": 11}
EVERYTHING = {
    "temperature": 1.1,
    "top_k": 30,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "seed": 3,
}
ARGUMENTS = pytest.mark.parametrize(
    "arguments",
    [GREEDY, {"repetition_penalty": 1.5}, SAMPLED, EVERYTHING],
    ids=["greedy", "greedy, penalty", "sampled", "all filters"],
)


def build(pattern: str = "blackmamba") -> BlackMamba:
    torch.manual_seed(0)
    config = ModelConfig(
        layers=PATTERNS[pattern], d_model=32, vocab_size=61, unused_vocab=N_UNUSED, n_experts=4,
        d_expert=24, d_mlp=40, n_heads=4, n_kv_heads=2, d_head=8,
    )  # fmt: skip
    model = BlackMamba(config)
    with torch.no_grad():  # random enough that the last token does not decide alone
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> BlackMamba:
    return build()


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = make_prompts(4, 1, 9, 2, 3, 5, 6, 7, 8)  # also shorter than the convolution


def slow_generate(model, prompt, max_new_tokens=32, stop_ids=(), seed=0, **sampling) -> list[int]:
    """One prompt, the whole text read anew for every token."""
    config = SamplingConfig(seed=seed, **sampling)
    generator, ids = torch.Generator().manual_seed(seed), list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        with torch.inference_mode():
            logits = model(torch.tensor([ids]))[:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[:, ids] = True
        uniforms = torch.rand(1, generator=generator)
        n_tokens = model.config.n_tokens
        chosen = sample(logits, config, n_tokens=n_tokens, seen=seen, uniforms=uniforms).item()
        if chosen in stop_ids:
            break
        ids.append(chosen)
    return ids[len(prompt) :]


# ---- what is generated ------------------------------------------------------------------------


@ARGUMENTS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_is_the_slow_loop_over_each_prompt(pattern: str, arguments: dict):
    model = build(pattern)
    seed = arguments.get("seed", 0)
    rest = {k: v for k, v in arguments.items() if k != "seed"}
    expected = [
        slow_generate(model, prompt, 12, seed=seed + i, **rest) for i, prompt in enumerate(PROMPTS)
    ]
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    assert generate(model, PROMPTS, 12, **arguments) == expected


@ARGUMENTS
def test_a_row_is_its_prompt_alone_with_seed_plus_row(model: BlackMamba, arguments: dict):
    together = generate(model, PROMPTS, 20, **arguments)
    assert together == generate(model, PROMPTS, 20, **arguments)
    for i, prompt in enumerate(PROMPTS):
        alone = arguments | {"seed": arguments.get("seed", 0) + i}
        assert generate(model, [prompt], 20, **alone) == [together[i]]


def test_the_seed_matters_and_rows_of_equal_prompts_differ(model: BlackMamba):
    one = generate(model, [[1, 2]] * 4, 12, 1.0, seed=0)
    assert len({tuple(ids) for ids in one}) == 4
    assert generate(model, [[1, 2]] * 4, 12, 1.0, seed=100) != one


def test_rows_end_at_stop_ids_and_leave_the_others_alone(model: BlackMamba):
    free = generate(model, PROMPTS, 30, **EVERYTHING)
    stop_ids = {free[0][3], free[4][9], free[7][0]}
    expected = [
        ids[: next((i for i, t in enumerate(ids) if t in stop_ids), len(ids))] for ids in free
    ]
    assert len(set(map(len, expected))) > 2
    assert expected[7] == []
    assert generate(model, PROMPTS, 30, **EVERYTHING, stop_ids=stop_ids) == expected


def test_ended_rows_cost_nothing(model: BlackMamba, monkeypatch: pytest.MonkeyPatch):
    free = generate(model, PROMPTS[:3], 10, 1.0)
    stop_ids = [free[1][2]]
    expected = [next((i for i, t in enumerate(ids) if t in stop_ids), 9) for ids in free]
    n_rows: list[int] = []
    step = model.step

    def counting(next_ids, state):
        assert state.batch_size == len(next_ids)
        n_rows.append(len(next_ids))
        return step(next_ids, state)

    monkeypatch.setattr(model, "step", counting)
    generate(model, PROMPTS[:3], 10, 1.0, stop_ids=stop_ids)
    # The prefill gives token 0; a step comes before each later token that is looked at.
    assert n_rows == [sum(n >= i for n in expected) for i in range(1, max(expected) + 1)]
    assert n_rows[0] == 3
    assert n_rows[-1] < 3


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("total", "per_row"), [(8, 1), (1, 1), (1, 3), (30, 5)])
def test_long_prompts_are_read_in_pieces(
    pattern: str, total: int, per_row: int, monkeypatch: pytest.MonkeyPatch
):
    model, prompts = build(pattern), make_prompts(17, 1, 9, 40, 3, 2, 9)
    whole = generate(model, prompts, 6, **EVERYTHING)
    monkeypatch.setattr(engine, "_PREFILL_TOKENS", total)
    monkeypatch.setattr(engine, "_PREFILL_TOKENS_PER_ROW", per_row)
    widths: list[int] = []
    prefill = model.prefill

    def counting(input_ids, *rest, **named):
        widths.append(input_ids.numel())
        return prefill(input_ids, *rest, **named)

    monkeypatch.setattr(model, "prefill", counting)
    assert generate(model, prompts, 6, **EVERYTHING) == whole
    assert max(widths) <= max(total, per_row * len(prompts))
    assert len(widths) > 1


@pytest.mark.parametrize("arguments", [GREEDY, {"temperature": 1e6}], ids=["greedy", "hot"])
def test_ids_without_a_token_never_come(arguments: dict):
    model = build()
    with torch.no_grad():
        model.embedding.weight[-N_UNUSED:] *= 100  # a head that would often choose them
        loved = model(torch.tensor(PROMPTS[2:3]))[0].argmax(-1)
    assert (loved >= 61 - N_UNUSED).any()
    new = {t for ids in generate(model, PROMPTS, 60, **arguments) for t in ids}
    assert new <= set(range(61 - N_UNUSED))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_router_balances_only_in_training(temperature: float):
    model = build()
    expected = generate(model, PROMPTS, 8, temperature)
    model.train()
    assert generate(model, PROMPTS, 8, temperature) == expected


# ---- how it behaves ---------------------------------------------------------------------------


def test_the_caller_has_the_model_as_it_was_between_tokens(monkeypatch: pytest.MonkeyPatch):
    model = build().train()
    model.final_norm.eval()
    step = model.step

    def checking(next_ids, state):
        assert torch.is_inference_mode_enabled()
        assert not any(module.training for module in model.modules())
        return step(next_ids, state)

    monkeypatch.setattr(model, "step", checking)
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in stream(model, PROMPTS[:2], 3):
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model.embedding.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        generate(model, PROMPTS)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_stream_gives_ids_in_turn_as_they_come(model: BlackMamba, monkeypatch: pytest.MonkeyPatch):
    n_steps = 0
    step = model.step

    def counting(next_ids, state):
        nonlocal n_steps
        n_steps += 1
        return step(next_ids, state)

    monkeypatch.setattr(model, "step", counting)
    pairs = stream(model, PROMPTS[:3], 4, **SAMPLED)
    assert isinstance(pairs, Iterator)
    seen = [(next(pairs), n_steps) for _ in range(12)]
    assert next(pairs, None) is None
    assert n_steps == 3
    assert [(row, at) for (row, _), at in seen] == [(i % 3, i // 3) for i in range(12)]
    expected = generate(model, PROMPTS[:3], 4, **SAMPLED)
    assert [[t for (row, t), _ in seen if row == i] for i in range(3)] == expected


def test_a_dropped_row_gives_no_more_and_the_others_go_on(model: BlackMamba):
    expected = generate(model, PROMPTS[:3], 6, **EVERYTHING)
    batch = Batch(model, PROMPTS[:3], 6, SamplingConfig(**EVERYTHING))
    new: list[list[int]] = [[], [], []]
    for i in range(6):
        for row, token_id in batch.advance():
            new[row].append(token_id)
        if i == 1:
            batch.drop(1)
    assert new == [expected[0], expected[1][:2], expected[2]]
    assert batch.rows == []
    assert batch.advance() == []


def test_no_new_tokens_runs_nothing(model: BlackMamba, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "prefill", None)
    assert generate(model, PROMPTS[:2], 0) == [[], []]


@pytest.mark.parametrize(
    "prompts",
    [
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint16),
        ((1, 2, 3), (4, 5, 6)),
        [torch.tensor([1, 2, 3]), np.array([4, 5, 6])],
    ],
    ids=["tensor", "array", "tuples", "mixed"],
)
def test_prompts_may_be_any_sequences_of_whole_numbers(model: BlackMamba, prompts):
    assert generate(model, prompts, 3) == generate(model, [[1, 2, 3], [4, 5, 6]], 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_generate(dtype: torch.dtype):
    model = BlackMamba(build().config, dtype=dtype).eval()
    new = generate(model, PROMPTS[:3], 5, **EVERYTHING)
    assert [len(ids) for ids in new] == [5, 5, 5]


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty: must hold at least one prompt"),
        ({"prompts": 5}, "prompts=5: must be a list of lists of token ids"),
        ({"prompts": "text"}, "prompts='text': must be a list of lists"),
        ({"prompts": [1, 2]}, r"prompts\[0\]=1: must be a list of token ids"),
        ({"prompts": [[1], "text"]}, r"prompts\[1\]='text': must be a list of token ids"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty: a prompt needs at least one token id"),
        ({"prompts": [[1], [3, 61]]}, r"prompts\[1\] holds 61 at 1: must be .* 0 \.\. 60"),
        ({"prompts": [[-1]]}, r"prompts\[0\] holds -1 at 0"),
        ({"prompts": [[1, 2.0]]}, r"prompts\[0\] holds 2\.0 at 1"),
        ({"prompts": [[True]]}, r"prompts\[0\] holds True at 0"),
        ({"prompts": [[1, None]]}, r"prompts\[0\] holds None at 1"),
        ({"prompts": torch.zeros(1, 2)}, r"prompts\[0\] holds tensor\(0\.\) at 0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1: must be a whole number of at least 0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"stop_ids": 0}, "stop_ids=0: must be a list of token ids"),
        ({"stop_ids": [0, 99]}, "stop_ids holds 99 at 1"),
    ],
)
@pytest.mark.parametrize("call", [generate, stream])
def test_bad_input_is_named_before_anything_runs(
    model: BlackMamba, call, arguments: dict, message: str
):
    with pytest.raises(InputError, match=message):
        call(**({"model": model, "prompts": [[1]]} | arguments))


@pytest.mark.parametrize("call", [generate, stream])
def test_bad_sampling_is_named_before_anything_runs(model: BlackMamba, call):
    with pytest.raises(ConfigError, match="top_p=7"):
        call(model, [[1]], top_p=7)
