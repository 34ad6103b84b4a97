"""One update of the weights: gradients of a batch, their norm, the optimizer.

On a GPU the host waits for nothing here: whether a step is finite is decided where it is computed,
and what the host wants to know of it is on its way while the next one begins.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from blackmamba.model import BlackMamba, Trace, balance_step
from blackmamba.model.balance import Reduce, forget_load
from blackmamba.ops import global_norm
from blackmamba.train.mixed import MixedAdamW
from blackmamba.train.readings import Readings
from blackmamba.train.spikes import SpikeGuard


class StepOutcome:
    """What a step did; asking waits until it is known."""

    def __init__(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        is_taken: Tensor,
        part_norms: Mapping[str, Tensor],
        stop: Tensor | None = None,
    ):
        """Scalars on the device."""
        self._names = list(part_norms)
        parts = {} if not part_norms else {"parts": torch.stack(list(part_norms.values()))}
        known = (loss, grad_norm, is_taken) if stop is None else (loss, grad_norm, is_taken, stop)
        numbers = torch.stack([number.double() for number in known])
        self._readings = Readings({"step": numbers, **parts})

    @property
    def loss(self) -> float:
        """Mean nats per token, before the update: the cross-entropy alone."""
        return self._readings.known()["step"][0]

    @property
    def grad_norm(self) -> float:
        """Of all gradients together, before clipping."""
        return self._readings.known()["step"][1]

    @property
    def is_finite(self) -> bool:
        """Whether loss and norm are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def is_taken(self) -> bool:
        """Whether there was an update."""
        return bool(self._readings.known()["step"][2])

    @property
    def is_spike(self) -> bool:
        """Whether it was left out as an outlier."""
        return self.is_finite and not self.is_taken

    @property
    def stop(self) -> bool:
        """Whether a rank was asked to stop; False where there is one process."""
        return any(self._readings.known()["step"][3:])

    @property
    def part_norms(self) -> dict[str, float]:
        """Of the gradients of each part that was asked for, before clipping."""
        return dict(zip(self._names, self._readings.known().get("parts", ()), strict=True))


def train_step(
    model: BlackMamba,
    optimizer: torch.optim.Optimizer,
    input_ids: Tensor,
    labels: Tensor,
    *,
    lr: float,
    accumulate: int = 1,
    grad_clip: float = 0.0,
    trace: Trace | None = None,
    seq_idx: Tensor | None = None,
    gradients: "GradientsOfBatch | None" = None,
    guard: SpikeGuard | None = None,
    parts: Mapping[str, Sequence[nn.Parameter]] | None = None,
) -> StepOutcome:
    """Update the weights once; leave them and the optimizer alone if something is not finite.

    A group of the optimizer may have an "lr_ratio": its learning rate is so many times `lr`.

    Args:
        model: in training mode.
        optimizer: of its parameters.
        input_ids, labels: (b, l) int64; labels of -100 do not count. Every label weighs the same,
            however many its micro-batch has, which must be one at least.
        lr: learning rate of this step.
        accumulate: micro-batches that b is cut into.
        grad_clip: largest norm of all gradients together; 0: no limit.
        trace: filled by the last micro-batch.
        seq_idx: (b, l), see `BlackMamba.loss`.
        gradients: what computes them; None: `GradientsOfBatch(model)`.
        guard: says which finite steps to leave out too.
        parts: parameters of which the norm of their gradients is wanted, by name of the part.
    """
    compute = gradients or GradientsOfBatch(model)
    loss, found, norm = compute(input_ids, labels, seq_idx, accumulate, trace)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    go = loss.isfinite() & norm.isfinite() if guard is None else guard.is_usual(loss, norm)
    members = {n: [p for p in ps if p in found] for n, ps in (parts or {}).items()}
    norms = compute.norms_of({name: ps for name, ps in members.items() if ps}, found)
    outcome = StepOutcome(loss, norm, go, norms, compute.stop)
    if isinstance(optimizer, MixedAdamW):
        scale = (grad_clip / (norm + 1e-6)).clamp(max=1.0) if grad_clip else 1.0
        optimizer.update(found, gradient_scale=scale, go=go)
    elif outcome.is_taken:
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(list(found), grad_clip, norm)
        optimizer.step()
    balance_step(model, reduce=compute.reduce, go=go)
    return outcome


