"""Dense Mamba checkpoints of others, and what becomes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import blackmamba
from blackmamba.checkpoint import load_config
from blackmamba.cli.main import main
from blackmamba.data import Tokenizer
from blackmamba.errors import CheckpointError

SIZES: dict[str, Any] = {"vocab_size": 45, "hidden_size": 24, "state_size": 4,
                         "num_hidden_layers": 2}  # fmt: skip


def ids() -> torch.Tensor:
    return torch.randint(45, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    """Saves a random `MambaForCausalLM` into tmp_path/hf and gives its logits."""
    transformers = pytest.importorskip("transformers")

    def make(shard_size: str = "1GB", **changes: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES | changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # its zeros and ones would hide a wrong place
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
        with torch.no_grad():
            return model(ids()).logits

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"use_bias": True}, {"expand": 3, "conv_kernel": 3},
     {"shard_size": "20KB"}],
    ids=str,
)  # fmt: skip
def test_transformers_models_load_and_upcycle(theirs: Any, tmp_path: Path, changes: dict[str, Any]):
    logits = theirs(**changes)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == ("shard_size" in changes)
    model = blackmamba.load(tmp_path / "hf")
    assert model.config.layers == ("mamba", "mamba")
    torch.testing.assert_close(model(ids()), logits, rtol=0, atol=1e-4)
    out = tmp_path / "upcycled"
    arguments = ["--out", str(out), "--experts", "3", "--d-expert", "16"]
    assert main(["upcycle", str(tmp_path / "hf"), *arguments]) == 0
    upcycled = blackmamba.load(out)
    assert upcycled.config.layers == ("mamba", "moe", "mamba", "moe")
    torch.testing.assert_close(upcycled(ids()), logits, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_original_format_loads(theirs: Any, tmp_path: Path):
    """state-spaces/mamba: other names, a padded vocabulary, a head that is a copy."""
    theirs(vocab_size=48)
    tensors = {
        name.replace("embeddings", "embedding"): tensor
        for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items()
    }
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    folder = tmp_path / "original"
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    config: dict[str, Any] = {
        "d_model": 24, "n_layer": 2, "vocab_size": 45, "ssm_cfg": {"d_state": 4},
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model = blackmamba.load(folder)
    assert (model.config.vocab_size, model.config.unused_vocab) == (48, 3)
    assert model.config.tie_embeddings
    assert torch.equal(model(ids()), blackmamba.load(tmp_path / "hf")(ids()))
    assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    assert torch.equal(model(ids()), blackmamba.load(tmp_path / "ours")(ids()))

    tensors["lm_head.weight"] += 1
    torch.save(tensors, folder / "pytorch_model.bin")
    assert not blackmamba.load(folder).config.tie_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer='Mamba2': this version reads Mamba-1"),
        ({"rms_norm": False, "d_intermediate": 8}, "rms_norm=False, d_intermediate=8"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx=\[1\]"),
        ({"ssm_cfg": {"dt_rank": 5}}, "ssm_cfg.dt_rank=5"),
        ({"ssm_cfg": []}, "this is no error"),
        ({"n_layer": "2"}, "n_layer='2': must be a whole number"),
        ({"model_type": "mamba"}, "missing hidden_size"),
        ({"model_type": "mamba", **SIZES, "hidden_act": "relu"}, "hidden_act='relu'"),
        ({"model_type": "mamba", **SIZES, "use_bias": 1}, "use_bias=1: must be true or false"),
    ],
    ids=str,
)
def test_other_networks_are_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    plain = {"d_model": 24, "n_layer": 2, "vocab_size": 45} | changes
    (tmp_path / "config.json").write_text(json.dumps(plain))
    if message == "this is no error":  # some of their files have an empty list there
        assert load_config(tmp_path).n_layers == 2
        return
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {"a": "../x.safetensors"}}', "[", "[1]"])
def test_a_damaged_index_of_shards(tmp_path: Path, index: str):
    plain = {"model_type": "mamba", **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index.json: damaged index of weight files"):
        blackmamba.load(tmp_path)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = blackmamba.ModelConfig(layers=("mamba",), d_model=16, vocab_size=300)
    dense = tmp_path / "dense"
    blackmamba.save(blackmamba.BlackMamba(config), dense)
    Tokenizer.train(["some words"], 260).save(tmp_path / "tokenizer.json")
    out = ["--out", str(tmp_path / "out")]
    assert main(["upcycle", str(dense), *out, "--experts-from", "mpl:x"]) == 2
    assert main(["upcycle", str(dense), *out, "--experts-from", "mlp:"]) == 2
    assert main(["upcycle", str(dense), "--out", str(dense)]) == 2
    error = capsys.readouterr().err
    assert "--experts-from mpl:x: must be fresh or mlp:PATH" in error
    assert "--experts-from mlp:: must be fresh or mlp:PATH" in error
    assert "holds the model to upcycle" in error
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(["upcycle", str(dense), *out, *tokenizer]) == 0
    assert "1 layers of 8 experts of width 64 (fresh)" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_experts_copied_by_the_command(tmp_path: Path):
    shape: dict[str, Any] = {"d_model": 16, "vocab_size": 300}
    dense = blackmamba.BlackMamba(blackmamba.ModelConfig(layers=("mamba",), **shape))
    donor = blackmamba.BlackMamba(blackmamba.ModelConfig(layers=("mlp",), d_mlp=8, **shape))
    blackmamba.save(dense, tmp_path / "dense")
    blackmamba.save(donor, tmp_path / "donor")
    arguments = ["--experts-from", f"mlp:{tmp_path / 'donor'}", "--noise", "0", "--experts", "2"]
    assert main(["upcycle", str(tmp_path / "dense"), "--out", str(tmp_path / "o"), *arguments]) == 0
    fc1 = load_file(tmp_path / "o" / "model.safetensors")["layers.1.feed_forward.fc1"]
    given = load_file(tmp_path / "donor" / "model.safetensors")["layers.0.feed_forward.fc1.weight"]
    assert torch.equal(fc1[0], given)
    assert torch.equal(fc1[1], given)
