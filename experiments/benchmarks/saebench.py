"""SAEBench's core eval and SAELens' `run_evals` on the SAEs of a run, beside our numbers: python -m experiments.benchmarks.saebench runs/SOME

Each library runs in an environment of its own (`.benchmark-peers/`), on `wrap(load_sae(...))`, a HookedTransformer of the run's GPT-2, and the very
contexts that we score. Every number that they give is `equal` to ours; or `explained`: what its definition gives when our code computes it, with what
makes it another one; or `checked`: the same, where we have no such number. Prints a table, writes experiments/results/saebench_parity.csv, and ends
with status 1 where a number is none of these.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.benchmarks import saebench_peer as peer
from experiments.benchmarks.peers import PeerEnvironment
from experiments.benchmarks.saebench_definitions import DELTA, by_definition
from experiments.errors import clear_errors
from switch_sae.activations import EvaluationSet, build_source
from switch_sae.activations.language_model import LanguageModel
from switch_sae.activations.loading import resolve
from switch_sae.config import config_from_plain
from switch_sae.evaluation import Results, evaluate_group
from switch_sae.files import user_path
from switch_sae.interop.saebench import wrap
from switch_sae.metrics import Downstream
from switch_sae.models import SAES
from switch_sae.runs import RunDir, load_sae

ROOT = Path(__file__).resolve().parents[2]
CSV = ROOT / "experiments" / "results" / "saebench_parity.csv"
LIMIT = 3e-6
"""Relative. They take means in float32, and run the language model in another version of transformer_lens."""
WITHOUT = {"sae-bench": ("torchvision",)}
"""What an environment must not have: its wheel on PyPI is built for CUDA and fails beside a CPU build of torch."""
EQUAL, EXPLAINED, CHECKED, DIFFERENT = "equal", "explained", "checked", "different"
"""Ours; another than ours, for a reason, and as its definition says; none of ours, and as its definition says; none of these."""

OURS: dict[str, tuple[str, Callable[[Results, float], float]]] = {
    "explained_variance": ("1 - fvu", lambda results, _: 1 - results["fvu"].value),
    "mse": ("fvu * variance", lambda results, variance: results["fvu"].value * variance),
    "cossim": ("cosine", lambda results, _: results["cosine"].value),
    "l2_ratio": ("relative_norm", lambda results, _: results["relative_norm"].value),
    "l0": ("l0", lambda results, _: results["l0"].value),
    "frac_alive": ("1 - dead_latents", lambda results, _: 1 - results["dead_latents"].value),
    "freq_over_1_percent": ("dense_latents_1pct", lambda results, _: results["dense_latents_1pct"].value),
    "freq_over_10_percent": ("dense_latents_10pct", lambda results, _: results["dense_latents_10pct"].value),
    "ce_loss_without_sae": ("ce_clean", lambda results, _: results["ce_clean"].value),
    "ce_loss_with_sae": ("ce_spliced", lambda results, _: results["ce_spliced"].value),
    DELTA: ("delta_ce", lambda results, _: results["delta_ce"].value),
    "kl_div_with_sae": ("kl", lambda results, _: results["kl"].value),
    "ce_loss_with_ablation": ("ce_zero", lambda results, _: results["ce_zero"].value),
    "ce_loss_score": ("loss_recovered_zero", lambda results, _: results["loss_recovered_zero"].value),
}
"""Ours of the same meaning, by their name: (its name, it of what `evaluate_group` gives and of the rows' variance)."""

PREDICTIONS = "they count {theirs} predictions, we {ours}: we leave out those of a special token"
REASONS = {
    "explained_variance": "it subtracts the square of the mean of x^2 over rows and dimensions where ||mean x||^2 belongs; means over batches",
    "mse": "each row's squared error is divided by the rows of its batch, and then averaged over rows",
    **dict.fromkeys(["ce_loss_without_sae", "ce_loss_with_sae", DELTA, "ce_loss_with_ablation", "ce_loss_score"], PREDICTIONS),
    "kl_div_with_sae": "they count {positions} positions, we {ours} predictions: the last position of a context predicts nothing",
}
"""Why a number of theirs is another one than ours."""
NOT_OURS = {
    "explained_variance_legacy": "mean over rows of 1 - error / (squared distance from the mean of the row's batch of contexts)",
    "l1": "sum of latents, in units of raw activations and unit decoder rows",
    "l2_norm_in": "mean ||x||",
    "l2_norm_out": "mean ||recon||",
    "relative_reconstruction_bias": "mean ||recon||^2 / mean <x, recon>, mean over batches",
    "kl_div_with_ablation": "zeros at every position",
    "kl_div_score": "1 - kl_div_with_sae / kl_div_with_ablation",
    "normalized_freq_over_1_percent": "share of all firing that latents above 1 % have",
    "normalized_freq_over_10_percent": "share of all firing that latents above 10 % have",
    "average_max_encoder_cosine_sim": "mean over latents of the largest cosine with another encoder column, those of other experts too",
    "average_max_decoder_cosine_sim": "mean over latents of the largest cosine with another decoder row, those of other experts too",
}
"""What numbers mean that we do not report."""


@dataclass(frozen=True)
class Row:
    """One number of one library about one SAE."""

    sae: str
    library: str
    version: str
    their_name: str
    theirs: float
    our_name: str
    ours: float | None
    by_their_definition: float
    verdict: str
    reason: str

    @classmethod
    def of(cls, sae: str, library: str, version: str, name: str, theirs: float, ours: float | None, defined: float, counts: dict[str, int]) -> "Row":
        why = (REASONS | NOT_OURS).get(name, "").format(**counts)
        if ours is not None and near(theirs, ours):
            found, why = EQUAL, ""
        elif near(theirs, defined) and why:  # without a reason the definition is ours, so that nothing explains it
            found = CHECKED if ours is None else EXPLAINED
        else:
            found = DIFFERENT
        return cls(sae, library, version, name, theirs, OURS[name][0] if name in OURS else "", ours, defined, found, why)


def near(value: float, expected: float) -> bool:
    return abs(value - expected) <= LIMIT * abs(expected)  # NaN is not


def members(run: RunDir, asked: list[str] | None) -> dict[str, Path]:
    """The run's SAE, by its architecture's key, and its baselines; all, or those that are asked for. Raises ValueError for others."""
    there = {SAES.key_of(load_sae(run.path)): run.path} | {path.name: path for path in sorted((run.path / "baselines").glob("*"))}
    if unknown := [name for name in asked or () if name not in there]:
        raise ValueError(f"{run.path} holds no SAE {unknown[0]!r}; it has {', '.join(there)}.")
    return {name: there[name] for name in asked or there}


def ask(library: str, folder: Path) -> tuple[str, dict[str, peer.Numbers]]:
    """(version, numbers by SAE) of a library, in its environment. Raises CalledProcessError where it fails; what it printed is on the terminal."""
    environment = PeerEnvironment(library, peer.LIBRARIES[library][0], WITHOUT.get(library, ()))
    environment.make()
    command = [str(environment.python), "-P", str(peer.__file__), library, str(folder)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths})
    answer = json.loads((folder / peer.NUMBERS).read_text())
    return answer["version"], answer["saes"]


