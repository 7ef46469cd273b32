"""One way to train SAEs: a group on one stream, from start or checkpoint to saved and scored folders.

A run is a folder with a main SAE and its baselines; a sweep is many folders with a main SAE each. Both are groups of `Member`s here, and differ in
how many share a folder and in what happens when one fails (`Keeper`).
"""

import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from switch_kernels import resolve
from switch_sae.config import RunConfig, check_baselines, config_from_plain, config_to_plain
from switch_sae.files import Say, tell
from switch_sae.memory import available_bytes, group_bytes
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.models.baselines import Baseline, baseline_config, usual_baselines
from switch_sae.progress import Progress
from switch_sae.runs import Checkpoint, RunDir, RunError, environment, load_sae
from switch_sae.scoring import Entry, Scorer, training_facts
from switch_sae.stream import Stream, resolve_device
from switch_sae.training import Interruption, StepResult, Trainer, joined, part_of, prepare, train
from switch_sae.wandb_logger import WandbLogger

MAIN, BASELINE = "main", "baseline"


class Interrupted(Exception):
    """Training stopped on a signal, after saving."""

    def __init__(self, path: Path, step: int, number: int, target: str = "train") -> None:
        super().__init__(f"stopped at step {step}; what is saved is whole. Go on with: make {target} RESUME={path}")
        self.signal = number


@dataclass(frozen=True)
class Member:
    """One SAE of a group, and what it is in its folder."""

    name: str
    """In the group."""
    key: str
    """In its folder's results.json, metrics.jsonl and checkpoints."""
    role: str
    """`MAIN` or `BASELINE`."""
    run: RunDir
    config: RunConfig
    """Of the folder."""
    sae: Any
    """The SAE's own config: the folder's, or a baseline made from it."""

    @property
    def folder(self) -> RunDir:
        """Where its model.safetensors goes."""
        return self.run if self.role == MAIN else self.run.member(self.key)


class Keeper:
    """What the owner of a group is told, and decides. A run's: the first failure ends it, and it has controls of its own."""

    with_controls = True
    wandb_group: str | None = None

    def __init__(self, path: Path, target: str = "train") -> None:
        """`path` is what `make TARGET RESUME=PATH` goes on with."""
        self.path, self.target = path, target

    def began(self, members: Iterable[Member]) -> None:
        """Before anything is built."""

    def reached(self, step: int) -> None:
        """After every step."""

    def saved(self) -> None:
        """After checkpoints or results were written."""

    def failed(self, member: Member, step: int, error: Exception) -> None:
        """A member cannot go on. Raising ends the group, returning lets the others go on."""
        raise error


