"""What SAEBench's core eval and SAELens' `run_evals` say of our SAEs: the end of `experiments.benchmarks.saebench` that runs in their environments.

FOLDER holds contexts.safetensors (`tokens` [C, S], `some` [c], `ignored`) and asked.json (a GPT-2's folder, SAEs by name); numbers.json is written.
"""

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

CONTEXTS_PER_BATCH = 16
"""SAEBench's default."""
CONTEXTS, ASKED, NUMBERS = "contexts.safetensors", "asked.json", "numbers.json"
Numbers = dict[str, float]


class Store:
    """Stands for an activation store, of which these evals ask for nothing but tokens: `some` contexts until it is reset, then all of them."""

    store_batch_size_prompts = CONTEXTS_PER_BATCH

    def __init__(self, tokens_CS: Tensor, some_C: Tensor) -> None:
        self.context_size = tokens_CS.shape[1]
        self._waiting = [iter(tokens_CS[some_C].split(CONTEXTS_PER_BATCH)), iter(tokens_CS.split(CONTEXTS_PER_BATCH))]
        self.batches = tuple(-(-len(contexts) // CONTEXTS_PER_BATCH) for contexts in (some_C, tokens_CS))
        """Of the first and of the second part."""

    def get_batch_tokens(self, _: int) -> Tensor:
        return next(self._waiting[0])

    def reset_input_dataset(self) -> None:
        self._waiting.pop(0)


def gpt2(folder: Path) -> Any:
    """A HookedTransformer from a GPT-2 of Hugging Face's format: its `from_pretrained` takes no folder."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    saved = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    sizes = saved.config
    config = HookedTransformerConfig(
        n_layers=sizes.n_layer,
        d_model=sizes.n_embd,
        n_ctx=sizes.n_positions,
        n_heads=sizes.n_head,
        d_head=sizes.n_embd // sizes.n_head,
        d_mlp=sizes.n_inner or 4 * sizes.n_embd,
        d_vocab=sizes.vocab_size,
        act_fn=sizes.activation_function,
        eps=sizes.layer_norm_epsilon,
        normalization_type="LN",
        device="cpu",
    )
    model = HookedTransformer(config)
    missing, unexpected = model.load_state_dict(convert_gpt2_weights(saved, config), strict=False)
    if wrong := [*unexpected, *(name for name in missing if name.rpartition(".")[2] not in ("mask", "IGNORE", "b_U"))]:  # b_U is 0: it has none
        raise ValueError(f"{folder}: transformer_lens places {wrong} elsewhere than its conversion of GPT-2 does.")
    return model.eval()


def flat(groups: dict[str, Any]) -> Numbers:
    """Numbers by name, of groups that SAEBench and SAELens make of them; token_stats are sizes of full batches, not what was evaluated."""
    return {name: float(value) for key, group in groups.items() if key != "token_stats" for name, value in group.items()}


def sae_lens(sae: Any, model: Any, store: Store, ignored: list[int]) -> Numbers:
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    config = get_eval_everything_config(CONTEXTS_PER_BATCH, *store.batches)
    numbers, features = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=ignored)
    density_M = torch.tensor(features["feature_density"], dtype=torch.float64)
    shares = {"frac_alive": density_M > 0, "freq_over_1_percent": density_M > 0.01, "freq_over_10_percent": density_M > 0.1}
    return flat(numbers) | {name: share_M.double().mean().item() for name, share_M in shares.items()}


def saebench(sae: Any, model: Any, store: Store, ignored: list[int]) -> Numbers:
    """From the file that its core eval writes."""
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    loaded = load_and_format_sae("switch_sae", sae, "cpu")
    assert loaded is not None
    sae = loaded[1].to(device="cpu", dtype=torch.float32)
    asked = [name for name in CoreEvalConfig.__dataclass_fields__ if name.startswith("compute_")]
    config = CoreEvalConfig(
        model_name=sae.cfg.model_name,
        batch_size_prompts=CONTEXTS_PER_BATCH,
        n_eval_reconstruction_batches=store.batches[0],
        n_eval_sparsity_variance_batches=store.batches[1],
        context_size=store.context_size,
        exclude_special_tokens_from_reconstruction=True,
        **dict.fromkeys(asked, True),
    )
    numbers, features = core.run_evals(sae, store, model, config, ignore_tokens=set(ignored))
    result = {"eval_cfg": config, "sae_set": "switch_sae", "sae_id": loaded[0], "feature_metrics": features}
    result["metrics"] = {**numbers, "misc_metrics": core.calculate_misc_metrics(features)}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/result.json"
        core.save_single_eval_result(core.replace_nans_with_negative_one(result), "here", "", "", file, sae)
        written = json.loads(Path(file).read_text())
    assert written["sae_cfg_dict"]["architecture_str"] == sae.cfg.architecture_str
    return flat(written["eval_result_metrics"])


LIBRARIES = {"sae-lens": ("6.54.12", sae_lens), "sae-bench": ("0.6.0", saebench)}
"""By name on PyPI."""


def serve(library: str, folder: Path) -> None:
    from switch_sae import load_sae
    from switch_sae.interop.saebench import wrap

    asked, tensors = json.loads((folder / ASKED).read_text()), load_file(folder / CONTEXTS)
    model, numbers = gpt2(Path(asked["model"])), {}
    with torch.no_grad():
        for name, path in asked["saes"].items():
            store = Store(tensors["tokens"], tensors["some"])
            numbers[name] = LIBRARIES[library][1](wrap(load_sae(path)), model, store, tensors["ignored"].tolist())
    (folder / NUMBERS).write_text(json.dumps({"version": importlib.metadata.version(library), "saes": numbers}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("folder", type=Path)
    serve(**vars(parser.parse_args()))