def special_positions(model: LanguageModel, rows: EvaluationSet) -> list[int]:
    """The tokens that both libraries are told to ignore. Raises ValueError where that does not leave out what we leave out."""
    ignored, (tokens_CS, keep_CS) = sorted(model.special_token_ids), rows.text()
    if not torch.equal(keep_CS, ~torch.isin(tokens_CS, torch.tensor(ignored, dtype=tokens_CS.dtype))):
        raise ValueError(
            "this run keeps other positions than those of tokens that are not special, and the two libraries know tokens alone. Give a run with "
            "prepend_bos, drop_special_tokens, drop_first_position and packing=packed, as by default."
        )
    return ignored


def model_folder(model: LanguageModel) -> Path:
    """Raises ValueError for what is no GPT-2 on this machine."""
    folder = resolve(model.name)
    config = folder / "config.json" if folder is not None and folder.is_dir() else None
    if config is None or json.loads(config.read_text()).get("model_type") != "gpt2":
        raise ValueError(
            f"a HookedTransformer is built here from the folder of a GPT-2, and {model.name!r} is none. Give a run on the bundled model."
        )
    return config.parent


def compare(saes: dict[str, Path], rows: EvaluationSet, downstream: Downstream, model: LanguageModel, libraries: list[str]) -> list[Row]:
    """All numbers of all libraries about all SAEs."""
    ignored, folder = special_positions(model, rows), model_folder(model)
    tokens_CS, _ = rows.text()
    with tempfile.TemporaryDirectory() as name:
        tensors = {"tokens": tokens_CS.long().contiguous(), "some": downstream.contexts, "ignored": torch.tensor(ignored)}
        save_file(tensors, Path(name, peer.CONTEXTS))
        asked = {"model": str(folder), "saes": {key: str(path.resolve()) for key, path in saes.items()}}
        Path(name, peer.ASKED).write_text(json.dumps(asked))
        answers = {library: ask(library, Path(name)) for library in libraries}
    loaded = {key: load_sae(path) for key, path in saes.items()}
    ours = evaluate_group(loaded, rows, downstream, bootstrap=0).results
    counts = counted(tokens_CS[downstream.contexts], ignored) | {"ours": downstream.num_predictions}
    x_TD = rows.x_TD.double()
    variance = (x_TD - x_TD.mean(dim=0)).square().sum(dim=1).mean().item()
    found = []
    for key, defined in by_definition({key: wrap(sae) for key, sae in loaded.items()}, rows, model, downstream.contexts, ignored).items():
        for library, (version, answer) in answers.items():
            theirs = answer[key] | {DELTA: answer[key]["ce_loss_with_sae"] - answer[key]["ce_loss_without_sae"]}
            for number in (name for name in (*OURS, *NOT_OURS) if name in theirs):
                mine = OURS[number][1](ours[key], variance) if number in OURS else None
                found.append(Row.of(key, library, version, number, theirs[number], mine, defined[library][number], counts))
            if unknown := sorted(set(theirs) ^ set(defined[library])):
                raise ValueError(
                    f"{library} {version} gives {', '.join(unknown)}, which this command does not know. Add them to saebench_definitions."
                )
    return found


