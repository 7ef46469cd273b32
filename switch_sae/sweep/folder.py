"""A sweep's folder: its plan, its members' run folders, who is working on which, and the table of results.

sweep/
  sweep.json       settings, and the whole config of every member: what is written here trains, also after a restart
  members/NAME/    a run folder each (runs.py); failed.json where its last attempt ended in an error
  locks/           one file per member, locked while a process works on it
  controls.json    PCA on the same evaluation rows
  results.csv      one row per member, written anew at every checkpoint; summary.csv: mean and spread over seeds
"""

import json
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from switch_sae.cohort import MAIN, Member
from switch_sae.config import config_from_plain, config_to_plain
from switch_sae.files import Lock, lock, try_lock, write_atomically
from switch_sae.invocation import invocation
from switch_sae.models import SAES
from switch_sae.plain import to_plain
from switch_sae.report.tables import summary_table
from switch_sae.results import collect, write_results, write_summary
from switch_sae.results.settings import HEADLINE
from switch_sae.runs import RunDir, environment
from switch_sae.sweep.plan import Measures, SweepConfig, plan_members

PLAN = "sweep.json"
_MAY_DIFFER = {"runs", "threads", "device", "sweep.folder", "sweep.at_once", "sweep.worker"}
"""Settings that change how a sweep is worked on, not what comes out."""


class SweepFolder:
    """One sweep on disk, shared by all processes that work on it."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.opened = Path(path).expanduser(), time.time()
        plan = RunDir(self.path).read_json(PLAN)
        self.at_once: int | None = plan["settings"].get("sweep", {}).get("at_once")
        self.members = {name: config_from_plain(member) for name, member in plan["members"].items()}

    @classmethod
    def open(cls, path: str | Path) -> "SweepFolder":
        """An existing sweep. Raises FileNotFoundError for anything else."""
        if not (Path(path).expanduser() / PLAN).is_file():
            raise FileNotFoundError(f"{path} is not a sweep: it has no {PLAN}. Give the folder that `{invocation('sweep')}` printed.")
        return cls(path)

    @classmethod
    def create(cls, config: SweepConfig, measures: Measures) -> "SweepFolder":
        """A new sweep, or the one in `sweep.folder` if that has the same settings: whoever comes first plans it, the others wait and take its plan.

        Raises ValueError for a folder that holds another sweep, naming the settings that differ.
        """
        settings = config_to_plain(config)
        path = Path(config.sweep.folder).expanduser() if config.sweep.folder is not None else RunDir.create(config.runs, config.name or "sweep").path
        with lock(path / ".lock"):
            if (path / PLAN).is_file():
                _refuse_other_settings(path, RunDir(path).read_json(PLAN)["settings"], to_plain(settings))
            else:
                try:
                    members = {name: config_to_plain(member) for name, member in plan_members(config, measures).items()}
                except BaseException:
                    if config.sweep.folder is None:
                        RunDir(path).discard()
                    raise
                RunDir(path).write_json(PLAN, {"name": config.name or "sweep", "settings": settings, "members": members})
        folder = cls(path)  # each process works on its own device
        folder.members = {name: replace(member, device=config.device, threads=config.threads) for name, member in folder.members.items()}
        return folder

    def run(self, name: str) -> RunDir:
        """The run folder of a member, with its config in it."""
        run = RunDir(self.path / "members" / name)
        if not (run.path / "config.json").is_file():
            run.write_json("environment.json", environment())
            run.write_json("config.json", config_to_plain(self.members[name]))
        return run

    def member(self, name: str) -> Member:
        """One SAE of the sweep, as its group sees it."""
        config = self.members[name]
        return Member(name, SAES.key_of(config.sae), MAIN, self.run(name), config, config.sae)

    def is_finished(self, name: str) -> bool:
        return (self.path / "members" / name / "results.json").is_file()

    def claim(self, limit: int | None, tried: set[str]) -> dict[str, Lock]:
        """Locks of up to `limit` unfinished members that train on one stream and that nobody works on.

        Members in `tried` are left out, and those that have failed since this folder was opened, by whomever.
        """
        claims: dict[str, Lock] = {}
        source: Any = None
        for name, config in self.members.items():
            if len(claims) == limit:
                break
            if name in tried or self.is_finished(name) or self._failed_lately(name) or (claims and config.source != source):
                continue
            held = try_lock(self.path / "locks" / f"{name}.lock")
            if held is None:
                continue
            if self.is_finished(name) or self._failed_lately(name):  # while we came
                held.release()
                continue
            claims[name], source = held, config.source
        return claims

    def _failed_lately(self, name: str) -> bool:
        try:
            return (self.path / "members" / name / "failed.json").stat().st_mtime >= self.opened
        except FileNotFoundError:
            return False

    def fail(self, name: str, step: int, error: Exception) -> None:
        """Notes what a member died of; the next start tries it again from its last checkpoint."""
        trace = "".join(traceback.format_exception(error))
        self.run(name).write_json("failed.json", {"error": f"{type(error).__name__}: {error}", "step": step, "traceback": trace})

    def forget_failure(self, name: str) -> None:
        (self.run(name).path / "failed.json").unlink(missing_ok=True)

    def add_controls(self, controls: dict[str, Any]) -> None:
        with lock(self.path / "locks" / "controls.lock"):
            write_atomically(self.path / "controls.json", json.dumps(self.controls() | controls).encode())

    def controls(self) -> dict[str, Any]:
        """What was scored beside the members, by name."""
        path = self.path / "controls.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def write_tables(self) -> None:
        """results.csv and summary.csv as things stand."""
        with lock(self.path / "locks" / "tables.lock"):
            rows = collect([self.path], inferences=True)
            write_results(rows, self.path / "results.csv")
            write_summary(rows, self.path / "summary.csv")

    def table(self) -> str:
        """Mean and spread over seeds, and what PCA, for transcoders regression, reaches with as many components as members have active latents."""
        names = {"pca": "PCA", "linear": "regression"}
        fits = sorted((names[entry["architecture"]], entry["k"], entry["metrics"][HEADLINE]["value"]) for entry in self.controls().values())
        told = ", ".join(f"{fvu:.4f} of {name} of rank {k}" for name, k, fvu in fits)
        return summary_table(collect([self.path], inferences=True)) + (f"\nFVU on the same rows: {told}." if fits else "")


def _refuse_other_settings(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    saved_flat, now_flat = _flat(_of_today(saved)), _flat(_of_today(now))
    differs = [key for key in sorted({*saved_flat, *now_flat} - _MAY_DIFFER) if saved_flat.get(key) != now_flat.get(key)]
    if differs:
        told = "; ".join(f"{key}: there {saved_flat.get(key)!r}, now {now_flat.get(key)!r}" for key in differs[:6])
        raise ValueError(
            f"{path} holds another sweep ({told}). Use the same settings to go on with it, another sweep.folder for a new one, "
            f"or `{invocation('sweep', resume=path)}` for the one that is there."
        )


def _of_today(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a sweep of any version, as this one would save them."""
    return {"usual": {}, **settings, "sae": SAES.upgrade(settings["sae"]), "baselines": settings.get("baselines") or None}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {key: item for name, below in value.items() for key, item in _flat(below, f"{prefix}.{name}" if prefix else name).items()}
