"""The contract of every source of activations, and the fixed rows that everything is evaluated on."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from switch_sae.rows import Rows


@dataclass(frozen=True)
class EvaluationSet:
    """Fixed, shared evaluation rows: the same for every SAE that is compared."""

    x_TD: Tensor
    """Raw activations, float32, in reading order."""
    document_T: Tensor
    """Which document each row comes from, int64: the unit of the bootstrap."""
    tokens_CS: Tensor | None = None
    """The contexts the rows come from, token ids; None for synthetic activations."""
    keep_CS: Tensor | None = None
    """Which positions became rows: `activations(tokens_CS)[keep_CS]` is `x_TD`."""
    document_names: tuple[str, ...] = ()
    """Names by document number."""
    target_TD: Tensor | None = None
    """What each row must become; None for an autoencoder's rows, which must become themselves."""
    dropped_TD: Tensor | None = None
    """What stands at the other positions of the hook that reconstructions replace, `activations(tokens_CS)[~keep_CS]` for an autoencoder: with it a
    language model can go on from there without running what comes before; None where unknown."""

    @property
    def rows(self) -> Rows:
        """Rows and targets."""
        return Rows.of(self.x_TD, self.target_TD)

    def text(self) -> tuple[Tensor, Tensor]:
        """tokens_CS and keep_CS, on the CPU. Raises ValueError where there is no text, and where it does not fit the rows."""
        if self.tokens_CS is None or self.keep_CS is None:
            raise ValueError(
                "this evaluation set has no text, as with synthetic activations: nothing can be spliced or read. "
                "Evaluate without downstream, or give one made from a language model."
            )
        tokens_CS, keep_CS = self.tokens_CS.cpu(), self.keep_CS.cpu().bool()
        if keep_CS.shape != tokens_CS.shape or int(keep_CS.sum()) != len(self.x_TD):
            raise ValueError(
                f"keep_CS {tuple(keep_CS.shape)} with {int(keep_CS.sum())} kept positions does not fit tokens_CS {tuple(tokens_CS.shape)} and "
                f"{len(self.x_TD)} rows: keep_CS must have one entry per token and mark exactly the positions that became rows."
            )
        return tokens_CS, keep_CS

    def at_hook(self) -> Tensor | None:
        """What stands where reconstructions go, targets or x themselves, at every position, kept or not; None where the others are not known."""
        if self.tokens_CS is None or self.keep_CS is None or self.dropped_TD is None:
            return None
        target_TD = self.rows.target_TD
        x_CSD = target_TD.new_empty(*self.tokens_CS.shape, target_TD.shape[1])
        x_CSD[self.keep_CS], x_CSD[~self.keep_CS] = target_TD, self.dropped_TD
        return x_CSD

    def inputs(self) -> Tensor | None:
        """What an SAE reads at every kept position, 0 at the others, [C, S, D]; None without text."""
        if self.tokens_CS is None or self.keep_CS is None:
            return None
        x_CSD = self.x_TD.new_zeros(*self.tokens_CS.shape, self.x_TD.shape[1])
        x_CSD[self.keep_CS] = self.x_TD
        return x_CSD

    def subset(self, documents: Tensor) -> Self:
        """The rows of these documents, as an evaluation set of its own: document numbers and names stay, contexts without a row are left out, and
        positions of other documents are no longer kept."""
        chosen_T = torch.isin(self.document_T, documents.to(self.document_T))
        target_TD = None if self.target_TD is None else self.target_TD[chosen_T]
        part = replace(self, x_TD=self.x_TD[chosen_T], document_T=self.document_T[chosen_T], target_TD=target_TD)
        if self.tokens_CS is None or self.keep_CS is None:
            return part
        keep_CS = torch.zeros_like(self.keep_CS)
        keep_CS[self.keep_CS] = chosen_T.to(keep_CS.device)
        context_C = keep_CS.any(dim=1)
        dropped_TD = None
        if (x_CSD := self.at_hook()) is not None:
            dropped_TD = x_CSD[context_C][~keep_CS[context_C]]
        return replace(part, tokens_CS=self.tokens_CS[context_C], keep_CS=keep_CS[context_C], dropped_TD=dropped_TD)

    def halves(self) -> tuple[Self, Self]:
        """(A, B), by `halves_of_documents`.

        Documents are never cut: rows of one are alike, and what is chosen on A must not know B. Raises ValueError for a single document.
        """
        documents, size_N = self.document_T.cpu().unique(return_counts=True)
        if len(documents) < 2:
            raise ValueError(f"{len(documents)} document cannot be split into two halves by document. Evaluate on more rows.")
        half_N = halves_of_documents(size_N)
        return self.subset(documents[half_N == 0]), self.subset(documents[half_N == 1])


