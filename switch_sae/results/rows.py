"""Run folders and sweep folders in, one row per SAE and control out."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import safe_open
from torch import Tensor

from switch_sae.activations.base import both_known
from switch_sae.config import HALF
from switch_sae.evaluation import Estimate, Results
from switch_sae.files import Say, tell
from switch_sae.invocation import invocation
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.models.inference import Inference, with_inference
from switch_sae.results.folders import is_run, runs_below
from switch_sae.results.kind import Kind
from switch_sae.runs import MODEL_FILE, RunDir, load_sae

T = TypeVar("T")
K = TypeVar("K")
Role = Literal["main", "baseline", "inference", "control"]
RESULTS = "results.json"
SEEDS = ("seed", "source.seed")
"""Settings in which repetitions of one experiment differ."""
BOOKKEEPING = ("name", "runs", "wandb", "device", "threads", "log_every", "checkpoint_every", "baselines")
"""Settings that change no number, or that say what trains beside."""
SIZES = ("sae.architecture", "sae.num_latents", "sae.num_experts", "sae.k")
"""Settings that rows hold as values of their own."""
NEUTRAL = (
    "source.device", "source.prefetch", "evaluation.bootstrap", "evaluation.probes", "evaluation.inferences", "evaluation.calibrate",
)  # fmt: skip
"""Further settings that change no number, only an interval's last digits, or what `evaluated_on` says."""
ROLES = ("main", "baseline", "inference", "control")
"""In the order of tables; none of the others ever stands for the SAE that a run is about."""
TRAINED = ("main", "baseline")
"""Roles of SAEs that were trained, each by itself."""
_STREAM_ONLY = {"seed", "buffer_rows", "device", "prefetch", "cache"}
"""Settings of a source that change the order of training rows but not which rows are evaluated."""
_MEASURED = {known.name for known in fields(Results)}


