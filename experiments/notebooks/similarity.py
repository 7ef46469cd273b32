# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Do Switch and dense SAEs represent the same thing?
#
# Two SAEs may reconstruct the same activations with codes that have nothing in common: a Switch SAE that keeps a copy of a feature in every expert
# says the same with other latents. So one number cannot answer the question. This notebook follows the path from codes to reconstructions and asks at
# each stage how alike two SAEs say that two tokens are.
#
# Works on the folders of any finished runs. `SWITCH_SAE_RUNS` names them (folders, separated by os.pathsep); otherwise the newest are taken.

# %%
import os
import warnings
from collections import Counter

from IPython.display import Image, display

from switch_sae.analysis import analyze, build_analysis
from switch_sae.analysis.findings import chosen, compact
from switch_sae.analysis.observed import saw_other_activations, series
from switch_sae.report import render
from switch_sae.report.tables import records_table
from switch_sae.results import finished_runs
from switch_sae.results.rows import collect
from switch_sae.runs import RunDir

NAMED = os.environ.get("SWITCH_SAE_RUNS", "")  # folders, separated by os.pathsep
RUNS = [RunDir.open(path) for path in NAMED.split(os.pathsep)] if NAMED else finished_runs("runs")[:2]
SETTINGS = {"rows": 10_000}

warnings.filterwarnings("ignore", message="IProgress not found")
assert RUNS, "there is no finished run in runs/: train one (make train), or set RUNS"


def show(figure):
    display(Image(data=render(figure), width=100 * figure.get_figwidth()))


every = [row for row in collect([run.path for run in RUNS]) if row.has_weights]
other = saw_other_activations(every)
saes = [row for row in every if row.name not in other]
print(f"{len(saes)} SAEs of the same activations: {', '.join(row.name for row in saes)}")
if len(saes) < len(every):
    print(f"left out, since they saw other activations than {saes[0].name}: {', '.join(other)}")
assert len(saes) > 1, "similarity compares SAEs: give runs of at least two on the same activations"
if alone := [name for name, count in Counter(map(series, saes)).items() if count == 1]:
    print(f"one seed of {', '.join(alone)}: no ceiling, and intervals over documents alone. Train more seeds to know how much two of a kind differ.")
found = analyze("similarity", saes, SETTINGS)

# %% [markdown]
# ## The path
#
# For pairs of tokens from different documents, the cosine of their codes (or reconstructions) says how alike an SAE holds them: an RDM. Two SAEs are
# alike where their RDMs put the same pairs close.
#
# - **rho-a** compares ranks and pays for ties: where no latent is shared all cosines are 0, and an RDM full of ties can agree with nothing.
#   **Spearman** divides that out. **CKA** (debiased: the plain form is 0.9 for codes that share nothing) compares centred inner products, and
#   **mutual neighbours** only asks who is nearest.
# - **Merged**: latents of one SAE whose decoder rows have a cosine of 0.9 are one. *Softly merged* weighs all pairs of latents by their cosine. What
#   rises from codes to merged codes was duplication; what rises from there to reconstructions is another choice of directions for the same signal.
# - **null**: whole documents change places, with their positions in the text kept. `s_cal` is 0 for chance and 1 for all there can be.
# - **ceiling**: what seeds of both kinds agree on among themselves. No two SAEs can be expected to agree on more.

# %%
analysis = build_analysis("similarity", SETTINGS)
show(analysis.draw(found))
path = chosen(found, part="path", at=("codes", "merged", "reconstructions"), measure=("spearman", "cka", "mutual_knn"))
print(records_table([line | {"s_cal": record["calibrated"], "p": record["p"]} for line, record in zip(compact(path), path, strict=True)]))

# %% [markdown]
# ## Is the difference only the route?
#
# Codes of two experts share no latent, so a Switch SAE calls every two tokens of different experts equally unlike. *route*: how well "same expert or
# not" alone predicts the other SAE's RDM. *Without routes*: what the codes agree on beyond that. *Same expert*: the agreement among pairs of tokens
# that the router keeps together, against as many pairs of random groups of the same sizes.

# %%
routed = [record for record in found if record["part"] in ("route", "strata") and record["at"] in ("codes", "merged")]
print(records_table(compact(routed)) if routed else "no SAE here has a router, so there is no route to take out.")

# %% [markdown]
# ## What seeds agree on

# %%
print(records_table(compact(chosen(found, part="noise ceiling"))))

# %% [markdown]
# ## Answer

# %%
reference = found[0]["sae"]
names = list(dict.fromkeys(record["sae"] for record in found))


def number(stage, measure, name, part="path"):
    """A value with its interval, in words; None where it is missing."""
    for record in chosen(found, part=part, at=stage, measure=measure):
        if {record["sae"], record["against"]} == {reference, name} and record["value"] is not None:
            interval = "" if record["low"] is None else f" [{record['low']:.2f}, {record['high']:.2f}]"
            return f"{record['value']:.2f}{interval}"
    return None


answers = []
for name in names[1:]:
    along = [f"{number(stage, 'spearman', name)} at {stage}" for stage in ("codes", "merged", "reconstructions")]
    (codes,) = chosen(found, part="path", at="codes", measure="spearman", sae=reference, against=name)
    ceiling = "no ceiling: one seed" if codes["ceiling"] is None else f"seeds of the two among themselves: {codes['ceiling']:.2f} at codes"
    chance = "" if codes["p"] is None else f", s_cal {codes['calibrated']:.2f}, p {codes['p']:.3f} at codes"
    text = f"{reference} and {name} agree on which tokens are alike with Spearman {', '.join(along)} ({ceiling}{chance})."
    if within := number("codes", "spearman, same expert", name, "strata"):
        text += f" Among tokens that one expert serves it is {within}."
    if rest := number("codes", "spearman without routes", name, "route"):
        text += f" Without routes the codes' agreement is {rest}."
    answers.append(text)
if len(names) == 1:
    (own,) = chosen(found, part="path", at="codes", measure="spearman", against="its other seeds")
    answers.append(f"Only {reference} is here: its seeds agree with Spearman {own['value']:.2f} at codes. Add another kind of SAE.")
print(" ".join(answers))
