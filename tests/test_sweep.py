"""Sweeps: which members a config means, that a group gives what separate runs give, and that nothing is lost or done twice when it stops."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.benchmarks.kill_test import compare
from experiments.compose import CONF, register_schemas, sweep_config
from switch_sae import cohort, load_sae
from switch_sae.activations import SyntheticSource
from switch_sae.cohort import Interrupted, build_sae
from switch_sae.config import EvaluationConfig, RunConfig, config_to_plain
from switch_sae.models import ROUTERS, SAES, SwitchSAE, TopKSAE
from switch_sae.orchestrator import run_training
from switch_sae.report.figures.ablations import BALANCE, GATE, _families
from switch_sae.results.rows import ResultRow
from switch_sae.results.rows import flat_settings as flat
from switch_sae.results.selection import Material
from switch_sae.runs import RunDir
from switch_sae.sweep import Match, SweepConfig, SweepFolder, SweepOptions, matching, plan_members, resume_sweep, run_sweep
from switch_sae.sweep import run as sweep_run
from switch_sae.training import TrainerConfig
from switch_sae.wandb_logger import WandbConfig, WandbMode

register_schemas()
ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH = 30, 64


def quiet(line: str) -> None:
    pass


def config(folder: Path | None = None, steps: int = STEPS, **sweep) -> SweepConfig:
    return SweepConfig(
        source=SyntheticSource.Config(d_in=16, common=8, topics=4, per_topic=8, seed=3),
        sae=SwitchSAE.Config(num_latents=64, k=4, num_experts=4),
        trainer=TrainerConfig(lr=3e-3, dead_after_tokens=300),
        evaluation=EvaluationConfig(rows=500, bootstrap=10),
        wandb=WandbConfig(mode=WandbMode.disabled),
        calibration_rows=256, tokens=steps * BATCH, batch_size=BATCH, log_every=5, checkpoint_every=5, device="cpu", threads=1,
        sweep=SweepOptions(folder=None if folder is None else str(folder), **({"experts": [1, 2, 4], "seeds": 2} | sweep)),
    )  # fmt: skip


class Measured:
    """A stream of 16 dimensions on which 40 latents take as long as any dense SAE."""

    def d_in(self, member: RunConfig) -> int:
        return 16

    def time_matched(self, member: RunConfig, reference: RunConfig) -> int:
        return 40


def planned(**options) -> dict[str, RunConfig]:
    return plan_members(config(**options), Measured())


def test_one_expert_is_the_dense_sae_and_members_that_two_grids_name_train_once():
    members = planned(grids={"dense": {"sae": {"architecture": "topk"}}, "again": {"sae": {"num_experts": [2, 8]}}})
    assert list(members) == [f"{name}-m64-k4-s{s}" for name in ("topk", "switch-e2", "switch-e4", "switch-e8") for s in (0, 1)]
    dense = members["topk-m64-k4-s1"]
    assert type(dense.sae) is TopKSAE.Config and dense.seed == 1 and dense.source.seed == 3 and type(dense) is RunConfig


def test_reshuffling_gives_every_seed_a_stream_of_its_own():
    assert {member.source.seed for member in planned(reshuffle=True).values()} == {0, 1}


def test_grids_are_all_combinations_of_their_lists_named_by_what_differs():
    members = planned(experts=[], seeds=1, grids={"g": {"sae": {"k": [2, 4], "router.load_balance": [0.0, 0.5]}, "trainer": {"lr": 1e-3}}})
    assert list(members) == [f"switch-e4-m64-k{k}-load_balance={b}-lr=0.001-s0" for k in (2, 4) for b in ("0", "0.5")]
    assert [(m.sae.k, m.sae.router.load_balance, m.trainer.lr) for m in members.values()] == [
        (2, 0.0, 1e-3),
        (2, 0.5, 1e-3),
        (4, 0.0, 1e-3),
        (4, 0.5, 1e-3),
    ]


def parameters(config: RunConfig) -> int:
    return sum(p.numel() for p in build_sae(config.sae, 16, 0).parameters())


@pytest.mark.parametrize(
    ("match", "widths"),
    [
        (Match.width, [64, 64, 64]),
        (Match.active, [64, 128, 256]),
        (Match.flops, [64, 116, 208]),
        (Match.parameters, [64, 62, 60]),
        (Match.time, [64, 40, 40]),
    ],
)
def test_what_is_matched(match, widths):
    members = list(planned(match=match, seeds=1).values())
    assert [member.sae.num_latents for member in members] == widths
    if match is Match.parameters:
        for member in members[1:]:
            assert abs(parameters(member) - parameters(members[0])) <= (2 * 16 + 1) * member.sae.num_experts
    if match is Match.flops:
        assert len({build_sae(member.sae, 16, 0).flops().total for member in members}) == 1
    if match is Match.active:
        encode = {build_sae(member.sae, 16, 0).flops().encode for member in members}
        assert len(encode) == 1


def test_widths_are_matched_before_they_must_fit():
    """Eight latents per expert would be too few for k at the dense width, and 64 does not divide by 3."""
    members = planned(experts=[16, 3], k=[8], seeds=1, match=Match.active)
    assert [member.sae.num_latents for member in members.values()] == [64 * 16, 64 * 3]
    (member,) = planned(experts=[3], seeds=1, match=Match.parameters).values()
    assert member.sae.num_latents == 63 and abs(parameters(member) - (64 * 33 + 16)) <= 3 * 33 / 2


def test_a_dense_base_says_what_it_lacks_and_its_members_are_named_by_what_they_have():
    dense = replace(config(experts=[8], seeds=1), sae=SAES["relu"].Config(num_latents=64))
    with pytest.raises(ValueError, match=r"k is set by nothing: name it in the grid, in sweep.k"):
        plan_members(dense, Measured())
    assert list(plan_members(replace(dense, usual={"k": 4}), Measured())) == ["switch-e8-m64-k4-s0"]
    grid = {"sae": {"num_experts": [1, 8], "router": {"kind": ["sigmoid"]}}}
    assert list(planned(experts=[], seeds=1, grids={"g": grid})) == ["topk-m64-k4-s0", "switch-e8-m64-k4-router=sigmoid-s0"]
    (member,) = planned(experts=[], seeds=1, grids={"g": {"sae": {"num_experts": 8, "router": ["sigmoid"]}}}).values()
    assert type(member.sae.router) is ROUTERS["sigmoid"].Config


def test_an_error_of_the_shared_rows_stops_all_and_fails_nobody(tmp_path, monkeypatch):
    def nothing_held_out(source, rows):
        raise ValueError("no held-out text")

    monkeypatch.setattr(SyntheticSource, "evaluation_set", nothing_held_out)
    with pytest.raises(ValueError, match="no held-out text"):
        run_sweep(config(tmp_path / "sweep", experts=[2], steps=5), quiet)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("failed.json"))
    assert all(map((folder := resume_sweep(tmp_path / "sweep", say=quiet)).is_finished, folder.members))


def test_a_sweep_planned_by_version_1_goes_on_with_the_same_command(tmp_path):
    folder = run_sweep(config(tmp_path / "sweep", experts=[2], steps=2), quiet)
    plan = json.loads((folder.path / "sweep.json").read_text())
    for saved in (plan["settings"], *plan["members"].values()):
        router = saved["sae"].pop("router")
        saved["sae"] |= {"gate": router["gate"], "load_balance": router["load_balance"], "train_router": router["train"]}
        saved["baselines"] = []
    del plan["settings"]["usual"]
    (folder.path / "sweep.json").write_text(json.dumps(plan))
    assert run_sweep(config(tmp_path / "sweep", experts=[2], steps=2), quiet).members == folder.members


def test_flop_matching_counts_all_experts_of_a_token():
    (member,) = planned(experts=[], seeds=1, match=Match.active, grids={"two": {"sae": {"num_experts": 8, "experts_per_token": 2}}}).values()
    assert member.sae.num_latents == 64 * 8 // 2 and build_sae(member.sae, 16, 0).flops().encode == 2 * 16 * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"grids": {"bad": {"sae": {"architecture": "dense"}}}},
            "grid 'bad' of the sweep: unknown SAE architecture 'dense'; this version knows switch",
        ),
        ({"grids": {"bad": {"sea": {}}}}, r"grid 'bad' of the sweep: it sets \['sea'\]; a grid sets `sae`, `trainer` and `match`"),
        ({"grids": {"bad": {"sae": {"num_expert": 2}}}}, r"grid 'bad' .*unknown settings \['num_expert'\]"),
        ({"grids": {"bad": {"sae": {"num_experts": 5}}}}, "grid 'bad' .*num_latents=64 is not divisible by num_experts=5"),
        ({"grids": {"bad": {"sae": {"k": "many"}}}}, "grid 'bad' .*k='many' is of the wrong type: it must be int"),
        ({"grids": {"bad": {"match": "size"}}}, "grid 'bad' .*match='size' is not one of width, flops, active, parameters, time, null"),
        ({"grids": {"bad": [1, 2]}}, r"grid 'bad' .*\[1, 2\] is no grid. Write \{sae:"),
        ({"grids": {"bad": {"sae": "topk"}}}, "grid 'bad' .* is no grid"),
        ({"experts": [], "grids": {"off": None}}, r"the sweep has no members"),
        ({"seeds": 0}, "sweep.seeds=0 must be at least 1"),
        ({"experts": [0]}, r"sweep.experts holds \[0\]"),
    ],
)
def test_mistakes_in_a_sweep_say_which_grid_and_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        planned(**options)


def test_widths_matched_in_time_are_found_by_secants(monkeypatch):
    """A step that costs 3 + width / 20 against 9 for the reference: equal at 120."""
    monkeypatch.setattr(matching, "_time_ratio", lambda stream, member, width, reference: (3 + width / 20) / 9)
    member = config().base
    member.sae = replace(member.sae, num_latents=64, num_experts=4)
    said = []
    assert matching.time_matched_width(None, member, replace(member, sae=TopKSAE.Config(num_latents=64)), said.append) == 120
    assert "120 latents over 4 experts take 1.00 times as long as 64 dense ones" in said[0]


def test_time_matching_measures_real_steps(tmp_path):
    folder = run_sweep(config(tmp_path / "sweep", steps=5, experts=[4], seeds=1, match=Match.time), quiet)
    (member,) = folder.members.values()
    assert member.sae.num_latents % 4 == 0 and folder.is_finished(next(iter(folder.members)))


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory) -> SweepFolder:
    """A sweep that nothing disturbed."""
    return run_sweep(config(tmp_path_factory.mktemp("peaceful") / "sweep"), quiet)


def finished_equal(one: SweepFolder, other: SweepFolder) -> list[str]:
    assert set(one.members) == set(other.members)
    differences = []
    for name in one.members:
        for difference in compare(one.run(name).path, other.run(name).path):
            # A group of another size logs the same numbers; how many shared the process is a fact of its own.
            differences.append(f"{name}: {difference}")
    return differences


def test_every_member_equals_its_separate_run_bit_for_bit(peaceful, tmp_path):
    for name, member in peaceful.members.items():
        alone = run_training(replace(member, runs=str(tmp_path)), quiet)
        ours, theirs = load_sae(peaceful.run(name).path).state_dict(), load_sae(alone.path).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
        assert peaceful.run(name).metrics() == alone.metrics()
        ((_, entry),) = peaceful.run(name).read_json("results.json")["members"].items()
        (alone_entry,) = alone.read_json("results.json")["members"].values()
        assert entry["metrics"] == alone_entry["metrics"] and entry["flops"] == alone_entry["flops"] and entry["state_bytes"] > 0
        assert entry["group_size"] == 6 and entry["wall_seconds"] > entry["train_seconds"] > 0


def test_a_member_is_a_run_folder_that_loads_and_its_table_is_written(peaceful):
    assert {path.name for path in peaceful.run("topk-m64-k4-s0").path.iterdir()} >= {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "results.json",
    }
    lines = (peaceful.path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + len(peaceful.members) and all("finished" in line for line in lines[1:])
    assert set(json.loads((peaceful.path / "controls.json").read_text())) == {"pca_4"}
    assert "topk" in peaceful.table() and "switch" in peaceful.table()


def test_a_new_sweep_makes_its_first_activations_once(tmp_path, monkeypatch):
    monkeypatch.setattr(SyntheticSource, "load_state_dict", lambda source, state: pytest.fail("the stream stood at its start already"))
    folder = run_sweep(config(tmp_path / "sweep", experts=[2], steps=5), quiet)
    assert all(map(folder.is_finished, folder.members))


def test_training_some_at_a_time_changes_nothing(peaceful, tmp_path):
    folder = run_sweep(config(tmp_path / "sweep", at_once=4), quiet)
    for name in folder.members:
        ours, theirs = load_sae(folder.run(name).path).state_dict(), load_sae(peaceful.run(name).path).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_a_signal_in_the_last_step_is_heard(peaceful, tmp_path, monkeypatch):
    step, sent = cohort.Trainer.step, []

    def interrupted(trainer, x_TD):
        if trainer.steps_done == STEPS - 1 and not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))
        return step(trainer, x_TD)

    monkeypatch.setattr(cohort.Trainer, "step", interrupted)
    with pytest.raises(Interrupted, match=f"stopped at step {STEPS}"):
        run_sweep(config(tmp_path / "sweep"), quiet)
    monkeypatch.undo()
    folder = SweepFolder.open(tmp_path / "sweep")
    assert not any(map(folder.is_finished, folder.members))
    assert finished_equal(peaceful, resume_sweep(folder.path, say=quiet)) == []


def test_a_kill_in_the_first_round_of_checkpoints_costs_no_second_pass(peaceful, tmp_path, monkeypatch):
    saves, save = [], RunDir.save_checkpoint

    def stop_between(run, checkpoint):
        saves.append(run.path.name)
        if len(saves) == 4:
            raise KeyboardInterrupt
        save(run, checkpoint)

    monkeypatch.setattr(RunDir, "save_checkpoint", stop_between)
    with pytest.raises(Interrupted):
        run_sweep(config(tmp_path / "sweep"), quiet)
    monkeypatch.undo()
    folder = SweepFolder.open(tmp_path / "sweep")
    runs = {name: folder.run(name) for name in folder.members}
    assert [run.checkpoint_steps() for run in runs.values()] == [[5]] * 3 + [[]] * 3
    assert [(start, sorted(names)) for start, names in sweep_run._by_start(runs, quiet)] == [(0, sorted(runs))]
    assert not any(run.checkpoint_steps() for run in runs.values())
    assert finished_equal(peaceful, resume_sweep(folder.path, say=quiet)) == []


def test_members_that_never_began_do_not_cost_others_their_only_checkpoint(tmp_path, monkeypatch):
    step, sent = cohort.Trainer.step, []

    def interrupted(trainer, x_TD):
        if trainer.steps_done == 12 and not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))
        return step(trainer, x_TD)

    monkeypatch.setattr(cohort.Trainer, "step", interrupted)
    with pytest.raises(Interrupted):
        run_sweep(replace(config(tmp_path / "sweep", at_once=2), checkpoint_every=0), quiet)
    folder = SweepFolder.open(tmp_path / "sweep")
    runs = {name: folder.run(name) for name in folder.members}
    first, second, *others = runs
    assert sweep_run._by_start(runs, quiet) == [(0, others), (13, [first, second])] and runs[first].checkpoint_steps() == [13]


def test_what_failed_in_another_process_is_not_tried_at_once_by_this_one(tmp_path):
    folder = run_sweep(config(tmp_path / "sweep", experts=[2], steps=2), quiet)
    again = SweepFolder.open(folder.path)
    for name in folder.members:
        (folder.run(name).path / "results.json").unlink()
    here, there = folder.members
    again.fail(there, 1, RuntimeError("died"))
    claims = again.claim(None, set())
    assert list(claims) == [here]
    claims[here].release()
    os.utime(folder.run(there).path / "failed.json", (1, 1))
    assert list(again.claim(None, set())) == [here, there]


def test_each_process_works_on_its_own_device_and_threads(tmp_path):
    run_sweep(config(tmp_path / "sweep", experts=[2], steps=2), quiet)
    other = replace(config(tmp_path / "sweep", experts=[2], steps=2), threads=2)
    assert {member.threads for member in SweepFolder.create(other, Measured()).members.values()} == {2}
    assert {member.threads for member in SweepFolder.open(tmp_path / "sweep").members.values()} == {1}


def failing(folder: Path) -> SweepConfig:
    return config(folder, grids={"wild": {"sae": {"num_experts": 4}, "trainer": {"lr": 1e30}}}, seeds=1)


def test_a_failing_member_leaves_the_others_alone_and_is_tried_again(peaceful, tmp_path):
    said = []
    folder = run_sweep(failing(tmp_path / "sweep"), said.append)
    (wild,) = (name for name in folder.members if "lr" in name)
    failed = json.loads((folder.run(wild).path / "failed.json").read_text())
    assert failed["error"].startswith("FloatingPointError: the loss is") and failed["step"] >= 1 and "Traceback" in failed["traceback"]
    assert any(line.startswith(f"{wild} failed at step {failed['step']} and is out: FloatingPointError") for line in said)
    for name in folder.members:
        if name != wild:
            assert all(torch.equal(a, b) for a, b in zip(*(load_sae(f.run(name).path).parameters() for f in (folder, peaceful)), strict=True))
    assert "failed" in (folder.path / "results.csv").read_text()
    models = {path: path.stat().st_mtime_ns for path in folder.path.rglob("model.safetensors")}
    resume_sweep(folder.path, say=said.append)
    assert sum("failed at step" in line for line in said) == 2
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("model.safetensors")} == models and len(models) == 3


def test_a_member_that_cannot_be_built_or_scored_is_out_too(tmp_path, monkeypatch):
    def build(sae, d_in, seed):
        if seed == 1:
            raise MemoryError("no room")
        return build_sae(sae, d_in, seed)

    monkeypatch.setattr(cohort, "build_sae", build)
    folder = run_sweep(config(tmp_path / "sweep", experts=[2], steps=5), quiet)
    assert [folder.is_finished(name) for name in folder.members] == [True, False]
    assert json.loads((folder.run("switch-e2-m64-k4-s1").path / "failed.json").read_text())["error"] == "MemoryError: no room"


def test_too_little_memory_is_said_before_anything_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(cohort, "available_bytes", lambda device: 30_000)
    said = []
    with pytest.raises(ValueError, match=r"training 6 SAEs at once needs .* GB are free on cpu. Use sweep.at_once=3 or less"):
        run_sweep(config(tmp_path / "sweep"), said.append)
    assert any(line.startswith("memory: 6 SAEs need") for line in said) and not list(tmp_path.rglob("metrics.jsonl"))


def test_a_folder_with_another_sweep_is_refused_with_what_differs(peaceful):
    with pytest.raises(ValueError, match=r"holds another sweep \(sweep.seeds: there 2, now 3\)"):
        run_sweep(config(peaceful.path, seeds=3), quiet)
    assert run_sweep(config(peaceful.path), quiet).members == peaceful.members
    with pytest.raises(FileNotFoundError, match=r"is not a sweep: it has no sweep\.json"):
        resume_sweep(peaceful.run("topk-m64-k4-s0").path)


def test_a_signal_saves_and_the_same_command_goes_on(peaceful, tmp_path, monkeypatch):
    step, sent = cohort.Trainer.step, []

    def interrupted(trainer, x_TD):
        if trainer.steps_done == 12 and not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))
        return step(trainer, x_TD)

    monkeypatch.setattr(cohort.Trainer, "step", interrupted)
    with pytest.raises(Interrupted, match=r"stopped at step 13; what is saved is whole. Go on with: make sweep RESUME="):
        run_sweep(config(tmp_path / "sweep"), quiet)
    monkeypatch.undo()
    folder = SweepFolder.open(tmp_path / "sweep")
    assert {tuple(folder.run(name).checkpoint_steps()) for name in folder.members} == {(10, 13)}
    assert finished_equal(peaceful, run_sweep(config(tmp_path / "sweep"), quiet)) == []


def test_members_that_are_one_checkpoint_ahead_or_damaged_join_the_others(peaceful, tmp_path, monkeypatch):
    saves = []
    save = RunDir.save_checkpoint

    def stop_between(run, checkpoint):
        saves.append(run.path.name)
        if len(saves) == 2 * 6 + 4:  # the fourth member's third checkpoint
            raise KeyboardInterrupt
        save(run, checkpoint)

    monkeypatch.setattr(RunDir, "save_checkpoint", stop_between)
    with pytest.raises(Interrupted, match="make sweep RESUME"):
        run_sweep(config(tmp_path / "sweep"), quiet)
    monkeypatch.undo()
    folder = SweepFolder.open(tmp_path / "sweep")
    runs = {name: folder.run(name) for name in folder.members}
    assert [run.checkpoint_steps() for run in runs.values()] == [[10, 15]] * 3 + [[5, 10]] * 3
    (damaged,) = runs["topk-m64-k4-s0"].path.glob("checkpoints/step-00000015*")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    said = []
    assert sweep_run._by_start(runs, said.append) == [(10, [*list(runs)[3:], *list(runs)[:3]])] or said
    assert "step-00000015.safetensors" in said[0] and "It is removed" in said[0]
    assert finished_equal(peaceful, resume_sweep(folder.path, say=said.append)) == []
    assert "6 SAEs go on from step 10 of 30" in said


def work(folder: Path, steps: int) -> None:
    """What one process does, however often it is started."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run_sweep(config(folder, steps), quiet)


