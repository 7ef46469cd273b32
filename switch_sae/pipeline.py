"""The main job, start to end: activations, SAEs on one stream, training, evaluation, run folder."""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switch_kernels import resolve
from switch_sae.activations import ActivationSource, EvaluationSet, build_source
from switch_sae.analysis.pca import PCABaseline, participation_ratio
from switch_sae.config import Baseline, EvaluationConfig, RunConfig, config_from_plain, config_to_plain
from switch_sae.evaluation import evaluate
from switch_sae.memory import peak_bytes, state_bytes
from switch_sae.metrics import Downstream
from switch_sae.metrics.forward import Evaluable
from switch_sae.models import SAES, SparseAutoencoder, SwitchSAE, TopKSAE
from switch_sae.progress import Progress
from switch_sae.runs import Checkpoint, RunDir, architecture_of, environment
from switch_sae.training import Interruption, StepResult, Trainer, prepare, train
from switch_sae.wandb_logger import WandbLogger


class Interrupted(Exception):
    """Training stopped on a signal, after saving."""

    def __init__(self, path: Path, step: int, number: int, target: str = "train") -> None:
        super().__init__(f"stopped at step {step}; what is saved is whole. Go on with: make {target} RESUME={path}")
        self.signal = number


def run_training(config: RunConfig, say: Callable[[str], None] = print) -> RunDir:
    """Trains, evaluates and saves a new run. Raises Interrupted after a signal, with everything saved."""
    name = config.name or f"{short_name(config.sae)}-s{config.seed}"
    return _run(config, RunDir.create(config.runs, name), None, say)


def resume_training(path: str | Path, say: Callable[[str], None] = print) -> RunDir:
    """Goes on with an interrupted run, exactly. A finished one is only reported."""
    run = RunDir.open(path)
    config = config_from_plain(run.read_json("config.json"))
    run.remove_part_files()
    if (run.path / "results.json").is_file():
        run.remove_checkpoints()
        say(f"{run.path} is finished; nothing to do.")
        return run
    checkpoint = run.last_checkpoint()
    say(f"resuming {run.path} from step {checkpoint.step if checkpoint else 0} of {config.total_steps}")
    then, now = run.read_json("environment.json"), environment()
    for what in ("torch_threads", "gpu"):
        if then[what] != now[what]:
            say(f"note: {what} was {then[what]} and is {now[what]}: the result can differ in the last bits from an uninterrupted run.")
    if then["versions"]["torch"] != now["versions"]["torch"]:
        say(f"note: torch was {then['versions']['torch']} and is {now['versions']['torch']}: the result can differ in the last bits.")
    return _run(config, run, checkpoint, say)


def build_members(config: RunConfig, d_in: int) -> dict[str, SparseAutoencoder]:
    """The main SAE and its baselines, by name. Each starts from the run's seed alone, whatever trains beside it."""
    configs = {architecture_of(config.sae): config.sae}
    for baseline in config.baselines:
        configs[baseline.name] = baseline_config(config.sae, baseline)
    return {name: build_sae(sae_config, d_in, config.seed) for name, sae_config in configs.items()}


def build_sae(config: Any, d_in: int, seed: int) -> SparseAutoencoder:
    """A new SAE of the architecture that a config belongs to."""
    return SAES[architecture_of(config)](config, d_in, torch.Generator().manual_seed(seed))


def baseline_config(switch: SwitchSAE.Config, baseline: Baseline) -> TopKSAE.Config:
    """The control that differs from `switch` in one thing."""
    if baseline is Baseline.frozen_router:
        return replace(switch, train_router=False)
    # Per token a Switch SAE spends 2D(SF + E) forward and 4DE backward on encoder and router, a dense one 2DM: SF + 3E dense latents cost the same.
    width = (
        switch.num_latents
        if baseline is Baseline.width_matched
        else switch.experts_per_token * switch.latents_per_expert + (3 * switch.num_experts if switch.train_router else switch.num_experts)
    )
    shared = {name: getattr(switch, name) for name in ("k", "encoder_bias", "encoder_init", "auxk", "auxk_latents")}
    return TopKSAE.Config(num_latents=width, **shared)


def calibration_rows(source: ActivationSource, rows: int) -> Tensor:
    """The first rows of the stream: they set the activation scale, the biases' start and the PCA control, and are not trained on."""
    batches: list[Tensor] = []
    while sum(batch.shape[0] for batch in batches) < rows:
        batches.append(next(source))
    return torch.cat(batches)


def on_device(source_config: Any, device: str) -> Any:
    """The source's config with the run's device, unless it names one of its own."""
    return replace(source_config, device=device) if getattr(source_config, "device", device) is None else source_config


def resolve_device(name: str) -> tuple[str, str]:
    """(device, reason). Raises ValueError for a device that is not there."""
    if name == "auto":
        return ("cuda", "a GPU is available") if torch.cuda.is_available() else ("cpu", "no GPU is available")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch {torch.__version__} sees no GPU. Use device=cpu, or install a CUDA build of torch.")
    return name, "as configured"


