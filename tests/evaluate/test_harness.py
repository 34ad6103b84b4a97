"""lm-evaluation-harness: our model in it, its tasks on local data, and `blackmamba eval`."""

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blackmamba.checkpoint import save
from blackmamba.cli.main import main
from blackmamba.data import Tokenizer
from blackmamba.errors import ConfigError, DataError
from blackmamba.evaluate import TASK_LISTS, continuation_likelihoods, evaluate
from blackmamba.evaluate.tasks import known_tasks, local_docs, named_tasks
from blackmamba.generate import generate_text
from blackmamba.model import BlackMamba
from blackmamba.presets import presets

pytest.importorskip("lm_eval", reason="lm_eval is not installed")
# What other packages warn of, in their own code
pytestmark = pytest.mark.filterwarnings("default")

TEXT = "The box is on the table. Question: where is the lamp? Answer: in the hall. " * 20
PIQA = [
    {"goal": "Keep the soup warm.", "sol1": "Put a lid on it.", "sol2": "Put it on ice."},
    {"goal": "Open the box.", "sol1": "Sing to it.", "sol2": "Lift the lid."},
    {"goal": "Light the hall.", "sol1": "Turn on the lamp.", "sol2": "Close the door."},
]
LABELS = [0, 1, 0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT + json.dumps(PIQA)], 400)