def counted(tokens_CS: Tensor, ignored: list[int]) -> dict[str, int]:
    """What they count: predictions made at, and positions of, tokens that are not ignored."""
    kept_CS = ~torch.isin(tokens_CS.long(), torch.tensor(ignored))
    return {"theirs": int(kept_CS[:, :-1].sum()), "positions": int(kept_CS.sum())}


def table(rows: list[Row]) -> str:
    """Ours and theirs side by side, SAE by SAE, and what makes some of theirs other numbers."""
    libraries, lines = list(dict.fromkeys(row.library for row in rows)), list[str]()
    for sae in dict.fromkeys(row.sae for row in rows):
        lines += ["", "".join([f"{sae:38s}{'ours':>14s}", *(f"{library:>14s} {'':10s}" for library in libraries)])]
        for name in dict.fromkeys(row.their_name for row in rows):
            found = {row.library: row for row in rows if (row.sae, row.their_name) == (sae, name)}
            ours = next((row.ours for row in found.values() if row.ours is not None), None)
            cells = [f"{found[each].theirs:14.7f} {found[each].verdict:10s}" if each in found else " " * 25 for each in libraries]
            lines.append("".join([f"{name:38s}", " " * 14 if ours is None else f"{ours:14.7f}", *cells]).rstrip())
    reasons = {(row.their_name, row.reason): None for row in rows if row.reason}
    return "\n".join([*lines, "", *(f"{name}: {reason}" for name, reason in reasons)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, help="the folder of a finished run on the bundled model, or on another GPT-2 on this machine")
    parser.add_argument("--saes", nargs="+", help="which of the run's, such as switch flop_matched; default: all")
    parser.add_argument("--libraries", nargs="+", choices=peer.LIBRARIES, default=list(peer.LIBRARIES), help="which to compare with")
    parser.add_argument("--rows", type=int, help="held-out activations to score on; default: as in training")
    options = parser.parse_args()
    with clear_errors():
        run = RunDir.open(options.run)
        saes, config = members(run, options.saes), config_from_plain(run.read_json("config.json"))
        source = build_source(config.source, config.batch_size)
        if source.language_model is None:
            raise ValueError(f"{run.path} was trained on activations without a language model, so that nothing can be spliced. Give another run.")
        rows = source.evaluation_set(options.rows or config.evaluation.rows)
        downstream = Downstream(source.language_model, rows, config.evaluation.downstream_contexts)
        found = compare(saes, rows, downstream, source.language_model, options.libraries)
    print(table(found))
    if set(options.libraries) == set(peer.LIBRARIES):
        with CSV.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(found[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in found)
    verdicts = [row.verdict for row in found]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in (EQUAL, EXPLAINED, CHECKED, DIFFERENT))
    print(f"\n{counts}; equal is within {LIMIT:.0e}, relative")
    sys.exit(DIFFERENT in verdicts)


if __name__ == "__main__":
    main()
