"""Files that are unusual, damaged or meant to harm, and disks that fill up."""

import dataclasses
import json
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lone import error_on_full_disk, peak_of_loading, sum_of_copied
from many_ranks import alone

from blackmamba.checkpoint import convert, load, load_config, load_tokenizer, native, save
from blackmamba.checkpoint.released import read_config
from blackmamba.data import Tokenizer
from blackmamba.errors import BlackMambaError, CheckpointError
from blackmamba.model import BlackMamba
from blackmamba.presets import presets

SOURCE = Path(__file__).parent.parent / "fixtures" / "released-dev"
PLAIN = json.loads((SOURCE / "config.json").read_text())
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def copy_of_released(
    folder: Path, change: Callable[[dict[str, Any]], None], config: dict[str, Any] = PLAIN
) -> Path:
    """The released fixture with some of its tensors changed in place by `change`."""
    folder.mkdir()
    tensors = torch.load(SOURCE / "pytorch_model.bin", weights_only=True)["model"]
    change(tensors)
    torch.save({"model": tensors}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_expanded_tensor_is_copied_and_no_other_memory_is_dropped(tmp_path: Path):
    """It claims 16 MB of a storage of four bytes: what lies behind the mapped file must stay."""
    torch.save({"wide": torch.ones(1).expand(2048, 2048)}, tmp_path / "pytorch_model.bin")
    assert alone(sum_of_copied, tmp_path / "pytorch_model.bin", "wide", (2048, 2048)) == 2048**2


def test_a_transposed_tensor_is_copied(tmp_path: Path):
    def transpose(t: dict[str, Any]) -> None:
        t[EMBEDDING] = t[EMBEDDING].t().contiguous().t()

    loaded = load(copy_of_released(tmp_path / "odd", transpose))
    assert torch.equal(loaded.embedding.weight, load(SOURCE).embedding.weight)


@pytest.mark.parametrize("to", ["native", "released"])
def test_a_full_disk_leaves_the_old_files(to: str, tmp_path: Path):
    """A limit on the size of a file fails a write as a full disk does."""
    pytest.importorskip("resource", reason="needs limits on a process")
    convert(SOURCE, tmp_path / to, to=to)  # pyright: ignore[reportArgumentType]
    before = {path.name: path.read_bytes() for path in (tmp_path / to).iterdir()}
    said = alone(error_on_full_disk, 100_000, partial(convert, SOURCE, tmp_path / to, to=to))
    assert "cannot be written" in said
    assert "File too large" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / to).iterdir()} == before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_stored_copy_of_the_embedding_takes_no_memory(tmp_path: Path):
    config = dataclasses.replace(presets["mamba-tiny"], d_model=256, vocab_size=40_000)
    torch.manual_seed(0)
    save(BlackMamba(config), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="released")
    file = tmp_path / "theirs" / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)["model"]
    torch.save({"model": tensors | {HEAD: tensors[EMBEDDING].clone()}}, file)
    assert alone(peak_of_loading, SOURCE, tmp_path / "theirs", {}) < 1.15
    assert load(tmp_path / "theirs").config.tie_embeddings


def test_an_output_layer_of_another_shape_is_an_error(tmp_path: Path):
    def add(t: dict[str, Any]) -> None:
        t[HEAD] = torch.zeros(5, 7)

    with pytest.raises(CheckpointError, match=r"wrong shape: output_layer\.weight \(5, 7\)"):
        load(copy_of_released(tmp_path / "odd", add))


