"""`SwitchScaleSAE`: several experts per token, whose encoders are reparametrised by what is common to their latents (Scale SAE, arXiv 2511.05745)."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from switch_sae.models.base import Flops
from switch_sae.models.inference import Inference
from switch_sae.models.routers import ROUTERS
from switch_sae.models.switch import SwitchSAE

STEP_TOKENS = 1024
"""Tokens that share what a training step computes once, in `flops`."""


class SwitchScaleSAE(SwitchSAE):
    """a_e = T mean_j W_ej; V_e = a_e + (1 + omega_e) (W_e - a_e); z = TopK(g_e ReLU(V_e (x - b) + b_e)) over a token's experts; recon = W_dec z + b.

    T [D, D] starts as the identity, omega_e at `omega`; gates as `router=renormalised` has them. V is another parametrisation of the encoder and adds
    no function: `folded()` is the `SwitchSAE` that computes the same. At omega = 0 it is W itself, and T has no gradient. Two things of the authors'
    code are left out: it divides decoder (and scaled encoder) matrices by the norms of their columns (dim 0), so that latents have rows of unequal
    norm, where ours are 1; and it scales the decoder's features too. It has no AuxK (`preset=scale_sae`).
    """

    @dataclass
    class Config(SwitchSAE.Config):
        num_experts: int = 16
        """E; must divide num_latents. The publication's is 64."""
        experts_per_token: int = 2
        """S: how many experts compute each token. With 1, the published gate is exactly 1 and the reconstruction teaches the router nothing."""
        router: Any = ROUTERS.field("renormalised")
        """The `Config` of one of `ROUTERS`."""
        omega: float = 0.0
        """What omega starts at: 0 as published."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.omega <= -1:
                raise ValueError(f"omega={self.omega} must be above -1: there all latents of an expert are one. Use 0.")

        def simplest(self) -> "SwitchScaleSAE.Config":
            return self

    config: "SwitchScaleSAE.Config"
    label, marker = "Scale", "d"
    trains_by = (Inference.encoder,)

    def __init__(self, config: "SwitchScaleSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        self.T_DD = nn.Parameter(torch.eye(d_in))
        self.omega_E = nn.Parameter(torch.full((config.num_experts,), float(config.omega)))

    def encoder_weight(self) -> Tensor:
        own_EFD, low_E1D = self.W_enc_MD.view(self.num_experts, -1, self.d_in), self._low()[:, None]
        return (low_E1D + (1 + self.omega_E)[:, None, None] * (own_EFD - low_E1D)).flatten(0, 1)

    def encoder_rows(self, latent_L: Tensor) -> Tensor:
        omega_E, expert_L = self.omega_E.detach(), latent_L // self.latents_per_expert
        fixed_ED = -omega_E[:, None] * self._low().detach()
        return fixed_ED[expert_L] + (1 + omega_E)[expert_L, None] * self.W_enc_MD.index_select(0, latent_L)

    def _low(self) -> Tensor:
        """a, [E, D]: what the latents of an expert have in common, transformed."""
        return self.W_enc_MD.view(self.num_experts, -1, self.d_in).mean(dim=1) @ self.T_DD.T

    def flops(self) -> Flops:
        """Backward also counts T's product with the experts' means and its two gradients, once for `STEP_TOKENS` tokens; folded, it costs nothing."""
        flops = super().flops()
        return replace(flops, backward=flops.backward + round(3 * 2 * self.num_experts * self.d_in**2 / STEP_TOKENS))

    @torch.no_grad()
    def fold_features(self) -> None:
        """Absorbs T and omega into W_enc, exactly: what the SAE computes stays."""
        self.W_enc_MD.copy_(self.encoder_weight())
        self.omega_E.zero_()

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        """As every SAE's, and `fold_features`: whoever reads W_enc of a folded SAE reads what multiplies activations."""
        self.fold_features()
        super().fold_activation_scale()

    @torch.no_grad()
    def folded(self) -> SwitchSAE:
        """The `SwitchSAE` that computes the same, for formats and readers that know no other."""
        config = SwitchSAE.Config(**{f.name: getattr(self.config, f.name) for f in fields(SwitchSAE.Config)})
        state = {key: tensor for key, tensor in self.state_dict().items() if key not in ("T_DD", "omega_E")}
        sae = SwitchSAE(config, self.d_in).to(self.W_enc_MD)
        sae.load_state_dict(state | {"W_enc_MD": self.encoder_weight()})
        sae.activations = self.activations
        return sae.train(self.training)
