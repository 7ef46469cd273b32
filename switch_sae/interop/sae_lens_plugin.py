"""SAEs of switch_sae inside SAELens: the architecture `switch_sae`, for those that no architecture of SAELens computes, the Switch family above all.

    from switch_sae.interop.sae_lens_plugin import register
    register()
    sae = SAE.load_from_disk("FOLDER")      # what switch-sae convert wrote with --to sae_lens

SAELens is imported when `register` is called, and not before.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from switch_sae.interop.sae_lens import PLUGIN
from switch_sae.models import SAES, DenseLatents


@functools.cache
def register() -> type[Any]:
    """Makes SAELens know the architecture, once for a process, and returns its class there. Raises ImportError without SAELens."""
    from sae_lens import SAE, register_sae_class
    from sae_lens.saes.sae import SAEConfig

    @dataclass
    class SwitchSAELensConfig(SAEConfig):
        """`switch_sae` is the architecture's config as switch_sae saves it, with its key."""

        switch_sae: dict[str, Any] = field(default_factory=dict)

        @classmethod
        def architecture(cls) -> str:
            return PLUGIN

    class SwitchSAELens(SAE[SwitchSAELensConfig]):
        """encode gives all latents, [..., d_sae], gates inside and zeros elsewhere; decode(encode(x)) == forward(x).

        Of a transcoder with a skip path decode gives what latents give, as SAELens' own do; forward adds W_skip x.
        `ours` is the SAE that computes; `W_enc` [d_in, d_sae], `W_dec` [d_sae, d_in], `b_enc` and `b_dec` are views of its weights.
        """

        def initialize_weights(self) -> None:
            ours = SAES.build(SAES.from_plain(self.cfg.switch_sae), self.cfg.d_in)
            if (ours.num_latents, ours.d_in) != (self.cfg.d_sae, self.cfg.d_in):
                raise ValueError(f"cfg says d_sae={self.cfg.d_sae}, but its object switch_sae has {ours.num_latents} latents.")
            self.switch_sae = ours.eval()

        @property
        def ours(self) -> Any:
            """The SAE of switch_sae that computes: `switch_sae`, by whose name its weights are saved."""
            return self.switch_sae

        @property
        def W_dec(self) -> Tensor:
            return self.ours.decoder_weight()

        @property
        def W_enc(self) -> Tensor:
            return self.ours.W_enc

        @property
        def b_dec(self) -> Tensor:
            return self.ours.b_out_D

        @property
        def b_enc(self) -> Tensor:
            bias_M = getattr(self.ours, "b_enc_M", None)
            return self.W_dec.new_zeros(self.cfg.d_sae) if bias_M is None else bias_M

        def encode(self, x: Tensor) -> Tensor:
            x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
            x = self.run_time_activation_norm_fn_in(x)
            latents = self.ours.encode(x.reshape(-1, self.cfg.d_in)).to_dense()
            return self.hook_sae_acts_post(latents.view(*x.shape[:-1], self.cfg.d_sae))

        def decode(self, feature_acts: Tensor) -> Tensor:
            latents_TM = feature_acts.reshape(-1, self.cfg.d_sae)
            raw = self._decode_beside_skip(latents_TM) if self.has_skip else self.ours.decode(DenseLatents(latents_TM))
            recon = self.hook_sae_recons(raw.view(*feature_acts.shape[:-1], self.ours.d_out))
            return self.reshape_fn_out(self.run_time_activation_norm_fn_out(recon), self.d_head)

        def forward(self, x: Tensor) -> Tensor:
            recon = super().forward(x)
            return recon + self.ours.skip(x * self.ours.activation_scale) / self.ours.target_scale if self.has_skip else recon

        def _decode_beside_skip(self, latents_TM: Tensor) -> Tensor:
            return (latents_TM @ self.W_dec + self.b_dec) / self.ours.target_scale

        @property
        def has_skip(self) -> bool:
            return getattr(self.ours, "skip", None) is not None

    register_sae_class(PLUGIN, SwitchSAELens, SwitchSAELensConfig)
    return SwitchSAELens
