"""An SAE of this library or of another one, written as this or another library's files, then read again and compared.

python -m experiments.convert runs/2026-01-31_12-00-00_topk exported --to sae_lens
python -m experiments.convert their/trainer_0 mine --to switch_sae
python -m experiments.convert user/repo/folder mine --to switch_sae      # on the Hugging Face hub
python -m experiments.convert their/16_experts mine --to switch_sae --set k=64 num_experts=16 heaviside=false   # what their files lack
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from switch_sae.files import user_path
from switch_sae.interop import FORMATS
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.runs import MODEL_FILE, load_sae, save_sae

from .arguments import parser_of
from .errors import clear_errors

OURS = "switch_sae"


def convert(source: str | Path, out: Path, to: str, settings: dict[str, Any]) -> float:
    """Writes the folder `out`; returns how far the SAE read from it is from the one of `source`, relative to the largest reconstruction.

    Raises ValueError for an `out` that exists, for an architecture that the format cannot hold, and for what `load_sae` refuses.
    """
    if out.exists():
        raise ValueError(f"{out} exists, and nothing is overwritten. Give a new folder, or remove it.")
    sae = load_sae(source, **settings)
    if to == OURS:
        if type(sae) not in SAES.values():
            raise ValueError(f"run folders cannot hold a {type(sae).__name__}, which normalises every token: give --to sae_lens.")
        save_sae(out / MODEL_FILE, sae, sae.activations)
    else:
        FORMATS[to]().save(sae, out)
    return _difference(sae, load_sae(out))


@torch.no_grad()
def _difference(sae: SparseAutoencoder, again: SparseAutoencoder) -> float:
    x_TD = torch.randn(64, sae.d_in, generator=torch.Generator().manual_seed(0)) / sae.activation_scale
    recon_TD = sae(x_TD).recon_TD
    return float((again(x_TD).recon_TD - recon_TD).abs().max() / recon_TD.abs().max().clamp_min(1e-12))


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, a number, true or false."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value.lower())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE with a number, true or false, such as k=64") from None


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("source", metavar="IN", help="a run folder, a folder or file of another library, or a name on the hub")
    parser.add_argument("out", type=user_path, metavar="OUT", help="the folder to make")
    parser.add_argument("--to", required=True, choices=[OURS, *FORMATS], help="the format to write")
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="settings that the files lack, such as k=64")
    arguments = parser.parse_args()
    with clear_errors():
        difference = convert(arguments.source, arguments.out, arguments.to, dict(arguments.set))
        print(f"written: {arguments.out}; read again, its reconstructions differ by {difference:.0e} of the largest")


if __name__ == "__main__":
    main()
