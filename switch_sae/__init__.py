"""Mixture-of-experts sparse autoencoders that compute only the routed expert.

from switch_sae import load_sae
sae = load_sae("runs/...")            # takes raw activations [tokens, d_in]
latents = sae.encode(x)               # at most k active latents per token, in global latent indices
recon = sae.decode(latents)
"""

from switch_sae.invocation import version
from switch_sae.models import SAES, SAEOutput, SparseAutoencoder, SparseLatents, SwitchSAE, TopKSAE
from switch_sae.publishing import push_to_hub
from switch_sae.runs import RunDir, load_sae, save_sae

__all__ = ["SAES", "RunDir", "SAEOutput", "SparseAutoencoder", "SparseLatents", "SwitchSAE", "TopKSAE", "load_sae", "push_to_hub", "save_sae"]

__version__ = version()
