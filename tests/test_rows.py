"""Rows with targets of their own, from source to loss, metrics and scoring; and that an autoencoder's rows stay one tensor."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from switch_sae.activations import EvaluationSet
from switch_sae.activations.synthetic import SyntheticSource
from switch_sae.engines import same_form
from switch_sae.evaluation import evaluate
from switch_sae.models import SwitchSAE, TopKSAE
from switch_sae.models.base import unit_scale
from switch_sae.rows import NormLimit, Rows, moved, norms
from switch_sae.training import Trainer, TrainerConfig, prepare, train

D, T, STEPS = 8, 128, 150
SOURCE = SyntheticSource.Config(d_in=D, seed=3)


class Doubling:
    """x -> change(x): a source of two tensors."""

    def __init__(self, change: Any) -> None:
        self.source, self.change = SyntheticSource(SOURCE, T), change

    def __next__(self) -> Rows:
        x_TD = next(self.source).x_TD
        return Rows.of(x_TD, self.change(x_TD))

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def evaluation_set(self, rows: int) -> EvaluationSet:
        held_out = self.source.evaluation_set(rows)
        return replace(held_out, target_TD=self.change(held_out.x_TD))


def two_tensors() -> Rows:
    return Rows.of(torch.arange(12.0).view(6, 2), torch.arange(18.0).view(6, 3))


def test_one_tensor_stays_one_and_two_stay_two():
    x_TD = torch.arange(12.0).view(6, 2)
    one = Rows.of(x_TD)
    assert one.x_TD is x_TD is one.target_TD and Rows.of(x_TD, x_TD).target_TD is x_TD
    for changed in (one.map(lambda rows_TD: rows_TD * 2), one[2:5], one.to("cpu"), one.to("meta"), Rows.cat([one, one]), Rows.cat([one])):
        assert changed.x_TD is changed.target_TD
    assert torch.equal(one.map(lambda rows_TD: rows_TD * 2)[2:5].x_TD, 2 * x_TD[2:5])
    assert Rows.cat([one]).x_TD is x_TD and torch.equal(Rows.cat([one, one[:2]]).x_TD, torch.cat([x_TD, x_TD[:2]]))
    two = two_tensors()
    for changed, rows in (
        (two.map(lambda rows_TD: rows_TD + 1), 6),
        (two[1:4], 3),
        (two.to("meta"), 6),
        (Rows.cat([two, two]), 12),
        (Rows.cat([two]), 6),
    ):
        assert changed.x_TD is not changed.target_TD and len(changed) == len(changed.target_TD) == rows
        assert changed.x_TD.shape == (rows, 2) and changed.target_TD.shape == (rows, 3)
    assert torch.equal(two[1:4].target_TD, two.target_TD[1:4]) and torch.equal(Rows.cat([two, two]).target_TD[6:], two.target_TD)
    mixed = Rows.cat([one, Rows(x_TD, x_TD + 1)])
    assert torch.equal(mixed.target_TD[:6], x_TD) and torch.equal(mixed.target_TD[6:], x_TD + 1)


class OnTheCpu:
    """A tensor that notes how it is moved."""

    device, pinned = torch.device("cpu"), False

    def pin_memory(self):
        self.pinned = True
        return self

    def to(self, device, non_blocking=False):
        return device, self.pinned, non_blocking


def test_rows_go_to_a_gpu_by_pinned_memory_and_nowhere_else():
    assert moved(OnTheCpu(), "cuda") == ("cuda", True, True) and moved(OnTheCpu(), torch.device("cuda:1")) == (torch.device("cuda:1"), True, True)
    assert moved(OnTheCpu(), "cpu") == ("cpu", False, False) and moved(OnTheCpu(), "meta") == ("meta", False, False)


def test_norms_that_were_read_stay_with_their_rows():
    two = two_tensors()
    known = two.measured()
    assert torch.equal(known.norms_CT, torch.stack([norms(two.x_TD), norms(two.target_TD)])) and repr(known) == repr(two)
    for same in (known[:], known.clone(), known.to("cpu"), Rows.cat([known])):
        assert torch.equal(same.norms_CT, known.norms_CT)
    assert torch.equal(known[1:4].norms_CT, known.norms_CT[:, 1:4]) and torch.equal(known[1:4].target_TD, two.target_TD[1:4])
    for other in (known.map(lambda rows_TD: 2 * rows_TD), known[torch.tensor([0, 2])], Rows.cat([known, two])):
        assert other.norms_CT is None
    assert torch.equal(Rows.cat([known, known[:2]]).norms_CT, torch.cat([known.norms_CT, known.norms_CT[:, :2]], dim=1))
    limit = NormLimit(float(known.norms_CT[0, 4]), 20.0)
    assert torch.equal(limit.inliers(known).x_TD, limit.inliers(two).x_TD) and 0 < len(limit.inliers(two)) < 5
    one = Rows.of(two.x_TD).measured()
    assert one.norms_CT.shape == (1, 6) and len(NormLimit(limit.x, limit.x).inliers(one)) == 5


def test_a_change_is_computed_once_for_one_tensor():
    calls = []
    Rows.of(torch.zeros(2, 2)).map(lambda rows_TD: calls.append(1) or rows_TD)
    assert calls == [1]
    two_tensors().map(lambda rows_TD: calls.append(1) or rows_TD)
    assert calls == [1, 1, 1]


def test_different_numbers_of_rows_are_refused():
    with pytest.raises(ValueError, match="6 activations have 5 targets; each needs one"):
        Rows.of(torch.zeros(6, 2), torch.zeros(5, 2))


def test_batches_of_the_same_form_are_known_by_both_tensors():
    one, two = Rows.of(torch.zeros(6, 2)), two_tensors()
    assert same_form(one, Rows.of(torch.ones(6, 2))) and same_form(two, two[:]) and not same_form(one, two) and not same_form(two, two[:3])
    assert not same_form(one, Rows(one.x_TD, one.x_TD.clone())) and not same_form(one, one.map(lambda rows_TD: rows_TD.bfloat16()))


def test_sources_and_evaluation_sets_of_autoencoders_hold_one_tensor():
    source = SyntheticSource(SOURCE, T)
    rows, held_out = next(source), source.evaluation_set(50)
    assert rows.x_TD is rows.target_TD and held_out.target_TD is None and held_out.rows.x_TD is held_out.rows.target_TD is held_out.x_TD


def fvus(sae, source, lr: float = 1e-2) -> tuple[float, float]:
    """FVU of the targets in the first and the last step of training by `train`."""
    prepare(sae, Rows.cat([next(source) for _ in range(4)]), True)
    seen: list[float] = []
    trainer = Trainer(sae, TrainerConfig(lr=lr), STEPS, T)
    finished = train(
        {"it": trainer},
        source,
        STEPS,
        save=lambda checkpoint: None,
        checkpoint_every=0,
        log=lambda step, name, row: seen.append(row["fvu"]),
        log_every=STEPS,
    )
    assert finished and len(seen) == 2
    return seen[0], seen[-1]


@pytest.mark.parametrize("config", [TopKSAE.Config(num_latents=32, k=4), SwitchSAE.Config(num_latents=64, k=4, num_experts=2)])
def test_twice_the_activations_are_learned_and_scored_as_targets(config):
    """The same SAE on x -> 2x: its loss is of the target, its input is not."""
    owner = TopKSAE if type(config) is TopKSAE.Config else SwitchSAE
    sae = owner(config, D, torch.Generator().manual_seed(0))
    source = Doubling(lambda x_TD: 2 * x_TD)
    first, last = fvus(sae, source)
    assert last < 0.2 < first, "who reconstructs x itself has 0.25"
    held_out = source.evaluation_set(400)
    with torch.no_grad():
        recon_TD = sae.eval()(held_out.x_TD).recon_TD
    expected = ((2 * held_out.x_TD - recon_TD).pow(2).sum() / (2 * (held_out.x_TD - held_out.x_TD.mean(0))).pow(2).sum()).item()
    assert evaluate(sae, held_out, bootstrap=0)["fvu"].value == pytest.approx(expected, rel=1e-5) and expected < 0.2
    assert evaluate(sae, replace(held_out, target_TD=None), bootstrap=0)["fvu"].value > 2 * expected


class Transcoder(SwitchSAE):
    """Made up for this test: reads one hook and reconstructs another of another size, with a bias and a scale of its own for it."""

    @dataclass
    class Config(SwitchSAE.Config):
        d_out: int = 5

    target_scale_: torch.Tensor

    def __init__(self, config: "Transcoder.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        init_MD = torch.randn(config.num_latents, config.d_out, generator=generator)
        self.W_dec_MD = nn.Parameter(nn.functional.normalize(init_MD, dim=1))
        self.b_post_D = nn.Parameter(torch.zeros(config.d_out))
        self.register_buffer("target_scale_", torch.tensor(1.0))

    d_out = property(lambda self: self.config.d_out)  # type: ignore[assignment]
    target_scale = property(lambda self: self.target_scale_)  # type: ignore[assignment]
    b_out_D = property(lambda self: self.b_post_D)  # type: ignore[assignment]

    def set_scale(self, rows: Rows) -> None:
        super().set_scale(rows)
        self.target_scale_.fill_(unit_scale(rows.target_TD))

    def initialize(self, rows: Rows) -> None:
        super().initialize(rows)
        self.b_post_D.data.copy_(rows.target_TD.mean(0) * self.target_scale)


def projection() -> torch.Tensor:
    return 3 * torch.randn(D, 5, generator=torch.Generator().manual_seed(8)) / D**0.5


def test_a_transcoder_to_another_size_trains_and_is_scored():
    projection_DD = projection()
    source = Doubling(lambda x_TD: x_TD @ projection_DD + 1)
    sae = Transcoder(Transcoder.Config(num_latents=64, k=4, num_experts=2, auxk_latents=4), D, torch.Generator().manual_seed(0))
    first, last = fvus(sae, source)
    assert last < 0.35 < 0.6 * first
    held_out = source.evaluation_set(400)
    results = evaluate(sae, held_out, bootstrap=20)
    with torch.no_grad():
        output = sae.eval()(held_out.x_TD)
    target_TD = held_out.target_TD
    assert output.recon_TD.shape == target_TD.shape == (400, 5)
    expected = ((target_TD - output.recon_TD).pow(2).sum() / (target_TD - target_TD.mean(0)).pow(2).sum()).item()
    assert results["fvu"].value == pytest.approx(expected, rel=1e-5) and expected < 0.2
    cosine_T = torch.nn.functional.cosine_similarity(target_TD, output.recon_TD, dim=1)
    assert results["cosine"].value == pytest.approx(cosine_T.mean().item(), rel=1e-5)
    scaled = (target_TD * sae.target_scale).pow(2).sum(1).mean().item()
    assert 0.8 < scaled / 5 < 1.25, "targets have a scale of their own"


def test_a_transcoders_dead_latents_learn_from_the_targets_residual():
    projection_DD = projection()
    source = Doubling(lambda x_TD: x_TD @ projection_DD)
    sae = Transcoder(Transcoder.Config(num_latents=64, k=4, num_experts=2, auxk_latents=4), D, torch.Generator().manual_seed(0))
    prepare(sae, next(source), True)
    rows, dead_M = next(source), torch.arange(64) % 3 == 0
    term = sae.loss_terms(rows, sae(rows.x_TD), dead_M)["auxk"]
    W_enc, W_dec = torch.autograd.grad(term, [sae.W_enc_MD, sae.W_dec_MD])
    assert W_enc.shape == (64, D) and W_dec.shape == (64, 5) and (W_dec[dead_M].abs().sum(1) > 0).any() and (W_dec[~dead_M] == 0).all()


def test_rows_and_targets_that_do_not_belong_together_are_refused():
    source = Doubling(lambda x_TD: 2 * x_TD)
    sae = TopKSAE(TopKSAE.Config(num_latents=16, k=2), D)
    with pytest.raises(ValueError, match="40 activations have 30 targets"):
        evaluate(sae, EvaluationSet(source.evaluation_set(40).x_TD, torch.arange(40), target_TD=source.evaluation_set(30).x_TD))
    with pytest.raises(ValueError, match=r"the reconstruction has shape \(40, 8\); it must be that of the target, \(40, 5\)"):
        evaluate(sae, EvaluationSet(source.evaluation_set(40).x_TD, torch.arange(40), target_TD=torch.randn(40, 5)))
    with pytest.raises(ValueError, match="the first activations are all zero"):
        prepare(sae, Rows.of(torch.ones(4, D), torch.zeros(4, D)), True)
