"""The benchmark: it compares like with like, refuses to report speed otherwise, and talks to a competitor in another process."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import cpu, inference
from experiments.benchmarks.cpu import MaskedDenseSwitch, NotTrustedError, Timing, activations, build_sae, check_formulations, measure, record, table
from experiments.benchmarks.peers import Sparsify, peak_mb
from switch_kernels import Shape
from switch_sae.models import SwitchSAE

ROOT = Path(__file__).resolve().parents[1]
TINY = Shape(T=64, D=16, M=128, E=4, K=4)


def test_all_formulations_agree_in_float64():
    assert 0 < check_formulations([4, 8]) < 1e-9


def test_masked_dense_computes_every_expert_and_the_switch_sae_only_one():
    x_TD = activations(TINY)[0]
    for masked in (False, True):
        sae = build_sae(TINY, x_TD, masked)
        assert isinstance(sae, SwitchSAE) and isinstance(sae, MaskedDenseSwitch) == masked
        elsewhere = sae.route(x_TD)[0].expert_TS[:, 0] != 0
        sae.W_enc_MD.data[: TINY.F] = float("nan")
        spoiled = sae(x_TD[elsewhere]).recon_TD.isnan().any(dim=1)  # a mask multiplies, and 0 * NaN is NaN; dispatch never looks
        assert len(spoiled) > 0 and (spoiled.all() if masked else not spoiled.any())


@pytest.mark.parametrize(("wrong", "what"), [(lambda b: 1e-8 * b, "output"), (lambda b: 1e-8 * (b - b.detach()), "gradient of b_pre_D")])
def test_a_wrong_output_or_gradient_is_found(monkeypatch, wrong, what):
    right = MaskedDenseSwitch._decode
    monkeypatch.setattr(MaskedDenseSwitch, "_decode", lambda sae, *rest: right(sae, *rest) + wrong(sae.b_pre_D))
    with pytest.raises(NotTrustedError, match=rf"E=4: {what} differs from masked-dense by .* the limit is 1e-9"):
        check_formulations([4])


def test_a_formulation_that_trains_differently_is_not_timed(monkeypatch):
    monkeypatch.setattr(MaskedDenseSwitch, "loss_terms", lambda sae, *rest: {"mse": 1.001 * SwitchSAE.loss_terms(sae, *rest)["mse"]})
    with pytest.raises(NotTrustedError, match=r"the loss of switch at step 0 is .* it should be"):
        measure(TINY, [4], repeats=1)


def test_measure_times_every_contender_against_masked_dense():
    timings = {timing.key: timing for timing in measure(TINY, [4, 8], repeats=3)}
    steps = {("switch", 4), ("switch", 8), ("topk", 1), ("masked-dense", 4), ("masked-dense, fused Adam", 4)}
    assert set(timings) == steps | {("encoder GEMM", 4), ("encoder GEMM", 8), ("encoder GEMM", 1)}
    assert all(0 < t.min_ms <= t.median_ms and t.ratio > 0 for t in timings.values())
    assert timings["masked-dense", 4].ratio == 1.0 == timings["encoder GEMM", 1].matmuls


def test_only_plain_masked_dense_runs_unfused_adam():
    x_TD = activations(TINY)[0]
    fused = {}
    for name in ("switch", "masked-dense", "masked-dense, fused Adam"):
        step = cpu.contender(name, TINY, x_TD)
        (trainer,) = (cell.cell_contents for cell in step.__closure__)
        fused[name] = trainer.engine.optimizer.torch_adam.defaults["fused"]
    assert fused == {"switch": True, "masked-dense": None, "masked-dense, fused Adam": True}


def test_rows_are_appended_under_one_header_and_name_no_machine(tmp_path):
    timings = [Timing("switch", 8, 100.0, 90.0, 9.3, 0.4), Timing("encoder GEMM", 8, 20.0, 19.0, 46.0, 0.1)]
    peaks = {("switch", 8): (320.4, 239.0)}
    for _ in range(2):
        record(tmp_path / "results" / "benchmark_cpu.csv", timings, peaks, threads=2)
    with (tmp_path / "results" / "benchmark_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["date", "commit", "cpu", "threads", "torch", "name", "E", "median_ms", "min_ms", "ratio", "peak_mb"]
    assert [(row["name"], row["ratio"], row["peak_mb"]) for row in rows] == [("switch", "9.30", "320"), ("encoder GEMM", "", "")] * 2
    assert rows[0]["torch"] == torch.__version__ and rows[0]["threads"] == "2"
    assert "20480" in (text := table(timings, 2048, peaks)) and "320" in text and len(text.splitlines()) == 3


def test_peak_memory_is_of_this_process_and_not_of_its_parent():
    held = torch.ones(50_000_000)  # 200 MB
    ours = peak_mb()
    code = "from experiments.benchmarks.peers import peak_mb; a = peak_mb(); b = bytearray(10**8); print(a, peak_mb())"
    before, after = map(float, subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    assert ours > held.nbytes / 1e6 > 2 * before and 90 < after - before < 130


def fake_sparsify(folder: Path, breaks_at: int) -> None:
    """A package with the names that the competitor's process uses, as noisy on stdout as the real one."""
    (folder / "sparsify").mkdir()
    (folder / "transformers").mkdir()
    (folder / "transformers" / "__init__.py").write_text("def get_linear_schedule_with_warmup(optimizer, *_):\n    return optimizer\n")
    (folder / "sparsify" / "__init__.py").write_text(f"""
import os, types, torch
print("Triton disabled" if os.environ.get("SPARSIFY_DISABLE_TRITON") == "1" else 1 / 0)
__version__ = "0.0"
def SparseCoderConfig(**fields):
    return types.SimpleNamespace(**fields)
def TrainConfig(sae, optimizer):
    return types.SimpleNamespace(sae=sae, optimizer=optimizer, lr_warmup_steps=1, auxk_alpha=0.0)
class SparseCoder(torch.nn.Module):
    def __init__(self, d_in, config, dtype):
        super().__init__()
        self.steps = 0
        self.k, self.encoder = config.k, torch.nn.Linear(d_in, config.num_latents, dtype=dtype)
        self.W_dec, self.b_dec = torch.nn.Parameter(self.encoder.weight.data.clone()), torch.nn.Parameter(torch.zeros(d_in))
    def set_decoder_norm_to_unit_norm(self):
        print("noise")
    def remove_gradient_parallel_to_decoder_directions(self):
        self.steps += 1
        if self.steps == {breaks_at}:
            raise SystemError("it broke")
    def forward(self, x, y, dead_mask, total_variance):
        values, indices = self.encoder(x - self.b_dec).relu().topk(self.k)
        recon = torch.nn.functional.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum") + self.b_dec
        fvu = (y - recon).pow(2).sum() / total_variance
        return types.SimpleNamespace(fvu=fvu, auxk_loss=fvu * 0, multi_topk_fvu=fvu * 0, latent_indices=indices)
""")


