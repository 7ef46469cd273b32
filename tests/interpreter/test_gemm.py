"""Grouped products against float64, on every shape of routing, in both ways of loading tiles."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from switch_kernels.gpu import gemm_tiles, gemm_weights
from switch_kernels.gpu.extra import Extra
from switch_kernels.gpu.gemm import encode, latent_gradients
from switch_kernels.gpu.gemm_decode import combine_slots, decode_loss, decode_rows
from switch_kernels.gpu.gemm_tiles import choose_tile, compiling_for, has_descriptors, operand_dtype, row_tiles
from switch_kernels.gpu.gemm_weights import WeightGradient, chunks_of_rows, weight_gradient
from switch_kernels.gpu.launch import ALIGN, launches_to, round_up

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROUTINGS = {
    "an empty expert": ([70, 0, 130, 5], 40, 33),
    "all tokens to one expert": ([0, 150, 0], 64, 7),
    "one token": ([0, 1], 7, 32),
    "one expert": ([300], 72, 40),
    "large tiles, ragged": ([260, 0, 10, 250], 33, 64),
}


@dataclass
class Problem:
    """Operands in expert order. `expert_N` is E on rows behind the last expert; what a kernel must not read there is NaN."""

    F: int
    D: int
    start_E1: Tensor
    order_N: Tensor
    expert_N: Tensor
    rows_ND: Tensor
    W_MD: Tensor
    b_M: Tensor
    z_NF: Tensor
    gate_T: Tensor
    x_TD: Tensor
    scale: Tensor
    b_pre_D: Tensor

    @property
    def E(self) -> int:
        return self.start_E1.shape[0] - 1

    @property
    def real_N(self) -> Tensor:
        return self.order_N >= 0

    def rows_of(self, expert: int) -> slice:
        return slice(int(self.start_E1[expert]), int(self.start_E1[expert + 1]))

    def weights(self, expert: int) -> Tensor:
        return self.W_MD[expert * self.F : (expert + 1) * self.F, : self.D]

    def by_expert(self, left_N: Tensor, product: Callable[[Tensor, Tensor], Tensor], columns: int) -> Tensor:
        """product(rows of an expert, its weights), in float64, zero on rows behind the last expert."""
        out = torch.zeros(left_N.shape[0], columns, dtype=torch.float64)
        for e in range(self.E):
            out[self.rows_of(e)] = product(left_N[self.rows_of(e)].double(), self.weights(e).double())
        return out


def make_problem(counts: list[int], F: int, D: int, dtype: torch.dtype, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    E, R, FP, DP = len(counts), sum(counts), round_up(F, 8), round_up(D, 8)
    start_E1 = torch.tensor([0, *(round_up(c, ALIGN) for c in counts)]).cumsum(0)
    N = round_up(R + E * (ALIGN - 1), ALIGN) if E > 1 else round_up(R, ALIGN)
    order_N, expert_N = torch.full((N,), -1), torch.full((N,), E)
    shuffled = torch.randperm(R, generator=generator)
    for e, count in enumerate(counts):
        expert_N[start_E1[e] : start_E1[e + 1]] = e
        order_N[start_E1[e] : start_E1[e] + count] = shuffled[sum(counts[:e]) :][:count]

    def padded(rows: int, columns: int, width: int) -> Tensor:
        out = torch.zeros(rows, width)
        out[:, :columns] = torch.randn(rows, columns, generator=generator)
        return out

    rows_ND = padded(N, D, DP) * (order_N >= 0)[:, None]
    z_NF = padded(N, F, FP).clamp(min=0)  # padding rows inside an expert hold anything finite
    rows_ND[start_E1[-1] :] = z_NF[start_E1[-1] :] = float("nan")
    return Problem(
        F=F,
        D=D,
        start_E1=start_E1.int(),
        order_N=order_N.int(),
        expert_N=expert_N,
        rows_ND=rows_ND.to(dtype),
        W_MD=(padded(E * F, D, DP) / D**0.5).to(dtype),
        b_M=torch.randn(E * F, generator=generator),
        z_NF=z_NF.to(dtype),
        gate_T=torch.rand(R, generator=generator),
        x_TD=torch.randn(R, D, generator=generator),
        scale=torch.tensor(1.7),
        b_pre_D=torch.randn(D, generator=generator),
    )


def assert_close(actual: Tensor, truth: Tensor, rounded: torch.dtype = torch.float32) -> None:
    """To 1e-5 of the largest value, and half a unit in the last place of `rounded`, the dtype in which the kernel hands out its float32 sums."""
    assert actual.dtype == rounded
    half_ulp = truth.abs() * torch.finfo(torch.bfloat16).eps / 2 if rounded == torch.bfloat16 else 0.0
    error = (actual.double() - truth).abs()
    assert (error <= 1.01 * half_ulp + 1e-5 * truth.abs().max().clamp(min=1e-3)).all(), error.max()


@pytest.fixture(params=ROUTINGS, ids=lambda name: name.replace(" ", "-"))
def routing(request: pytest.FixtureRequest) -> tuple[list[int], int, int]:
    return ROUTINGS[request.param]


@pytest.fixture(params=["ieee-descriptors", "ieee-pointers", "bf16-descriptors"])
def precision(request: pytest.FixtureRequest):
    """Precision, and how tiles are loaded: from descriptors made on the host (sm_90) or made in the kernel (sm_80), which are pointers underneath."""
    precision, loads = request.param.split("-")
    with compiling_for((9, 0) if loads == "descriptors" else (8, 0)):
        yield precision


@pytest.mark.parametrize("group", [1, 8, 32])
def test_encode(routing, precision, group):
    p = make_problem(*routing, operand_dtype(precision))
    bias_N = torch.cat([p.b_M.view(p.E, p.F), torch.zeros(1, p.F)])[p.expert_N]
    for b_M, added in ((p.b_M, bias_N.double()), (None, 0.0)) if group == 8 else ((p.b_M, bias_N.double()),):
        pre_NF, group_max_NG = encode(p.rows_ND, p.W_MD, b_M, p.start_E1, p.F, group, precision)
        truth = p.by_expert(p.rows_ND[:, : p.D], lambda rows, W: rows @ W.T, p.F) + added
        assert_close(pre_NF[:, : p.F], truth, operand_dtype(precision))
        assert not pre_NF[:, p.F :].any()
        groups = [pre_NF[:, g : min(g + group, p.F)].amax(1) for g in range(0, p.F, group)]
        assert torch.equal(group_max_NG, torch.stack(groups, 1))


def test_latent_gradients(routing, precision):
    p = make_problem(*routing, operand_dtype(precision))
    dz_NF, gate_parts_NP = latent_gradients(p.rows_ND, p.W_MD, p.z_NF, p.start_E1, p.F, precision)
    product = p.by_expert(p.rows_ND[:, : p.D], lambda rows, W: rows @ W.T, p.F)
    z = p.z_NF[:, : p.F].double().nan_to_num(0)
    assert_close(dz_NF[:, : p.F], torch.where(z > 0, product, 0.0), operand_dtype(precision))
    assert not dz_NF[:, p.F :].any() and not dz_NF[~p.real_N].any()
    assert_close(gate_parts_NP.sum(1), (z * product).sum(1))


@pytest.mark.parametrize("gated", [True, False])
def test_decode_loss(routing, precision, gated):
    p = make_problem(*routing, operand_dtype(precision))
    if not gated:
        p.x_TD = p.x_TD.bfloat16()
    grad_scale = 0.37
    gate_T = p.gate_T if gated else torch.ones_like(p.gate_T)
    loss = decode_loss(p.z_NF, p.W_MD, p.start_E1, p.F, p.order_N, p.gate_T if gated else None, p.x_TD, p.scale, p.b_pre_D, grad_scale, precision)
    tokens = p.order_N[p.real_N]
    y = p.by_expert(p.z_NF[:, : p.F], lambda z, W: z @ W, p.D)[p.real_N]
    error = gate_T[tokens, None].double() * y + p.b_pre_D.double() - p.x_TD[tokens].double() * p.scale.double()
    truth = torch.zeros(p.order_N.shape[0], p.D, dtype=torch.float64)
    truth[p.real_N] = gate_T[tokens, None].double() * grad_scale * error
    assert_close(loss.grad_rows_ND[:, : p.D], truth, operand_dtype(precision))
    assert not loss.grad_rows_ND[:, p.D :].any() and not loss.grad_rows_ND[~p.real_N].any()
    assert_close(loss.square_parts.sum(), error.square().sum())
    assert_close(loss.column_sums.sum(0), grad_scale * error.sum(0))


def test_decode_rows(routing, precision):
    p = make_problem(*routing, operand_dtype(precision))
    y_ND = decode_rows(p.z_NF, p.W_MD, p.start_E1, p.F, p.D, precision)
    assert_close(y_ND[:, : p.D], p.by_expert(p.z_NF[:, : p.F], lambda z, W: z @ W, p.D))
    assert not y_ND[:, p.D :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "slots", "D"), [(1, 2, 7), (37, 2, 33), (20, 4, 64)])
def test_combine_slots(num_tokens, slots, D, dtype):
    generator = torch.Generator().manual_seed(1)
    N = round_up(num_tokens * slots + 9, ALIGN)
    y_ND = torch.randn(N, round_up(D, 8), generator=generator)
    row_R = torch.randperm(N, generator=generator)[: num_tokens * slots].int()
    y_ND[:, D:] = 0
    used = torch.zeros(N, dtype=torch.bool).index_fill_(0, row_R.long(), True)
    y_ND[~used] = float("nan")
    gate_TS, x_TD = torch.rand(num_tokens, slots, generator=generator), torch.randn(num_tokens, D, generator=generator)
    scale, b_pre_D = torch.tensor(0.6), torch.randn(D, generator=generator)
    loss = combine_slots(y_ND, row_R, slots, gate_TS, x_TD, scale, b_pre_D, 2.0 / num_tokens, dtype)
    gates, y = gate_TS.double(), y_ND[row_R.long(), :D].double().view(num_tokens, slots, D)
    error = (gates[:, :, None] * y).sum(1) + b_pre_D.double() - x_TD.double() * scale.double()
    truth = torch.zeros(N, y_ND.shape[1], dtype=torch.float64)
    truth[row_R.long(), :D] = (gates[:, :, None] * (error * 2 / num_tokens)[:, None]).view(-1, D)
    assert_close(loss.grad_rows_ND, truth, dtype)
    assert_close(loss.square_parts.sum(), error.square().sum())
    assert_close(loss.column_sums.sum(0), error.sum(0) * 2 / num_tokens)


@pytest.mark.parametrize("extra", [False, True])
def test_weight_gradient(routing, precision, extra):
    p = make_problem(*routing, operand_dtype(precision))
    left_NF = p.z_NF.clone()
    left_NF[~p.real_N & (p.expert_N < p.E)] = 0
    M, out_dtype = p.E * p.F, torch.bfloat16 if extra else torch.float32
    slot_M = torch.full((M,), -1, dtype=torch.int32)
    slot_M[[3, M - 1]] = torch.tensor([1, 0], dtype=torch.int32)
    more = Extra(slot_M, torch.randn(2, p.D))
    grad_MD, square_parts, column_sums_M = weight_gradient(
        left_NF, p.rows_ND, p.start_E1, p.F, p.D, precision, out_dtype, more if extra else None, column_sums=True
    )
    truth, sums = torch.zeros(M, p.D, dtype=torch.float64), torch.zeros(M, dtype=torch.float64)
    for e in range(p.E):
        left, right = left_NF[p.rows_of(e), : p.F].double(), p.rows_ND[p.rows_of(e), : p.D].double()
        truth[e * p.F : (e + 1) * p.F] = left.T @ right
        sums[e * p.F : (e + 1) * p.F] = left.sum(0)
    if extra:
        truth[[3, M - 1]] += more.rows_AD[[1, 0]].double()
    assert_close(grad_MD, truth, out_dtype)
    assert_close(square_parts.sum(), truth.square().sum())
    assert_close(column_sums_M, sums)
    without = weight_gradient(left_NF, p.rows_ND, p.start_E1, p.F, p.D, precision, out_dtype, more if extra else None)
    assert without.column_sums_M is None and torch.equal(without.grad_MD, grad_MD)


def test_rows_are_cut_into_chunks_where_programs_are_few(monkeypatch):
    """Few latents and many rows, as of dead latents: the same gradient as without chunks, and the same bits every time."""
    p = make_problem([1000], 40, 33, torch.float32)
    left_NF = torch.where(p.real_N[:, None], p.z_NF, 0.0)
    more = Extra(torch.full((40,), -1, dtype=torch.int32), torch.randn(1, 33))
    more.slot_M[7] = 0
    arguments = (left_NF, p.rows_ND, p.start_E1, p.F, p.D, "ieee", torch.float32, more, True, torch.tensor(0.3))
    grids = []

    def cut() -> WeightGradient:
        with launches_to(lambda request: (grids.append((request.kernel.__name__, request.grid)), request.run())):
            return weight_gradient(*arguments)

    first, second = cut(), cut()
    assert grids[:2] == grids[2:] == [("_weight_gradient_kernel", (3, 8)), ("_sum_chunks_of_rows", (3, 1))]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    monkeypatch.setattr(gemm_weights, "MULTIPROCESSORS", 5)
    whole = cut()
    assert grids[4:] == [("_weight_gradient_kernel", (3, 1))]
    truth = 0.3 * left_NF[:, :40].double().T @ p.rows_ND[:, :33].double()
    truth[7] += more.rows_AD[0].double()
    for found in (first, whole):
        assert_close(found.grad_MD, truth)
        assert_close(found.square_parts.sum(), truth.square().sum())
        assert_close(found.column_sums_M, 0.3 * left_NF[:, :40].double().sum(0))


def test_only_products_of_few_programs_are_cut():
    assert [chunks_of_rows(programs, 8192, 64) for programs in (1, 3, 12, 66, 67, 132, 5000)] == [32, 32, 11, 2, 1, 1, 1]
    assert chunks_of_rows(3, 255, 64) == 1


@pytest.mark.parametrize(
    ("capability", "tiles"),
    [((9, 0), {(64, 64, 16), (64, 32, 16), (64, 128, 64), (128, 128, 64)}), ((8, 0), {(64, 64, 16), (64, 32, 16), (64, 128, 32), (128, 128, 32)})],
)
def test_the_tiles_of_a_gpu(capability, tiles, monkeypatch):
    """Every branch of `choose_tile` computes what the small tiles of the interpreter do, halves, quarters and group maxima included."""
    monkeypatch.setattr(gemm_tiles, "interpreted", lambda: False)
    used = set()
    few, many, most = ([60, 0, 5], 130, 72), ([200], 520, 136), ([1030], 40, 200)

    def run(request) -> None:
        used.add(tuple(request.kwargs.get(side) for side in ("BM", "BN", "BK")))
        request.run()

    with compiling_for(capability), launches_to(run):
        for routing, precision in ((few, "ieee"), (few, "bf16"), (many, "bf16"), (most, "bf16")):
            if routing is not most:
                test_encode(routing, precision, 32)
                test_latent_gradients(routing, precision)
                test_decode_loss(routing, precision, True)
                test_decode_rows(routing, precision)
            test_weight_gradient(routing, precision, True)
    assert tiles <= used


@pytest.mark.parametrize("loads", [(9, 0), (8, 0)], ids=["descriptors", "pointers"])
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_an_expert_of_nan_stays_alone(loads):
    """Tiles that run past one expert's latents, in the columns or in the sum, must not bring in the next expert's: 0 * NaN is NaN."""
    with compiling_for(loads):
        check_expert_of_nan()


def check_expert_of_nan() -> None:
    p = make_problem([70, 3, 90], 41, 24, torch.float32)
    clean = p.W_MD.clone()
    p.W_MD[41:82] = float("nan")
    others = torch.cat([torch.arange(128), torch.arange(192, 320)])
    arguments = (p.start_E1, p.F)
    for poisoned, whole in (
        (encode(p.rows_ND, p.W_MD, p.b_M, *arguments, 8, "ieee"), encode(p.rows_ND, clean, p.b_M, *arguments, 8, "ieee")),
        (latent_gradients(p.rows_ND, p.W_MD, p.z_NF, *arguments, "ieee"), latent_gradients(p.rows_ND, clean, p.z_NF, *arguments, "ieee")),
        ((decode_rows(p.z_NF, p.W_MD, *arguments, 24, "ieee"),), (decode_rows(p.z_NF, clean, *arguments, 24, "ieee"),)),
    ):
        for a, b in zip(poisoned, whole, strict=True):
            assert torch.equal(a[others], b[others]) and b.isfinite().all()


def test_low_precision_is_as_good_as_pytorchs():
    """On the same bfloat16 operands: error against float64 at most twice that of PyTorch's own bfloat16 product."""
    p = make_problem([128], 64, 160, torch.bfloat16)
    z, W, rows = p.z_NF, p.W_MD, p.rows_ND
    ours = (
        encode(rows, W, None, p.start_E1, 64, 1, "bf16")[0],
        decode_rows(z, W, p.start_E1, 64, 160, "bf16"),
        weight_gradient(z, rows, p.start_E1, 64, 160, "bf16", torch.bfloat16).grad_MD,
    )
    for actual, left, right in zip(ours, (rows, z, z.T), (W.T, W, rows), strict=True):
        truth = left.double() @ right.double()
        assert (actual.double() - truth).norm() <= 2 * ((left @ right).double() - truth).norm()


