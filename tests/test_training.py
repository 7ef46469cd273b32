"""Training: schedules, that looking changes nothing, that stopping and going on is exact, and golden losses."""

import copy
import signal

import pytest
import torch

from switch_sae.activations.synthetic import SyntheticSource
from switch_sae.models import SwitchSAE, TopKSAE
from switch_sae.rows import Rows
from switch_sae.runs import RunDir
from switch_sae.training import Interruption, LRWidth, Schedule, Trainer, TrainerConfig, prepare, train

BATCH, STEPS = 64, 30
GOLDEN = {"switch": [11.2496, 10.7739, 9.45, 9.386, 9.0671], "topk": [8.2826, 7.6317, 6.1989, 5.8633, 6.019]}


def source():
    return SyntheticSource(SyntheticSource.Config(d_in=16, seed=3), BATCH)


def members(steps: int = STEPS) -> dict[str, Trainer]:
    configs = {"switch": SwitchSAE.Config(num_latents=64, k=4, num_experts=4), "topk": TopKSAE.Config(num_latents=32, k=4)}
    calibration = Rows.cat([next(s) for s in [source()] for _ in range(4)])
    trainers = {}
    for name, config in configs.items():
        owner = SwitchSAE if name == "switch" else TopKSAE
        sae = owner(config, 16, torch.Generator().manual_seed(0))
        prepare(sae, calibration, True)
        trainers[name] = Trainer(sae, TrainerConfig(lr=3e-3, dead_after_tokens=300), steps, BATCH)
    return trainers


def weights(trainers: dict[str, Trainer]) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": tensor.clone() for name, trainer in trainers.items() for key, tensor in trainer.sae.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def run(**options):
    trainers = members()
    finished = train(trainers, options.pop("source", source()), STEPS, save=options.pop("save", lambda c: None), checkpoint_every=0, **options)
    assert finished
    return weights(trainers)


def test_logging_every_step_or_never_gives_identical_weights():
    rows: list[dict] = []
    silent = run(log=None, log_every=0)
    watched = run(
        log=lambda step, name, numbers: rows.append(numbers), log_every=1, progress=lambda step, results: [r.numbers() for r in results.values()]
    )
    assert same(silent, watched) and len(rows) == 2 * STEPS
    assert {"loss", "loss/mse", "fvu", "l0", "dead", "grad_norm", "lr"} <= rows[0].keys() and rows[-1]["fvu"] < 0.7 * rows[0]["fvu"]


def test_every_saved_checkpoint_resumes_to_the_same_weights(tmp_path):
    checkpoints = []
    trainers = members()
    train(trainers, source(), STEPS, save=lambda c: checkpoints.append(copy.deepcopy(c)), checkpoint_every=7)
    assert [c.step for c in checkpoints] == [7, 14, 21, 28, 30]
    for checkpoint in checkpoints[:-1]:
        folder = RunDir(tmp_path / str(checkpoint.step))
        folder.save_checkpoint(checkpoint)
        again = members()
        assert train(again, source(), STEPS, save=lambda c: None, checkpoint_every=0, resume=folder.checkpoint_at(checkpoint.step))
        assert same(weights(trainers), weights(again)), checkpoint.step


def test_a_checkpoint_does_not_share_memory_that_training_goes_on_changing(tmp_path):
    kept = {}
    run_dir = RunDir(tmp_path)

    def save(checkpoint):
        run_dir.save_checkpoint(checkpoint)
        kept[checkpoint.step] = {key: tensor.clone() for key, tensor in checkpoint.tensors.items()}

    train(members(), source(), 10, save=save, checkpoint_every=5)
    assert same(run_dir.checkpoint_at(10).tensors, kept[10]) and not same(kept[5], kept[10])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_resumes_exactly(number):
    expected = run()
    saved = []
    trainers = members()
    with Interruption().listening() as interruption:
        finished = train(
            trainers, source(), STEPS, save=saved.append, checkpoint_every=0, interruption=interruption,
            progress=lambda step, results: signal.raise_signal(number) if step == 11 else None,
        )  # fmt: skip
    assert not finished and interruption.signal == number and [c.step for c in saved] == [11]
    assert signal.getsignal(number) is not interruption._handle
    again = members()
    assert train(again, source(), STEPS, save=lambda c: None, checkpoint_every=0, resume=copy.deepcopy(saved[0]))
    assert same(expected, weights(again))


