"""SAEs that train together on one stream, from start or checkpoint to saved and scored folders.

A run is a folder with a main SAE and its baselines; a sweep is many folders with a main SAE each. Both are groups of `Member`s here, and differ in
how many share a folder and in what happens when one fails (`Keeper`).
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from switch_kernels import resolve
from switch_sae.config import RunConfig, config_to_plain
from switch_sae.files import Say
from switch_sae.invocation import invocation
from switch_sae.memory import available_bytes, group_bytes
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.models.starting import take_weights
from switch_sae.progress import Progress
from switch_sae.runs import TRAINING_FILE, Checkpoint, RunDir, RunError, load_sae
from switch_sae.scoring import Asked, Scorer, trained, training_facts
from switch_sae.stream import Batches, Stream, resolve_device
from switch_sae.training import Interruption, StepResult, Trainer, joined, part_of, prepare, train
from switch_sae.wandb_logger import WandbLogger

MAIN, BASELINE = "main", "baseline"


class Interrupted(Exception):
    """Training stopped on a signal, after saving."""

    def __init__(self, path: Path, step: int, number: int, target: str = "train") -> None:
        super().__init__(f"stopped at step {step}; what is saved is whole. Go on with: {invocation(target, resume=path)}")
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
        """`path` is what the command `target` goes on with."""
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
            self.stream = Stream(
                config.source, config.batch_size, config.rows_read, config.calibration_rows, device, execution, config.outlier_factor
            )
            self.say(self.stream.describe())
        return self.stream

    def score(self, config: RunConfig) -> Scorer:
        stream = self.get(config)
        if self.scorer is None or self.scorer.config != config.evaluation:
            self.scorer = Scorer(config.evaluation, stream.source, self.say, stream.execution)
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
    """A new SAE, which starts from the seed alone, whatever trains beside it. Raises ValueError where the memory cannot hold its weights."""
    need, free = 2 * config.num_latents * d_in * 4, available_bytes("cpu")  # encoder and decoder, which every architecture has
    if free is not None and need > free:
        raise ValueError(
            f"sae.num_latents={config.num_latents} needs {need / 1e9:,.1f} GB for its weights alone (float32, d_in={d_in}), "
            f"but {free / 1e9:,.1f} GB are free. The most that fits is below {free // (8 * d_in):,}."
        )
    return SAES.build(config, d_in, torch.Generator().manual_seed(seed))


def saved_start(member: Member, sae: SparseAutoencoder, say: Say) -> bool:
    """Whether a main SAE starts from saved weights, scale and biases included, which `sae` then has; False where it starts anew.

    Says which settings differ from those that it was saved with. Raises ValueError where the weights do not fit.
    """
    path = member.config.start_from
    if member.role != MAIN or path is None:
        return False
    try:
        differences = take_weights(sae, load_sae(path))
    except ValueError as error:
        raise ValueError(f"start_from={path}: {error}") from error
    told = f"; settings that differ: {', '.join(differences)}" if differences else ""
    say(f"{member.name} starts from the weights of {path}, with fresh moments and its own schedule{told}")
    return True


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
        self.batches: Batches | None = None
        self.began = began

    def work(self) -> None:
        """Raises Interrupted after a signal, and whatever stops the whole group: an error of the source, a full disk."""
        stream = self.streams.get(self.config)
        self.keeper.began(self.members.values())
        free = available_bytes(stream.device)
        for name, member in self.members.items():
            try:
                sae = build_sae(member.sae, stream.source.d_in, member.config.seed)
                prepared = self.start == 0 and saved_start(member, sae, self.say)  # later a checkpoint holds all that the start gave
                self.trainers[name] = stream.trainer(
                    sae, member.config.trainer, self.config.total_steps, member.config.normalize_activations, prepared
                )
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
            model = stream.source.language_model
            if self.config.evaluation.downstream_contexts and model is not None and (reason := model.why_no_predictions()):
                self.say(f"delta CE and KL will be left out: {reason}")
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
        need, trainers = group_bytes(self.trainers.values()), self.trainers.values()
        widths = [trainer.sae.num_latents // trainer.sae.num_experts for trainer in trainers if not trainer.execution.is_triton]
        rows = self.config.batch_size * max(widths, default=0) * 4  # in kernels they are among what is needed
        batch = f" and about {3 * rows / 1e9:.2f} GB for a batch" if rows else ""
        self.say(
            f"memory: {len(trainers)} SAEs need {need / 1e9:.2f} GB (weights, moments, gradients){batch}"
            + (f"; {free / 1e9:.1f} GB are free" if free is not None else "")
        )
        if free is not None and need > free:
            fix = f"Use sweep.at_once={len(self.trainers) // 2} or less: the others follow." if len(self._folders()) > 1 else "Make it smaller."
            raise ValueError(
                f"training {len(self.trainers)} SAEs at once needs {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on {stream.device}. {fix}"
            )

    def _train(self, stream: Stream, resume: Mapping[Path, Checkpoint] | None) -> None:
        config = self.config
        self.batches = stream.batches()
        whole = None if resume is None else joined([(resume[run.path], _keys(members)) for run, members in self._folders().items()])
        with Interruption().listening() as interruption, Progress(config.total_steps, config.batch_size, self.start) as progress:

            def advance(step: int, results: dict[str, StepResult]) -> None:
                self.keeper.reached(step)
                progress.update(step, [result for name, result in results.items() if self.members[name].role == MAIN])

            train(
                self.trainers, self.batches, config.total_steps, save=self._save, checkpoint_every=config.checkpoint_every, log=self._log,
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
        """Saves what was trained, then scores it: what fails from here on can be scored again (`orchestrator.score_again`)."""
        folders, group_size = self._folders(), len(self.trainers)
        wall_seconds = time.perf_counter() - self.began if self.start == 0 else None
        for run, members in folders.items():
            facts = {}
            for member in members:
                trainer = self.trainers[member.name]
                member.folder.save_sae(trainer.sae, stream.source.describe())
                facts[member.key] = {"role": member.role, **training_facts(trainer, wall_seconds, group_size)}
            told = {"mixing": stream.source.mixing(), "outliers": self._outliers(stream), "seconds": time.perf_counter() - self.began}
            run.write_json(TRAINING_FILE, {"members": facts, **told, "source": stream.source.describe()})
        self.say("evaluating" if group_size == 1 else f"evaluating {group_size} SAEs")
        score = self.streams.score(self.config)  # an error here is everybody's
        asked = [
            trained(member.name, self.trainers[member.name].sae, member.role) for member in self.members.values() if member.name in self.trainers
        ]
        owner = {each.name: each.name for each in asked}
        for further in [each for trained_sae in asked for each in score.under_inferences(trained_sae)]:
            asked.append(further)
            owner[further.name] = further.name.rpartition("+")[0]
        for run, members in folders.items() if self.keeper.with_controls else ():
            main = members[0]
            for control in untrained_controls(score, main, self.trainers[main.name].sae, stream, f"{run.path} "):
                asked.append(control)
                owner[control.name] = main.name

        def failed(name: str, error: Exception) -> None:
            if owner[name] in self.trainers:  # under another inference it may have failed already
                self._failed(owner[name], self.trainers[owner[name]].steps_done, error)  # as in training: the others must not suffer

        scored = score.group(asked, failed)
        for run, members in folders.items():
            members = [member for member in members if member.name in self.trainers]
            if not members:
                continue
            before = run.read_json(TRAINING_FILE)
            parts = scored.of_folder(_keys(members), before["members"], f"{run.path} ")
            more = {key: before[key] for key in ("mixing", "outliers")} | {"seconds": time.perf_counter() - self.began}
            score.write(run, "results.json", **parts, **more)
            self.wandb.pop(run.path).finish({f"final/{name}": e["value"] for name, e in parts["members"][members[0].key]["metrics"].items()})
            run.finish()
            self.keeper.saved()

    def _outliers(self, stream: Stream) -> dict[str, Any] | None:
        """How many training rows were left out, of how many; None where none could be."""
        if self.batches is None or stream.limit is None:
            return None
        return {"factor": stream.outlier_factor, "limit": stream.limit.x, "rows": self.batches.rows, "left_out": self.batches.left_out}


def _keys(members: Iterable[Member]) -> dict[str, str]:
    """Names in the folder by names in the group."""
    return {member.name: member.key for member in members}


def plan_line(trainer: Trainer) -> str:
    """What an SAE is and how it will train, before it does."""
    sae, schedule = trainer.sae, trainer.schedule
    each = sae.latents_per_expert
    experts = f"{sae.num_experts} experts x {each}" + (f" + {sae.num_shared} shared" if sae.num_shared else "") if sae.num_experts > 1 else "dense"
    return (
        f"{sae.num_latents} latents ({experts}){f', k={sae.k}' if sae.k else ''}, {sae.flops().total:,} FLOPs per token; lr {schedule.peak:.2e}, "
        f"warm-up {schedule.warmup_steps} steps, decay over the last {schedule.decay_steps}, dead after {trainer.dead_after_tokens:,} tokens"
        + (f"; {trainer.choice}" if trainer.choice else "")
    )


def untrained_controls(score: Scorer, member: Member, sae: SparseAutoencoder, stream: Stream, prefix: str) -> list[Asked]:
    """The controls of a main SAE: PCA, and the SAE as it was before training."""
    untrained = build_sae(member.sae, stream.source.d_in, member.config.seed).to(stream.device)
    prepare(untrained, stream.calibration, member.config.normalize_activations, None)
    return score.controls(sae, untrained, stream.calibration, prefix)
