"""Runs that train adapters, and what comes of them."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from many_ranks import on_ranks
from ranks_train import train_all, train_some
from safetensors.torch import load_file, save_file

import blackmamba
from blackmamba.checkpoint.load import fingerprint, load_tokenizer
from blackmamba.cli.main import main
from blackmamba.errors import CheckpointError, ConfigError
from blackmamba.model.quantized import QuantizedStorage
from blackmamba.train import RunConfig, load_recipe, run
from blackmamba.train.metrics import read_metrics
from blackmamba.train.parallel.config import ParallelConfig

Recipe = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("draw_nothing")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, text: Path, source: Path) -> Recipe:
    """A recipe file that trains adapters of `source`."""
    folder = tmp_path_factory.mktemp("recipes")

    def write(init: Path = source, **lora: Any) -> Path:
        path = folder / "recipe.yaml"
        plain = {
            "data": {"text": [str(text)], "validation_fraction": 0.1},
            "train": {"init": str(init), "steps": 4, "batch_size": 4, "seq_len": 16, "lr": 1e-2,
                      "device": "cpu", "checkpoint_every": 2},
            "lora": {"rank": 2, "dropout": 0.2} | lora,
        }  # fmt: skip
        path.write_text(yaml.safe_dump(plain))
        return path

    return write


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    run(load_recipe(recipe()), out)
    return out


def logits(folder: Path, **options: Any) -> torch.Tensor:
    ids = torch.arange(20).view(2, 10)
    return blackmamba.load(folder, dtype=torch.float64, **options)(ids)


def test_a_run_of_adapters(trained: Path, source: Path):
    """Its model is the base with the adapters; the base is as it was, the adapter folder small."""
    assert torch.equal(logits(trained / "base"), logits(source))
    merged = logits(trained / "base", adapter=trained / "adapter")
    # The run added them in float32, here it was float64.
    torch.testing.assert_close(merged, logits(trained), rtol=0, atol=1e-5)
    assert (logits(trained) - logits(source)).abs().max() > 1e-3
    tensors = load_file(trained / "adapter" / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B"}
    checkpoint = trained / "checkpoints" / "step-00000004"
    held = {path.name for path in checkpoint.iterdir()}
    assert {"adapter.json", "adapter.safetensors", "optimizer.safetensors"} <= held
    assert "model.safetensors" not in held
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {name.split("/")[0].rpartition(".")[2] for name in moments} == {"lora_A", "lora_B"}
    at_checkpoint = logits(source, adapter=checkpoint)
    assert torch.equal(at_checkpoint, merged)


def test_resume_without_the_source(tmp_path: Path, recipe: Recipe, trained: Path, source: Path):
    passing, out = tmp_path / "passing", tmp_path / "run"
    shutil.copytree(source, passing)
    path = recipe(passing)
    run(load_recipe(path), out)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    shutil.rmtree(passing)
    assert main(["train", str(path), "--out", str(out), "--resume"]) == 0
    for name in ("adapter/adapter.safetensors", "model/model.safetensors"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()


def test_other_adapters_are_another_run(recipe: Recipe, trained: Path):
    with pytest.raises(ConfigError, match=r"lora.alpha \(was 16.0, now 1.0\)"):
        run(load_recipe(recipe(alpha=1.0)), trained, resume=True)


def test_many_ranks_are_one_process(tmp_path: Path, recipe: Recipe, source: Path):
    """However they lie; and a checkpoint of two ranks is resumed by one, and one's by two."""
    path = recipe()
    alone = load_recipe(path, ["train.accumulate=2", "train.steps=6", "train.ema_decay=0.9"])
    run(alone, tmp_path / "alone")
    one = dataclasses.replace(alone, train=dataclasses.replace(alone.train, accumulate=1))
    runs: list[tuple[RunConfig, Path, bool]] = []
    kinds: dict[str, dict[str, Any]] = {
        "none": {}, "experts": {"expert": 2}, "both": {"shard": "full", "expert": 2},
        "full": {"shard": "full"},
    }  # fmt: skip
    for name, kind in kinds.items():
        ranked = dataclasses.replace(one, parallel=ParallelConfig(**kind))
        runs.append((ranked, tmp_path / name, False))
    shutil.copytree(tmp_path / "alone", tmp_path / "to-two")
    shutil.rmtree(tmp_path / "to-two/checkpoints/step-00000006")
    runs.append((runs[-1][0], tmp_path / "to-two", True))
    # Also of a model with experts in 4 bits.
    small = blackmamba.quantize(blackmamba.load(source), 4)
    blackmamba.save(small, tmp_path / "small", tokenizer=load_tokenizer(source))
    narrow = load_recipe(recipe(tmp_path / "small"), ["train.accumulate=2"])
    run(narrow, tmp_path / "narrow")
    train = dataclasses.replace(narrow.train, accumulate=1)
    ranked = dataclasses.replace(narrow, train=train, parallel=ParallelConfig(shard="full"))
    runs.append((ranked, tmp_path / "narrow-two", False))
    refused = dataclasses.replace(ranked, parallel=ParallelConfig(expert=2))
    ends = on_ranks(2, train_some, runs, (refused, tmp_path / "refused", False, None))
    assert {end[0] for end in ends} == {"ConfigError", "PeerError"}
    said = next(end[1] for end in ends if end[0] == "ConfigError")
    assert said.startswith("parallel.expert=2: experts of 4 bits are whole on every rank")

    two, alone_ = (tmp_path / name for name in ("narrow-two", "narrow"))
    assert losses(two) == pytest.approx(losses(alone_), abs=1e-5)
    torch.testing.assert_close(logits(two), logits(alone_), rtol=0, atol=1e-3)

    shutil.copytree(tmp_path / "full", tmp_path / "to-one")
    shutil.rmtree(tmp_path / "to-one/checkpoints/step-00000006")
    held = {p.name for p in (tmp_path / "to-one/checkpoints/step-00000004").iterdir()}
    assert any(name.startswith("shard-") for name in held)
    run(alone, tmp_path / "to-one", resume=True)

    expected = load_file(tmp_path / "alone/adapter/adapter.safetensors")
    for name in (*kinds, "to-two", "to-one"):
        out = tmp_path / name
        assert losses(out) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5), name
        found = load_file(out / "adapter/adapter.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4)
        for model in ("model", "model_ema"):
            torch.testing.assert_close(
                logits(out / model), logits(tmp_path / "alone" / model), rtol=0, atol=1e-3
            )
        names = {n for p in (out / "checkpoints").rglob("*.safetensors") for n in load_file(p)}
        assert {n.split("/")[0].rpartition(".")[2] for n in names} == {"lora_A", "lora_B"}


def test_a_bias_of_the_router_stays_and_experts_lie_on_four_ranks(
    tmp_path: Path, recipe: Recipe, text: Path
):
    """Experts over two ranks, and each of them cut over two more; beside a shared one."""
    plain: dict[str, Any] = {
        "model": {"layers": ["mamba", "moe"], "d_model": 16, "d_state": 4, "n_experts": 4,
                  "d_expert": 16, "d_shared_expert": 8, "linear_bias": True, "router": "sigmoid",
                  "experts_per_token": 2, "selection_bias": True, "selection_bias_rate": 0.1},
        "data": {"text": [str(text)], "vocab_size": 300, "validation_fraction": 0.1},
        "train": {"steps": 3, "batch_size": 4, "seq_len": 16, "lr": 1e-2, "device": "cpu"},
    }  # fmt: skip
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain))
    run(load_recipe(tmp_path / "plain.yaml"), tmp_path / "source")
    alone = load_recipe(recipe(tmp_path / "source"), ["train.accumulate=4"])
    run(alone, tmp_path / "alone")
    name = "layers.1.feed_forward.router.selection_bias"
    bias = blackmamba.load(tmp_path / "source").get_buffer(name)
    assert bias.abs().max() > 0.05
    assert torch.equal(blackmamba.load(tmp_path / "alone").get_buffer(name), bias)
    merged = logits(tmp_path / "source", adapter=tmp_path / "alone")
    torch.testing.assert_close(merged, logits(tmp_path / "alone"), rtol=0, atol=1e-5)

    kinds: dict[str, dict[str, Any]] = {
        "experts": {"expert": 2},
        "full": {"shard": "full", "expert": 2},
        "hybrid": {"shard": "hybrid", "shard_degree": 2, "expert": 2},
    }
    train = dataclasses.replace(alone.train, accumulate=1)
    runs = [
        (dataclasses.replace(alone, train=train, parallel=ParallelConfig(**kind)),
         tmp_path / name, False)
        for name, kind in kinds.items()
    ]  # fmt: skip
    on_ranks(4, train_all, runs)
    for begun in ("alone", "full"):
        again = tmp_path / f"{begun}-again"
        shutil.copytree(tmp_path / begun, again)
        shutil.rmtree(again / "checkpoints/step-00000004")
        run(alone, again, resume=True)
    expected = load_file(tmp_path / "alone/adapter/adapter.safetensors")
    for name in (*kinds, "alone-again", "full-again"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5), name
        found = load_file(tmp_path / name / "adapter/adapter.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_experts_stay_and_pass_gradients_on(
    tmp_path: Path, recipe: Recipe, source: Path, bits: Any
):
    whole = blackmamba.load(source)
    small = blackmamba.quantize(whole, bits, group_size=32)
    for folder, model in (("small", small), ("all", blackmamba.quantize(whole, 8, what="all"))):
        blackmamba.save(model, tmp_path / folder, tokenizer=load_tokenizer(source))
    with pytest.raises(ConfigError, match="what='all' is quantised, and adapters are of matrices"):
        load_recipe(recipe(tmp_path / "all"))
    out = tmp_path / "run"
    run(load_recipe(recipe(tmp_path / "small")), out)
    names = load_file(out / "adapter/adapter.safetensors")
    assert {name.split(".")[2] for name in names} == {"mixer"}
    tuned = blackmamba.load(out)
    assert tuned.quantization == small.quantization
    for name, buffer in small.named_buffers():
        assert torch.equal(tuned.get_buffer(name), buffer), name
    assert not torch.equal(logits(out), logits(tmp_path / "small"))
    merged = logits(tmp_path / "small", adapter=out)
    torch.testing.assert_close(merged, logits(out), rtol=0, atol=1e-5)
    # A step of the same run with these experts written out is the same step.
    written = blackmamba.load(source)
    for name, module in small.named_modules():
        if isinstance(module, QuantizedStorage):
            written.get_parameter(name).data.copy_(module.whole(torch.float32))
    blackmamba.save(written, tmp_path / "written", tokenizer=load_tokenizer(source))
    mixers = ["in_proj", "x_proj", "out_proj"]  # experts can be adapted now
    run(load_recipe(recipe(tmp_path / "written", targets=mixers)), tmp_path / "same")
    assert losses(out) == pytest.approx(losses(tmp_path / "same"), abs=1e-5)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def test_convert_merges(tmp_path: Path, trained: Path, source: Path):
    out = tmp_path / "merged"
    assert main(["convert", str(source), str(out), "--adapter", str(trained)]) == 0
    torch.testing.assert_close(logits(out), logits(trained), rtol=0, atol=1e-5)
    assert (out / "tokenizer.json").exists()
    released = tmp_path / "released"
    arguments = ["convert", str(source), str(released), "--to", "released"]
    assert main([*arguments, "--adapter", str(trained)]) == 0
    assert torch.equal(logits(released), logits(out))