def _run(config: RunConfig, run: RunDir, checkpoint: Checkpoint | None, say: Callable[[str], None]) -> RunDir:
    """One run, new (`checkpoint` and its config file are not there yet) or resumed. A new run that fails before its first step leaves no folder."""
    new = not (run.path / "config.json").is_file()
    if new:
        run.write_json("environment.json", environment())
        run.write_json("config.json", config_to_plain(config))  # last: with it the folder is a run that can be resumed
    progress = _Stage()
    try:
        return _train_and_evaluate(config, run, checkpoint, say, progress)
    except KeyboardInterrupt:
        if new and not progress.training:
            run.discard()
            raise
        raise Interrupted(run.path, progress.step, signal.SIGINT) from None
    except Exception:  # whatever it was goes on up: only the folder is seen to, and where to go on is said
        if new and not progress.training:
            run.discard()
        elif progress.training:
            say(f"stopped after step {progress.step} of {config.total_steps}. When the cause is mended, go on with: make train RESUME={run.path}")
        raise


@dataclass
class _Stage:
    """How far a run has come."""

    training: bool = False
    step: int = 0


def _train_and_evaluate(config: RunConfig, run: RunDir, checkpoint: Checkpoint | None, say: Callable[[str], None], stage: _Stage) -> RunDir:
    started = time.perf_counter()
    stream = Stream(config, say)
    source = stream.source
    try:
        members = build_members(config, source.d_in)
        trainers = {name: stream.trainer(sae, config) for name, sae in members.items()}
        stream.say_plan(config, say)
        for name, trainer in trainers.items():
            say(f"  {name}: {plan_line(trainer, config)}")
        run.forget_metrics_after(checkpoint.step if checkpoint else 0)
        wandb = WandbLogger(config.wandb, run.path, config_to_plain(config), checkpoint.state.get("wandb_id") if checkpoint else None)
        main = next(iter(members))

        def log(step: int, name: str, numbers: dict[str, float]) -> None:
            row = numbers if name == main else {f"{name}/{key}": value for key, value in numbers.items()}
            wandb.log(step, row)
            run.log({"step": step, "tokens": step * config.batch_size, "sae": name, **numbers})

        with (
            Interruption().listening() as interruption,
            Progress(config.total_steps, config.batch_size, start=checkpoint.step if checkpoint else 0) as progress,
        ):

            def advance(step: int, results: dict[str, StepResult]) -> None:
                stage.training, stage.step = True, step
                progress.update(step, [results[main]])

            finished = train(
                trainers, source, config.total_steps, save=run.save_checkpoint, checkpoint_every=config.checkpoint_every, log=log,
                log_every=config.log_every, progress=advance, resume=checkpoint, extra_state={"wandb_id": wandb.id}, interruption=interruption,
            )  # fmt: skip
        if not finished:
            assert interruption.signal is not None
            wandb.finish()
            raise Interrupted(run.path, trainers[main].steps_done, interruption.signal)
        wall_seconds = time.perf_counter() - started if checkpoint is None else None
        say("evaluating")
        for name, sae in members.items():
            (run if name == main else run.member(name)).save_sae(sae, source.describe())
        results = evaluate_members(config, members, source, stream.calibration_TD)
        results["mixing"] = source.mixing()
        results["seconds"] = time.perf_counter() - started
        for name, trainer in trainers.items():
            results["members"][name] |= training_facts(trainer, config, wall_seconds, len(trainers))
        run.write_json("results.json", results)
        wandb.finish({f"final/{key}": estimate["value"] for key, estimate in results["members"][main]["metrics"].items()})
        run.remove_checkpoints()
    finally:
        stream.close()
    return run


class Stream:
    """A source of activations and the device that trains on it, with what all SAEs on it share. `say` is told what was chosen, and why."""

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device, reason = resolve_device(config.device)
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)  # graphs and kernels go to the current device
        self.execution = resolve(config.backend, config.precision, self.device)
        say(f"device: {self.device} ({reason}), {torch.get_num_threads()} threads; backend: {self.execution}")
        self.source = build_source(on_device(config.source, self.device), config.batch_size, config.rows_read)
        try:
            self.calibration_TD = calibration_rows(self.source, config.calibration_rows)
        except BaseException:
            self.source.close()
            raise

    def trainer(self, sae: SparseAutoencoder, config: RunConfig) -> Trainer:
        """A trainer for a new SAE, which gets its scale and biases from the calibration rows and moves to the device."""
        prepare(sae.to(self.device), self.calibration_TD, config.normalize_activations)
        return Trainer(sae, config.trainer, config.total_steps, config.batch_size, self.execution)

    def say_plan(self, config: RunConfig, say: Callable[[str], None]) -> None:
        about = self.source.describe()
        told = {key: about[key] for key in ("model", "hook", "context_length") if key in about} | {"d_in": self.source.d_in}
        told |= {f"text {key}": about["text"][key] for key in ("kind", "documents", "rows_per_epoch") if key in about.get("text", {})}
        say(
            f"activations: {about['source']}, "
            + ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in told.items())
        )
        say(f"training on {config.total_steps * config.batch_size:,} activations in {config.total_steps:,} steps of {config.batch_size}")

    def close(self) -> None:
        self.source.close()


