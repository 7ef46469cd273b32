"""`KronSAE`: latents as pairs that fire where both halves do (Kurochkin et al., arXiv 2505.22255)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.checks import all_at_least
from switch_sae.models.base import Recipe
from switch_sae.models.factored import FactoredSAE, geometric_mean, staircase


class KronSAE(FactoredSAE):
    """z_ij = sqrt(ReLU(u_i) ReLU(v_j)) ("mAND") in each of G heads of m u's and n v's, M = G m n; z = TopK of all M; recon = W_dec z + b_pre.

    The encoder costs (m + n) / (m n) of a dense one: 1 at m = n = 2, more than that at m = 1, 1/2 at 4, 1/8 at 16, and 1/16 only at m = n = 32. The
    authors test m <= 8 and find small m better; their comparisons at equal FLOPs give this one more tokens. They form all M products; here only those
    that can be among the k largest, with the same result. The rate is theirs; they decay it by a cosine and with AdamW, the trainer does neither.
    """

    @dataclass
    class Config(FactoredSAE.Config):
        m: int = 4
        """Left halves in each head."""
        n: int = 4
        """Right halves in each head."""

        def __post_init__(self) -> None:
            all_at_least(self, m=1, n=1)
            if self.num_latents % self.width_step or self.num_latents < 1:
                low = self.num_latents // self.width_step * self.width_step
                fits = " or ".join(str(fit) for fit in (low, low + self.width_step) if fit > 0)
                raise ValueError(f"num_latents={self.num_latents} is no multiple of m * n = {self.m} * {self.n}: latents are pairs. Use {fits}.")
            super().__post_init__()

        @property
        def width_step(self) -> int:
            return self.m * self.n

        @property
        def heads_left_right(self) -> tuple[int, int, int]:
            return self.num_latents // self.width_step, self.m, self.n

    config: "KronSAE.Config"
    label, colour, marker = "Kron", "#E6AB02", "d"
    recipe = Recipe(lr=8e-4)

    def _choose(self, x_TD: Tensor, u_TGL: Tensor, v_TGR: Tensor) -> tuple[Tensor, Tensor, None]:
        u_TGL, v_TGR = u_TGL.relu(), v_TGR.relu()
        with torch.no_grad():
            k = self.config.k
            best_u, best_v = (keys.topk(min(k, keys.shape[2]), dim=2) for keys in (u_TGL, v_TGR))
            rank_r, rank_s = staircase(self.left, self.right, k, u_TGL.device)
            chosen_TK = (best_u.values[..., rank_r] * best_v.values[..., rank_s]).flatten(1).topk(k, dim=1, sorted=False).indices
            indices_TK = self._latents_of(best_u.indices, best_v.indices, rank_r, rank_s).gather(1, chosen_TK)
        left_TK, right_TK = self._keys_of(indices_TK)
        return geometric_mean(self._picked(u_TGL, left_TK), self._picked(v_TGR, right_TK)), indices_TK, None

    def _join(self, x_TD: Tensor, u_BT: Tensor, v_BT: Tensor, latent_B: Tensor) -> Tensor:
        return geometric_mean(u_BT.relu(), v_BT.relu())
