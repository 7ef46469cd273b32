"""Several processes that share a batch: two with half of it each train what one trains with the whole, to 1e-9 in float64.

Sums are taken in another order, and nothing else differs: at every step the same latents are selected and counted, and the same statistics kept.
What only the first tokens of a batch go through (rivals, samples, the search for missed latents) are the first of each process's part, so the same
tokens only where all go through it, as here.
"""

import multiprocessing
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from configs import CONTRACTS

from switch_kernels import ALONE, Group, ProcessGroup
from switch_sae.models import SAES, Inference, gram
from switch_sae.models.pairs import largest
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, STEPS, SIZE = 12, 64, 8, 2
TIED = {"two levels": [3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 0.0, -1.0], "all equal": [1.0] * 8, "few": [-1.0, -2.0, 0.5, -1.0, 0.0, -1.0, -3.0, 0.25]}
"""By rank, half each."""


def activations(seed: int, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + torch.linspace(-2, 2, D)


def trained(name: str, group: Group) -> tuple[Trainer, list[dict[str, torch.Tensor]]]:
    """A trainer after some steps, of which some have dead latents and the later ones other Gram matrices, and each step's loss terms."""
    config = CONTRACTS[name]
    if hasattr(getattr(config, "router", None), "rivals"):
        config = replace(config, router=replace(config.router, rivals=1.0))
    changes = {key: value for key, value in {"auxk_latents": 6, "missed_share": 1.0, "sample": 1.0}.items() if hasattr(config, key)}
    sae = SAES.build(replace(config, **changes), D, torch.Generator().manual_seed(1)).double()
    prepare(sae, Rows.of(activations(99, 256)), True)
    if sae.has_encoder:
        with torch.no_grad():
            next(bias for name in ("b_enc_M", "b_gate_M", "b_key_P") if (bias := getattr(sae, name, None)) is not None)[::5] = -50.0
    trainer = Trainer(sae, TrainerConfig(lr=1e-2, warmup_steps=0, dead_after_tokens=2 * T), STEPS, T, group=group)
    if sae.inference is Inference.pursuit:  # no bias keeps it from a latent, so the dead are those of before
        trainer.tokens_since_fired_M[::5] = 2 * T
    with patch.object(gram, "REFRESH_TOKENS", 3 * T):
        terms = [
            {key: term.clone() for key, term in trainer.step(Rows.of(activations(step)).map(group.shard)).terms.items()} for step in range(STEPS)
        ]
    return trainer, terms


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SIZE)
    group = ProcessGroup()
    found = {}
    for name in CONTRACTS:
        trainer, terms = trained(name, group)
        found[name] = trainer.state_dict()[0], terms
    ties = {name: largest(torch.tensor(values).view(SIZE, 2, 2)[rank], 2, group) for name, values in TIED.items()}
    gathered = group.gather(torch.arange(3.0 + rank))
    mask = torch.tensor([rank == 0, rank == 1, False])
    group.any_(mask)
    trainer, x_TD = trained("topk", group)[0], activations(0)
    x_TD[0, 0] = torch.nan  # a row of the first process
    before = {key: tensor.clone() for key, tensor in trainer.sae.state_dict().items()}
    try:
        trainer.step(Rows.of(group.shard(x_TD)))
        refused = ""
    except FloatingPointError as error:
        refused = str(error) if all(torch.equal(tensor, before[key]) for key, tensor in trainer.sae.state_dict().items()) else "changed"
    torch.save({"found": found, "ties": ties, "gathered": gathered, "mask": mask, "refused": refused}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has at the end."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        context = multiprocessing.get_context("forkserver")  # imports torch once for both
        context.set_forkserver_preload(["switch_sae.training", "torch._dynamo"])
        both = [context.Process(target=work, args=(rank, str(folder))) for rank in range(SIZE)]
        for process in both:
            process.start()
        for process in both:
            process.join()
    assert [process.exitcode for process in both] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


@pytest.mark.parametrize("name", list(CONTRACTS))
def test_two_processes_with_half_a_batch_each_equal_one_with_the_whole(name, ranks):
    whole, terms = trained(name, ALONE)
    expected = whole.state_dict()[0]
    (first, terms_0), (second, terms_1) = (rank["found"][name] for rank in ranks)
    assert first.keys() == second.keys() == expected.keys()
    pursues = whole.sae.inference is Inference.pursuit
    assert pursues or (expected["tokens_since_fired"] == STEPS * T).any()
    assert (expected["tokens_since_fired"] == 0).any()
    assert ("auxk" in terms[0 if pursues else -1]) == hasattr(whole.sae.config, "auxk") and (pursues or "auxk" not in terms[0])
    for key, tensor in expected.items():
        assert torch.equal(first[key], second[key]), key
        if key == "training/gram_age":
            assert tensor == 2 * T  # of the third refresh
        if tensor.is_floating_point():
            torch.testing.assert_close(first[key], tensor, rtol=1e-9, atol=1e-9, msg=key)
        else:
            assert torch.equal(first[key], tensor), key
    for whole_terms, *shares in zip(terms, terms_0, terms_1, strict=True):
        assert all(share.keys() == whole_terms.keys() for share in shares)
        for key, term in whole_terms.items():
            torch.testing.assert_close(torch.stack([share[key] for share in shares]).mean(), term, rtol=1e-9, atol=1e-12, msg=key)


def test_what_training_counts_over_a_batch_had_something_to_count(ranks):
    """Without this the equality above could hold for statistics that never moved."""
    for name, buffer in (
        ("batch_topk", "threshold"),
        ("matryoshka", "threshold"),
        ("shared_pool", "energy_EM"),
        ("switch, bias_balanced", "router.balance_E"),
        ("switch, cosine_kmeans", "router.mean_ED"),
        ("switch_refit", "threshold"),
        ("switch_pursuit, stop, shared", "theta"),
    ):
        sae = SAES.build(CONTRACTS[name], D, torch.Generator().manual_seed(1)).double()
        prepare(sae, Rows.of(activations(99, 256)), True)
        assert not torch.allclose(sae.state_dict()[buffer], ranks[0]["found"][name][0][f"sae/{buffer}"]), name


@pytest.mark.parametrize("name", list(TIED))
def test_the_largest_of_all_processes_are_the_largest_of_the_whole_and_a_tie_goes_to_the_lower_rank(name, ranks):
    own = torch.tensor(TIED[name]).view(SIZE, 4)
    found = [rank["ties"][name] for rank in ranks]
    taken = torch.cat([own[rank][positions] for rank, positions in enumerate(found)])
    best = own.flatten().topk(4).values
    assert taken.sort(descending=True).values.tolist() == best[best > 0].tolist()
    lowest = taken.min()
    left = int((own[0] == lowest).sum()) - int((own[0][found[0]] == lowest).sum())
    assert left == 0 or not (own[1][found[1]] == lowest).any(), "the higher rank took a tie that the lower one still had"


def test_values_of_different_lengths_are_gathered_and_masks_joined(ranks):
    for rank in ranks:
        assert [values.tolist() for values in rank["gathered"]] == [[0, 1, 2], [0, 1, 2, 3]] and rank["mask"].tolist() == [True, True, False]


def test_what_is_not_finite_in_one_process_stops_all_before_any_weight_changes(ranks):
    assert all("the loss is" in rank["refused"] and "No weight was changed" in rank["refused"] for rank in ranks)


def test_alone_nothing_is_copied_or_changed():
    x, mask = activations(0), torch.tensor([True, False])
    assert ALONE.shard(x) is x and ALONE.mean([x])[0] is x and ALONE.gather(x)[0] is x and (ALONE.rank, ALONE.size) == (0, 1)
    before = x.clone()
    ALONE.mean_([x])
    ALONE.any_(mask)
    assert torch.equal(x, before) and mask.tolist() == [True, False]


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    group = object.__new__(ProcessGroup)
    group.rank, group.size = 1, 3
    assert group.shard(torch.arange(6)).tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"a batch of 64 rows cannot be shared evenly by 3 processes\. Use a multiple of 3"):
        group.shard(activations(0))
