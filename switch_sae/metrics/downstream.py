"""What a reconstruction does to the language model's predictions.

Shapes: C contexts, S positions, D activation size, V vocabulary, T predictions of a chunk.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from switch_sae.activations.base import EvaluationSet
from switch_sae.activations.language_model import Given
from switch_sae.metrics.base import DocumentMetric, check_finite, weighted_mean
from switch_sae.metrics.bootstrap import effective_documents
from switch_sae.metrics.forward import Evaluable, device_of, run
from switch_sae.rows import NormLimit

CHUNK_BYTES = 2**27
"""Most bytes of float32 logits that one chunk of contexts may have, unless a single context has more. Of such logits at most four copies are alive at
once: what the model gives, in its own precision and in float32, and log-probabilities of the clean and of the spliced run. Fixed, so that results do
not depend on the caller."""
MOST_CONTEXTS = 4
"""In a chunk."""
_SLICE_ELEMENTS = 2**20
"""Logits that are worked on together: what fits into a CPU's cache."""


class LanguageModelLike(Protocol):
    """What splicing needs of a language model."""

    def logits(self, tokens_CS: Tensor, replace: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """logits_CSV, with x_CSD at the hook point, of transcoders the target's, replaced by replace(x_CSD) if given."""


@dataclass(frozen=True)
class PredictionBatch:
    """Next-token predictions, each with its cross-entropy (nats) under the clean model and with the hook point replaced."""

    clean_T: Tensor
    spliced_T: Tensor
    """Reconstructions in place of activations."""
    spliced_inliers_T: Tensor
    """The same, but rows that are outliers are left as they are."""
    zero_T: Tensor
    mean_T: Tensor
    kl_T: Tensor
    """KL(clean || spliced)."""
    kl_inliers_T: Tensor
    document_T: Tensor


class DownstreamLoss(DocumentMetric[PredictionBatch]):
    """Cross-entropy (CE, nats per prediction, means over predictions) with reconstructions spliced in at the kept positions.

    delta_ce = ce_spliced - ce_clean; kl = KL(clean || spliced) over the vocabulary; delta_ce_inliers and kl_inliers are the same where rows of more
    than 10 median norms are left as they are: what is lost beside outliers. loss_recovered_zero = (ce_zero - ce_spliced) / (ce_zero - ce_clean),
    where ce_zero is the CE with zeros at every position of the context, kept or not (the convention of SAEBench and SAELens), and loss_recovered_mean
    the same with the mean of all evaluation rows at the kept positions alone. Zeros in a residual stream are worse than most guesses, so
    loss_recovered_zero is near 1 for any SAE: prefer delta_ce and kl.

    Counted are the predictions of the token at s + 1 made at position s, wherever both positions were kept: special tokens and padding are neither
    spliced nor predicted.
    """

    def rows(self, batch: PredictionBatch) -> dict[str, Tensor]:
        return {
            "clean": batch.clean_T,
            "spliced": batch.spliced_T,
            "spliced_inliers": batch.spliced_inliers_T,
            "zero": batch.zero_T,
            "mean": batch.mean_T,
            "kl": batch.kl_T,
            "kl_inliers": batch.kl_inliers_T,
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
            "delta_ce_inliers": (totals["spliced_inliers"] - clean) / rows,
            "kl_inliers": totals["kl_inliers"] / rows,
            "loss_recovered_zero": (zero - spliced) / (zero - clean),
            "loss_recovered_mean": (mean - spliced) / (mean - clean),
        }


@dataclass
class _Chunk:
    """Some contexts, and what is known of them once they have been run."""

    tokens_CS: Tensor
    keep_CS: Tensor
    counted_CS: Tensor
    outlier_CS: Tensor
    document_T: Tensor
    x_CSD: Tensor | None = None
    """Where reconstructions go."""
    input_CSD: Tensor | None = None
    """What SAEs read at kept positions, where it is something else."""
    ablated: tuple[Tensor, Tensor, Tensor] | None = None
    """CE of the clean run, with zeros and with the mean, [T] each."""
    clean_logprobs_TV: Tensor | None = None
    """While they fit into the cache."""


class Downstream:
    """The clean and ablated predictions of a language model on some contexts of an evaluation set: made once, shared by all SAEs.

    Takes at most `max_contexts` contexts, evenly spaced so that they come from many documents, in chunks of `CHUNK_BYTES`. The activations of the
    clean run are kept, so that every other run begins at the hook where the model can (`LanguageModel.logits`); clean log-probabilities (needed for
    KL) are kept while they fit into `cache_bytes` and made again for each call of `predictions` otherwise: the numbers are the same, the time is not.

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
        self.effective_documents = effective_documents(document_T.bincount())
        self.num_predictions = len(document_T)
        vocabulary = self._check_rows(tokens_CS, keep_CS)
        rows = evaluation_set.rows
        target_TD = rows.target_TD.cpu()
        self._mean_D = weighted_mean(target_TD, torch.ones(len(target_TD), dtype=torch.float64))
        outlier_CS = torch.zeros_like(keep_CS)
        outlier_CS[keep_CS] = ~NormLimit.of(rows).inlier_T(rows).cpu()
        self._cache_bytes = cache_bytes
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        """By ablation: what stood at the hook in one context, [S, D], and the logits that it gave, [S, V]."""
        self._is_blind: bool | None = None
        """Whether logits follow from what stands at the hook alone; None before two contexts could be compared."""
        self._chunks: list[_Chunk] = []
        size = max(1, min(MOST_CONTEXTS, CHUNK_BYTES // (4 * tokens_CS.shape[1] * vocabulary)))
        at_hook_CSD, input_CSD = evaluation_set.at_hook(), None if evaluation_set.target_TD is None else evaluation_set.inputs()
        for part in self.contexts.split(size):
            predictions = int(counted_CS[part].sum())
            x_CSD = None if at_hook_CSD is None else at_hook_CSD[part]
            read_CSD = None if input_CSD is None else input_CSD[part]
            self._chunks.append(
                _Chunk(tokens_CS[part], keep_CS[part], counted_CS[part], outlier_CS[part], document_T[:predictions], x_CSD, input_CSD=read_CSD)
            )
            document_T = document_T[predictions:]

    @torch.no_grad()
    def predictions(
        self, saes: Mapping[str, Evaluable], failed: Callable[[str, Exception], None] | None = None
    ) -> Iterator[dict[str, PredictionBatch]]:
        """The counted predictions with each SAE's reconstructions spliced in, chunk by chunk, the language model's own runs shared by all.

        Raises ValueError when a reconstruction is not finite; with `failed`, that SAE is left out from there on and `failed` is told (name, error).
        """
        left = dict(saes)
        for chunk in self._chunks:
            clean_TV = self._clean(chunk)
            assert chunk.ablated is not None
            clean_T, zero_T, mean_T = chunk.ablated
            batches = {}
            for name, sae in list(left.items()):
                try:
                    spliced_T, kl_T = self._compare(chunk, clean_TV, sae, chunk.keep_CS)
                    has_outliers = bool((chunk.outlier_CS & chunk.keep_CS).any())
                    inliers = self._compare(chunk, clean_TV, sae, chunk.keep_CS & ~chunk.outlier_CS) if has_outliers else (spliced_T, kl_T)
                except Exception as error:  # one SAE that cannot be run must not stop the others
                    if failed is None:
                        raise
                    del left[name]
                    failed(name, error)
                    continue
                batches[name] = PredictionBatch(clean_T, spliced_T, inliers[0], zero_T, mean_T, kl_T, inliers[1], chunk.document_T)
            yield batches

    def __len__(self) -> int:
        """How many chunks `predictions` goes through."""
        return len(self._chunks)

    def _clean(self, chunk: _Chunk) -> Tensor:
        """clean_logprobs_TV; the first time also what else is known of a chunk."""
        if chunk.clean_logprobs_TV is not None:
            return chunk.clean_logprobs_TV
        if chunk.x_CSD is None:
            logits_CSV, chunk.x_CSD = self._logits_and_activations(chunk.tokens_CS)
        else:
            logits_CSV = self.model.logits(chunk.tokens_CS, Given(chunk.x_CSD))
            chunk.x_CSD = chunk.x_CSD.to(logits_CSV.device)
        clean_TV, x_CSD = _logprobs(logits_CSV, chunk.counted_CS), chunk.x_CSD
        if chunk.ablated is not None:
            return clean_TV
        del logits_CSV
        mean_CSD = x_CSD.clone()
        mean_CSD[chunk.keep_CS.to(x_CSD.device)] = self._mean_D.to(x_CSD)
        zero_T, mean_T = (self._ablated(name, chunk, at_hook) for name, at_hook in (("zero", torch.zeros_like(x_CSD)), ("mean", mean_CSD)))
        chunk.ablated = _cross_entropy(clean_TV, chunk.tokens_CS, chunk.counted_CS), zero_T, mean_T
        self._cache_bytes -= clean_TV.nbytes
        chunk.clean_logprobs_TV = clean_TV if self._cache_bytes >= 0 else None
        return clean_TV

    def _ablated(self, name: str, chunk: _Chunk, x_CSD: Tensor) -> Tensor:
        """CE of the counted predictions with `x_CSD` at the hook, which says nothing of the text: contexts in which it is the same have the same
        logits, and are not run again. Zeros at every position show whether that holds; for a model that looks at tokens after the hook too, all are
        run."""
        known = self._known.get(name)
        if self._is_blind and known is not None and all(torch.equal(x_SD, known[0]) for x_SD in x_CSD):
            logits_CSV = known[1].expand(len(x_CSD), -1, -1)
        else:
            logits_CSV = self.model.logits(chunk.tokens_CS, Given(x_CSD))
            if self._is_blind is None and name == "zero" and (known is not None or len(x_CSD) > 1):
                self._is_blind = torch.allclose(logits_CSV, logits_CSV[:1] if known is None else known[1], rtol=1e-4, atol=1e-4)
            if all(torch.equal(x_SD, x_CSD[0]) for x_SD in x_CSD):
                self._known[name] = x_CSD[0].clone(), logits_CSV[0].clone()
        return _cross_entropy(_logprobs(logits_CSV, chunk.counted_CS), chunk.tokens_CS, chunk.counted_CS)

    def _compare(self, chunk: _Chunk, clean_TV: Tensor, sae: Evaluable, splice_CS: Tensor) -> tuple[Tensor, Tensor]:
        """(CE, KL to the clean run) of every counted prediction with reconstructions at the positions of `splice_CS`."""
        assert chunk.x_CSD is not None
        spliced_CSD, splice = chunk.x_CSD.clone(), splice_CS.to(chunk.x_CSD.device)
        x_TD = chunk.x_CSD[splice] if chunk.input_CSD is None else chunk.input_CSD[splice_CS.to(chunk.input_CSD.device)]
        recon_TD = run(sae, x_TD.to(device_of(sae), self.evaluation_set.x_TD.dtype)).recon_TD
        check_finite("reconstruction", recon_TD)
        spliced_CSD[splice] = recon_TD.to(spliced_CSD)
        logits_CSV = self.model.logits(chunk.tokens_CS, Given(spliced_CSD))
        target_T = _targets(chunk.tokens_CS, chunk.counted_CS).to(logits_CSV.device)
        cross_entropies, divergences = [], []
        for part, logprobs in _log_softmax(logits_CSV, chunk.counted_CS):
            clean = clean_TV[part]
            divergences.append((clean.exp() * (clean - logprobs)).sum(dim=1, dtype=torch.float64).cpu())
            cross_entropies.append(-logprobs.gather(1, target_T[part, None])[:, 0].double().cpu())
        return torch.cat(cross_entropies), torch.cat(divergences)

    @torch.no_grad()
    def _logits_and_activations(self, tokens_CS: Tensor) -> tuple[Tensor, Tensor]:
        caught: list[Tensor] = []

        def catch(x_CSD: Tensor) -> Tensor:
            caught.append(x_CSD)
            return x_CSD

        return self.model.logits(tokens_CS, catch), caught[0]

    def _check_rows(self, tokens_CS: Tensor, keep_CS: Tensor) -> int:
        """The size of the vocabulary. Raises ValueError where the model's activations are not the evaluation rows."""
        first = self.contexts[:1]
        logits_CSV, x_CSD = self._logits_and_activations(tokens_CS[first])
        start = int(keep_CS[: int(first)].sum())
        ours = x_CSD[keep_CS[first].to(x_CSD.device)].double().cpu()
        theirs = self.evaluation_set.rows.target_TD[start : start + len(ours)].double().cpu()
        # Another batch shape changes the last bits, a bfloat16 model about 1 %; another hook point or model changes everything.
        if ours.shape != theirs.shape or float((ours - theirs).norm()) > 0.05 * float(theirs.norm()):
            raise ValueError(
                f"the evaluation rows of context {int(first)}, {tuple(theirs.shape)}, are not this model's activations there, {tuple(ours.shape)}. "
                "Prepare Downstream with the language model and the hook point that made the evaluation set."
            )
        return logits_CSV.shape[-1]


def _log_softmax(logits_CSV: Tensor, counted_CS: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(which of the counted predictions, their log-probabilities, at least float32), slice by slice. Raises ValueError for any that is not finite."""
    logits_NV = logits_CSV.flatten(0, 1)
    counted_T = counted_CS.flatten().nonzero()[:, 0].to(logits_NV.device)
    size = max(1, _SLICE_ELEMENTS // logits_NV.shape[1])
    for start in range(0, len(counted_T), size):
        part = slice(start, start + size)
        logits = logits_NV[counted_T[part]]
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
        if not bool(logprobs.sum(dim=1).isfinite().all()):
            check_finite("language model's log-probabilities", logprobs)
        yield part, logprobs


def _logprobs(logits_CSV: Tensor, counted_CS: Tensor) -> Tensor:
    """[T, V]."""
    return torch.cat([logprobs for _, logprobs in _log_softmax(logits_CSV, counted_CS)])


def _targets(tokens_CS: Tensor, counted_CS: Tensor) -> Tensor:
    """The next token of each counted position."""
    return tokens_CS.roll(-1, dims=1)[counted_CS].long()


def _cross_entropy(logprobs_TV: Tensor, tokens_CS: Tensor, counted_CS: Tensor) -> Tensor:
    """-log p(next token) of each counted position, on the CPU in float64."""
    target_T = _targets(tokens_CS, counted_CS).to(logprobs_TV.device)
    return -logprobs_TV.gather(1, target_T[:, None])[:, 0].double().cpu()
