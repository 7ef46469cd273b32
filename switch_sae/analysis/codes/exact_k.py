"""Sets of exactly k latents: the conditional Bernoulli law, independent Bernoullis that are known to give k ones.

Shapes: C classes, L latents, J = most + 1 numbers of active latents from 0 to `most`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NEVER = -1e30
"""Instead of -inf as the logarithm of 0, which has no gradient."""
SMALL = 1e-12
BLOCK_ELEMENTS = 2**22
"""Classes times latents times numbers that are worked on at once: a few hundred MB with gradients."""


def log_elementary(log_odds_CL: Tensor, most: int) -> Tensor:
    """[C, J] ln e_j(o), j = 0 ... `most`: the sums over all sets of j latents of the product of their odds; `NEVER` for j > L.

    e_j are the coefficients of prod_i (1 + o_i y), multiplied out as a tree of pairs in log space, O(L `most`) work (Chen & Liu 1997, Statistica
    Sinica 7, 875-892, give the recursion).
    """
    poly_CnJ = torch.stack([torch.zeros_like(log_odds_CL), log_odds_CL], -1)[..., : most + 1]
    while (n := poly_CnJ.shape[1]) > 1:
        if n % 2:
            one_C1J = torch.cat([torch.zeros_like(poly_CnJ[:, :1, :1]), torch.full_like(poly_CnJ[:, :1, 1:], NEVER)], -1)
            poly_CnJ = torch.cat([poly_CnJ, one_C1J], 1)
        poly_CnJ = _log_product(poly_CnJ[:, 0::2], poly_CnJ[:, 1::2], most)
    return F.pad(poly_CnJ[:, 0], (0, most + 1 - poly_CnJ.shape[-1]), value=NEVER)


def about_log_elementary(log_odds_CL: Tensor, most: int) -> Tensor:
    """[C, J] nearly the same, at a fraction of the work: as if the number of active latents were of Poisson's law. For comparing classes only: with
    it probabilities do not add up to 1."""
    mean_C1 = log_odds_CL.sigmoid().sum(1, keepdim=True)
    number_J = torch.arange(most + 1, dtype=log_odds_CL.dtype)
    return F.softplus(log_odds_CL).sum(1, keepdim=True) + number_J * mean_C1.log() - mean_C1 - torch.lgamma(number_J + 1)


def _log_product(a_CnJ: Tensor, b_CnJ: Tensor, most: int) -> Tensor:
    size = a_CnJ.shape[-1]
    reach = min(2 * size - 2, most) + 1
    parts = [F.pad(b_CnJ + a_CnJ[..., j : j + 1], (j, max(0, reach - size - j)), value=NEVER)[..., :reach] for j in range(min(size, reach))]
    return torch.stack(parts).logsumexp(0)


def expected_counts(log_odds_CL: Tensor, number_CJ: Tensor) -> tuple[Tensor, Tensor]:
    """([C, L] how often each latent is expected to be active in number_CJ tokens with j active latents each, ln e_j [C, J]).

    The probability that i is among j is the derivative of ln e_j by ln o_i.
    """
    expected, log_e = [], []
    block = max(1, BLOCK_ELEMENTS // (log_odds_CL.shape[1] * number_CJ.shape[1]))
    for leaf_cL, number_cJ in zip(log_odds_CL.detach().split(block), number_CJ.split(block), strict=True):
        with torch.enable_grad():
            leaf_cL = leaf_cL.clone().requires_grad_()
            log_e_cJ = log_elementary(leaf_cL, number_CJ.shape[1] - 1)
            possible_cJ = number_cJ.masked_fill(log_e_cJ <= NEVER / 2, 0.0)
            expected.append(torch.autograd.grad((possible_cJ * log_e_cJ).sum(), leaf_cL)[0])
        log_e.append(log_e_cJ.detach())
    return torch.cat(expected), torch.cat(log_e)


def fitted_log_odds(fired_CL: Tensor, number_CJ: Tensor, steps: int = 6) -> Tensor:
    """[C, L] ln o of greatest likelihood: those under which each latent is expected to be active as often as it was, fired_CL of the
    sum_j number_CJ tokens, which had j active latents each.

    Steps by the difference of logits from those of independent Bernoullis: exact for these, and close after a few steps for any k.
    fired_CL is first scaled to the sum that number_CJ implies, so it may be smoothed.
    """
    number_CJ = number_CJ.clamp(min=SMALL)
    tokens_C1 = number_CJ.sum(1, keepdim=True)
    active_C1 = (number_CJ * torch.arange(number_CJ.shape[1], dtype=number_CJ.dtype)).sum(1, keepdim=True)
    wanted_CL = fired_CL * (active_C1 / fired_CL.sum(1, keepdim=True).clamp(min=SMALL))
    share_CL = (wanted_CL / tokens_C1).clamp(SMALL, 1 - 1e-6)
    log_odds_CL = share_CL.logit()
    for _ in range(steps):
        expected_CL, _ = expected_counts(log_odds_CL, number_CJ)
        log_odds_CL = log_odds_CL + (share_CL.logit() - (expected_CL / tokens_C1).clamp(SMALL, 1 - 1e-6).logit()).clamp(-3, 3)
    return log_odds_CL
