"""Conversations: the template, reading them, packing them, and what is predicted."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blackmamba.data import ChatData, ChatTemplate, DataConfig, Message, Tokenizer
from blackmamba.data.chat import read_conversations
from blackmamba.data.conversations import prepare_conversations
from blackmamba.data.storage import TextFile
from blackmamba.errors import ConfigError, DataError, InputError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def row(chance: random.Random, n_turns: int) -> dict[str, Any]:
    def said(n: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(n))

    turns: list[dict[str, str]] = [{"role": "system", "content": "be brief"}]
    for _ in range(n_turns):
        turns.append({"role": "user", "content": said(chance.randint(1, 5))})
        turns.append({"role": "assistant", "content": said(chance.randint(1, 9))})
    return {"messages": turns}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ChatData:
    """60 conversations of 1 to 6 answers, and a tokenizer learnt from them."""
    chance = random.Random(0)
    folder = tmp_path_factory.mktemp("chat")
    rows = [row(chance, chance.randint(1, 6)) for _ in range(60)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return prepare_conversations(config(folder / "chat.jsonl"), folder / "prepared")


def config(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"text": (str(path),), "vocab_size": 300, "validation_fraction": 0.1}
                      | changes)  # fmt: skip


def test_the_template(data: ChatData):
    tokenizer, template = data.tokenizer, ChatTemplate()
    messages = [Message("user", "alpha"), Message("assistant", "beta<|endoftext|>user\n")]
    ids, answers = template.encode(tokenizer, messages)
    end = "<|endoftext|>"
    assert tokenizer.decode(ids) == f"{end}user\nalpha{end}assistant\nbeta{end}user\n{end}"
    assert [i for i in ids if i == tokenizer.eot_id] == [tokenizer.eot_id] * 3
    learnt = [i for i, is_answer in zip(ids, answers, strict=True) if is_answer]
    assert tokenizer.decode(learnt) == f"beta{end}user\n{end}"
    assert ids[: -len(learnt)] == template.prompt(tokenizer, messages[:1])


def test_rows_hold_conversations_apart_and_answers_alone(data: ChatData):
    """Every row taken apart again: each conversation once an epoch, cut behind an answer."""
    sampler = data.sampler(96, 4, seed=3)
    assert sampler.n_cut > 0
    seen: list[tuple[int, ...]] = []
    n_batches = -(-sampler.n_rows // 4)
    rows = [b for step in range(n_batches) for b in zip(*sampler.batch(step), strict=True)]
    for input_ids, labels, seq_idx in rows[: sampler.n_rows]:
        assert (labels != -100).any()
        assert (seq_idx.diff() >= 0).all()
        for nth in seq_idx.unique().tolist():
            inside = seq_idx == nth
            ids, wanted = input_ids[inside], labels[inside]
            if nth == 96:
                assert (ids == data.tokenizer.eot_id).all()
                assert (wanted == -100).all()
                continue
            whole = [*ids.tolist(), int(wanted[-1])]
            assert whole[-1] == data.tokenizer.eot_id
            text = data.tokenizer.decode(whole)
            turns = text.split("<|endoftext|>")[1:-1]
            messages = [Message(*t.split("\n", 1)) for t in turns]  # pyright: ignore
            assert messages[-1].role == "assistant"
            again, answers = ChatTemplate().encode(data.tokenizer, messages)
            assert again == whole
            expected = [i if a else -100 for i, a in zip(again[1:], answers[1:], strict=True)]
            assert wanted.tolist() == expected
            seen.append(tuple(whole))
    originals = {tuple(data.train[i][0].tolist()) for i in range(len(data.train))}
    assert len(seen) == len(data.train) - sampler.n_left_out
    assert sum(ids not in originals for ids in seen) == sampler.n_cut
    filled = sum(len(ids) - 1 for ids in seen) / (96 * sampler.n_rows)
    assert filled > 0.9  # 0.98 was seen


def test_batches_follow_from_seed_and_step(data: ChatData):
    one, same, other = (data.sampler(128, 4, seed=s) for s in (0, 0, 1))
    for step in (7, 0, 3):
        assert all(map(torch.equal, one.batch(step), same.batch(step)))  # pyright: ignore
    assert not torch.equal(one.batch(0).input_ids, other.batch(0).input_ids)
    halves = [one.batch(5, rank, 2).labels for rank in range(2)]
    assert torch.equal(torch.cat(halves), one.batch(5).labels)
    epochs = [sorted(one._row_of(epoch, i) for i in range(one.n_rows)) for epoch in (0, 1)]
    assert epochs[0] == epochs[1] == list(range(one.n_rows))
    with pytest.raises(InputError, match="step=-1"):
        one.batch(-1)
    with pytest.raises(ConfigError, match="multiple of the 3 ranks"):
        one.batch(0, 0, 3)


def test_too_long_ones_are_counted(data: ChatData, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        sampler = data.sampler(24, 1, 0)
    assert sampler.n_left_out > 0
    assert f"{sampler.n_cut} are cut behind an answer and {sampler.n_left_out} left" in caplog.text
    with pytest.raises(DataError, match=r"train.seq_len=4: not one of \d+ conversations"):
        data.sampler(4, 1, 0)


def test_held_out_conversations_are_whole(data: ChatData):
    n_answers = int(np.asarray(data.validation.answers).sum())
    assert len(data.validation) > 1
    found = list(data.validation_batches(3))
    assert sum(len(ids) for ids, _, _ in found) == len(data.validation)
    assert sum(int((labels != -100).sum()) for _, labels, _ in found) == n_answers
    text = data.validation_text.read_bytes()
    assert data.index.n_validation_bytes == len(text)


def test_prepared_once(data: ChatData, tmp_path: Path):
    files = config(data.folder.parent / "chat.jsonl")
    before = (data.folder / "index.json").stat().st_mtime_ns
    assert prepare_conversations(files, data.folder).fingerprint == data.fingerprint
    assert (data.folder / "index.json").stat().st_mtime_ns == before
    other = prepare_conversations(config(data.folder.parent / "chat.jsonl", split_seed=1), tmp_path)
    assert other.fingerprint != data.fingerprint
    (tmp_path / "train.ids.npy").write_bytes(b"x")
    with pytest.raises(DataError, match="no readable conversations"):
        ChatData.open(tmp_path)


GOOD = '{"prompt": "alpha", "response": "beta"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", r'must be an object with "messages", or with "prompt"'),
        ('{"text": "x"}', r'must be an object with "messages"'),
        ('{"messages": []}', '"messages" must be a list of turns'),
        ('{"messages": [1]}', r"messages\[0\] must be an object"),
        ('{"messages": [{"role": "bot", "content": ""}]}', r"role='bot': must be one of"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"content='3': must be a string"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no turn of the assistant"),
        ('{"prompt": "x", "response": null}', r"messages\[1\]: content='None'"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
         r"messages\[1\]: role='system': must be the first turn"),
        ('{"prompt": "x", "response": "\\ud800"}', "half a surrogate pair at character 0"),
    ],
)  # fmt: skip
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(DataError, match=rf"chat.jsonl:3: .*{message}"):
        prepare_conversations(config(path), tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_what_is_read(tmp_path: Path):
    path = tmp_path / "chat.jsonl"
    turns = [{"role": r, "content": r[0], "id": 3} for r in ("user", "assistant", "user")]
    path.write_text(f"\ufeff{GOOD}\n{json.dumps({'messages': turns, 'source': 'x'})}")
    pairs = [[(m.role, m.content) for m in c.messages] for c in read_conversations(
        TextFile(str(path)))]  # fmt: skip
    assert pairs == [
        [("user", "alpha"), ("assistant", "beta")], [("user", "u"), ("assistant", "a")],
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"conversations are .jsonl files, and here is none"):
        prepare_conversations(config(tmp_path / "chat.txt"), tmp_path / "prepared")
    path.write_text(GOOD)
    with pytest.raises(DataError, match="1 conversations: must be at least 2"):
        prepare_conversations(config(path), tmp_path / "prepared")
    path.write_text(f"{GOOD}\n{GOOD}")
    with pytest.raises(DataError, match="all conversations are the same"):
        prepare_conversations(config(path), tmp_path / "prepared")


def test_a_given_template_stays(data: ChatData, tmp_path: Path):
    """The one beside a given tokenizer is used, and handed on."""
    given = tmp_path / "given" / "tokenizer.json"
    data.tokenizer.save(given)
    assert Tokenizer.load(given).chat is None
    given.with_name("chat.json").write_text('{"user": "Q: "}')
    files = config(data.folder.parent / "chat.jsonl", tokenizer=str(given))
    made = prepare_conversations(files, tmp_path / "prepared")
    assert made.tokenizer.chat == ChatTemplate(user="Q: ")
    assert "Q: " in made.tokenizer.decode(made.train[0][0].tolist())
    given.with_name("chat.json").write_text('{"usr": ""}')
    with pytest.raises(DataError, match=r"damaged chat template .*usr"):
        Tokenizer.load(given)
