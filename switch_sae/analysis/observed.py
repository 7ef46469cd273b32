"""What trained SAEs do with the same held-out activations: the raw material of analyses that need rows.

Shapes: T rows, D activation size, E experts, S experts per token, K slots of latents. Everything is on the CPU.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switch_sae.activations.base import ActivationSource, halves_of_documents
from switch_sae.countdown import Countdown
from switch_sae.files import Say, tell
from switch_sae.metrics.forward import sae_outputs
from switch_sae.models import Inference, Latents, Routing, SparseAutoencoder, SparseLatents
from switch_sae.results.rows import ResultRow, grouped, other_activations
from switch_sae.rows import Rows, Shapes

POOL = 4
"""Rows are every fourth context of four times as many, so that they come from more documents: intervals and permutations live on these."""


HOW_MANY = ("evaluation rows", "predictions", "half of the documents")
"""Parts of `evaluated_on` that say how much an SAE was scored on, not what."""


@dataclass(frozen=True, repr=False)
class Sample(Shapes):
    """Held-out rows that all SAEs of an analysis see, the same on every call."""

    rows: Rows
    """Raw activations and their targets."""
    document_T: Tensor
    """The document of each row, int64 from 0 to `num_documents` - 1: the unit of intervals and permutations."""
    context_T: Tensor
    """The context (window of text) of each row, int64. Rows of one context follow each other in reading order."""
    position_T: Tensor
    """Place in its context, int64."""
    token_T: Tensor | None
    """Token ids; None for activations without text."""
    previous_T: Tensor | None
    """The token before, -1 at a context's start; None for activations without text."""

    @property
    def num_documents(self) -> int:
        return int(self.document_T.max()) + 1

    def __len__(self) -> int:
        return len(self.rows)

    def halves(self) -> tuple[Tensor, Tensor]:
        """(row numbers of documents A, those of B): what is fitted or paired on A is scored on B. Whole documents (`halves_of_documents`). Raises
        ValueError for a single document."""
        size_N = self.document_T.bincount(minlength=self.num_documents)
        if len(size_N) < 2:
            raise ValueError("all rows come from one document, so nothing can be fitted on some documents and scored on others. Ask for more rows.")
        half_T = halves_of_documents(size_N)[self.document_T]
        return (half_T == 0).nonzero()[:, 0], (half_T == 1).nonzero()[:, 0]


@dataclass(frozen=True, repr=False)
class Seen(Shapes):
    """One SAE on a sample's rows."""

    row: ResultRow
    sae: SparseAutoencoder
    latents: SparseLatents
    """As `encode` gives them: the gate is inside the values."""
    recon_TD: Tensor
    """In the units of the raw targets."""
    routing: Routing | None
    """None for SAEs without experts."""

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def expert_M(self) -> Tensor:
        """[M] int64: the expert of each latent, -1 for shared ones; all 0 without experts."""
        own_M = torch.arange(self.row.num_latents - self.row.num_shared) // self.row.latents_per_expert
        return torch.cat([torch.full((self.row.num_shared,), -1), own_M])

    def expert_T(self) -> Tensor:
        """The expert of each row, the likeliest of several, int64. Raises ValueError for an SAE without experts."""
        if self.routing is None:
            raise ValueError(f"{self.name} has no experts, so its rows have no route. Give an SAE with a router.")
        return self.routing.expert_TS[:, 0]

    def ungated(self) -> SparseLatents:
        """The latents before the gate: values over the gate of their expert. The same object where there is none, as where values are those of least
        squares; shared latents have no gate."""
        if self.routing is None or self.sae.inference is not Inference.encoder:
            return self.latents
        expert_TK = self.expert_M[self.latents.indices_TK]
        gate_TK = torch.ones_like(self.latents.values_TK)
        for expert_T, gate_T in zip(self.routing.expert_TS.T, self.routing.gate_TS.T, strict=True):
            gate_TK = torch.where(expert_TK == expert_T[:, None], gate_T[:, None], gate_TK)
        return SparseLatents(self.latents.values_TK / gate_TK, self.latents.indices_TK, self.latents.num_latents)


def sample_of(source: ActivationSource, rows: int) -> Sample:
    """At most `rows` held-out rows of many documents, the same on every call. Raises ValueError for rows < 2."""
    if rows < 2:
        raise ValueError(f"rows={rows} leaves nothing to compare. Use 20000.")
    known = source.evaluation_set(rows if source.language_model is None else POOL * rows)
    if known.tokens_CS is None:
        document_T = known.document_T.cpu().unique(return_inverse=True)[1]
        place_T = torch.arange(len(document_T))
        return Sample(known.rows.to("cpu"), document_T, document_T, place_T, None, None)
    tokens_CS, keep_CS = known.text()
    context_T, position_T = keep_CS.nonzero(as_tuple=True)
    chosen_T = (context_T % POOL == 0).nonzero()[:rows, 0]
    context_T, position_T = context_T[chosen_T], position_T[chosen_T]
    previous_T = tokens_CS[context_T, (position_T - 1).clamp(min=0)].masked_fill(position_T == 0, -1)
    document_T = known.document_T.cpu()[chosen_T].unique(return_inverse=True)[1]
    return Sample(
        known.rows[chosen_T.to(known.x_TD.device)].to("cpu"), document_T, context_T, position_T, tokens_CS[context_T, position_T], previous_T
    )


