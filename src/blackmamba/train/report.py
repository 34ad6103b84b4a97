"""What is left of a run when it is done: the result, and the comparison with xz."""

import dataclasses
import json
import lzma
from pathlib import Path
from typing import Any

from blackmamba.data import Share
from blackmamba.files import write_text
from blackmamba.train.metrics import finite
from blackmamba.train.origin import origin

_XZ_MAX_BYTES = 32 * 2**20  # above it xz takes minutes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended."""

    steps: int
    bad_steps: int
    """Of `steps`, those skipped because loss or gradient was not finite."""
    spikes: int
    """Steps skipped because loss or gradient was an outlier."""
    rollbacks: int
    tokens: int
    """Read in training."""
    seconds: float
    """Spent on training, validation and checkpoints, over all resumes."""
    nats_per_token: float
    """On the whole validation text."""
    bits_per_byte: float
    ema_bits_per_byte: float | None
    """Of the moving average of the weights, if there is one."""
    best_step: int
    """After which the validation was best."""
    best_nats_per_token: float
    xz_bits_per_byte: float | None
    """What `xz -9e` needs for the same text; None if that is too long to try."""
    product_flops_per_s: float
    """Of a large product on this machine: what utilisation (mfu) is a share of."""
    sources: dict[str, Share]
    """What was read of each source of a mixture; empty for one text."""
    model: Path
    """Folder of the trained model."""

    def report(self) -> str:
        """A few lines for people."""
        minutes, seconds = divmod(round(self.seconds), 60)
        reasons = ((self.bad_steps, "skipped: not finite"), (self.spikes, "outliers"),
                   (self.rollbacks, "roll-backs"))  # fmt: skip
        said = ", ".join(f"{n} {what}" for n, what in reasons if n)
        skipped = f" ({said})" if said else ""
        ema = (
            f"\naverage of weights: {self.ema_bits_per_byte:.3f} bits per byte"
            if self.ema_bits_per_byte is not None
            else ""
        )
        xz = f" (xz -9e: {self.xz_bits_per_byte:.3f})" if self.xz_bits_per_byte else ""
        return (
            f"{self.steps} steps{skipped}, {self.tokens:,} tokens in {minutes} min {seconds} s\n"
            f"validation: {self.nats_per_token:.3f} nats per token, "
            f"{self.bits_per_byte:.3f} bits per byte{xz}{ema}\n"
            + "".join(
                f"source {name}: {100 * share.weight:.2f} % of the tokens ({share.tokens:,}), "
                f"{share.epochs:.3f} epochs\n"
                for name, share in self.sources.items()
            )
            + f"model: {self.model}"
        )


def write_summary(result: RunResult, folder: Path) -> None:
    """Write summary.json: the result, and which code it came from."""
    plain: dict[str, Any] = {**dataclasses.asdict(result), "model": result.model.name, **origin()}
    for name, value in plain.items():
        if isinstance(value, float):
            plain[name] = finite(value)
    write_text(folder / "summary.json", json.dumps(plain, indent=2, allow_nan=False) + "\n")


def xz_bits_per_byte(text: Path | None) -> float | None:
    """What `xz -9e` needs for each byte of a file: a bar that a language model should clear.

    Returns:
        None if there is no file, or it has more than 32 MB or nothing in it.
    """
    if text is None or not 0 < text.stat().st_size <= _XZ_MAX_BYTES:
        return None
    content = text.read_bytes()
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)
