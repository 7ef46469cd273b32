"""The wheel and the source distribution: what they hold, and that the script of the wheel works outside the clone, with nothing but the wheel."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import switch_sae

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"switch_sae": "switch_sae", "switch_kernels": "kernels/switch_kernels", "switch_sae/commands": "experiments", "switch_sae/conf": "conf"}
"""Folders of a wheel and those of the clone that they hold."""
BUILD = "import sys; from setuptools import build_meta; out = sys.argv[1]; build_meta.build_sdist(out); build_meta.build_wheel(out)"
SCRIPT = """
import sys
from importlib.metadata import distribution
(point,) = distribution("switch-sae").entry_points.select(group="console_scripts", name="switch-sae")
sys.argv[0] = "/environment/bin/switch-sae"
point.load()()
"""

if importlib.util.find_spec("setuptools") is None or int(version("setuptools").partition(".")[0]) < 77:
    pytest.skip("building the wheel needs setuptools 77 in this environment: pip install 'switch-sae[dev]'", allow_module_level=True)


def built(source: Path, out: Path) -> tuple[Path, Path]:
    """(source distribution, wheel) of a source tree, made without network, in this environment."""
    done = subprocess.run((sys.executable, "-W", "error", "-c", BUILD, out), cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "golden", "data")
    for path in (*PLACES.values(), "tests"):
        if not (source / path).exists():
            shutil.copytree(ROOT / path, source / path, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return built(source, out)


def expected() -> Iterator[tuple[str, Path]]:
    """(name in the wheel, file of the clone) of all that it must hold."""
    for place, folder in PLACES.items():
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT / folder)
            is_ours = path.suffix in (".py", ".yaml") or path.parent.name == "bundled" or (path.suffix == ".csv" and folder == "switch_sae")
            needs_clone = folder == "experiments" and name.parts[0] in ("benchmarks", "bundled_model")
            if path.is_file() and is_ours and not needs_clone:
                yield f"{place}/{name}", path


def test_the_wheel_holds_the_library_the_commands_and_conf_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        found = {name: wheel.read(name) for name in wheel.namelist() if not name.startswith(f"switch_sae-{switch_sae.__version__}.dist-info/")}
    files = dict(expected())
    assert {"switch_sae/conf/train.yaml", "switch_sae/conf/experiment/run/compare.yaml", "switch_sae/bundled/model.safetensors"} <= set(files)
    assert {"switch_sae/commands/train.py", "switch_sae/commands/notebooks/compare.py", "switch_kernels/gpu/topk.py"} <= set(files)
    assert found.keys() == files.keys(), found.keys() ^ files.keys()
    assert [name for name, path in files.items() if path.read_bytes() != found[name]] == []


def test_the_source_distribution_holds_no_tests_and_builds_the_same_wheel(distributions, tmp_path):
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.11.4, and warned about from 3.12
    (source,) = tmp_path.iterdir()
    assert [path for path in source.rglob("*") if "test" in path.name] == [] and (source / "conf" / "train.yaml").is_file()
    out = tmp_path / "dist"
    out.mkdir()
    with zipfile.ZipFile(built(source, out)[1]) as again, zipfile.ZipFile(wheel) as first:
        assert sorted(again.namelist()) == sorted(first.namelist())
        same = [name for name in first.namelist() if not name.endswith("/RECORD")]
        assert [name for name in same if again.read(name) != first.read(name)] == []


@pytest.fixture(scope="module")
def site(distributions, tmp_path_factory) -> Path:
    """A folder of packages that holds the wheel alone."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(distributions[1]) as wheel:
        wheel.extractall(site)
    return site


@pytest.fixture
def typed(site, tmp_path):
    """Types a command of the wheel in an empty folder outside the clone; (exit status, output, errors, the folder)."""
    here = tmp_path / "here"
    here.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "MAKELEVEL"} | {"PYTHONPATH": str(site)}

    def run(*words: str) -> tuple[int, str, str, Path]:
        done = subprocess.run((sys.executable, "-c", SCRIPT, *words), cwd=here, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr, here

    return run


def test_the_script_is_there_and_refuses_what_is_no_command(typed):
    status, told, errors, here = typed("--version")
    assert (status, told) == (0, f"switch-sae {switch_sae.__version__}\n"), errors
    status, told, errors, _ = typed("swep", "sweep.seeds=2")
    assert status == 1 and not told and errors.startswith("\nerror: there is no command swep. Close to it: sweep.") and "Traceback" not in errors
    assert list(here.iterdir()) == []


def test_a_run_of_the_wheel_ends_in_the_current_folder_and_names_commands_that_are_there(typed, tmp_path):
    mine = tmp_path / "conf" / "experiment" / "run" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\nsae:\n  num_latents: 32\n  k: 2\nname: mine\n")
    tiny = ("batch_size=64", "tokens=640", "calibration_rows=256", "evaluation.rows=256", "evaluation.bootstrap=0", "evaluation.probes=false")
    words = ("--config-dir", str(tmp_path / "conf"), "experiment=run/mine", "model=synthetic", "sae.num_experts=4", "threads=1", "device=cpu")
    status, told, errors, here = typed("train", *words, *tiny, "baselines=[]", "wandb.mode=disabled")
    assert status == 0, errors
    (run,) = (here / "runs").glob("*_mine")
    assert [path.name for path in here.iterdir()] == ["runs"] and (run / "results.json").is_file() and (run / "figures" / "scores.pdf").is_file()
    assert f"switch-sae notebook runs/{run.name}" in told and not re.search(r"\bmake [a-z]|python -m|RESUME", told)
    record = json.loads((run / "environment.json").read_text())
    assert record["versions"]["switch-sae"] == switch_sae.__version__ and record["git_commit"] is None
    assert record["command"][:2] == ["switch-sae train", "--config-dir"]
