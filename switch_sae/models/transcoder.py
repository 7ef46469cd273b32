"""`TranscoderSAE`: a dense TopK transcoder, which reads one hook and writes another (Dunefsky et al., arXiv 2406.11944; Paulo et al., 2501.18823)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_kernels import Dispatch
from switch_sae.checks import all_at_least
from switch_sae.models.base import Flops, Recipe, unit_scale
from switch_sae.models.inference import Inference
from switch_sae.models.latents import Latents, SparseLatents
from switch_sae.models.losses import geometric_median
from switch_sae.models.topk import TopKSAE
from switch_sae.rows import Rows

DECODER_START = 0.1
"""Norm of decoder rows before training: random directions, since the encoder's lie in another space, and small, so that they can turn at once."""


class Skip(Enum):
    """The linear path around the latents."""

    none = "none"
    full = "full"
    """W_skip of any rank."""
    low_rank = "low_rank"
    """W_skip = W_up W_down of rank `skip_rank`."""


class SkipPath(nn.Module):
    """x -> W_skip x, of scaled activations; it starts at 0."""

    def __init__(self, d_in: int, d_out: int, rank: int | None, generator: torch.Generator | None = None) -> None:
        """`rank` None is full rank."""
        super().__init__()
        self.d_in, self.d_out, self.rank = d_in, d_out, rank
        self.W_down_RD = None if rank is None else nn.Parameter(F.normalize(torch.randn(rank, d_in, generator=generator), dim=1))
        self.W_up_OR = nn.Parameter(torch.zeros(d_out, d_in if rank is None else rank))
        """[d_out, rank]; W_skip itself where the rank is full."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD if self.W_down_RD is None else F.linear(x_TD, self.W_down_RD), self.W_up_OR)

    def weight(self) -> Tensor:
        """W_skip, [d_out, d_in]."""
        return self.W_up_OR if self.W_down_RD is None else self.W_up_OR @ self.W_down_RD

    def flops(self) -> tuple[int, int]:
        """(forward, backward) per token: a product each forward; backward each weight's gradient, and that of what lies between the two."""
        if self.rank is None:
            return 2 * self.d_in * self.d_out, 2 * self.d_in * self.d_out
        return 2 * self.rank * (self.d_in + self.d_out), 2 * self.rank * (self.d_in + 2 * self.d_out)


@dataclass(frozen=True, repr=False)
class SkippedLatents(SparseLatents):
    """Latents of a transcoder with a skip path: the output does not follow from latents alone, so what the path gave travels with them."""

    skip_TD: Tensor
    """W_skip x, in units of scaled targets."""

    def shaped(self, leading: Sequence[int]) -> "SkippedLatents":
        return replace(super().shaped(leading), skip_TD=self.skip_TD.reshape(*leading, self.skip_TD.shape[-1]))

    def part(self, rows: slice) -> "SkippedLatents":
        return replace(super().part(rows), skip_TD=self.skip_TD[rows])

    def cpu(self) -> "SkippedLatents":
        return replace(super().cpu(), skip_TD=self.skip_TD.cpu())


