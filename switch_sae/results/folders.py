"""Which folders hold runs of this library."""

from pathlib import Path
from typing import Any

from switch_sae.runs import RunDir


def runs_below(path: Path, foreign: dict[Path, None]) -> list[tuple[Path, str, dict[str, Any]]]:
    """(folder, name, plain config) of every run, and member of a sweep, at or below `path`; what looks like one and is somebody else's is added to
    `foreign`."""
    if (path / "sweep.json").is_file() or (path / "config.json").is_file():
        name = "sweep.json" if (path / "sweep.json").is_file() else "config.json"
        plain = _ours(path, name)
        if plain is None:
            foreign[path] = None
        elif name == "sweep.json":
            return [(path / "members" / name, name, config) for name, config in plain["members"].items()]
        else:
            return [(path, path.name, plain)]
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")) if path.is_dir() else []
    return [run for folder in folders for run in runs_below(folder, foreign)]


def _ours(path: Path, name: str) -> dict[str, Any] | None:
    """The plain config of a run or plan of a sweep; None for a file of another kind. Raises ValueError for a damaged one of ours."""
    try:
        plain: dict[str, Any] = RunDir(path).read_json(name)
    except ValueError:
        if _has_results(path):
            raise
        return None
    configs = plain.get("members") if name == "sweep.json" else {"run": plain}
    if isinstance(configs, dict) and all(isinstance(c, dict) and isinstance(c.get("sae"), dict) and "seed" in c for c in configs.values()):
        return plain
    if _has_results(path):
        raise ValueError(f"{path / name} is not the one that made the results.json beside it: no SAE is described in it. Restore it, or train again.")
    return None


def is_run(path: Path) -> bool:
    """Whether a folder is a run of this library."""
    return (path / "config.json").is_file() and _ours(path, "config.json") is not None


def _has_results(path: Path) -> bool:
    """Whether a folder's results.json is one of ours."""
    try:
        saved = RunDir(path).read_json("results.json")
    except (ValueError, FileNotFoundError):
        return False
    return isinstance(saved.get("members"), dict) and "evaluation" in saved
