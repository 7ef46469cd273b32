"""How long scoring takes: making the held-out activations, and scoring SAEs in one pass over the language model against one after the other.

python -m experiments.benchmarks.evaluation runs/a runs/b runs/c --rows 100000 --contexts 128    # finished runs on the same activations

What earlier versions did, one SAE after the other, is nearly the second; it also ran the blocks before the hook for every SAE (experiments/LOG.md has
both measured). Peak memory is the process's, language model included: `metrics.downstream.CHUNK_BYTES` says what bounds the logits.
"""

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

from experiments.errors import clear_errors
from switch_sae.activations import build_source
from switch_sae.config import config_from_plain
from switch_sae.evaluation import evaluate_group
from switch_sae.memory import peak_bytes
from switch_sae.metrics import Downstream
from switch_sae.results import load_members
from switch_sae.runs import RunDir

T = TypeVar("T")


def timed(what: str, action: Callable[[], T]) -> T:
    began = time.perf_counter()
    result = action()
    print(f"{what:50} {time.perf_counter() - began:8.1f} s   peak {peak_bytes('cpu') / 1e9:.2f} GB", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of finished runs")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--contexts", type=int, default=128)
    options = parser.parse_args()
    with clear_errors():
        runs = [RunDir.open(path) for path in options.runs]
        saes = {f"{run.path.name}/{name}": sae for run in runs for name, sae in load_members(run).items()}
        config = config_from_plain(runs[0].read_json("config.json"))
        source = build_source(config.source, config.batch_size)
        model = source.language_model
        if model is None:
            raise ValueError(f"{runs[0].path} has no language model, so there is no pass to share. Give a run on one.")
        rows = timed(f"{options.rows:,} held-out activations", lambda: source.evaluation_set(options.rows))
        first, second = (Downstream(model, rows, options.contexts) for _ in range(2))
        together = timed(f"{len(saes)} SAEs in one pass", lambda: evaluate_group(saes, rows, first))
        alone = timed(
            f"{len(saes)} SAEs one after the other", lambda: {name: evaluate_group({name: sae}, rows, second) for name, sae in saes.items()}
        )
        same = all(alone[name].results[name].to_json() == results.to_json() for name, results in together.results.items())
        print("the same numbers to the last bit" if same else "THE NUMBERS DIFFER")


if __name__ == "__main__":
    main()
