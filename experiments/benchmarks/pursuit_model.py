"""The least time of a training step of `SwitchPursuitSAE` on a GPU beside Switch's, by the same roofs: a model, not a measurement.

    python -m experiments.benchmarks.pursuit_model

Assumptions, beside those of `roofline`: rows come in the order of experts, so that Gram matrices are read from the L1 cache, and the search is bound
by the instructions that it issues (counted in sm_90 machine code); Gram matrices are products of float32; the decoder is gathered in float32, forward
and for its gradient; there is no encoder, so that half of the weights are updated. Switch's step is fused and replayed as a CUDA graph. Pursuit's is
autograd's: `host_us` is what the host takes to ask for its operators one by one, and the step takes the longer of the two.
"""

from dataclasses import dataclass, replace

from experiments.benchmarks.cases import MAIN
from experiments.benchmarks.roofline import Floor, Roofs, floor
from switch_kernels import Shape
from switch_kernels.pursuit import GRAM_SHARE, padded_columns

FLOAT32 = 50e12
"""FLOP/s of float32 products, a guess: three quarters of what an H100 is rated for."""
JOIN = {16: 300.0, 32: 580.0, 64: 2000.0}
"""Warp instructions of one latent's join by slots, which are of all warps together, in up to 512 columns."""
RENEWAL = 0.2
"""Warp instructions of one active latent and column in a renewal."""
OPERATORS, HOST_US = 175, 6.0
"""Of a step, forward, backward and update, counted in PyTorch's dispatcher; of one launch, a guess."""
REFRESH_TOKENS = 8192


@dataclass(frozen=True)
class PursuitFloor:
    """The device's stages, and the host's time."""

    device: Floor
    host_us: float

    @property
    def total_us(self) -> float:
        return max(self.device.total_us, self.host_us)


def pursuit_floor(shape: Shape, roofs: Roofs, blocks: int = 4, shared: int = 0, rivals: float = 0.25) -> PursuitFloor:
    """For M latents, E experts and K latents per token; `rivals` is the share of the batch that a second expert searches."""
    T, D, M, E, K = shape.T, shape.D, shape.M, shape.E, shape.K
    N, C = T * (1 + rivals), shared + (M - shared) // E
    slots = max(16, 1 << (K - 1).bit_length())

    def us(flops: float = 0.0, bytes: float = 0.0, gathered: float = 0.0) -> float:
        return max(flops / roofs.gemm, bytes / roofs.copy, gathered / roofs.gather) * 1e6

    wide = max(1.0, padded_columns(C) / 512)  # a join's passes over the correlations grow with the columns beyond those that were counted
    renewed = sum(K // blocks * block for block in range(1, blocks))
    issued = K * JOIN[min(64, slots)] * wide + renewed * padded_columns(C) * RENEWAL
    by_tokens, gathered = 4.0 * T * D, 4.0 * T * K * D
    parameters = 1.0 * M * D
    stages = {
        "router, dispatch": us(2.0 * T * D * E, by_tokens) + us(bytes=2 * 4.0 * N * D),
        "correlations": us(2.0 * N * C * D, 4.0 * (N * D + M * D + N * C)),
        "search": max(N * issued / roofs.issue * 1e6, us(bytes=4.0 * N * C)),
        "Gram matrices": 2 * GRAM_SHARE * E * C * C * D * min(1.0, T / REFRESH_TOKENS) / FLOAT32 * 1e6,
        "decode, loss": us(bytes=3 * by_tokens, gathered=gathered * (1 + rivals)),
        "weight gradient": us(bytes=4 * parameters, gathered=gathered),
        "clip": us(bytes=4 * parameters),
        "update": us(bytes=(8 + 4 * 4 + 4) * parameters),
        "launches": OPERATORS * roofs.launch_us,
    }
    return PursuitFloor(Floor("pursuit, float32", stages), OPERATORS * HOST_US)


def main() -> None:
    roofs = Roofs()
    print(roofs.describe())
    for shape in (MAIN, replace(MAIN, E=128), replace(MAIN, M=4096, E=24, K=16), replace(MAIN, M=8192, E=16)):
        switch, pursuit = floor(shape, roofs), pursuit_floor(shape, roofs)
        print(f"\n{shape}: Switch {switch.total_us:.0f} us ({switch.plan}); pursuit {pursuit.total_us:.0f} us, of which the device "
              f"{pursuit.device.total_us:.0f}, the host {pursuit.host_us:.0f}")  # fmt: skip
        for name, stages in (("Switch", switch.stages), ("pursuit", pursuit.device.stages)):
            print(f"  {name}: " + ", ".join(f"{stage} {us:.0f}" for stage, us in stages.items()))


if __name__ == "__main__":
    main()
