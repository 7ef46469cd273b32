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
# # Is a token shorter to describe with a Switch SAE or with a dense one?
#
# Works on the folders of any finished runs that read the same activations: dense and Switch SAEs, several seeds if there are. Execute it with
# `python -m experiments.run_notebook runs/a runs/b --notebook description_length`; without folders it takes the two newest. Or open it in Jupyter
# (with jupytext), set `RUNS` below, and run all cells.

# %%
import os
import warnings

from IPython.display import Image, display

from switch_sae.analysis import analyze, build_analysis
from switch_sae.analysis.codes.comparison import SHORTEST, WITH_CLASSES
from switch_sae.analysis.findings import chosen, compact
from switch_sae.analysis.observed import saw_other_activations
from switch_sae.report import render
from switch_sae.report.tables import records_table
from switch_sae.results import collect, finished_runs
from switch_sae.runs import RunDir

NAMED = os.environ.get("SWITCH_SAE_RUNS", "")  # folders, separated by os.pathsep
RUNS = [RunDir.open(path) for path in NAMED.split(os.pathsep)] if NAMED else finished_runs("runs")[:2]
SETTINGS = {"rows": 20_000, "shown": 0.1}  # held-out activations, and the distortion of the tables

warnings.filterwarnings("ignore", message="IProgress not found")
assert RUNS, "there is no finished run in runs/: train one (make train), or set RUNS"
rows = [row for row in collect([run.path for run in RUNS]) if row.has_weights and row.kind.experts_per_token == 1]
other = saw_other_activations(rows)
rows = [row for row in rows if row.name not in other]
print(f"left out, as they read other activations than {rows[0].name}: {', '.join(other)}" if other else f"{len(rows)} SAEs")
table = analyze("mdl", rows, SETTINGS)
at = SETTINGS["shown"]


def show(records):
    print(records_table(compact(records)))


# %% [markdown]
# ## What is counted
#
# A sender who has the activation and a receiver who has not share the SAE and the laws of a code. The sender tells which latents are active (for a
# Switch SAE: the route, then the latents of that expert), how strongly, to a step, and then as much of the residual as takes the squared error down
# to a given share of the variance. Laws are fitted on half of the documents and paid on the others. The router's own probabilities appear nowhere:
# the receiver could not compute them.
#
# Fewer bits at equal distortion mean a better model of the activations. Curves, not points: an SAE with a larger error pays for it in its residual.

# %%
display(Image(data=render(build_analysis("mdl", SETTINGS).draw(table)), width=1100))

# %% [markdown]
# ## What supports cost
#
# Bits per token for saying which latents are active, by code. `uniform`: all sets alike. `independent`: each latent by its frequency. `exact k`: the
# same when their number is known first. `classes`: several such laws, and the receiver never learns which one it was. `looks back`: the route, or
# the class, is foreseen from the token before.

# %%
show(chosen(table, part="support", against="support"))

# %% [markdown]
# ## Where the bits of the shortest code go
#
# The note says how values were coded: after the gate, with the gate once and the values before it, or each by how large the values before it in the
# same token were; the shortest on the fitted documents.

# %%
show(chosen(table, part="parts", at=at))

# %% [markdown]
# ## In all, and what routing saves
#
# Beside each total, as its null, the same distortion without an SAE: a Gaussian code with the covariance of the activations. `saved` is the dense
# SAE's total less the routed one's; the control is a dense SAE whose code has as many latent classes as there are experts.

# %%
show(chosen(table, part="total", at=at))

# %%
show(chosen(table, part="saved", at=at))
show(chosen(table, part="saved over seeds", at=at))

# %% [markdown]
# The bits of the models themselves are in no total: divide them by the number of tokens that you want to describe.

# %%
show(chosen(table, part="model"))

# %% [markdown]
# ## Answer


# %%
def answer():
    """The numbers above in words."""
    against = {name: chosen(table, part="saved", at=at, measure=name) for name in (WITH_CLASSES, SHORTEST)}
    against = {name: [record for record in records if record["value"] is not None] for name, records in against.items()}
    if not against[WITH_CLASSES]:
        return "These runs hold no pair of a dense and a routed SAE, so nothing can be said about routing. Add a run of the kind that is missing."
    lines = []
    for name, words in ((WITH_CLASSES, "against a dense SAE with as many latent classes"), (SHORTEST, "with the shortest code of each")):
        bits = [record["value"] for record in against[name]]
        sure = [record for record in against[name] if record["low"] is not None and (record["low"] > 0 or record["high"] < 0)]
        won, lost = (sum(sign * record["value"] > 0 for record in sure) for sign in (1, -1))
        lines.append(
            f"{words}, routed SAEs save {min(bits):.1f} to {max(bits):.1f} bits per token over {len(bits)} pairs "
            f"({won} of them shorter and {lost} longer beyond their intervals over documents)"
        )
    best = min(chosen(table, part="total", at=at), key=lambda record: record["value"])
    return (
        f"At a distortion of {at:g}, {'; '.join(lines)}. The shortest description is that of {best['sae']} with the code '{best['measure']}': "
        f"{best['value']:.1f} bits per token, where a Gaussian code without an SAE takes {best['null']:.1f}."
    )


print(answer())
