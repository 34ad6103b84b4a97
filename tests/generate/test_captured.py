"""The GPU's in-place decoder: its kernels interpreted on a CPU, its graphs where there is a GPU."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import CXX, kernels
from numerics import largest_difference

import blackmamba
from blackmamba.errors import BackendError, InputError
from blackmamba.generate import captured, stream
from blackmamba.generate.captured import CapturedDecoder, cannot_capture, warmup
from blackmamba.generate.few import FewStep
from blackmamba.model import BlackMamba
from blackmamba.ops import gpu
from blackmamba.ops.gpu import cuda
from blackmamba.presets import presets

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason="needs triton")
DEVICE = "cpu" if gpu.interpreted() else "cuda"


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BLACKMAMBA_BACKEND", raising=False)


def build(dtype: torch.dtype = torch.float32, **changes: object) -> BlackMamba:
    config = dataclasses.replace(presets["tiny"], vocab_size=96, unused_vocab=0, **changes)
    torch.manual_seed(0)
    model = BlackMamba(config, dtype=dtype).to(DEVICE).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.bias") or "router" in name:
                parameter.normal_()
    return model


def follow(model: BlackMamba, like: BlackMamba, batch: int, steps: int = 4) -> float:
    """The largest difference of logits between the decoder and `like.step`, token by token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 96, (batch, 5 + steps), generator=generator).to(DEVICE)
    _, state = like.prefill(ids[:, :5])
    decoder, worst = CapturedDecoder(model, state), 0.0
    for i in range(5, 5 + steps):
        logits, state = like.step(ids[:, i], state)
        worst = max(worst, largest_difference(decoder.step(ids[:, i]), logits))
    for mine, theirs in zip(decoder.state.layers, state.layers, strict=True):
        if mine is not None:
            worst = max(worst, largest_difference(mine.ssm, theirs.ssm))  # pyright: ignore
            conv = theirs.conv.to(mine.conv.dtype)  # pyright: ignore
            worst = max(worst, largest_difference(mine.conv, conv))  # pyright: ignore
    return worst


@pytest.mark.parametrize("batch", [1, 3, 11])
@torch.inference_mode()
def test_as_the_model_steps(batch: int):
    model = build()
    assert follow(model, model, batch) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": ("mamba", "mlp", "mamba", "moe"), "d_mlp": 40},
        {"n_experts": 11},
        {"activation": "gelu", "final_norm": "rms_norm"},
        {"d_conv": 2, "d_state": 5, "tie_embeddings": False},
    ],
    ids=str,
)
@torch.inference_mode()
def test_other_shapes(changes: dict[str, object]):
    model = build(**changes)
    assert follow(model, model, 2, steps=3) < 1e-4


@pytest.mark.parametrize(
    ("batch", "changes"),
    [
        (2, {"experts_per_token": 2, "mamba_norm": True}),
        (1, {"router": "softmax", "experts_per_token": 3, "normalize_gates": True}),
        (3, {"router": "sigmoid", "selection_bias": True, "d_shared_expert": 40}),
    ],
    ids=str,
)
@torch.inference_mode()
def test_other_routers(batch: int, changes: dict[str, object]):
    model = build(layers=("mamba", "moe"), **changes)
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.normal_(std=0.2)
    assert follow(model, model, batch, steps=2) < 1e-4
    model.train()  # Sinkhorn's plan has no part in generation
    state = model.initial_state(batch)
    ids = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    found = CapturedDecoder(model, state).step(ids)
    assert largest_difference(found, model.eval().step(ids, state)[0]) < 1e-4


