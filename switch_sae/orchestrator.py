"""One run: a main SAE with its baselines, trained on one stream, scored, resumed, scored again."""

import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from switch_sae.activations.base import both_known
from switch_sae.cohort import BASELINE, MAIN, Cohort, Interrupted, Keeper, Member, Streams, untrained_controls
from switch_sae.config import RunConfig, check_baselines, config_from_plain, config_to_plain
from switch_sae.files import Say, tell
from switch_sae.invocation import invocation
from switch_sae.models import SAES
from switch_sae.models.baselines import Baseline, baseline_config, usual_baselines
from switch_sae.plain import to_plain
from switch_sae.runs import TRAINING_FILE, RunDir, environment, load_sae
from switch_sae.scoring import INFERENCE, trained
from switch_sae.wandb_logger import check_wandb


class _RunKeeper(Keeper):
    """A run's: it remembers how far training came."""

    step: int | None = None
    """The last one that was taken; None before the first."""

    def reached(self, step: int) -> None:
        self.step = step


def run_training(config: RunConfig, say: Say = tell) -> RunDir:
    """Trains an SAE with its baselines, evaluates and saves them in a new run folder. Raises Interrupted after a signal, with everything saved."""
    check_baselines(config)
    check_wandb(config.wandb)
    run = RunDir.create(config.runs, config.name or f"{config.sae.slug()}-s{config.seed}")
    return _run(replace(config, baselines=_chosen_baselines(config)), run, say)


def resume_training(path: str | Path, say: Say = tell) -> RunDir:
    """Goes on with an interrupted run, exactly (`RunDir.resume_step`). A finished one is only reported."""
    run = RunDir.open(path)
    config = config_from_plain(run.read_json("config.json"))
    run.remove_part_files()
    if (run.path / "results.json").is_file():
        run.finish()
        say(f"{run.path} is finished; nothing to do.")
        return run
    if (run.path / TRAINING_FILE).is_file():
        say(f"{run.path} is trained and not scored yet.")
        score_again(run, config, "results.json", say)
        return run
    step = run.resume_step(config.checkpoint_every)
    say(f"resuming {run.path} from step {step} of {config.total_steps}" + ("" if step else ": it has no checkpoint, so it starts over"))
    check_wandb(config.wandb)
    then, now = run.read_json("environment.json"), environment()
    for what in ("torch_threads", "gpu"):
        if then[what] != now[what]:
            say(f"note: {what} was {then[what]} and is {now[what]}: the result can differ in the last bits from an uninterrupted run.")
    if then["versions"]["torch"] != now["versions"]["torch"]:
        say(f"note: torch was {then['versions']['torch']} and is {now['versions']['torch']}: the result can differ in the last bits.")
    if (numba := then["versions"].get("numba")) != now["versions"]["numba"] and "numba" in then["versions"]:
        say(f"note: numba was {numba} and is {now['versions']['numba']}: what pursuit finds can differ in the last bits.")
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
        elif (run.path / TRAINING_FILE).is_file():
            say(
                "training is finished and saved; only scoring failed. Score it again, if need be with other settings: "
                f"{invocation('evaluate', run=run.path)}"
            )
        elif keeper.step is not None:
            resume = invocation("train", resume=run.path)
            say(f"stopped after step {keeper.step} of {config.total_steps}. When the cause is mended, go on with: {resume}")
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


def score_again(run: RunDir, config: RunConfig, file: str, say: Say = tell, streams: Streams | None = None) -> None:
    """Scores all SAEs of a trained run and its controls by `config` and writes `file`, results.json or one beside it; what training cost is kept.

    With `streams` runs on one source share its held-out rows, and what was prepared to score them. A sweep's member has no controls of its own.

    Says so where the activations are others than those of training. Raises FileNotFoundError for a run whose training is not finished.
    """
    if (run.path / "results.json").is_file():
        before = run.read_json("results.json")
        then = before["evaluation"]["source"]
    else:
        before = run.read_json(TRAINING_FILE)
        then = before["source"]
    with nullcontext(streams) if streams is not None else Streams(say) as streams:
        stream = streams.get(config)
        score = streams.score(config)
        now, then = both_known(to_plain(stream.source.describe()), then)
        changed = sorted(key for key in now.keys() | then.keys() if key not in ("device", "cache") and now.get(key) != then.get(key))
        if changed:
            say(f"note: these are not the activations of training; {', '.join(changed)} changed (another language model, text or Python version).")
        main = main_member(run, config)
        roles = {key: (MAIN if key == main.key else BASELINE) for key, entry in before["members"].items() if entry.get("role") != INFERENCE}
        saes = {key: load_sae((run if role == MAIN else run.member(key)).path).to(stream.device) for key, role in roles.items()}
        asked = [trained(key, saes[key], role) for key, role in roles.items()]
        further = [each for trained_sae in asked for each in score.under_inferences(trained_sae)]
        controls = [] if before.get("controls") == {} else untrained_controls(score, main, saes[main.key], stream, " ")
        scored = score.group([*asked, *further, *controls])
        kept = ("mixing", "outliers", "seconds") if file == "results.json" else ("outliers",)
        more = {key: before[key] for key in kept if key in before}
        score.write(run, file, **scored.of_folder({key: key for key in saes}, before["members"], " "), **more)
    if file == "results.json":
        run.finish()
