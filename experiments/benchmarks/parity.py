"""Our SAEs against the libraries that researchers use, on the same weights: python -m experiments.benchmarks.parity [--golden]

Each library runs in an environment of its own (`.benchmark-peers/`), as a process that is handed weights and activations as safetensors and hands
back what its classes make of them. Both ends are here; the library's end needs neither switch_sae nor this environment.
Prints a table and, of all libraries, writes experiments/results/peer_parity.csv; `--golden` also writes tests/golden/peers.safetensors, which CI
reproduces.
"""

import argparse
import csv
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSV, GOLDEN = ROOT / "experiments" / "results" / "peer_parity.csv", ROOT / "tests" / "golden" / "peers.safetensors"
LIMIT = 1e-5
L1, L0, TANH, PRE_ACT, BANDWIDTH = 0.7, 0.3, 0.5, 0.2, 0.3

Outputs = dict[str, Tensor]
"""`latents` [T, M], `recon` [T, D], `loss/TERM` and `grad/PARAMETER`, in our names and shapes."""


@dataclass(frozen=True)
class Size:
    T: int
    D: int
    M: int
    k: int
    groups: tuple[int, ...]
    """Matryoshka's group sizes; they sum to M."""


FULL = Size(T=512, D=64, M=1024, k=16, groups=(32, 64, 128, 256, 544))
TINY = Size(T=8, D=4, M=16, k=2, groups=(2, 4, 10))


@dataclass(frozen=True)
class Case:
    """One class of a library and what it must agree with here."""

    library: str
    peer: str
    """The library's class, and how it is called where there are several ways."""
    ours: str
    """Key of `SAES`."""
    config: dict[str, Any] = field(default_factory=dict)
    training: bool = False
    free_decoder: bool = False
    auxk: bool = False
    """The loss holds AuxK, on those of the `dead` latents that do not fire."""
    fold_centre: bool = False
    """The peer subtracts b_pre before encoding and we do not: b_enc - W_enc b_pre does the same."""

    @property
    def key(self) -> str:
        return f"{self.library}/{self.peer}"


CASES = [
    Case("sae-lens", "StandardTrainingSAE", "relu", {"l1": L1}, training=True, free_decoder=True),
    Case("sae-lens", "StandardSAE", "relu", free_decoder=True),
    Case("sae-lens", "GatedTrainingSAE", "gated", {"l1": L1}, training=True),
    Case("sae-lens", "GatedSAE", "gated"),
    Case("sae-lens", "JumpReLUTrainingSAE (step)", "jumprelu", {"sparsity": "l0"}, training=True),
    Case("sae-lens", "JumpReLUTrainingSAE (tanh)", "jumprelu", {"sparsity": "tanh"}, training=True, free_decoder=True),
    Case("sae-lens", "JumpReLUSAE", "jumprelu"),
    Case("sae-lens", "TopKSAE", "topk"),
    Case("sae-lens", "BatchTopKTrainingSAE", "batch_topk", training=True),
    Case("sae-lens", "BatchTopKTrainingSAE (saved as JumpReLUSAE)", "batch_topk"),
    Case("sae-lens", "MatryoshkaBatchTopKTrainingSAE", "matryoshka", training=True),
    Case("dictionary-learning", "AutoEncoder, StandardTrainerAprilUpdate", "relu", {"l1": L1}, training=True, free_decoder=True, fold_centre=True),
    Case("dictionary-learning", "AutoEncoderNew", "relu", free_decoder=True),
    Case("dictionary-learning", "GatedAutoEncoder, GatedSAETrainer", "gated", {"l1": L1}, training=True),
    Case("dictionary-learning", "JumpReluAutoEncoder", "jumprelu"),
    Case("dictionary-learning", "AutoEncoderTopK, TopKTrainer", "topk", training=True, auxk=True),
    Case("dictionary-learning", "BatchTopKSAE, BatchTopKTrainer", "batch_topk", training=True, auxk=True),
    Case("dictionary-learning", "BatchTopKSAE (threshold)", "batch_topk"),
    Case("dictionary-learning", "MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer", "matryoshka", training=True, auxk=True),
    Case("dictionary-learning", "MatryoshkaBatchTopKSAE (threshold)", "matryoshka"),
    Case("eai-sparsify", "SparseCoder", "topk"),
]


