"""The in-place decoder against the model's own steps."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import relative_error
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from blackmamba.config import ModelConfig
from blackmamba.errors import BackendError, InputError
from blackmamba.generate.decoder import Decoder, cannot_decode
from blackmamba.generate.engine import generate
from blackmamba.model import BlackMamba, quantize
from blackmamba.ops import native
from blackmamba.presets import presets

needs_native = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

PATTERNS = [
    ("mamba", "moe", "mamba", "moe"),
    ("mamba", "mlp", "mamba+moe", "moe:3"),
    ("mamba+mlp", "mamba"),
    ("moe",),
]
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "biases": {
        "activation": "gelu", "linear_bias": True, "head_bias": True, "tie_embeddings": False,
    },
    "odd": {"gated": False, "d_conv": 3, "d_state": 5, "final_norm": "rms_norm"},
    "no_memory_of_inputs": {"d_conv": 1, "d_state": 33},
}  # fmt: skip


def random_model(
    pattern: tuple[str, ...], dtype: torch.dtype = torch.float32, **changes: object
) -> BlackMamba:
    """A model of awkward sizes whose biases and norms are not at their first values."""
    sizes = {"d_mlp": 100, "d_model": 52, "d_expert": 37, "vocab_size": 131, "unused_vocab": 0}
    config = dataclasses.replace(presets["tiny"], layers=pattern, **sizes, **changes)
    torch.manual_seed(0)
    model = BlackMamba(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def read(model: BlackMamba, batch_size: int, length: int = 5):
    ids = torch.randint(0, model.config.vocab_size, (batch_size, length))
    return model.prefill(ids)[1]


@needs_native
@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 6])
@pytest.mark.parametrize("what", ["experts", "all"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_quantised_models(variant: str, bits: int, what: str, batch_size: int):
    model = quantize(random_model(PATTERNS[1], **VARIANTS[variant]), bits, what=what)  # pyright: ignore
    state = read(model, batch_size)
    decoder = Decoder(model, state)
    for _ in range(4):
        next_ids = torch.randint(0, model.config.vocab_size, (batch_size,))
        expected, state = model.step(next_ids, state)
        assert relative_error(decoder.step(next_ids), expected) < 2e-5


@needs_native
@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)
def test_steps_as_the_model_does(pattern: tuple[str, ...], variant: str, batch_size: int):
    model = random_model(pattern, **VARIANTS[variant])
    state = read(model, batch_size)
    decoder = Decoder(model, state)
    for _ in range(4):
        next_ids = torch.randint(0, model.config.vocab_size, (batch_size,))
        expected, state = model.step(next_ids, state)
        assert relative_error(decoder.step(next_ids), expected) < 2e-5
    for name, tensor in decoder.state.to_tensors().items():
        assert relative_error(tensor, state.to_tensors()[name]) < 2e-5, name


@needs_native
@torch.no_grad()
def test_bfloat16_weights_with_float32_activations_are_nearer_to_exact_than_plain_steps():
    model = random_model(PATTERNS[0], torch.bfloat16)
    exact = BlackMamba(model.config, dtype=torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    plain, exact_state = model.initial_state(3), exact.initial_state(3)
    decoder = Decoder(model, plain)
    for _ in range(6):
        ids = torch.randint(0, 131, (3,))
        wanted, exact_state = exact.step(ids, exact_state)
        rough, plain = model.step(ids, plain)
        got = decoder.step(ids)
        assert relative_error(got, wanted) < 1e-4
        assert relative_error(got, wanted) < relative_error(rough, wanted)
    assert decoder.state.to_tensors()["0.conv"].dtype == torch.bfloat16


@needs_native
@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_bfloat16_models_with_quantised_weights_are_nearer_to_exact_than_plain_steps(bits: int):
    """One activation is a thousand times the others, as some of trained models are."""
    model = quantize(random_model(PATTERNS[0], torch.bfloat16), bits, what="all")  # pyright: ignore
    model.layers[0].norm.weight[5] = 1000
    wide = quantize(random_model(PATTERNS[0]), bits, what="all").double()  # pyright: ignore
    wide.load_state_dict(model.state_dict())
    plain, exact_state = model.initial_state(3), wide.initial_state(3)
    decoder = Decoder(model, plain)
    for _ in range(6):
        ids = torch.randint(0, 131, (3,))
        wanted, exact_state = wide.step(ids, exact_state)
        rough, plain = model.step(ids, plain)
        got = decoder.step(ids)
        assert relative_error(got, wanted) < 1e-3
        assert relative_error(got, wanted) < relative_error(rough, wanted) / 4


@needs_native
@torch.no_grad()
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_a_row_does_not_depend_on_its_neighbours_bit_for_bit(bits: int):
    model = random_model(PATTERNS[0], torch.bfloat16 if bits else torch.float32)
    if bits:
        model = quantize(model, bits, what="all")  # pyright: ignore
    state, ids = read(model, 9), torch.randint(0, 131, (9,))
    together = Decoder(model, state).step(ids).clone()
    for row in range(9):
        alone = Decoder(model, state.select([row])).step(ids[row : row + 1])
        assert torch.equal(alone[0], together[row])


@needs_native
def test_any_number_of_threads_gives_the_same_bits():
    """In a process of its own, as the number of threads belongs to the process."""
    code = """
