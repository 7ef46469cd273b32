"""The benchmark of this machine, as `make benchmark` runs it: a GPU's suite where there is a CUDA device; otherwise, or with --cpu, the CPU's table.

python -m experiments.benchmarks --peers
python -m experiments.benchmarks --cpu --quick     # all other options are those of experiments.benchmarks.cpu or experiments.benchmarks.gpu
"""

import sys

import torch

from experiments.benchmarks import cpu, gpu


def main(arguments: list[str]) -> None:
    if "--cpu" in arguments or not torch.cuda.is_available():
        cpu.main([argument for argument in arguments if argument != "--cpu"])
    else:
        gpu.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
