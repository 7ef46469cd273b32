"""The text behind latents and experts: what activates a latent most, and which tokens an expert receives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.activations.base import EvaluationSet
from switch_sae.metrics.forward import Evaluable, sae_outputs

Decode = Callable[[list[int]], str]
"""Token ids to text, such as `tokenizer.decode`."""


@dataclass(frozen=True)
class Example:
    """A place where a latent fires, with the tokens around it."""

    latent: int
    context: int
    position: int
    activation: float
    tokens: tuple[str, ...]
    """The window, one string per token."""
    activations: tuple[float, ...]
    """The latent's value at each token of the window; 0 also at positions that are not evaluation rows."""
    centre: int
    """Index in the window of the token that activates the latent most."""
    document: str
    """Name of the document, or its number where documents have no names."""


@dataclass(frozen=True)
class TokenLift:
    """How much more often an expert receives a token than it receives tokens at all."""

    token: str
    token_id: int
    count: int
    """Rows of this token routed to the expert."""
    share: float
    """P(expert | token)."""
    lift: float
    """P(expert | token) / P(expert)."""


def sample_latents(
    firing_counts: Tensor, num_experts: int, per_expert: int, min_count: int = 10, seed: int = 0, num_shared: int = 0
) -> list[list[int]]:
    """Up to `per_expert` latents of each expert, drawn at random from those that fired on at least `min_count` rows; the first `num_shared` are no
    expert's.

    At random, because a choice of the nicest ones says little about the others.
    """
    own_counts = firing_counts.cpu()[num_shared:]
    if num_experts < 1 or len(own_counts) % num_experts:
        raise ValueError(f"{len(own_counts)} latents cannot be split evenly over {num_experts} experts. Give the number of experts that the SAE has.")
    width = len(own_counts) // num_experts
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for expert, counts in enumerate(own_counts.split(width)):
        candidates = (counts >= min_count).nonzero()[:, 0] + expert * width + num_shared
        drawn = torch.randperm(len(candidates), generator=generator)[:per_expert]
        chosen.append(sorted(candidates[drawn].tolist()))
    return chosen


def top_examples(
    sae: Evaluable, evaluation_set: EvaluationSet, latents: Sequence[int], decode: Decode, examples: int = 5, window: int = 8
) -> dict[int, list[Example]]:
    """For each latent, the `examples` contexts with the highest activation, highest first, each with `window` tokens on either side of its maximum.

    At most one example per context; contexts where the latent does not fire never appear, so a dead latent has an empty list. One pass over
    the evaluation rows. Raises ValueError for an evaluation set without text or a latent out of range.
    """
    tokens_CS, keep_CS = evaluation_set.text()
    outside = [latent for latent in latents if not 0 <= latent < sae.num_latents]
    if outside:
        raise ValueError(f"latents {outside} do not lie between 0 and {sae.num_latents - 1}.")
    values_LCS = torch.zeros(len(latents), *tokens_CS.shape)
    context_T, position_T = keep_CS.nonzero(as_tuple=True)
    for chosen, _, output in sae_outputs(sae, evaluation_set.rows):
        values_TL = output.latents.cpu().select(torch.tensor(latents, dtype=torch.int64)).float()
        row, place = values_TL.nonzero(as_tuple=True)
        values_LCS[place, context_T[chosen][row], position_T[chosen][row]] = values_TL[row, place]
    names = _document_names(evaluation_set, keep_CS)
    found: dict[int, list[Example]] = {}
    for column, latent in enumerate(latents):
        best_C, position_C = values_LCS[column].max(dim=1)
        contexts = [c for c in best_C.argsort(descending=True, stable=True)[:examples].tolist() if best_C[c] > 0]
        found[latent] = []
        for context in contexts:
            position = int(position_C[context])
            view = slice(max(0, position - window), position + window + 1)
            strings = tuple(decode([token]) for token in tokens_CS[context, view].tolist())
            values = tuple(values_LCS[column, context, view].tolist())
            document = names(context, position)
            found[latent].append(Example(latent, context, position, float(best_C[context]), strings, values, position - view.start, document))
    return found


def format_example(example: Example, left: str = "[[", right: str = "]]") -> str:
    """One line: the activation, then the window with its centre marked; line breaks are shown as escapes."""
    tokens = [f"{left}{token}{right}" if i == example.centre else token for i, token in enumerate(example.tokens)]
    return f"{example.activation:8.3f}  " + "".join(tokens).replace("\n", "\\n").replace("\t", "\\t")


def expert_tokens(sae: Evaluable, evaluation_set: EvaluationSet, decode: Decode, top: int = 10, min_count: int = 20) -> list[list[TokenLift]]:
    """For each expert, the tokens with the highest lift P(expert | token) / P(expert), ties by count; only tokens on at least `min_count` rows.

    Raises ValueError for an SAE without experts or an evaluation set without text.
    """
    tokens_CS, keep_CS = evaluation_set.text()
    if sae.num_experts < 2:
        raise ValueError("this SAE has one expert, which receives every token. Give an SAE with at least two.")
    routed = []
    for _, _, output in sae_outputs(sae, evaluation_set.rows):
        if output.routing is None:
            raise ValueError(f"the SAE says it has {sae.num_experts} experts, but its output has no routing. Return a Routing in SAEOutput.")
        routed.append(output.routing.expert_TS.cpu())
    expert_TS = torch.cat(routed)
    token_ids, token_T = tokens_CS[keep_CS].unique(return_inverse=True)
    pair_R = (token_T[:, None] * sae.num_experts + expert_TS).flatten()
    count_VE = torch.bincount(pair_R, minlength=len(token_ids) * sae.num_experts).view(-1, sae.num_experts).double()
    share_VE = count_VE / count_VE.sum(1, keepdim=True)
    load_E = count_VE.sum(0) / count_VE.sum()
    frequent_V = count_VE.sum(1) >= min_count
    tables = []
    for expert in range(sae.num_experts):
        candidates = (frequent_V & (count_VE[:, expert] > 0)).nonzero()[:, 0].tolist()
        candidates.sort(key=lambda v: (-float(share_VE[v, expert]), -float(count_VE[v, expert]), v))
        counts, shares = count_VE[:, expert].tolist(), share_VE[:, expert].tolist()
        ids = {v: int(token_ids[v]) for v in candidates[:top]}
        tables.append([TokenLift(decode([id]), id, int(counts[v]), shares[v], float(shares[v] / load_E[expert])) for v, id in ids.items()])
    return tables


def _document_names(evaluation_set: EvaluationSet, keep_CS: Tensor) -> Callable[[int, int], str]:
    document_CS = torch.full(keep_CS.shape, -1, dtype=torch.int64)
    document_CS[keep_CS] = evaluation_set.document_T.cpu()

    def name(context: int, position: int) -> str:
        number = int(document_CS[context, position])
        return evaluation_set.document_names[number] if evaluation_set.document_names else str(number)

    return name
