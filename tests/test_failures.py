"""What happens when something fails: one message and status 1, no traceback but for bugs, and in a multirun nobody else suffers."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError

from experiments import sweep, train
from experiments.command import command
from experiments.errors import clear_errors, verdict
from switch_sae import cohort, load_sae
from switch_sae.cohort import Interrupted, build_sae
from switch_sae.files import RunError
from switch_sae.orchestrator import resume_training
from switch_sae.runs import RunDir
from switch_sae.sweep import SweepFolder
from switch_sae.wandb_logger import WandbConfig, WandbMode, check_wandb

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "model=synthetic", "source.d_in=16", "wandb.mode=disabled", "sae.num_latents=64", "sae.k=4", "batch_size=64", "tokens=640",
    "calibration_rows=256", "evaluation.rows=256", "evaluation.bootstrap=0", "threads=1", "device=cpu",
)  # fmt: skip


@pytest.fixture
def typed(monkeypatch, capfd, tmp_path):
    """Runs a command in this process, in an empty folder; gives its status, what it printed, and what it printed on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(main, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *words])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capfd.readouterr()
        return status, out, err

    return run


def deeds(folder: Path, after: float = 0.0):
    """A command that does what its seed says, and leaves a file when it comes to its end."""

    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:  # does not unpickle
            super().__init__("odd")

    def main(composed) -> None:
        if composed.seed == 1:
            raise ValueError("seed=1 is impossible.")
        if composed.seed == 2:
            raise Odd(1, 2)
        if composed.seed == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        if composed.seed == 4:
            raise KeyboardInterrupt
        if composed.seed == 5:
            raise Interrupted(folder, 7, signal.SIGTERM)
        time.sleep(after)
        (folder / f"done{composed.seed}").touch()

    return command("train")(main)


def done(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("done*")}


def test_a_failed_job_leaves_the_others_of_a_multirun_alone(typed, tmp_path):
    status, _, told = typed(deeds(tmp_path), "--multirun", "seed=0,1,2,6", "tokens=1e5")
    assert status == 1 and done(tmp_path) == {"done0", "done6"}
    assert told.count("Traceback") == 1 and "Odd: odd" in told, "a bug keeps its traceback, a mistake has none"
    end = told.partition("failed in this multirun:\n")[2].splitlines()
    assert end == ["  seed=1: seed=1 is impossible.", "  seed=2: Odd: odd (a bug of switch_sae: its traceback is above)"]
    assert (tmp_path / "runs" / ".multirun" / "multirun.yaml").is_file() and not (tmp_path / "runs" / "multirun.yaml").exists()


def test_workers_of_joblib_outlive_failures_bugs_and_a_signal_to_one_of_them(typed, tmp_path):
    options = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.pre_dispatch=all")
    status, _, told = typed(deeds(tmp_path, after=1.0), "--multirun", *options, "seed=0,1,2,3,4,5,6")
    assert status == 1 and done(tmp_path) == {"done0", "done6"}, told
    end = [line.partition(": ")[0] for line in told.partition("failed in this multirun:\n")[2].splitlines()]
    assert sorted(end) == ["  seed=1", "  seed=2", "  seed=3; seed=4", "  seed=5"]  # as they came


@pytest.mark.parametrize(("seed", "expected"), [(4, 130), (5, 143)])
def test_an_interruption_ends_a_multirun_in_this_process(typed, tmp_path, seed, expected):
    status, _, told = typed(deeds(tmp_path), "--multirun", f"seed=0,{seed},6")
    assert status == expected and done(tmp_path) == {"done0"} and "Traceback" not in told


def test_impossible_sizes_and_missing_models_in_a_multirun_of_runs(typed, tmp_path):
    sizes = ("sae.num_experts=8", "baselines=[]", "sae.num_latents=60,64")
    status, _, told = typed(train.main, "--multirun", *TINY, *sizes)
    assert status == 1 and len(list(tmp_path.glob("runs/*/results.json"))) == 1 and told.count("not divisible by num_experts=8") == 2
    assert "Traceback" not in told and "HYDRA_FULL_ERROR" not in told and "Error executing job" not in told
    status, _, told = typed(train.main, "--multirun", *TINY[2:], "baselines=[]", "source.model=./nowhere,./neither")
    assert status == 1 and "nowhere" in told and "neither" in told and "Traceback" not in told


