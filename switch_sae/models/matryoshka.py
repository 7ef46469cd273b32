"""`MatryoshkaSAE`: nested dictionaries, of which every prefix must reconstruct alone (Bussmann et al., arXiv 2503.17547)."""

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from switch_sae.models.base import SAEOutput
from switch_sae.models.batch_topk import BatchTopKSAE, PairsOutput
from switch_sae.models.inference import Inference
from switch_sae.models.losses import reconstruction_loss
from switch_sae.models.pairs import Pairs, decode_pairs
from switch_sae.rows import Rows


@dataclass(frozen=True, kw_only=True, repr=False)
class PrefixesOutput(PairsOutput):
    """With the reconstructions from the first g groups, for g = 1 .. G."""

    prefixes_GTD: Tensor


class MatryoshkaSAE(BatchTopKSAE):
    """`BatchTopKSAE` whose latents form G groups; loss: the weighted mean over g of ||x - (b_pre + the first g groups' part)||^2, and AuxK.

    Each group is decoded once and prefixes are running sums, so a step costs what `BatchTopKSAE`'s does.
    """

    @dataclass
    class Config(BatchTopKSAE.Config):
        group_fractions: list[float] = field(default_factory=lambda: [1 / 32, 1 / 16, 1 / 8, 1 / 4])
        """Sizes of the first groups as shares of num_latents; the remaining latents are the last group."""
        group_weights: list[float] | None = None
        """Weight of each prefix's loss, last group included; None weighs all equally."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if any(fraction <= 0 for fraction in self.group_fractions) or sum(self.group_fractions) >= 1:
                raise ValueError(
                    f"group_fractions={self.group_fractions} must be positive and sum to less than 1: the last group is what they leave. "
                    "Use [0.03125, 0.0625, 0.125, 0.25]."
                )
            if min(self.group_sizes) < 1:
                raise ValueError(f"num_latents={self.num_latents} gives groups of {self.group_sizes} latents: each needs one. Use larger fractions.")
            weights = self.group_weights
            if weights is not None and (len(weights) != len(self.group_sizes) or min(weights) < 0 or not 0 < sum(weights) < math.inf):
                raise ValueError(f"group_weights={weights} must be {len(self.group_sizes)} numbers of at least 0, one for each group, not all 0.")

        @property
        def group_sizes(self) -> list[int]:
            """Latents of each group, G numbers that sum to num_latents."""
            sizes = [int(fraction * self.num_latents) for fraction in self.group_fractions]
            return [*sizes, self.num_latents - sum(sizes)]

        @property
        def least_latents(self) -> int:
            least = math.ceil(1 / min(self.group_fractions, default=1))
            return max(super().least_latents, least)

    config: "MatryoshkaSAE.Config"
    colour, marker = "#A0A0A0", "d"
    trains_by = (Inference.encoder,)  # values refitted for the whole are not those of least squares for a prefix

    def __init__(self, config: "MatryoshkaSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        self.group_ends = list(itertools.accumulate(config.group_sizes))

    def _output(self, proposed: Pairs, pairs: Pairs, match: Tensor | None, tokens: int) -> PrefixesOutput:
        prefixes_GTD = self._prefixes(pairs, tokens)
        latents = pairs.to_latents(tokens, self.num_latents)
        return PrefixesOutput(prefixes_GTD[-1], latents, match=match, pairs=proposed, prefixes_GTD=prefixes_GTD)

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        assert isinstance(output, PrefixesOutput)
        terms = super().loss_terms(rows, output, dead_M)
        target_TD = self._target(rows)
        inner = [reconstruction_loss((target_TD - recon_TD) * self.target_scale) for recon_TD in output.prefixes_GTD[:-1]]
        losses = [*inner, terms["mse"]]
        weights = self.config.group_weights or [1.0] * len(losses)
        return terms | {"mse": torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)}

    def _reconstruct(self, pairs: Pairs, tokens: int) -> Tensor:
        return self._prefixes(pairs, tokens)[-1]

    def _prefixes(self, pairs: Pairs, tokens: int) -> Tensor:
        """[G, T, D]: the reconstruction from the first g groups, for g = 1 .. G."""
        ends = torch.tensor(self.group_ends, device=pairs.latent_P.device)
        bag_P, order_P = (torch.bucketize(pairs.latent_P, ends, right=True) * tokens + pairs.token_P).sort(stable=True)
        groups = len(self.group_ends)
        parts = decode_pairs(pairs.values_P[order_P], pairs.latent_P[order_P], bag_P, groups * tokens, self.W_dec_MD).view(groups, tokens, self.d_out)
        return (parts.cumsum(dim=0) + self.b_out_D) / self.target_scale
