"""`push_to_hub`: a trained SAE on the Hugging Face hub, with a card that says what it is, what it read, what it scored and how to load it."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switch_sae.hub import CARD, HubName, upload
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.runs import MODEL_FILE, RunDir, load_sae, save_sae

if TYPE_CHECKING:
    from switch_sae.results import ResultRow

_RUN_FILES = ("config.json", "results.json")
_SCORES = {
    "fvu": "fraction of variance unexplained (FVU)",
    "fvu_inliers": "FVU without rows of huge norm",
    "cosine": "cosine of activation and reconstruction",
    "l0": "active latents per token (L0)",
    "dead_latents": "share of latents that never fired",
    "delta_ce": "delta CE: cross-entropy with the reconstruction spliced in, minus without (nats per token)",
    "kl": "KL divergence of the model's predictions (nats per token)",
    "loss_recovered_zero": "loss recovered, against zeros in its place",
    "loss_recovered_mean": "loss recovered, against the mean in its place",
}
"""What a card shows of the scores; all of them are in results.json."""


def push_to_hub(
    sae: SparseAutoencoder | str | Path, repo: str, private: bool = False, message: str | None = None, replace_card: bool = False
) -> dict[str, str]:
    """Sends an SAE to `user/repo` or a folder of it (`user/repo/folder`), in one commit; `load_sae` of the same name reads it.

    `sae` is a run folder, whose config.json (with the paths and names that the run was given) and results.json are sent as well, whatever else
    `load_sae` reads from this machine, or an SAE in memory; it is written as model.safetensors. Checkpoints, logs and figures stay here, and so does
    everything that the repository holds already, its card too unless `replace_card`. The licence is for you to add to the card. Gives `repo`, `path`,
    `revision` and the `commit` that was made. Raises ValueError without a token (`hf auth login`, or HF_TOKEN) or the right to write, and for SAEs
    that model.safetensors cannot hold; ConnectionError without network; and as `load_sae`.
    """
    name = HubName.parse(repo)
    row, run = None, None
    if not isinstance(sae, SparseAutoencoder):
        path = Path(sae).expanduser()
        run = path if (path / "config.json").is_file() and (path / MODEL_FILE).is_file() else None
        row = _scores(path) if run and (path / "results.json").is_file() else None
        sae = load_sae(path)
    if type(sae) not in SAES.values():
        raise ValueError(f"{MODEL_FILE} cannot hold a {type(sae).__name__}. Push one of {', '.join(SAES)}.")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for file in [] if run is None else [run / name for name in _RUN_FILES]:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        save_sae(folder / MODEL_FILE, sae, sae.activations)
        (folder / CARD).write_text(model_card(sae, name, row), encoding="utf-8")
        return upload(folder, name, private=private, message=message or f"{sae.label} SAE", replace_card=replace_card)


def model_card(sae: SparseAutoencoder, name: HubName, row: "ResultRow | None" = None) -> str:
    """The card of an SAE on the hub, in Markdown; `row` is what its run scored."""
    about = sae.activations
    model, hook = _shown(about.get("model")), about.get("hook")
    read = f"activations of `{model}` at `{hook}`" if model and hook else "activations"
    parts = [
        _front_matter(sae, about.get("model")),
        f"# {sae.label} sparse autoencoder of {read}",
        f"It writes each activation as a sum of few of {sae.num_latents:,} learned directions. Trained with switch_sae.",
        "## What it is",
        _table(("", ""), _sizes(sae)),
        "## What it was trained on",
        _table(("", ""), _origin(about, row)) if about else "The file does not say what it was trained on.",
        "## Scores",
        _scored(row) if row else "No scores came with it.",
        "## How to load it",
        "```python\nfrom switch_sae import load_sae\n\n"
        f'sae = load_sae("{name}")      # revision="..." pins a commit; sae.activations["hub"] says which one this is\n'
        f"latents = sae.encode(x)       # x: raw activations [..., {sae.d_in}]\nrecon = sae.decode(latents)\n```",
        "## Licence\n\nNot stated yet. Whoever publishes this adds it here, and as `license:` at the top.",
    ]
    return "\n\n".join(parts) + "\n"


def _scores(path: Path) -> "ResultRow":
    """The row of a run's main SAE."""
    from switch_sae.results import scored

    return scored([RunDir.open(path)])[0]


def _front_matter(sae: SparseAutoencoder, model: Any) -> str:
    """What the hub's search reads, as YAML; JSON strings are YAML's too."""
    lines = ["library_name: switch_sae", "tags:", "- sparse-autoencoder", "- interpretability", *(["- mixture-of-experts"] if sae.is_routed else [])]
    # A name, which the hub would link to, and not a folder or the bundled model.
    if isinstance(model, str) and model != "bundled" and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) and not Path(model).exists():
        lines.append(f"base_model: {json.dumps(model)}")
    return "\n".join(["---", *lines, "---"])


def _shown(name: Any) -> str:
    """A model's name; of a folder of this machine only the last part."""
    text = str(name or "")
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text or Path(text).is_absolute()
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if is_path else text


def _sizes(sae: SparseAutoencoder) -> dict[str, Any]:
    found: dict[str, Any] = {"architecture": f"`{SAES.key_of(sae)}`", "activation size": sae.d_in, "latents": sae.num_latents}
    if sae.d_out != sae.d_in:
        found["size of the target"] = sae.d_out
    if sae.is_routed:
        found |= {"experts": sae.num_experts, "latents per expert": sae.latents_per_expert}
    if sae.k is not None:
        found["active latents per token"] = sae.k
    return found | {"parameters": sum(parameter.numel() for parameter in sae.parameters()), "FLOPs per token, forward": sae.flops().forward}


def _origin(about: Mapping[str, Any], row: "ResultRow | None") -> dict[str, Any]:
    given = about.get("text")
    text: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    found = {"source": about.get("source"), "language model": _shown(about.get("model")), "its fingerprint": about.get("model_fingerprint")}
    found |= {"hook": about.get("hook"), "text": text.get("kind"), "dataset": text.get("dataset"), "documents": text.get("documents")}
    found |= {"fingerprint of the text": text.get("fingerprint"), "held out": text.get("held_out"), "context length": about.get("context_length")}
    if row is not None:
        found |= {"tokens": row.tokens, "seed": str(row.seed)}
    return {what: value for what, value in found.items() if isinstance(value, str | int) and value != ""}


def _scored(row: "ResultRow") -> str:
    assert row.results is not None
    found = {f"{words} (`{key}`)": f"{estimate:.4g}" for key, words in _SCORES.items() if (estimate := row.estimate(key)) is not None}
    on = f"On {row.results.rows:,} held-out rows of {row.results.documents:,} documents, found by inference `{row.inference}`."
    if row.prediction_documents:
        on += f" What needs predictions is over {row.prediction_documents:,} documents."
    return f"{on} In brackets: 95 % intervals over documents.\n\n" + _table(("metric", "value"), found)


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    cell: Callable[[Any], str] = lambda value: f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {what} | {cell(value)} |" for what, value in rows.items())])
