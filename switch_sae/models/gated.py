"""`GatedSAE`: one path decides which latents fire, another how strongly (Rajamanoharan et al., arXiv 2404.16014)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from switch_sae.checks import at_least
from switch_sae.models.base import Flops, Recipe
from switch_sae.models.dense import DenseOutput, DenseSAE, encoder_linear
from switch_sae.models.losses import geometric_median, reconstruction_loss
from switch_sae.rows import Rows


class GatedSAE(DenseSAE):
    """pi_gate = W_enc (x - b_pre) + b_gate, f = [pi_gate > 0] * ReLU(e^r_mag * W_enc (x - b_pre) + b_mag), recon = W_dec f + b_pre.

    Loss (eq. 8): reconstruction + l1 * mean_t sum_i ReLU(pi_gate,i) + the reconstruction error of ReLU(pi_gate) through the frozen decoder. W_enc_MD
    is the paper's W_gate; decoder rows stay on the unit sphere. b_pre starts at the geometric median, as elsewhere here.
    """

    @dataclass
    class Config(DenseSAE.Config):
        l1: float = 1.0
        """Coefficient of the penalty on the gates, for activations of mean squared norm D. The publication sweeps it."""

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least("l1", self.l1, 0, "0 switches the term off.")

    config: "GatedSAE.Config"
    colour, marker = "#8A8A8A", ">"
    recipe = Recipe(lr=3e-4, betas=(0.0, 0.999))

    def __init__(self, config: "GatedSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        self.r_mag_M = nn.Parameter(torch.zeros(config.num_latents))
        self.b_gate_M = nn.Parameter(torch.zeros(config.num_latents))
        self.b_mag_M = nn.Parameter(torch.zeros(config.num_latents))

    def initialize(self, rows: Rows) -> None:
        self.b_pre_D.data.copy_(geometric_median(self._scaled(rows.x_TD)))

    def _activate(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        gate_TM = encoder_linear(x_TD, self.b_in_D, self.W_enc_MD, self.b_gate_M)
        # Both paths share one product: e^r W_enc (x - b_pre) = e^r (pi_gate - b_gate).
        rescale_M = self.r_mag_M.exp()
        magnitude_TM = torch.addcmul(self.b_mag_M - rescale_M * self.b_gate_M, rescale_M, gate_TM).relu()
        return torch.where(gate_TM > 0, magnitude_TM, 0.0), gate_TM

    def sparsity_terms(self, target_TD: Tensor, output: DenseOutput) -> dict[str, Tensor]:
        open_TM = output.pre_TM.relu()
        gate_recon_TD = open_TM @ self.W_dec_MD.detach() + self.b_out_D.detach()
        return {"l1": self.config.l1 * self.sparsity_scale * open_TM.mean(dim=0).sum(), "gate_mse": reconstruction_loss(target_TD - gate_recon_TD)}

    def flops(self) -> Flops:
        """As `DenseSAE`, and in training two more products: the reconstruction from the gates and its gradient (counted as backward)."""
        dense = super().flops()
        return replace(dense, backward=dense.backward + 2 * dense.decode)

    def _thresholds(self) -> tuple[Tensor, ...]:
        return self.b_gate_M, self.b_mag_M
