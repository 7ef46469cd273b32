"""What rsatoolbox and pytorch-cka give for a small example: the numbers that tests of the analysis `similarity` compare with.

python -m experiments.benchmarks.similarity_oracles --out tests/golden/similarity.json

Needs both packages, in an environment of their own: pip install rsatoolbox==0.3.2 pytorch-cka==1.1.3 (which are imported as rsatoolbox and cka).
"""

import argparse
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from switch_sae.files import user_path, write_atomically

SIZES = (3, 5, 2, 6, 4, 4)
"""Rows of each document."""
SEEDS = 4
REPLICATES = 60


def example() -> dict[str, Any]:
    """Dense vectors of a "model", its noisy copies ("seeds"), and two sparse codes with ties, all of the same rows."""
    generator = torch.Generator().manual_seed(0)
    rows = sum(SIZES)
    model = torch.randn(rows, 7, generator=generator)
    seeds = [model + (1 + seed / 2) * torch.randn(rows, 7, generator=generator) for seed in range(SEEDS)]
    codes = []
    for slots in (2, 3):  # the largest of 12 random projections: many pairs of rows have none in common
        score = (model @ torch.randn(7, 12, generator=generator)).relu() + 0.1
        codes.append(score * (score >= score.topk(slots, dim=1).values[:, -1:]))
    documents = [number for number, size in enumerate(SIZES) for _ in range(size)]

    def short(matrix: torch.Tensor) -> Any:
        return [[round(value, 3) for value in row] for row in matrix.tolist()]

    return {"documents": documents, "model": short(model), "seeds": [short(one) for one in seeds], "codes": [short(one) for one in codes]}


def oracles(inputs: dict[str, Any]) -> dict[str, Any]:
    """The two packages' numbers for such an example."""
    import numpy as np
    import rsatoolbox.inference.evaluate as evaluate
    from cka import cka_from_features
    from rsatoolbox.data import Dataset
    from rsatoolbox.inference import boot_noise_ceiling, eval_dual_bootstrap
    from rsatoolbox.model import ModelFixed
    from rsatoolbox.rdm import RDMs, calc_rdm, compare
    from rsatoolbox.util.inference_util import extract_variances

    def correlation(matrix: Any) -> Any:
        return calc_rdm(Dataset(np.array(matrix)), method="correlation").dissimilarities[0]

    def cosine(matrix: Any) -> Any:
        """Correlation of (x, -x), whose mean is 0."""
        return correlation(np.concatenate([np.array(matrix), -np.array(matrix)], 1))

    def rdms(vectors: Any) -> Any:
        return RDMs(np.stack(vectors), pattern_descriptors={"document": inputs["documents"]})

    names = {"model": inputs["model"], "seed": inputs["seeds"][0], "code": inputs["codes"][0], "other code": inputs["codes"][1]}
    found: dict[str, Any] = {
        kind: {name: [round(entry, 9) for entry in of(matrix).tolist()] for name, matrix in names.items()}
        for kind, of in (("cosine", cosine), ("correlation", correlation))
    }
    couples = [(a, b) for a in names for b in names if a < b]
    for method in ("rho-a", "tau-a"):
        found[method] = {f"{a}, {b}": float(compare(rdms([cosine(names[a])]), rdms([cosine(names[b])]), method)[0, 0]) for a, b in couples}
    features = {name: torch.tensor(matrix, dtype=torch.float64) for name, matrix in names.items()}
    found["cka"] = {f"{a}, {b}": float(cka_from_features(features[a], features[b])[0, 0]) for a, b in couples}
    seeds = rdms([cosine(matrix) for matrix in inputs["seeds"]])
    found["noise ceiling"] = {method: [float(bound) for bound in boot_noise_ceiling(seeds, method)] for method in ("rho-a", "tau-a")}

    draws: list[dict[str, Any]] = []
    draw = evaluate.bootstrap_sample

    def recorded(*arguments: Any, **named: Any) -> Any:
        sample = draw(*arguments, **named)
        draws.append({"seeds": sample[1].tolist(), "documents": sample[2].tolist()})
        return sample

    np.random.seed(0)
    fixed = ModelFixed("model", rdms([cosine(inputs["model"])]))
    with patch.object(evaluate, "bootstrap_sample", recorded), patch.object(evaluate, "boot_noise_ceiling", lambda *_, **__: (0.0, 0.0)):
        result = eval_dual_bootstrap(fixed, seeds, method="rho-a", N=REPLICATES, pattern_descriptor="document")
    variance = extract_variances(result.variances, True, SEEDS, len(SIZES))[0]
    found["dual bootstrap"] = {"draws": draws, "three variances": result.variances[:, 0, 0].tolist(), "variance": float(variance[0])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=user_path, required=True, metavar="FILE")
    out: Path = parser.parse_args().out
    inputs = example()
    write_atomically(out, (json.dumps({"inputs": inputs, "oracles": oracles(inputs)}) + "\n").encode())
    print(f"written: {out}")


if __name__ == "__main__":
    main()