@torch.inference_mode()
def test_bfloat16_weights():
    model = build(torch.bfloat16)
    wide = BlackMamba(model.config).to(DEVICE).eval()
    wide.load_state_dict(model.state_dict())
    assert follow(model, wide, 1, steps=3) < 1e-3


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Products of a few sequences by CUDA C++, on a CPU if there is no GPU."""
    if DEVICE == "cpu":
        if CXX is None:
            pytest.skip("needs a C++ compiler")
        monkeypatch.setattr(cuda, "kernel", kernels(tmp_path))
        monkeypatch.setattr(cuda, "runs_on", lambda _: True)
        monkeypatch.setattr(gpu, "processors", lambda _: 3)


@pytest.mark.parametrize(
    ("batch", "changes"),
    [
        (2, {}),
        (11, {"n_experts": 5}),
        (4, {"layers": ("mamba", "mlp", "mamba", "moe"), "d_mlp": 40, "activation": "gelu"}),
        (5, {"final_norm": "rms_norm", "tie_embeddings": False, "d_conv": 2, "d_state": 5}),
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_few_sequences_in_bfloat16(few: None, batch: int, changes: dict[str, object]):
    """No further from float32 than the model's own step: 0.90 to 0.98 times as far on a CPU."""
    model = build(torch.bfloat16, **changes)
    wide = BlackMamba(model.config).to(DEVICE).eval()
    wide.load_state_dict(model.state_dict())
    ids = torch.randint(0, 96, (batch, 4), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    state, exact_state = model.initial_state(batch), wide.initial_state(batch)
    decoder = CapturedDecoder(model, state)
    assert isinstance(decoder._recording._step, FewStep)
    errors = torch.zeros(2, device=DEVICE)
    for i in range(4):
        own, state = model.step(ids[:, i], state)
        exact, exact_state = wide.step(ids[:, i], exact_state)
        for j, logits in enumerate((decoder.step(ids[:, i]), own)):
            errors[j] += (logits - exact).square().mean()
    assert errors[0].sqrt() < 1.1 * errors[1].sqrt()
    assert not isinstance(CapturedDecoder(wide, exact_state)._recording._step, FewStep)


@torch.inference_mode()
def test_select_and_reuse():
    model = build()
    ids = torch.arange(6).view(3, 2).to(DEVICE)
    _, state = model.prefill(ids)
    decoder = CapturedDecoder(model, state)
    decoder.step(ids[:, 0])
    chosen = decoder.select([2, 0])
    expected, _ = model.step(ids[[2, 0], 1], decoder.state.select([2, 0]))
    assert largest_difference(chosen.step(ids[[2, 0], 1]), expected) < 1e-4
    del decoder, chosen
    recording = next(r for r in captured._FREE[model] if r.size == 4)
    again = CapturedDecoder(model, state)
    assert again._recording is recording  # no second recording for the next that generates
    del again
    model.embedding.weight.data = model.embedding.weight.data.clone()  # moved
    assert CapturedDecoder(model, state)._recording is not recording


def test_generation_is_the_same(monkeypatch: pytest.MonkeyPatch):
    model = build()
    prompts = [[1, 2, 3], [4], [5, 6]]
    expected = blackmamba.generate(model, prompts, max_new_tokens=6)
    engine = sys.modules["blackmamba.generate.engine"]
    monkeypatch.setattr(engine, "_in_place", CapturedDecoder)
    assert blackmamba.generate(model, prompts, max_new_tokens=6) == expected
    warmup(model, (1,))
    assert {recording.size for recording in captured._FREE[model]} == {1, 4}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "top_k": 20, "seed": 3},
        {"repetition_penalty": 1.3},
        {"stop_ids": "the fourth of the first"},
    ],
    ids=str,
)
def test_sampling_and_stopping_are_the_same(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
):
    model, options = build(), dict(options)
    prompts = [[1, 2, 3], [4], [5, 6], [9]]
    if "stop_ids" in options:
        options["stop_ids"] = [blackmamba.generate(model, prompts, max_new_tokens=4)[0][-1]]
    expected = blackmamba.generate(model, prompts, max_new_tokens=8, **options)  # pyright: ignore
    if "stop_ids" in options:
        assert len({len(ids) for ids in expected}) > 1  # rows end at different times
    monkeypatch.setattr(sys.modules["blackmamba.generate.engine"], "_in_place", CapturedDecoder)
    assert blackmamba.generate(model, prompts, max_new_tokens=8, **options) == expected  # pyright: ignore


def test_damaged_weights_are_told(monkeypatch: pytest.MonkeyPatch):
    model = build()
    monkeypatch.setattr(sys.modules["blackmamba.generate.engine"], "_in_place", CapturedDecoder)
    pairs = stream(model, [[1, 2]], max_new_tokens=6)
    next(pairs)  # of the prompt
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan"))  # pyright: ignore
    with pytest.raises(InputError, match="NaN"):
        list(pairs)


@torch.inference_mode()
def test_greedy_choice():
    model = build()
    decoder = CapturedDecoder(model, model.initial_state(2))
    logits = decoder.step(torch.tensor([3, 4], device=DEVICE))
    ids, usable = decoder.greedy()
    assert torch.equal(ids, logits.argmax(-1))
    assert usable.tolist() == [1, 1]
    again = CapturedDecoder(model, model.initial_state(2))
    again.step(torch.tensor([3, 4], device=DEVICE))
    expected = decoder.step(ids.clone())
    assert torch.equal(again.step(None), expected)


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch):
    assert "biases" in str(cannot_capture(build(linear_bias=True)))
    assert "at most 256" in str(cannot_capture(build(), 257))
    assert "float64" in str(cannot_capture(build(torch.float64)))
    hooked = build()
    hooked.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in str(cannot_capture(hooked))
    model = build()
    monkeypatch.setenv("BLACKMAMBA_BACKEND", "reference")
    assert "asks for another" in str(cannot_capture(model))
    with pytest.raises(BackendError, match="asks for another"):
        CapturedDecoder(model, model.initial_state(1))
    monkeypatch.delenv("BLACKMAMBA_BACKEND")
    decoder = CapturedDecoder(model, model.initial_state(2))
    with pytest.raises(InputError, match=r"must be \(2,\)"):
        decoder.step(torch.zeros(1, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA or ROCm device")
@torch.inference_mode()
def test_a_step_waits_for_nothing_and_keeps_its_memory():
    model = build()
    decoder = CapturedDecoder(model, model.initial_state(1))
    ids = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    decoder.step(ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(2000):
        ids.copy_(decoder.step(ids).argmax(-1))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
