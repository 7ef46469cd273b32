"""Runs that are killed, interrupted or terminated: nothing is lost, and what comes out is what an undisturbed run makes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments.benchmarks.kill_test import MOMENTS, Outcome, compare, kill_test, plan
from switch_sae import SwitchSAE, load_sae, save_sae

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "model=synthetic", "wandb.mode=disabled", "sae.num_latents=64", "sae.k=4", "sae.num_experts=4", "batch_size=64", "tokens=64_000_000",
    "calibration_rows=256", "evaluation.rows=500", "evaluation.bootstrap=0", "threads=1", "checkpoint_every=0", "log_every=1",
)  # fmt: skip


def test_twenty_kills_leave_no_trace(tmp_path):
    assert kill_test(tmp_path, kills=20, seed=0) == Outcome(landed=20, differences=[])


def test_the_kills_cover_the_whole_life_of_a_run():
    kills = plan(20, seed=0, startup=1.0, evaluation=1.0)
    assert len(kills) == 20 and kills == plan(20, 0, 1.0, 1.0) != plan(20, 1, 1.0, 1.0)
    written = {kill.write.split("-")[0] for kill in kills if kill.write}
    assert written == {"config.json", "environment.json", "metrics.jsonl", "step", "model.safetensors", "training.json", "results.json"}
    assert {kill.moment for kill in kills if kill.write} == set(MOMENTS)
    steps = [kill.step for kill in kills if kill.write is None]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 120 and len({step // 30 for step in steps}) == 5


def test_the_comparison_sees_one_flipped_bit_a_repeated_row_and_a_left_over_file(tmp_path):
    sae = SwitchSAE(SwitchSAE.Config(num_latents=8, k=1, num_experts=2), 4, torch.Generator().manual_seed(0))
    runs = [tmp_path / name for name in ("one", "other")]
    for run in runs:
        run.mkdir()
        save_sae(run / "model.safetensors", sae, {})
        (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        (run / "results.json").write_text(json.dumps({"seconds": time.perf_counter(), "members": [{"fvu": 0.5, "train_tokens_per_second": id(run)}]}))
    assert compare(*runs) == []
    with torch.no_grad():
        sae.b_enc_M[3] = -0.0  # equal to 0.0, but another bit pattern
    save_sae(runs[1] / "model.safetensors", sae, {})
    (runs[1] / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 2}\n')
    (runs[1] / "results.json").write_text(json.dumps({"seconds": 1, "members": [{"fvu": 0.25, "train_tokens_per_second": 1}]}))
    (runs[1] / ".results.json.7.part").touch()
    assert compare(*runs) == [
        ".results.json.7.part: only in the killed run",
        "model.safetensors: b_enc_M differs",
        "metrics.jsonl: 2 rows against 3; steps that differ: [2]",
        "results.json differs",
    ]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_sets_the_exit_status(tmp_path, number, status):
    command = (sys.executable, "-m", "experiments.train", *TINY, f"runs={tmp_path}")
    environment = {key: value for key, value in os.environ.items() if key != "MAKELEVEL"}  # make is named to those who used it
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in tmp_path.glob("*/metrics.jsonl")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()  # it would train for hours
            pytest.fail(f"no step was logged: {process.communicate()[1]}")
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    said = re.search(r"stopped at step (\d+);.*Go on with: python -m experiments\.resume (\S+)", errors)
    assert said and "Traceback" not in errors, errors
    run = Path(said[2])
    step, rows = int(said[1]), (run / "metrics.jsonl").read_text().splitlines()
    assert run.parent == tmp_path and [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:08d}.safetensors"]
    assert json.loads(rows[-1])["step"] == step and not (run / "model.safetensors").exists()
    with pytest.raises(FileNotFoundError, match=re.escape(f"make train RESUME={run}")):
        load_sae(run)
    assert os.listdir(tmp_path) == [run.name]
