"""SAEs of switch_sae as SAEBench and SAELens' `run_evals` take them: an object with their names and layouts. Neither library is imported.

    from switch_sae.interop.saebench import wrap
    sae = wrap(load_sae("runs/..."), model_name="gpt2")
    multiple_evals([("switch_e8", sae)], ...)      # of sae_bench.evals.core.main, or of any other of its evals

What they read: `W_enc` [D, M], `W_dec` [M, D], `b_enc` [M], `b_dec` [D], `cfg`, `device`, `dtype`, `encode`, `decode`, a call, `.to()`.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from switch_sae.interop.token_norm import TokenNormSAE
from switch_sae.models import SAES, Inference, SparseAutoencoder
from switch_sae.models.base import real

_THEIR_NAMES = {"relu": "standard", "matryoshka": "matryoshka_batch_topk"}
"""SAEBench's names of architectures, where ours are others; what it has no name for keeps ours."""
_ENCODER = "encoder"
_ALL_EXPERTS = "encoders of all experts side by side: a token uses its own experts' columns alone"
_NONE = "no encoder: a search over W_dec finds latents, and W_enc is W_dec transposed"
_UNUSED = "an encoder that is not used: a search over W_dec finds latents"
_UNKNOWN = "not known under this name: W_dec transposed stands for it"


@dataclass
class PeerCfg:
    """`cfg`: what SAEBench reads of it, and SAELens at `cfg.metadata`, which is the same object. SAEBench's results hold all of it but that."""

    model_name: str
    """Its name in transformer_lens, where SAEBench is to load the model itself."""
    hook_name: str
    hook_layer: int
    d_in: int
    d_sae: int
    architecture: str
    """SAEBench's name if it has one, else the key in `SAES`; with +refit or +pursuit where that is how latents are found instead of its own way."""
    W_enc_is: str
    """What `W_enc` is, for whoever reads metrics of encoder weights: not every SAE here has one encoder for all tokens."""
    context_size: int | None
    prepend_bos: bool
    dtype: str = ""
    """float32 or another, kept in step with the weights."""
    device: str = ""
    architecture_str: str = field(init=False)
    hook_head_index: int | None = None
    normalize_activations: str = "none"
    """Our scale is folded into the weights."""
    exclude_special_tokens: bool | None = None
    seqpos_slice: tuple[int | None, ...] = (None,)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.architecture_str = self.architecture
        self.metadata: Any = self  # no field, so that it is in no dictionary of this one

    def to_dict(self) -> dict[str, Any]:
        """All fields, as SAEBench stores them beside its results."""
        return asdict(self)


class PeerSAE(nn.Module):
    """What `wrap` gives: latents f [..., M] dense, in units of raw activations, and recon = f W_dec + b_dec.

    Decoder rows have norm 1, as SAEBench wants them: where those of the SAE have not, their norms are in the latents, which computes the same. Gates
    are in the latents, so that decode(encode(x)) == forward(x), and latents that an eval changes are decoded as it left them. Weights are frozen;
    gradients flow through to inputs and latents.
    """

    hook_z_reshaping_mode = False
    """An SAE of attention heads takes them side by side, [..., heads * d_head], as their evals give them once they have asked for it."""

    def __init__(self, sae: SparseAutoencoder, cfg: PeerCfg) -> None:
        super().__init__()
        self.ours = sae
        self.cfg = cfg
        norm_M = torch.linalg.vector_norm(sae.decoder_weight().detach(), dim=1)
        norm_M = torch.where(norm_M > 0, norm_M, 1)
        is_unit = bool(torch.allclose(norm_M, torch.ones_like(norm_M), rtol=0, atol=1e-5))  # SAEBench's tolerance
        self.norm_M: Tensor | None
        self.register_buffer("norm_M", None if is_unit else norm_M)
        self._keep_in_step()

    @property
    def W_enc(self) -> Tensor:
        """[D, M]. What it is for an SAE that routes or searches, `cfg.W_enc_is` says."""
        return self._times_norms(self.ours.W_enc)

    @property
    def W_dec(self) -> Tensor:
        """[M, D], rows of norm 1."""
        return self.ours.W_dec if self.norm_M is None else self.ours.W_dec / self.norm_M[:, None]

    @property
    def b_enc(self) -> Tensor:
        """[M], zeros where there is none; a Gated SAE's are `b_gate` and `b_mag`."""
        return self._times_norms(self.ours.b_enc)

    @property
    def b_dec(self) -> Tensor:
        """[D]"""
        return self.ours.b_dec

    @property
    def b_mag(self) -> Tensor:
        """[M] of a Gated SAE, which SAEBench reads for its `b_enc`. Raises AttributeError for others."""
        return self._times_norms(self.ours.get_parameter("b_mag_M"))

    @property
    def b_gate(self) -> Tensor:
        """[M] of a Gated SAE. Raises AttributeError for others."""
        return self.ours.get_parameter("b_gate_M")

    @property
    def device(self) -> torch.device:
        return self.ours.device

    @property
    def dtype(self) -> torch.dtype:
        return self.ours.dtype

    def encode(self, x: Tensor) -> Tensor:
        """[..., M] from raw activations [..., D], zeros where nothing fires. Raises ValueError as `SparseAutoencoder.encode` does."""
        return self._times_norms(self.ours.encode(x).to_dense())

    def decode(self, feature_acts: Tensor) -> Tensor:
        """f W_dec + b_dec, [..., D], of latents [..., M], of `encode` or others. Raises ValueError for another shape, or for no tensor."""
        real(feature_acts, "latents", f"[..., {self.cfg.d_sae}]")
        if feature_acts.ndim == 0 or feature_acts.shape[-1] != self.cfg.d_sae:
            raise ValueError(f"latents have shape {tuple(feature_acts.shape)}; this SAE's are [..., d_sae={self.cfg.d_sae}]. Use what encode gives.")
        return feature_acts.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """[..., D]"""
        return self.decode(self.encode(x))

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Nothing to do: there is none."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Where `.to()`, `.half()`, `.cuda()` and the like all go."""
        super()._apply(fn, recurse)
        self._keep_in_step()
        return self

    def _keep_in_step(self) -> None:
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)

    def _times_norms(self, last_M: Tensor) -> Tensor:
        return last_M if self.norm_M is None else last_M * self.norm_M


