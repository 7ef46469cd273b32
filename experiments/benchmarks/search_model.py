"""The least time of a training step of SAEs that search, compete or have one threshold on a GPU beside Switch's, by the same roofs: not measured.

    python -m experiments.benchmarks.search_model

All are fused and replayed as CUDA graphs. Assumptions, beside those of `roofline`: rows come in the order of experts, so that Gram matrices are
read from the L1 cache, and searches are bound by the instructions that they issue, counted in sm_90 machine code. Operands are bfloat16; refits
gather the decoder in float32. Pursuit has no encoder: half of the weights.
"""

from dataclasses import replace

from experiments.benchmarks.cases import MAIN
from experiments.benchmarks.nodes import RIVALS, SEARCHES, engine_on_meta, nodes_of
from experiments.benchmarks.roofline import Floor, Roofs, floor
from switch_kernels import Shape
from switch_kernels.pursuit import padded_columns, spread_counts

H200 = Roofs(gemm=784e12, copy=4.25e12, gather=9.3e12, launch_us=1.0)
"""As measured (experiments/LOG.md)."""
JOIN = {16: 300.0, 32: 580.0, 64: 2000.0}
"""Warp instructions of one latent's join by slots, which are of all warps together, in up to 512 columns."""
SWEEP = {16: 121.0, 32: 348.0, 64: 1236.0}
"""Likewise of one latent in a refit: its row, which is loaded, and its pivot."""
RENEWAL = 0.2
"""Warp instructions of one active latent and column in a renewal."""
SELECTION = {256: 580.0, 512: 950.0, 1024: 1750.0}
"""Warp instructions of a row's selection by its columns, rounded up to a power of two; wider ones in proportion."""
THRESHOLD_US = 10.0
"""Of the threshold of a whole batch: three passes over what may reach it, each of which waits for the one before."""
GRAM_TILE, REFRESH_TOKENS = 64, 8192


def search_floor(
    shape: Shape, roofs: Roofs, refit: bool, nodes: int, blocks: int = 4, shared: int = 0, rivals: float = 0.25, missed: float = 0.25
) -> Floor:
    """For M latents, E experts and K latents per token (at most 2 K with `refit`), in a graph of so many nodes.

    `rivals` is the share of the batch that a second expert computes, `missed` the share that is searched for what the encoder left out.
    """
    T, D, M, E, K = shape.T, shape.D, shape.M, shape.E, shape.K
    N, C = T * (1 + rivals), shared + (M - shared) // E
    width, slots = padded_columns(C), max(16, 1 << ((2 * K if refit else K) - 1).bit_length())

    def us(flops: float = 0.0, bytes: float = 0.0, gathered: float = 0.0) -> float:
        return max(flops / roofs.gemm, bytes / roofs.copy, gathered / roofs.gather) * 1e6

    tiles = -(-C // GRAM_TILE)
    products = 3 * 2.0 * (tiles + 1) / (2 * tiles) * E * C * C * D  # three of bfloat16 for one of float32
    every = min(1.0, T / REFRESH_TOKENS)
    matrices, pairs = (2 if refit else 1), T * (K + (1 if refit else 0))
    if refit:  # rows of at most half as many latents have a kernel of their own
        counts = spread_counts(K)
        joins = sum(n * SWEEP[max(16, min(64, slots) // (2 if 2 * n <= slots else 1))] for n in counts) / len(counts)
    else:
        joins = K * JOIN[min(64, slots)] * max(1.0, width / 512)
    renewed = 0 if refit else sum(K // blocks * block for block in range(1, blocks))
    candidates = max(256, 1 << (C - 1).bit_length())
    stages = {
        "router, dispatch": us(2.0 * T * D * E, 4.0 * T * D) + us(bytes=(4.0 + 2.0) * N * D),
        "Gram matrices": every * us(products, 4.0 * M * D + 4.0 * E * C * width),
        "correlations": us(2.0 * N * C * D, 2.0 * N * D + 2.0 * M * D + 4.0 * N * C),
        "search": max(N * (joins + renewed * width * RENEWAL) / roofs.issue * 1e6, us(bytes=4.0 * N * C)),
        "decode, loss": us(bytes=6.0 * N * D, gathered=2.0 * N * K * D),
        "latent order": us(bytes=64.0 * pairs) + 8,
        "weight gradients": matrices * us(bytes=2.0 * T * D, gathered=2.0 * pairs * D),
        "clip": us(bytes=2.0 * matrices * M * D),
        "update": us(bytes=(8 + 4 * 4 + 2 + 2) * 1.0 * matrices * M * D),
        "launches": nodes * roofs.launch_us,
    }
    if refit:
        issued = SELECTION.get(candidates, SELECTION[1024] * candidates / 1024)
        stages["selection"] = N * issued / roofs.issue * 1e6 + THRESHOLD_US + us(bytes=4.0 * N * C)
        stages["search"] += us(bytes=6.0 * N * D, gathered=4.0 * N * K * D)
        stages["missed"] = us(2.0 * missed * T * C * D, missed * T * (8.0 * D + 8.0 * C)) + us(bytes=8.0 * T * D)
    return Floor("refit" if refit else "pursuit", stages)


def rival_floor(shape: Shape, roofs: Roofs, threshold: bool, nodes: int, rivals: float) -> Floor:
    """Of a Switch SAE with masked dense latents, in a graph of so many nodes: rivals for a share of tokens, one threshold for a batch or top-k."""
    whole = replace(shape, T=round(shape.T * (1 + rivals)))
    N, F = float(whole.T), shape.F
    stages = dict(floor(whole, roofs, plan="dense, buffered", nodes=nodes).stages)
    stages["decode, loss, dz"] += 8 * N * shape.D / roofs.copy * 1e6  # what was decoded is written and read
    if threshold:
        stages["encode"] += 2 * N * F / roofs.copy * 1e6  # pre-activations in float32
        # read to collect what is near, and to keep what reaches the threshold
        stages["top-k"] = THRESHOLD_US + (4 + 4 + 2) * N * F / roofs.copy * 1e6
    return Floor("dense, buffered", stages)


def main() -> None:
    print(H200.describe())
    configs = {**{name: SEARCHES[name] for name in ("switch_pursuit", "switch_refit")}, **RIVALS}
    counted = {name: len(nodes_of(engine_on_meta(config, MAIN.T, MAIN.D))) for name, config in configs.items()}
    for shape in (MAIN, replace(MAIN, E=128), replace(MAIN, M=4096, E=24, K=16), replace(MAIN, M=8192, E=16)):
        floors = {"Switch": floor(shape, H200)}
        for name, nodes in counted.items():
            if name in RIVALS:
                floors[name] = rival_floor(shape, H200, "batch" in name, nodes, 0.25 if "competition" in name else 0.0)
            else:
                floors[name] = search_floor(shape, H200, name == "switch_refit", nodes)
        print(f"\n{shape}: " + ", ".join(f"{name} {found.total_us:.0f} us" for name, found in floors.items()))
        for name, found in floors.items():
            print(f"  {name}: " + ", ".join(f"{stage} {us:.0f}" for stage, us in found.stages.items()))


if __name__ == "__main__":
    main()
