"""Checkpoints of other libraries, read here, and ours, read there: python -m experiments.benchmarks.formats --out tests/golden/formats

Each library runs in an environment of its own (`.benchmark-peers/`). It saves tiny SAEs of all its architectures as it saves them, with what it makes
of the same activations; we read them. Then we write every architecture of ours in its format, it loads them, and both ends must agree.
Prints a table and, of all libraries, writes experiments/results/format_parity.csv; with `--out` their files become golden ones, which CI reads. Both
ends are here; the library's needs switch_sae for plug-ins alone.
"""

import argparse
import copy
import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
GOLDEN, OUTPUTS = ROOT / "tests" / "golden" / "formats", "outputs.safetensors"
CSV = ROOT / "experiments" / "results" / "format_parity.csv"
LIMIT = 1e-5
T, D, M, K, GROUPS = 6, 8, 16, 3, (4, 4, 8)
SETTINGS: dict[str, dict[str, Any]] = {
    "sae_lens/standard_scaled_outside": {"scaling_factor": 0.5},
    **{f"circuit_tracer/{name}": {"layer": 1} for name in ("relu", "relu_skip", "topk")},
}
"""What a case's files lack."""
Outputs = dict[str, Tensor]
"""`x` [T, D], `latents` [T, M], `recon` [T, D]."""


def randomised(module: Any, seed: int) -> Any:
    """Every weight away from its start: decoders of uneven norms, thresholds and gates that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name in ("threshold", "topk_threshold"):
                tensor.copy_(0.2 + 0.5 * torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point() and name != "activation_scale":
                wide = 1 / D**0.5 if tensor.ndim == 2 else 0.3
                tensor.copy_(wide * torch.randn(tensor.shape, generator=generator))
    return module


def activations() -> Tensor:
    return 2 * torch.randn(T, D, generator=torch.Generator().manual_seed(9)) + 0.5


def dense(latents: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(len(latents), M).scatter(1, indices, latents)


def apply(sae: Any, x: Tensor) -> Outputs:
    """What a library's SAE with `encode` and `decode` gives."""
    latents = sae.encode(x)
    return {"x": x, "latents": latents, "recon": sae.decode(latents)}


def write_dictionary_learning(folder: Path) -> Iterator[tuple[str, Outputs]]:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = [
        AutoEncoderTopK(D, M, K), BatchTopKSAE(D, M, K), MatryoshkaBatchTopKSAE(D, M, K, list(GROUPS)), dictionary.JumpReluAutoEncoder(D, M),
        dictionary.AutoEncoder(D, M), dictionary.AutoEncoderNew(D, M), dictionary.GatedAutoEncoder(D, M),
    ]  # fmt: skip
    for seed, sae in enumerate(made):
        name = type(sae).__name__
        (folder / name).mkdir()
        torch.save(randomised(sae, seed).state_dict(), folder / name / "ae.pt")
        trainer = {"trainer_class": "Trainer", "dict_class": name, "activation_dim": D, "dict_size": M, "lm_name": "none", "layer": 0}
        trainer |= {"k": K} if hasattr(sae, "k") else {}
        (folder / name / "config.json").write_text(json.dumps({"trainer": trainer}))
        yield name, read_dictionary_learning(folder / name)


def read_dictionary_learning(folder: Path) -> Outputs:
    from dictionary_learning.utils import load_dictionary

    return apply(load_dictionary(str(folder), "cpu")[0], activations())


