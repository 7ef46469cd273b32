"""The main job, start to end: activations, SAEs on one stream, training, evaluation, run folder."""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switch_kernels import Execution, resolve
from switch_sae.activations import ActivationSource, EvaluationSet, build_source
from switch_sae.analysis.pca import PCABaseline, participation_ratio
from switch_sae.config import Baseline, EvaluationConfig, RunConfig, config_from_plain, config_to_plain
from switch_sae.evaluation import evaluate
from switch_sae.metrics import Downstream
from switch_sae.metrics.forward import Evaluable
from switch_sae.models import SAES, SparseAutoencoder, SwitchSAE, TopKSAE
from switch_sae.progress import Progress
from switch_sae.runs import Checkpoint, RunDir, architecture_of, environment
from switch_sae.training import Interruption, StepResult, Trainer, prepare, train
from switch_sae.wandb_logger import WandbLogger


class Interrupted(Exception):
    """Training stopped on a signal, after saving; `run` is where."""

    def __init__(self, run: RunDir, step: int, number: int) -> None:
        super().__init__(f"stopped at step {step}; what is saved is whole. Go on with: make train RESUME={run.path}")
        self.run, self.step, self.signal = run, step, number


def run_training(config: RunConfig, say: Callable[[str], None] = print) -> RunDir:
    """Trains, evaluates and saves a new run. Raises Interrupted after a signal, with everything saved."""
    name = config.name or _default_name(config)
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
    members: dict[str, SparseAutoencoder] = {}
    for name, sae_config in configs.items():
        generator = torch.Generator().manual_seed(config.seed)
        members[name] = SAES[architecture_of(sae_config)](sae_config, d_in, generator)
    return members


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
        raise Interrupted(run, progress.step, signal.SIGINT) from None
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
    if config.threads:
        torch.set_num_threads(config.threads)
    device, reason = resolve_device(config.device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # graphs and kernels go to the current device
    execution = resolve(config.backend, config.precision, device)
    say(f"device: {device} ({reason}), {torch.get_num_threads()} threads; backend: {execution}")
    source = build_source(on_device(config.source, device), config.batch_size)
    try:
        calibration = calibration_rows(source, config.calibration_rows)
        members = build_members(config, source.d_in)
        for sae in members.values():
            prepare(sae, calibration, config.normalize_activations)
            sae.to(device)
            sae.execution = execution
        trainers = {name: Trainer(sae, config.trainer, config.total_steps, config.batch_size) for name, sae in members.items()}
        _say_plan(config, trainers, source, say)
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
                progress.update(step, results[main])

            finished = train(
                trainers, source, config.total_steps, save=run.save_checkpoint, checkpoint_every=config.checkpoint_every, log=log,
                log_every=config.log_every, progress=advance, resume=checkpoint, extra_state={"wandb_id": wandb.id}, interruption=interruption,
            )  # fmt: skip
        if not finished:
            assert interruption.signal is not None
            wandb.finish()
            raise Interrupted(run, trainers[main].steps_done, interruption.signal)
        say("evaluating")
        for name, sae in members.items():
            sae.execution = Execution()  # scores are those that anyone who loads the SAE gets
            (run if name == main else run.member(name)).save_sae(sae, source.describe())
        results = evaluate_members(config, members, source, calibration)
        for name, trainer in trainers.items():
            tokens = trainer.steps_done * config.batch_size
            results["members"][name] |= {"tokens": tokens, "train_tokens_per_second": tokens / trainer.seconds}
        results["mixing"] = source.mixing()
        results["seconds"] = time.perf_counter() - started
        run.write_json("results.json", results)
        wandb.finish({f"final/{key}": estimate["value"] for key, estimate in results["members"][main]["metrics"].items()})
        run.remove_checkpoints()
    finally:
        source.close()
    return run


def evaluate_members(config: RunConfig, members: Mapping[str, SparseAutoencoder], source: ActivationSource, calibration_TD: Tensor) -> dict[str, Any]:
    """Scores every member and the controls (PCA of rank k, the main SAE untrained) on the same held-out rows; plain JSON values."""
    evaluation_set = source.evaluation_set(config.evaluation.rows)
    downstream = prepare_downstream(config.evaluation, source, evaluation_set)
    untrained = next(iter(build_members(replace(config, baselines=[]), source.d_in).values()))
    prepare(untrained, calibration_TD, config.normalize_activations)
    untrained.to(calibration_TD.device)
    pca = PCABaseline.fit(calibration_TD, min(config.sae.k, source.d_in))

    def score(sae: Evaluable, architecture: str, k: int) -> dict[str, Any]:
        results = evaluate(sae, evaluation_set, downstream, config.evaluation.bootstrap).to_json()
        return results | {"architecture": architecture, "num_latents": sae.num_latents, "num_experts": sae.num_experts, "k": k}

    return {
        "evaluation": {"participation_ratio": participation_ratio(evaluation_set.x_TD), "source": source.describe()},
        "members": {
            name: score(sae, architecture_of(sae), sae.config.k) | {"parameters": sum(p.numel() for p in sae.parameters())}
            for name, sae in members.items()
        },
        "controls": {f"pca_{pca.k}": score(pca, "pca", pca.k), "untrained": score(untrained, architecture_of(untrained), untrained.config.k)},
    }


def prepare_downstream(config: EvaluationConfig, source: ActivationSource, evaluation_set: EvaluationSet) -> Downstream | None:
    """What measures delta CE and KL; None for activations without a language model, or when it is switched off."""
    if source.language_model is None or config.downstream_contexts == 0:
        return None
    return Downstream(source.language_model, evaluation_set, config.downstream_contexts)


def _default_name(config: RunConfig) -> str:
    experts = f"-e{config.sae.num_experts}" if isinstance(config.sae, SwitchSAE.Config) else ""
    return f"{architecture_of(config.sae)}{experts}-m{config.sae.num_latents}-k{config.sae.k}-s{config.seed}"


def _say_plan(config: RunConfig, trainers: dict[str, Trainer], source: ActivationSource, say: Callable[[str], None]) -> None:
    about = source.describe()
    told = {key: about[key] for key in ("model", "hook", "context_length") if key in about} | {"d_in": source.d_in}
    told |= {f"text {key}": about["text"][key] for key in ("kind", "documents", "rows_per_epoch") if key in about.get("text", {})}
    say(
        f"activations: {about['source']}, "
        + ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in told.items())
    )
    say(f"training on {config.total_steps * config.batch_size:,} activations in {config.total_steps:,} steps of {config.batch_size}")
    for name, trainer in trainers.items():
        sae, schedule = trainer.sae, trainer.schedule
        experts = f"{sae.num_experts} experts x {sae.num_latents // sae.num_experts}" if sae.num_experts > 1 else "dense"
        say(
            f"  {name}: {sae.num_latents} latents ({experts}), k={sae.config.k}, {sae.flops().total:,} FLOPs per token; lr {schedule.peak:.2e}, "
            f"warm-up {schedule.warmup_steps} steps, decay over the last {schedule.decay_steps}, dead after {trainer.dead_after_tokens:,} tokens"
            + (f"; {trainer.describe(config.batch_size)}" if sae.execution.is_triton else "")
        )
