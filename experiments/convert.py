"""An SAE of this library or of another one, written as this or another library's files, then read again and compared.

python -m experiments.convert runs/2026-01-31_12-00-00_topk exported --to sae_lens
python -m experiments.convert their/trainer_0 mine --to switch_sae
python -m experiments.convert user/repo/folder mine --to switch_sae      # on the Hugging Face hub
python -m experiments.convert user/repo mine --revision v1 --to switch_sae      # a branch, tag or commit of it
python -m experiments.convert runs/layer_0 runs/layer_1 exported --to circuit_tracer      # transcoders, one run for each layer of the model
python -m experiments.convert their/set mine --to switch_sae --set layer=1
python -m experiments.convert their/16_experts mine --to switch_sae --set k=64 num_experts=16 heaviside=false   # what their files lack
"""

import argparse
import json
from collections.abc import Sequence
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


def convert(sources: Sequence[str | Path], out: Path, to: str, settings: dict[str, Any], revision: str | None = None) -> float:
    """Writes the folder `out`; returns how far the SAEs read from it are from those of `sources`, relative to the largest reconstruction.

    Several sources are for formats that hold sets. `revision` is that of names on the hub. Raises ValueError for an `out` that exists, for an
    architecture that the format cannot hold, and for what `load_sae` refuses.
    """
    if out.exists():
        raise ValueError(f"{out} exists, and nothing is overwritten. Give a new folder, or remove it.")
    saes = [load_sae(source, revision=revision, **settings) for source in sources]
    if to != OURS:
        written, again = FORMATS[to]().save_all(saes, out), FORMATS[to]().load_all(out)
    elif len(saes) != 1:
        raise ValueError(f"a run folder holds one SAE, and {len(saes)} were given. Write each into its own.")
    else:
        (sae,) = saes
        if type(sae) not in SAES.values():
            raise ValueError(f"run folders cannot hold a {type(sae).__name__}, which normalises every token: give --to sae_lens.")
        save_sae(out / MODEL_FILE, sae, sae.activations)
        written, again = saes, [load_sae(out)]
    return max(_difference(*pair) for pair in zip(written, again, strict=True))


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
    parser.add_argument("sources", nargs="+", metavar="IN", help="a run folder, a folder or file of another library, or a name on the hub")
    parser.add_argument("out", type=user_path, metavar="OUT", help="the folder to make")
    parser.add_argument("--to", required=True, choices=[OURS, *FORMATS], help="the format to write")
    parser.add_argument("--revision", help="branch, tag or commit of a name on the hub")
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="settings that the files lack, such as k=64")
    arguments = parser.parse_args()
    with clear_errors():
        difference = convert(arguments.sources, arguments.out, arguments.to, dict(arguments.set), arguments.revision)
        print(f"written: {arguments.out}; read again, its reconstructions differ by {difference:.0e} of the largest")


if __name__ == "__main__":
    main()