class Streams:
    """The stream that is open, kept from one group to the next where they train on the same source."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.stream: Stream | None = None
        self.scorer: Scorer | None = None

    def get(self, config: RunConfig) -> Stream:
        if self.stream is None or self.stream.source_config != config.source:
            self.close()
            if config.threads:
                torch.set_num_threads(config.threads)
            device, reason = resolve_device(config.device)
            execution = resolve(config.backend, config.precision, device)
            self.say(f"device: {device} ({reason}), {torch.get_num_threads()} threads; backend: {execution}")
            self.stream = Stream(config.source, config.batch_size, config.rows_read, config.calibration_rows, device, execution)
            self.say(self.stream.describe())
        return self.stream

    def score(self, config: RunConfig) -> Scorer:
        if self.scorer is None:
            self.scorer = Scorer(config.evaluation, self.get(config).source)
        return self.scorer

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = self.scorer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_sae(config: Any, d_in: int, seed: int) -> SparseAutoencoder:
    """A new SAE, which starts from the seed alone, whatever trains beside it."""
    return SAES.build(config, d_in, torch.Generator().manual_seed(seed))


class Cohort:
    """Members that train together from step `start` to the end of their stream and are then scored."""

    def __init__(self, members: Iterable[Member], start: int, streams: Streams, keeper: Keeper, began: float) -> None:
        """`began` is when work on it began, its stream included (`time.perf_counter`)."""
        self.members = {member.name: member for member in members}
        self.start, self.streams, self.keeper, self.say = start, streams, keeper, streams.say
        self.config = next(iter(self.members.values())).config
        """Of the first member: what concerns the stream is the same for all."""
        self.trainers: dict[str, Trainer] = {}
        self.wandb: dict[Path, WandbLogger] = {}
        self.began = began

    def work(self) -> None:
        """Raises Interrupted after a signal, and whatever stops the whole group: an error of the source, a full disk."""
        stream = self.streams.get(self.config)
        self.keeper.began(self.members.values())
        free = available_bytes(stream.device)
        for name, member in self.members.items():
            try:
                sae = build_sae(member.sae, stream.source.d_in, member.config.seed)
                self.trainers[name] = stream.trainer(sae, member.config.trainer, self.config.total_steps, member.config.normalize_activations)
            except Exception as error:  # one member that cannot be built must not stop the others
                self._failed(name, 0, error)
        if not self.trainers:
            return
        try:
            resume = self._checkpoint() if self.start else None
            if resume is None:
                stream.rewind()
            for run, members in self._folders().items():
                run.forget_metrics_after(self.start)
                config, wandb_id = members[0].config, resume[run.path].state.get("wandb_id") if resume else None
                self.wandb[run.path] = WandbLogger(config.wandb, run.path, config_to_plain(config), wandb_id, self.keeper.wandb_group)
            steps, batch = self.config.total_steps, self.config.batch_size
            self.say(f"training on {steps * batch:,} activations in {steps:,} steps of {batch}")
            for name, trainer in self.trainers.items():
                self.say(f"  {name}: {plan_line(trainer)}")
            self._say_memory(stream, free)
            self.keeper.saved()
            self._train(stream, resume)
            if self.trainers:
                self._score(stream)
        finally:
            for logger in self.wandb.values():
                logger.finish()

    def _folders(self) -> "dict[RunDir, list[Member]]":
        """The members that are still in the group, by their folders, main SAEs first."""
        folders: dict[Path, tuple[RunDir, list[Member]]] = {}
        for name in self.trainers:
            member = self.members[name]
            folders.setdefault(member.run.path, (member.run, []))[1].append(member)
        return {run: sorted(members, key=lambda member: member.role != MAIN) for run, members in folders.values()}

    def _checkpoint(self) -> dict[Path, Checkpoint]:
        """What each folder has saved of step `start`."""
        self.say(f"{len(self.trainers)} SAEs go on from step {self.start} of {self.config.total_steps}")
        return {run.path: run.checkpoint_at(self.start) for run in self._folders()}

    def _say_memory(self, stream: Stream, free: int | None) -> None:
        """Says what the group will hold, of what was free before it was built. Raises ValueError where that is more than there was."""
        need = group_bytes(self.trainers.values())
        rows = self.config.batch_size * max(trainer.sae.num_latents // trainer.sae.num_experts for trainer in self.trainers.values()) * 4
        self.say(
            f"memory: {len(self.trainers)} SAEs need {need / 1e9:.2f} GB (weights, moments, gradients) and about "
            f"{3 * rows / 1e9:.2f} GB for a batch" + (f"; {free / 1e9:.1f} GB are free" if free is not None else "")
        )
        if free is not None and need > free:
            fix = f"Use sweep.at_once={len(self.trainers) // 2} or less: the others follow." if len(self._folders()) > 1 else "Make it smaller."
            raise ValueError(
                f"training {len(self.trainers)} SAEs at once needs {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on {stream.device}. {fix}"
            )

    def _train(self, stream: Stream, resume: Mapping[Path, Checkpoint] | None) -> None:
        config = self.config
        whole = None if resume is None else joined([(resume[run.path], _keys(members)) for run, members in self._folders().items()])
        with Interruption().listening() as interruption, Progress(config.total_steps, config.batch_size, self.start) as progress:

            def advance(step: int, results: dict[str, StepResult]) -> None:
                self.keeper.reached(step)
                progress.update(step, [result for name, result in results.items() if self.members[name].role == MAIN])

            train(
                self.trainers, stream.source, config.total_steps, save=self._save, checkpoint_every=config.checkpoint_every, log=self._log,
                log_every=config.log_every, progress=advance, resume=whole, interruption=interruption, failed=self._failed,
            )  # fmt: skip
        if interruption.signal is not None:  # also one that came in the last step: everything is saved, the scores can wait
            step = max((trainer.steps_done for trainer in self.trainers.values()), default=0)
            raise Interrupted(self.keeper.path, step, interruption.signal, self.keeper.target)

    def _save(self, checkpoint: Checkpoint) -> None:
        for run, members in self._folders().items():
            part = part_of(checkpoint, _keys(members))
            part.state["wandb_id"] = self.wandb[run.path].id
            run.save_checkpoint(part)
        self.keeper.saved()

    def _log(self, step: int, name: str, numbers: dict[str, float]) -> None:
        member = self.members[name]
        row = numbers if member.role == MAIN else {f"{member.key}/{key}": value for key, value in numbers.items()}
        self.wandb[member.run.path].log(step, row)
        member.run.log({"step": step, "tokens": step * self.config.batch_size, "sae": member.key, **numbers})

    def _failed(self, name: str, step: int, error: Exception) -> None:
        if isinstance(error, RunError):
            raise error  # the disk is everybody's
        self.trainers.pop(name, None)
        self.keeper.failed(self.members[name], step, error)
        self.say(f"{name} failed at step {step} and is out: {type(error).__name__}: {error}. The others go on.")

    def _score(self, stream: Stream) -> None:
        self.say("evaluating" if len(self.trainers) == 1 else f"evaluating {len(self.trainers)} SAEs")
        wall_seconds, group_size = time.perf_counter() - self.began if self.start == 0 else None, len(self.trainers)
        score = self.streams.score(self.config)  # an error here is everybody's
        for run, members in self._folders().items():
            entries: dict[str, Entry] = {}
            try:
                for member in members:
                    trainer = self.trainers[member.name]
                    member.folder.save_sae(trainer.sae, stream.source.describe())
                    entries[member.key] = score.member(trainer.sae, member.role) | training_facts(trainer, wall_seconds, group_size)
                controls = untrained_controls(score, members[0], entries[members[0].key], stream) if self.keeper.with_controls else {}
            except Exception as error:  # as in training: the others must not suffer
                self._failed(members[0].name, self.trainers[members[0].name].steps_done, error)
                continue
            mixing, seconds = stream.source.mixing(), time.perf_counter() - self.began
            score.write(run, "results.json", entries, controls, mixing=mixing, seconds=seconds)
            self.wandb.pop(run.path).finish({f"final/{name}": e["value"] for name, e in entries[members[0].key]["metrics"].items()})
            run.remove_checkpoints()
            self.keeper.saved()


def _keys(members: Iterable[Member]) -> dict[str, str]:
    """Names in the folder by names in the group."""
    return {member.name: member.key for member in members}


def plan_line(trainer: Trainer) -> str:
    """What an SAE is and how it will train, before it does."""
    sae, schedule = trainer.sae, trainer.schedule
    experts = f"{sae.num_experts} experts x {sae.num_latents // sae.num_experts}" if sae.num_experts > 1 else "dense"
    return (
        f"{sae.num_latents} latents ({experts}){f', k={sae.k}' if sae.k else ''}, {sae.flops().total:,} FLOPs per token; lr {schedule.peak:.2e}, "
        f"warm-up {schedule.warmup_steps} steps, decay over the last {schedule.decay_steps}, dead after {trainer.dead_after_tokens:,} tokens"
        + (f"; {trainer.choice}" if trainer.choice else "")
    )


class _RunKeeper(Keeper):
    """A run's: it remembers how far training came."""

    step: int | None = None
    """The last one that was taken; None before the first."""

    def reached(self, step: int) -> None:
        self.step = step


