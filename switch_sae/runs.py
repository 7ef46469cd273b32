"""Run folders: everything about one trained SAE in one place. Nothing else writes into them.

    run/
      config.json          the whole configuration that made it
      environment.json     versions, commit, device
      metrics.jsonl        one JSON object per logged step
      checkpoints/         step-00001000.safetensors: everything an exact resume needs, at most two of them
      model.safetensors    the SAE: weights, and in its header architecture, config, and what its activations were
      training.json        what training cost, until there are scores; then it is in results.json
      results.json         evaluation
      figures/
      analysis/            what analyses of its weights found (`analysis.base`)

Every file is whole or not there, whatever a reader, a killed process or a full disk does (`files.write_atomically`). Nothing here is ever
unpickled.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from switch_sae.files import RunError, remove_part_files, write_atomically
from switch_sae.hub import fetch, hub_name
from switch_sae.interop import FORMATS
from switch_sae.invocation import how_to_resume, invocation, is_clone, version
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.plain import to_plain

FORMAT_VERSION = 2
_READABLE = ("1", "2")
"""Version 2: the router of an SAE is a part with settings and weights of its own."""
MODEL_FILE, TRAINING_FILE = "model.safetensors", "training.json"
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Checkpoint:
    """One saved training state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class RunDir:
    """One run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    @classmethod
    def create(cls, parent: str | Path, name: str) -> "RunDir":
        """A new folder parent/<date>_<time>_<name>, never one that exists: launches in the same second get a number.

        Raises RunError when the parent cannot be written, and ValueError for a name that is no plain word.
        """
        if re.fullmatch(r"[\w.-]+", name) is None:
            raise ValueError(f"name={name!r} is part of a folder's name: letters, digits, dots, _ and - are possible, spaces and slashes are not.")
        parent = Path(parent).expanduser()
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        for number in range(1000):
            path = parent / (f"{stamp}_{name}" + (f"_{number}" if number else ""))
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                if parent.is_file():
                    raise RunError(f"{parent} is a file. Give a folder for runs: runs=FOLDER.") from None
            except OSError as error:
                raise RunError(f"cannot create a run folder in {parent}: {error.strerror or error}. Choose a writable one: runs=FOLDER.") from error
        raise RunError(f"1000 runs named {stamp}_{name} exist in {parent}; is something starting runs in a loop?")

    @classmethod
    def open(cls, path: str | Path) -> "RunDir":
        """An existing run folder. Raises FileNotFoundError for anything else, and ValueError for a config.json that is damaged."""
        run = cls(path)
        if not (run.path / "config.json").is_file():
            raise FileNotFoundError(f"{run.path} is not a run folder: it has no config.json. Give the folder that training printed.")
        if not isinstance(run.read_json("config.json").get("sae"), dict):
            raise FileNotFoundError(
                f"{run.path} is not a run folder of this library: its config.json describes no SAE. Give one that training printed."
            )
        return run

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    def member(self, name: str) -> "RunDir":
        """The folder of another SAE that trained on the same activation stream."""
        return RunDir(self.path / "baselines" / name)

    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, (json.dumps(to_plain(value), indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: this run has no {name}" + (" yet. Is training finished?" if name == "results.json" else ".")
            )
        try:
            value = json.loads(path.read_text())
        except ValueError as error:  # UnicodeDecodeError is one as well
            raise ValueError(f"{path} is not valid JSON ({error}). Restore it, or train again.") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path} holds no JSON object ({{...}}): it is not of this library, or damaged. Restore it, or train again.")
        return value

    def log(self, row: dict[str, Any]) -> None:
        """Appends one row to metrics.jsonl, at once visible to a reader."""
        path = self.path / "metrics.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}. Free some space, then {how_to_resume()}.") from error

    def metrics(self) -> list[dict[str, Any]]:
        """All logged rows; a last line cut off by a kill is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def forget_metrics_after(self, step: int) -> None:
        """Drops rows of steps that a resume will do again."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        if not (self.path / "metrics.jsonl").is_file():
            return
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """One file, written atomically; older ones beyond the last two are removed afterwards."""
        header = {
            "format": "switch_sae.checkpoint",
            "version": str(FORMAT_VERSION),
            "state": json.dumps({"step": checkpoint.step, **checkpoint.state}),
        }
        tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
        path = self._checkpoint_file(checkpoint.step)
        write_atomically(path, lambda part: save_file(tensors, part, header))
        for old in self._checkpoints()[:-_KEPT_CHECKPOINTS]:
            old.unlink(missing_ok=True)

    def checkpoint_steps(self) -> list[int]:
        """Steps that were saved and are still here, in order."""
        return [int(file.stem.split("-")[1]) for file in self._checkpoints()]

    def resume_step(self, checkpoint_every: int) -> int:
        """Where training goes on: at the last checkpoint, or at 0 where it was stopped before its first one.

        Raises ValueError where it went further than that, and somebody has removed the checkpoints: starting over would cost what is left of it.
        """
        saved, rows = self.checkpoint_steps(), self.metrics()
        if not saved and rows and checkpoint_every and rows[-1]["step"] > checkpoint_every:
            raise ValueError(
                f"{self.path} was trained to step {rows[-1]['step']}, with a checkpoint every {checkpoint_every} steps, but has no checkpoint: they "
                f"were removed. Put them back, or train anew ({invocation('train')}); to start over in this folder, delete its metrics.jsonl."
            )
        return max(saved, default=0)

    def checkpoint_at(self, step: int) -> Checkpoint:
        """The checkpoint of one of `checkpoint_steps`. Raises ValueError when it cannot be read."""
        return self._read_checkpoint(self._checkpoint_file(step))

    def forget_checkpoint(self, step: int) -> None:
        """Removes one that cannot be read, or that training will write again."""
        self._checkpoint_file(step).unlink(missing_ok=True)

    def finish(self) -> None:
        """For a run with results: removes what only an unfinished one needs. The SAE itself is in model.safetensors."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        (self.path / TRAINING_FILE).unlink(missing_ok=True)

    def remove_part_files(self) -> None:
        """Removes what a killed process had half written; nothing ever reads it. Only for a run that no other process is writing."""
        remove_part_files(self.path)

    def discard(self) -> None:
        """Removes the folder of a run that failed before its first step."""
        shutil.rmtree(self.path)

    def save_sae(self, sae: SparseAutoencoder, activations: dict[str, Any]) -> None:
        """Writes model.safetensors; `activations` says what it was trained on (`ActivationSource.describe`)."""
        save_sae(self.path / MODEL_FILE, sae, activations)

    def _checkpoint_file(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}.safetensors"

    def _read_checkpoint(self, file: Path) -> Checkpoint:
        tensors, header = _read_safetensors(file, "switch_sae.checkpoint")
        state = json.loads(header["state"])
        return Checkpoint(state.pop("step"), tensors, state)

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*.safetensors"))