def process(*arguments):
    started = CONTEXT.Process(target=work, args=arguments)
    started.start()
    return started


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["switch_sae.sweep", "torch._dynamo"])


def test_a_sweep_that_is_killed_again_and_again_loses_nothing_and_trains_nothing_twice(tmp_path):
    steps, kills = 100, 12
    imported = CONTEXT.Process(target=time.sleep, args=(0,))
    imported.start()
    imported.join()
    began = time.perf_counter()
    undisturbed = process(tmp_path / "peaceful", steps)
    undisturbed.join()
    lasts = time.perf_counter() - began
    assert undisturbed.exitcode == 0
    rng, landed, finished_at = random.Random(0), 0, {}
    while True:
        worker = process(tmp_path / "killed", steps)
        worker.join(timeout=None if landed == kills else rng.uniform(0.05, 0.25) * lasts)
        if worker.exitcode is not None:
            assert worker.exitcode == 0
            break
        worker.kill()
        worker.join()
        landed += 1
        for path in (tmp_path / "killed").rglob("results.json"):
            finished_at.setdefault(path, path.stat().st_mtime_ns)
    assert landed >= 2  # four or more, unless the machine has become twice as fast meanwhile
    one, other = SweepFolder(tmp_path / "peaceful"), SweepFolder(tmp_path / "killed")
    assert [line for line in finished_equal(one, other) if "results.json differs" not in line] == []
    for name in one.members:  # group sizes may differ after a kill between two members' results
        results = [folder.run(name).read_json("results.json")["members"] for folder in (one, other)]
        ours, theirs = (next(iter(members.values()))["metrics"] for members in results)
        assert ours == theirs
    assert all(path.stat().st_mtime_ns == then for path, then in finished_at.items())


