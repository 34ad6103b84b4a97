"""Every operation's implementations against each other on this machine's CPU.

One row a case, one column an implementation: the median, and how many times the fastest choice's
("auto" takes the first column that has a number) it is. Where a plain PyTorch call does the same,
it is the last column. The rows of the scan also tell how near the first one is to what the
arithmetic allows.

    python benchmarks/cpu_operations.py [--repeats 7] [--only selective_scan causal_conv1d ...]

The scan's arithmetic, in operations for each of its b l d n elements; a multiply-add is two:

    forward   exp(delta A)   13  product with delta (log2 e is folded into A), rounding, remainder,
                                 five multiply-adds of a polynomial; the power of two is free
              h', C h'        5  (delta x) B, a multiply-add with the decay, one with C
    backward  h again        16  as forward, without C h'
              the rest       16  C h' for the gate 2, grad C 2, g = gy C + g' 2, grad B 2, B g 2,
                                 decay g 1, times h 1, grad A 2, grad delta 2

which is 18 forward and 50 with backward. What depends on (b, l, d) alone is left out. The machine's
rate of multiply-adds is taken to be that of its best float32 product, timed in turn.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops import (
    activate,
    causal_conv1d,
    expert_mlp,
    linear,
    linear_cross_entropy,
    quantize_weight,
    quantized_expert_mlp,
    quantized_linear,
    rms_norm,
    selective_scan,
    selective_state_update,
)
from blackmamba.ops.backend import available_backends
from blackmamba.train.memory import keep_freed_memory
from measure import (
    PRODUCT,
    TINY_PRODUCT,
    Call,
    arguments,
    milliseconds,
    print_header,
    print_json,
    print_row,
    product,
    timed,
)

COLUMNS = ("native", "torch", "reference", "plain")
SCAN_FORWARD, SCAN_BACKWARD = 18, 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape.

    Attributes:
        run: the operation's result by a backend, from the tensors that it is given.
        tensors: the arguments that have gradients.
        backward: whether the gradients are computed too.
        plain: the same result by a plain PyTorch call, if there is one.
        without: backends that would take too long.
        least: operations that the result needs, if that is known.
    """

    operation: str
    name: str
    run: Callable[..., Tensor]
    tensors: Sequence[Tensor]
    backward: bool = False
    plain: Callable[..., Tensor] | None = None
    without: tuple[str, ...] = ()
    least: float = 0.0


OPERATIONS = (
    "selective_scan", "causal_conv1d", "selective_state_update", "rms_norm", "activate",
    "linear", "expert_mlp", "linear_cross_entropy", "quantized_linear", "quantized_expert_mlp",
)  # fmt: skip


def main(repeats: int = 7, tiny: bool = False, only: Sequence[str] = OPERATIONS) -> None:
    """Time every case of the operations that `only` names, its implementations in turn."""
    print_header("Operations on the CPU")
    keep_freed_memory(torch.device("cpu"))  # as training does
    limit = product(torch.float32, TINY_PRODUCT if tiny else PRODUCT)
    print_row("case", *COLUMNS, "of the limit", width=19)
    rows: list[dict[str, object]] = []
    for case in cases(tiny):
        if case.operation not in only:
            continue
        contenders = calls(case)
        if case.least:
            contenders["limit"] = limit.call
        times = timed(contenders, repeats)
        medians = {name: statistics.median(t) for name, t in times.items()}
        first = next(iter(medians))
        row: dict[str, object] = {
            "operation": case.operation,
            "case": case.name,
            "ms": {name: milliseconds(t) for name, t in times.items() if name != "limit"},
            "ratio": {n: round(s / medians[first], 3) for n, s in medians.items() if n != "limit"},
        }
        share = ""
        if case.least:
            rate = limit.rate(times["limit"])
            row["limit_ms"] = round(1e3 * case.least / rate, 3)
            row["limit_GFLOP_s"] = round(rate / 1e9, 1)
            share = f"{case.least / rate / medians[first]:.1%} of {1e3 * case.least / rate:.2f} ms"
        cells = [_cell(medians.get(column), medians[first]) for column in COLUMNS]
        print_row(f"{case.operation}: {case.name}", *cells, share, width=19)
        rows.append(row)
    print_json("cpu_operations", repeats=repeats, tiny=tiny, limit_by=limit.how, rows=rows)


def calls(case: Case) -> dict[str, Call]:
    """A call for each implementation that this machine has, in the order of the columns."""
    names = [
        name for name in available_backends(case.operation) if name not in case.without
    ]  # fastest first
    found = {name: _call(case, lambda *t, name=name: case.run(name, *t)) for name in names}
    if case.plain is not None:
        found["plain"] = _call(case, case.plain)
    return found


