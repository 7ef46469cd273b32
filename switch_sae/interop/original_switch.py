"""The original Switch SAE's code (github.com/amudide/switch_sae): ae.pt, a pickled state dict, and a config.json that may be missing."""

from pathlib import Path
from typing import Any, ClassVar

from switch_sae.interop.base import Format
from switch_sae.interop.pickled import pickled_names, read_pickled
from switch_sae.interop.reading import TensorFile, agree, count, read_json, section
from switch_sae.interop.weights import DenseWeights, to_sae
from switch_sae.models import SAES, SparseAutoencoder

WEIGHTS, CONFIG = "ae.pt", "config.json"


class OriginalSwitch(Format):
    """p = softmax(W_router (x - b_router)), i = argmax p; f = p_i * the k largest of ReLU(W_enc^i (x - b_dec)), recon = W_dec f + b_dec.

    With `heaviside` the gate is 1 instead of p_i. The same code's dense TopK has `encoder.bias` and no router. Experts that have fewer than k latents
    give no more than those, there as here.
    """

    files: ClassVar = (WEIGHTS, CONFIG)
    settings: ClassVar = {"k": "k=64", "num_experts": "num_experts=16", "heaviside": "heaviside=False"}

    def recognises(self, path: Path) -> bool:
        names = pickled_names(file) if (file := path / WEIGHTS if path.is_dir() else path).is_file() else set()
        # Other libraries' decoders are modules: `decoder` is the name of one, and `decoder.weight` that of the tensor.
        return (
            {"encoder.weight", "decoder", "b_dec"} <= names
            and "decoder.weight" not in names
            and not {"router.weight", "encoder.bias"}.isdisjoint(names)
        )

    def load(self, path: Path, **settings: Any) -> SparseAutoencoder:
        self.check_settings(path, settings)
        folder, file = (path, path / WEIGHTS) if path.is_dir() else (path.parent, path)
        config_file = next((place / CONFIG for place in (folder, folder.parent) if (place / CONFIG).is_file()), None)
        trainer = section(config_file, read_json(config_file), "trainer") if config_file else {}
        tensors, _ = read_pickled(file)
        num_latents, d_in = tensors.size("encoder.weight")
        stored = {"k": trainer.get("k"), "num_experts": trainer.get("experts"), "heaviside": trainer.get("heaviside")}
        is_switch = "router.weight" in tensors
        needed = ("k", "num_experts", "heaviside") if is_switch else ("k",)
        if surplus := [name for name in settings if name not in needed]:
            raise ValueError(f"{path}: {surplus[0]} is no setting of its dense TopK, which has no router.")
        found = {name: agree(path, name, (CONFIG, stored[name]), ("what was given", settings.get(name))) for name in needed}
        if missing := [name for name in needed if found[name] is None]:
            typed = ", ".join(self.settings[name] for name in missing)
            raise ValueError(
                f"{path}: its files do not say {', '.join(missing)}, and a guess would give another SAE. Say it, as it was trained: "
                f'load_sae("{path}", {typed}); in a terminal, --set {typed.replace(", ", " ")}.'
            )
        k = count(path, "k", found["k"], num_latents)
        W_enc_MD = tensors.take("encoder.weight", num_latents, d_in)
        W_dec_MD, b_dec_D = tensors.take("decoder", num_latents, d_in), tensors.take("b_dec", d_in)
        if is_switch:
            return _switch(path, tensors, found, k, {"W_enc_MD": W_enc_MD, "W_dec_MD": W_dec_MD, "b_pre_D": b_dec_D})
        weights = DenseWeights("topk", W_enc_MD, W_dec_MD, tensors.take("encoder.bias", num_latents), b_dec_D, centred=True, k=k)
        tensors.finish()
        return to_sae(weights)

    def save(self, sae: SparseAutoencoder, path: Path) -> None:
        raise ValueError("files of the original Switch SAE can be read, not written: its code runs on a GPU alone. Write sae_lens instead.")


def _switch(path: Path, tensors: TensorFile, found: dict[str, Any], k: int, state: dict[str, Any]) -> SparseAutoencoder:
    num_latents, d_in = state["W_enc_MD"].shape
    num_experts, heaviside = count(path, "num_experts", found["num_experts"], num_latents), found["heaviside"]
    if not isinstance(heaviside, bool):
        raise ValueError(f"{path}: heaviside={str(heaviside)[:40]} must be True (the gate is 1) or False (the gate is the router's probability).")
    rows = tensors.size("router.weight")[0]
    if rows != num_experts:
        shared = "; one row fewer is an expert that is always on (switch1on.py), which nothing here computes" if rows == num_experts - 1 else ""
        raise ValueError(f"{path}: num_experts={num_experts}, but router.weight has {rows} rows{shared}.")
    if num_latents % num_experts:
        raise ValueError(f"{path}: {num_latents} latents are not divisible by num_experts={num_experts}; the original cannot compute it either.")
    plain = {
        "architecture": "switch",
        "num_latents": num_latents,
        "num_experts": num_experts,
        "k": min(k, num_latents // num_experts),  # its other picks are zeros of other experts
        "encoder_bias": False,
        "router": {"kind": "softmax", "gate": "hard" if heaviside else "probability"},
    }
    sae = SAES.build(SAES.from_plain(plain), d_in)
    state |= {"router.W_ED": tensors.take("router.weight", num_experts, d_in), "router.b_D": tensors.take("b_router", d_in)}
    tensors.finish()
    sae.load_state_dict({"activation_scale": sae.activation_scale, **state})
    return sae.eval()
