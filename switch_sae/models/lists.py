"""Index lists into one dictionary: which latents each list holds, and which of them change.

Shapes: E lists of F latents each out of M, S lists per token, K active latents per token, n tokens of a sample.
"""

import math

import torch
from torch import Tensor


def random_lists(num_latents: int, lists: int, size: int, generator: torch.Generator | None = None, shuffle: bool = False) -> Tensor:
    """[E, F]: list e holds latents e*M/E to (e+1)*M/E - 1, and F - M/E others drawn without replacement. Rising in each list.

    With `shuffle` the first ones are drawn too, and every latent still has a place.
    """
    owner_M = torch.arange(num_latents) * lists // num_latents
    if shuffle:
        owner_M = owner_M[torch.randperm(num_latents, generator=generator)]
    score_EM = torch.rand(lists, num_latents, generator=generator)
    score_EM[owner_M, torch.arange(num_latents)] += 1
    return score_EM.topk(size, dim=1).indices.sort(dim=1).values


def membership(list_EF: Tensor, num_latents: int) -> Tensor:
    """[E, M] bool: whether a list holds a latent."""
    return torch.zeros(len(list_EF), num_latents, dtype=torch.bool, device=list_EF.device).scatter_(1, list_EF, True)


def repeated(list_EF: Tensor, expert_TS: Tensor) -> Tensor:
    """[T, S, F] bool: which latents of a token's lists are on an earlier one of its lists already."""
    on_EEF = membership(list_EF, int(list_EF.max()) + 1)[:, list_EF]
    found_TSF = torch.zeros(*expert_TS.shape, list_EF.shape[1], dtype=torch.bool, device=expert_TS.device)
    for slot in range(1, expert_TS.shape[1]):
        for earlier in range(slot):
            found_TSF[:, slot] |= on_EEF[expert_TS[:, earlier], expert_TS[:, slot]]
    return found_TSF


def assigned(score_EM: Tensor, size: int) -> Tensor:
    """[E, F]: every latent first to the list that scores it highest and has room, then each list filled with those that score highest on it.

    Where more latents want a list than it has room for, the highest scores get it and the others go on to their next best one. Rising in each list.
    Needs E F >= M. On the CPU, of whatever device the scores are: the same everywhere.
    """
    device, score_EM = score_EM.device, score_EM.double().cpu()
    experts, num_latents = score_EM.shape
    placed_EM, room_E = torch.zeros(experts, num_latents, dtype=torch.bool), torch.full((experts,), size)
    left_L = torch.arange(num_latents)
    while len(left_L):
        best_L = score_EM[:, left_L].masked_fill((room_E == 0)[:, None], -torch.inf).max(dim=0)
        order_L = best_L.values.argsort(descending=True, stable=True)
        left_L, list_L = left_L[order_L], best_L.indices[order_L]
        queue_L = list_L.argsort(stable=True)  # by list, and by falling score in each
        counts_E = torch.bincount(list_L, minlength=experts)
        place_L = torch.empty_like(queue_L)
        place_L[queue_L] = torch.arange(len(left_L)) - (counts_E.cumsum(0) - counts_E).repeat_interleave(counts_E)
        fits_L = place_L < room_E[list_L]
        placed_EM[list_L[fits_L], left_L[fits_L]] = True
        room_E -= torch.bincount(list_L[fits_L], minlength=experts)
        left_L = left_L[~fits_L]
    ranked_EM = score_EM.masked_fill(placed_EM, torch.inf).argsort(dim=1, descending=True, stable=True)
    return ranked_EM[:, :size].sort(dim=1).values.to(device)


def credits(member_EM: Tensor, expert_nS: Tensor, indices_nK: Tensor) -> Tensor:
    """[n, S, K] bool: which of a token's lists is to be credited with each of its latents: of those that hold it the best alone, else all of them.

    So a second list earns nothing by what the first one offers already, and what none of them holds may join any.
    """
    held_nSK = member_EM[expert_nS[:, :, None], indices_nK[:, None, :]]
    return (held_nSK & (held_nSK.cumsum(dim=1) == 1)) | ~held_nSK.any(dim=1, keepdim=True)


def best_lists(member_EM: Tensor, indices_nK: Tensor, share_nK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(lists, their gains), [n, S]: the list that holds most of each token's energy, then the one that adds most to it, and so on; the first of
    equals. Nothing beats S lists found so by more than e / (e - 1) (Nemhauser et al. 1978)."""
    held_nKE, left_nK = member_EM.T[indices_nK].to(share_nK.dtype), share_nK
    chosen, gains = [], []
    for _ in range(count):
        gain_n, list_n = torch.einsum("nk,nke->ne", left_nK, held_nKE).max(dim=1)
        chosen.append(list_n)
        gains.append(gain_n)
        left_nK = left_nK * (1 - held_nKE.gather(2, list_n[:, None, None].expand(-1, held_nKE.shape[1], 1))[:, :, 0])
    return torch.stack(chosen, dim=1), torch.stack(gains, dim=1)


def half_life_decay(tokens: int, memory: int) -> float:
    """What a running sum keeps after so many tokens, half of it after `memory`."""
    return math.exp2(-tokens / memory)
