"""The pass over prompts that recordings are of: its kernels interpreted where there is no GPU."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_on_cpu import CXX, Kernel, kernels
from hopper_on_cpu import take_place
from numerics import largest_difference

from blackmamba.generate.prompt import PromptPass
from blackmamba.model import BlackMamba, State
from blackmamba.ops import gpu
from blackmamba.ops.expert_mlp import gpu as experts
from blackmamba.ops.gpu import cuda
from blackmamba.presets import presets

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason="needs triton")
DEVICE = "cpu" if gpu.interpreted() else "cuda"


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BLACKMAMBA_BACKEND", raising=False)


def build(dtype: torch.dtype = torch.float32, **changes: object) -> BlackMamba:
    options = {"vocab_size": 96, "unused_vocab": 0, "d_model": 16, "d_state": 4, "d_expert": 16}
    options |= {"layers": ("mamba", "moe", "mamba")} | changes
    config = dataclasses.replace(presets["tiny"], **options)
    torch.manual_seed(0)
    model = BlackMamba(config, dtype=dtype).to(DEVICE).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "router" in name or name.endswith(("conv_bias", ".D")):
                parameter.normal_()
    return model


def differ(found: tuple[torch.Tensor, State], expected: tuple[torch.Tensor, State]) -> float:
    worst = largest_difference(found[0], expected[0])
    for name, tensor in found[1].to_tensors().items():
        worst = max(worst, largest_difference(tensor, expected[1].to_tensors()[name]))
    return worst


@pytest.mark.parametrize(
    ("goes_on", "lengths", "changes"),
    [
        (False, None, {}),
        (True, [6, 1], {}),
        (False, [2, 6], {"layers": ("mamba", "mlp", "moe"), "d_mlp": 32, "d_shared_expert": 16}),
        (True, None, {"mamba_norm": True, "router": "softmax"}),
        (True, [3, 6], {"mamba_norm": True, "layers": ("mamba", "moe", "moe")}),
        (False, [4, 6], {"layers": ("moe", "mlp"), "d_mlp": 32}),
    ],
    ids=str,
)
@torch.inference_mode()
def test_as_the_model_reads(goes_on: bool, lengths: list[int] | None, changes: dict[str, object]):
    model = build(**changes)
    ids = torch.randint(0, 96, (2, 6), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    state = model.prefill(ids[:, :4].flip(1))[1] if goes_on else None
    counts = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    expected = model.prefill(ids, state, lengths=counts, logits="last")
    found = PromptPass(model)(model, ids, state, counts)
    assert differ(found, expected) < 2e-5


@torch.inference_mode()
def test_bfloat16_is_no_further_from_float32_than_the_models_own():
    model = build()
    narrow = build(torch.bfloat16)
    ids = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = model.prefill(ids, logits="last")
    own = narrow.prefill(ids, logits="last")
    found = PromptPass(narrow)(narrow, ids, None, None)
    assert found[0].dtype == torch.bfloat16
    assert differ(found, exact) < 1.5 * differ(own, exact)


@pytest.mark.skipif(CXX is None or DEVICE == "cuda", reason="needs a C++ compiler and no GPU")
@torch.inference_mode()
def test_experts_that_add_to_the_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    layers = ("mamba", "moe", "moe", "mamba", "moe", "mamba")
    model, narrow = build(layers=layers), build(torch.bfloat16, layers=layers)
    ids = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(1))
    exact = model.prefill(ids, logits="last")
    own = narrow.prefill(ids, logits="last")
    launched: list[str] = []

    compiled = kernels(tmp_path)

    def kernel(sources: tuple[Path, ...], name: str, *rest: Any) -> Kernel:
        launched.append(name)
        return compiled(sources, name, *rest)

    monkeypatch.setattr(cuda, "kernel", kernel)
    monkeypatch.setattr(cuda, "runs_on", lambda _: True)
    take_place(monkeypatch)
    properties = SimpleNamespace(multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(experts, "FEW", 8)
    found = PromptPass(narrow)(narrow, ids, None, None)
    # the experts of the second of two follow no update, and choose by another kernel
    mixed, routed = ["projected"], ["norm_and_choice", "grouped_product", "grouped_product"]
    assert launched == [*mixed, *routed, *mixed, *routed, *mixed]
    assert differ(found, exact) < 1.5 * differ(own, exact)
    assert differ(PromptPass(narrow)(narrow, ids, None, None), found) == 0
    launched.clear()
    monkeypatch.setattr(experts, "MOST_ADDED", 15)
    others = PromptPass(narrow)(narrow, ids, None, None)
    assert launched == [*mixed, *["norm_and_choice"] * 2, *mixed, "norm_and_choice", *mixed]
    assert differ(others, exact) < 1.5 * differ(own, exact)
