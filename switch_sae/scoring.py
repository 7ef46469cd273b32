"""Scoring SAEs and controls on shared held-out rows, and the one place that writes their results."""

from collections.abc import Mapping
from typing import Any

from switch_sae.activations import ActivationSource, EvaluationSet
from switch_sae.analysis.pca import PCABaseline, participation_ratio
from switch_sae.config import EvaluationConfig
from switch_sae.evaluation import evaluate
from switch_sae.memory import peak_bytes, state_bytes
from switch_sae.metrics import Downstream
from switch_sae.metrics.forward import Evaluable
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.rows import Rows
from switch_sae.runs import RunDir
from switch_sae.training import Trainer

Entry = dict[str, Any]
"""What results.json says of one SAE or control."""


class Scorer:
    """Scores SAEs and controls on the same held-out rows, which are made once, with the same language model behind delta CE and KL."""

    def __init__(self, config: EvaluationConfig, source: ActivationSource) -> None:
        self.config = config
        self.evaluation_set = source.evaluation_set(config.rows)
        self.downstream = prepare_downstream(config, source, self.evaluation_set)
        self.about = {"participation_ratio": participation_ratio(self.evaluation_set.rows.target_TD), "source": source.describe()}

    def __call__(self, sae: Evaluable, architecture: str, k: int | None) -> Entry:
        results = evaluate(sae, self.evaluation_set, self.downstream, self.config.bootstrap).to_json()
        return results | {"architecture": architecture, "num_latents": sae.num_latents, "num_experts": sae.num_experts, "k": k}

    def member(self, sae: SparseAutoencoder, role: str) -> Entry:
        """A trained SAE, by what it is in its folder: `main` or `baseline`."""
        return self(sae, SAES.key_of(sae), sae.k) | {"role": role, "parameters": sum(p.numel() for p in sae.parameters())}

    def pca(self, calibration: Rows, k: int) -> dict[str, Entry]:
        """The control that a rank-k PCA of the calibration rows is, by its name; none for a transcoder, which may not look at its target."""
        if calibration.target_TD is not calibration.x_TD:
            return {}
        pca = PCABaseline.fit(calibration.x_TD, min(k, calibration.x_TD.shape[1]))
        return {f"pca_{pca.k}": self(pca, "pca", pca.k)}

    def controls(self, main: Entry, untrained: SparseAutoencoder, calibration: Rows) -> dict[str, Entry]:
        """PCA of rank k, and the main SAE as it was before training.

        Where the main SAE has no k, PCA gets as many components as it has active latents per token on average.
        """
        k = main["k"] or max(1, round(main["metrics"]["l0"]["value"]))
        return {**self.pca(calibration, k), "untrained": self(untrained, SAES.key_of(untrained), untrained.k)}

    def write(self, run: RunDir, file: str, members: Mapping[str, Entry], controls: Mapping[str, Entry], **more: Any) -> None:
        """The results of one folder, whole or not at all; `more` is what else is known of its training."""
        run.write_json(file, {"evaluation": self.about, "members": members, "controls": controls, **more})


def prepare_downstream(config: EvaluationConfig, source: ActivationSource, evaluation_set: EvaluationSet) -> Downstream | None:
    """What measures delta CE and KL; None for activations without a language model, or when it is switched off."""
    if source.language_model is None or config.downstream_contexts == 0:
        return None
    return Downstream(source.language_model, evaluation_set, config.downstream_contexts)


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