def test_a_competitor_in_another_process_is_timed_in_the_same_rounds_and_says_of_what_it_dies(tmp_path, monkeypatch):
    fake_sparsify(tmp_path, breaks_at=5)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(Sparsify, "PYTHON", Path(sys.executable))
    batches = activations(TINY)
    tensors = {name.rsplit("_", 1)[0]: parameter.detach() for name, parameter in build_sae(replace(TINY, E=1), batches[0]).named_parameters()}
    with Sparsify({**tensors, "x": torch.stack(batches)}, TINY.K, threads=1) as peer:
        timings = {timing.name: timing for timing in measure(TINY, [4], repeats=2, peer=peer)}  # its FVU must be that of our TopK SAE
        assert timings["eai-sparsify 0.0"].E == 1 and timings["eai-sparsify 0.0"].min_ms > 0 and 0 < peer.last_ms < 1000
        assert peer.peak_mb() >= peer.import_mb > 0
        with pytest.raises(RuntimeError, match=r"(?s)eai-sparsify stopped with status 1.*it broke"):
            peer.step()


INFERENCES = Shape(T=64, D=32, M=128, E=2, K=4)


def test_ways_of_inference_are_timed_at_one_l0_against_switch_and_topk():
    timings = inference.measure(INFERENCES, repeats=2, encodes=1, rows=100, settling=4)
    assert [(t.name, t.E) for t in timings] == [(name, 1 if "TopK" in name else 2) for name in inference.CONTENDERS]
    assert all(abs(t.l0 - 4) < 0.4 and len(t.step) == 2 and min(t.step + t.encode) > 0 for t in timings)


def test_cheap_encoders_that_are_timed_cost_a_sixteenth():
    shape, shares = inference.SIZES, {}
    for name, contender in inference.cheap(shape.E).items():
        flops = inference.sae_of(contender, shape).flops()
        shares[name] = shape.M * 2 * shape.D / (flops.router + flops.encode)
    assert shares.pop("TopK") == 1 and all(15 <= share <= 17.1 for share in shares.values()), shares


def test_ratios_of_inference_are_medians_over_rounds():
    timings = [
        inference.Timing("Switch", 2, 4.0, [0.1, 0.2, 0.4], [1.0]),
        inference.Timing("TopK", 1, 4.0, [0.2, 0.2, 0.2], [4.0]),
        inference.Timing("SwitchRefit", 2, 3.9, [0.1, 0.6, 0.4], [2.0]),
    ]
    switch, topk, refit = inference.compared(timings)
    assert (switch["step_ms"], switch["step_x_switch"], topk["step_x_topk"]) == ("200", "1.00", "1.00")
    assert (refit["l0"], refit["step_ms"], refit["step_x_switch"], refit["step_x_topk"]) == ("3.90", "400", "1.00", "2.00")
    assert (refit["encode_s"], refit["encode_x_switch"], refit["encode_x_topk"]) == ("2", "2.00", "0.50")


def test_an_inference_with_more_or_fewer_latents_is_not_timed(monkeypatch):
    inference.check_l0("this", 4.3, k=4)
    monkeypatch.setattr(inference, "L0_TOLERANCE", -1.0)
    with pytest.raises(NotTrustedError, match=r"Switch in training has a mean L0 of .* of k = 4"):
        inference.measure(INFERENCES, repeats=1, encodes=1, rows=100, settling=1)