def renamed(tensors: dict[str, Tensor], former_names: Mapping[str, str]) -> dict[str, Tensor]:
    """A checkpoint's or a model's tensors by today's names; a name may stand alone, or in a longer one between slashes (`adam/W_ED/exp_avg`)."""
    today = {former: name for name, former in former_names.items()}
    return {"/".join(today.get(part, part) for part in key.split("/")): tensor for key, tensor in tensors.items()}


def save_sae(path: str | Path, sae: SparseAutoencoder, activations: dict[str, Any] | None = None) -> None:
    """Writes one self-describing safetensors file: weights, and in the header architecture, config, d_in and what the activations were."""
    header = {
        "format": "switch_sae",
        "version": str(FORMAT_VERSION),
        "architecture": SAES.key_of(sae),
        "d_in": str(sae.d_in),
        "config": json.dumps(to_plain(sae.config)),
        "activations": json.dumps(activations or {}),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    _refuse_nonfinite(tensors, f"{path} was not written")
    write_atomically(Path(path), lambda part: save_file(tensors, part, header))


def load_sae(
    path: str | Path,
    fold: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    **settings: Any,
) -> SparseAutoencoder:
    """The SAE of a run folder, of one model.safetensors, or of a file or folder in one of `FORMATS`, in evaluation mode, ready for raw activations.

    What is not on this machine may be a name on the Hugging Face hub, `user/repo` or `user/repo/folder`, of a `revision` (a branch, tag or commit);
    `sae.activations["hub"]` then says which commit it was, and is saved with it. `hf://user/repo` is the hub's even where a folder `user` is here.
    `sae.activations` holds what it was trained on. With `fold` its scale is absorbed (`fold_activation_scale`): the same function, with latents and
    decoder rows in units of raw activations, as steering needs them. It comes on the CPU in float32 unless `device` and `dtype` say otherwise.
    `settings` are what files of some other formats lack, such as `k`; an error says which. Raises FileNotFoundError where there is none, and
    ValueError, naming what is wrong, for a truncated or foreign file, an unknown version or architecture, tensors whose shapes contradict the
    config, and non-finite values; for names on the hub it raises as `hub.fetch`.
    """
    file = Path(path).expanduser()
    if (name := hub_name(path)) is None:
        if revision is not None:
            raise ValueError(f"{file} is a path of this machine, which has no revision={revision!r}: only names on the hub do. Leave it out.")
        return _ready(_load(file, settings), fold, device, dtype)
    file, origin = fetch(name, revision, [MODEL_FILE, "config.json", "results.json", *(file for cls in FORMATS.values() for file in cls.files)])
    sae = _load(file, settings)
    sae.activations = {**sae.activations, "hub": origin}
    return _ready(sae, fold, device, dtype)


def _load(file: Path, settings: dict[str, Any]) -> SparseAutoencoder:
    """`load_sae` of a path."""
    if not _is_ours(file):
        for cls in FORMATS.values():
            if (foreign := cls()).recognises(file):
                return foreign.load(file, **settings)
    if settings:
        raise ValueError(f"{file} is of no other library's format, so {', '.join(settings)} cannot be set: files of switch_sae describe themselves.")
    if file.is_dir():
        if not (file / MODEL_FILE).is_file() and RunDir(file).checkpoint_steps():
            raise FileNotFoundError(
                f"{file} holds no {MODEL_FILE} yet, only checkpoints: training did not finish. Go on with {invocation('train', resume=file)}"
            )
        file = file / MODEL_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist. Give a run folder (training prints its path), a {MODEL_FILE} or a name on the hub (hf://user/repo).{_other_formats()}"
        )
    tensors, header = _read_safetensors(file, "switch_sae")
    try:
        config = SAES.from_plain({"architecture": header["architecture"], **json.loads(header["config"])})
        sae = SAES.build(config, int(header["d_in"]))
        activations = json.loads(header["activations"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: its header does not describe an SAE: {error}") from error
    tensors = renamed(tensors, sae.former_names)
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        details = "; ".join(f"{name} is {found.get(name, 'missing')}, should be {expected.get(name, 'absent')}" for name in wrong)
        raise ValueError(f"{file}: tensors contradict the config in its header: {details}. The file was edited or damaged; restore or retrain it.")
    _refuse_nonfinite(tensors, f"{file} is not loaded")
    sae.load_state_dict(tensors)
    sae.activations = activations
    return sae


def _ready(sae: SparseAutoencoder, fold: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> SparseAutoencoder:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} holds no fractions. Use torch.float32, torch.float64 or torch.bfloat16.")
    if fold:
        sae.fold_activation_scale()
    return sae.to(device=device, dtype=dtype).eval()


def _is_ours(file: Path) -> bool:
    """Whether a run folder's model file, or a file, says that it is of this library."""
    try:
        with safe_open(file / MODEL_FILE if file.is_dir() else file, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == "switch_sae"
    except (SafetensorError, OSError):
        return False


def _other_formats() -> str:
    return f" Other formats that can be read: {', '.join(FORMATS)}." if FORMATS else ""


def environment() -> dict[str, Any]:
    """Versions, commit and device, for the record."""
    versions: dict[str, str | None] = {"switch-sae": version()}
    for package in ("torch", "triton", "transformer-lens", "transformers", "hydra-core", "wandb", "safetensors", "numpy", "numba"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def _git(*arguments: str) -> str | None:
    if not is_clone():  # a wheel may lie in somebody else's repository, as environments often do
        return None
    try:
        done = subprocess.run(("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None  # git may be absent: the record says null
    return done.stdout.strip() if done.returncode == 0 else None


def _read_safetensors(file: Path, expected_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _readable(file), safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
        if header.get("format") != expected_format:
            keys = ", ".join(sorted(opened.keys())[:6])
            raise ValueError(
                f"{file} is not a {expected_format} file (its header says format={header.get('format')!r}; tensors: {keys}). "
                f"It comes from another library or is another kind of file; only files written by switch_sae can be read.{_other_formats()}"
            )
        if header.get("version") not in _READABLE:
            raise ValueError(
                f"{file} has format version {header.get('version')}; this version of switch_sae reads {', '.join(_READABLE)}. Install a matching one."
            )
        return {name: opened.get_tensor(name) for name in opened.keys()}, header  # noqa: SIM118


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) cannot be read as safetensors: {error}. It is truncated, damaged or of another kind; "
            "copy it again, or if it is the newest of several checkpoints, delete it to go on from the one before."
        ) from error


def _refuse_nonfinite(tensors: dict[str, Tensor], consequence: str) -> None:
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{', '.join(bad)} hold NaN or infinite values: {consequence}. Go back to an earlier checkpoint, with a lower lr.")
