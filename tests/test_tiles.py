"""The benchmark of tiles: candidates change what is launched, and nothing stays changed; a recording's constants are as the compiler took them."""

import pytest

from experiments.benchmarks import recording, tiles
from experiments.benchmarks.nodes import step_on_meta
from experiments.benchmarks.tiles import CASES, candidates
from switch_kernels.gpu import gemm_tiles, gemm_weights, route
from switch_kernels.gpu.gemm_tiles import compiling_for
from switch_kernels.gpu.launch import launches_to


@pytest.mark.parametrize(("family", "kernel", "constant"), [("encode", "_encode_kernel", "BM"), ("router_gradients", "_router_gradients", "ROWS")])
def test_a_candidate_is_launched_and_leaves_nothing_behind(family, kernel, constant):
    before = gemm_tiles.choose_tile, gemm_weights.choose_tile, route.GRADIENTS
    mine = [candidate for candidate in candidates() if candidate.family == family and candidate.case == "MAIN"]
    seen = set()

    def keep(launch):
        if launch.kernel.fn.__name__ == kernel:
            seen.add(launch.kwargs[constant])

    with compiling_for((9, 0)), launches_to(keep):
        for candidate in mine:
            with candidate.set():
                step_on_meta(CASES["MAIN"])()
    assert len(seen) >= 3 and before == (gemm_tiles.choose_tile, gemm_weights.choose_tile, route.GRADIENTS)


def test_a_candidate_is_taken_back_after_an_error():
    candidate, before = candidates()[0], gemm_tiles.choose_tile
    with pytest.raises(RuntimeError, match="does not fit"), candidate.set():
        raise RuntimeError("does not fit")
    assert gemm_tiles.choose_tile is before


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tiles"])
    with pytest.raises(SystemExit, match="2"):
        tiles.main()
    assert "there is no CUDA device" in capsys.readouterr().err


def test_constants_of_a_recording_can_be_looked_up():
    """JSON makes lists of tuples, which Triton's compiler cannot hash."""
    assert hash(recording._hashable({"ROWS": [16, 1], "BM": 64})["ROWS"]) == hash((16, 1))
