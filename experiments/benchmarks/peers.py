"""A competitor in an environment of its own, as a process that does one training step on request: eai-sparsify's TopK SAE.

Both ends are here, and neither needs switch_sae: `experiments.benchmarks.cpu` uses `Sparsify`, which runs this file with the interpreter of that
environment and talks to it line by line ("step" -> {"ms": ..., "fvu": ...}), so that its steps interleave with ours in one run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".benchmark-peers"


@dataclass(frozen=True)
class PeerEnvironment:
    """A virtual environment with one library of PyPI and its dependencies, which may contradict ours."""

    package: str
    version: str
    without: tuple[str, ...] = ()
    """Dependencies to remove again, where they break the library and it can do without."""

    @property
    def folder(self) -> Path:
        return PEERS / self.package

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def make(self) -> None:
        """Installs it the first time; torch is held to our bounds, for which a local wheel (PIP_FIND_LINKS) or a CPU build is taken."""
        done = self.folder / f".{self.package}-{self.version}"
        if done.is_file():
            return
        print(f"installing {self.package} {self.version} into {self.folder.relative_to(ROOT)}/ ...", flush=True)
        ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        wanted = [f"{self.package}=={self.version}", *(d for d in ours if d.startswith("torch>"))]
        uv = Path(sys.executable).with_name("uv")
        venv.create(self.folder, with_pip=True, symlinks=True)
        if os.environ.get("PIP_FIND_LINKS") or sys.platform == "darwin":
            command = [str(self.python), "-m", "pip", "install", "--quiet", *wanted]
        elif uv.is_file():
            command = [str(uv), "pip", "install", "--quiet", "--python", str(self.python), "--torch-backend", "cpu", *wanted]
        else:
            sys.exit("uv is needed to choose torch's CPU build instead of gigabytes of CUDA: pip install uv (make setup does).")
        if subprocess.run(command, cwd=self.folder).returncode:  # elsewhere than here: pip would complain of what this project needs and lacks there
            sys.exit(f"{self.package} could not be installed (see above). Run without it.")
        if self.without:
            subprocess.run([str(self.python), "-m", "pip", "uninstall", "--quiet", "--yes", *self.without], check=True)
        done.touch()


class Sparsify:
    """The running competitor. Raises RuntimeError, with what it printed, when it dies."""

    ENVIRONMENT = PeerEnvironment("eai-sparsify", "1.3.3")
    PACKAGE, VERSION, FOLDER, PYTHON = ENVIRONMENT.package, ENVIRONMENT.version, PEERS, ENVIRONMENT.python

    def __init__(self, tensors: dict[str, Any], k: int, threads: int) -> None:
        """`tensors` is what it starts from: x [batches, T, D], W_enc and W_dec [M, D], b_enc [M], b_pre [D]."""
        from safetensors.torch import save_file

        self._folder = tempfile.TemporaryDirectory()
        weights = f"{self._folder.name}/weights.safetensors"
        save_file(tensors, weights)
        command = [str(self.PYTHON), "-P", __file__, "--weights", weights, "--k", str(k), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        hello = self._answer()
        self.name, self.import_mb, self.last_ms = f"{self.PACKAGE} {hello['version']}", hello["import_mb"], 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def step(self) -> float:
        """Trains on its next batch, keeps its milliseconds in `last_ms`, and returns the batch's FVU before the step."""
        answer = self._ask("step")
        self.last_ms = answer["ms"]
        return answer["fvu"]

    def peak_mb(self) -> float:
        return self._ask("peak")["mb"]

    def _ask(self, request: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: `_answer` says of what
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise RuntimeError(f"{self.PACKAGE} stopped with status {self._process.returncode}:\n{errors[-2000:]}")
        return json.loads(line)


def peak_mb() -> float:
    """Most memory this process has held, in MB. On Linux VmHWM: ru_maxrss survives exec, so a small child reports its parent's peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())


class Worker:
    """The step of sparsify's `Trainer.fit` on given activations, without the hooks and copies around the language model's output.

    Defaults as shipped (AuxK off, no clipping) and its `optimizer="adam"`: torch.optim.Adam as it comes, with a linear schedule.
    """

    def __init__(self, tensors: dict[str, Any], k: int) -> None:
        import torch
        from sparsify import SparseCoder, SparseCoderConfig, TrainConfig
        from transformers import get_linear_schedule_with_warmup

        torch.set_float32_matmul_precision("high")  # as `fit` does
        self.batches = list(tensors["x"])
        num_latents, d_in = tensors["W_enc"].shape
        self.config = TrainConfig(SparseCoderConfig(num_latents=num_latents, k=k), optimizer="adam")
        self.sae = SparseCoder(d_in, self.config.sae, dtype=torch.float32)
        with torch.no_grad():
            for parameter, name in (
                (self.sae.encoder.weight, "W_enc"),
                (self.sae.encoder.bias, "b_enc"),
                (self.sae.W_dec, "W_dec"),
                (self.sae.b_dec, "b_pre"),
            ):
                parameter.copy_(tensors[name])
        self.optimizer = torch.optim.Adam([{"params": self.sae.parameters(), "lr": 2e-4 / (num_latents / 2**14) ** 0.5}])
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, self.config.lr_warmup_steps, 1_000_000)
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.long)
        self.fired = torch.zeros(num_latents, dtype=torch.bool)
        self.steps = 0

    def step(self) -> dict[str, float]:
        x = self.batches[self.steps % len(self.batches)]
        started = time.perf_counter()
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        self.fired[out.latent_indices.flatten()] = True
        fvu = float(out.fvu.detach())
        (out.fvu + self.config.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.tokens_since_fired += x.shape[0]
        self.tokens_since_fired[self.fired] = 0
        self.fired.zero_()
        self.steps += 1
        return {"ms": (time.perf_counter() - started) * 1e3, "fvu": fvu}


def serve() -> None:
    parser = argparse.ArgumentParser(description='Answers each line of input, "step" or "peak", with one line of JSON.')
    parser.add_argument("--weights", required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # sparsify prints when it is imported; stdout carries only answers
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # where triton is installed, sparsify would ask it for a GPU
    import sparsify
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(options.threads)
    print(json.dumps({"version": sparsify.__version__, "import_mb": peak_mb()}), file=answers)
    worker = Worker(load_file(options.weights), options.k)
    for line in sys.stdin:
        print(json.dumps(worker.step() if line.strip() == "step" else {"mb": peak_mb()}), file=answers)


if __name__ == "__main__":
    serve()
