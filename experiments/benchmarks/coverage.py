"""How often 95 % intervals over documents hold the truth: simulated on a population of documents whose sums are known.

python -m experiments.benchmarks.coverage runs/2026-01-31_12-00-00_switch-e8      # a finished run on local text; about 3 minutes

The population are the run's training documents (many, unlike the held-out ones), scored by its SAEs on every STEP-th context. From it, SAMPLES times,
n documents are drawn with replacement, and each sample's intervals are compared with the population's numbers. Percentile intervals are what this
library gave before; expanded ones are `intervals`. On documents that the SAEs trained on, this says how intervals behave, not what SAEs score.
"""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.record import RESULTS, append, commit
from experiments.errors import clear_errors
from switch_sae.activations import EvaluationSet, LanguageModelSource, build_source
from switch_sae.config import config_from_plain
from switch_sae.evaluation import evaluate_group
from switch_sae.metrics import Downstream
from switch_sae.metrics.base import DocumentMetric
from switch_sae.metrics.bootstrap import document_weights, effective_documents, expanded_tail
from switch_sae.results import load_members
from switch_sae.runs import RunDir

SAMPLES, RESAMPLES, COVERAGE = 1500, 1000, 0.95
KINDS = ("percentile", "expanded", "effective")
SHOWN = ("fvu_inliers", "normalized_mse", "cosine", "relative_norm", "l0", "gate", "router_entropy", "delta_ce", "kl", "loss_recovered_zero")


def population(run: RunDir, step: int) -> dict[str, dict[str, DocumentMetric[Any]]]:
    """By SAE, the metrics whose sums are kept per document, over every `step`-th context of the training text."""
    config = config_from_plain(run.read_json("config.json"))
    source = build_source(config.source, config.batch_size)
    if not isinstance(source, LanguageModelSource) or config.source.text.streamed:
        raise ValueError(f"{run.path} did not train on local text, whose documents could be counted. Give a run that did.")
    contexts = source._feed.contexts[::step]  # type: ignore[attr-defined]
    x_TD = torch.cat([kept_TD.cpu() for kept_TD in source._kept_rows(contexts, "the training text")])
    rows = EvaluationSet(x_TD, contexts.document_CS[contexts.keep_CS].long(), contexts.tokens_CS.long(), contexts.keep_CS)
    downstream = Downstream(source.language_model, rows, max(1, len(contexts) // 3))
    group = evaluate_group(load_members(run), rows, downstream, bootstrap=0, say=print)
    return {
        name: {type(metric).__name__: metric for metric in metrics if isinstance(metric, DocumentMetric)} for name, metrics in group.metrics.items()
    }


def covered(resampled: Any, truth: Mapping[str, Tensor], sizes_N: Tensor, n: int, seed: int) -> dict[str, list[float]]:
    """By number: the shares of samples whose intervals, of each of `KINDS`, hold the truth."""
    documents = len(sizes_N)
    generator = torch.Generator().manual_seed(seed)
    (weights_RN,) = document_weights(n, RESAMPLES)
    hits: dict[str, list[Tensor]] = {}
    for _ in range(SAMPLES):
        drawn_N = torch.randint(documents, (n,), generator=generator)
        spread_RN = torch.zeros(RESAMPLES, documents, dtype=torch.float64).index_add_(1, drawn_N, weights_RN)
        tails = [(1 - COVERAGE) / 2, expanded_tail(COVERAGE, n), expanded_tail(COVERAGE, effective_documents(sizes_N[drawn_N]))]
        tails_K = torch.tensor(tails, dtype=torch.float64)
        for name, value_R in resampled(spread_RN).items():
            holds_K = (value_R.quantile(tails_K) <= truth[name]) & (truth[name] <= value_R.quantile(1 - tails_K))
            hits.setdefault(name, []).append(holds_K.flatten())
    return {name: torch.stack(found).double().mean(0).tolist() for name, found in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--documents", type=int, nargs="+", default=[10, 34], help="sample sizes")
    parser.add_argument("--step", type=int, default=6, help="every how many contexts; default 6")
    options = parser.parse_args()
    with clear_errors():
        run = RunDir.open(options.run)
        records = []
        scored = population(run, options.step)
        main, *others = scored
        for sae, metrics in scored.items():
            for metric in metrics.values():
                sizes_N = metric.sums["rows" if "rows" in metric.sums else "variance"]
                records += _records(sae, metric.replicates, sizes_N, options.documents)
        for other in others:
            ours, theirs = scored[main]["FVU"], scored[other]["FVU"]

            def ratio(weights_RN: Tensor, ours: Any = ours, theirs: Any = theirs) -> dict[str, Tensor]:
                return {"fvu_inliers": ours.replicates(weights_RN)["fvu_inliers"] / theirs.replicates(weights_RN)["fvu_inliers"]}

            records += _records(f"{main} / {other}", ratio, ours.sums["variance"], options.documents)
        error = math.sqrt(COVERAGE * (1 - COVERAGE) / SAMPLES)
        print(f"\n{'':41}{'n':>4}  {'  '.join(f'{kind:>10}' for kind in KINDS)}      (simulation error {error:.1%})")
        for r in records:
            print(f"{r['sae'][:20]:20} {r['number'][:20]:20}{r['n']:>4}  {'  '.join(f'{r[kind]:10.3f}' for kind in KINDS)}")
        append(RESULTS / "interval_coverage.csv", records)


def _records(sae: str, resampled: Any, sizes_N: Tensor, sizes: list[int]) -> list[dict[str, Any]]:
    truth = resampled(torch.ones(1, len(sizes_N), dtype=torch.float64))
    about = {"commit": commit(), "sae": sae, "documents": len(sizes_N), "samples": SAMPLES}
    found = []
    for n in sizes:
        shares = covered(resampled, truth, sizes_N, n, seed=n)
        found += [about | {"number": name, "n": n, **dict(zip(KINDS, shares[name], strict=True))} for name in SHOWN if name in shares]
    return found


if __name__ == "__main__":
    main()
