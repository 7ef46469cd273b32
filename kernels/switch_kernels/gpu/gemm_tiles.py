"""Tiles of the matrix products: one pure function of the problem's shape, never tuned at run time, so a shape always gives the same bits.

The letters of a tile: BM rows of the output, BN columns of the output, BK elements of the sum per step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from switch_kernels.backend import Dot, operand_dtype
from switch_kernels.gpu.launch import ALIGN, cdiv, interpreted, next_power_of_2, round_up

Product = Literal["encode", "latent_gradients", "decode_loss", "decode_rows", "weight_gradient"]
Capability = tuple[int, int]

SIZES = ["num_rows", "num_row_tiles", "E", "F"]
"""Arguments of the products of which no form is compiled per value: Triton would take 1 and multiples of 16 for kernels of their own."""

_assumed: Capability | None = None


class Tile(NamedTuple):
    """Sizes of one program's work and the compiler's two options."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def padded(latents: int) -> int:
    """Length of a row of so many latents: of whole vectors in any dtype, and always a multiple of 16, so that one kernel serves all lengths."""
    return round_up(latents, 16)


def choose_tile(product: Product, rows_per_expert: int, F: int, D: int, precision: str, capability: Capability = (9, 0)) -> Tile:
    """The tile for a product over experts of about `rows_per_expert` rows each.

    Where there are descriptors one tile of 128 x 128 by four warps serves all products: two programs on a multiprocessor hide each other's start and
    epilogue. On an H200 it took 86 to 99 % of the time of 128 x 256 for every product and size of `experiments.benchmarks.tiles`, and at most 3 %
    more than the best of 16. Tiles of 64 rows waste none on experts that have few. float32 operands are twice as wide, and their products run on the
    ordinary cores, from registers: their tiles are small so that nothing spills.
    """
    few_rows = rows_per_expert <= 3 * ALIGN
    if interpreted():
        tile = Tile(64 if few_rows else 128, 32, 32, 4, 1)
    elif precision == "ieee":
        tile = Tile(64, 32 if product == "decode_loss" else 64, 16, 4, 3)
    elif not has_descriptors(capability):
        tile = Tile(64, 128, 32, 4, 4) if few_rows and product != "weight_gradient" else Tile(128, 128, 32, 8, 4)
    else:
        tile = Tile(64 if few_rows and product != "weight_gradient" else 128, 128, 64, 4, 3)
    if product == "weight_gradient":
        return tile._replace(BM=_at_most(tile.BM, F), BN=_at_most(tile.BN, D))
    return tile._replace(BN=_at_most(tile.BN, F if product in ("encode", "latent_gradients") else D))


def _at_most(size: int, needed: int) -> int:
    """A tile's side cut down to what the matrix fills, but not below 32."""
    return min(size, max(32, next_power_of_2(needed)))


def tile_width(F: int, any_width: bool) -> int:
    """The F that a tile is chosen for: with `any_width` the same for all, where F changes while a model trains and nothing may be compiled then."""
    return 128 if any_width else F


def row_tiles(num_rows: int, num_experts: int, BM: int) -> int:
    """How many tiles of BM rows cover all experts, each with tiles of its own, whatever their sizes: see `gemm.find_rows`."""
    return cdiv(num_rows + (num_experts + 1) * (BM - ALIGN), BM)


def capability_of(tensor: Tensor) -> Capability:
    """The compute capability that kernels for `tensor` are built for: its device's, or what `compiling_for` says, or 9.0."""
    if _assumed is not None:
        return _assumed
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


@contextmanager
def compiling_for(capability: Capability) -> Iterator[None]:
    """Inside the block, tiles are chosen for `capability`, whatever the device: for compilation without it."""
    global _assumed
    before, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = before


def has_descriptors(capability: Capability) -> bool:
    """Whether tiles are large and moved by the hardware's bulk copies, from descriptors made on the host: NVIDIA's Hopper and data-centre Blackwell.

    Others get tiles that fit them and loads that they have: older (8.x), smaller (12.x: 99 KiB of shared memory), and AMD's, whose numbers mean
    something else (gfx90a says (9, 0), gfx942 (9, 4)).
    """
    return torch.version.hip is None and (capability[0] == 10 or (9, 0) <= capability < (9, 4))


def source(tensor: Tensor, block: list[int], descriptors: bool) -> TensorDescriptor | Tensor:
    """What a kernel is given to load tiles of `block` from: a descriptor, or the tensor, from which it makes its own (`gemm.tiles_of_rows`)."""
    return TensorDescriptor.from_tensor(tensor, block) if descriptors else tensor


class Grouped(NamedTuple):
    """How a product over rows in expert order is cut into programs."""

    tile: Tile
    descriptors: bool
    num_row_tiles: int
    constants: dict[str, Any]
    """The compile-time constants that all such kernels share."""


def grouped(product: Product, rows: Tensor, start_E1: Tensor, F: int, D: int, precision: str, group: int = 1, any_width: bool = False) -> Grouped:
    """The cut of `product` for `rows` [N, .] of E experts, with tiles of at least `group` columns; `any_width` as in `tile_width`."""
    num_rows, E, capability = rows.shape[0], start_E1.shape[0] - 1, capability_of(rows)
    tile = choose_tile(product, num_rows // E, tile_width(F, any_width), D, precision, capability)
    tile = tile._replace(BN=max(tile.BN, group))
    descriptors = has_descriptors(capability)
    # all but very many experts are searched like 255, so that they share kernels
    constants = {"EP": max(256, next_power_of_2(E + 1)), "ALIGN": ALIGN, "DESCRIPTORS": descriptors}
    return Grouped(tile, descriptors, row_tiles(num_rows, E, tile.BM), constants | tile._asdict())


def check_operands(precision: str, **operands: Tensor) -> None:
    """Raises ValueError for an operand of another dtype than the precision's, or one whose rows are not contiguous and 16-byte aligned."""
    if precision not in get_args(Dot):
        raise ValueError(f"precision {precision!r} is unknown: it must be one of {', '.join(get_args(Dot))}.")
    dtype = operand_dtype(precision)
    for name, operand in operands.items():
        if operand.dtype != dtype:
            raise ValueError(f"{name} is {operand.dtype}, but precision {precision!r} takes {dtype}: cast it first.")
        if not operand.is_contiguous() or operand.shape[-1] % 8:
            raise ValueError(f"{name} {tuple(operand.shape)} must be contiguous with rows padded to a multiple of 8 elements.")