def inputs(size: Size) -> dict[str, Tensor]:
    """Activations, and weights from which every case takes what its architecture has."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = torch.nn.functional.normalize(normal(size.M, size.D), dim=1)
    dead = torch.arange(size.M) % 3 == 0
    return {
        "x": normal(size.T, size.D) + 0.5,
        "W_enc": W_dec + 0.05 * normal(size.M, size.D),
        "W_dec": W_dec,
        "W_free": (W_dec * (0.5 + torch.rand(size.M, 1, generator=generator))).contiguous(),
        "b_enc": 0.2 * normal(size.M) - 0.3 - 0.7 * dead,
        "dead": dead,
        "b_pre": 0.3 * normal(size.D),
        "b_gate": 0.2 * normal(size.M) - 0.5,
        "b_mag": 0.2 * normal(size.M),
        "r_mag": 0.3 * normal(size.M),
        "threshold": 0.2 + torch.rand(size.M, generator=generator),
        "batch_threshold": torch.tensor(1.1),
        "k": torch.tensor(size.k),
        "groups": torch.tensor(size.groups),
    }


def our_outputs(case: Case, tensors: dict[str, Tensor]) -> Outputs:
    """What our architecture makes of the same weights."""
    from switch_sae.models import SAES
    from switch_sae.models.jumprelu import Sparsity
    from switch_sae.rows import Rows

    num_latents, d_in = tensors["W_enc"].shape
    settings = {"num_latents": num_latents, **case.config}
    if case.ours in ("topk", "batch_topk", "matryoshka"):
        settings |= {"k": int(tensors["k"])}
    if case.ours == "matryoshka":
        settings |= {"group_fractions": [int(size) / num_latents for size in tensors["groups"][:-1]]}
    if case.ours == "jumprelu":
        settings |= {
            "sparsity": Sparsity[settings.get("sparsity", "l0")],
            "bandwidth": BANDWIDTH,
            "l0": L0 / d_in,
            "tanh": TANH / d_in,
            "pre_act": PRE_ACT,
        }
    sae = SAES[case.ours](SAES[case.ours].Config(**settings), d_in).train(case.training)
    state = {f"{name}_M": tensors[name].clone() for name in ("b_enc", "b_gate", "b_mag", "r_mag")}
    state |= {"W_enc_MD": tensors["W_enc"], "W_dec_MD": tensors["W_free" if case.free_decoder else "W_dec"], "b_pre_D": tensors["b_pre"]}
    state |= {"log_threshold_M": tensors["threshold"].log(), "threshold": tensors["batch_threshold"]}
    if case.fold_centre:
        state["b_enc_M"] -= tensors["W_enc"] @ tensors["b_pre"]
    sae.load_state_dict({name: state.get(name, buffer) for name, buffer in sae.state_dict().items()})
    output = sae(tensors["x"])
    found = {"latents": output.latents.to_dense(), "recon": output.recon_TD}
    if case.training:
        dead_M = tensors["dead"] & (output.latents.firing_counts() == 0) if case.auxk else None
        terms = sae.loss_terms(Rows.of(tensors["x"]), output, dead_M)
        found |= {f"loss/{name}": term for name, term in terms.items()}
        gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), list(sae.parameters()))
        found |= {f"grad/{name}": gradient for (name, _), gradient in zip(sae.named_parameters(), gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()


def differences(case: Case, tensors: dict[str, Tensor], theirs: Outputs) -> dict[str, float]:
    """`difference` of everything that the library gave."""
    ours = our_outputs(case, tensors)
    return {name: difference(ours[name], tensor) for name, tensor in theirs.items()}


def fill(module: torch.nn.Module, **tensors: Tensor) -> Any:
    """`module` with these values in the parameters and buffers of these names (`encoder__weight` for `encoder.weight`)."""
    found = dict([*module.named_parameters(), *module.named_buffers()])
    with torch.no_grad():
        for name, tensor in tensors.items():
            found[name.replace("__", ".")].copy_(tensor)
    return module


def sae_lens(t: dict[str, Tensor]) -> Iterator[tuple[str, Outputs]]:
    """SAELens: its inference classes, and `training_forward_pass` of its training classes."""
    import sae_lens.saes as lens
    from sae_lens.saes import matryoshka_batchtopk_sae as matryoshka
    from sae_lens.saes.sae import TrainStepInput

    x, k, (num_latents, d_in) = t["x"], int(t["k"]), t["W_enc"].shape
    weights = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_dec": t["b_pre"]}
    free, gated = {**weights, "W_dec": t["W_free"]}, {**weights, **{name: t[name] for name in ("b_gate", "b_mag", "r_mag")}}
    jump = {"b_enc": t["b_enc"], "threshold": t["threshold"]}

    def make(kind: str, values: dict[str, Tensor], centre: bool, home: Any = lens, **settings: Any) -> Any:
        config = getattr(home, f"{kind}Config")(d_in=d_in, d_sae=num_latents, apply_b_dec_to_input=centre, **settings)
        return fill(getattr(home, kind)(config), **values)

    def infer(sae: Any) -> Outputs:
        latents = sae.encode(x)
        return {"latents": latents, "recon": sae.decode(latents)}

    def train(sae: Any, names: dict[str, str], coefficients: dict[str, float], gradients: dict[str, str]) -> Outputs:
        dead = torch.ones(num_latents, dtype=torch.bool) if "pre_act_loss" in names else None  # its pre-activation loss looks at dead latents alone
        out = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))
        out.loss.backward()
        found = {"latents": out.feature_acts, "recon": out.sae_out, **{f"loss/{ours}": out.losses[name] for name, ours in names.items()}}
        parameters = dict(sae.named_parameters())
        for name, ours in gradients.items():
            gradient = parameters[name].grad
            assert gradient is not None
            found[f"grad/{ours}"] = gradient.T if name == "W_enc" else gradient * t["threshold"] if name == "threshold" else gradient
        return found

    all_gradients = {"W_enc": "W_enc_MD", "W_dec": "W_dec_MD", "b_enc": "b_enc_M", "b_dec": "b_pre_D"}
    jump_gradients = {**all_gradients, "threshold": "log_threshold_M"}
    relu = make("StandardTrainingSAE", {**free, "b_enc": t["b_enc"]}, False)
    yield "StandardTrainingSAE", train(relu, {"mse_loss": "mse", "l1_loss": "l1"}, {"l1": L1}, all_gradients)
    yield "StandardSAE", infer(make("StandardSAE", {**free, "b_enc": t["b_enc"]}, False))
    # Its auxiliary loss does not freeze the decoder and its penalty weighs gates by decoder norms (1 here): gradients of W_dec and b_dec are others.
    gate_gradients = {"b_gate": "b_gate_M", "b_mag": "b_mag_M", "r_mag": "r_mag_M", "W_enc": "W_enc_MD"}
    gate_terms = {"mse_loss": "mse", "l1_loss": "l1", "auxiliary_reconstruction_loss": "gate_mse"}
    yield "GatedTrainingSAE", train(make("GatedTrainingSAE", gated, True), gate_terms, {"l1": L1}, gate_gradients)
    yield "GatedSAE", infer(make("GatedSAE", gated, True))
    step = make("JumpReLUTrainingSAE", {**weights, **jump}, False, jumprelu_bandwidth=BANDWIDTH)
    yield "JumpReLUTrainingSAE (step)", train(step, {"mse_loss": "mse", "l0_loss": "l0"}, {"l0": L0}, jump_gradients)
    anthropic = {"jumprelu_sparsity_loss_mode": "tanh", "pre_act_loss_coefficient": PRE_ACT, "jumprelu_ste_to_input": True}
    tanh = make("JumpReLUTrainingSAE", {**free, **jump}, False, jumprelu_bandwidth=BANDWIDTH, **anthropic)
    tanh_terms = {"mse_loss": "mse", "l0_loss": "tanh", "pre_act_loss": "pre_act"}
    yield "JumpReLUTrainingSAE (tanh)", train(tanh, tanh_terms, {"l0": TANH}, jump_gradients)
    yield "JumpReLUSAE", infer(make("JumpReLUSAE", {**weights, **jump}, False))
    biased = {**weights, "b_enc": t["b_enc"]}
    yield "TopKSAE", infer(make("TopKSAE", biased, True, k=k))
    batch = make("BatchTopKTrainingSAE", biased, True, k=k, rescale_acts_by_decoder_norm=False)
    yield "BatchTopKTrainingSAE", train(batch, {"mse_loss": "mse"}, {}, all_gradients)
    saved = {**biased, "threshold": t["batch_threshold"].expand(num_latents)}
    yield "BatchTopKTrainingSAE (saved as JumpReLUSAE)", infer(make("JumpReLUSAE", saved, True))
    widths = t["groups"].cumsum(0).tolist()
    settings = {"k": k, "matryoshka_widths": widths, "rescale_acts_by_decoder_norm": False}
    nested = train(make("MatryoshkaBatchTopKTrainingSAE", biased, True, matryoshka, **settings), {}, {}, all_gradients)
    # It adds up the prefixes' losses, of which we take the mean.
    yield "MatryoshkaBatchTopKTrainingSAE", {key: v / len(widths) if key.startswith("grad/") else v for key, v in nested.items()}


def dictionary_learning(t: dict[str, Tensor]) -> Iterator[tuple[str, Outputs]]:
    """dictionary_learning: its dictionaries, and `loss` of its trainers."""
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, gdm, matryoshka_batch_top_k, standard, top_k

    x, k, (num_latents, d_in) = t["x"], int(t["k"]), t["W_enc"].shape
    shared = {"steps": 10, "activation_dim": d_in, "dict_size": num_latents, "layer": 0, "lm_name": "none", "device": "cpu", "warmup_steps": 1}
    linear = {"encoder__weight": t["W_enc"], "encoder__bias": t["b_enc"], "decoder__weight": t["W_dec"].T}
    separate = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_pre"]}

    def infer(sae: Any, **how: Any) -> Outputs:
        latents = sae.encode(x, **how)
        return {"latents": latents, "recon": sae.decode(latents)}

    def loss_of(trainer: Any) -> dict[str, float]:
        if hasattr(trainer, "num_tokens_since_fired"):
            trainer.num_tokens_since_fired = t["dead"].long() * trainer.dead_feature_threshold
        return trainer.loss(x, step=5, logging=True).losses

    def topk_terms(trainer: Any, copies: int = 1) -> Outputs:
        """Our AuxK is in units of the reconstruction loss: D times theirs."""
        losses = loss_of(trainer)
        return terms(mse=losses["l2_loss"] * copies, auxk=losses["auxk_loss"] * trainer.auxk_alpha * d_in)

    def terms(**values: float) -> Outputs:
        return {f"loss/{name}": torch.tensor(value) for name, value in values.items()}

    april = standard.StandardTrainerAprilUpdate(**shared, l1_penalty=L1, sparsity_warmup_steps=None)
    fill(april.ae, **{**linear, "decoder__weight": t["W_free"].T}, bias=t["b_pre"])
    losses = loss_of(april)
    yield "AutoEncoder, StandardTrainerAprilUpdate", infer(april.ae) | terms(mse=losses["mse_loss"], l1=L1 * losses["sparsity_loss"])
    new = fill(dictionary.AutoEncoderNew(d_in, num_latents), **{**linear, "decoder__weight": t["W_free"].T}, decoder__bias=t["b_pre"])
    yield "AutoEncoderNew", infer(new)
    gated = gdm.GatedSAETrainer(**shared, l1_penalty=L1, sparsity_warmup_steps=None)
    gates = {"gate_bias": t["b_gate"], "mag_bias": t["b_mag"], "r_mag": t["r_mag"], "decoder_bias": t["b_pre"]}
    fill(gated.ae, encoder__weight=t["W_enc"], decoder__weight=t["W_dec"].T, **gates)
    losses = loss_of(gated)
    gate_terms = terms(mse=losses["mse_loss"], l1=L1 * losses["sparsity_loss"], gate_mse=losses["aux_loss"])
    yield "GatedAutoEncoder, GatedSAETrainer", infer(gated.ae) | gate_terms
    yield "JumpReluAutoEncoder", infer(fill(dictionary.JumpReluAutoEncoder(d_in, num_latents), **separate, threshold=t["threshold"]))
    topk = top_k.TopKTrainer(**shared, k=k)
    fill(topk.ae, **linear, b_dec=t["b_pre"])
    yield "AutoEncoderTopK, TopKTrainer", infer(topk.ae) | topk_terms(topk)
    batch = batch_top_k.BatchTopKTrainer(**shared, k=k)
    fill(batch.ae, **linear, b_dec=t["b_pre"], threshold=t["batch_threshold"])
    yield "BatchTopKSAE, BatchTopKTrainer", infer(batch.ae, use_threshold=False) | topk_terms(batch)
    yield "BatchTopKSAE (threshold)", infer(batch.ae)
    groups = t["groups"].tolist()
    fractions = [size / num_latents for size in groups]
    nested = matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(**shared, k=k, group_fractions=fractions)
    fill(nested.ae, **separate, threshold=t["batch_threshold"])
    # It takes the mean of losses that are already weighted by 1 / G; we take the mean once.
    yield "MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer", infer(nested.ae, use_threshold=False) | topk_terms(nested, copies=len(groups))
    yield "MatryoshkaBatchTopKSAE (threshold)", infer(nested.ae)


def sparsify(t: dict[str, Tensor]) -> Iterator[tuple[str, Outputs]]:
    """EleutherAI's sparsify: the forward pass of its one class."""
    from sparsify import SparseCoder, SparseCoderConfig

    num_latents, d_in = t["W_enc"].shape
    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=num_latents, k=int(t["k"])), dtype=torch.float32)
    fill(sae, encoder__weight=t["W_enc"], encoder__bias=t["b_enc"], W_dec=t["W_dec"], b_dec=t["b_pre"])
    out = sae(t["x"])
    latents = torch.zeros(len(t["x"]), num_latents).scatter(1, out.latent_indices, out.latent_acts)
    yield "SparseCoder", {"latents": latents, "recon": out.sae_out}


