"""Splits a dense SAE into experts by the co-activation of its latents, as the start of a Switch SAE's training.

python -m experiments.upcycle runs/2026-01-31_12-00-00_topk-m4096-k16-s0 --experts 16 --out runs/upcycled
"""

from pathlib import Path

import torch

from switch_sae.cohort import Streams
from switch_sae.config import config_from_plain
from switch_sae.files import Say, tell, user_path
from switch_sae.invocation import invocation
from switch_sae.models import SwitchSAE
from switch_sae.models.upcycling import upcycled
from switch_sae.runs import MODEL_FILE, RunDir, load_sae, save_sae

from .arguments import parser_of
from .errors import clear_errors


def upcycle(run: Path, experts: int, out: Path, seed: int = 0, say: Say = tell) -> SwitchSAE:
    """Writes OUT/model.safetensors, made on the calibration rows of a dense run, and says how much of its code the experts keep.

    Raises ValueError for an `out` that holds a model, and for what `upcycled` refuses.
    """
    if (out / MODEL_FILE).exists():
        raise ValueError(f"{out / MODEL_FILE} exists, and nothing is overwritten. Give a new folder, or remove it.")
    config, dense = config_from_plain(RunDir.open(run).read_json("config.json")), load_sae(run)
    with Streams(say) as streams:
        rows = streams.get(config).calibration.to("cpu")
    found = upcycled(dense, rows, experts, seed)
    save_sae(out / MODEL_FILE, found.sae, dense.activations)
    say(f"of the energy of the dense code {found.kept:.1%} lies in each token's best expert, {found.routed:.1%} in the one that the router chooses")
    x_TD = rows.x_TD
    with torch.no_grad():
        errors = [(sae(x_TD).recon_TD - x_TD).square().sum() for sae in (dense, found.sae)]
    fvu = [float(error / (x_TD - x_TD.mean(dim=0)).square().sum()) for error in errors]
    say(f"FVU on {len(rows):,} calibration rows: {fvu[0]:.4f} of the dense SAE, {fvu[1]:.4f} of its experts before training")
    return found.sae


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("run", type=user_path, metavar="DENSE_RUN", help="the folder of a finished run of sae=topk")
    parser.add_argument("--experts", type=int, required=True, help="E; must divide the number of latents")
    parser.add_argument("--out", type=user_path, required=True, help="the folder to write model.safetensors into")
    parser.add_argument("--seed", type=int, default=0, help="of the clustering")
    arguments = parser.parse_args()
    with clear_errors():
        sae = upcycle(arguments.run, arguments.experts, arguments.out, arguments.seed)
        sizes = " ".join(f"sae.{name}={getattr(sae, name)}" for name in ("num_latents", "k", "num_experts"))
        print(f"written: {arguments.out / MODEL_FILE}")
        print(f"Train it on that run's activations, with {sizes}: {invocation('train', 'sae=switch', f'start_from={arguments.out}')}")


if __name__ == "__main__":
    main()