def test_a_failed_member_does_not_kill_the_other_worker(typed, tmp_path):
    grids = [f"+sweep.grids.{name}={{sae: {{architecture: topk, num_latents: {m}}}, trainer: {{lr: {lr}}}}}" for name, m, lr in
             (("bad", 32, 1e30), ("small", 64, 1e-3), ("big", 256, 1e-3))]  # fmt: skip
    workers = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sweep.worker=0,1", f"sweep.folder={tmp_path}/both", f"runs={tmp_path}")
    settings = (*TINY, "tokens=12800", "checkpoint_every=0", "sweep.experts=[]", "sweep.at_once=1")
    status, _, told = typed(sweep.main, "--multirun", *settings, *grids, *workers)
    folder = SweepFolder(tmp_path / "both")
    assert status == 1 and [folder.is_finished(name) for name in folder.members] == [False, True, True], told
    assert "1 members failed: topk-m32" in told.partition("failed in this multirun:")[2] and "Traceback" not in told


REFUSED = [
    (["sae.num_latents=100000000000"], "sae.num_latents=100000000000 needs"),
    (["source.d_in=100000000000"], "not enough memory"),
    (["tokens=9999999999999999999999"], "tokens=9999999999999999999999 is too large"),
    (["seed=99999999999999999999"], "seed=99999999999999999999 is too large"),
    (["name=a/b"], "name='a/b' is part of a folder's name"),
    (["name=../x"], "name='../x'"),
    (["name=my run"], "name='my run'"),
    (["name='a;b'"], "name='a;b'"),
    (["tokns=3"], "there is no setting tokns. Close to it: tokens."),
    (["+sae.num_latent=512"], "there are no settings sae.num_latent; it has inference, num_latents"),
    (["tokens=2.5"], "tokens=2.5: it must be a whole number."),
    (["seed=0,1"], "make sweep SEEDS=2"),
    (["runs=/proc/no"], "Choose a writable one"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words[0] for words, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_message_and_leaves_nothing_behind(typed, tmp_path, words, message):
    status, _, told = typed(train.main, *TINY, "baselines=[]", *words)
    assert status == 1 and message in told and told.strip().startswith("error: ") and "Traceback" not in told and "HYDRA_FULL_ERROR" not in told
    assert not list(tmp_path.glob("runs/*"))


def test_a_sweep_refuses_the_same(typed, tmp_path):
    status, _, told = typed(sweep.main, *TINY, "name=a/b")
    assert status == 1 and "name='a/b'" in told and not list(tmp_path.glob("runs/*"))
    status, _, told = typed(sweep.main, *TINY, "sweep.experts=[1]", "sae.num_latents=1e12", "sweep.folder=one")
    assert status == 1 and "1 members failed" in told and "Traceback" not in told
    assert "needs 128,000.0 GB for its weights alone" in json.loads(next(tmp_path.glob("one/members/*/failed.json")).read_text())["error"]


def test_whole_numbers_may_be_written_with_an_exponent_and_names_in_any_script(typed, tmp_path):
    status, _, told = typed(train.main, *TINY, "baselines=[]", "tokens=6.4e2", "name=ünï.é-1", f"runs={tmp_path}/mit Leerzeichen")
    assert status == 0, told
    (run,) = (tmp_path / "mit Leerzeichen").glob("*_ünï.é-1")
    assert RunDir(run).read_json("config.json")["tokens"] == 640


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "f.txt"), 1, "f.txt: Permission denied. Change its permissions"),
        (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
        (OSError("it is no model folder."), 1, "it is no model folder."),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 1, "x: Is a directory"),
        (SafetensorError("header too small"), 1, "a safetensors file cannot be read: header too small"),
        (MemoryError(), 1, "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "not enough memory: CUDA out of memory"),
        (json.JSONDecodeError("Expecting value", "x", 0), 1, "Expecting value"),
        (RunError("the disk is full."), 1, "the disk is full."),
        (Interrupted(Path("a b"), 3, signal.SIGTERM), 143, "make train RESUME='a b'"),
        (KeyboardInterrupt(), 130, "stopped"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_a_user_can_mend_or_has_caused_is_told(error, status, message):
    end = verdict(error)
    assert end is not None and end[0] == status and message in end[1]


def test_real_failures_of_libraries_are_told():
    for act in (lambda: torch.empty(10**15), lambda: torch.empty(2**62, 2**62), lambda: yaml.safe_load("a: [1"), lambda: json.loads("{")):
        with pytest.raises(Exception) as caught:
            act()
        assert verdict(caught.value) is not None, caught.value


@pytest.mark.parametrize(
    "error", [TypeError("x"), KeyError("x"), AttributeError("x"), IndexError("x"), RuntimeError("shapes differ"), AssertionError()]
)
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)), clear_errors():
        raise error


