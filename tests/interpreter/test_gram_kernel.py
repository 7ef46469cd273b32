"""Gram matrices of dictionaries against sums over pairs of rows in float64, in the tiles of the interpreter and of a GPU."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from experiments.benchmarks.recording import tiles_of_a_gpu
from switch_kernels.gpu import gram as kernel
from switch_kernels.gpu.gram import gram_matrices_
from switch_kernels.gpu.launch import launches_to
from switch_kernels.pursuit import gram_matrices, padded_columns
from switch_sae.models.gram import _gram

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = {
    "one number": (1, 0, 1, 1),
    "columns of padding": (3, 0, 21, 24),
    "whole tiles": (2, 0, 64, 32),
    "shared latents, odd rows": (3, 7, 30, 33),
    "shared latents fill tiles": (2, 70, 5, 17),
    "all latents shared": (2, 40, 0, 12),
    "one expert, three tiles": (1, 3, 90, 9),
    "four tiles, ragged": (2, 0, 101, 48),
    "five tiles": (1, 0, 150, 20),
}
"""E, shared, F, D."""
TOLERANCE = {"ieee": 1e-6, "bf16": 3 * 2.0**-16 + 1e-6}
"""Halves of 8 bits: the product of two low ones is left out, and each low one is rounded."""


def weights(experts: int, shared: int, own: int, D: int) -> Tensor:
    """Rows of norm 1, as decoders have them."""
    W_MD = torch.randn(shared + experts * own, D, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(W_MD.double(), dim=1).float()


def dictionaries(W_MD: Tensor, experts: int, shared: int) -> Tensor:
    """[E, C, D], written out row by row."""
    own = (len(W_MD) - shared) // experts
    latents = [[*range(shared), *(shared + expert * own + f for f in range(own))] for expert in range(experts)]
    return torch.stack([torch.stack([W_MD[latent] for latent in of_expert]) for of_expert in latents])


def computed(W_MD: Tensor, experts: int, shared: int, dot: str = "ieee") -> Tensor:
    candidates = shared + (len(W_MD) - shared) // experts
    gram_ECP = torch.empty(experts, candidates, padded_columns(candidates))
    assert gram_ECP.isnan().all()
    gram_matrices_(gram_ECP, W_MD, shared, dot)
    return gram_ECP


@pytest.fixture(params=["small tiles", "a GPU's float32", "a GPU's three products"])
def dot(request):
    with nullcontext() if request.param == "small tiles" else tiles_of_a_gpu():
        yield "bf16" if request.param.endswith("products") else "ieee"


@pytest.mark.parametrize("name", SHAPES)
def test_each_number_is_the_product_of_two_rows(name, dot):
    experts, shared, own, D = SHAPES[name]
    W_MD = weights(experts, shared, own, D)
    gram_ECP = computed(W_MD, experts, shared, dot)
    A_ECD = dictionaries(W_MD, experts, shared)
    candidates = A_ECD.shape[1]
    exact_ECC = (A_ECD.double()[:, :, None] * A_ECD.double()[:, None]).sum(3)
    own_ECC = gram_ECP[:, :, :candidates]
    assert (own_ECC - exact_ECC).abs().max() <= TOLERANCE[dot]
    assert torch.equal(own_ECC, own_ECC.transpose(1, 2)) and not gram_ECP[:, :, candidates:].any()
    for other_ECP in (gram_matrices(A_ECD), _gram(W_MD, experts, shared)):
        torch.testing.assert_close(gram_ECP, other_ECP, rtol=0, atol=2 * TOLERANCE[dot])
    assert torch.equal(gram_ECP, computed(W_MD, experts, shared, dot))


def test_three_products_stand_for_one_of_float32_and_one_alone_would_not_do():
    """To 16 bits, where bfloat16 has 8."""
    W_MD = weights(2, 5, 100, 256)
    with tiles_of_a_gpu():
        exact_ECP, found_ECP = computed(W_MD, 2, 5), computed(W_MD, 2, 5, "bf16")
    rounded_ECP = computed(W_MD.bfloat16().float(), 2, 5)
    assert 1e-7 < (found_ECP - exact_ECP).abs().max() < TOLERANCE["bf16"] < (rounded_ECP - exact_ECP).abs().max() / 10
    assert torch.equal(computed(W_MD, 2, 5, "bf16"), computed(W_MD, 2, 5)), "the interpreter multiplies float32"


def test_rows_of_nan_stay_in_their_rows_and_columns(dot):
    """Also where tiles read past a dictionary's end: neither the padding nor another expert sees them."""
    experts, shared, own = 3, 6, 37
    W_MD = weights(experts, shared, own, 20)
    clean_ECP = computed(W_MD, experts, shared, dot)
    W_MD[shared + own - 1] = torch.nan  # the first expert's last
    W_MD[shared + 2 * own] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # the third's first: NaN with all bits set
    gram_ECP = computed(W_MD, experts, shared, dot)
    hit_EC = torch.zeros(experts, shared + own, dtype=torch.bool)
    hit_EC[0, -1] = hit_EC[2, shared] = True
    hit_ECC = hit_EC[:, :, None] | hit_EC[:, None, :]
    finite_ECC = gram_ECP[:, :, : shared + own].isfinite()
    assert torch.equal(finite_ECC, ~hit_ECC) and not gram_ECP[:, :, shared + own :].any()
    assert torch.equal(gram_ECP[:, :, : shared + own][finite_ECC], clean_ECP[:, :, : shared + own][finite_ECC])