def halves_of_documents(size_N: Tensor) -> Tensor:
    """[N] 0 (A) or 1 (B) by the documents' numbers of rows: from the largest to the smallest, each to the half that has fewer rows so far, to A where
    both have as many."""
    filled, half_N = [0, 0], torch.empty(len(size_N), dtype=torch.int64)
    for n in size_N.argsort(descending=True, stable=True).tolist():
        half_N[n] = half = int(filled[1] < filled[0])
        filled[half] += int(size_N[n])
    return half_N


class ActivationSource(ABC):
    """An endless, deterministic stream of batches of raw activations.

    `next(source)` gives `Rows`: x_TD [batch, d_in] and target_TD, float32; for an autoencoder both are one tensor. Two sources with the same config
    give the same rows, bit for bit.
    """

    Config: type[Any]
    """Its settings, a dataclass nested in its class."""
    d_in: int
    language_model: Any = None
    """The `LanguageModel` behind the activations, for metrics that run it; None where there is none."""

    def __iter__(self) -> "ActivationSource":
        return self

    @abstractmethod
    def __next__(self) -> Rows: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values; loading it makes the next batch the one that would have come."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def evaluation_set(self, rows: int) -> EvaluationSet:
        """At least one, at most `rows` held-out rows, never part of the training stream, the same on every call and for every training seed."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What made these activations (model, hook, text, scale of the stream), as plain JSON values for the run folder."""

    def mixing(self) -> dict[str, float]:
        """How well batches mix documents so far; empty where there are no documents."""
        return {}

    @property
    def rate(self) -> float | None:
        """Rows per second that it made so far; None where nobody measures."""
        return None

    def close(self) -> None:  # noqa: B027 - most sources have nothing to stop
        """Stops background work."""


def differences(saved: dict[str, Any], mine: dict[str, Any], words: tuple[str, str] = ("saved", "now")) -> str:
    """What two descriptions disagree on, as `seed: saved 0, now 1; ...`; empty where they are equal."""
    keys = sorted(key for key in {*saved, *mine} if saved.get(key) != mine.get(key))
    return "; ".join(f"{key}: {words[0]} {saved.get(key)!r}, {words[1]} {mine.get(key)!r}" for key in keys)


_ADDED_LATER = ("training_text", "held_out_text", "dataset")
"""Parts of an identity that states of earlier versions lack and that may be unknown: they tell streams apart only where both sides know them."""


def both_known(saved: dict[str, Any], mine: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two descriptions without those parts of the text's identity that one of them does not know."""
    unknown = {key for key in _ADDED_LATER if saved.get(key) is None or mine.get(key) is None}
    saved, mine = ({key: value for key, value in about.items() if key not in unknown} for about in (saved, mine))
    return saved, mine


def check_same_stream(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises ValueError where a saved stream was made of something else: its place means nothing in this one."""
    if differs := differences(*both_known(saved, mine)):
        hub = "dataset: saved 'revision" in differs
        moved = " A dataset of the hub is read as it was with text.dataset_revision=REVISION (in config.json, to resume)." if hub else ""
        raise ValueError(f"this source cannot go on where the saved one stopped; they differ in {differs}. Restore these, or start a new run.{moved}")