def test_a_reader_that_closes_the_pipe_is_no_failure_to_tell(tmp_path):
    program = "from experiments.errors import clear_errors\nwith clear_errors():\n    for i in range(100000): print(i)"
    command = (sys.executable, "-c", program)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert (process.wait(timeout=120), process.stderr.read()) == (141, "")


def test_wandb_is_tried_before_anything_is_loaded(typed, tmp_path, monkeypatch):
    import wandb

    def refuse(**options) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", refuse)
    monkeypatch.setattr(cohort.Streams, "get", lambda *_: pytest.fail("the activations were opened"))
    online = ("wandb.mode=online", *(word for word in TINY if not word.startswith("wandb")))
    for main in (train.main, sweep.main):
        status, _, told = typed(main, *online)
        assert status == 1 and "No API key configured. Log in (wandb login), or run with wandb.mode=offline" in told and "Traceback" not in told
    assert not list(tmp_path.glob("runs/*"))
    check_wandb(WandbConfig(mode=WandbMode.offline))
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(WandbConfig(mode=WandbMode.disabled))
    with pytest.raises(ModuleNotFoundError, match="wandb is not installed"):
        check_wandb(WandbConfig(mode=WandbMode.offline))


def test_a_run_whose_checkpoints_were_removed_is_not_started_over(typed, tmp_path):
    status, _, told = typed(train.main, *TINY, "baselines=[]", "log_every=1")
    assert status == 0, told
    (run,) = (RunDir(path) for path in tmp_path.glob("runs/*"))
    for name in ("results.json", "model.safetensors"):
        (run.path / name).unlink()
    before = run.metrics()
    config = run.read_json("config.json")
    run.write_json("config.json", config | {"checkpoint_every": 5})
    with pytest.raises(ValueError, match="was trained to step 10, with a checkpoint every 5 steps, but has no checkpoint"):
        resume_training(run.path)
    assert run.metrics() == before
    run.write_json("config.json", config | {"checkpoint_every": 0})  # nothing was to be saved: all of it can be made again
    environment = run.read_json("environment.json")
    run.write_json("environment.json", environment | {"versions": environment["versions"] | {"numba": "0.1"}})
    said: list[str] = []
    resume_training(run.path, said.append)
    now = environment["versions"]["numba"]
    assert f"note: numba was 0.1 and is {now}: what pursuit finds can differ in the last bits." in said
    assert f"resuming {run.path} from step 0 of 10: it has no checkpoint, so it starts over" in said and run.metrics() == before


def test_home_is_found_wherever_a_folder_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run = RunDir.create("~/sae", "x")
    assert run.path.parent == tmp_path / "home" / "sae" and not (tmp_path / "~").exists()
    run.write_json("config.json", {"sae": {}})
    home = f"~/sae/{run.path.name}"
    assert RunDir.open(home).path == run.path
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/home/sae"):
        load_sae(f"{home}/model.safetensors")
    with pytest.raises(FileNotFoundError, match="is not a sweep"):
        SweepFolder.open(home)
    RunDir(home).write_json("sweep.json", {"settings": {}, "members": {}})
    assert SweepFolder.open(home).path == run.path


def test_home_is_found_on_the_command_line(typed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    status, _, told = typed(train.main, *TINY, "baselines=[]", "runs=~/sae")
    assert status == 0, told
    assert len(list(tmp_path.glob("home/sae/*/results.json"))) == 1 and not (tmp_path / "~").exists()
    status, _, told = typed(sweep.main, *TINY, "sweep.experts=[1]", 'sweep.folder="~/sweep"')
    assert status == 0 and (tmp_path / "home" / "sweep" / "results.csv").is_file(), told


def test_weights_beyond_the_memory_are_refused_before_they_are_made():
    from switch_sae.models import SAES

    for cls in SAES.values():
        with pytest.raises(ValueError, match=r"num_latents=1000000000000 needs"):
            build_sae(cls.Config(**{"num_latents": 10**12, **({"k": 4} if hasattr(cls.Config, "k") else {})}), 64, 0)
