"""What a person sees while training runs."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tqdm import tqdm

from switch_sae.countdown import PATIENCE, duration
from switch_sae.files import tell
from switch_sae.training import StepResult


class Progress:
    """A bar with loss, FVU, dead latents, tokens/s and time left; where no terminal is attached, one line per 5 % of the run, and the first after
    `PATIENCE` seconds, so that a long run says early how long it will be."""

    def __init__(self, total_steps: int, batch_size: int, start: int = 0) -> None:
        self.total_steps, self.batch_size, self.start = total_steps, batch_size, start
        self.bar = tqdm(total=total_steps, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self.began = self._shown = time.perf_counter()
        self._every = max(1, total_steps // 20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, step: int, results: Sequence[StepResult]) -> None:
        """Shows step `step` of one SAE or of a group; only reads."""
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            if now - self._shown > 0.5 or step == self.total_steps:
                self._shown = now
                self.bar.set_postfix_str(self._text(step, results, now))
        elif step % self._every == 0 or step == self.total_steps or (self._shown == self.began and now - self.began > PATIENCE):
            self._shown = now
            left = duration((self.total_steps - step) * (now - self.began) / max(1, step - self.start))
            tell(f"step {step:>6}/{self.total_steps}  {self._text(step, results, now)}  {left} left")

    def _text(self, step: int, results: Sequence[StepResult], now: float) -> str:
        rate = (step - self.start) * self.batch_size / (now - self.began)
        fvu, dead = [r.fvu() for r in results], [r.dead_share() for r in results]
        if len(results) == 1:
            loss = sum(term.item() for term in results[0].terms.values())
            return f"loss {loss:.2f}  FVU {fvu[0]:.3f}  dead {dead[0]:.1%}  {rate / 1000:.1f}k tokens/s"
        return f"{len(results)} SAEs  FVU {min(fvu):.3f} to {max(fvu):.3f}  dead up to {max(dead):.1%}  {rate / 1000:.1f}k tokens/s"