def test_generate_takes_an_adapter(trained: Path, source: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--prompt", "the cat", "--temperature", "0", "--max-new-tokens", "20", "--no-stats"]
    assert main(["generate", str(source), *options, "--adapter", str(trained)]) == 0
    with_adapter = capsys.readouterr().out
    assert main(["generate", str(trained), *options]) == 0
    assert capsys.readouterr().out == with_adapter


def test_fingerprints_are_of_weights(tmp_path: Path, source: Path):
    """The same in every format, and of nothing else."""
    blackmamba.checkpoint.convert(source, tmp_path / "released", to="released")
    known = fingerprint(source / "model")
    assert fingerprint(tmp_path / "released") == known
    model = blackmamba.load(source)
    blackmamba.save(model, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == known
    with torch.no_grad():
        model.layers[0].mixer.D[3] += 1e-3  # pyright: ignore
    blackmamba.save(model, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") != known


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, trained: Path, source: Path):
    model = blackmamba.load(source)
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1
    blackmamba.save(model, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"an adapter of .*source.*, not of .*other"):
        blackmamba.load(tmp_path / "other", adapter=trained)
    blackmamba.save(blackmamba.quantize(model, group_size=32), tmp_path / "int8")
    with pytest.raises(ConfigError, match=r"quantised, and an adapter is added to whole weights"):
        blackmamba.load(tmp_path / "int8", adapter=trained)


def test_damaged_adapters(tmp_path: Path, trained: Path, source: Path):
    with pytest.raises(CheckpointError, match=r"adapter.json: no readable adapter"):
        blackmamba.load(source, adapter=tmp_path)
    folder = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", folder)
    tensors = load_file(folder / "adapter.safetensors")
    first = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != first}, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=f"does not fit its adapter.json.*{first}"):
        blackmamba.load(source, adapter=folder)
    (folder / "adapter.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match=r"adapter.safetensors: missing or damaged"):
        blackmamba.load(source, adapter=folder)
    plain = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(plain | {"format_version": 2}))
    with pytest.raises(CheckpointError, match=r"must be of format blackmamba-adapter, version 1"):
        blackmamba.load(source, adapter=folder)
    (folder / "adapter.json").write_text(json.dumps(plain | {"lora": {"rnak": 1}}))
    with pytest.raises(ConfigError, match=r"lora.rnak.*did you mean 'rank'"):
        blackmamba.load(source, adapter=folder)