def write_sparsify(folder: Path) -> Iterator[tuple[str, Outputs]]:
    from sparsify import SparseCoder, SparseCoderConfig

    cases = {
        "topk": {"num_latents": M},
        "topk_by_expansion_factor": {"expansion_factor": M // D},
        "topk_skip": {"num_latents": M, "skip_connection": True},
        "transcoder": {"num_latents": M, "transcode": True},
        "transcoder_skip": {"num_latents": M, "transcode": True, "skip_connection": True},
    }
    for seed, (name, settings) in enumerate(cases.items()):
        randomised(SparseCoder(D, SparseCoderConfig(k=K, **settings), dtype=torch.float32), seed).save_to_disk(folder / name)
        yield name, read_sparsify(folder / name)


def read_sparsify(folder: Path) -> Outputs:
    from sparsify import SparseCoder

    x = activations()
    out = SparseCoder.load_from_disk(folder)(x)
    return {"x": x, "latents": dense(out.latent_acts, out.latent_indices), "recon": out.sae_out}


def write_sae_lens(folder: Path) -> Iterator[tuple[str, Outputs]]:
    import sae_lens.saes as lens
    from sae_lens.saes import batchtopk_sae, matryoshka_batchtopk_sae
    from sae_lens.training.activation_scaler import ActivationScaler

    def make(kind: str, home: Any = lens, **settings: Any) -> Any:
        return getattr(home, kind)(getattr(home, f"{kind}Config")(d_in=D, d_sae=M, **settings))

    norms = ("layer_norm", "constant_norm_rescale")
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "standard": ("StandardSAE", {}),
        "standard_uncentred": ("StandardSAE", {"apply_b_dec_to_input": False}),
        "topk": ("TopKSAE", {"k": K}),
        "topk_rescaled": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "topk_uncentred": ("TopKSAE", {"k": K, "apply_b_dec_to_input": False}),
        "jumprelu": ("JumpReLUSAE", {}),
        "jumprelu_uncentred": ("JumpReLUSAE", {"apply_b_dec_to_input": False}),
        "gated": ("GatedSAE", {}),
        "gated_uncentred": ("GatedSAE", {"apply_b_dec_to_input": False}),
        **{f"topk_{norm}": ("TopKSAE", {"k": K, "normalize_activations": norm}) for norm in norms},
        **{f"jumprelu_{norm}": ("JumpReLUSAE", {"normalize_activations": norm}) for norm in norms},
        "transcoder": ("Transcoder", {"d_out": D + 3, "apply_b_dec_to_input": False}),
        "skip_transcoder": ("SkipTranscoder", {"d_out": D + 3, "apply_b_dec_to_input": False}),
    }
    for seed, (name, (kind, settings)) in enumerate(cases.items()):
        randomised(make(kind, **settings), seed).save_model(folder / name)
        yield name, read_sae_lens(folder / name)
    x, scaler = activations(), ActivationScaler(scaling_factor=0.5)
    scaled = randomised(make("TopKTrainingSAE", k=K, normalize_activations="expected_average_only_in"), 20)
    checkpoint(scaled, folder / "topk_training_checkpoint", scaler)
    yield "topk_training_checkpoint", through(scaled, scaler, x)
    standard = randomised(make("StandardSAE", normalize_activations="expected_average_only_in"), 21)
    standard.save_model(folder / "standard_scaled_outside")
    yield "standard_scaled_outside", through(standard, scaler, x)
    whitening = ActivationScaler()
    generator = torch.Generator().manual_seed(5)
    whitening.estimate_whitening(D, iter(lambda: torch.randn(64, D, generator=generator) * torch.arange(1.0, D + 1) + 1, None), 4)
    for centred in (True, False):
        name = "gated_whitened" + ("" if centred else "_uncentred")
        white = randomised(make("GatedSAE", normalize_activations="covariance_whitening", apply_b_dec_to_input=centred), 22)
        checkpoint(white, folder / name, whitening)
        yield name, through(white, whitening, x)
    # Training SAEs choose over the batch; what they are saved as for inference is the function that a threshold gives.
    for name, home, kind, more in (
        ("batchtopk_training_checkpoint", batchtopk_sae, "BatchTopKTrainingSAE", {}),
        ("matryoshka_training_checkpoint", matryoshka_batchtopk_sae, "MatryoshkaBatchTopKTrainingSAE", {"matryoshka_widths": [4, 8, 16]}),
    ):
        sae = randomised(make(kind, home, k=K, **more), 23)
        sae.topk_threshold.fill_(0.4)
        sae.save_model(folder / name)
        with tempfile.TemporaryDirectory() as inference:
            sae.save_inference_model(inference)
            yield name, read_sae_lens(Path(inference))