class GradientsOfBatch:
    """Computes loss, gradients and their norm."""

    stop: Tensor | None = None
    """After a call: whether a rank was asked to stop; None where there is one process."""
    wants_stop = False
    """Whether this process was asked to stop; where there are many, they tell each other."""
    reduce: Reduce | None = None
    """Sums over ranks; None where there is one process."""
    sequence_group: ProcessGroup | None = None
    """Ranks that hold the pieces of the same rows; see `BlackMamba.loss`."""

    def __init__(self, model: BlackMamba):
        self._model = model

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        seq_idx: Tensor | None,
        accumulate: int,
        trace: Trace | None,
    ) -> tuple[Tensor, dict[nn.Parameter, Tensor], Tensor]:
        """Mean cross-entropy, gradient by parameter (also its own, if not narrower), norm."""
        total, found = self._accumulated(input_ids, labels, seq_idx, accumulate, trace)
        return total, found, global_norm(list(found.values()))

    def norms_of(
        self, parts: Mapping[str, Sequence[nn.Parameter]], found: Mapping[nn.Parameter, Tensor]
    ) -> dict[str, Tensor]:
        """The norm of the gradients of each part."""
        return {name: global_norm([found[p] for p in ps]) for name, ps in parts.items()}

    def _accumulated(
        self,
        input_ids: Tensor,
        labels: Tensor,
        seq_idx: Tensor | None,
        accumulate: int,
        trace: Trace | None,
    ) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Loss and gradients of all micro-batches together."""
        model = self._model
        model.zero_grad()
        total = torch.zeros((), device=input_ids.device)
        wide: dict[nn.Parameter, Tensor] = {}
        parts = [
            slice(i * len(input_ids) // accumulate, (i + 1) * len(input_ids) // accumulate)
            for i in range(accumulate)
        ]
        ratios = self._ratios((labels != -100).sum(1), parts)
        for part, ratio in zip(parts, ratios, strict=True):
            self._begin(is_last=part is parts[-1])
            documents = None if seq_idx is None else seq_idx[part]
            losses = model.losses(
                input_ids[part],
                labels[part],
                seq_idx=documents,
                trace=trace,
                sequence_group=self.sequence_group,
            )
            (losses.total / ratio).backward()
            total += losses.cross_entropy.detach() / ratio
            if accumulate > 1:
                self._add_wide(wide)
        own = {p: p.grad for p in model.parameters() if p.grad is not None}
        return total, own | wide

    def _ratios(self, counted: Tensor, parts: Sequence[slice]) -> Sequence[Tensor | float]:
        """What divides each micro-batch's mean loss, for the mean over the labels of all.

        Args:
            counted: (b,), labels of each row that count.
            parts: rows of each micro-batch.
        """
        if len(parts) == 1:
            return [1.0]
        # Equal numbers of labels give `accumulate` itself: no rounding that was not there.
        return [counted.sum() / counted[part].sum() for part in parts]

    def _begin(self, *, is_last: bool) -> None:
        """Before each micro-batch."""

    def _add_wide(self, wide: dict[nn.Parameter, Tensor]) -> None:
        """Move narrow gradients into float32 sums: many small numbers would be lost in 16 bits."""
        for parameter in self._model.parameters():
            gradient = parameter.grad
            if gradient is None or gradient.dtype == torch.float32:
                continue
            if parameter in wide:
                wide[parameter] += gradient
            else:
                wide[parameter] = gradient.float()
            parameter.grad = None


class CapturedGradients(GradientsOfBatch):
    """The same as a CUDA graph: recorded at the first batch, replayed for all of its shape.

    Every result is overwritten by the next call. Its memory is its own, beside what is used outside
    of it.
    """

    def __init__(self, model: BlackMamba):
        super().__init__(model)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        seq_idx: Tensor | None,
        accumulate: int,
        trace: Trace | None,
    ) -> tuple[Tensor, dict[nn.Parameter, Tensor], Tensor]:
        """As the graph recorded it: the same number of micro-batches and the same shapes."""
        inputs = (input_ids, labels, seq_idx)
        if self._graph is None:
            self._record(inputs, accumulate)
        assert self._graph is not None
        assert self._accumulate == accumulate
        for own, given in zip(self._inputs, inputs, strict=True):
            assert (own is None) == (given is None)
            if own is not None and given is not None:
                assert own.shape == given.shape
                own.copy_(given)
        self._graph.replay()
        if trace is not None:
            trace.routing.update(self._trace.routing)
            trace.losses = self._trace.losses
        return self._results

    def _record(self, inputs: Sequence[Tensor | None], accumulate: int) -> None:
        self._inputs = [None if t is None else t.clone() for t in inputs]
        self._accumulate, self._trace = accumulate, Trace()
        input_ids, labels, seq_idx = self._inputs
        assert input_ids is not None
        assert labels is not None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and loaded before the recording
            for _ in range(2):
                super().__call__(input_ids, labels, seq_idx, accumulate, None)
        torch.cuda.current_stream().wait_stream(stream)
        forget_load(self._model)
        self._model.zero_grad()
        torch.cuda.empty_cache()  # what the graph uses is its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._results = super().__call__(input_ids, labels, seq_idx, accumulate, self._trace)
        self._graph = graph