def run_training(config: RunConfig, say: Say = tell) -> RunDir:
    """Trains an SAE with its baselines, evaluates and saves them in a new run folder. Raises Interrupted after a signal, with everything saved."""
    check_baselines(config)
    run = RunDir.create(config.runs, config.name or f"{config.sae.slug()}-s{config.seed}")
    return _run(replace(config, baselines=_chosen_baselines(config)), run, say)


def resume_training(path: str | Path, say: Say = tell) -> RunDir:
    """Goes on with an interrupted run, exactly. A finished one is only reported."""
    run = RunDir.open(path)
    config = config_from_plain(run.read_json("config.json"))
    run.remove_part_files()
    if (run.path / "results.json").is_file():
        run.remove_checkpoints()
        say(f"{run.path} is finished; nothing to do.")
        return run
    say(f"resuming {run.path} from step {max(run.checkpoint_steps(), default=0)} of {config.total_steps}")
    then, now = run.read_json("environment.json"), environment()
    for what in ("torch_threads", "gpu"):
        if then[what] != now[what]:
            say(f"note: {what} was {then[what]} and is {now[what]}: the result can differ in the last bits from an uninterrupted run.")
    if then["versions"]["torch"] != now["versions"]["torch"]:
        say(f"note: torch was {then['versions']['torch']} and is {now['versions']['torch']}: the result can differ in the last bits.")
    return _run(config, run, say)


