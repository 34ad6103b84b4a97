"""Likelihoods of answers and documents against one full pass for each."""

import math
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blackmamba.errors import InputError
from blackmamba.evaluate import Likelihood, continuation_likelihoods, document_likelihoods
from blackmamba.model import BlackMamba
from blackmamba.presets import presets


@pytest.fixture(scope="module", params=["tiny", "moe-transformer-tiny"])
def model(request: pytest.FixtureRequest) -> BlackMamba:
    torch.manual_seed(0)
    model = BlackMamba(presets[request.param]).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # random weights are nearly sure of nothing
    return model


@torch.inference_mode()
def naive(model: BlackMamba, context: list[int], answer: list[int]) -> Likelihood:
    log_p = model(torch.tensor([[*context, *answer]]))[0, len(context) - 1 : -1].log_softmax(-1)
    nats = log_p.gather(1, torch.tensor(answer)[:, None]).double().sum().item()
    return Likelihood(nats, log_p.argmax(-1).tolist() == answer)


def questions(number: int, longest: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Contexts of different lengths with one to five answers each, in shuffled order."""
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(512) for _ in range(rng.randint(1, most))]

    pairs = [
        (context, ids(9))
        for context in [ids(longest) for _ in range(number)]
        for _ in range(rng.randint(1, 5))
    ]
    rng.shuffle(pairs)
    return pairs


def assert_equal(found: Likelihood, expected: Likelihood) -> None:
    assert found.nats == pytest.approx(expected.nats, abs=1e-4)
    assert found.is_greedy == expected.is_greedy


@pytest.mark.parametrize("max_rows", [0, 1, 3])
def test_answers_equal_one_full_pass_each(model: BlackMamba, max_rows: int):
    pairs = questions(12, 90)
    found = continuation_likelihoods(model, pairs, batch_tokens=200, max_rows=max_rows)
    for score, pair in zip(found, pairs, strict=True):
        assert_equal(score, naive(model, *pair))


def test_greedy_answers_are_seen_as_such(model: BlackMamba):
    context, answer = [5, 6, 7], []
    with torch.inference_mode():
        for _ in range(4):
            answer.append(int(model(torch.tensor([context + answer]))[0, -1].argmax()))
    last_wrong = [*answer[:3], (answer[3] + 1) % 512]
    first_wrong = [(answer[0] + 1) % 512, *answer[1:]]
    found = continuation_likelihoods(
        model, [(context, a) for a in (answer, last_wrong, first_wrong)]
    )
    assert [score.is_greedy for score in found] == [True, False, False]


def test_few_logits_are_held_at_once(model: BlackMamba, monkeypatch: pytest.MonkeyPatch):
    pairs = questions(6, 30, seed=1)
    expected = [naive(model, *pair) for pair in pairs]
    monkeypatch.setattr(sys.modules["blackmamba.evaluate.likelihood"], "_LOGITS_AT_ONCE", 3 * 512)
    for score, other in zip(continuation_likelihoods(model, pairs), expected, strict=True):
        assert_equal(score, other)


def test_a_context_is_read_once(model: BlackMamba, monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    prefill = BlackMamba.prefill

    def counted(self: BlackMamba, input_ids: torch.Tensor, *args: object, **options: object):
        read.append(input_ids.numel())
        return prefill(self, input_ids, *args, **options)  # pyright: ignore

    monkeypatch.setattr(BlackMamba, "prefill", counted)
    context = list(range(100))
    continuation_likelihoods(model, [(context, [1, 2, i]) for i in range(4)])
    assert sum(read) == 100 + 4 * 2


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), piece=st.integers(1, 45))
def test_documents_equal_one_full_pass_each(lengths: list[int], piece: int):
    torch.manual_seed(0)
    model = BlackMamba(presets["tiny"]).eval()
    rng = random.Random(0)
    documents = [[rng.randrange(512) for _ in range(length)] for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["blackmamba.evaluate.likelihood"], "_PIECE", piece)
        found = document_likelihoods(model, documents, start_id=0, batch_tokens=90)
    for nats, ids in zip(found, documents, strict=True):
        expected = naive(model, [0], ids).nats if ids else 0.0
        assert nats == pytest.approx(expected, abs=1e-4)


def test_a_likelihood_is_a_distribution(model: BlackMamba):
    found = continuation_likelihoods(model, [([1, 2, 3], [i]) for i in range(512)])
    assert sum(math.exp(score.nats) for score in found) == pytest.approx(1, abs=1e-4)
    assert sum(score.is_greedy for score in found) == 1


def test_progress_counts_every_pair(model: BlackMamba):
    done: list[int] = []
    pairs = questions(7, 20)
    continuation_likelihoods(model, pairs, batch_tokens=30, on_progress=done.append)
    assert sum(done) == len(pairs)
    assert len(done) > 1
    assert continuation_likelihoods(model, []) == []


def test_wrong_arguments(model: BlackMamba):
    with pytest.raises(InputError, match=r"pairs\[0\]: its context is empty"):
        continuation_likelihoods(model, [([], [1])])
    with pytest.raises(InputError, match=r"pairs\[1\]: its continuation is empty"):
        continuation_likelihoods(model, [([1], [1]), ([1], [])])
    with pytest.raises(InputError, match="batch_tokens=0: must be at least 1"):
        continuation_likelihoods(model, [([1], [1])], batch_tokens=0)
    with pytest.raises(InputError, match="max_rows=-1: must be at least 0"):
        document_likelihoods(model, [[1]], 0, max_rows=-1)
    with pytest.raises(InputError, match="input_ids holds 512"):
        document_likelihoods(model, [[1, 512, 1]], 0)
