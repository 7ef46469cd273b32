"""A text of one's own, token by token: which expert takes each token, which latents fire, and where else they fire most."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from switch_sae.activations.base import EvaluationSet
from switch_sae.activations.document import Document
from switch_sae.activations.language_model import LanguageModel, Precision
from switch_sae.activations.tokens import tokenize
from switch_sae.analysis.text_examples import Example, format_example, top_examples
from switch_sae.metrics.forward import run
from switch_sae.models import SparseAutoencoder


@dataclass(frozen=True)
class Active:
    """A latent that fires on a token."""

    latent: int
    value: float
    """In units of scaled activations; of raw ones for an SAE that was loaded with fold=True."""
    expert: int | None
    """None for an SAE without experts, and for latents that all experts share."""


@dataclass(frozen=True)
class TokenSeen:
    """One token of a prompt."""

    text: str
    token_id: int
    experts: tuple[int, ...]
    """Best first; empty for an SAE without experts."""
    latents: tuple[Active, ...]
    """The strongest, strongest first."""
    error: float
    """||target - recon||^2 / ||target||^2; the target of an autoencoder is x."""
    was_trained_on: bool
    """Whether tokens at such a place were: the first position and special tokens may have been left out."""


@dataclass(frozen=True)
class Inspection:
    """What an SAE sees in a prompt. Printed, it is a table."""

    tokens: tuple[TokenSeen, ...]
    examples: dict[int, list[Example]]
    """By latent: the contexts of the evaluation set where it fires most; empty without one."""

    def __str__(self) -> str:
        lines = []
        for place, token in enumerate(self.tokens):
            experts = f"  expert {', '.join(map(str, token.experts))}" if token.experts else ""
            note = "" if token.was_trained_on else "  (such places were not trained on)"
            lines.append(f"{place:>4}  {token.text!r:<16}{experts}  error {token.error:.3f}{note}")
            lines.append("      " + "  ".join(f"{active.latent}: {active.value:.2f}" for active in token.latents))
        for latent, examples in self.examples.items():
            lines += ["", f"latent {latent}", *(format_example(example) for example in examples)]
        return "\n".join(lines)


def language_model(sae: SparseAutoencoder, device: str | None = None) -> LanguageModel:
    """The language model and hook that an SAE was trained on, a transcoder's target hook too, loaded once.

    A function and no method of SAEs: architectures know nothing of language models (docs/rooms.md).
    Raises ValueError for an SAE of other activations, and where the model under that name has other weights than in training.
    """
    about = sae.activations
    if about.get("source") != "language_model":
        raise ValueError(
            f"this SAE was trained on {about.get('source', 'activations that nothing is known of')}, not on a language model's. Give one."
        )
    model = _loaded(about["model"], about["hook"], device, Precision(about.get("precision", Precision.float32.value)), about.get("target_hook"))
    if about.get("model_fingerprint") not in (None, model.fingerprint):
        raise ValueError(
            f"the model {about['model']!r} has other weights (fingerprint {model.fingerprint}) than the one that this SAE was trained on "
            f"({about['model_fingerprint']}). Restore that one, or give a language model of your own."
        )
    return model


@lru_cache(maxsize=2)
def _loaded(name: str, hook: str, device: str | None, precision: Precision, target_hook: str | None) -> LanguageModel:
    return LanguageModel(name, hook, device, precision, target_hook)


@torch.no_grad()
def inspect(
    sae: SparseAutoencoder,
    text: str,
    top: int = 5,
    model: LanguageModel | None = None,
    evaluation_set: EvaluationSet | None = None,
    examples: int = 3,
) -> Inspection:
    """The experts and the `top` strongest latents of every token of a text.

    `model` is that of the SAE's training unless one is given; a transcoder needs one with its target hook. With an evaluation set of text
    (`source_of(row).evaluation_set(20_000)`), also the `examples` contexts in which each of these latents fires most. Raises ValueError for a text
    without tokens or longer than the model takes.
    """
    model = language_model(sae) if model is None else model
    tokens = [token for part in tokenize([Document("prompt", text)], model.tokenizer, model.d_vocab) for token in part.tolist()]
    if not tokens:
        raise ValueError(f"the text {text!r} has no tokens. Give a few words.")
    begins = sae.activations.get("prepend_bos", model.prepends_bos) and model.bos_token_id is not None
    tokens = [model.bos_token_id, *tokens] if begins else tokens
    x_SD, target_SD = (rows[0].to(sae.device) for rows in model.activations_and_targets(torch.tensor([tokens])))
    output = run(sae, x_SD)
    error_S = (target_SD - output.recon_TD).square().sum(1) / target_SD.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    values_SM, seen = output.latents.to_dense(), []
    for place, token in enumerate(tokens):
        experts = () if output.routing is None else tuple(output.routing.expert_TS[place].tolist())
        strongest = _strongest(sae, values_SM[place], top)
        left_out = (place == 0 and sae.activations.get("drop_first_position", False)) or (
            token in model.special_token_ids and sae.activations.get("drop_special_tokens", False)
        )
        seen.append(TokenSeen(model.tokenizer.decode([token]), token, experts, strongest, float(error_S[place]), not left_out))
    fired = list(dict.fromkeys(active.latent for one in seen for active in one.latents))
    where = {} if evaluation_set is None else top_examples(sae, evaluation_set, fired, model.tokenizer.decode, examples)
    return Inspection(tuple(seen), where)


def _strongest(sae: SparseAutoencoder, values_M: torch.Tensor, top: int) -> tuple[Active, ...]:
    best = values_M.topk(min(top, len(values_M)))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return tuple(Active(latent, value, _expert(sae, latent)) for value, latent in pairs if value > 0)


def _expert(sae: SparseAutoencoder, latent: int) -> int | None:
    return None if not sae.is_routed or latent < sae.num_shared else (latent - sae.num_shared) // sae.latents_per_expert