def checkpoint(sae: Any, folder: Path, scaler: Any) -> None:
    """As SAELens' trainer does."""
    sae.save_model(folder)
    scaler.save(str(folder / "activation_scaler.json"))


def through(sae: Any, scaler: Any, x: Tensor) -> Outputs:
    """An SAE that is given scaled activations."""
    outputs = apply(sae, scaler.scale(x))
    return {**outputs, "x": x, "recon": scaler.unscale(outputs["recon"])}


def read_sae_lens(folder: Path) -> Outputs:
    from sae_lens import SAE

    if json.loads((folder / "cfg.json").read_text())["architecture"] == "switch_sae":
        from switch_sae.interop.sae_lens_plugin import register

        register()
    x = activations()
    sae = SAE.load_from_disk(folder)
    outputs, recon = apply(sae, x), sae(x[None])[0]
    # Leading dimensions, and decode(encode(x)) == forward(x), to which a transcoder of SAELens adds its skip path.
    assert torch.equal(recon, outputs["recon"]) or getattr(sae, "W_skip", getattr(sae, "switch_sae", None)) is not None
    return {**outputs, "recon": recon}


def write_circuit_tracer(folder: Path) -> Iterator[tuple[str, Outputs]]:
    """Sets of two layers, of which the second is applied. 0.5.0 writes no config.yaml; `activation` and `k` are those of pull request 94."""
    from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet
    from circuit_tracer.transcoder.activation_functions import TopK

    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    for seed, (name, act, skip) in enumerate((("relu", torch.relu, False), ("relu_skip", torch.relu, True), ("topk", TopK(K), False))):
        layers = {i: randomised(SingleLayerTranscoder(D, M, act, i, skip, dtype=torch.float32), 2 * seed + i) for i in range(2)}
        found = TranscoderSet(layers, **hooks)
        found.to_safetensors(str(folder / name))
        config = {"model_name": "tiny", "model_kind": "transcoder_set", **hooks} | ({"activation": "topk", "k": K} if name == "topk" else {})
        (folder / name / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in config.items()))
        yield name, through_layer(layers[1])


def read_circuit_tracer(folder: Path) -> Outputs:
    """Its first layer; what files cannot say is read from a model.safetensors by the plug-in."""
    import yaml
    from circuit_tracer.transcoder import load_transcoder_set
    from circuit_tracer.transcoder.activation_functions import TopK

    if (folder / "model.safetensors").is_file():
        from switch_sae import load_sae
        from switch_sae.interop.circuit_tracer_plugin import transcoder_set

        found = transcoder_set([load_sae(folder)])
    else:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        hooks = {name: config[name] for name in ("feature_input_hook", "feature_output_hook", "scan")}
        found = load_transcoder_set({0: str(folder / "layer_0.safetensors")}, **hooks, device=torch.device("cpu"))
        if config["activation"] == "topk":  # as it is read since pull request 94
            found[0].activation_function = TopK(config["k"])
    outputs = through_layer(found[0])
    parts = found.compute_attribution_components(outputs["x"][None], slice(0, 0))
    torch.testing.assert_close(parts["reconstruction"][0], outputs["recon"])
    _, token, latent = parts["activation_matrix"].indices()
    assert torch.equal(outputs["latents"][token, latent], parts["activation_matrix"].values())
    # What attribution multiplies: a feature's value is its encoder's vector times x, plus what does not depend on x but for the gate.
    vectors = found[0].W_enc[latent] if (routed := getattr(found[0], "routed", None)) is None else parts["encoder_vecs"]
    gate = (vectors / found[0].W_enc[latent]).mean(1)
    values = (parts["encoder_vecs"] * outputs["x"][token]).sum(1) + gate * found[0].b_enc[latent]
    torch.testing.assert_close(values, parts["activation_matrix"].values(), rtol=1e-4, atol=1e-5)
    assert routed is None or float(gate.max()) < 1
    return outputs


