"""Mixtures of experts as they are published: every latent of every expert computed for every token, then masked, with autograd's gradients."""

import itertools

import torch
import torch.nn.functional as F

from switch_sae.models.losses import normalized_auxk_loss


def scaled_encoder(sae):
    """V_e = a_e + (1 + omega_e) (W_e - a_e), a_e = T mean_j W_ej, expert by expert; of SAEs without omega W_enc itself."""
    if not hasattr(sae, "omega_E"):
        return sae.W_enc_MD
    made = []
    for own_FD, omega in zip(sae.W_enc_MD.split(sae.num_latents // sae.num_experts), sae.omega_E, strict=True):
        a_D = F.linear(sum(own_FD) / len(own_FD), sae.T_DD)
        made += [a_D + (1 + omega) * (row_D - a_D) for row_D in own_FD]
    return torch.stack(made)


def gates(sae, routing):
    """[T, M]: what multiplies each latent; NaN where the token may not use it."""
    own_TE = torch.full_like(routing.probs_TE, torch.nan).scatter(1, routing.expert_TS, routing.gate_TS.to(routing.probs_TE.dtype))
    own_TM = own_TE.repeat_interleave((sae.num_latents - sae.num_shared) // sae.num_experts, dim=1)
    return torch.cat([own_TM.new_ones(len(own_TM), sae.num_shared), own_TM], dim=1)


def best_of_each_token(k):
    return lambda score_TM: torch.zeros_like(score_TM, dtype=torch.bool).scatter(1, score_TM.topk(k, dim=1).indices, True)


def best_of_the_batch(k):
    return lambda score_TM: score_TM >= score_TM.flatten().topk(k * len(score_TM)).values.min()


def above(threshold):
    return lambda score_TM: score_TM > threshold


def by_formula(sae, x_TD, select, dead_M=None):
    """(latents [T, M], reconstruction in units of x, loss without the router's own terms), with gradients."""
    x_TD = x_TD * sae.activation_scale
    routing = sae.router.route(x_TD)
    gate_TM = gates(sae, routing)
    path = getattr(sae, "path", None)
    path_TD = torch.zeros_like(x_TD) if path is None else (x_TD - sae.b_pre_D) @ path.W_down_RD.T @ path.W_up_OR.T
    read_TD = x_TD - path_TD if getattr(sae.config, "path_first", False) else x_TD
    pre_TM = (read_TD - sae.b_pre_D) @ scaled_encoder(sae).T + (0 if sae.b_enc_M is None else sae.b_enc_M)
    may_TM, gate_TM = ~gate_TM.isnan(), gate_TM.nan_to_num(0)
    active_TM = pre_TM.relu() * may_TM
    score_TM = active_TM * gate_TM if sae.config.gate_in_selection else active_TM
    chosen_TM = select(score_TM.detach()) & may_TM
    latents_TM = active_TM * gate_TM * chosen_TM
    recon_TD = latents_TM @ sae.W_dec_MD + sae.b_pre_D + path_TD
    loss = (x_TD - recon_TD).square().sum() / len(x_TD)
    if dead_M is not None:
        loss = loss + sae.config.auxk * sae.d_in * auxk(sae, read_TD.detach(), (x_TD - recon_TD).detach(), gate_TM.detach(), may_TM & dead_M)
    return latents_TM, recon_TD / sae.activation_scale, loss


def auxk(sae, read_TD, residual_TD, gate_TM, may_TM):
    """The best dead latents of the shared ones and of each of a token's experts reconstruct the residual."""
    if hasattr(sae, "omega_E"):
        raise AssertionError("its own test says what its gradients are")
    pre_TM = (read_TD - sae.b_pre_D.detach()) @ sae.W_enc_MD.T + sae.b_enc_M
    own, recon_TD = (sae.num_latents - sae.num_shared) // sae.num_experts, torch.zeros_like(residual_TD)
    starts = [0, *range(sae.num_shared, sae.num_latents + 1, own)] if sae.num_shared else list(range(0, sae.num_latents + 1, own))
    for start, end in itertools.pairwise(starts):
        group_TM = may_TM & (torch.arange(sae.num_latents) >= start) & (torch.arange(sae.num_latents) < end)
        if group_TM.any():
            score_TM = pre_TM.masked_fill(~group_TM, -torch.inf)
            best = score_TM.topk(sae.auxk_latents(), dim=1)
            values_TM = torch.zeros_like(pre_TM).scatter(1, best.indices, best.values.clamp_min(0))
            recon_TD = recon_TD + (values_TM * gate_TM) @ sae.W_dec_MD
    return normalized_auxk_loss(residual_TD, recon_TD)