def _call(case: Case, run: Callable[..., Tensor]) -> Call:
    if not case.backward:

        def forward() -> None:
            with torch.inference_mode():
                run(*case.tensors)

        return forward
    with torch.no_grad():
        grad = torch.ones_like(run(*case.tensors))

    def both() -> None:
        leaves = [t.detach().requires_grad_() for t in case.tensors]
        run(*leaves).backward(grad)

    return both


def _cell(seconds: float | None, first: float) -> str:
    if seconds is None:
        return "-"
    ratio = "" if seconds == first else f" x{seconds / first:.2f}"
    return f"{seconds * 1e3:.2f} ms{ratio}"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- cases ----------------------------------------------------------------------------------


def cases(tiny: bool) -> Iterator[Case]:
    """All of them; float32 unless their names say otherwise."""
    yield from scan_cases(tiny)
    yield from conv_cases(tiny)
    yield from row_cases(tiny)
    yield from expert_cases(tiny)
    yield from head_cases(tiny)
    yield from quantized_cases(tiny)


def scan_cases(tiny: bool) -> Iterator[Case]:
    """As the model calls it: with the gate, the skip weights, and softplus of dt and its bias."""
    sizes = [(8, 256, 512, 16), (1, 2048, 512, 16), (4, 1024, 1536, 16)]
    for b, l, d, n in [(2, 8, 16, 4)] if tiny else sizes:
        tensors = [
            normal(b, l, d),
            normal(b, l, d, seed=1),
            -torch.exp(normal(d, n)),
            normal(b, l, n),
            normal(b, l, n, seed=1),
            normal(d),
            normal(b, l, d, seed=2),
            normal(d) - 3,
        ]

        def run(backend: str, *t: Tensor) -> Tensor:
            return selective_scan(*t[:7], dt_bias=t[7], dt_softplus=True, backend=backend)[0]  # pyright: ignore

        elements, size = b * l * d * n, f"b {b}, l {l}, d {d}, n {n}"
        for backward, name, work in (
            (False, size, SCAN_FORWARD),
            (True, f"{size}, + backward", SCAN_FORWARD + SCAN_BACKWARD),
        ):
            slow = backward and elements > 1e8
            yield Case(
                operation="selective_scan", name=name, run=run, tensors=tensors, backward=backward,
                without=("reference",) if slow else (), least=work * elements,
            )  # fmt: skip


def conv_cases(tiny: bool) -> Iterator[Case]:
    """torch's depthwise conv1d needs time last: its column has the transposes that this takes."""
    for b, l, d in [(2, 8, 16)] if tiny else [(8, 256, 512), (4, 512, 1536)]:
        tensors = [normal(b, l, d), normal(d, 4), normal(d)]

        def run(backend: str, *t: Tensor) -> Tensor:
            return causal_conv1d(*t, backend=backend)[0]  # pyright: ignore

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            l, d = x.shape[1:]
            y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=d)
            return F.silu(y[..., :l].transpose(1, 2))

        for backward in (False, True):
            yield Case(
                operation="causal_conv1d",
                name=f"{b} x {l} x {d}" + ", + backward" * backward,
                run=run, tensors=tensors, backward=backward, plain=plain,
            )  # fmt: skip


def row_cases(tiny: bool) -> Iterator[Case]:
    """Norm, activation, product, and the recurrence's step for one token."""
    t, m, f = (4, 16, 32) if tiny else (2048, 768, 2048)

    def norm(backend: str, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, backend=backend)  # pyright: ignore

    def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    def act(backend: str, h: Tensor) -> Tensor:
        return activate(h, backend=backend)  # pyright: ignore

    def matrix(backend: str, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, backend=backend)  # pyright: ignore

    kinds = [
        ("rms_norm", f"{t} x {m}", norm, plain_norm, [normal(t, m), normal(m)]),
        ("activate", f"gated silu, {t} x 2 x {f}", act, None, [normal(t, 2 * f)]),
        ("linear", f"{t} x {m} x {4 * m}", matrix, F.linear, [normal(t, m), normal(4 * m, m)]),
    ]
    for (operation, name, run, plain, tensors), backward in itertools.product(kinds, (False, True)):
        yield Case(
            operation=operation, name=name + ", + backward" * backward, run=run, plain=plain,
            tensors=tensors, backward=backward,
        )  # fmt: skip
    for b in (1, 16):
        d, n = (16, 4) if tiny else (2304, 16)
        tensors = [normal(b, d, n), normal(b, d), normal(b, d), -torch.exp(normal(d, n)),
                   normal(b, n), normal(b, n), normal(d), normal(b, d)]  # fmt: skip

        def step(backend: str, *t: Tensor) -> Tensor:
            return selective_state_update(*t, dt_softplus=True, backend=backend)[0]  # pyright: ignore

        yield Case(
            operation="selective_state_update", name=f"b {b}, d {d}, n {n}", run=step,
            tensors=tensors,
        )  # fmt: skip


