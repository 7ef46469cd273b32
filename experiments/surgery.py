"""Merges copies of latents in several experts into shared latents, fine-tunes briefly, and scores before and after, beside two controls: the same
fine-tuning without surgery, and as many random latents merged. Each result is a run folder, to be analysed as any other.

python -m experiments.surgery runs/2026-01-31_12-00-00_switch_refit-e32 --out runs/surgery
python -m experiments.surgery RUN --threshold 0.8 --experts 4 --tokens 500000 --lr 0.002
"""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from switch_sae.analysis.features.surgery import copied_groups, merged, random_groups
from switch_sae.cohort import Cohort, Keeper, Streams
from switch_sae.config import RunConfig, config_from_plain, config_to_plain
from switch_sae.files import Say, tell, user_path
from switch_sae.metrics.forward import sae_outputs
from switch_sae.models import SparseAutoencoder
from switch_sae.orchestrator import main_member
from switch_sae.report.tables import records_table
from switch_sae.results.export import write_csv
from switch_sae.runs import RunDir, environment, load_sae, save_sae
from switch_sae.scoring import trained

from .arguments import parser_of
from .errors import clear_errors

METRICS = ("fvu_inliers", "delta_ce", "l0", "dead_latents")


class _Keeper(Keeper):
    with_controls = False  # PCA and an untrained SAE say nothing of surgery


def operate(
    run: Path, out: Path, threshold: float, experts: int | None, tokens: int | None, lr: float | None, say: Say = tell
) -> list[dict[str, Any]]:
    """One record per variant, before and after fine-tuning: its sizes, its scores with intervals, and ratios to the same without surgery."""
    config = config_from_plain(RunDir.open(run).read_json("config.json"))
    sae = load_sae(run)
    peak = lr or 0.3 * (config.trainer.lr or 2e-4 / (sae.num_latents / 2**14) ** 0.5)
    config = replace(
        config, tokens=tokens or config.tokens // 5, trainer=replace(config.trainer, lr=peak, decay_fraction=1.0, dead_after_tokens=None),
        evaluation=replace(config.evaluation, inferences=[], probes=False), baselines=[], runs=str(out),
    )  # fmt: skip
    with Streams(say) as streams:
        stream = streams.get(config)
        count_M = sum(output.latents.cpu().firing_counts() for _, _, output in sae_outputs(sae, stream.calibration.to("cpu")))
        assert isinstance(count_M, torch.Tensor)
        groups = copied_groups(sae, count_M, threshold, experts or max(2, sae.num_experts // 4))
        say(f"{len(groups)} groups of copies, in {', '.join(str(len(group)) for group in groups)} experts, at cosine > {threshold:g}")
        starts = {"untouched": sae, "merged": merged(sae, groups, count_M)}
        starts["random"] = merged(sae, random_groups(sae, count_M, groups), count_M)
        folders = {
            name: _folder(out, re.sub(r"[^\w.-]", "_", f"{run.name}-{name}"), replace(config, sae=start.config), start)
            for name, start in starts.items()
        }
        configs = {name: config_from_plain(folder.read_json("config.json")) for name, folder in folders.items()}
        members = [replace(main_member(folder, configs[name]), name=name) for name, folder in folders.items()]
        Cohort(members, 0, streams, _Keeper(out), time.perf_counter()).work()
        after = {name: load_sae(folder.path) for name, folder in folders.items()}
        asked = [trained(f"{name} {when}", one, "main") for when, saes in (("after", after), ("before", starts)) for name, one in saes.items()]
        keys = {each.name: each.name for each in asked}
        scored = streams.score(config).group(asked).of_folder(keys, {key: {} for key in keys}, "\0")
    return [_record(each.name, each.sae, scored) for each in asked if isinstance(each.sae, SparseAutoencoder)]


def _folder(out: Path, name: str, config: RunConfig, start: SparseAutoencoder) -> RunDir:
    folder = RunDir.create(out, name)
    start_from = (folder.path / "start.safetensors").resolve()
    save_sae(start_from, start, start.activations)
    folder.write_json("environment.json", environment())
    folder.write_json("config.json", config_to_plain(replace(config, start_from=str(start_from))))
    return folder


def _record(name: str, sae: SparseAutoencoder, scored: dict[str, Any]) -> dict[str, Any]:
    entry = scored["members"][name]
    sizes = {"sae": name, "latents": sae.num_latents, "shared": sae.num_shared, "parameters": entry["parameters"], "flops": sae.flops().forward}
    known = {metric: entry["metrics"].get(metric, {}) for metric in METRICS}
    known |= {f"untouched/{metric}": scored["ratios"].get(name, {}).get(metric, {}) for metric in METRICS[:2]}
    scores = {f"{metric}{end}": each.get(key) for metric, each in known.items() for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))}
    return sizes | scores


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("run", type=user_path, help="the folder of a finished run of switch_refit or switch_pursuit")
    parser.add_argument("--out", type=user_path, default=Path("runs"), help="where the run folders and surgery.csv go")
    parser.add_argument("--threshold", type=float, default=0.9, help="cosine of decoder rows above which latents are copies")
    parser.add_argument("--experts", type=int, help="in how many experts a concept must have a copy; default: a quarter of them")
    parser.add_argument("--tokens", type=int, help="activations of fine-tuning; default: a fifth of training")
    parser.add_argument("--lr", type=float, help="peak rate of fine-tuning; default: 0.3 of training's")
    arguments = parser.parse_args()
    with clear_errors():
        table = operate(arguments.run, arguments.out, arguments.threshold, arguments.experts, arguments.tokens, arguments.lr)
        print(records_table([{key: value for key, value in record.items() if not key.endswith(("_low", "_high"))} for record in table]))
        write_csv(table, arguments.out / "surgery.csv")
        print(f"\nwritten: {arguments.out}/surgery.csv, and a run folder for each")


if __name__ == "__main__":
    main()
