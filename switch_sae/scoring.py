"""Scoring SAEs and controls on shared held-out rows, and the one place that writes their results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from switch_sae.activations import ActivationSource, EvaluationSet, SyntheticSource
from switch_sae.analysis.pca import PCABaseline, participation_ratio
from switch_sae.analysis.recovery import recovery_scores
from switch_sae.config import EvaluationConfig
from switch_sae.evaluation import GroupResults, Probes, evaluate, evaluate_group
from switch_sae.files import Say, tell
from switch_sae.memory import peak_bytes, state_bytes
from switch_sae.metrics import Downstream
from switch_sae.metrics.forward import Evaluable
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.plain import to_plain
from switch_sae.rows import NormLimit, Rows
from switch_sae.runs import RunDir
from switch_sae.training import Trainer

Entry = dict[str, Any]
"""What results.json says of one SAE or control."""


@dataclass(frozen=True)
class Asked:
    """An SAE or control to be scored."""

    name: str
    sae: Evaluable
    about: Entry
    """What results.json says of it beside its scores."""


class Scorer:
    """Scores SAEs and controls on the same held-out rows, which are made once, with the same language model behind delta CE and KL."""

    def __init__(self, config: EvaluationConfig, source: ActivationSource, say: Say = tell) -> None:
        self.config, self.source, self.say = config, source, say
        self.evaluation_set = source.evaluation_set(config.rows)
        self.downstream, self.left_out = prepare_downstream(config, source, self.evaluation_set)
        self.probes = Probes(self.evaluation_set) if config.probes else None
        rows = self.evaluation_set.rows
        self.about = {
            "participation_ratio": participation_ratio(NormLimit.of(rows).inliers(rows).target_TD),
            "participation_ratio_all_rows": participation_ratio(rows.target_TD),
            "source": source.describe(),
            "left_out": self.left_out,
        }

    def group(self, asked: Sequence[Asked], failed: Callable[[str, Exception], None] | None = None) -> "Scored":
        """Scores all of them in one pass. With `failed`, one that cannot be scored is left out, and told (name, error)."""
        saes = {each.name: each.sae for each in asked}
        # Untrained controls are not probed: how stable or readable random latents are answers no question that is worth several more passes.
        probed = [each.name for each in asked if "role" in each.about]
        scores = evaluate_group(saes, self.evaluation_set, self.downstream, self.config.bootstrap, failed, self.say, self.probes, probed)
        entries = {each.name: scores.results[each.name].to_json() | each.about for each in asked if each.name in scores.results}
        if isinstance(self.source, SyntheticSource):
            for each in asked:
                if each.name in entries and isinstance(each.sae, SparseAutoencoder):
                    entries[each.name]["recovery"] = recovery_scores(each.sae, self.source, self.evaluation_set.rows)
        return Scored(entries, scores)

    def controls(self, main: SparseAutoencoder, untrained_main: SparseAutoencoder, calibration: Rows, prefix: str) -> list[Asked]:
        """PCA of rank k, and the main SAE as it was before training; their names begin with `prefix`.

        Where the main SAE has no k, PCA gets as many components as it has active latents per token on average.
        """
        k = main.k or max(1, round(evaluate(main, self.evaluation_set, bootstrap=0)["l0"].value))
        return [*pca(calibration, k, prefix), Asked(f"{prefix}untrained", untrained_main, _sizes(untrained_main, SAES.key_of(main), main.k))]

    def write(self, run: RunDir, file: str, members: Mapping[str, Entry], controls: Mapping[str, Entry], **more: Any) -> None:
        """The results of one folder, whole or not at all; `more` is what else is known of its training."""
        run.write_json(file, {"evaluation": self.about, "members": members, "controls": controls, **more})


@dataclass(frozen=True)
class Scored:
    """What a group of SAEs scored."""

    entries: dict[str, Entry]
    """By the names that were asked for."""
    _scores: GroupResults

    def ratios(self, main: str, others: Mapping[str, str]) -> dict[str, Any]:
        """Of `main` to the others, each under the name that `others` gives it (`GroupResults.ratios`)."""
        if main not in self.entries:
            return {}
        ratios = self._scores.ratios(main)
        return to_plain({key: {name: asdict(e) for name, e in ratios[other].items()} for other, key in others.items() if other in ratios})


def trained(name: str, sae: SparseAutoencoder, role: str) -> Asked:
    """A trained SAE, by what it is in its folder: `main` or `baseline`."""
    return Asked(name, sae, _sizes(sae, SAES.key_of(sae), sae.k) | {"role": role, "parameters": sum(p.numel() for p in sae.parameters())})


def pca(calibration: Rows, k: int, prefix: str = "") -> list[Asked]:
    """The control that a rank-k PCA of the calibration rows is, by its name; none of full rank, which would be perfect, and none for a transcoder,
    which may not look at its target."""
    if calibration.target_TD is not calibration.x_TD or k >= calibration.x_TD.shape[1]:
        return []
    control = PCABaseline.fit(calibration.x_TD, k)
    return [Asked(f"{prefix}pca_{k}", control, _sizes(control, "pca", k))]


def _sizes(sae: Evaluable, architecture: str, k: int | None) -> Entry:
    return {"architecture": architecture, "num_latents": sae.num_latents, "num_experts": sae.num_experts, "k": k}


def prepare_downstream(config: EvaluationConfig, source: ActivationSource, evaluation_set: EvaluationSet) -> tuple[Downstream | None, dict[str, str]]:
    """(what measures delta CE and KL, why not): None with a reason for a language model without predictions, None without one where nothing else
    could be expected: activations without a language model, or when it is switched off."""
    if source.language_model is None or config.downstream_contexts == 0:
        return None, {}
    if reason := source.language_model.why_no_predictions():
        return None, {"delta CE": reason}
    return Downstream(source.language_model, evaluation_set, config.downstream_contexts), {}


def training_facts(trainer: Trainer, wall_seconds: float | None, group_size: int) -> Entry:
    """What training one SAE cost.

    `train_seconds` are its own steps. `wall_seconds` is the whole group's time from start to the end of training, activations included; None after a
    resume, where nobody watched all of it. `peak_bytes` is the most that the process has held so far, whatever else it trained.
    """
    tokens, seconds = trainer.steps_done * trainer.batch_size, trainer.seconds
    return {
        "tokens": tokens,
        "train_tokens_per_second": tokens / seconds,
        "train_seconds": seconds,
        "wall_seconds": wall_seconds,
        "group_size": group_size,
        "state_bytes": state_bytes(trainer),
        "peak_bytes": peak_bytes(trainer.tokens_since_fired_M.device),
    }