def test_two_processes_share_one_sweep(peaceful, tmp_path):
    options = config(tmp_path / "sweep", at_once=2)
    assert options.sweep.folder
    workers = [process(tmp_path / "sweep", STEPS) for _ in range(2)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    folder = SweepFolder(tmp_path / "sweep")
    assert all(map(folder.is_finished, folder.members))
    for name in folder.members:
        assert folder.run(name).metrics() == peaceful.run(name).metrics()


TINY = (
    "model=synthetic", "sae.num_latents=32", "sae.k=2", "batch_size=64", "tokens=640", "calibration_rows=256", "evaluation.rows=256",
    "evaluation.bootstrap=0", "threads=1", "device=cpu",
)  # fmt: skip


def launched(module: str, *overrides: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "MAKELEVEL"}  # make is named to those who used it
    command = (sys.executable, "-m", f"experiments.{module}", *overrides, *TINY)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_hydras_launchers_run_workers_on_one_sweep(launcher, tmp_path):
    options = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [f"hydra.launcher.submitit_folder={tmp_path}/submitit"]
    launched(
        "sweep", "--multirun", f"hydra/launcher={launcher}", *options, "sweep.worker=0,1", f"runs={tmp_path}", f"sweep.folder={tmp_path}/sweep",
        "sweep.experts=[1,2]", "sweep.seeds=2", "sweep.at_once=1",
    )  # fmt: skip
    folder = SweepFolder(tmp_path / "sweep")
    assert len(folder.members) == 4 and all(map(folder.is_finished, folder.members))


def test_plain_multirun_gives_one_run_folder_each(tmp_path):
    launched("train", "--multirun", "sae.num_experts=1,2", "baselines=[]", "wandb.mode=disabled", f"runs={tmp_path}")
    assert len(list(tmp_path.glob("*/results.json"))) == 2


def test_the_command_prints_a_table_and_resumes(tmp_path):
    out = launched("sweep", "sweep.experts=[1,2]", f"sweep.folder={tmp_path}/sweep")
    assert "memory: 2 SAEs need" in out and f"figures   python -m experiments.figures {tmp_path}/sweep\n" in out
    again = subprocess.run(
        (sys.executable, "-m", "experiments.sweep", "--resume", str(tmp_path / "sweep")), cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert again.returncode == 0 and "2 SAEs in" in again.stdout and "2 of them finished" in again.stdout and "evaluating" not in again.stdout


def experiments() -> list[str]:
    folder = Path(CONF, "experiment", "sweep")
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def shrunk(member: RunConfig) -> RunConfig:
    """The same member, small enough for a test: what is particular to it stays."""
    smaller = {"k": max(2, getattr(member.sae, "blocks", None) or 1)} | ({"shared": 4} if getattr(member.sae, "shared", 0) else {})
    latents = 32 * getattr(member.sae, "num_experts", 1) + smaller.get("shared", 0)
    if "candidates" in {f.name for f in fields(member.sae)}:  # as a setting
        latents = max(latents, member.sae.candidates or 0)
    latents = member.sae.fitting(latents) if hasattr(member.sae, "fitting") else latents
    settings = {f.name for f in fields(member.sae)}
    smaller |= {"num_lists": 8, "candidates": 8}
    sae = replace(member.sae, num_latents=latents, **{name: value for name, value in smaller.items() if name in settings})
    tiny = config(steps=4).base
    if getattr(member.source, "target_hook", None) is not None:  # synthetic activations have no targets, and the bundled model few layers
        hooks = {name: re.sub(r"^blocks\.\d+", "blocks.1", getattr(member.source, name)) for name in ("hook", "target_hook")}
        tiny = replace(tiny, source=replace(member.source, buffer_rows=1024, cache=None, **hooks))
    return replace(tiny, sae=sae, trainer=replace(member.trainer, lr=1e-3), normalize_activations=member.normalize_activations)


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_of_a_sweep_says_what_it_asks_plans_and_runs_a_few_steps(name, tmp_path):
    lines = Path(CONF, "experiment", "sweep", f"{name}.yaml").read_text().splitlines()
    assert [line.split()[1] for line in lines[1:5]] == ["Question:", "Command:", "Time:", "Expected:"]
    assert f"experiment=sweep/{name}" in lines[2]
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        composed = sweep_config(compose("sweep", overrides=[f"experiment=sweep/{name}"]))
    expected = "gpt2" if name.startswith("paper/") else None if name.endswith("recovery") else "bundled"  # None: activations without a language model
    assert getattr(composed.source, "model", None) == expected
    members: list[RunConfig] = []
    for member in plan_members(composed, Measured()).values():
        if (small := shrunk(member)) not in members:
            members.append(small)
    RunDir(tmp_path).write_json("sweep.json", {"name": name, "settings": {}, "members": {str(n): config_to_plain(m) for n, m in enumerate(members)}})
    folder = resume_sweep(tmp_path, say=quiet)
    assert all(map(folder.is_finished, folder.members)), [json.loads(p.read_text())["error"] for p in tmp_path.rglob("failed.json")]


@pytest.mark.parametrize("name", [name for name in experiments() if name.startswith("paper/")])
def test_the_figures_keep_what_an_experiment_of_the_paper_compares(name):
    """Dense and Switch SAEs have recipes of their own there, which must not make one of them unusual."""
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        composed = sweep_config(compose("sweep", overrides=[f"experiment=sweep/{name}"]))
    rows = [
        ResultRow(
            path=Path(member), name=member, sae="sae", status="finished", architecture=(plain := config_to_plain(run))["sae"]["architecture"],
            num_latents=run.sae.num_latents, num_experts=getattr(run.sae, "num_experts", 1), k=getattr(run.sae, "k", None), seed=run.seed,
            config=flat(plain),
        )
        for member, run in plan_members(composed, Measured()).items()
    ]  # fmt: skip
    material = Material.of(rows)
    kept = {group.first.kind[:2] for group in material.standard()}
    if name in ("paper/width", "paper/flops", "paper/scaling"):
        assert kept == {(row.architecture, row.num_experts) for row in rows} and ("topk", 1) in kept and material.left_out() == []
    if name == "paper/baselines":
        assert kept == {(architecture, 1) for architecture in ("relu", "gated", "jumprelu", "batch_topk", "matryoshka")}
    if name == "paper/gate":
        pairs = [family for family in _families(material.groups, GATE).values() if len(family) == 2]
        assert len(pairs) == 4 and all({group.first.config["sae.router.gate"] for group in pair} == {"probability", "hard"} for pair in pairs)
    if name == "paper/balance":
        assert [len(family) for family in _families(material.groups, BALANCE).values()] == [12, 12]


def test_a_sweeps_settings_are_a_runs_settings_and_more():
    assert {f.name for f in fields(SweepConfig)} - {f.name for f in fields(RunConfig)} == {"sweep", "usual"}
