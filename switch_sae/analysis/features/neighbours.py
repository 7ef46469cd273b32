"""Cosines between decoder rows, within and across experts: where an SAE stores the same direction twice."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 2**24
"""Cosines held at once: 64 MB in float32, whatever M is."""


@dataclass(frozen=True)
class DecoderGeometry:
    """For each latent, its closest other latent in every expert. Dead latents (where `alive_M` is False) neither ask nor answer."""

    cosine_ME: Tensor
    """Highest cosine of latent m's row with another row of expert e; NaN for dead m, or where expert e has no other live row."""
    neighbour_ME: Tensor
    """The latent that has it, int64; -1 where there is none."""
    expert_M: Tensor
    alive_M: Tensor

    @property
    def within_M(self) -> Tensor:
        """Highest cosine to another row of the latent's own expert."""
        return self.cosine_ME.gather(1, self.expert_M[:, None])[:, 0]

    @property
    def across_M(self) -> Tensor:
        """Highest cosine to a row of any other expert; NaN where there is no other expert."""
        return _max_or_nan(self.cosine_ME.scatter(1, self.expert_M[:, None], torch.nan))[0]

    @property
    def nearest_M(self) -> Tensor:
        """Highest cosine to any other row."""
        return _max_or_nan(self.cosine_ME)[0]

    @property
    def nearest_latent_M(self) -> Tensor:
        """The latent with the highest cosine, -1 where there is none."""
        return self.neighbour_ME.gather(1, _max_or_nan(self.cosine_ME)[1][:, None])[:, 0]

    def similarity_EE(self) -> Tensor:
        """[a, b]: mean over a's live rows of the highest cosine to b's rows (Mudide et al., arXiv 2410.08201, inter-expert similarity).

        The diagonal takes the nearest *other* row of a itself. NaN where one side has no (other) live row.
        """
        experts = self.cosine_ME.shape[1]
        return torch.stack([self.cosine_ME[self.expert_M == expert].double().nanmean(0) for expert in range(experts)])

    def duplicate_shares(self, threshold: float = 0.9) -> dict[str, float]:
        """Shares of live latents whose nearest neighbour, `any`where, `within` their own expert or `across` in another, has cosine > `threshold`.

        `any` is the paper's measure. A latent can have both kinds, so `within` + `across` may exceed `any`; each latent counts once.
        Raises ValueError when no latent is alive.
        """
        alive = int(self.alive_M.sum())
        if alive == 0:
            raise ValueError("no latent is alive, so there is no share of duplicates. Give firing counts from more rows, or none to use all latents.")
        kinds = {"any": self.nearest_M, "within": self.within_M, "across": self.across_M}
        return {kind: int((cosine_M > threshold).sum()) / alive for kind, cosine_M in kinds.items()}

    def same_expert_share(self) -> float:
        """Share of live latents whose nearest row belongs to their own expert. By chance it is about 1 / E."""
        latents = self.nearest_latent_M[self.nearest_latent_M >= 0]
        own = self.expert_M[self.nearest_latent_M >= 0]
        return float((self.expert_M[latents] == own).double().mean())


@torch.no_grad()
def decoder_geometry(weight_MD: Tensor, num_experts: int, firing_counts: Tensor | None = None, num_shared: int = 0) -> DecoderGeometry:
    """Compares all rows of a decoder (or an encoder) block by block: M^2 D work, but never an M x M matrix.

    Latents are expert-major, M / E each; a dense SAE cut into arbitrary blocks is the control. With `firing_counts` [M] (see `Results`) only latents
    that fired take part; the first `num_shared`, which are no expert's, do not. Raises ValueError for rows of norm 0, an M that E does not divide, or
    counts of another length.
    """
    if firing_counts is not None and firing_counts.shape != weight_MD.shape[:1]:
        raise ValueError(f"firing_counts has shape {tuple(firing_counts.shape)}; it must hold one count for each of the {len(weight_MD)} latents.")
    weight_MD, firing_counts = weight_MD[num_shared:], None if firing_counts is None else firing_counts[num_shared:]
    num_latents = weight_MD.shape[0]
    if num_experts < 1 or num_latents % num_experts:
        raise ValueError(f"{num_latents} latents cannot be split evenly over {num_experts} experts. Give the number of experts that the SAE has.")
    device = weight_MD.device
    alive_M = torch.ones(num_latents, dtype=torch.bool, device=device) if firing_counts is None else firing_counts.to(device) > 0
    if bool((weight_MD[alive_M].norm(dim=1) == 0).any()):
        raise ValueError("some rows are exactly 0 and have no direction. Leave them out by giving firing_counts, or check the checkpoint.")
    unit_MD = F.normalize(weight_MD.detach().to(torch.promote_types(weight_MD.dtype, torch.float32)), dim=1)
    width = num_latents // num_experts
    cosine_ME = torch.full((num_latents, num_experts), torch.nan, dtype=unit_MD.dtype, device=device)
    neighbour_ME = torch.full((num_latents, num_experts), -1, dtype=torch.int64, device=device)
    live = alive_M.nonzero()[:, 0]
    for expert in range(num_experts):
        columns = live[(live >= expert * width) & (live < (expert + 1) * width)]
        if len(columns) == 0:
            continue
        for rows in live.split(max(1, BLOCK_ELEMENTS // len(columns))):
            cosines = unit_MD[rows] @ unit_MD[columns].T
            cosines.masked_fill_(rows[:, None] == columns, -torch.inf)
            best, where = cosines.max(dim=1)
            found = best > -torch.inf
            cosine_ME[rows[found], expert] = best[found].clamp(-1, 1)
            neighbour_ME[rows[found], expert] = columns[where[found]]
    expert_M = torch.arange(num_latents, device=device) // width
    return DecoderGeometry(cosine_ME.cpu(), neighbour_ME.cpu(), expert_M.cpu(), alive_M.cpu())


def _max_or_nan(cosine_ME: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over experts that ignores NaN, and its expert; NaN where all are NaN."""
    best_M, expert_M = cosine_ME.nan_to_num(-torch.inf).max(dim=1)
    return best_M.masked_fill(best_M == -torch.inf, torch.nan), expert_M
