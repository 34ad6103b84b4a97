"""Multiple-choice questions: contexts read once against a full pass for every answer.

Contexts, answers and weights are random; both ways read with the same limit of tokens at once.
Prints the largest difference of a log-likelihood and how many times as long the full passes take, a
line for each length of context; the last line is JSON.

    python benchmarks/evaluation.py [--preset demo] [--questions 500] [--contexts 128 512 1024]
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from blackmamba.evaluate import continuation_likelihoods
from blackmamba.model import BlackMamba
from blackmamba.presets import presets
from blackmamba.train.origin import origin

BATCH_TOKENS = 4096
ANSWERS = 4


def main(
    preset: str = "demo",
    n_questions: int = 500,
    contexts: Sequence[int] = (128, 512, 1024),
    repeats: int = 1,
    tiny: bool = False,
    seed: int = 0,
) -> None:
    """Print a line for each length of context, with medians over the repeats."""
    if tiny:
        preset, n_questions, contexts = "tiny", 3, (20,)
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = BlackMamba(presets[preset]).eval().to(device)
    rows = []
    for longest in contexts:
        pairs = _questions(n_questions, longest, model.config.n_tokens, seed)
        warm = pairs[: 4 * ANSWERS]
        continuation_likelihoods(model, warm, batch_tokens=BATCH_TOKENS)
        _full_passes(model, warm)
        times: list[tuple[float, float]] = []
        ours: list[float] = []
        naive: list[float] = []
        for _ in range(repeats):
            began = time.perf_counter()
            scores = continuation_likelihoods(model, pairs, batch_tokens=BATCH_TOKENS)
            middle = time.perf_counter()
            naive = _full_passes(model, pairs)
            times.append((middle - began, time.perf_counter() - middle))
            ours = [score.nats for score in scores]
        ours_s, full_s = (statistics.median(column) for column in zip(*times, strict=True))
        row = {
            "questions": n_questions,
            "context": longest,
            "largest_difference": max(abs(a - b) for a, b in zip(ours, naive, strict=True)),
            "ours_s": ours_s,
            "full_passes_s": full_s,
            "ratio": full_s / ours_s,
        }
        rows.append(row)
        print(
            f"{n_questions} questions, contexts of {longest // 2} .. {longest}, {ANSWERS} answers: "
            f"{ours_s:.2f} s against {full_s:.2f} s, {full_s / ours_s:.2f} times; "
            f"largest difference {row['largest_difference']:.1e} nats"
        )
    machine = {"device": device.type, "torch": torch.__version__, **origin()}
    found = {"benchmark": "evaluation", "tiny": tiny, "preset": preset, **machine, "rows": rows}
    print(json.dumps(found))


def _questions(
    number: int, longest: int, vocabulary: int, seed: int
) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(rng.randint(least, most))]

    return [
        (context, ids(2, 16))
        for context in [ids(longest // 2, longest) for _ in range(number)]
        for _ in range(ANSWERS)
    ]


@torch.inference_mode()
def _full_passes(model: BlackMamba, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """As most adapters do it: each answer behind its context, longest first, right-padded."""
    device = model.embedding.weight.device
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    nats = [0.0] * len(pairs)
    while order:
        length = len(pairs[order[0]][0]) + len(pairs[order[0]][1])
        batch = order[: max(1, BATCH_TOKENS // length)]
        order = order[len(batch) :]
        rows = [torch.tensor([*pairs[i][0], *pairs[i][1]]) for i in batch]
        logits = model(pad_sequence([row[:-1] for row in rows], batch_first=True).to(device))
        for row, (i, ids) in enumerate(zip(batch, rows, strict=True)):
            context, answer = pairs[i]
            part = logits[row, len(context) - 1 : len(ids) - 1].float().log_softmax(-1)
            chosen = torch.tensor(answer, device=device)[:, None]
            nats[i] = part.gather(1, chosen).double().sum().item()
    return nats


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 512, 1024])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script")
    args = parser.parse_args()
    main(args.preset, args.questions, args.contexts, args.repeats, args.tiny)
