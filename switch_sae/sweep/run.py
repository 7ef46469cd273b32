"""Working on a sweep: claim members, train them as one group on one stream, score them, until none is left."""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switch_sae.config import RunConfig, config_to_plain
from switch_sae.memory import available_bytes, group_bytes
from switch_sae.pipeline import Interrupted, Scorer, Stream, build_sae, plan_line, training_facts
from switch_sae.progress import Progress
from switch_sae.runs import Checkpoint, RunDir, RunError, architecture_of
from switch_sae.sweep.folder import SweepFolder
from switch_sae.sweep.matching import time_matched_width
from switch_sae.sweep.plan import SweepConfig
from switch_sae.training import Interruption, StepResult, Trainer, join_checkpoints, split_checkpoint, train
from switch_sae.wandb_logger import WandbLogger

Say = Callable[[str], None]


def run_sweep(config: SweepConfig, say: Say = print) -> SweepFolder:
    """Plans a new sweep, or finds the one of the same settings in `sweep.folder`, and works on it until every member is finished, failed or in
    another process's hands. Raises Interrupted after a signal, with everything saved."""
    with _Streams(say) as streams:

        def time_matched(member: RunConfig, reference: RunConfig) -> int:
            return time_matched_width(streams.get(member), member, reference, say)

        folder = SweepFolder.create(config, time_matched)
        say(f"sweep: {len(folder.members)} SAEs in {folder.path}")
        return _work(folder, config.sweep.at_once, streams, say)


def resume_sweep(path: str | Path, at_once: int | None = None, say: Say = print) -> SweepFolder:
    """Goes on with a sweep: finished members are skipped, interrupted ones go on from their last checkpoints, failed ones are tried again."""
    folder = SweepFolder.open(path)
    finished = sum(map(folder.is_finished, folder.members))
    say(f"sweep: {len(folder.members)} SAEs in {folder.path}, {finished} of them finished")
    with _Streams(say) as streams:
        return _work(folder, at_once or folder.at_once, streams, say)


@dataclass
class _Streams:
    """The stream that is open, kept from one group to the next where they train on the same source."""

    say: Say
    config: RunConfig | None = None
    stream: Stream | None = None
    start: dict[str, Any] = field(default_factory=dict)
    """The source's state after the calibration rows, where training begins."""
    scorer: Scorer | None = None

    def get(self, config: RunConfig) -> Stream:
        if self.stream is None or self.config is None or self.config.source != config.source:
            self.close()
            self.stream, self.config = Stream(config, self.say), config
            self.start = self.stream.source.state_dict()
            self.stream.say_plan(config, self.say)
        return self.stream

    def score(self, config: RunConfig) -> Scorer:
        if self.scorer is None:
            self.scorer = Scorer(config.evaluation, self.get(config).source)
        return self.scorer

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = self.scorer = None

    def __enter__(self) -> "_Streams":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(folder: SweepFolder, at_once: int | None, streams: _Streams, say: Say) -> SweepFolder:
    tried: set[str] = set()
    step = 0

    def reached(now: int) -> None:
        nonlocal step
        step = now

    try:
        while claims := folder.claim(at_once, tried):
            tried |= set(claims)
            try:
                for start, names in _by_start({name: folder.run(name) for name in claims}, say):
                    _Group(folder, names, start, streams, reached, say).work()
            finally:
                for held in claims.values():
                    held.release()
    except KeyboardInterrupt:
        raise Interrupted(folder.path, step, signal.SIGINT, "sweep") from None
    folder.write_tables()
    return folder


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