def test_settings_that_contradict(recipe: Recipe):
    with pytest.raises(ConfigError, match=r"lora.rank=2: adapters are of a trained model"):
        load_recipe("tiny", ["lora.rank=2"])
    with pytest.raises(ConfigError, match=r"train.freeze=\['embedding'\]: with lora.rank=2"):
        load_recipe(recipe(), ["train.freeze=[embedding]"])


def test_an_adapter_brings_its_chat_template(
    tmp_path: Path, recipe: Recipe, source: Path, capsys: pytest.CaptureFixture[str]
):
    """The base was never trained on conversations; with the adapter it takes part in one."""
    lines = [{"prompt": f"the cat {i}", "response": "a dog"} for i in range(9)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = [f"data.text=[{tmp_path / 'chat.jsonl'}]", "train.chat=true", "train.steps=1"]
    run(load_recipe(recipe(), [*changes, "train.seq_len=64"]), tmp_path / "run")
    chat = ["--chat", "the cat", "--temperature", "0", "--max-new-tokens", "3"]
    assert main(["generate", str(source), *chat]) == 2
    assert main(["generate", str(source), *chat, "--adapter", str(tmp_path / "run")]) == 0
    merged = str(tmp_path / "merged")
    assert main(["convert", str(source), merged, "--adapter", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["generate", merged, *chat]) == 0
