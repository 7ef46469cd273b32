"""Recordings of launches: replayed equal here, every kernel in them, and a fault of 5 % in any one kernel is named."""

import ast
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import switch_kernels.gpu
from experiments.benchmarks import recording, replay
from experiments.benchmarks.cases import Case
from switch_kernels import Precision, Regime, Shape
from switch_kernels.gpu import pairs
from switch_kernels.gpu.dispatch import count_experts

CPU = torch.device("cpu")
SMALL = Shape(T=12, D=9, M=16, E=2, K=2)
CASES = {
    "dense": (Case(SMALL, regime=Regime.dense, dead=3), torch.float32),
    "sparse": (Case(replace(SMALL, T=8, S=2, K=4), Precision.float32, regime=Regime.sparse), torch.float32),
}
FEW = {"num_latents": 20, "k": 2, "num_experts": 2, "shared": 4, "tokens": 8, "precision": Precision.float32}
SEARCHES = {
    "pursuit": {"architecture": "switch_pursuit", "stop": True, **FEW},
    "refit": {"architecture": "switch_refit", "dead": 2, **FEW},
    "threshold": {"architecture": "switch_batch_topk", **FEW, "num_latents": 16, "shared": 0},
}

pytestmark = pytest.mark.whole_steps


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "launches.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "CHUNK", 2)  # a latent's pairs fill a chunk even here
        recording.record(path, CASES, wanted=SEARCHES)
    return path


@pytest.fixture(scope="module")
def recorded(path):
    """(recording, launches with their storages before, after, and as they are replayed here)."""
    made = recording.Recording(path)
    return made, [
        (launch, *(made.storages(keys, "cpu") for keys in (launch.before, launch.after)), replay.run(made, launch, CPU)) for launch in made.launches
    ]


def written(launch, before, after):
    """[tensors that the launch changed], as views of `after`."""
    for _, tensor in recording.tensors_of(launch.names, launch.args):
        if not replay.same_bits(recording.rebuilt(tensor, before), recording.rebuilt(tensor, after)):
            yield recording.rebuilt(tensor, after)


def test_a_recording_replays_equal_and_is_the_same_every_time(path, recorded, tmp_path, capsys):
    assert all(torch.equal(a, b) for launch, before, after, found in recorded[1] for a, b in zip(after, found, strict=True))
    assert replay.replay(path, CPU) == 0
    text, kernels = capsys.readouterr().out, {launch.kernel for launch in recorded[0].launches}
    assert len(kernels) > 15 and all(kernel in text for kernel in kernels)
    again = tmp_path / "again.zip"
    one = {"dense": (Case(SMALL, Precision.float32, regime=Regime.dense), torch.bfloat16)}
    recording.record(again, one)
    first = again.read_bytes()
    recording.record(again, one)
    assert again.read_bytes() == first


def test_a_launch_that_writes_nothing_is_no_recording(tmp_path, monkeypatch):
    expert_TS = torch.zeros(4, 1, dtype=torch.int32)
    monkeypatch.setattr(recording, "steps", lambda *_: (lambda: count_experts(expert_TS, 1), lambda: None))
    recording.record(tmp_path / "x.zip", CASES)
    monkeypatch.setattr(recording.Recorder, "_keep", lambda self, storage: "the same")
    with pytest.raises(ValueError, match="no launch of _count_experts wrote anything"):
        recording.record(tmp_path / "x.zip", CASES)


