"""The memory of a batch: gathering, joining, saving."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from blackmamba.errors import InputError
from blackmamba.model import BlackMamba, State
from blackmamba.presets import presets


@pytest.fixture(params=["tiny", "transformer-tiny"])
def model(request: pytest.FixtureRequest) -> BlackMamba:
    torch.manual_seed(0)
    return BlackMamba(presets[request.param]).eval()


def ids(b: int, l: int) -> torch.Tensor:
    return torch.randint(0, 512, (b, l), generator=torch.Generator().manual_seed(b * l))


def equal(one: State, other: State) -> bool:
    a, b = one.to_tensors(), other.to_tensors()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.inference_mode()
def test_selected_rows_go_on_like_their_originals(model: BlackMamba):
    _, state = model.prefill(ids(3, 6))
    picked = state.select([2, 0, 2])
    assert picked.batch_size == 3
    next_ids = torch.tensor([5, 6, 7])
    logits, _ = model.step(next_ids, state)
    again, _ = model.step(next_ids[[2, 0, 2]], picked)
    torch.testing.assert_close(again, logits[[2, 0, 2]])
    with pytest.raises(InputError, match=r"within 0 \.\. 2"):
        state.select([3])
    with pytest.raises(InputError, match=r"within 0 \.\. 2"):
        state.select(torch.tensor([-1]))


@dataclasses.dataclass(frozen=True)
class OtherState:
    """Of a mixer that `State` was not written for."""

    mean: torch.Tensor


def test_the_memory_of_any_mixer_is_joined():
    parts = [torch.randn(b, 3) for b in (2, 1)]
    states = [State(len(p), (OtherState(p), None)) for p in parts]  # pyright: ignore[reportArgumentType]
    joined = State.cat(states)
    assert joined.layers[1] is None
    assert torch.equal(joined.to_tensors()["0.mean"], torch.cat(parts))
    assert equal(joined.select([0, 1]), states[0])


@torch.inference_mode()
def test_joined_rows_go_on_like_their_originals(model: BlackMamba):
    _, short = model.prefill(ids(1, 3))
    _, long = model.prefill(ids(2, 9))
    joined = State.cat([short, long])
    assert joined.batch_size == 3
    next_ids = torch.tensor([5, 6, 7])
    logits, _ = model.step(next_ids, joined)
    torch.testing.assert_close(logits[:1], model.step(next_ids[:1], short)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1:], model.step(next_ids[1:], long)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="at least one"):
        State.cat([])


@torch.inference_mode()
def test_saved_and_restored(model: BlackMamba, tmp_path):
    _, state = model.prefill(ids(2, 5))
    save_file(
        {k: v.contiguous() for k, v in state.to_tensors().items()}, tmp_path / "state.safetensors"
    )
    back = State.from_tensors(model.initial_state(1), load_file(tmp_path / "state.safetensors"))
    assert back.batch_size == 2
    assert equal(back, state)
    with pytest.raises(InputError, match="do not match this model"):
        State.from_tensors(model.initial_state(1), {"0.odd": torch.zeros(1)})
    torn = dict(state.to_tensors())
    torn[next(iter(torn))] = torch.zeros(7)
    with pytest.raises(InputError, match="different batch sizes"):
        State.from_tensors(model.initial_state(1), torn)


@torch.inference_mode()
def test_a_clone_shares_nothing(model: BlackMamba):
    _, state = model.prefill(ids(2, 5))
    copy = state.clone()
    for tensor in copy.to_tensors().values():
        tensor.zero_()
    assert not equal(copy, state)
    assert equal(state.to("cpu"), state)