import torch
from test_decoder import Decoder, PATTERNS, random_model
torch.set_grad_enabled(False)
model = random_model(PATTERNS[0])
for batch_size in (1, 3, 7):  # of up to 4 each thread prepares what it needs for itself
    ids = torch.randint(0, 131, (batch_size, 5))
    logits = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        decoder = Decoder(model, model.initial_state(batch_size))
        logits.append([decoder.step(row).clone() for row in ids.T])
    assert all(torch.equal(a, b) for run in logits[1:] for a, b in zip(run, logits[0]))
print("equal")
"""
    path = [str(Path(__file__).parent), *sys.path]
    program = f"import sys; sys.path[:0] = {path!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


@needs_native
@torch.no_grad()
def test_allocates_nothing_after_the_first_step():
    model = random_model(PATTERNS[1])
    decoder, ids = Decoder(model, model.initial_state(5)), torch.arange(5)
    address = decoder.step(ids).data_ptr()
    scratch = native.extension().scratch_allocations()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        for _ in range(50):
            assert decoder.step(ids).data_ptr() == address
    assert native.extension().scratch_allocations() == scratch
    assert sum(event.self_cpu_memory_usage for event in seen.key_averages()) == 0
    assert [event.key for event in seen.key_averages() if "empty" in event.key] == []


@needs_native
@torch.no_grad()
def test_the_state_that_it_began_with_is_left_alone():
    model = random_model(PATTERNS[0])
    state = read(model, 2)
    before = state.clone().to_tensors()
    decoder = Decoder(model, state)
    decoder.step(torch.tensor([1, 2]))
    kept = decoder.state
    decoder.step(torch.tensor([1, 2]))
    assert all(torch.equal(t, before[name]) for name, t in state.to_tensors().items())
    assert not torch.equal(kept.to_tensors()["0.ssm"], decoder.state.to_tensors()["0.ssm"])


@needs_native
@torch.no_grad()
def test_rows_can_be_dropped_and_repeated():
    model = random_model(PATTERNS[0])
    decoder = Decoder(model, read(model, 3))
    decoder.step(torch.tensor([1, 2, 3]))
    wanted = decoder.state
    fewer = decoder.select([2, 0, 0])
    logits, _ = model.step(torch.tensor([4, 5, 6]), wanted.select([2, 0, 0]))
    assert relative_error(fewer.step(torch.tensor([4, 5, 6])), logits) < 2e-5


@needs_native
@torch.no_grad()
def test_nan_in_a_weight_is_nan_in_the_logits():
    model = random_model(PATTERNS[0])
    model.embedding.weight[7, 3] = torch.nan
    decoder = Decoder(model, model.initial_state(2))
    logits = decoder.step(torch.tensor([7, 8]))
    assert logits[0].isnan().all()
    assert logits[1].isnan().sum() == 1  # the head is the embedding: id 7 itself


@needs_native
def test_generation_uses_it_and_gives_the_same_ids(monkeypatch: pytest.MonkeyPatch):
    model = random_model(PATTERNS[0])
    prompts = [[1, 2, 3], [4], [5, 6]]
    fast = generate(model, prompts, 12, stop_ids=[9])
    monkeypatch.setenv("BLACKMAMBA_BACKEND", "torch")
    assert cannot_decode(model) == "BLACKMAMBA_BACKEND=torch asks for another backend"
    assert generate(model, prompts, 12, stop_ids=[9]) == fast


def test_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch):
    model = random_model(PATTERNS[0])
    monkeypatch.setattr(native, "missing", lambda: "the native extension was not built")
    with pytest.raises(BackendError, match="no in-place decoder: the native extension was not"):
        Decoder(model, model.initial_state(1))


@needs_native
def test_refuses_what_it_does_not_know():
    class Other(nn.Linear):
        pass

    def changed(change) -> str | None:
        model = random_model(PATTERNS[0])
        change(model)
        return cannot_decode(model)

    assert changed(lambda m: None) is None
    assert "Other" in str(changed(lambda m: setattr(m.layers[0].mixer, "in_proj", Other(52, 208))))
    assert "hooks" in str(changed(lambda m: m.layers[1].register_forward_hook(lambda *a: None)))
    assert "float64" in str(changed(lambda m: m.double()))
    attention = ModelConfig(
        layers=("attention",), d_model=16, vocab_size=9, n_heads=2, n_kv_heads=2, d_head=8
    )
    assert "attention" in str(cannot_decode(BlackMamba(attention)))


@needs_native
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1]), r"next_ids of shape \(1,\), torch.int64: must be \(2,\), torch.int64"),
        (torch.tensor([1.0, 2.0]), r"torch.float32: must be \(2,\), torch.int64"),
        (torch.tensor([1, 131]), "next_ids holds 131: must be 0 .. 130"),
        (torch.tensor([-1, 0]), "next_ids holds -1: must be 0 .. 130"),
    ],
)
def test_bad_ids(ids: Tensor, message: str):
    model = random_model(PATTERNS[0])
    with pytest.raises(InputError, match=message):
        Decoder(model, model.initial_state(2)).step(ids)


@needs_native
def test_a_state_of_another_model():
    model, other = random_model(PATTERNS[0]), random_model(("mamba",))
    with pytest.raises(InputError, match="state of 1 layers: this model has 4"):
        Decoder(model, other.initial_state(2))