FAULTS = {
    "all": lambda x: x.mul_(1.05),
    "the smaller half": lambda x: x.copy_(torch.where(x.abs() <= x[(x != 0) & x.isfinite()].abs().median(), x * 1.05, x)),
    "one of twenty": lambda x: x.view(-1)[::20].mul_(1.05) if x.is_contiguous() else x[:, 0].mul_(1.05),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_five_percent_in_any_kernel_is_named(path, recorded, fault, monkeypatch, capsys):
    made, launches = recorded
    spoiled_kernel = ""

    def run(_, launch, device):
        _, before, _, found = next(entry for entry in launches if entry[0] == launch)
        found = [storage.clone() for storage in found]
        for output in written(launch, before, found) if launch.kernel == spoiled_kernel else ():
            if output.is_floating_point():
                FAULTS[fault](output)
            else:
                output.view(-1)[::20].add_(1)
        return found

    monkeypatch.setattr(replay, "run", run)
    monkeypatch.setattr(replay, "Recording", lambda path: made)
    for spoiled_kernel in sorted({launch.kernel for launch in made.launches}):
        assert replay.replay(path, CPU) == 1, spoiled_kernel
        assert f"WRONG: {spoiled_kernel}\n" in capsys.readouterr().out


def test_small_numbers_beside_large_ones_are_compared_with_themselves():
    large_and_small = torch.tensor([250.0, 3.0, 0.02])
    assert replay.distance(large_and_small * torch.tensor([1, 1, 1.05]), large_and_small)[0] > 1
    columns_TC = torch.rand(40, 4) + 1
    columns_TC[:, 2] *= 1e-7
    assert replay.distance(columns_TC * torch.tensor([1, 1, 1.05, 1]), columns_TC)[0] > 1
    assert replay.distance(columns_TC * (1 + 1e-6), columns_TC)[0] < 0.01
    cancelled_N = torch.randn(1000)
    cancelled_N[5] = 1e-7
    assert replay.distance(cancelled_N + 1e-6 * torch.randn(1000), cancelled_N)[0] < 0.5
    nothing = torch.full((3,), float("nan"))
    assert replay.distance(nothing, nothing)[0] == 0 and replay.distance(torch.zeros(3), nothing)[0] == float("inf")
    assert not replay.Difference("x", float("nan"), "").holds


def test_numbers_that_come_in_any_order_are_compared_in_one(recorded):
    launch, before, after, found = next(entry for entry in recorded[1] if entry[0].kernel == "_collect_scores")
    found = [storage.clone() for storage in found]
    (scores,) = (tensor for tensor in written(launch, before, found) if tensor.is_floating_point())
    scores.copy_(scores.flip(0))
    assert all(difference.holds for difference in replay.compare(launch, before, found, after))
    scores[-1] += 1
    assert [difference.argument for difference in replay.compare(launch, before, found, after) if not difference.holds] == ["scores"]


def test_what_is_only_read_must_not_change(recorded):
    launch, before, after, found = next(entry for entry in recorded[1] if entry[0].kernel == "_gather_rows")
    found = [storage.clone() for storage in found]
    name, tensor = next(iter(recording.tensors_of(launch.names, launch.args)))
    recording.rebuilt(tensor, found).view(-1)[3] += 1
    wrong = [d for d in replay.compare(launch, before, found, after) if not d.holds]
    assert [d.argument for d in wrong] == [name] and "only read, but changed" in wrong[0].what


def changed(path, tmp_path, change):
    """A copy whose launches went through `change`."""
    copy = tmp_path / "changed.zip"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "launches.json":
                about = json.loads(data)
                change(about)
                data = json.dumps(about).encode()
            new.writestr(name, data)
    return copy


def test_a_kernel_that_changed_asks_for_another_recording(path, tmp_path, capsys):
    def rename(about):
        about["launches"] = about["launches"][:2]
        about["launches"][0]["names"][0] = "another"
        about["launches"][1]["kernel"] = "_gone"

    assert replay.replay(changed(path, tmp_path, rename), CPU) == 2
    text = capsys.readouterr().out
    assert "takes other arguments than when it was recorded (['another'" in text and text.count("record again") == 2
    with pytest.raises(recording.StaleError, match="has format 0"):
        recording.Recording(changed(path, tmp_path, lambda about: about.update(format=0)))


def test_recordings_name_no_place(path):
    text = json.dumps(json.loads(zipfile.ZipFile(path).read("launches.json")))
    assert str(Path.home()) not in text and str(Path(replay.__file__).parents[2]) not in text and "/" not in text


def test_the_cases_reach_every_kernel_in_the_tiles_of_a_gpu():
    from experiments.benchmarks.kernel_cases import evaluate, train
    from experiments.benchmarks.nodes import engine_on_meta
    from switch_kernels.gpu import gemm_tiles
    from switch_kernels.gpu.launch import launches_to
    from switch_sae.models import SAES

    folder = Path(switch_kernels.gpu.__file__).parent
    calls = [node for source in folder.glob("*.py") for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
    names = {c.args[0].id for c in calls if isinstance(c.func, ast.Name) and c.func.id == "launch" and isinstance(c.args[0], ast.Name)}
    seen, tiles = set(), set()

    def keep(launch):
        seen.add(launch.kernel.fn.__name__)
        tiles.add(launch.kwargs.get("BN", 0))

    with recording.tiles_of_a_gpu(), launches_to(keep):
        assert not gemm_tiles.interpreted()
        for case, dtype in recording.CASES.values():
            train(case, dtype)
        evaluate(recording.SMALL)
        for given in recording.SEARCHES.values():
            settings = {"precision": Precision.bf16, "tokens": 24, "dead": 0, **given}
            precision, tokens, dead, architecture = (settings.pop(name) for name in ("precision", "tokens", "dead", "architecture"))
            engine_on_meta(SAES[architecture].Config(**settings), tokens, recording.SMALL.D, precision, 64 if dead else 0)()
    assert gemm_tiles.interpreted() and max(tiles) == 128
    assert names == seen