def test_same_bits_twice():
    p = make_problem([70, 0, 130], 40, 33, torch.bfloat16)

    def everything() -> list[Tensor]:
        pre_NF, group_max_NG = encode(p.rows_ND, p.W_MD, p.b_M, p.start_E1, p.F, 8, "bf16")
        loss = decode_loss(p.z_NF, p.W_MD, p.start_E1, p.F, p.order_N, p.gate_T, p.x_TD, p.scale, p.b_pre_D, 0.01, "bf16")
        dz_NF, gate_parts_NP = latent_gradients(loss.grad_rows_ND, p.W_MD, p.z_NF, p.start_E1, p.F, "bf16")
        decoder = weight_gradient(p.z_NF, loss.grad_rows_ND, p.start_E1, p.F, p.D, "bf16", torch.float32)
        encoder = weight_gradient(dz_NF, p.rows_ND, p.start_E1, p.F, p.D, "bf16", torch.bfloat16, column_sums=True)
        return [t for t in (pre_NF, group_max_NG, *loss, gate_parts_NP, dz_NF, *decoder, *encoder) if t is not None]

    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(everything(), everything(), strict=True))


def test_a_step_equals_autograd():
    """Loss and all its gradients through the dense chain, against autograd in float64 through the same formula."""
    p = make_problem([70, 0, 130], 24, 19, torch.float32)
    T, tokens = p.x_TD.shape[0], p.order_N[p.real_N].long()
    p.rows_ND.zero_()[p.real_N, : p.D] = (p.x_TD * p.scale - p.b_pre_D)[tokens]
    pre_NF, _ = encode(p.rows_ND, p.W_MD, p.b_M, p.start_E1, p.F, 1, "ieee")
    W_dec_MD = make_problem([70, 0, 130], 24, 19, torch.float32, seed=5).W_MD
    z_NF = pre_NF.clamp(min=0)
    loss = decode_loss(z_NF, W_dec_MD, p.start_E1, p.F, p.order_N, p.gate_T, p.x_TD, p.scale, p.b_pre_D, 2.0 / T, "ieee")
    dz_NF, gate_parts_NP = latent_gradients(loss.grad_rows_ND, W_dec_MD, z_NF, p.start_E1, p.F, "ieee")
    decoder = weight_gradient(z_NF, loss.grad_rows_ND, p.start_E1, p.F, p.D, "ieee", torch.float32)
    encoder = weight_gradient(dz_NF, p.rows_ND, p.start_E1, p.F, p.D, "ieee", torch.float32, column_sums=True)

    leaves = [t.double().requires_grad_() for t in (p.W_MD[:, : p.D], W_dec_MD[:, : p.D], p.b_M, p.gate_T, p.b_pre_D)]
    W_enc, W_dec, b_enc, gate, b_pre = leaves
    experts = p.expert_N[p.real_N]
    target = (p.x_TD * p.scale).double()[tokens]
    pre = torch.einsum("nd,nfd->nf", target - b_pre, W_enc.view(p.E, p.F, p.D)[experts]) + b_enc.view(p.E, p.F)[experts]
    recon = gate[tokens, None] * torch.einsum("nf,nfd->nd", pre.relu(), W_dec.view(p.E, p.F, p.D)[experts]) + b_pre
    total = (recon - target).square().sum(1).mean()
    grads = torch.autograd.grad(total, leaves)

    assert_close(loss.square_parts.sum() / T, total.detach())
    assert_close(encoder.grad_MD, grads[0])
    assert_close(decoder.grad_MD, grads[1])
    assert_close(encoder.column_sums_M, grads[2])
    grad_gate_T = torch.zeros(T).index_copy_(0, tokens, gate_parts_NP.sum(1)[p.real_N] / p.gate_T[tokens])
    assert_close(grad_gate_T, grads[3])
    assert_close(loss.column_sums.sum(0) - encoder.column_sums_M @ p.W_MD[:, : p.D], grads[4])


