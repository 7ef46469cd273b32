"""What all formats have in common: a dense SAE's weights in one form, from which ours are built and into which ours are written.

Shapes: M latents, D activation size.
"""

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from switch_sae.models import SAES, Inference, SparseAutoencoder

SMALLEST = torch.finfo(torch.float32).tiny
"""Stands for a threshold of 0 or less, of which ours keep the logarithm; nothing above 0 is smaller in normal numbers."""


@dataclass(frozen=True)
class DenseWeights:
    """f = act(W_enc (x - centre) + b_enc), recon = W_dec f + b_out, of raw activations; the centre is b_out or, if not `centred`, 0.

    act is what the architecture (a key of `SAES`) does in evaluation: the k largest of ReLU, ReLU, or what exceeds a threshold.
    """

    architecture: str
    W_enc_MD: Tensor
    W_dec_MD: Tensor
    b_enc_M: Tensor | None
    """A gated SAE's bias of the gates."""
    b_out_D: Tensor
    centred: bool
    k: int | None = None
    threshold: Tensor | None = None
    """[M] of a JumpReLU, [] where one is for all."""
    b_mag_M: Tensor | None = None
    r_mag_M: Tensor | None = None
    group_sizes: list[int] = field(default_factory=list)
    """Matryoshka's, which sum to M."""
    scale: float = 1.0
    """What raw activations are multiplied by before all this, and reconstructions divided by after it."""


@dataclass(frozen=True)
class _Form:
    """How an architecture of ours holds them."""

    centred: bool
    """Whether b_pre is subtracted before the encoder."""
    bias: str = "b_enc_M"
    settings: tuple[str, ...] = ()


_FORMS = {
    "topk": _Form(centred=True, settings=("k",)),
    "batch_topk": _Form(centred=True, settings=("k",)),
    "matryoshka": _Form(centred=True, settings=("k", "group_fractions")),
    "relu": _Form(centred=False),
    "gated": _Form(centred=True, bias="b_gate_M"),
    "jumprelu": _Form(centred=False),
}


def to_sae(weights: DenseWeights) -> SparseAutoencoder:
    """The same function as one of ours, in evaluation mode. Where it subtracts another centre than the file, the encoder's bias makes up for it."""
    form, (num_latents, d_in) = _FORMS[weights.architecture], weights.W_enc_MD.shape
    possible = {"k": weights.k, "group_fractions": fractions(weights.group_sizes)}
    settings = {name: possible[name] for name in form.settings}
    sae = SAES[weights.architecture](SAES[weights.architecture].Config(num_latents=num_latents, **settings), d_in)
    state = {"W_enc_MD": weights.W_enc_MD, "W_dec_MD": weights.W_dec_MD, "b_pre_D": weights.b_out_D, form.bias: _bias(weights, form)}
    state |= {name: value for name in ("b_mag_M", "r_mag_M") if (value := getattr(weights, name)) is not None}
    if weights.b_mag_M is not None:
        state["b_mag_M"] = weights.b_mag_M + (state[form.bias] - _own_bias(weights)) * weights.r_mag_M.exp()  # type: ignore[union-attr]
    if weights.threshold is not None:
        is_shared = weights.threshold.ndim == 0
        state["threshold" if is_shared else "log_threshold_M"] = weights.threshold if is_shared else weights.threshold.clamp_min(SMALLEST).log()
    state["activation_scale"] = torch.tensor(weights.scale)
    sae.load_state_dict(state)
    return sae.eval()


def of_sae(sae: SparseAutoencoder) -> DenseWeights:
    """A dense SAE's weights, with its activation scale folded in. Raises ValueError for one with experts, and for latents found by a search."""
    if why := why_not_dense(sae):
        raise ValueError(why)
    key = SAES.key_of(sae)
    form, folded = _FORMS[key], copy.deepcopy(sae)
    folded.fold_activation_scale()
    state = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in folded.state_dict().items()}
    threshold = state["log_threshold_M"].exp() if "log_threshold_M" in state else state["threshold"].clamp_min(0) if sae.by_threshold else None
    bias_M = state.get(form.bias, torch.zeros(sae.num_latents))
    sizes = list(getattr(sae.config, "group_sizes", []))
    return DenseWeights(
        key, state["W_enc_MD"], state["W_dec_MD"], bias_M, state["b_pre_D"], form.centred, sae.k, threshold,
        state.get("b_mag_M"), state.get("r_mag_M"), sizes,
    )  # fmt: skip