@dataclass(frozen=True)
class ResultRow:
    """One SAE or control: what it was, what it cost and what it scored. None where a run has not measured it, or is too old to have."""

    path: Path
    """The run folder."""
    name: str
    """Of the sweep's member, or of the run folder; a run's further SAEs add their own name after a slash."""
    sae: str
    """Its key in results.json and metrics.jsonl."""
    status: str
    """finished, running (or interrupted), failed or waiting."""
    architecture: str
    """Its key in `SAES`; `pca` is a control."""
    num_latents: int
    num_experts: int
    k: int | None
    """None for architectures without a fixed number of active latents."""
    seed: int
    config: dict[str, Any]
    """Of this SAE, flat: `sae.num_latents`, `trainer.lr`, `tokens`."""
    role: Role = "main"
    """Baselines trained beside the main SAE; `inference` is one of these once more, its weights under another inference than its own; controls (PCA,
    the untrained SAE) were fitted or made, not trained."""
    inference: str = Inference.encoder.name
    """How its latents were found when it was scored."""
    of: str | None = None
    """For the role `inference`: the key of the SAE whose weights these are."""
    threshold: dict[str, float] | None = None
    """Where it was set on held-out rows that were not reported: `trained`, `calibrated` (the one it was scored with), and the `l0` there."""
    flops_train: int | None = None
    """Per token of training, in FLOPs: `flops_total` under the inference that it was trained with."""
    label: str = ""
    """What tables of a few runs call it (`scored`)."""
    step: int | None = None
    """Last logged step of an unfinished run."""
    error: str | None = None
    results: Results | None = None
    """Everything measured; None until it is finished."""
    parameters: int | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    """Of its own training steps alone, without making activations."""
    train_seconds: float | None = None
    wall_seconds: float | None = None
    """The pass of all SAEs that shared its process and stream, activations included."""
    group_size: int | None = None
    """How many did."""
    state_mb: float | None = None
    """Its own weights, buffers and moments, in 10^6 bytes."""
    peak_mb: float | None = None
    """Peak of the whole process, shared by its group, in 10^6 bytes."""
    evaluated_on: dict[str, Any] = field(default_factory=dict)
    """The activations that it was scored on; rows that differ here are not comparable."""
    prediction_documents: int | None = None
    """Documents behind its predictions, fewer than behind its rows."""
    not_measured: dict[str, str] = field(default_factory=dict)
    """Metrics that were left out, with the reason."""
    training_outliers: dict[str, Any] | None = None
    """Rows of huge norm that training left out: `left_out` of `rows`."""
    recovery: dict[str, float | None] = field(default_factory=dict)
    """Of the known dictionary behind synthetic activations (`recovery_scores`)."""

    @property
    def kind(self) -> Kind:
        return Kind(self.architecture, self.num_experts, self.config.get("sae.experts_per_token", 1))

    @property
    def num_shared(self) -> int:
        """Its first latents, which every token may use, whatever its expert."""
        return int(self.config.get("sae.shared") or 0)

    @property
    def latents_per_expert(self) -> int:
        """Without the shared ones."""
        return (self.num_latents - self.num_shared) // self.num_experts

    @property
    def metrics(self) -> Mapping[str, Estimate]:
        """Everything measured, by name."""
        known = {name: Estimate(value) for name, value in self.recovery.items() if value is not None}
        return known if self.results is None else {**self.results.metrics, **known}

    @property
    def outlier_rows(self) -> int:
        """Rows that the `_inliers` metrics leave out."""
        return 0 if self.results is None else self.results.outlier_rows

    @property
    def flops_forward(self) -> int | None:
        """Per token of training, in FLOPs (a multiply-add is two)."""
        return None if self.results is None else self.results.flops["forward"]

    @property
    def flops_encode(self) -> int | None:
        """Per token, to find its latents: router and encoder or pursuit, without the decoder."""
        return None if self.results is None else self.results.flops["router"] + self.results.flops["encode"]

    @property
    def flops_total(self) -> int | None:
        return None if self.results is None else self.results.flops["total"]

    def estimate(self, metric: str) -> Estimate | None:
        """None where the metric was not measured, such as delta_ce without a language model, or is not finite."""
        estimate = self.metrics.get(metric)
        return estimate if estimate is not None and abs(estimate.value) < float("inf") else None

    def value(self, metric: str) -> float | None:
        estimate = self.estimate(metric)
        return None if estimate is None else estimate.value

    @property
    def settings(self) -> dict[str, Any]:
        """The config without sizes, seeds and bookkeeping: what makes two rows the same experiment.

        Of `source.cache` it matters whether there is one (rows from disk come in another order), not where it lies.
        """
        ignored = (*SEEDS, *SIZES, *NEUTRAL)
        settings = {key: value for key, value in self.config.items() if key not in ignored and key.split(".")[0] not in BOOKKEEPING}
        return settings | ({"source.cache": settings["source.cache"] is not None} if "source.cache" in settings else {})

    @property
    def is_the_runs(self) -> bool:
        """Whether its weights are those of the SAE that the run is about, which is called by its architecture; those beside it never are."""
        return self.role == "main" or self.of == self.architecture

    @property
    def model_file(self) -> Path:
        return (self.path if self.is_the_runs else RunDir(self.path).member(self.of or self.sae).path) / MODEL_FILE

    @property
    def has_weights(self) -> bool:
        return self.results is not None and self.role != "control" and self.model_file.is_file()

    @property
    def firing_counts(self) -> Tensor:
        """[M] evaluation rows on which each latent fired. Raises ValueError where nothing was measured."""
        if self.results is None:
            raise ValueError(f"{self.path} is {self.status}: its latents were not counted yet. Is training finished?")
        return self.results.firing_counts

    def load(self) -> SparseAutoencoder:
        """The trained SAE, with its threshold as trained, under this row's inference. Raises as `load_sae`."""
        sae = load_sae(self.model_file)
        return with_inference(sae, self.inference) if self.of else sae