@pytest.fixture(scope="module")
def model() -> BlackMamba:
    torch.manual_seed(0)
    return BlackMamba(presets["tiny"]).eval()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    docs = [{**doc, "label": label} for doc, label in zip(PIQA, LABELS, strict=True)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return tmp_path


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def harness(model: BlackMamba, tokenizer: Tokenizer, **options: Any) -> Any:
    from blackmamba.evaluate.harness import BlackMambaLM

    return BlackMambaLM(model, tokenizer, show_progress=False, **options)


def test_accuracy_is_that_of_scoring_by_hand(model: BlackMamba, tokenizer: Tokenizer, data: Path):
    right = 0
    for doc, label in zip(PIQA, LABELS, strict=True):
        context = tokenizer.encode(f"Question: {doc['goal']}\nAnswer:")
        pairs = []
        for answer in (doc["sol1"], doc["sol2"]):
            whole = tokenizer.encode(f"Question: {doc['goal']}\nAnswer: {answer}")
            pairs.append((context, whole[len(context) :]))
        nats = [score.nats for score in continuation_likelihoods(model, pairs)]
        right += nats.index(max(nats)) == label
    scores = {score.metric: score for score in evaluate(model, tokenizer, ["piqa"], data=data)}
    assert scores["acc"].value == pytest.approx(right / 3)
    assert scores["acc"].n_docs == 3
    assert scores["acc"].is_better_higher


def test_limit_and_examples_before_the_question(
    model: BlackMamba, tokenizer: Tokenizer, data: Path
):
    scores = evaluate(model, tokenizer, ["piqa"], data=data, limit=2, few_shot=1)
    assert scores[0].n_docs == 2


def test_files_as_they_are_passed_around(tmp_path: Path, model: BlackMamba, tokenizer: Tokenizer):
    (tmp_path / "piqa_valid.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in PIQA))
    (tmp_path / "piqa_valid-labels.lst").write_text("0\n1\n0\n")
    docs = local_docs("piqa", tmp_path)
    assert docs is not None
    assert [doc["label"] for doc in docs] == LABELS
    hellaswag = {"query": "A box:", "choices": ["is", "was", "has", "had"], "gold": 2}
    (tmp_path / "hellaswag_val_1.jsonl").write_text(json.dumps(hellaswag) + "\n")
    (tmp_path / "lambada_test.jsonl").write_text(json.dumps({"text": "where is the lamp"}) + "\n")
    scores = evaluate(model, tokenizer, ["hellaswag", "lambada_openai"], data=tmp_path)
    assert {score.task for score in scores} == {"hellaswag", "lambada_openai"}
    context = tokenizer.encode("where is the")
    answer = tokenizer.encode("where is the lamp")[len(context) :]
    [expected] = continuation_likelihoods(model, [(context, answer)])
    [found] = [s.value for s in scores if s.metric == "perplexity"]
    assert found == pytest.approx(math.exp(-expected.nats), rel=1e-4)


def test_damaged_and_missing_data(tmp_path: Path, model: BlackMamba, tokenizer: Tokenizer):
    path = tmp_path / "piqa.jsonl"
    path.write_text('{"goal": "x"}\n[1]\n')
    with pytest.raises(DataError, match=r"piqa\.jsonl: line 2 is damaged"):
        local_docs("piqa", tmp_path)
    path.write_text('{"goal": "x"}\n')
    with pytest.raises(DataError, match="task piqa: its local data does not fit"):
        evaluate(model, tokenizer, ["piqa"], data=tmp_path)
    path.write_text("\n")
    with pytest.raises(DataError, match="no line"):
        local_docs("piqa", tmp_path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match="cannot be read"):
        local_docs("piqa", tmp_path)
    path.unlink()
    (tmp_path / "piqa_valid.jsonl").write_text(json.dumps(PIQA[0]) + "\n")
    (tmp_path / "piqa_valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(DataError, match="2 labels for 1 questions"):
        local_docs("piqa", tmp_path)
    assert local_docs("boolq", tmp_path) is None
    with pytest.raises(DataError, match="no such folder of local data"):
        evaluate(model, tokenizer, ["piqa"], data=tmp_path / "absent")


def test_a_data_set_that_cannot_be_had(
    model: BlackMamba, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no way out\nof here")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr("blackmamba.evaluate.hub.answers", lambda: True)
    with pytest.raises(DataError, match=r"task piqa: .* \(no way out\); put piqa\.jsonl into"):
        evaluate(model, tokenizer, ["piqa"])


def test_without_a_network_nothing_is_asked_for_twice(
    tmp_path: Path,
    data: Path,
    model: BlackMamba,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
):
    from huggingface_hub import constants

    asked: list[Any] = []

    def refuse(host: Any, *_: Any, **__: Any) -> None:
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "sets")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    message = r"tasks boolq, copa: the .* hub does not answer, .*; put TASK\.jsonl of each into"
    with pytest.raises(DataError, match=message):
        evaluate(model, tokenizer, ["piqa", "boolq", "copa"], data=data)
    assert asked == ["hub.invalid"]
    assert not constants.HF_HUB_OFFLINE
    evaluate(model, tokenizer, ["piqa"], data=data, limit=1)
    assert asked == ["hub.invalid"]


def test_names():
    assert named_tasks(["piqa", "paper"])[:3] == ["piqa", "hellaswag", "winogrande"]
    assert len(named_tasks(["paper"])) == len(TASK_LISTS["paper"]) == 8
    with pytest.raises(ConfigError, match="no task"):
        named_tasks([])


def test_wrong_arguments(model: BlackMamba, tokenizer: Tokenizer):
    with pytest.raises(ConfigError, match="unknown task 'piqua'"):
        evaluate(model, tokenizer, ["piqua"])
    with pytest.raises(ConfigError, match="limit=0: must be at least 1"):
        evaluate(model, tokenizer, ["piqa"], limit=0)
    with pytest.raises(ConfigError, match="few_shot=-1: must be at least 0"):
        evaluate(model, tokenizer, ["piqa"], few_shot=-1)
    for options, message in (
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"max_length": -1}, "max_length=-1"),
        ({"max_batch_size": 4}, "max_batch_size=4"),
    ):
        with pytest.raises(ConfigError, match=message):
            harness(model, tokenizer, **options)
    with pytest.raises(ConfigError, match="needs its tokenizer as one"):
        harness(model, "gpt2")  # pyright: ignore


def test_whole_texts_with_and_without_a_window(model: BlackMamba, tokenizer: Tokenizer):
    texts = [TEXT[:300], "", TEXT[:5]]
    requests = [request(text) for text in texts]
    free = harness(model, tokenizer).loglikelihood_rolling(requests)
    wide = harness(model, tokenizer, max_length=1000).loglikelihood_rolling(requests)
    assert free == pytest.approx(wide, abs=1e-3)
    assert free[1] == 0
    ids = tokenizer.encode(texts[0])
    windows = [([tokenizer.eot_id], ids[:8])]
    windows += [(ids[i - 1 : i], ids[i : i + 8]) for i in range(8, len(ids) - 8, 8)]
    last = len(ids) - (len(ids) % 8 or 8)
    windows.append((ids[len(ids) - 9 : last], ids[last:]))
    expected = sum(score.nats for score in continuation_likelihoods(model, windows))
    [found] = harness(model, tokenizer, max_length=8).loglikelihood_rolling(requests[:1])
    assert found == pytest.approx(expected, abs=1e-3)


def test_long_contexts_keep_their_end(model: BlackMamba, tokenizer: Tokenizer):
    lm = harness(model, tokenizer, max_length=12, batch_size=2)
    [(nats, _)] = lm.loglikelihood([request(TEXT, " in the hall.")])
    context = tokenizer.encode(TEXT.rstrip())
    answer = tokenizer.encode(TEXT + " in the hall.")[len(context) :]
    [expected] = continuation_likelihoods(model, [(context[-(13 - len(answer)) :], answer)])
    assert nats == pytest.approx(expected.nats, abs=1e-4)
    assert lm.tok_decode(answer).strip() == "in the hall."
    [(empty, _)] = lm.loglikelihood([request("", "lamp")])
    [expected] = continuation_likelihoods(model, [([tokenizer.eot_id], tokenizer.encode("lamp"))])
    assert empty == pytest.approx(expected.nats, abs=1e-4)


def test_generation_stops_where_it_is_told(model: BlackMamba, tokenizer: Tokenizer):
    lm = harness(model, tokenizer, batch_size="auto")
    [whole] = generate_text(model, tokenizer, ["The box"], max_new_tokens=12)
    stop = whole[3:5]
    settings = {"until": [stop, ""], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    sampled = {"until": "zzz", "do_sample": True, "max_gen_toks": 5, "seed": 3, "top_k": 4}
    found = lm.generate_until(
        [
            request("The box", settings),
            request("where", sampled),
            request("The box", {"max_gen_toks": 12}),
        ]
    )
    assert found[0] == whole[: whole.index(stop)]
    assert found[2] == whole
    assert [found[1]] == generate_text(
        model, tokenizer, ["where"], max_new_tokens=5, temperature=1.0, seed=3, top_k=4
    )
    with pytest.raises(ConfigError, match="generation setting 'num_beams'"):
        lm.generate_until([request("The box", {"num_beams": 3})])


def test_on_the_command_line(
    tmp_path: Path,
    data: Path,
    model: BlackMamba,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
):
    folder, out = tmp_path / "model", tmp_path / "scores.json"
    save(model, folder, tokenizer=tokenizer)
    words = ["eval", str(folder), "--tasks", "piqa", "--data", str(data), "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("piqa acc ")
    assert shown[0].endswith("(3 documents)")
    written = json.loads(out.read_text())
    assert written["scores"][0]["task"] == "piqa"
    assert f"{written['scores'][0]['value']:.4f}" in shown[0]


def test_the_harness_s_own_command_line(
    tmp_path: Path,
    model: BlackMamba,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = tmp_path / "model"
    save(model, folder, tokenizer=tokenizer)
    (tmp_path / "docs.jsonl").write_text('{"q": "where is the", "a": " lamp"}\n')
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n"
        f"  data_files: {{test: {tmp_path / 'docs.jsonl'}}}\n  cache_dir: {tmp_path / 'cache'}\n"
        'output_type: loglikelihood\ntest_split: test\ndoc_to_text: "{{q}}"\n'
        'doc_to_target: "{{a}}"\nmetric_list:\n  - metric: acc\n'
    )
    words = f"--model blackmamba --model_args pretrained={folder} --tasks own --include_path"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words.split(), str(tmp_path)])
    monkeypatch.delitem(sys.modules, "blackmamba.evaluate.harness", raising=False)
    from lm_eval.tasks import _index

    index, known = _index.TaskIndex.build, known_tasks("").task_index

    def build(paths: list[Path], **options: Any) -> dict[str, Any]:
        """The harness's own folder, the first, was read for other tests: it takes seconds."""
        assert paths[0] == Path(_index.__file__).parent
        return known | index(paths[1:], **options)

    monkeypatch.setattr(_index.TaskIndex, "build", staticmethod(build))
    runpy.run_module("blackmamba.evaluate.harness", run_name="__main__")
    assert "|own" in capsys.readouterr().out


def test_without_the_harness(
    monkeypatch: pytest.MonkeyPatch, model: BlackMamba, tokenizer: Tokenizer
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'blackmamba\[eval\]'"):
        evaluate(model, tokenizer, ["piqa"])