def test_row_tiles_cover_any_sizes():
    """The static number of row tiles is enough for every distribution of aligned rows."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = (torch.randint(0, 6, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator) * ALIGN).tolist()
        num_rows = sum(sizes) + 128
        for BM in (64, 128, 256):
            starts = [sum(sizes[:e]) for e in range(len(sizes) + 1)]
            first = [-(-(s + e * (BM - ALIGN)) // BM) for e, s in enumerate(starts)]
            ends = [*first[1:], row_tiles(num_rows, len(sizes), BM)]
            assert all(a + -(-n // BM) <= b for a, n, b in zip(first, [*sizes, 128], ends, strict=True))


def test_operands_are_checked():
    p = make_problem([10, 20], 16, 24, torch.float32)
    with pytest.raises(ValueError, match=r"rows_ND is torch.float32, but precision 'bf16' takes torch.bfloat16"):
        encode(p.rows_ND, p.W_MD, p.b_M, p.start_E1, p.F, 8, "bf16")
    with pytest.raises(ValueError, match=r"must be contiguous with rows padded to a multiple of 8"):
        decode_rows(p.z_NF[:, :15], p.W_MD, p.start_E1, 15, 24, "ieee")
    with pytest.raises(ValueError, match=r"precision 'fp8' is unknown"):
        decode_rows(p.z_NF, p.W_MD, p.start_E1, 16, 24, "fp8")


def test_an_amd_gpu_gets_none_of_hoppers_tiles_whatever_its_number(monkeypatch):
    """ROCm says (9, 0) of gfx90a, which has 64 KiB of shared memory and no bulk copies."""
    assert has_descriptors((9, 0)) and has_descriptors((10, 0))
    assert not any(has_descriptors(capability) for capability in ((8, 0), (8, 9), (9, 4), (12, 0)))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has_descriptors((9, 0)) and not has_descriptors((9, 4))
    monkeypatch.setattr(gemm_tiles, "interpreted", lambda: False)
    assert choose_tile("encode", 1024, 1024, 768, "bf16", (9, 0)) == choose_tile("encode", 1024, 1024, 768, "bf16", (8, 0))


def test_tiles_are_pure_functions_of_the_shape():
    a, b = (choose_tile("encode", 300, 1024, 768, "bf16", (9, 0)) for _ in range(2))
    assert a == b and a.BM % ALIGN == 0
