"""Every claim of the paper that can be checked at a scale, checked: experiments in, one report out.

What is known of the paper is in docs/paper.md with its sources. Start at `reproduce`.
"""

import dataclasses
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from blackmamba.analyse.architectures import NAMES
from blackmamba.analyse.lab import BETTER, Lab, section
from blackmamba.analyse.parts import ablations, better, experts, ladder, latency, sinkhorn, sizes
from blackmamba.analyse.report import Section, write_report
from blackmamba.analyse.runs import Plan
from blackmamba.analyse.scales import SCALES
from blackmamba.config import nearest
from blackmamba.data import DataConfig, SourceConfig, open_prepared
from blackmamba.errors import ConfigError
from blackmamba.train.origin import origin


@dataclasses.dataclass(frozen=True)
class _Part:
    section: Callable[[Lab], Section]
    plans: Callable[[Lab], list[Plan]] = lambda _: []
    tuned: tuple[str, ...] = ()
    """Networks whose learning rates it needs."""


_PARTS = {
    "sizes": _Part(sizes.sizes),
    "ladder": _Part(ladder.ladder, ladder.plans, NAMES),
    "latency": _Part(latency.latency),
    "experts": _Part(experts.experts, experts.plans, ("blackmamba",)),
    "sinkhorn": _Part(sinkhorn.sinkhorn, sinkhorn.plans, ("blackmamba",)),
    "ablations": _Part(ablations.ablations, ablations.plans, ("blackmamba",)),
    "better": _Part(better.better, better.plans, ("blackmamba", BETTER)),
}
PARTS = tuple(_PARTS)


def reproduce(
    out: str | Path,
    scale: str = "ci",
    *,
    text: Sequence[str] = ("corpus:bible",),
    prepared: Sequence[str] = (),
    only: Sequence[str] = PARTS,
    jobs: int | None = None,
    seconds: float = math.inf,
    command: str = "",
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """Run the experiments and write OUT/report.html; what was trained before is not trained again.

    Args:
        out: folder of everything; made if it is missing.
        scale: one of `SCALES`.
        text: what to train on, see `DataConfig.text`.
        prepared: prepared folders to train on, in the place of `text`, each as often as it has
            tokens; of different names and one tokenizer, which decides the vocabulary. Of several
            the experts are looked at one by one.
        only: some of `PARTS`.
        jobs: training runs at once, each a process, on all GPUs together; None: one a core, or one
            a GPU. Two on each hide starts and checkpoints; more only take turns.
        seconds: cut the training after so many; the same call goes on.
        command: shown in the report.
        tell: is given a line now and then.
    Returns:
        The report.
    Raises:
        ConfigError: no such scale or part, no jobs, or no time.
        DataError: there is no such text or prepared folder.
        OutOfTimeError: the time is over; finished runs and checkpoints of the others are kept.
    """
    if scale not in SCALES:
        raise ConfigError(f"scale={scale!r}: {nearest(scale, SCALES)}")
    for part in only:
        if part not in PARTS:
            raise ConfigError(f"part {part!r}: {nearest(part, PARTS)}")
    if jobs is None:
        jobs = torch.cuda.device_count() or torch.get_num_threads()
    if jobs < 1:
        raise ConfigError(f"jobs={jobs}: must be at least 1")
    if not seconds > 0:
        raise ConfigError(f"seconds={seconds:g}: must be positive")
    size = SCALES[scale]
    if prepared:
        opened = [open_prepared(folder) for folder in prepared]
        data = DataConfig(
            sources=tuple(
                SourceConfig(
                    name=Path(folder).name if len(opened) > 1 else "text",
                    path=str(Path(folder).absolute()),
                    weight=float(found.train.n_tokens),
                )
                for folder, found in zip(prepared, opened, strict=True)
            )
        )
        size = dataclasses.replace(size, vocab_size=opened[0].tokenizer.n_tokens)
    else:
        data = DataConfig(text=tuple(text), vocab_size=size.vocab_size)
    lab = Lab(Path(out), size, data, jobs, tell, seconds)
    chosen = {name: part for name, part in _PARTS.items() if name in only}
    lab.bench.train(lab.trials({name for part in chosen.values() for name in part.tuned}))
    lab.bench.train([plan for part in chosen.values() for plan in part.plans(lab)])
    sections: list[Section] = []
    for name, part in chosen.items():
        tell(f"== {name}")
        sections.append(part.section(lab))
    facts = [
        *_machine(),
        ("scale", scale),
        ("text", ", ".join(prepared or text)),
        ("command", command),
    ]
    return write_report(lab.out, "BlackMamba, reproduced", facts, [*sections, _NOT_HERE])


_NOT_HERE = section(
    "not-here",
    finding="That needs the released weights and the benchmarks' data: `blackmamba eval MODEL "
    "--tasks paper`. The paper's own table is not repeated here: its numbers are known to us "
    "from recollection only.",
)


def _machine() -> list[tuple[str, str]]:
    facts: Mapping[str, str] = {key: str(value) for key, value in origin().items()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        *(("blackmamba " + key, value) for key, value in facts.items()),
        ("python, torch", f"{platform.python_version()}, {torch.__version__}"),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        ("GPU", gpu),
    ]