def through_layer(transcoder: Any) -> Outputs:
    x = activations()
    return {"x": x, "latents": transcoder.encode(x), "recon": transcoder(x)}


Library = tuple[str, Callable[[Path], Iterator[tuple[str, Outputs]]], Callable[[Path], Outputs]]
LIBRARIES: dict[str, Library] = {
    "dictionary_learning": ("dictionary-learning", write_dictionary_learning, read_dictionary_learning),
    "sparsify": ("eai-sparsify", write_sparsify, read_sparsify),
    "sae_lens": ("sae-lens", write_sae_lens, read_sae_lens),
    "circuit_tracer": ("circuit-tracer", write_circuit_tracer, read_circuit_tracer),
}


def serve(format_name: str, folder: Path, what: str) -> None:
    """In the library's own environment: makes its checkpoints in `folder`, or reads those that are there."""
    package, write, read = LIBRARIES[format_name]
    cases = write(folder) if what == "write" else ((path.name, read(path)) for path in sorted(folder.iterdir()))
    with torch.no_grad():
        for name, outputs in cases:
            tensors = {key: value.detach().to(torch.float32).contiguous() for key, value in outputs.items()}
            save_file(tensors, folder / name / OUTPUTS, {"version": importlib.metadata.version(package)})


def environment_of(format_name: str) -> tuple[str, tuple[str, ...]]:
    """(the library's version that is compared with, dependencies that its environment does without)."""
    from experiments.benchmarks.parity import PEERS

    package = LIBRARIES[format_name][0]
    return (PEERS[package][0], PEERS[package][2]) if package in PEERS else ("0.5.0", ())


def asked(format_name: str, folder: Path, what: str) -> None:
    """`serve` in the library's environment. Raises CalledProcessError where it fails; what it printed is on the terminal."""
    from experiments.benchmarks.peers import PeerEnvironment

    environment = PeerEnvironment(LIBRARIES[format_name][0], *environment_of(format_name))
    environment.make()
    command = [str(environment.python), "-P", __file__, "--serve", format_name, str(folder), what]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "SPARSIFY_DISABLE_TRITON": "1", "PYTHONPATH": paths})


def our_saes() -> Iterator[tuple[str, Any]]:
    """Every architecture of ours, on scaled activations."""
    from switch_sae.interop.token_norm import TokenNorm, TokenNormSAE
    from switch_sae.models import SAES, Inference, with_inference

    plain: dict[str, dict[str, Any]] = {
        "topk": {"k": K},
        "topk_unbiased": {"architecture": "topk", "k": K, "encoder_bias": False},
        "batch_topk": {"k": K},
        "matryoshka": {"k": K, "group_fractions": [0.25, 0.25]},
        "relu": {},
        "gated": {},
        "jumprelu": {},
        "switch": {"k": K, "num_experts": 4},
        "switch_two": {"architecture": "switch", "k": K, "num_experts": 4, "experts_per_token": 2, "router": {"kind": "sigmoid"}},
        "pursuit": {"k": K},
        "transcoder": {"k": K},
        "transcoder_skip": {"architecture": "transcoder", "k": K, "skip": "full"},
        "transcoder_low_rank": {"architecture": "transcoder", "k": K, "skip": "low_rank", "skip_rank": 2, "d_out": D + 3},
        "transcoder_relu": {"architecture": "transcoder", "k": M, "skip": "full"},
        "transcoder_relu_no_skip": {"architecture": "transcoder", "k": M, "d_out": D + 3},
        "switch_transcoder": {"k": K, "num_experts": 4, "skip": "full"},
        "switch_transcoder_two": {"architecture": "switch_transcoder", "k": K, "num_experts": 4, "experts_per_token": 2},
    }
    for seed, (name, settings) in enumerate(plain.items()):
        sae = SAES.build(SAES.from_plain({"architecture": name, "num_latents": M, **settings}), D, torch.Generator().manual_seed(seed)).eval()
        randomised(sae, seed)
        with torch.no_grad():
            sae.decoder_weight().copy_(torch.nn.functional.normalize(sae.decoder_weight(), dim=1))
        sae.activation_scale.fill_(0.4)
        if sae.is_transcoder:
            sae.output_scale.fill_(0.7)
            sae.activations = {"model": "tiny", "hook": "blocks.0.mlp.hook_in", "target_hook": "blocks.0.hook_mlp_out"}
        yield name, sae
        if name == "switch":
            yield "switch_refitted", with_inference(sae, Inference.refit)
        if name == "topk":
            normalised = copy.deepcopy(sae)
            normalised.fold_activation_scale()
            yield "topk_layer_norm", TokenNormSAE(normalised, TokenNorm.layer_norm).eval()