def test_every_pair_of_tiles_once():
    pairs = kernel._tile_pair.fn
    for n in range(1, 10):
        found = {tuple(_plain(pairs, pair, n)) for pair in range(n * (n + 1) // 2)}
        assert found == {(a, b) for a in range(n) for b in range(a + 1)}


def _plain(function, pair, n):
    """With Python's numbers instead of a kernel's."""
    where, kernel.tl.where = kernel.tl.where, lambda condition, yes, no: yes if condition else no
    try:
        return function(pair, n)
    finally:
        kernel.tl.where = where


@pytest.mark.parametrize("gpu", [False, True])
def test_one_launch_of_a_grid_that_a_gpu_takes(gpu):
    launches = []
    with tiles_of_a_gpu() if gpu else nullcontext(), launches_to(launches.append):
        for experts, candidates in ((4096, 8192), (24, 170), (5, 0)):
            gram_matrices_(
                torch.empty(experts, candidates, padded_columns(candidates), device="meta"),
                torch.empty(experts * candidates, 768, device="meta"),
                0,
                "bf16",
            )
    tiles = (128, 3) if gpu else (256, 6)
    assert [launch.grid for launch in launches] == [(4096 * tiles[0] * (tiles[0] + 1) // 2,), (24 * tiles[1] * (tiles[1] + 1) // 2,)]
    assert launches[0].grid[0] < 2**31


@pytest.mark.parametrize(
    ("shape", "weights", "shared", "message"),
    [
        (
            (3, 5, 32),
            (16, 8),
            0,
            r"M=16 latents, shared=0 of them shared, are no whole number for each of E=3 experts: M - shared must be a multiple",
        ),
        ((3, 5, 32), (15, 8), 16, r"M=15 latents, shared=16 of them .* shared lie between 0 and M\. Give the rows of all experts"),
        ((3, 5, 32), (15, 8), -3, r"shared=-3 of them shared"),
        ((0, 5, 32), (15, 8), 0, r"each of E=0 experts"),
        ((3, 6, 32), (15, 8), 0, r"gram_ECP has shape \[3, 6, 32\]: for M=15, shared=0 it must be \[E, C, P\] = \[3, 5, 32\]"),
        ((3, 6, 64), (18, 8), 0, r"= \[3, 6, 32\], where C is .* P is padded_columns\(C\)\. Make it"),
        ((2, 35, 32), (60, 8), 10, r"= \[2, 35, 64\]"),
        ((5, 32), (5, 8), 0, r"gram_ECP is float32 \[5, 32\]: it must be contiguous float32 with 3 dimensions\. Convert it first"),
        ((1, 5, 32), (5,), 0, r"W_MD is float32 \[5\]: it must be contiguous float32 with 2"),
    ],
)
def test_what_does_not_fit_is_said(shape, weights, shared, message):
    with pytest.raises(ValueError, match=message):
        gram_matrices_(torch.empty(shape), torch.empty(weights), shared, "ieee")


def test_other_numbers_and_views_are_refused():
    gram_ECP, W_MD = torch.empty(1, 5, 32), torch.empty(5, 8)
    with pytest.raises(ValueError, match=r"W_MD is bfloat16 \[5, 8\]: it must be contiguous float32"):
        gram_matrices_(gram_ECP, W_MD.bfloat16(), 0, "bf16")
    with pytest.raises(ValueError, match=r"W_MD is float32 \[5, 8\], not contiguous: it must be"):
        gram_matrices_(gram_ECP, torch.empty(8, 5).T, 0, "bf16")
    with pytest.raises(ValueError, match=r"gram_ECP is float64 \[1, 5, 32\]"):
        gram_matrices_(gram_ECP.double(), W_MD, 0, "bf16")
