"""Scoring SAEs and controls on shared held-out rows, and the one place that writes their results."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from switch_kernels import PYTORCH, Execution
from switch_sae.activations import ActivationSource, EvaluationSet, SyntheticSource
from switch_sae.analysis.linear import LinearBaseline
from switch_sae.analysis.pca import PCABaseline, participation_ratio
from switch_sae.analysis.recovery import recovery_scores
from switch_sae.config import HALF, EvaluationConfig
from switch_sae.evaluation import GroupResults, Probes, evaluate, evaluate_group
from switch_sae.files import Say, tell
from switch_sae.memory import peak_bytes, state_bytes
from switch_sae.metrics import Downstream
from switch_sae.metrics.forward import Evaluable
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.models.inference import Inference, why_no_inference, with_inference
from switch_sae.models.threshold import calibrate, has_threshold
from switch_sae.plain import to_plain
from switch_sae.rows import NormLimit, Rows
from switch_sae.runs import RunDir
from switch_sae.training import Trainer

Entry = dict[str, Any]
"""What results.json says of one SAE or control."""
INFERENCE = "inference"
"""The role of a trained SAE that is scored once more, under another inference than its own: the same weights, so that it cost the same training."""


@dataclass(frozen=True)
class Asked:
    """An SAE or control to be scored."""

    name: str
    sae: Evaluable
    about: Entry
    """What results.json says of it beside its scores."""


class Scorer:
    """Scores SAEs and controls on the same held-out rows, which are made once, with the same language model behind delta CE and KL."""

    def __init__(self, config: EvaluationConfig, source: ActivationSource, say: Say = tell, search: Execution = PYTORCH) -> None:
        """`search` computes refits and pursuit: what trained them should, so that a run that is scored later has the same numbers."""
        self.config, self.source, self.say, self.search = config, source, say, search
        self.evaluation_set = source.evaluation_set(config.rows)
        halves = self.evaluation_set.halves() if config.calibrate else None
        self.calibration_rows: Rows | None = None
        """Held-out rows that set thresholds and of which nothing is reported; None where thresholds stay as trained."""
        if halves is not None:
            self.calibration_rows, self.evaluation_set = halves[0].rows, halves[1]
        self.downstream, self.left_out = prepare_downstream(config, source, self.evaluation_set)
        self.probes = Probes(self.evaluation_set, halves) if config.probes else None
        rows = self.evaluation_set.rows
        self.about = {
            "participation_ratio": participation_ratio(NormLimit.of(rows).inliers(rows).target_TD),
            "participation_ratio_all_rows": participation_ratio(rows.target_TD),
            "source": source.describe(),
            "left_out": self.left_out,
            **({} if self.calibration_rows is None else {HALF: "B"}),
        }
        self._told: set[str] = set()

    def group(self, asked: Sequence[Asked], failed: Callable[[str, Exception], None] | None = None) -> "Scored":
        """Scores all of them in one pass. With `failed`, one that cannot be scored is left out, and told (name, error)."""
        for each in asked:
            if isinstance(each.sae, SparseAutoencoder):
                each.sae.search = self.search
        asked = self._calibrated(asked, failed)
        saes = {each.name: each.sae for each in asked}
        # Untrained controls are not probed: how stable or readable random latents are answers no question that is worth several more passes.
        probed = [each.name for each in asked if "role" in each.about]
        scores = evaluate_group(saes, self.evaluation_set, self.downstream, self.config.bootstrap, failed, self.say, self.probes, probed)
        entries = {each.name: scores.results[each.name].to_json() | each.about for each in asked if each.name in scores.results}
        if isinstance(self.source, SyntheticSource):
            for each in asked:
                if each.name in entries and isinstance(each.sae, SparseAutoencoder):
                    row_T = self.evaluation_set.document_T  # every synthetic row is a document
                    entries[each.name]["recovery"] = recovery_scores(each.sae, self.source, self.evaluation_set.rows, row_T)
        return Scored(entries, scores)

    def under_inferences(self, of: Asked) -> list[Asked]:
        """A trained SAE under each of `config.inferences` that is not its own, as NAME+INFERENCE; says, once each, why one is left out."""
        asked = []
        assert isinstance(of.sae, SparseAutoencoder)
        for inference in self.config.inferences:
            if inference is of.sae.inference:
                continue
            if reason := why_no_inference(of.sae, inference):
                line = f"no scores of {of.about['architecture']} under {inference.name}: {reason}"
                if line not in self._told:
                    self.say(line)
                self._told.add(line)
                continue
            about = of.about | {"role": INFERENCE, "inference": inference.name}
            asked.append(Asked(f"{of.name}+{inference.name}", with_inference(of.sae, inference), about))
        return asked

    def _calibrated(self, asked: Sequence[Asked], failed: Callable[[str, Exception], None] | None) -> list[Asked]:
        """Those that have a threshold with one of their own, set on the rows for it; the SAEs that were given keep theirs."""
        if (rows := self.calibration_rows) is None:
            return list(asked)
        ready = []
        for each in asked:
            try:
                ready.append(_at_k(each, rows))
            except ValueError as error:  # no threshold gives that L0
                if failed is None:
                    raise
                failed(each.name, error)
        return ready

    def controls(self, main: SparseAutoencoder, untrained_main: SparseAutoencoder, calibration: Rows, prefix: str) -> list[Asked]:
        """PCA of rank k, of a transcoder linear regression of rank k and of full rank, and the main SAE as it was before training; their names begin
        with `prefix`.

        Where the main SAE has no k, PCA gets as many components as it has active latents per token on average.
        """
        k = main.k or max(1, round(evaluate(main, self.evaluation_set, bootstrap=0)["l0"].value))
        about = _sizes(untrained_main, SAES.key_of(main), main.k) | {"inference": untrained_main.inference.name}
        return [*linear_controls(calibration, k, prefix), Asked(f"{prefix}untrained", untrained_main, about)]

    def write(self, run: RunDir, file: str, **parts: Any) -> None:
        """The results of one folder, whole or not at all: those of `Scored.of_folder`, and what else is known of its training."""
        run.write_json(file, {"evaluation": self.about, **parts})


@dataclass(frozen=True)
class Scored:
    """What a group of SAEs scored."""

    entries: dict[str, Entry]
    """By the names that were asked for."""
    _scores: GroupResults

    def of_folder(self, keys: Mapping[str, str], training: Mapping[str, Entry], prefix: str) -> dict[str, dict[str, Any]]:
        """`members`, `controls` and `ratios` of one folder's results.json. `keys` are those in the folder by names in the group, the main SAE first;
        `training` says by key what it cost; names of its controls begin with `prefix`.
        """
        keys = {f"{name}{end}": f"{key}{end}" for end in ("", *(f"+{i.name}" for i in Inference)) for name, key in keys.items()}
        members = {}
        for name, key in keys.items():
            if name in self.entries:
                entry, of = self.entries[name], key.partition("+")[0]
                known = {what: value for what, value in training[of].items() if what not in entry and what != "threshold"}
                members[key] = entry | ({"of": of} if key != of else {}) | known
        controls = {name.removeprefix(prefix): entry for name, entry in self.entries.items() if name.startswith(prefix)}
        return {"members": members, "controls": controls, "ratios": self._ratios(next(iter(keys)), keys | {prefix + name: name for name in controls})}

    def _ratios(self, main: str, names: Mapping[str, str]) -> dict[str, Any]:
        """Of `main` to all others of the folder, each under the name that it has there (`GroupResults.ratios`)."""
        if main not in self.entries:
            return {}
        ratios = self._scores.ratios(main, names)
        return to_plain({key: {name: asdict(e) for name, e in ratios[other].items()} for other, key in names.items() if other in ratios})


def trained(name: str, sae: SparseAutoencoder, role: str) -> Asked:
    """A trained SAE, by what it is in its folder: `main` or `baseline`."""
    parameters, inference = sum(p.numel() for p in sae.parameters()), sae.inference.name
    return Asked(name, sae, _sizes(sae, SAES.key_of(sae), sae.k) | {"role": role, "parameters": parameters, "inference": inference})


def _at_k(asked: Asked, rows: Rows) -> Asked:
    """With a threshold, if it has one, at which the mean L0 of these rows is k, in a shallow copy. Raises ValueError as `calibrate` does."""
    if not isinstance(asked.sae, SparseAutoencoder) or not has_threshold(asked.sae):
        return asked
    sae = copy.copy(asked.sae)  # weights and caches are shared, buffers are not: calibration writes into one
    sae._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in asked.sae._buffers.items()}
    trained, l0 = sae.get_buffer("threshold").item(), calibrate(sae, rows)
    told = {"trained": trained, "calibrated": sae.get_buffer("threshold").item(), "l0": l0}
    return replace(asked, sae=sae, about=asked.about | {"threshold": told})


def linear_controls(calibration: Rows, k: int, prefix: str = "") -> list[Asked]:
    """The control that a rank-k PCA of the calibration rows is, by its name; none of full rank, which would be perfect. For a transcoder, which may
    not look at its target, regression on its input: through k numbers per token, and whole, which is what its skip path could do alone."""
    if calibration.target_TD is not calibration.x_TD:
        full = min(calibration.x_TD.shape[1], calibration.target_TD.shape[1])
        fits = {rank: LinearBaseline.regress(calibration, rank) for rank in sorted({min(k, full), full})}
        return [Asked(f"{prefix}linear_{rank}", fit, _sizes(fit, "linear", rank)) for rank, fit in fits.items()]
    if k >= calibration.x_TD.shape[1]:
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
