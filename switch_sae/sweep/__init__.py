"""Sweeps: many SAEs from one pass over the activations, each with its own config, optimiser, checkpoints and run folder."""

from switch_sae.models.widths import Match
from switch_sae.sweep.folder import SweepFolder
from switch_sae.sweep.plan import SweepConfig, SweepOptions, plan_members
from switch_sae.sweep.run import resume_sweep, run_sweep

__all__ = ["Match", "SweepConfig", "SweepFolder", "SweepOptions", "plan_members", "resume_sweep", "run_sweep"]