def collect(paths: Sequence[str | Path], controls: bool = False, say: Say = tell, inferences: bool = False, file: str = RESULTS) -> list[ResultRow]:
    """One row per trained SAE of run folders, sweep folders, or folders of them, sorted by architecture and size; each folder counts once.

    Controls, and SAEs once more under other inferences, are rows only if asked for. Of an unfinished run only the main SAE is one. Folders whose
    config.json is somebody else's are passed over, and named. `file` is another evaluation in the same folders; runs without it are passed over.
    Raises ValueError for no paths, FileNotFoundError for a path that holds no run.
    """
    left_out = {role for role, asked in (("control", controls), ("inference", inferences)) if not asked}
    if not paths:
        raise ValueError("no folders were given. Give run folders, sweep folders or folders that hold them, such as runs/.")
    rows: dict[tuple[Path, str], ResultRow] = {}
    foreign: dict[Path, None] = {}
    for given in (Path(path).expanduser() for path in paths):
        found = [row for path, name, config in runs_below(given, foreign) for row in _run_rows(path, name, config, file)]
        if foreign:
            say(f"left out, as their config.json or sweep.json is not of this library: {', '.join(map(str, foreign))}")
            foreign.clear()
        if not found:
            if file != RESULTS:
                raise FileNotFoundError(f"{given} holds no run that has {file}. Make it: {invocation('evaluate', run=given)}")
            raise FileNotFoundError(f"{given} holds no run: neither it nor a folder in it has config.json or sweep.json. Give what training printed.")
        rows |= {(row.path.resolve(), row.sae): row for row in found if row.role not in left_out}
    return in_order(rows.values())


def scored(runs: Sequence[RunDir], file: str = RESULTS) -> list[ResultRow]:
    """Every SAE and control of finished runs, run by run: the main SAE, its baselines, these under further inferences, then the controls; labelled by
    run where there are several.

    `file` is another evaluation in the same folders, such as results-500000.json. Raises ValueError for no runs, FileNotFoundError for an
    unfinished one.
    """
    if not runs:
        raise ValueError(f"no runs were given. Train one ({invocation('train')}), then give its folder.")
    return [
        replace(row, label=row.sae if len(runs) == 1 else f"{number} {row.sae}")
        for number, run in enumerate(runs, start=1)
        for row in _finished(run, run.path.name, read_results(run, file), run.read_json("config.json"))
    ]


def load_members(run: RunDir) -> dict[str, SparseAutoencoder]:
    """The trained SAEs of a finished run by name, the main one first."""
    return {row.sae: row.load() for row in scored([run]) if row.role in TRAINED}


def finished_runs(parent: str | Path) -> list[RunDir]:
    """The run folders in `parent` that have results, newest first; empty where there are none."""
    return [RunDir(file.parent) for file in sorted(Path(parent).expanduser().glob("*/results.json"), reverse=True) if is_run(file.parent)]


