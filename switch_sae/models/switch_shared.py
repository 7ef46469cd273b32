"""`SwitchSharedSAE`: beside the routed experts, latents that every token may use and a linear path of low rank."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from switch_kernels import Dispatch
from switch_sae.checks import all_at_least
from switch_sae.models.base import Flops
from switch_sae.models.expert_candidates import Chosen, Select, encode_candidates, gates_of
from switch_sae.models.inference import Inference
from switch_sae.models.latents import Latents, SparseLatents
from switch_sae.models.routers import Routing
from switch_sae.models.switch import SwitchSAE
from switch_sae.models.topk import from_best
from switch_sae.models.transcoder import SkipPath, SkippedLatents


class SwitchSharedSAE(SwitchSAE):
    """v = [v_shared; p_i v_i for the token's experts i], v = ReLU(W_enc (x - b) + b_enc); z = TopK(v); recon = W_dec z + b + U V (x - b).

    Shared latents (the first `shared`) have no gate. Where the gates of experts are below 1, that favours the shared ones in the competition:
    `gate_in_selection=false` selects among ungated v and gates what is chosen. With `shared=null`, as many as one expert has, it is the expert that
    is always on (`switch1on.py` of github.com/amudide/switch_sae). U V has rank `path_rank` (a dense path beside sparse latents: arXiv 2606.14040),
    starts at 0, and its `path_rank` numbers are not counted in L0. The router reads x.
    """

    @dataclass
    class Config(SwitchSAE.Config):
        num_experts: int = 7
        """E, the routed ones; must divide num_latents - shared."""
        shared: int | None = None
        """S0: the first latents, which every token may use. null is as many as an expert has, num_latents // (num_experts + 1), and the rest."""
        path_rank: int = 0
        """Rank of the linear path, which costs as much as 2 path_rank latents; 0 leaves it out."""
        path_first: bool = False
        """Whether latents read what the path leaves, x - U V (x - b), instead of x."""

        def __post_init__(self) -> None:
            all_at_least(self, shared=0, path_rank=0)
            super().__post_init__()
            if not self.joint_topk:
                raise ValueError("joint_topk=false gives each expert its own k, and shared latents none. Use joint_topk=true, or sae=switch.")
            if self.path_first and not self.path_rank:
                raise ValueError("path_first=true with path_rank=0: there is no path. Use path_rank=8, or path_first=false.")

        def _check_width(self) -> None:
            own, experts = self.num_latents - self.num_shared, self.num_experts
            if own < experts or own % experts:
                nearest = max(1, round(own / experts)) * experts + self.num_latents - own
                raise ValueError(
                    f"num_latents={self.num_latents} less shared={self.num_shared} is not divisible by num_experts={experts}: "
                    f"all experts have the same width. The nearest that fits is num_latents={nearest}."
                )

        def _check_k(self) -> None:
            if self.k > self.candidates:
                raise ValueError(
                    f"k={self.k} is more than the {self.candidates} latents that a token may use, shared and its experts'. "
                    f"Use k <= {self.candidates}, or num_latents >= {self.least_latents}."
                )

        @property
        def num_shared(self) -> int:
            """Latents that every token may use."""
            return self.num_latents - self.num_experts * (self.num_latents // (self.num_experts + 1)) if self.shared is None else self.shared

        @property
        def latents_per_expert(self) -> int:
            return (self.num_latents - self.num_shared) // self.num_experts

        @property
        def candidates(self) -> int:
            """Latents that one token may use."""
            return self.num_shared + self.experts_per_token * self.latents_per_expert

        def simplest(self) -> "SwitchSharedSAE.Config":
            return self

        @property
        def width_step(self) -> int:
            return self.num_experts + (self.shared is None)

        @property
        def least_latents(self) -> int:
            if self.shared is None:
                return self.width_step * -(-self.k // (1 + self.experts_per_token))
            return self.num_experts * max(1, -(-(self.k - self.shared) // self.experts_per_token)) + self.shared

    config: "SwitchSharedSAE.Config"
    label, marker = "Switch + shared", "h"
    trains_by = (Inference.encoder,)

    def __init__(self, config: "SwitchSharedSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        self.num_shared = config.num_shared
        self.path = SkipPath(d_in, d_in, config.path_rank, generator) if config.path_rank else None

    def decode(self, latents: Latents) -> Tensor:
        self._check_path(latents)
        return super().decode(latents)

    def _check_path(self, latents: Latents) -> None:
        if self.path is not None and not isinstance(latents, SkippedLatents):
            raise ValueError(
                f"these {type(latents).__name__} hold nothing of the linear path, and this SAE's reconstruction is more than its latents'. "
                "Decode what encode gave, changed by dataclasses.replace(latents, values_TK=...)."
            )

    def why_no_search(self, inference: Inference) -> str | None:
        return None if self.path is None else f"this {type(self).__name__} has a linear path, which least squares would have to take off first"

    def flops(self) -> Flops:
        """The path counts as encoding: at equal compute a token has so many latents less."""
        flops = super().flops()
        if self.path is None:
            return flops
        forward, backward = self.path.flops()
        to_the_centre = 2 * self.d_in * self.config.path_rank
        to_the_path = 2 * self.d_in * self.config.k if self.config.path_first else 0  # the gradient of what latents read
        return replace(flops, encode=flops.encode + forward, backward=flops.backward + backward + to_the_centre + to_the_path)

    def reading_rows(self, latent_TK: Tensor) -> Tensor:
        rows_TKD = super().reading_rows(latent_TK)
        return rows_TKD if self.path is None or not self.config.path_first else rows_TKD - rows_TKD @ self.path.weight()

    def base(self, latents: SparseLatents) -> Tensor:
        return self.b_out_D + latents.skip_TD if isinstance(latents, SkippedLatents) else self.b_out_D

    def _encode_by(self, x_TD: Tensor, dispatch: Dispatch, gate_TS: Tensor | None) -> tuple[SparseLatents, Any]:
        read_TD, path_TD = self._split(x_TD)
        gates_TC = gates_of(gate_TS, self.num_shared, self.latents_per_expert)
        chosen = self._choose(read_TD, dispatch, gates_TC, self._k_of_each_token)
        values_TK, indices_TK = self._gated(chosen, gates_TC).view(-1, self.config.k), chosen.latent_P.view(-1, self.config.k)
        if path_TD is None:
            return SparseLatents(values_TK, indices_TK, self.num_latents), None
        return SkippedLatents(values_TK, indices_TK, self.num_latents, path_TD), None

    def _split(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what latents read, what the path gives) of scaled activations."""
        if self.path is None:
            return x_TD, None
        path_TD = self.path(x_TD - self.b_in_D)
        return x_TD - path_TD if self.config.path_first else x_TD, path_TD

    def _choose(self, read_TD: Tensor, dispatch: Dispatch, gates_TC: Tensor | None, select: Select) -> Chosen:
        """What `select` takes of the scores of all candidates."""

        def by_score(pre_TC: Tensor) -> Tensor:
            return select(pre_TC if gates_TC is None or not self.config.gate_in_selection else pre_TC.relu() * gates_TC.detach())

        return encode_candidates(read_TD, self.b_in_D, self.W_enc_MD, self.b_enc_M, dispatch, self.num_shared, by_score)

    @staticmethod
    def _gated(chosen: Chosen, gates_TC: Tensor | None) -> Tensor:
        return chosen.values_P if gates_TC is None else chosen.values_P * gates_TC[chosen.token_P, chosen.column_P]

    def _k_of_each_token(self, score_TC: Tensor) -> Tensor:
        start_T = torch.arange(len(score_TC), device=score_TC.device) * score_TC.shape[1]
        return (score_TC.topk(self.config.k, dim=1, sorted=False).indices + start_T[:, None]).flatten()

    def _from_dead(self, x_TD: Tensor, routing: Routing | None, dead_M: Tensor) -> Tensor:
        read_TD = self._split(x_TD)[0].detach()
        recon_TD, dead_B = super()._from_dead(read_TD, routing, dead_M), dead_M[: self.num_shared].nonzero()[:, 0]
        if not len(dead_B):
            return recon_TD
        b_enc_B = None if self.b_enc_M is None else self.b_enc_M.index_select(0, dead_B)
        rows = self.encoder_rows(dead_B), b_enc_B, self.W_dec_MD.index_select(0, dead_B)
        return recon_TD + from_best(read_TD - self.b_in_D.detach(), *rows, self.auxk_latents())