class _Group:
    """Some members of a sweep, trained together from step `start` to the end of their stream, then scored."""

    def __init__(self, folder: SweepFolder, names: list[str], start: int, streams: _Streams, reached: Callable[[int], None], say: Say) -> None:
        self.folder, self.names, self.start, self.streams, self.reached, self.say = folder, names, start, streams, reached, say
        self.configs = {name: folder.members[name] for name in names}
        self.config = self.configs[names[0]]
        """Of the first member: what concerns the stream is the same for all."""
        self.runs = {name: folder.run(name) for name in names}
        self.alone = {name: architecture_of(config.sae) for name, config in self.configs.items()}
        """What each member is called in its own run folder."""
        self.trainers: dict[str, Trainer] = {}
        self.wandb: dict[str, WandbLogger] = {}
        self.began = time.perf_counter()

    def work(self) -> None:
        """Raises Interrupted after a signal, and whatever stops the whole group: an error of the source, a full disk."""
        stream = self.streams.get(self.config)
        for name in self.names:
            self.folder.forget_failure(name)
        free = available_bytes(stream.device)
        self._build(stream)
        if not self.trainers:
            return
        try:
            resume = None
            if self.start:
                self.say(f"{len(self.trainers)} SAEs go on from step {self.start} of {self.config.total_steps}")
                resume = {name: self.runs[name].checkpoint_at(self.start) for name in self.trainers}
            elif stream.source.state_dict() != self.streams.start:  # going there anew would make the first block of activations once more
                stream.source.load_state_dict(self.streams.start)
            for name, trainer in self.trainers.items():
                self.runs[name].forget_metrics_after(self.start)
                wandb_id = resume[name].state.get("wandb_id") if resume else None
                config = self.configs[name]
                self.wandb[name] = WandbLogger(config.wandb, self.runs[name].path, config_to_plain(config), wandb_id, self.folder.path.name)
                self.say(f"  {name}: {plan_line(trainer, config)}")
            self._say_memory(stream, free)
            self.folder.write_tables()
            self._train(stream, join_checkpoints(resume) if resume else None)
            if self.trainers:
                self._score(stream)
        finally:
            for logger in self.wandb.values():
                logger.finish()

    def _build(self, stream: Stream) -> None:
        for name, config in self.configs.items():
            try:
                self.trainers[name] = stream.trainer(build_sae(config.sae, stream.source.d_in, config.seed), config)
            except Exception as error:  # one member that cannot be built must not stop the others
                self._failed(name, 0, error)

    def _say_memory(self, stream: Stream, free: int | None) -> None:
        """Says what the group will hold, of what was free before it was built. Raises ValueError where that is more than there was."""
        need = group_bytes(self.trainers.values())
        rows = self.config.batch_size * max(trainer.sae.num_latents // trainer.sae.num_experts for trainer in self.trainers.values()) * 4
        self.say(
            f"memory: {len(self.trainers)} SAEs need {need / 1e9:.2f} GB (weights, moments, gradients) and about "
            f"{3 * rows / 1e9:.2f} GB for a batch" + (f"; {free / 1e9:.1f} GB are free" if free is not None else "")
        )
        if free is not None and need > free:
            fix = f"Use sweep.at_once={len(self.trainers) // 2} or less: the others follow." if len(self.trainers) > 1 else "Make it smaller."
            raise ValueError(
                f"training {len(self.trainers)} SAEs at once needs {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on {stream.device}. {fix}"
            )

    def _train(self, stream: Stream, resume: Checkpoint | None) -> None:
        config = self.config
        with Interruption().listening() as interruption, Progress(config.total_steps, config.batch_size, self.start) as progress:

            def advance(step: int, results: dict[str, StepResult]) -> None:
                self.reached(step)
                progress.update(step, list(results.values()))

            train(
                self.trainers, stream.source, config.total_steps, save=self._save, checkpoint_every=config.checkpoint_every, log=self._log,
                log_every=config.log_every, progress=advance, resume=resume, interruption=interruption, failed=self._failed,
            )  # fmt: skip
        if interruption.signal is not None:  # also one that came in the last step: everything is saved, the scores can wait
            raise Interrupted(self.folder.path, max((t.steps_done for t in self.trainers.values()), default=0), interruption.signal, "sweep")

    def _save(self, checkpoint: Checkpoint) -> None:
        for name in checkpoint.state["members"]:
            alone = split_checkpoint(checkpoint, name, self.alone[name])
            alone.state["wandb_id"] = self.wandb[name].id
            self.runs[name].save_checkpoint(alone)
        self.folder.write_tables()

    def _log(self, step: int, name: str, numbers: dict[str, float]) -> None:
        self.wandb[name].log(step, numbers)
        self.runs[name].log({"step": step, "tokens": step * self.config.batch_size, "sae": self.alone[name], **numbers})

    def _failed(self, name: str, step: int, error: Exception) -> None:
        if isinstance(error, RunError):
            raise error  # the disk is everybody's
        self.trainers.pop(name, None)
        self.folder.fail(name, step, error)
        self.say(f"{name} failed at step {step} and is out: {type(error).__name__}: {error}. The others go on.")

    def _score(self, stream: Stream) -> None:
        self.say(f"evaluating {len(self.trainers)} SAEs")
        score = self.streams.score(self.config)
        wall_seconds, group_size = time.perf_counter() - self.began if self.start == 0 else None, len(self.trainers)
        for name, trainer in list(self.trainers.items()):
            run, sae = self.runs[name], trainer.sae
            try:
                run.save_sae(sae, stream.source.describe())
                entry = score.member(sae) | training_facts(trainer, self.configs[name], wall_seconds, group_size)
            except Exception as error:  # as in training: the others must not suffer
                self._failed(name, trainer.steps_done, error)
                continue
            results = {"evaluation": score.about, "members": {self.alone[name]: entry}, "controls": {}, "mixing": stream.source.mixing()}
            run.write_json("results.json", results | {"seconds": time.perf_counter() - self.began})
            self.wandb[name].finish({f"final/{key}": estimate["value"] for key, estimate in entry["metrics"].items()})
            del self.wandb[name]
            run.remove_checkpoints()
            self.folder.write_tables()
        have = self.folder.controls()
        for k in sorted({sae_k for trainer in self.trainers.values() if (sae_k := trainer.sae.k)}):
            if f"pca_{min(k, stream.source.d_in)}" not in have:
                self.folder.add_controls(score.pca(stream.calibration_TD, k))