class Scorer:
    """Scores SAEs and controls on the same held-out rows, which are made once, with the same language model behind delta CE and KL."""

    def __init__(self, config: EvaluationConfig, source: ActivationSource) -> None:
        self.config = config
        self.evaluation_set = source.evaluation_set(config.rows)
        self.downstream = prepare_downstream(config, source, self.evaluation_set)
        self.about = {"participation_ratio": participation_ratio(self.evaluation_set.x_TD), "source": source.describe()}

    def __call__(self, sae: Evaluable, architecture: str, k: int | None) -> dict[str, Any]:
        results = evaluate(sae, self.evaluation_set, self.downstream, self.config.bootstrap).to_json()
        return results | {"architecture": architecture, "num_latents": sae.num_latents, "num_experts": sae.num_experts, "k": k}

    def member(self, sae: SparseAutoencoder) -> dict[str, Any]:
        """A trained SAE."""
        return self(sae, architecture_of(sae), sae.k) | {"parameters": sum(p.numel() for p in sae.parameters())}

    def pca(self, calibration_TD: Tensor, k: int) -> dict[str, Any]:
        """The control that a rank-k PCA of the calibration rows is, by its name."""
        pca = PCABaseline.fit(calibration_TD, min(k, calibration_TD.shape[1]))
        return {f"pca_{pca.k}": self(pca, "pca", pca.k)}


def evaluate_members(config: RunConfig, members: Mapping[str, SparseAutoencoder], source: ActivationSource, calibration_TD: Tensor) -> dict[str, Any]:
    """Scores every member and the controls (PCA of rank k, the main SAE untrained) on the same held-out rows; plain JSON values.

    Where the main SAE has no k, PCA gets as many components as it has active latents per token on average.
    """
    score = Scorer(config.evaluation, source)
    untrained = next(iter(build_members(replace(config, baselines=[]), source.d_in).values()))
    prepare(untrained.to(calibration_TD.device), calibration_TD, config.normalize_activations)
    scored = {name: score.member(sae) for name, sae in members.items()}
    main = next(iter(scored.values()))
    k = main["k"] or max(1, round(main["metrics"]["l0"]["value"]))
    return {
        "evaluation": score.about,
        "members": scored,
        "controls": {**score.pca(calibration_TD, k), "untrained": score(untrained, architecture_of(untrained), untrained.k)},
    }


def training_facts(trainer: Trainer, config: RunConfig, wall_seconds: float | None, group_size: int) -> dict[str, Any]:
    """What training one SAE cost.

    `train_seconds` are its own steps. `wall_seconds` is the whole group's time from start to the end of training, activations included; None after a
    resume, where nobody watched all of it. `peak_bytes` is the most that the process has held so far, whatever else it trained.
    """
    tokens, seconds = trainer.steps_done * config.batch_size, trainer.seconds
    return {
        "tokens": tokens,
        "train_tokens_per_second": tokens / seconds,
        "train_seconds": seconds,
        "wall_seconds": wall_seconds,
        "group_size": group_size,
        "state_bytes": state_bytes(trainer),
        "peak_bytes": peak_bytes(trainer.tokens_since_fired_M.device),
    }


def prepare_downstream(config: EvaluationConfig, source: ActivationSource, evaluation_set: EvaluationSet) -> Downstream | None:
    """What measures delta CE and KL; None for activations without a language model, or when it is switched off."""
    if source.language_model is None or config.downstream_contexts == 0:
        return None
    return Downstream(source.language_model, evaluation_set, config.downstream_contexts)


def short_name(sae: Any) -> str:
    """An SAE's config in a file name: switch-e8-m4096-k16."""
    experts = f"-e{sae.num_experts}" if isinstance(sae, SwitchSAE.Config) else ""
    return f"{architecture_of(sae)}{experts}-m{sae.num_latents}" + (f"-k{sae.k}" if hasattr(sae, "k") else "")


def plan_line(trainer: Trainer, config: RunConfig) -> str:
    """What an SAE is and how it will train, before it does."""
    sae, schedule = trainer.sae, trainer.schedule
    experts = f"{sae.num_experts} experts x {sae.num_latents // sae.num_experts}" if sae.num_experts > 1 else "dense"
    return (
        f"{sae.num_latents} latents ({experts}){f', k={sae.k}' if sae.k else ''}, {sae.flops().total:,} FLOPs per token; lr {schedule.peak:.2e}, "
        f"warm-up {schedule.warmup_steps} steps, decay over the last {schedule.decay_steps}, dead after {trainer.dead_after_tokens:,} tokens"
        + (f"; {trainer.choice}" if trainer.choice else "")
    )