def why_not_dense(sae: SparseAutoencoder) -> str | None:
    """Why other libraries cannot compute it; None where they can."""
    key = next((key for key, cls in SAES.items() if cls is type(sae)), None)
    if key not in _FORMS:
        return (
            f"a {type(sae).__name__} is none of the architectures that other libraries compute: {', '.join(_FORMS)}. "
            "With --to sae_lens it becomes a plug-in of SAELens."
        )
    if sae.inference is not Inference.encoder:
        return (
            f"this SAE finds latents by {sae.inference.name}, which other libraries do not compute. "
            "With --to sae_lens it becomes a plug-in of SAELens; or write what its encoder finds: with_inference(sae, Inference.encoder)."
        )
    return None


def unit_norms(where: object, weights: DenseWeights) -> Tensor:
    """[M] norms of the decoder's rows, by which their library divides. Raises ValueError where one is 0."""
    norms_M = torch.linalg.vector_norm(weights.W_dec_MD, dim=1)
    if (norms_M == 0).any():
        raise ValueError(f"{where}: {int((norms_M == 0).sum())} decoder rows are 0; the library divides by their norm, and gives NaN for them.")
    return norms_M


def fold_whitening(weights: DenseWeights, mean_D: Tensor, matrix_DD: Tensor, inverse_DD: Tensor) -> DenseWeights:
    """The same function of x instead of (x - mean) matrix, with reconstructions times the inverse, plus the mean."""
    W_enc_MD = weights.W_enc_MD.double() @ matrix_DD.double().T
    b_enc_M = _own_bias(weights).double()
    b_mag_M = weights.b_mag_M
    if not weights.centred:
        moved_M = W_enc_MD @ mean_D.double()
        b_enc_M = b_enc_M - moved_M
        if b_mag_M is not None and weights.r_mag_M is not None:
            b_mag_M = (b_mag_M.double() - weights.r_mag_M.double().exp() * moved_M).float()
    return replace(
        weights,
        W_enc_MD=W_enc_MD.float(),
        W_dec_MD=(weights.W_dec_MD.double() @ inverse_DD.double()).float(),
        b_enc_M=b_enc_M.float(),
        b_mag_M=b_mag_M,
        b_out_D=(weights.b_out_D.double() @ inverse_DD.double() + mean_D.double()).float(),
    )


def fold_decoder_norms(weights: DenseWeights, norms_M: Tensor) -> DenseWeights:
    """The same reconstruction from decoder rows divided by these numbers and latents multiplied by them; a threshold for all is in the new units."""
    return replace(
        weights, W_enc_MD=weights.W_enc_MD * norms_M[:, None], W_dec_MD=weights.W_dec_MD / norms_M[:, None], b_enc_M=_own_bias(weights) * norms_M
    )


def fractions(group_sizes: list[int]) -> list[float]:
    """Shares of all but the last group that give these sizes back, rounded as Matryoshka's are."""
    total = sum(group_sizes)
    return [size / total if int(size / total * total) == size else (size + 1e-6) / total for size in group_sizes[:-1]]


def _own_bias(weights: DenseWeights) -> Tensor:
    return torch.zeros(len(weights.W_enc_MD)) if weights.b_enc_M is None else weights.b_enc_M


def _bias(weights: DenseWeights, form: _Form) -> Tensor:
    """b_enc + W_enc (centre of ours - centre of theirs)."""
    moved = int(form.centred) - int(weights.centred)
    if not moved:
        return _own_bias(weights)
    return (_own_bias(weights).double() + moved * (weights.W_enc_MD.double() @ weights.b_out_D.double())).float()