def saw_other_activations(saes: Sequence[ResultRow]) -> dict[str, str]:
    """By name, in what the activations of an SAE differ from the first one's; those that saw the same are left out."""
    read = [{key: value for key, value in row.evaluated_on.items() if key not in HOW_MANY} for row in saes]
    return {row.name: differs for row, where in zip(saes, read, strict=True) if (differs := other_activations(read[0], where))}


def observe(saes: Sequence[ResultRow], source: ActivationSource | None, rows: int, say: Say = tell) -> tuple[Sample, list[Seen]]:
    """The sample and what every SAE makes of it, in the order given.

    Raises ValueError where SAEs were trained on other activations than the first: codes of other inputs cannot be compared. And as `check_series`.
    """
    if source is None:
        raise ValueError("this analysis needs activations, but no source was given. Give open_source.")
    for name, differs in saw_other_activations(saes).items():
        raise ValueError(f"{saes[0].name} and {name} saw other activations ({differs}), so nothing of them can be compared. Give runs of one source.")
    check_series(saes)
    sample = sample_of(source, rows)
    ahead = Countdown("encoding", len(saes) * len(sample), "rows", say)
    seen = []
    for n, row in enumerate(saes):
        sae = row.load()
        width = sample.rows.x_TD.shape[1]
        if sae.d_in != width:
            raise ValueError(f"{row.name} reads activations of size {sae.d_in}, these have {width}. Give runs of one source.")
        seen.append(_seen(row, sae, sample, lambda done, n=n: ahead(n * len(sample) + done)))
    return sample, seen


def _seen(row: ResultRow, sae: SparseAutoencoder, sample: Sample, progress: Any) -> Seen:
    latents, recons, routings = [], [], []
    for chosen, _, output in sae_outputs(sae, sample.rows):
        latents.append(sparse(output.latents.cpu()))
        recons.append(output.recon_TD.cpu())
        if output.routing is not None:
            routings.append([part.cpu() for part in (output.routing.expert_TS, output.routing.gate_TS, output.routing.probs_TE)])
        progress(chosen.stop)
    width = max(part.values_TK.shape[1] for part in latents)
    values_TK, indices_TK = (torch.cat([_widened(getattr(part, name), width) for part in latents]) for name in ("values_TK", "indices_TK"))
    routing = Routing(*(torch.cat(parts) for parts in zip(*routings, strict=True))) if routings else None
    return Seen(row, sae, SparseLatents(values_TK, indices_TK, sae.num_latents), torch.cat(recons), routing)


def sparse(latents: Latents) -> SparseLatents:
    """The same latents with as many slots as the token with most active ones needs."""
    if isinstance(latents, SparseLatents):
        return latents
    values_TM = latents.to_dense()
    slots = max(1, int((values_TM != 0).sum(1).max()))
    indices_TK = values_TM.abs().topk(slots, dim=1).indices
    return SparseLatents(values_TM.gather(1, indices_TK), indices_TK, latents.num_latents)


def _widened(tensor_TK: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor_TK, (0, width - tensor_TK.shape[1]))


def series(row: ResultRow) -> str:
    """What repetitions with other seeds are called together: the name without its date and its seed."""
    return series_name(row.name)


def series_name(name: str) -> str:
    """The same of a name alone, such as a record's."""
    return re.sub(r"-s\d+(?=$|/)", "", re.sub(r"^\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_", "", name))


def check_series(saes: Sequence[ResultRow]) -> None:
    """Raises ValueError where two SAEs would be taken for repetitions of each other and are not: names tell kinds apart, in figures too."""
    for name, alike in grouped(saes, series).items():
        first, *others = alike
        for other in others:
            if differs := sorted(key for key in first.settings.keys() | other.settings.keys() if first.settings.get(key) != other.settings.get(key)):
                raise ValueError(
                    f"{first.name} and {other.name} would both be called {name}, but have other settings ({', '.join(differs[:4])}). Rename one of "
                    "their folders, or train them in one sweep, which names what differs."
                )


def by_series(seen: Sequence[Seen]) -> dict[str, list[Seen]]:
    """SAEs that differ only in their seed, together."""
    return grouped(seen, lambda one: series(one.row))


def only_routed(saes: Sequence[ResultRow], what: str) -> list[ResultRow]:
    """Those with more than one expert. Raises ValueError where there are none."""
    routed = [row for row in saes if row.num_experts > 1]
    if not routed:
        raise ValueError(f"{what} needs an SAE with experts, and {', '.join(row.name for row in saes)} have none. Add a Switch run to the paths.")
    return routed


def only_dense(saes: Sequence[ResultRow], what: str) -> list[ResultRow]:
    """Those without experts. Raises ValueError where there are none."""
    dense = [row for row in saes if row.num_experts == 1]
    if not dense:
        raise ValueError(f"{what} needs a dense SAE, and {', '.join(row.name for row in saes)} all have experts. Add a dense run to the paths.")
    return dense