PEERS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Iterator[tuple[str, Outputs]]], tuple[str, ...]]] = {
    "sae-lens": ("6.54.12", sae_lens, ()),
    # nnsight, which it imports, brings torchvision, whose wheel on PyPI is built for CUDA and fails beside a CPU build of torch.
    "dictionary-learning": ("0.1.0", dictionary_learning, ("torchvision",)),
    "eai-sparsify": ("1.3.3", sparsify, ()),
}


def serve(library: str, folder: str) -> None:
    """In the library's own environment: inputs.safetensors -> outputs.safetensors, whose header holds the library's version."""
    tensors = load_file(f"{folder}/inputs.safetensors")
    outputs = {
        f"{library}/{peer}:{name}": tensor.detach().contiguous() for peer, found in PEERS[library][1](tensors) for name, tensor in found.items()
    }
    save_file(outputs, f"{folder}/outputs.safetensors", {"version": importlib.metadata.version(library)})


def peer_outputs(library: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`library/class:output` -> tensor, computed by the library. Raises CalledProcessError where it fails; what it printed is on the terminal."""
    from experiments.benchmarks.peers import PeerEnvironment

    version, _, without = PEERS[library]
    environment = PeerEnvironment(library, version, without)
    environment.make()
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/inputs.safetensors")
        command = [str(environment.python), "-P", __file__, "--serve", library, folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "SPARSIFY_DISABLE_TRITON": "1"})
        return load_file(f"{folder}/outputs.safetensors")


def of_case(case: Case, outputs: dict[str, Tensor]) -> Outputs:
    """What `outputs` holds for one case."""
    return {key.partition(":")[2]: tensor for key, tensor in outputs.items() if key.partition(":")[0] == case.key}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", choices=PEERS, default=list(PEERS), help="which to compare with")
    parser.add_argument("--golden", action="store_true", help=f"also write {GOLDEN.relative_to(ROOT)} (needs all libraries)")
    parser.add_argument("--serve", nargs=2, metavar=("LIBRARY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(*options.serve)
    if options.golden and set(options.libraries) != set(PEERS):
        parser.error("--golden needs all libraries")
    tensors, rows = inputs(FULL), []
    for library in options.libraries:
        outputs = peer_outputs(library, tensors)
        for case in (case for case in CASES if case.library == library):
            found = differences(case, tensors, of_case(case, outputs))
            row: dict[str, Any] = {"library": library, "version": PEERS[library][0], "class": case.peer, "ours": case.ours}
            for column, kind in (("latents", "latents"), ("recon", "recon"), ("losses", "loss/"), ("gradients", "grad/")):
                values = [value for name, value in found.items() if name.startswith(kind)]
                row[f"{column}_max_rel_diff"] = f"{max(values):.1e}" if values else ""
            rows.append(row | {"rows": FULL.T, "worst": max(found, key=lambda name: found[name])})
            print(
                f"{case.key:85s} {case.ours:11s}",
                *(f"{key.split('_')[0]} {v or '-':8s}" for key, v in row.items() if key.endswith("diff")),
                flush=True,
            )
    if set(options.libraries) == set(PEERS):
        with CSV.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if options.golden:
        tiny = inputs(TINY)
        golden = {f"input:{name}": tensor for name, tensor in tiny.items()}
        for library in PEERS:
            golden |= peer_outputs(library, tiny)
        GOLDEN.parent.mkdir(exist_ok=True)
        save_file(golden, GOLDEN)
    measured = [float(value) for row in rows for key, value in row.items() if key.endswith("diff") and value]
    print(f"worst: {max(measured):.1e} of the largest value; at most {LIMIT:.0e} is parity")
    sys.exit(not all(value <= LIMIT for value in measured))  # NaN is no parity either


if __name__ == "__main__":
    main()
