"""Recorded passes over prompts: the padding everywhere, the graphs where there is a GPU."""

import dataclasses

import pytest
import torch
from numerics import largest_difference
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import blackmamba
from blackmamba.config import ModelConfig
from blackmamba.generate import prefill
from blackmamba.generate.captured import fingerprint
from blackmamba.generate.prefill import Recording, read_piece
from blackmamba.model import BlackMamba, State
from blackmamba.presets import presets

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def build() -> BlackMamba:
    config = dataclasses.replace(presets["tiny"], vocab_size=96, unused_vocab=0)
    torch.manual_seed(0)
    return BlackMamba(config).to(DEVICE).eval()


def differ(found: tuple[torch.Tensor, State], expected: tuple[torch.Tensor, State]) -> float:
    worst = largest_difference(found[0], expected[0])
    for name, tensor in found[1].to_tensors().items():
        worst = max(worst, largest_difference(tensor, expected[1].to_tensors()[name]))
    return worst


@pytest.mark.parametrize("lengths", [[5, 1, 9], [9, 9, 9], [16]])
@pytest.mark.parametrize("goes_on", [False, True])
@torch.inference_mode()
def test_a_padded_pass_reads_the_same(lengths: list[int], goes_on: bool):
    model, generator = build(), torch.Generator().manual_seed(1)
    recording = Recording(model, 4, 16, goes_on=True, has_pads=True, graph=HAS_GPU)
    recording.read(torch.full((4, 16), 7), None, torch.tensor([16, 3, 1, 8]))  # leaves its traces
    before = torch.randint(0, 96, (len(lengths), 4), generator=generator).to(DEVICE)
    state = model.prefill(before)[1] if goes_on else None
    rows = [torch.randint(0, 96, (n,), generator=generator) for n in lengths]
    ids, counts = pad_sequence(rows, batch_first=True), torch.tensor(lengths)
    found = recording.read(ids, state, None if len(set(lengths)) == 1 else counts)
    assert found[1].batch_size == len(lengths)
    expected = model.prefill(ids.to(DEVICE), state, lengths=counts.to(DEVICE), logits="last")
    assert differ(found, expected) < 1e-5


@torch.inference_mode()
def test_whole_rows_have_no_pads():
    model = build()
    recording = Recording(model, 2, 16, goes_on=False, has_pads=False, graph=HAS_GPU)
    going_on = Recording(model, 2, 16, goes_on=True, has_pads=False, graph=HAS_GPU)
    ids = torch.arange(16)[None]
    found = recording.read(ids, None, None)
    expected = model.prefill(ids.to(DEVICE), logits="last")
    assert differ(found, expected) < 1e-5
    again = going_on.read(ids, found[1], None)
    assert differ(again, model.prefill(ids.to(DEVICE), expected[1], logits="last")) < 1e-5
    kept = found[0].clone()
    recording.read(ids.flip(1), None, None)
    assert torch.equal(found[0], kept)  # what was given out is not written to


def test_the_ladder():
    assert prefill._shape(1, 1) == (1, 16)
    assert prefill._shape(3, 17) == (4, 32)
    assert prefill._shape(8, 2048) == (8, 2048)
    assert prefill._shape(8, 2049) is None
    assert prefill._shape(257, 1) is None
    assert list(prefill.LENGTHS) == sorted(prefill.LENGTHS)


@pytest.mark.skipif(HAS_GPU, reason="there the changed model is recorded anew")
@torch.inference_mode()
def test_read_before_the_weights_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    def none(config: ModelConfig) -> None:
        del config

    monkeypatch.setattr(prefill, "cannot_capture_any", none)
    with torch.inference_mode(False):
        model, ids = build(), torch.arange(16)[None]
    kept = prefill._KEPT[model] = prefill._Recordings()
    recording = Recording(model, 1, 16, goes_on=False, has_pads=False, graph=False)
    kept.weights, kept._memory = fingerprint(model), prefill.Memory(model)
    kept._kept[1, 16, False, False] = recording
    read: list[Tensor] = []
    own = recording.read

    def counted(
        input_ids: Tensor, state: State | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        read.append(input_ids)
        return own(input_ids, state, lengths)

    monkeypatch.setattr(recording, "read", counted)

    def check(times: int) -> None:
        expected = model.prefill(ids.to(DEVICE), logits="last")
        assert differ(read_piece(model, ids, None, None), expected) < 1e-5
        assert len(read) == times

    check(1)
    check(2)
    weight = model.final_norm.weight
    with torch.no_grad():
        weight.mul_(2)
    before = read_piece(model, ids, None, None)
    check(4)  # both were thrown away
    seen: list[object] = []

    def hook(*args: object) -> None:
        seen.append(args)

    kept.weights = fingerprint(model)
    handle = model.layers[0].register_forward_hook(hook)
    check(5)
    assert len(seen) == 3  # twice in the model's own pass, and in what was thrown away
    handle.remove()
    check(6)
    weight.data = weight.data.clone()
    check(6)  # they lie elsewhere: not even begun
    assert differ(read_piece(model, ids, None, None), before) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA or ROCm device")
def test_recorded_when_met_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BLACKMAMBA_BACKEND", raising=False)
    model, prompts = build(), [[1, 2, 3], [4, 5], list(range(40))]
    expected = blackmamba.generate(model, prompts, max_new_tokens=5)
    kept = prefill._KEPT[model]
    assert not kept._kept
    assert blackmamba.generate(model, prompts, max_new_tokens=5) == expected
    assert list(kept._kept) == [(4, 64, True, True)]
    assert blackmamba.generate(model, prompts, max_new_tokens=5) == expected
    with torch.no_grad():
        next(model.parameters()).zero_()  # other weights: nothing recorded is used
    blackmamba.generate(model, prompts, max_new_tokens=1)
    assert list(kept._kept) == [(4, 64, True, True)]
    with torch.inference_mode():
        logits, _ = read_piece(model, torch.tensor([[3, 4]]), None, None)
    assert logits.abs().max() == 0