def wrap(
    sae: SparseAutoencoder,
    model_name: str | None = None,
    hook_name: str | None = None,
    context_size: int | None = None,
    prepend_bos: bool | None = None,
) -> PeerSAE:
    """An SAE as SAEBench and SAELens' evals take it: a copy in evaluation mode with its scale folded in; the SAE that is given stays as it is.

    What it was trained on is read from `sae.activations` unless it is said; `prepend_bos` is True where nobody says, as in SAEBench. Raises
    ValueError where model or hook are not known, for transcoders, which write elsewhere than they read, and for SAEs that normalise every token,
    whose latents do not hold what reconstructions need.
    """
    if not isinstance(sae, SparseAutoencoder):
        raise ValueError(f"wrap takes an SAE, not a {type(sae).__name__}. Use wrap(load_sae(PATH)).")
    if sae.is_transcoder:
        raise ValueError(
            f"{type(sae).__name__} writes to another hook than it reads, and SAEBench and SAELens' evals put decode(encode(x)) where x was. "
            "Give an autoencoder; this library's own scores know transcoders."
        )
    if isinstance(sae, TokenNormSAE):
        raise ValueError(
            f"this SAE normalises tokens ({sae.norm.name}): its latents alone cannot be decoded, and SAEBench hands decode nothing else. "
            "Evaluate it with SAELens' own class, from the files that it was read from."
        )
    known = getattr(sae, "activations", {})
    model_name, hook_name = model_name or known.get("model"), hook_name or known.get("hook")
    for setting, value, example in (("model_name", model_name, "gpt2"), ("hook_name", hook_name, "blocks.8.hook_resid_pre")):
        if not isinstance(value, str):
            raise ValueError(f"it is not known which {setting} this SAE was trained on. Say it: wrap(sae, {setting}={example!r}).")
    assert model_name is not None and hook_name is not None
    layer = re.search(r"\d+", hook_name)
    if layer is None:
        raise ValueError(f"hook_name={hook_name!r} names no layer, without which SAEBench runs nothing. Use one such as blocks.8.hook_resid_pre.")
    bos = known.get("prepend_bos") if prepend_bos is None else prepend_bos
    cfg = PeerCfg(
        model_name,
        hook_name,
        int(layer[0]),
        sae.d_in,
        sae.num_latents,
        _architecture(sae),
        _w_enc_is(sae),
        known.get("context_length") if context_size is None else context_size,
        True if bos is None else bool(bos),
    )
    folded = copy.deepcopy(sae).eval().requires_grad_(False)
    folded.fold_activation_scale()
    return PeerSAE(folded, cfg).eval()


def _architecture(sae: SparseAutoencoder) -> str:
    key = next((key for key, cls in SAES.items() if cls is type(sae)), type(sae).__name__)
    return _THEIR_NAMES.get(key, key) + ("" if sae.inference is sae.own_inference else f"+{sae.inference.name}")


def _w_enc_is(sae: SparseAutoencoder) -> str:
    if not sae.has_encoder:
        return _NONE
    if sae.inference is Inference.pursuit:
        return _UNUSED
    if not hasattr(sae, "W_enc_MD"):
        return _UNKNOWN
    return _ALL_EXPERTS if sae.is_routed else _ENCODER
