"""What pyproject.toml cannot say: the commands and conf/ lie at the top of a clone, and below switch_sae in a wheel.

There they are called switch_sae.commands and switch_sae/conf, so that nothing called `experiments` or `conf` lies among everybody's packages.
"""

from setuptools import find_namespace_packages, find_packages, setup

# Packages that do not lie in a folder of their name. What else is in experiments/ (benchmarks, the bundled model's training) needs a clone.
FOLDERS = {
    "switch_kernels": "kernels/switch_kernels",
    "switch_sae.commands": "experiments",
    "switch_sae.commands.notebooks": "experiments/notebooks",
    "switch_sae.commands.real": "experiments/real",
    "switch_sae.conf": "conf",
}
found = {*find_packages(include=["switch_sae*"]), *find_packages("kernels", include=["switch_kernels*"])}
data = {f"switch_sae.conf.{folder}" for folder in find_namespace_packages("conf")}  # folders of YAML, not of Python

setup(packages=sorted(found | data | {*FOLDERS}), package_dir=FOLDERS)
