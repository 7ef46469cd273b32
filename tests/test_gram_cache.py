"""Where Gram matrices lie while an SAE trains: kernels write them in place, and a captured graph reads them there."""

import pytest
import torch
from torch.nn.functional import normalize

from switch_sae.models.gram import GramCache

E, S, EVERY = 3, 2, 20


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normalize(torch.randn(S + E * 4, 6, generator=torch.Generator().manual_seed(seed)).to(dtype), dim=1)


def step(grams: GramCache, W_MD: torch.Tensor, tokens: int = 10) -> bool:
    """What a step of kernels does; whether it wrote the matrices anew."""
    anew = grams.is_due(W_MD, E, S, EVERY)
    if anew:
        grams.of_step.copy_(GramCache().current(W_MD, E, S))
    grams.took(tokens, anew)
    return anew


def test_matrices_are_written_anew_after_so_many_tokens_and_stay_where_they_are():
    grams = GramCache()
    written = [step(grams, weights(n)) for n in range(5)]
    assert written == [True, False, True, False, True]
    place = grams.of_step.data_ptr()
    grams.for_step(weights(7), E, S, 10, EVERY)  # a pass of autograd between two steps: nothing is due
    assert torch.equal(grams.of_step, GramCache().current(weights(4), E, S))
    grams.for_step(weights(8), E, S, 10, EVERY)
    assert torch.equal(grams.of_step, GramCache().current(weights(8), E, S)) and grams.of_step.data_ptr() == place


def test_what_no_step_wrote_is_due_again():
    grams = GramCache()
    assert grams.is_due(weights(), E, S, EVERY) and grams.is_due(weights(), E, S, EVERY)


@pytest.mark.parametrize("before", [weights(0, torch.float64), weights()[:-3]], ids=["float64", "of another size"])
def test_matrices_of_other_weights_are_due(before):
    grams = GramCache()
    grams.for_step(before, E, S, 10, EVERY)
    assert step(grams, weights()) and grams.of_step.dtype == torch.float32 and len(grams.of_step[0]) == S + 4


def test_a_state_is_copied_into_its_place_and_none_forgets():
    first, second = GramCache(), GramCache()
    for grams, seed in ((first, 0), (second, 1)):
        step(grams, weights(seed))
    place, saved = second.of_step.data_ptr(), first.of_step.clone()
    second.load(first.state(), weights())
    assert torch.equal(second.of_step, saved) and second.of_step.data_ptr() == place
    third = GramCache()
    third.load(first.state(), weights())
    for grams in (second, third):
        assert [step(grams, weights(2)), step(grams, weights(2))] == [False, True]
    assert torch.equal(first.of_step, saved) and not torch.equal(third.of_step, saved)
    first.load({}, weights())
    assert first.state() == {} and step(first, weights(3))
