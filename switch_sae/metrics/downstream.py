"""What a reconstruction does to the language model's predictions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from switch_sae.activations.base import EvaluationSet
from switch_sae.metrics.base import DocumentMetric, check_finite, weighted_mean
from switch_sae.metrics.forward import Evaluable, device_of, run

CONTEXTS_PER_CHUNK = 4
"""Bounds the logits held at once: 4 contexts of 128 tokens and 50k words are 100 MB. Fixed, so that results do not depend on the caller."""


class LanguageModelLike(Protocol):
    """What splicing needs of a language model."""

    def activations(self, tokens_CS: Tensor) -> Tensor:
        """x_CSD at the hook point."""

    def logits(self, tokens_CS: Tensor, replace: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """logits_CSV, with x_CSD at the hook point replaced by replace(x_CSD) if given."""


@dataclass(frozen=True)
class PredictionBatch:
    """Next-token predictions, each with its cross-entropy (nats) under the clean model and with the hook point replaced."""

    clean_T: Tensor
    spliced_T: Tensor
    """Reconstructions in place of activations."""
    zero_T: Tensor
    mean_T: Tensor
    kl_T: Tensor
    """KL(clean || spliced)."""
    document_T: Tensor


class DownstreamLoss(DocumentMetric[PredictionBatch]):
    """Cross-entropy (CE, nats per prediction, means over predictions) with reconstructions spliced in at the kept positions.

    delta_ce = ce_spliced - ce_clean; kl = KL(clean || spliced) over the vocabulary; loss_recovered_zero = (ce_zero - ce_spliced) / (ce_zero -
    ce_clean), where ce_zero is the CE with zeros at the same positions (the convention of SAEBench and SAELens), and loss_recovered_mean the same
    with the mean of all evaluation rows. Zeros in a residual stream are worse than a uniform guess (CE 17.4 for GPT-2), so loss_recovered_zero is
    near 1 for any SAE: prefer delta_ce and kl.

    Counted are the predictions of the token at s + 1 made at position s, wherever both positions were kept: special tokens and padding are neither
    spliced nor predicted.
    """

    def rows(self, batch: PredictionBatch) -> dict[str, Tensor]:
        return {
            "clean": batch.clean_T,
            "spliced": batch.spliced_T,
            "zero": batch.zero_T,
            "mean": batch.mean_T,
            "kl": batch.kl_T,
            "rows": torch.ones(len(batch.clean_T)),
        }

    def ratios(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        clean, spliced, zero, mean, rows = (totals[name] for name in ("clean", "spliced", "zero", "mean", "rows"))
        return {
            "ce_clean": clean / rows,
            "ce_spliced": spliced / rows,
            "ce_zero": zero / rows,
            "ce_mean": mean / rows,
            "delta_ce": (spliced - clean) / rows,
            "kl": totals["kl"] / rows,
            "loss_recovered_zero": (zero - spliced) / (zero - clean),
            "loss_recovered_mean": (mean - spliced) / (mean - clean),
        }


@dataclass(frozen=True)
class _Chunk:
    tokens_CS: Tensor
    keep_CS: Tensor
    counted_CS: Tensor
    document_T: Tensor
    clean_T: Tensor
    zero_T: Tensor
    mean_T: Tensor
    clean_logprobs_TV: Tensor | None


class Downstream:
    """The clean and ablated predictions of a language model on some contexts of an evaluation set: made once, shared by all SAEs.

    Takes at most `max_contexts` contexts, evenly spaced so that they come from many documents. Clean log-probabilities (needed for KL) are kept while
    they fit into `cache_bytes` and made again for each SAE otherwise: the numbers are the same, the time is not.

    Raises ValueError for an evaluation set without text, without a single prediction, or whose rows are not this model's activations.
    """

    def __init__(self, model: LanguageModelLike, evaluation_set: EvaluationSet, max_contexts: int = 64, cache_bytes: int = 2**29) -> None:
        tokens_CS, keep_CS = evaluation_set.text()
        if max_contexts < 1:
            raise ValueError(f"max_contexts={max_contexts} must be at least 1.")
        self.model = model
        self.evaluation_set = evaluation_set
        counted_CS = torch.zeros_like(keep_CS)
        counted_CS[:, :-1] = keep_CS[:, :-1] & keep_CS[:, 1:]
        useful_C = counted_CS.any(dim=1).nonzero()[:, 0]
        if len(useful_C) == 0:
            raise ValueError("no two kept positions follow each other, so there is no token to predict. Keep whole contexts of at least 3 tokens.")
        number = min(max_contexts, len(useful_C))
        self.contexts = useful_C[torch.arange(number) * (len(useful_C) - 1) // max(1, number - 1)]
        """Indices of the contexts used, ascending."""
        document_CS = torch.full(tokens_CS.shape, -1, dtype=torch.int64)
        document_CS[keep_CS] = evaluation_set.document_T.cpu()
        documents, document_T = document_CS[self.contexts][counted_CS[self.contexts]].unique(return_inverse=True)
        self.num_documents = len(documents)
        """Documents that the predictions come from."""
        self.num_predictions = len(document_T)
        self._check_rows(tokens_CS, keep_CS)
        target_TD = evaluation_set.rows.target_TD.cpu()
        mean_D = weighted_mean(target_TD, torch.ones(len(target_TD), dtype=torch.float64))
        self._chunks: list[_Chunk] = []
        for rows in self.contexts.split(CONTEXTS_PER_CHUNK):
            predictions = int(counted_CS[rows].sum())
            chunk = self._prepare(tokens_CS[rows], keep_CS[rows], counted_CS[rows], document_T[:predictions], mean_D)
            document_T = document_T[predictions:]
            assert chunk.clean_logprobs_TV is not None
            cache_bytes -= chunk.clean_logprobs_TV.nbytes
            self._chunks.append(chunk if cache_bytes >= 0 else replace(chunk, clean_logprobs_TV=None))

    @torch.no_grad()
    def predictions(self, sae: Evaluable) -> Iterator[PredictionBatch]:
        """The counted predictions with the SAE's reconstructions spliced in. Raises ValueError when a reconstruction is not finite."""
        device, dtype = device_of(sae), self.evaluation_set.x_TD.dtype

        def reconstruct(x_TD: Tensor) -> Tensor:
            recon_TD = run(sae, x_TD.to(device, dtype)).recon_TD
            check_finite("reconstruction", recon_TD)
            return recon_TD.to(x_TD)

        for chunk in self._chunks:
            clean = self._logprobs(chunk.tokens_CS, chunk.counted_CS, None) if chunk.clean_logprobs_TV is None else chunk.clean_logprobs_TV
            spliced = self._logprobs(chunk.tokens_CS, chunk.counted_CS, _splice(reconstruct, chunk.keep_CS))
            kl_T = (clean.exp() * (clean - spliced)).sum(dim=1, dtype=torch.float64).cpu()
            spliced_T = _cross_entropy(spliced, chunk.tokens_CS, chunk.counted_CS)
            yield PredictionBatch(chunk.clean_T, spliced_T, chunk.zero_T, chunk.mean_T, kl_T, chunk.document_T)

    @torch.no_grad()
    def _prepare(self, tokens_CS: Tensor, keep_CS: Tensor, counted_CS: Tensor, document_T: Tensor, mean_D: Tensor) -> _Chunk:
        clean = self._logprobs(tokens_CS, counted_CS, None)
        zero = self._logprobs(tokens_CS, counted_CS, _splice(torch.zeros_like, keep_CS))
        mean = self._logprobs(tokens_CS, counted_CS, _splice(lambda x_TD: mean_D.to(x_TD).expand_as(x_TD), keep_CS))
        clean_T, zero_T, mean_T = (_cross_entropy(logprobs, tokens_CS, counted_CS) for logprobs in (clean, zero, mean))
        return _Chunk(tokens_CS, keep_CS, counted_CS, document_T, clean_T, zero_T, mean_T, clean)

    def _logprobs(self, tokens_CS: Tensor, counted_CS: Tensor, splice: Callable[[Tensor], Tensor] | None) -> Tensor:
        """[predictions, V], at least float32."""
        logits_CSV = self.model.logits(tokens_CS, splice)
        logits_TV = logits_CSV[counted_CS.to(logits_CSV.device)]
        logprobs_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(dim=1)
        check_finite("language model's log-probabilities", logprobs_TV)
        return logprobs_TV

    def _check_rows(self, tokens_CS: Tensor, keep_CS: Tensor) -> None:
        first = self.contexts[:1]
        with torch.no_grad():
            x_CSD = self.model.activations(tokens_CS[first])
        start = int(keep_CS[: int(first)].sum())
        ours = x_CSD[keep_CS[first].to(x_CSD.device)].double().cpu()
        theirs = self.evaluation_set.x_TD[start : start + len(ours)].double().cpu()
        # Another batch shape changes the last bits, a bfloat16 model about 1 %; another hook point or model changes everything.
        if ours.shape != theirs.shape or float((ours - theirs).norm()) > 0.05 * float(theirs.norm()):
            raise ValueError(
                f"the evaluation rows of context {int(first)}, {tuple(theirs.shape)}, are not this model's activations there, {tuple(ours.shape)}. "
                "Prepare Downstream with the language model and the hook point that made the evaluation set."
            )


def _splice(fill: Callable[[Tensor], Tensor], keep_CS: Tensor) -> Callable[[Tensor], Tensor]:
    """A replacement that applies `fill` to the rows at kept positions and leaves the others (special tokens, position 0) alone."""

    def splice(x_CSD: Tensor) -> Tensor:
        keep = keep_CS.to(x_CSD.device)
        spliced_CSD = x_CSD.clone()
        spliced_CSD[keep] = fill(x_CSD[keep])
        return spliced_CSD

    return splice


def _cross_entropy(logprobs_TV: Tensor, tokens_CS: Tensor, counted_CS: Tensor) -> Tensor:
    """-log p(next token) of each counted position, on the CPU in float64."""
    next_CS = tokens_CS.roll(-1, dims=1)
    target_T = next_CS[counted_CS].long().to(logprobs_TV.device)
    return -logprobs_TV.gather(1, target_T[:, None])[:, 0].double().cpu()