def test_members_of_a_group_equal_members_trained_alone():
    together = run()
    for name in ("switch", "topk"):
        alone = {name: members()[name]}
        train(alone, source(), STEPS, save=lambda c: None, checkpoint_every=0)
        assert all(torch.equal(tensor, together[key]) for key, tensor in weights(alone).items())


def test_a_checkpoint_of_other_members_is_refused():
    saved = []
    train(members(), source(), 2, save=saved.append, checkpoint_every=0)
    with pytest.raises(ValueError, match=r"the checkpoint holds \['switch', 'topk'\], this run trains \['switch'\]"):
        train({"switch": members()["switch"]}, source(), 4, save=saved.append, checkpoint_every=0, resume=saved[0])


def test_numbers_wait_for_the_device_once_for_each_dtype(monkeypatch):
    trainer, stream = members()["switch"], source()
    result = trainer.step(next(stream))
    expected = {"fvu": result.fvu(), "dead": result.dead_share(), "grad_norm": result.outcome.grad_norm.item(), "lr": result.lr}
    expected |= {f"loss/{name}": term.item() for name, term in result.terms.items()}
    expected |= {"l0": result.outcome.active().item() / BATCH, "loss": sum(term.item() for term in result.terms.values())}
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, real=real, name=name: (waits.append(name), real(tensor))[1])
    numbers = result.numbers()
    assert waits == ["tolist", "tolist"] and list(numbers)[:2] == ["loss", "loss/mse"]
    assert {key: numbers[key] for key in expected} == expected and 0 < numbers["load/min"] < numbers["load/max"] < 1


def test_nan_activations_stop_before_any_weight_changes():
    trainers = members()
    before = weights(trainers)
    x = next(source())
    x.x_TD[3, 2] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0.*No weight was changed"):
        trainers["switch"].step(x)
    assert same(before, weights(trainers)) and trainers["switch"].steps_done == 0


@pytest.mark.parametrize("bad", [torch.zeros(8, 16), torch.full((8, 16), float("inf"))])
def test_useless_calibration_rows_are_refused(bad):
    with pytest.raises(ValueError, match="the first activations"):
        prepare(members()["topk"].sae, Rows.of(bad), True)


def test_dead_latents_are_counted_in_tokens_and_revived_by_firing():
    trainer = members()["topk"]
    with torch.no_grad():
        trainer.sae.b_enc_M[:5] = -100.0
    stream = source()
    for _ in range(5):
        result = trainer.step(next(stream))
    assert trainer.tokens_since_fired_M[:5].eq(5 * BATCH).all() and result.dead_M.sum() == 0
    result = trainer.step(next(stream))
    assert result.dead_M[:5].all() and "auxk" in result.terms
    assert (trainer.tokens_since_fired_M == 0).any()


def test_schedule_rises_stays_and_falls_to_zero():
    sae = members()["switch"].sae
    schedule = Schedule.resolve(TrainerConfig(lr=1.0, warmup_steps=10), sae, 100)
    rates = [schedule(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 == rates[79] and rates[99] == pytest.approx(0.05) and schedule(100) == 0
    assert rates == sorted(rates[:11]) + rates[11:80] + sorted(rates[80:], reverse=True)


def test_the_automatic_rate_follows_the_stated_width():
    sae = members()["switch"].sae  # 64 latents, 4 experts
    total = Schedule.resolve(TrainerConfig(), sae, 100).peak
    expert = Schedule.resolve(TrainerConfig(lr_width=LRWidth.expert), sae, 100).peak
    assert total == pytest.approx(2e-4 * 16) and expert == pytest.approx(2 * total)


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"lr": float("nan")}, {"clip": -1.0}, {"decay_fraction": 1.5}, {"warmup_steps": -1}])
def test_impossible_settings_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"trainer.{name}="):
        TrainerConfig(**change)


def test_golden_losses():
    """A change that should not move numbers must not move these; one that should says so in CHANGELOG.md and renews them."""
    stream, trainers = source(), members()
    losses = {name: [] for name in trainers}
    for _ in range(STEPS):
        rows = next(stream)
        for name, trainer in trainers.items():
            losses[name].append(sum(trainer.step(rows).terms.values()).item())
    for name, expected in GOLDEN.items():
        assert losses[name][::6] == pytest.approx(expected, rel=2e-4), name
