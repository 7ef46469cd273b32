"""Trains a Switch SAE, with its baselines, evaluates it and prints where everything is.

python -m experiments.train sae.num_experts=8                       # the bundled language model, about 3 minutes on 2 cores
python -m experiments.train model=gpt2 sae.num_experts=16           # GPT-2, where the hub can be reached
python -m experiments.train --multirun sae.num_experts=2,4,8 seed=0,1,2
python -m experiments.train experiment=run/compare                      # Switch against width-matched and FLOP-matched dense SAEs
python -m experiments.train --cfg job                               # every setting
"""

from omegaconf import DictConfig

from switch_sae.orchestrator import run_training
from switch_sae.report import report

from .command import command
from .compose import register_schemas, run_config

register_schemas()


@command("train")
def main(composed: DictConfig) -> None:
    report(run_training(run_config(composed)))


if __name__ == "__main__":
    main()
