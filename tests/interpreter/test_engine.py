"""What `TritonEngine` asks of CUDA, told by a stand-in for torch.cuda: streams, pools, events, devices. What the steps compute is test_step.py's."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from switch_kernels import Backend, Execution, Precision
from switch_sae.engines import TritonEngine
from switch_sae.models import TopKSAE
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M = 8, 8, 16
GPU = "cuda:1"
EAGER_US, CAPTURED_US, REPLAYED_US = 5e6, 2e6, 100.0


class FakeCuda:
    """torch.cuda with a clock. A pool lives as long as a graph that was captured into it, as PyTorch's does."""

    def __init__(self, monkeypatch) -> None:
        self.now_us, self.current, self.captures, self.streams = 0.0, "cuda:0", [], []
        self.monkeypatch, cuda = monkeypatch, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing and cuda.current == GPU
                self.at = None

            def record(self):
                assert cuda.current == GPU
                self.at = cuda.now_us

            def synchronize(self):
                assert self.at is not None

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e3

        class CUDAGraph:
            def pool(self):
                return self.where

            def replay(self):
                assert cuda.current == GPU
                cuda.now_us += REPLAYED_US

        @contextmanager
        def graph(made, pool=None, stream=None, capture_error_mode="global"):
            assert cuda.current == GPU and capture_error_mode == "thread_local", "the prefetch thread allocates meanwhile"
            made.where = object() if pool is None else pool
            cuda.captures.append((made.where, stream))
            yield
            cuda.now_us += CAPTURED_US - EAGER_US

        @contextmanager
        def device(name):
            before, cuda.current = cuda.current, name
            yield
            cuda.current = before

        def new_stream(device):
            assert device == GPU
            cuda.streams.append(object())
            return cuda.streams[-1]

        for name, fake in {"Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "device": device, "Stream": new_stream}.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def trainer(self) -> Trainer:
        """Whose engine believes to be on a GPU; its kernels only take time."""
        sae = TopKSAE(TopKSAE.Config(num_latents=M, k=2), D, torch.Generator().manual_seed(1))
        prepare(sae, rows(64), normalize_activations=True)
        trainer = Trainer(sae, TrainerConfig(dead_after_tokens=10**6), 100, T, Execution(Backend.triton, Precision.float32, "test"))
        engine = trainer.engine
        self.monkeypatch.setattr(engine, "device", GPU)
        self.monkeypatch.setattr(engine, "keeps_time", True)

        def compute():
            assert self.current == GPU
            self.now_us += EAGER_US
            nothing = torch.zeros(())
            return SimpleNamespace(terms={}, pairs_E=None, squared_error=nothing, active_pairs=lambda: nothing), nothing

        self.monkeypatch.setattr(engine, "_compute", compute)
        return trainer


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def rows(count: int = T) -> Rows:
    return Rows.of(torch.randn(count, D, generator=torch.Generator().manual_seed(0)))


def kill(trainer: Trainer, latents: int) -> None:
    """So many latents are dead from the next step on."""
    trainer.tokens_since_fired_M[:latents] = 10**6
    trainer.engine.next_reading = trainer.steps_done


def test_all_graphs_of_an_engine_share_one_stream_and_one_pool_and_those_of_another_have_their_own(cuda, monkeypatch):
    monkeypatch.setattr(TritonEngine, "EAGER_STEPS", 1)
    trainers = [cuda.trainer(), cuda.trainer()]
    assert not cuda.streams, "made where there is something to capture"
    for trainer in trainers:
        for latents in (0, 3, 0):
            kill(trainer, latents)
            if not latents:
                trainer.tokens_since_fired_M.zero_()
            for _ in range(3):
                trainer.step(rows())
        assert trainer.engine.graphs.keys() == {(0, None)}
    (pool, stream), (again, same), (other_pool, other_stream), _ = cuda.captures
    assert pool is again and stream is same is cuda.streams[0]
    assert other_pool is not pool and other_stream is cuda.streams[1] and len(cuda.streams) == 2


def test_a_pool_whose_last_graph_is_gone_is_not_used_again(cuda, monkeypatch):
    monkeypatch.setattr(TritonEngine, "EAGER_STEPS", 0)
    trainer = cuda.trainer()
    for size in (T, T // 2, T):
        trainer.step(rows(size))
    assert len({id(pool) for pool, _ in cuda.captures}) == 3 and len({stream for _, stream in cuda.captures}) == 1


def test_steps_that_compile_or_capture_count_as_replayed_ones(cuda):
    trainer = cuda.trainer()
    trainer.step(rows())
    assert trainer.seconds == pytest.approx(EAGER_US / 1e6), "no step was replayed"
    for _ in range(TritonEngine.INTERVAL):
        trainer.step(rows())
    assert trainer.seconds == pytest.approx((EAGER_US + TritonEngine.INTERVAL * REPLAYED_US) / 1e6)
    assert cuda.current == "cuda:0"
