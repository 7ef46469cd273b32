"""`ReLUSAE`: ReLU and an L1 penalty, with free decoder norms (Anthropic, "Update on how we train SAEs", April 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from switch_sae.checks import at_least
from switch_sae.models.base import Recipe
from switch_sae.models.dense import DenseOutput, DenseSAE, encoder_linear


class ReLUSAE(DenseSAE):
    """f = ReLU(W_enc x + b_enc), recon = W_dec f + b_pre; loss: reconstruction + l1 * mean_t sum_i f_i ||W_dec,i||.

    https://transformer-circuits.pub/2024/april-update: decoder rows are free and start at norm 0.1, W_enc starts as W_dec, biases at 0; b_pre is
    only the decoder's bias and is not subtracted before encoding.
    """

    @dataclass
    class Config(DenseSAE.Config):
        l1: float = 5.0
        """Coefficient of the penalty, in the publication's units: activations of mean squared norm D. As the penalty grows with
        sqrt(D) and the reconstruction loss with D, a smaller D wants a smaller value."""

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least("l1", self.l1, 0, "0 switches the term off.")

    config: "ReLUSAE.Config"
    colour, marker = "#6E6E6E", "<"
    recipe = Recipe(lr=5e-5, unit_decoder=False)

    def __init__(self, config: "ReLUSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator, decoder_norm=0.1)
        self.b_enc_M = nn.Parameter(torch.zeros(config.num_latents))

    def _activate(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        pre_TM = encoder_linear(x_TD, None, self.W_enc_MD, self.b_enc_M)
        return pre_TM.relu(), pre_TM

    def sparsity_terms(self, target_TD: Tensor, output: DenseOutput) -> dict[str, Tensor]:
        return {"l1": self.config.l1 * self.sparsity_scale * torch.dot(output.latents.to_dense().mean(dim=0), self._decoder_norms())}

    def _thresholds(self) -> tuple[Tensor, ...]:
        return (self.b_enc_M,)
