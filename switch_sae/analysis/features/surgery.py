"""Surgery on an SAE that has both experts and shared latents: copies of one concept in many experts become one shared latent."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.analysis.features.copies import close_pairs, clusters
from switch_sae.models import SAES, SparseAutoencoder


def copied_groups(sae: SparseAutoencoder, count_M: Tensor, threshold: float, least_experts: int) -> list[Tensor]:
    """Groups of live latents of different experts whose decoder rows hang together by cosines above `threshold`, in `least_experts` or more; of
    several in one expert the one that fires most. The widest first. `count_M` says how often each latent fired.

    Raises ValueError for an SAE that has nowhere to put a shared latent.
    """
    check_has_shared(sae)
    first, width = sae.num_shared, sae.latents_per_expert
    live_L = (count_M > 0).nonzero()[:, 0]
    live_L = live_L[live_L >= first]
    unit_LD = F.normalize(sae.decoder_weight().detach()[live_L].float(), dim=1)
    label_L = clusters(close_pairs(unit_LD, threshold), len(live_L))
    groups = []
    for label in (label_L.bincount() >= least_experts).nonzero()[:, 0].tolist():
        member_P = live_L[label_L == label]
        member_P = member_P[count_M[member_P].argsort(descending=True, stable=True)]
        seen: dict[int, int] = {}
        for latent in member_P.tolist():
            seen.setdefault((latent - first) // width, latent)
        if len(seen) >= max(2, least_experts):
            groups.append(torch.tensor([seen[expert] for expert in sorted(seen)]))
    return sorted(groups, key=len, reverse=True)


def random_groups(sae: SparseAutoencoder, count_M: Tensor, like: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """The control: as many groups, in the same experts, of random live latents that no group has."""
    first, width = sae.num_shared, sae.latents_per_expert
    generator, taken_M = torch.Generator().manual_seed(seed), count_M <= 0
    taken_M = taken_M.clone()
    taken_M[:first] = True
    taken_M[torch.cat(list(like))] = True
    groups = []
    for group in like:
        drawn = []
        for expert in ((group - first) // width).tolist():
            free = (~taken_M[first + expert * width : first + (expert + 1) * width]).nonzero()[:, 0]
            if len(free) == 0:
                raise ValueError(f"expert {expert} has no live latent left for the control. Merge fewer groups.")
            latent = first + expert * width + int(free[torch.randint(len(free), (1,), generator=generator)])
            taken_M[latent] = True
            drawn.append(latent)
        groups.append(torch.tensor(drawn))
    return groups


@torch.no_grad()
def merged(sae: SparseAutoencoder, groups: Sequence[Tensor], count_M: Tensor) -> SparseAutoencoder:
    """A new SAE in which each group is one more shared latent, at the same cost per token: every expert gives up as many latents as there are groups,
    first those in a group, then those that fire least.

    With C groups: S + C shared latents and F - C in each of E experts, so S + F candidates for a token as before, and C (E - 1) latents fewer in all.
    A merged latent is the mean of its group's rows and biases, weighted by how often each fired; the decoder's row has norm 1 again. Raises
    ValueError for no groups, two latents of one expert in a group, or experts too narrow.
    """
    check_has_shared(sae)
    first, width, experts, new = sae.num_shared, sae.latents_per_expert, sae.num_experts, len(groups)
    if new == 0:
        raise ValueError("no group of copies spans so many experts. Lower the threshold of the cosine or the number of experts.")
    if new >= width:
        raise ValueError(f"{new} groups leave nothing of experts of {width} latents. Ask for copies in more experts, or a higher threshold.")
    gone_M = torch.zeros(sae.num_latents, dtype=torch.bool)
    for group in groups:
        if len(((group - first) // width).unique()) < len(group):
            raise ValueError("a group holds two latents of one expert; give one of each.")
        gone_M[group] = True
    for expert in range(experts):
        mine = slice(first + expert * width, first + (expert + 1) * width)
        rest_f = (~gone_M[mine]).nonzero()[:, 0]
        least_f = count_M[mine][rest_f].argsort(stable=True)[: new - int(gone_M[mine].sum())]
        gone_M[first + expert * width + rest_f[least_f]] = True
    kept_L = (~gone_M).nonzero()[:, 0]
    config = replace(sae.config, shared=first + new, num_latents=len(kept_L) + new)
    result = type(sae)(config, sae.d_in)
    state = {}
    for name, tensor in sae.state_dict().items():
        if name.rpartition("_")[2] not in ("M", "MD"):
            state[name] = tensor
            continue
        means = []
        for group in groups:
            share_P = count_M[group].to(tensor.dtype)
            means.append((share_P / share_P.sum()) @ tensor[group])
        mean = torch.stack(means)
        if name == "W_dec_MD" and sae.recipe.unit_decoder:
            mean = F.normalize(mean, dim=1)
        state[name] = torch.cat([tensor[:first], mean, tensor[kept_L[first:]]])
    result.load_state_dict(state)
    result.activations = dict(sae.activations)
    return result.eval()


def check_has_shared(sae: SparseAutoencoder) -> None:
    """Raises ValueError for an architecture without shared latents."""
    if not hasattr(sae.config, "shared"):
        able = [key for key, cls in SAES.items() if any(field.name == "shared" for field in fields(cls.Config))]
        raise ValueError(
            f"{type(sae).__name__} has no latents that all experts share: each belongs to an expert, and may be scaled by its gate. "
            f"Give a run of {' or '.join(able)}, which have `shared`."
        )
