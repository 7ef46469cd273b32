"""Looking into trained SAEs: geometry of decoders, recovery of a known dictionary, the text behind latents and experts,
scaling laws, and the PCA control."""

from switch_sae.analysis.geometry import DecoderGeometry, decoder_geometry
from switch_sae.analysis.pca import PCABaseline, participation_ratio, pca_variance_left
from switch_sae.analysis.recovery import Recovery, normalized_mutual_information, recovery
from switch_sae.analysis.scaling import PowerLaw, choose_power_law, fit_power_law, mean_over_seeds
from switch_sae.analysis.text_examples import Example, TokenLift, expert_tokens, format_example, sample_latents, top_examples

__all__ = [
    "DecoderGeometry",
    "Example",
    "PCABaseline",
    "PowerLaw",
    "Recovery",
    "TokenLift",
    "choose_power_law",
    "decoder_geometry",
    "expert_tokens",
    "fit_power_law",
    "format_example",
    "mean_over_seeds",
    "normalized_mutual_information",
    "participation_ratio",
    "pca_variance_left",
    "recovery",
    "sample_latents",
    "top_examples",
]