def expert_cases(tiny: bool) -> Iterator[Case]:
    """A few tokens as in decoding, many as in training; the plain column is a loop over experts."""
    sizes = [((8, 256, 512), torch.float32, 2048), ((8, 1152, 3072), torch.bfloat16, 512)]
    for (e, m, f), dtype, many in [((4, 8, 16), torch.float32, 8)] if tiny else sizes:
        weights = [normal(e, 2 * f, m, dtype=dtype) / 16, normal(e, m, f, dtype=dtype) / 16]
        for t, backward in itertools.product((1, 16, many), (False, True)):
            if backward and dtype == torch.bfloat16:  # of the 1.5B model: generation only
                continue
            ids = torch.randint(0, e, (t,), generator=torch.Generator().manual_seed(0))

            def run(backend: str, x: Tensor, fc1: Tensor, fc2: Tensor, ids=ids) -> Tensor:
                return expert_mlp(x, ids, fc1, fc2, backend=backend)  # pyright: ignore

            def loop(x: Tensor, fc1: Tensor, fc2: Tensor, ids=ids) -> Tensor:
                y = torch.zeros_like(x)
                for j in ids.unique().tolist():
                    rows = (ids == j).nonzero()[:, 0]
                    gate, up = F.linear(x[rows], fc1[j]).chunk(2, -1)
                    y = y.index_add(0, rows, F.linear(F.silu(gate) * up, fc2[j]))
                return y

            name = f"{e} x {m} x {f}, {t} tokens, {str(dtype).removeprefix('torch.')}"
            yield Case(
                operation="expert_mlp", name=name + ", + backward" * backward, run=run, plain=loop,
                tensors=[normal(t, m, dtype=dtype), *weights], backward=backward,
                without=("reference",) if t > 16 else (),
            )  # fmt: skip


def head_cases(tiny: bool) -> Iterator[Case]:
    """The loss of the 130M shape's head."""
    t, m, v = (4, 8, 32) if tiny else (512, 768, 50_280)
    labels = torch.randint(0, v, (t,), generator=torch.Generator().manual_seed(0))

    def run(backend: str, x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, backend=backend)  # pyright: ignore

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), labels, reduction="sum")

    yield Case(
        operation="linear_cross_entropy", name=f"{t} x {m} x {v}, + backward", run=run,
        tensors=[normal(t, m), normal(v, m) / 50], backward=True, plain=plain,
    )  # fmt: skip


def quantized_cases(tiny: bool) -> Iterator[Case]:
    """Products with stored bits; the plain column is the same product in bfloat16."""
    e, m, f = (4, 64, 128) if tiny else (8, 1152, 3072)
    matrix = normal(4 * m, m, dtype=torch.bfloat16)
    experts = [normal(e, 2 * f, m, dtype=torch.bfloat16) / 16,
               normal(e, m, f, dtype=torch.bfloat16) / 16]  # fmt: skip
    for bits, group in ((8, 64), (4, 32)):
        small = quantize_weight(matrix, bits, group)
        fc1, fc2 = (quantize_weight(w, bits, group) for w in experts)
        for t in (1, 16):

            def product_(backend: str, x: Tensor, small=small) -> Tensor:
                return quantized_linear(x, small, backend=backend)  # pyright: ignore

            def plain(x: Tensor) -> Tensor:
                return F.linear(x, matrix)

            ids = torch.randint(0, e, (t,), generator=torch.Generator().manual_seed(0))

            def routed(backend: str, x: Tensor, ids=ids, fc1=fc1, fc2=fc2) -> Tensor:
                return quantized_expert_mlp(x, ids, fc1, fc2, backend=backend)  # pyright: ignore

            def plain_routed(x: Tensor, ids=ids) -> Tensor:
                return expert_mlp(x, ids, *experts)

            x = normal(t, m, dtype=torch.bfloat16)
            yield Case(
                operation="quantized_linear", name=f"int{bits}, {t} x {m} x {4 * m}",
                run=product_, tensors=[x], plain=plain,
            )  # fmt: skip
            yield Case(
                operation="quantized_expert_mlp", name=f"int{bits}, {t} tokens, {e} x {m} x {f}",
                run=routed, tensors=[x], plain=plain_routed,
            )  # fmt: skip


if __name__ == "__main__":
    args = arguments(__doc__, OPERATIONS, repeats=7).parse_args()
    main(args.repeats, args.tiny, args.only)
