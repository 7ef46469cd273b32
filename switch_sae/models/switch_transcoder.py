"""`SwitchTranscoderSAE`: a transcoder whose router sends every input to one expert."""

from dataclasses import dataclass, fields

from switch_sae.models.switch import SwitchSAE
from switch_sae.models.transcoder import TranscoderSAE


class SwitchTranscoderSAE(TranscoderSAE, SwitchSAE):
    """z = p_i * TopK(ReLU(W_enc^i (x - b_in) + b_enc^i)), recon = W_dec z + b_out + W_skip x; i and p_i by the router, as in `SwitchSAE`.

    The skip path is shared by all experts and not gated. With one expert it equals `TranscoderSAE` exactly.
    """

    @dataclass
    class Config(TranscoderSAE.Config, SwitchSAE.Config):
        def simplest(self) -> TranscoderSAE.Config:
            """One expert is `TranscoderSAE`, to the last bit."""
            return self if self.num_experts > 1 else TranscoderSAE.Config(**{f.name: getattr(self, f.name) for f in fields(TranscoderSAE.Config)})

    config: "SwitchTranscoderSAE.Config"
    label, marker = "Switch transcoder", "X"