def test_conversion_of_mixed_dtypes_keeps_every_weight(tmp_path: Path):
    def narrow(t: dict[str, Any]) -> None:
        t[EMBEDDING] = t[EMBEDDING].bfloat16()

    source = copy_of_released(tmp_path / "mixed", narrow)
    convert(source, tmp_path / "ours")
    ours, theirs = load(tmp_path / "ours").state_dict(), load(source).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_there_and_back_keeps_what_only_one_format_has_a_place_for(tmp_path: Path):
    config = PLAIN | {"max_sequence_length": 4096}
    convert(copy_of_released(tmp_path / "a", lambda _: None, config), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "b", to="released")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["max_sequence_length"] == 4096

    padded = dataclasses.replace(presets["tiny"], unused_vocab=9)
    save(BlackMamba(padded), tmp_path / "padded")
    convert(tmp_path / "padded", tmp_path / "c", to="released")
    assert load_config(tmp_path / "c").unused_vocab == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mamba_moe_layers": "r8r4r8r4"}, "mamba_moe_layers='r8r4r8r4': must be a list"),
        ({"mamba_moe_layers": 5}, "mamba_moe_layers=5: must be a list"),
        ({"swiglu": "false", "add_bias_linear": 1}, "add_bias_linear=1, swiglu='false': must be"),
        ({"unused_vocab": "9"}, "unused_vocab='9': must be a whole number"),
    ],
)
def test_released_values_of_a_wrong_kind(change: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        read_config(PLAIN | change, "config.json")


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (torch.ones(144, dtype=torch.int64), r"wrong dtype: decoder\.layers\.0\.mixer\.D torch"),
        (torch.ones(144, dtype=torch.complex64), r"wrong dtype: .*torch\.complex64"),
        (torch.ones(144).to_sparse(), r"not dense tensors with data: decoder\.layers\.0\.mixer\.D"),
        (torch.ones(144, device="meta"), "not dense tensors with data"),
    ],
    ids=["int64", "complex", "sparse", "meta"],
)
def test_tensors_that_are_no_weights(odd: torch.Tensor, message: str, tmp_path: Path):
    def put(t: dict[str, Any]) -> None:
        t["decoder.layers.0.mixer.D"] = odd

    with pytest.raises(CheckpointError, match=message):
        load(copy_of_released(tmp_path / "odd", put))


class Exploit:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_bare_pickle_is_named_and_not_run(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    folder = copy_of_released(tmp_path / "evil", lambda _: None)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model": Exploit()}, protocol))
    with pytest.raises(CheckpointError, match="holds code or objects other than tensors; nothing"):
        load(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [b"garbage " * 100, b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n"],
    ids=["garbage", "web page", "git-lfs pointer"],
)
def test_what_is_no_checkpoint_is_not_accused_of_code(content: bytes, tmp_path: Path):
    folder = copy_of_released(tmp_path / "odd", lambda _: None)
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged, or not written by torch\.save"):
        load(folder)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_changed_bytes_never_raise_anything_else(kind: str, tmp_path: Path):
    """What still loads is a model; all else is one line."""
    folder = copy_of_released(tmp_path / "odd", lambda _: None)
    path = folder / "pytorch_model.bin"
    if kind == "legacy":
        tensors = torch.load(path, weights_only=True)
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    if kind == "safetensors":
        convert(folder, tmp_path / "ours")
        folder, path = tmp_path / "ours", tmp_path / "ours" / "model.safetensors"
    whole, start, stop = path.read_bytes(), 0, 20_000
    if kind == "zip":
        with zipfile.ZipFile(path) as file:
            entry = next(e for e in file.infolist() if e.filename.endswith("data.pkl"))
            start, stop = entry.header_offset, entry.header_offset + entry.file_size + 200
    rng, messages = random.Random(0), list[str]()
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(start, stop)] = rng.randrange(256)
        path.write_bytes(content)
        try:
            load(folder)
        except BlackMambaError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert not any("\n" in message for message in messages)


def test_a_stop_between_the_renames_never_pairs_weights_with_another_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old, new = (Tokenizer.train([text], 260) for text in ("some words", "other, longer words"))
    model = BlackMamba(presets["tiny"])
    save(model, tmp_path, tokenizer=old)
    replace = os.replace

    def stop_at_the_tokenizer(source: Path, target: Path) -> None:
        if target.name == "tokenizer.json":
            raise OSError("stopped")
        replace(source, target)

    monkeypatch.setattr(native.os, "replace", stop_at_the_tokenizer)
    with pytest.raises(CheckpointError, match="stopped"):
        save(model, tmp_path, tokenizer=new)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path)
    monkeypatch.undo()
    save(model, tmp_path, tokenizer=new)
    back = load_tokenizer(tmp_path)
    assert back is not None
    assert back.to_json() == new.to_json()


def test_a_hub_name_without_the_hub_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'blackmamba\[hub\]'"):
        load("Somebody/Nothing")