class TranscoderSAE(TopKSAE):
    """z = TopK(ReLU(W_enc (x - b_in) + b_enc)), recon = W_dec z + b_out + W_skip x: x at one hook, recon at another.

    b_in, the encoder's centre, is the parameter `b_pre_D`, and b_out `b_post_D`: each starts at the geometric median of its own hook, and each hook
    has a scale of its own. Taking b_out off the input, as autoencoders may, costs much FVU (EleutherAI/sparsify, pull request 49). Encoder rows start
    on the unit sphere and decoder rows apart from them (`DECODER_START`); no loss weighs their norms, so none are held.
    """

    @dataclass
    class Config(TopKSAE.Config):
        d_out: int | None = None
        """Size of the target; null is that of the input, as it is around an MLP."""
        skip: Skip = Skip.none
        """A linear path around the latents (arXiv 2501.18823)."""
        skip_rank: int | None = None
        """With skip=low_rank."""

        def __post_init__(self) -> None:
            super().__post_init__()
            all_at_least(self, d_out=1, skip_rank=1)
            if (self.skip is Skip.low_rank) != (self.skip_rank is not None):
                fix = "Give it one: sae.skip_rank=16." if self.skip_rank is None else "Use skip=low_rank, or skip_rank=null."
                raise ValueError(f"skip={self.skip.value} with skip_rank={self.skip_rank}: a rank belongs to skip=low_rank. {fix}")

    config: "TranscoderSAE.Config"
    label, colour, marker = "Transcoder", "#7B3294", "P"
    is_transcoder = True
    reference = "transcoder"
    shared_with_reference = ("num_latents", "k", "d_out", "skip", "skip_rank")
    trains_by = (Inference.encoder,)
    recipe = Recipe(unit_decoder=False)
    output_scale: Tensor

    def __init__(self, config: "TranscoderSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        d_out = d_in if config.d_out is None else config.d_out
        # Drawn before a router is: with one expert a Switch transcoder starts as the dense one.
        rows_MD = torch.randn(config.num_latents, d_out, generator=generator)
        skip = None if config.skip is Skip.none else SkipPath(d_in, d_out, config.skip_rank, generator)
        super().__init__(config, d_in, generator)
        self.W_dec_MD = nn.Parameter(DECODER_START * F.normalize(rows_MD, dim=1), requires_grad=config.train_decoder)
        self.b_post_D = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("output_scale", torch.tensor(1.0))
        self.skip = skip

    @property
    def d_out(self) -> int:
        return self.d_in if self.config.d_out is None else self.config.d_out

    @property
    def target_scale(self) -> Tensor:
        return self.output_scale

    @property
    def b_out_D(self) -> Tensor:
        return self.b_post_D

    def set_scale(self, rows: Rows) -> None:
        super().set_scale(rows)
        self.output_scale.fill_(unit_scale(self._target(rows)))

    def initialize(self, rows: Rows) -> None:
        super().initialize(rows)
        self.b_post_D.data.copy_(geometric_median(self._target(rows) * self.target_scale))

    def decode(self, latents: Latents) -> Tensor:
        if self.skip is not None and not isinstance(latents, SkippedLatents):
            raise ValueError(
                f"these {type(latents).__name__} hold nothing of the skip path, and this transcoder's output is more than its latents'. "
                "Decode what encode gave, changed by dataclasses.replace(latents, values_TK=...)."
            )
        return super().decode(latents)

    def flops(self) -> Flops:
        """Of a TopK SAE of these sizes; the skip path counts as decoding."""
        flops = super().flops()
        if self.skip is None:
            return flops
        forward, backward = self.skip.flops()
        return replace(flops, decode=flops.decode + forward, backward=flops.backward + backward)

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        """Both scales, into biases, router, decoder and skip path: latents come out in units of raw inputs, decoder rows in those of raw targets per
        latent."""
        per_input, scale = self.activation_scale / self.output_scale, self.output_scale.clone()
        super().fold_activation_scale()
        self.W_dec_MD.mul_(per_input)
        self.b_post_D.div_(scale)
        if self.skip is not None:
            self.skip.W_up_OR.mul_(per_input)
        self.output_scale.fill_(1.0)

    def _encode_by(self, x_TD: Tensor, dispatch: Dispatch, gate_TS: Tensor | None) -> tuple[SparseLatents, Any]:
        latents, by_latent = super()._encode_by(x_TD, dispatch, gate_TS)
        if self.skip is None:
            return latents, by_latent
        return SkippedLatents(latents.values_TK, latents.indices_TK, latents.num_latents, self.skip(x_TD)), by_latent

    def base(self, latents: SparseLatents) -> Tensor:
        return self.b_out_D + latents.skip_TD if isinstance(latents, SkippedLatents) else self.b_out_D
