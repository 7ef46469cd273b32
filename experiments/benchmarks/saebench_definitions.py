"""The numbers of SAEBench's core eval and of SAELens' `run_evals` by their definitions, computed by our code in float64.

Where they differ from ours, this is how: `experiments.benchmarks.saebench` compares what the libraries say with this. Shapes: T rows, C contexts, S
positions, D activation size, M latents.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from experiments.benchmarks.saebench_peer import CONTEXTS_PER_BATCH, Numbers
from switch_sae.activations.base import EvaluationSet
from switch_sae.interop.saebench import PeerSAE

DELTA = "ce_loss_with_sae - ce_loss_without_sae"
"""Made of two numbers of theirs, as it is one of ours."""
ABLATION = "zeros"
ROWS, CONTEXTS = 2048, 4
"""That are worked on together."""


class Predicts(Protocol):
    """What is needed of a language model."""

    def logits(self, tokens_CS: Tensor, replace: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """logits_CSV, with x_CSD at the hook replaced by replace(x_CSD) if given."""


def by_definition(
    peers: Mapping[str, PeerSAE], rows: EvaluationSet, model: Predicts, some_C: Tensor, ignored: list[int]
) -> dict[str, dict[str, Numbers]]:
    """By SAE and library, the names being theirs: of all rows in batches of contexts, and of the predictions in some contexts."""
    tokens_CS, keep_CS = rows.text()
    batch_CS = (torch.arange(len(tokens_CS)) // CONTEXTS_PER_BATCH)[:, None].expand_as(tokens_CS)
    predictions, found = of_predictions(peers, model, tokens_CS[some_C], ignored), {}
    for name, peer in peers.items():
        shared, by_library = of_rows(peer, rows.x_TD.cpu(), batch_CS[keep_CS])
        found[name] = {library: shared | predictions[name] | numbers for library, numbers in by_library.items()}
    return found


@torch.no_grad()
def of_rows(peer: PeerSAE, x_TD: Tensor, batch_T: Tensor) -> tuple[Numbers, dict[str, Numbers]]:
    """(what both libraries define alike, what each defines in its own way), of rows in batches."""
    parts, fired_M = [], torch.zeros(peer.cfg.d_sae, dtype=torch.float64)
    for part_TD in x_TD.split(ROWS):
        latents_TM = peer.encode(part_TD)
        x, recon = part_TD.double(), peer.decode(latents_TM).double()
        fired_M += (latents_TM != 0).sum(dim=0)
        of_part = (x.norm(dim=1), recon.norm(dim=1), (x * recon).sum(dim=1), (x - recon).square().sum(dim=1))
        parts.append(torch.stack([*of_part, (latents_TM != 0).sum(dim=1).double(), latents_TM.double().sum(dim=1)]))
    in_T, out_T, dot_T, error_T, l0_T, l1_T = torch.cat(parts, dim=1)
    x_TD = x_TD.double()
    size_B = batch_T.bincount().double()

    def of_batches(value_T: Tensor) -> Tensor:
        """Means over the rows of each batch."""
        return torch.zeros_like(size_B).index_add(0, batch_T, value_T) / size_B

    mean_BD = torch.zeros(len(size_B), x_TD.shape[1], dtype=torch.float64).index_add(0, batch_T, x_TD) / size_B[:, None]
    density_M = fired_M / len(x_TD)
    shared = {
        "explained_variance_legacy": (1 - error_T / (x_TD - mean_BD[batch_T]).square().sum(dim=1)).mean(),
        "cossim": (dot_T / (in_T * out_T)).mean(),
        "l2_norm_in": in_T.mean(),
        "l2_norm_out": out_T.mean(),
        "l2_ratio": (out_T / in_T).mean(),
        "relative_reconstruction_bias": (of_batches(out_T**2) / of_batches(dot_T)).mean(),
        "l0": l0_T.mean(),
        "l1": l1_T.mean(),
        "frac_alive": (density_M > 0).double().mean(),
        "freq_over_1_percent": (density_M > 0.01).double().mean(),
        "freq_over_10_percent": (density_M > 0.1).double().mean(),
    }
    variance = (x_TD - x_TD.mean(dim=0)).square().sum(dim=1).mean()
    # SAEBench takes the mean of squares for the mean of each dimension, then the mean of those over dimensions.
    mean_square = of_batches(in_T**2).mean()
    sae_bench = {
        "explained_variance": 1 - of_batches(error_T).mean() / (mean_square - (mean_square / x_TD.shape[1]) ** 2),
        "mse": (error_T / size_B[batch_T]).mean(),
        "normalized_freq_over_1_percent": density_M[density_M > 0.01].sum() / density_M.sum(),
        "normalized_freq_over_10_percent": density_M[density_M > 0.1].sum() / density_M.sum(),
        "average_max_encoder_cosine_sim": _largest_cosines(peer.W_enc.T.double()).mean(),
        "average_max_decoder_cosine_sim": _largest_cosines(peer.W_dec.double()).mean(),
    }
    sae_lens = {"explained_variance": 1 - error_T.mean() / variance, "mse": error_T.mean()}
    return _numbers(shared), {"sae-lens": _numbers(sae_lens), "sae-bench": _numbers(sae_bench)}


@torch.no_grad()
def of_predictions(peers: Mapping[str, PeerSAE], model: Predicts, tokens_CS: Tensor, ignored: list[int]) -> dict[str, Numbers]:
    """Cross-entropies of all positions that predict, and divergences of all positions, of tokens that are not ignored, where reconstructions stand.
    Ablation sets every position to zero. By SAE."""
    sums = dict[str, Tensor]()
    predictions = positions = 0
    for tokens in tokens_CS.long().split(CONTEXTS):
        kept = ~torch.isin(tokens, torch.tensor(ignored))
        predictions, positions = predictions + int(kept[:, :-1].sum()), positions + int(kept.sum())
        clean = model.logits(tokens).log_softmax(dim=-1)
        for name, replace in {"": None, ABLATION: torch.zeros_like, **{name: _splice(peer, kept) for name, peer in peers.items()}}.items():
            logprobs = clean if replace is None else model.logits(tokens, replace).log_softmax(dim=-1)
            entropy = -logprobs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0][kept[:, :-1]].sum(dtype=torch.float64)
            divergence = (clean.exp() * (clean - logprobs)).sum(dim=-1, dtype=torch.float64)[kept].sum()
            sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + torch.stack([entropy, divergence])
    means = {name: (total[0].item() / predictions, total[1].item() / positions) for name, total in sums.items()}
    (clean_ce, _), (ablated_ce, ablated_kl) = means[""], means[ABLATION]
    return {
        name: {
            "ce_loss_without_sae": clean_ce,
            "ce_loss_with_sae": means[name][0],
            "ce_loss_with_ablation": ablated_ce,
            "ce_loss_score": (ablated_ce - means[name][0]) / (ablated_ce - clean_ce),
            "kl_div_with_sae": means[name][1],
            "kl_div_with_ablation": ablated_kl,
            "kl_div_score": 1 - means[name][1] / ablated_kl,
            DELTA: means[name][0] - clean_ce,
        }
        for name in peers
    }


def _splice(peer: PeerSAE, kept_CS: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x_CSD: torch.where(kept_CS[..., None], peer(x_CSD).to(x_CSD), x_CSD)


def _largest_cosines(W_MD: Tensor) -> Tensor:
    """[M]: the largest cosine of each row with another."""
    unit_MD = torch.nn.functional.normalize(W_MD, dim=1)
    found = []
    for rows in torch.arange(len(W_MD)).split(ROWS):
        cosines = unit_MD[rows] @ unit_MD.T
        cosines[torch.arange(len(rows)), rows] = -1
        found.append(cosines.max(dim=1).values)
    return torch.cat(found)


def _numbers(tensors: dict[str, Tensor]) -> Numbers:
    return {name: tensor.item() for name, tensor in tensors.items()}