def ours(sae: Any, x: Tensor) -> Outputs:
    """What an SAE of ours gives, with latents in units of raw activations."""
    with torch.no_grad():
        output = sae(x)
        return {"latents": output.latents.to_dense() / sae.activation_scale, "recon": output.recon_TD}


def difference(found: Outputs, expected: Outputs) -> float:
    """The largest |found - expected| / max |expected| of latents and reconstructions."""
    parts = ((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12) for name in ("latents", "recon"))
    return max(float(part.detach()) for part in parts)


def loaded(format_name: str, folder: Path) -> tuple[Outputs, Outputs]:
    """(what the library made of its checkpoint, what we make of it), latents in its own units."""
    from switch_sae import load_sae

    expected = load_file(folder / OUTPUTS)
    sae = load_sae(folder, **SETTINGS.get(f"{format_name}/{folder.name}", {}))
    with torch.no_grad():
        output = sae(expected["x"])
    return expected, {"latents": output.latents.to_dense(), "recon": output.recon_TD}


def compare(format_name: str, out: Path | None) -> list[tuple[str, str, float]]:
    """(direction, case, difference) of one library."""
    from switch_sae import save_sae
    from switch_sae.interop import FORMATS

    with tempfile.TemporaryDirectory() as name:
        theirs, written = Path(name, "theirs"), Path(name, "ours")
        theirs.mkdir()
        written.mkdir()
        asked(format_name, theirs, "write")
        rows = [("read", folder.name, difference(*reversed(loaded(format_name, folder)))) for folder in sorted(theirs.iterdir())]
        if out:
            shutil.rmtree(out / format_name, ignore_errors=True)
            shutil.copytree(theirs, out / format_name)
        saes = {}
        for key, sae in our_saes():
            if format_name == "circuit_tracer" and sae.is_transcoder and sae.d_out == sae.d_in:  # by the plug-in
                save_sae(written / f"{key}_in_memory" / "model.safetensors", sae, sae.activations)
                saes[f"{key}_in_memory"] = sae
            try:
                FORMATS[format_name]().save(sae, written / key)
            except ValueError as error:
                print(f"{format_name}: {key} is not written: {error}")
                continue
            saes[key] = sae
        asked(format_name, written, "read")
        return rows + [("written", key, difference(load_file(written / key / OUTPUTS), ours(sae, activations()))) for key, sae in saes.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="which to compare with")
    parser.add_argument("--out", type=Path, help="also keep the libraries' files here, such as tests/golden/formats")
    parser.add_argument("--serve", nargs=3, metavar=("FORMAT", "FOLDER", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve[0], Path(options.serve[1]), options.serve[2])
    measured, rows = [], []
    for format_name in options.formats:
        for direction, case, value in compare(format_name, options.out):
            measured.append(value)
            row = {"format": format_name, "version": environment_of(format_name)[0], "direction": direction, "case": case}
            rows.append({**row, "max_rel_diff": f"{value:.1e}"})
            print(f"{format_name:20s} {direction:8s} {case:36s} {value:.1e}", flush=True)
    if set(options.formats) == set(LIBRARIES):
        with CSV.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"worst: {max(measured):.1e} of the largest value; at most {LIMIT:.0e} is parity")
    sys.exit(not all(value <= LIMIT for value in measured))  # NaN is no parity either


if __name__ == "__main__":
    main()
