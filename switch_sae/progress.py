"""What a person sees while training runs."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from switch_sae.training import StepResult


class Progress:
    """A bar with loss, FVU, dead latents, tokens/s and time left; where no terminal is attached, one line per 5 % of the run."""

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

    def update(self, step: int, result: StepResult) -> None:
        """Shows step `step`; only reads."""
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            if now - self._shown > 0.5 or step == self.total_steps:
                self._shown = now
                self.bar.set_postfix_str(self._text(step, result, now))
        elif step % self._every == 0 or step == self.total_steps:
            left = (self.total_steps - step) * (now - self.began) / max(1, step - self.start)
            print(f"step {step:>6}/{self.total_steps}  {self._text(step, result, now)}  {left:.0f} s left", flush=True)

    def _text(self, step: int, result: StepResult, now: float) -> str:
        loss = sum(term.item() for term in result.terms.values())
        rate = (step - self.start) * self.batch_size / (now - self.began)
        return f"loss {loss:.2f}  FVU {result.fvu():.3f}  dead {result.dead_share():.1%}  {rate / 1000:.1f}k tokens/s"
