"""Sinkhorn's iteration as one Triton kernel: all programs run at once and wait for each other.

Letters: t tokens, e experts.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e4)


@triton.jit
def _wait_for_all(counter, target):
    """Until all programs have come this far; what they stored before is then seen."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _log_sum_rows(v):
    """ln sum exp over each row."""
    top = tl.max(v, 1)
    return top + tl.log(tl.sum(tl.exp(v - top[:, None]), 1))


@triton.jit
def choice_kernel(
    logits, ids, tops, partial, counter, t, e, scale, tolerance, max_iterations, log_t, log_e,
    PAPER: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ids: where each token's row of the plan is largest.

    Owns every PROGRAMS-th block of BLOCK tokens. Reads the logits once an iteration, out of the L2
    cache, and leaves for each column the largest number and the sum of its exponentials beside
    that; every program adds up all of those, in one order. The row sums of an iteration's plan are
    known in the next, which is when it may turn out to be the last. Bound by waiting: some
    microseconds an iteration.
    """
    p = tl.program_id(0)
    j = tl.arange(0, E)
    inside_e = j < e
    rows = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    n_blocks = tl.cdiv(t, BLOCK)
    steps = 0

    highest = 0.0
    if PAPER:  # the largest logit of all
        top = -float("inf")
        for block in range(p, n_blocks, PROGRAMS):
            i = block * BLOCK + k
            inside = (i < t)[:, None] & inside_e[None, :]
            v = tl.load(logits + i[:, None] * e + j[None, :], inside, other=-float("inf"))
            top = tl.maximum(top, tl.max(tl.max(v, 1), 0))
        tl.store(tops + p, top)
        steps += 1
        _wait_for_all(counter, steps * PROGRAMS)
        every = tl.load(tops + rows, rows < PROGRAMS, other=-float("inf"), cache_modifier=".cg")
        highest = tl.max(every, 0)

    c = tl.where(inside_e, 0.0, -float("inf"))
    # of its own: Triton carries two names of one value through a loop as one
    before = tl.zeros([E], tl.float32)
    iteration = 0
    if not PAPER:
        iteration = 1
    going = True
    while going:
        top_j = tl.full([E], -float("inf"), tl.float32)
        sum_j = tl.zeros([E], tl.float32)
        error = 0.0
        for block in range(p, n_blocks, PROGRAMS):
            i = block * BLOCK + k
            inside = (i < t)[:, None] & inside_e[None, :]
            v = tl.load(logits + i[:, None] * e + j[None, :], inside, other=0.0)
            v = tl.where(inside_e[None, :], v, -float("inf"))
            largest = tl.max(v, 1)
            cost = tl.maximum((v - largest[:, None]) * scale, FLOOR)
            if iteration == 0:  # the paper's start: column sums of the cost as given
                r = tl.maximum((largest - highest) * scale, FLOOR)
            else:
                total = _log_sum_rows(cost + c[None, :])
                r = -log_t - total
                # the row sums of the last iteration's plan
                share = tl.exp(tl.minimum(total - _log_sum_rows(cost + before[None, :]), 80.0))
                error = tl.maximum(error, tl.max(tl.where(i < t, tl.abs(share - 1), 0.0), 0))
            right = tl.where(inside, cost + r[:, None], -float("inf"))
            new = tl.maximum(top_j, tl.max(right, 0))
            safe = tl.where(new == -float("inf"), 0.0, new)
            sum_j = sum_j * tl.exp(top_j - safe) + tl.sum(tl.exp(right - safe[None, :]), 0)
            top_j = new
        side = partial + (steps % 2) * PROGRAMS * (2 * E + 1)
        mine = side + p * (2 * E + 1)
        tl.store(mine + j, top_j)
        tl.store(mine + E + j, sum_j)
        tl.store(mine + 2 * E, error)
        steps += 1
        _wait_for_all(counter, steps * PROGRAMS)

        all_rows = (rows < PROGRAMS)[:, None] & (j >= 0)[None, :]
        at = side + rows[:, None] * (2 * E + 1) + j[None, :]
        tops_j = tl.load(at, all_rows, other=-float("inf"), cache_modifier=".cg")
        sums_j = tl.load(at + E, all_rows, other=0.0, cache_modifier=".cg")
        errors = tl.load(
            side + rows * (2 * E + 1) + 2 * E, rows < PROGRAMS, other=0.0, cache_modifier=".cg"
        )
        column = tl.max(tops_j, 0)
        safe = tl.where(column == -float("inf"), 0.0, column)
        total_j = tl.sum(sums_j * tl.exp(tops_j - safe[None, :]), 0)
        total_j = safe + tl.log(tl.where(inside_e, total_j, 1.0))
        worst = tl.max(errors, 0)
        is_right = (iteration > 1) & (worst < tolerance)
        if is_right:
            going = False  # c is the last iteration's
        else:
            before = c
            offset = tl.where(iteration == 0, 0.0, -log_e)
            c = tl.where(inside_e, offset - total_j, -float("inf"))
            if iteration >= max_iterations:
                going = False
            iteration += 1

    for block in range(p, n_blocks, PROGRAMS):
        i = block * BLOCK + k
        inside = (i < t)[:, None] & inside_e[None, :]
        v = tl.load(logits + i[:, None] * e + j[None, :], inside, other=0.0)
        v = tl.where(inside_e[None, :], v, -float("inf"))
        cost = tl.maximum((v - tl.max(v, 1)[:, None]) * scale, FLOOR)
        chosen = tl.argmax(tl.where(inside_e[None, :], cost + c[None, :], -float("inf")), 1)
        tl.store(ids + i, chosen.to(tl.int64), i < t)
