"""Working on a sweep: claim members, train and score them as one group on one stream, until none is left."""

import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from switch_sae.cohort import Cohort, Interrupted, Keeper, Member, Streams
from switch_sae.config import RunConfig
from switch_sae.files import Say, tell
from switch_sae.runs import RunDir
from switch_sae.scoring import linear_controls
from switch_sae.sweep.folder import SweepFolder
from switch_sae.sweep.matching import time_matched_width
from switch_sae.sweep.plan import SweepConfig
from switch_sae.wandb_logger import check_wandb


def run_sweep(config: SweepConfig, say: Say = tell) -> SweepFolder:
    """Plans a new sweep, or finds the one of the same settings in `sweep.folder`, and works on it until every member is finished, failed or in
    another process's hands. Raises Interrupted after a signal, with everything saved."""
    check_wandb(config.wandb)
    with _Streams(say) as streams:
        folder = SweepFolder.create(config, streams)
        say(f"sweep: {len(folder.members)} SAEs in {folder.path}")
        return _work(folder, config.sweep.at_once, streams, say)


def resume_sweep(path: str | Path, at_once: int | None = None, say: Say = tell) -> SweepFolder:
    """Goes on with a sweep: finished members are skipped, interrupted ones go on from their last checkpoints, failed ones are tried again."""
    folder = SweepFolder.open(path)
    finished = sum(map(folder.is_finished, folder.members))
    say(f"sweep: {len(folder.members)} SAEs in {folder.path}, {finished} of them finished")
    check_wandb(next(iter(folder.members.values())).wandb)
    with _Streams(say) as streams:
        return _work(folder, at_once or folder.at_once, streams, say)


class _Streams(Streams):
    """With what a plan must know of the stream (`Measures`)."""

    def d_in(self, member: RunConfig) -> int:
        return self.get(member).source.d_in

    def time_matched(self, member: RunConfig, reference: RunConfig) -> int:
        return time_matched_width(self.get(member), member, reference, self.say)


class _SweepKeeper(Keeper):
    """A member that fails leaves the group and is noted; tables follow every checkpoint; PCA is scored once for all members."""

    with_controls = False

    def __init__(self, folder: SweepFolder) -> None:
        super().__init__(folder.path, "sweep")
        self.folder, self.wandb_group, self.step = folder, folder.path.name, 0

    def began(self, members: Iterable[Member]) -> None:
        for member in members:
            self.folder.forget_failure(member.name)

    def reached(self, step: int) -> None:
        self.step = step

    def saved(self) -> None:
        self.folder.write_tables()

    def failed(self, member: Member, step: int, error: Exception) -> None:
        self.folder.fail(member.name, step, error)


def _work(folder: SweepFolder, at_once: int | None, streams: _Streams, say: Say) -> SweepFolder:
    tried: set[str] = set()
    keeper = _SweepKeeper(folder)
    try:
        while claims := folder.claim(at_once, tried):
            tried |= set(claims)
            try:
                for start, names in _by_start({name: folder.run(name) for name in claims}, say):
                    cohort = Cohort(map(folder.member, names), start, streams, keeper, time.perf_counter())
                    cohort.work()
                    _add_controls(folder, cohort, streams)
            finally:
                for held in claims.values():
                    held.release()
    except KeyboardInterrupt:
        raise Interrupted(folder.path, keeper.step, signal.SIGINT, "sweep") from None
    folder.write_tables()
    return folder


def _add_controls(folder: SweepFolder, cohort: Cohort, streams: _Streams) -> None:
    """PCA, or regression on a source with targets, with as many components as each member has active latents, unless it has been scored."""
    stream, have = streams.get(cohort.config), folder.controls()
    for k in sorted({k for trainer in cohort.trainers.values() if (k := trainer.sae.k)}):
        asked = linear_controls(stream.calibration, k)
        if not have.keys() >= {each.name for each in asked}:
            folder.add_controls(streams.score(cohort.config).group(asked).entries)


def _by_start(runs: Mapping[str, RunDir], say: Say) -> list[tuple[int, list[str]]]:
    """(step, members) groups that can go on together from a checkpoint of that step; 0 begins anew.

    A kill between two members' checkpoints leaves some of them one checkpoint ahead. They have kept the one before, or were at their first, so they
    join the others there; what they had beyond is removed and made again.
    """
    for name, run in runs.items():
        run.remove_part_files()
        for step in reversed(run.checkpoint_steps()):
            try:
                run.checkpoint_at(step)
                break
            except ValueError as error:
                say(f"{name}: {error} It is removed.")
                run.forget_checkpoint(step)
    saved = {name: run.checkpoint_steps() for name, run in runs.items()}
    for name in (name for name in runs if not saved[name] and runs[name].metrics()):
        say(f"{name} has no checkpoint: it starts over, from step 0")
    left = sorted(runs, key=lambda name: saved[name][-1] if saved[name] else 0)
    groups = []
    while left:
        start = saved[left[0]][-1] if saved[left[0]] else 0
        if start:
            names = [name for name in left if start in saved[name]]
        else:  # only those that stood at the same step: others began later, or failed early, and cost nobody's progress
            names = [name for name in left if not saved[name]]
            reached = {name: runs[name].metrics()[-1:] and runs[name].metrics()[-1]["step"] for name in left if len(saved[name]) < 2}
            names += [name for name in reached if saved[name] and reached[name] and all(reached[name] == reached[other] for other in names)]
        for name in names:
            for ahead in (step for step in saved[name] if step > start):
                runs[name].forget_checkpoint(ahead)
        groups.append((start, names))
        left = [name for name in left if name not in names]
    return groups
