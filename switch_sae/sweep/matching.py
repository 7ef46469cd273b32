"""Widths at which two SAEs take the same time per training step, by measuring."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from switch_sae.cohort import build_sae
from switch_sae.config import RunConfig
from switch_sae.rows import Rows
from switch_sae.stream import Stream
from switch_sae.training import Trainer

ROUNDS, STEPS, SEARCHES = 5, 4, 4


def time_matched_width(stream: Stream, member: RunConfig, reference: RunConfig, say: Callable[[str], None]) -> int:
    """num_latents (a multiple of the number of experts) at which a step of `member` takes as long as one of `reference`.

    The time of a step is nearly linear in the width, so a secant search needs few measurements. Both are measured in turn, since the machine's speed
    drifts. What comes out differs a little from one measurement to the next: whoever needs it again must keep it.
    """
    experts, least = member.sae.width_step, member.sae.least_latents
    width, tried = member.sae.num_latents, {}
    for _ in range(SEARCHES):
        tried[width] = _time_ratio(stream, member, width, reference)
        below = [w for w in tried if tried[w] <= 1]
        above = [w for w in tried if tried[w] > 1]
        if below and above:
            low, high = max(below), min(above)
            guess = low + (1 - tried[low]) / (tried[high] - tried[low]) * (high - low)
        else:
            guess = width / tried[width]
        width = max(least, experts * round(guess / experts))
        if width in tried:
            break
    else:
        tried[width] = _time_ratio(stream, member, width, reference)
    best = min(tried, key=lambda w: abs(tried[w] - 1))
    say(f"matched in time: {best} latents over {experts} experts take {tried[best]:.2f} times as long as {reference.sae.num_latents} dense ones")
    return best


def _time_ratio(stream: Stream, member: RunConfig, width: int, reference: RunConfig) -> float:
    """Median over rounds of (time of the member's steps at this width) / (time of the reference's)."""
    trainers = [
        stream.trainer(build_sae(sae, stream.source.d_in, 0), member.trainer, member.total_steps, member.normalize_activations)
        for sae in (replace(member.sae, num_latents=width), reference.sae)
    ]
    rows, size = stream.calibration.to(stream.device), member.batch_size
    batches = itertools.cycle([rows[start : start + size] for start in range(0, len(rows) - size + 1, size)])
    ratios = []
    for _ in range(ROUNDS + 1):
        times = [_seconds(trainer, [next(batches) for _ in range(STEPS)]) for trainer in trainers]
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])  # the first round compiles, allocates and fills caches


def _seconds(trainer: Trainer, batches: list[Rows]) -> float:
    before, started = trainer.seconds, time.perf_counter()
    for batch in batches:
        trainer.step(batch)
    return trainer.seconds - before or time.perf_counter() - started