def read_results(run: RunDir, file: str = RESULTS) -> dict[str, Any]:
    """Its results with everything measured as `Results` under "results"; parsed once for as long as the file stays as it is. Not to be changed.

    Raises as `RunDir.read_json`.
    """
    path = run.path / file
    return _parsed(run.path, file, (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None)


@lru_cache(maxsize=256)
def _parsed(path: Path, file: str, stamp: tuple[int, int] | None) -> dict[str, Any]:
    saved: dict[str, Any] = RunDir(path).read_json(file)
    if not isinstance(saved.get("members"), dict) or "evaluation" not in saved:
        raise ValueError(f"{path / file} is not of this library: it describes no SAE. Give a run folder that training printed.")
    for entry in (entry for group in ("members", "controls") for entry in saved.get(group, {}).values()):
        entry["results"] = Results.from_json({name: entry.pop(name) for name in _MEASURED & entry.keys()})
    return saved


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by key, keys and items in the order in which they come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def other_activations(first: dict[str, Any], where: dict[str, Any]) -> str:
    """In what two `evaluated_on` differ, in a few words; empty where scores can be compared."""
    first, where = both_known(first, where)
    differs = sorted(key for key in first.keys() | where.keys() if first.get(key) != where.get(key))
    if "source" in differs:
        differs = ["source"]
    return ", ".join(differs[:4]) + (f" and {len(differs) - 4} more" if len(differs) > 4 else "")


def hashable(value: Any) -> Any:
    """A setting that can be counted: lists and dicts as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def flat_settings(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A plain config as {"sae.num_latents": ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _run_rows(path: Path, name: str, config: dict[str, Any], file: str) -> list[ResultRow]:
    run = RunDir(path)
    if (path / file).is_file():
        return _finished(run, name, read_results(run, file), config)
    return [_unfinished(run, name, config)] if file == RESULTS else []


def _finished(run: RunDir, name: str, saved: dict[str, Any], config: dict[str, Any]) -> list[ResultRow]:
    rows = []
    where = {key: value for key, value in saved["evaluation"]["source"].items() if key not in _STREAM_ONLY}
    where |= {HALF: saved["evaluation"][HALF]} if HALF in saved["evaluation"] else {}
    entries = [(sae, entry, group) for group in ("members", "controls") for sae, entry in saved.get(group, {}).items()]
    for place, (sae, entry, group) in enumerate(entries):
        role: Role = entry.get("role") or ("control" if group == "controls" else "baseline" if place else "main")  # a file of version 1 has no roles
        sizes = {key: entry[key] for key in ("architecture", "num_latents", "num_experts", "k")}
        costs = {key: entry.get(key) for key in ("parameters", "tokens", "train_seconds", "wall_seconds", "group_size")}
        costs |= {f"{key}_mb": entry[f"{key}_bytes"] / 1e6 for key in ("state", "peak") if entry.get(f"{key}_bytes") is not None}
        row = ResultRow(
            path=run.path, name=name if role == "main" else f"{name}/{sae}", sae=sae, status="finished", seed=config["seed"], config={}, role=role,
            results=entry["results"], recovery=entry.get("recovery") or {}, tokens_per_second=entry.get("train_tokens_per_second"),
            prediction_documents=entry.get("prediction_documents", getattr(entry["results"], "prediction_documents", None)),
            not_measured=saved["evaluation"].get("left_out") or {}, training_outliers=saved.get("outliers"),
            evaluated_on=where | {"evaluation rows": entry["results"].rows, "predictions": entry["results"].predictions},
            inference=entry.get("inference", Inference.encoder.name), of=entry.get("of"), threshold=entry.get("threshold"),
            flops_train=(saved["members"][entry["of"]] if "of" in entry else entry)["results"].flops["total"],
            **sizes, **costs,
        )  # fmt: skip
        shared = {key: value for key, value in config.items() if key != "sae"}
        rows.append(replace(row, config=_settings(config if row.is_the_runs else shared | {"sae": _saved_config(row)})))
    return sorted(rows, key=lambda row: ROLES.index(row.role))


def _unfinished(run: RunDir, name: str, config: dict[str, Any]) -> ResultRow:
    failed = None
    with suppress(FileNotFoundError):  # another process may just be trying it again
        failed = run.read_json("failed.json")
    steps = [row["step"] for row in run.metrics()]
    status = "failed" if failed else "running" if steps or (run.path / "config.json").is_file() else "waiting"
    step = failed["step"] if failed else max(steps, default=0)
    sae = config["sae"]
    return ResultRow(
        path=run.path, name=name, sae=sae["architecture"], status=status, architecture=sae["architecture"], num_latents=sae["num_latents"],
        num_experts=sae.get("num_experts", 1), k=sae.get("k"), seed=config["seed"], config=_settings(config),
        step=None if status == "waiting" else step, error=failed["error"] if failed else None,
    )  # fmt: skip


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The flat settings of one SAE: those of its run with its own under "sae"; the one place that reads what earlier versions saved."""
    if config["sae"].get("architecture") not in SAES:
        return flat_settings(config)
    sae = SAES.upgrade(config["sae"])
    own = SAES[sae["architecture"]].own_inference.name  # null says the same, and so does a config of an earlier version, which has no such setting
    return flat_settings(config | {"sae": sae | {"inference": None if sae.get("inference") == own else sae.get("inference")}})


def _saved_config(row: ResultRow) -> dict[str, Any]:
    """The config in the header of a model file: results.json does not hold those of a run's further SAEs. Empty where nothing was saved."""
    if not row.has_weights:
        return {}
    with safe_open(row.model_file, framework="pt") as opened:
        header = opened.metadata()
    return {"architecture": header["architecture"], **json.loads(header["config"])}


def in_order(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """By architecture and size, then in the order of `ROLES`, then by name, inference and seed: the same for rows that come in any order."""

    def place(row: ResultRow) -> tuple[Any, ...]:
        sizes = row.architecture, row.num_latents, row.num_experts, row.k or 0
        name = row.name.removesuffix(f"/{row.sae}")
        return (
            *sizes,
            ROLES.index(row.role),
            row.of or row.sae,
            list(Inference.__members__).index(row.inference),
            name.rpartition("-s")[0] or name,
            row.seed,
            str(row.path),
        )

    return sorted(rows, key=place)