def _run(config: RunConfig, run: RunDir, say: Say) -> RunDir:
    """One run, new (its config file is not there yet) or resumed. A new run that fails before its first step leaves no folder."""
    new = not (run.path / "config.json").is_file()
    if new:
        run.write_json("environment.json", environment())
        run.write_json("config.json", config_to_plain(config))  # last: with it the folder is a run that can be resumed
    keeper, began = _RunKeeper(run.path), time.perf_counter()
    try:
        with Streams(say) as streams:
            members = run_members(run, config, streams.get(config).source.d_in)
            Cohort(members, max(run.checkpoint_steps(), default=0), streams, keeper, began).work()
    except Interrupted:
        raise
    except KeyboardInterrupt:
        if new and keeper.step is None:
            run.discard()
            raise
        raise Interrupted(run.path, keeper.step or 0, signal.SIGINT) from None
    except Exception:  # whatever it was goes on up: only the folder is seen to, and where to go on is said
        if new and keeper.step is None:
            run.discard()
        elif keeper.step is not None:
            say(f"stopped after step {keeper.step} of {config.total_steps}. When the cause is mended, go on with: make train RESUME={run.path}")
        raise
    return run


def _chosen_baselines(config: RunConfig) -> list[Baseline]:
    return usual_baselines(config.sae) if config.baselines is None else config.baselines


def run_members(run: RunDir, config: RunConfig, d_in: int) -> list[Member]:
    """The main SAE of a run and its baselines."""
    return [
        main_member(run, config),
        *(Member(b.name, b.name, BASELINE, run, config, baseline_config(config.sae, b, d_in)) for b in _chosen_baselines(config)),
    ]


def main_member(run: RunDir, config: RunConfig) -> Member:
    """The SAE that a run is about."""
    key = SAES.key_of(config.sae)
    return Member(key, key, MAIN, run, config, config.sae)


def score_again(run: RunDir, config: RunConfig, file: str, say: Say = tell) -> None:
    """Scores all SAEs of a finished run and its controls by `config` and writes `file` beside results.json; what training cost is kept.

    Says so where the activations are others than those of training.
    """
    before = run.read_json("results.json")
    with Streams(say) as streams:
        stream = streams.get(config)
        score = streams.score(config)
        now, then = stream.source.describe(), before["evaluation"]["source"]
        changed = sorted(key for key in now.keys() | then.keys() if key not in ("device", "cache") and now.get(key) != then.get(key))
        if changed:
            say(f"note: these are not the activations of training; {', '.join(changed)} changed (another language model, text or Python version).")
        entries: dict[str, Entry] = {}
        main = main_member(run, config)
        for key, trained in before["members"].items():
            folder, role = (run, MAIN) if key == main.key else (run.member(key), BASELINE)
            entries[key] = trained | score.member(load_sae(folder.path).to(stream.device), role)
        controls = untrained_controls(score, main, entries[main.key], stream)
        score.write(run, file, entries, controls)


def untrained_controls(score: Scorer, member: Member, entry: Entry, stream: Stream) -> dict[str, Entry]:
    """The controls of a main SAE: PCA, and the SAE as it was before training."""
    untrained = build_sae(member.sae, stream.source.d_in, member.config.seed).to(stream.device)
    prepare(untrained, stream.calibration, member.config.normalize_activations)
    return score.controls(entry, untrained, stream.calibration)
