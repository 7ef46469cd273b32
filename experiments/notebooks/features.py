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
# # Do Switch and dense SAEs find the same features?
#
# And where they do not: is a dense latent copied into several experts, split over them, or lost?
#
# Works on the folders of any finished runs that read the same activations: dense and Switch SAEs, several seeds of each if there are, since seeds
# of one kind say how much can be expected at all. Execute it with `python -m experiments.run_notebook runs/a runs/b --notebook features`; without
# folders it takes the two newest. Or open it in Jupyter (with jupytext), set `RUNS` below, and run all cells.

# %%
import os
import warnings

from IPython.display import Image, display

from switch_sae.analysis import analyze, build_analysis
from switch_sae.analysis.counterparts.matching_figure import means
from switch_sae.analysis.findings import chosen
from switch_sae.analysis.observed import saw_other_activations, series
from switch_sae.report import render
from switch_sae.report.tables import records_table
from switch_sae.results import collect, finished_runs
from switch_sae.results.rows import TRAINED, grouped
from switch_sae.runs import RunDir

NAMED = os.environ.get("SWITCH_SAE_RUNS", "")  # folders, separated by os.pathsep
RUNS = [RunDir.open(path) for path in NAMED.split(os.pathsep)] if NAMED else finished_runs("runs")[:2]
SETTINGS = {"rows": 20_000}  # held-out activations

warnings.filterwarnings("ignore", message="IProgress not found")
assert RUNS, "there is no finished run in runs/: train one (make train), or set RUNS"
rows = [row for row in collect([run.path for run in RUNS]) if row.has_weights and row.role in TRAINED]
other = saw_other_activations(rows)
rows = [row for row in rows if row.name not in other]
if other:
    print(f"left out, as they read other activations than {rows[0].name}: {', '.join(other)}")
kinds = grouped(rows, series)
has_dense, has_routed = any(row.num_experts == 1 for row in rows), any(row.num_experts > 1 for row in rows)
print(f"{len(rows)} SAEs of {len(kinds)} kinds: " + ", ".join(f"{name} (n = {len(group)})" for name, group in kinds.items()))
for missing in [name for name, group in kinds.items() if len(group) < 2]:
    print(f"one seed of {missing}: no ceiling for its latents, and nothing about their stability")


def tell(name, table, **more):
    """The figure, and the table of a terminal."""
    analysis = build_analysis(name, SETTINGS | more)
    figure = analysis.draw(table)
    display(Image(data=render(figure), width=100 * figure.get_figwidth()))
    print(records_table(analysis.shown(table)))


# %% [markdown]
# ## Matching
#
# Latents are paired by their decoder rows (cosine), or by how their activations correlate on half of the documents (A). Either way, each gets a
# partner of its own (one to one, the Hungarian algorithm) or its best (many to one). Correlations are scored on the other half (B): on A the best
# of thousands of partners looks good by chance alone, as `correlation_on_a` and its null show.
#
# The **null** rotates the other dictionary, or gives its activations on other documents. The **ceiling** is what the same latents reach in another
# seed of their own kind: a Switch SAE cannot be blamed for a dense latent that another dense SAE does not find either. SAEs of one seed start
# from the same random numbers and agree after little training for that reason alone: where there are pairs of different seeds, only these count.

# %%
matching = []
if has_dense and len(rows) > 1:
    matching = analyze("matching", rows, SETTINGS)
    tell("matching", matching)
else:
    print("Matching needs a dense SAE and another one.")

# %% [markdown]
# ## Stability
#
# How often a latent comes back (cosine >= 0.7, one to one) in other seeds of its kind. Latents that come back nowhere may still lie in directions
# that every seed uses: the overlap of the subspaces that they span, beside that of as many latents drawn from all, and of random subspaces (the
# null). Only an overlap above that of any latents says something about the unstable ones.

# %%
stability = chosen(means(matching), part=("stability", "subspace"))
columns = ("sae", "part", "measure", "at", "value", "null", "n", "note")
print(records_table([{name: record[name] for name in columns} for record in stability]) if stability else "Nothing was matched.")

# %% [markdown]
# ## Fates
#
# Each dense latent's partners are latents in its direction that fire where it fires, found on documents A; on documents B they cover a share of its
# activation. It is **matched** by one latent, **copied** by several of nearly equal direction in different experts, **split** over different ones
# in several experts, **refined** by several of one expert, **absorbed** by a broader latent, or **lost**. The docstring of `Fates` has the
# thresholds.
#
# The control is another dense seed, cut into as many blocks as there are experts: what it "loses" and "splits" is no work of a router.

# %%
fates = []
if has_dense and has_routed:
    fates = analyze("fates", rows, SETTINGS)
    tell("fates", fates)
else:
    print("Fates need a dense SAE and one with experts.")

# %% [markdown]
# ### Examples
#
# Latents of each kind, drawn at random, of the first dense and the first Switch SAE; below each its partners, with the text where they are most
# active.

# %%
for record in chosen(fates, part="example"):
    if record["partner"] is None:
        print(f"\n{record['measure'].upper()}: latent {record['at']} of {record['sae']}, fires {record['n']} times, covered {record['value']:.0%}")
    else:
        where = "shared" if record["expert"] < 0 else f"expert {record['expert']}"
        numbers = f"cosine {record['cosine']:.2f}, correlation {record['correlation']:.2f}, on {record['share']:.0%} of its activation"
        print(f"  {record['note']}: {record['partner']} ({where}), {numbers}")
    for line in filter(None, record["text"].splitlines()):
        print(f"      {line}")

# %% [markdown]
# ## Where latents lie
#
# Nearest neighbours in the own expert and in others, of decoder and of encoder rows, against experts drawn at random; copies by how often latents
# fire; how many directions there are; how sparse codes are. Maps keep a third of neighbourhoods: they illustrate, and prove nothing.

# %%
MAPS = {"shown": 500}
geometry = analyze("geometry", rows, SETTINGS | MAPS)
tell("geometry", geometry, **MAPS)

# %% [markdown]
# ## Answer


# %%
def number(table, **where):
    """(value, null, ceiling) of a mean over pairs; None where it is missing."""
    found = chosen(means(table), **where)
    return (found[0]["value"], found[0]["null"], found[0]["ceiling"]) if found else (None, None, None)


def percent(share):
    return "unknown" if share is None else f"{100 * share:.0f} %"


said = []
for dense, switch in dict.fromkeys((record["sae"], record["against"]) for record in chosen(means(fates), part="latents")):
    where = {"sae": dense, "against": switch}
    close, null, ceiling = number(matching, part="one_to_one", measure="close", at="decoder", **where)
    alike, _, alike_ceiling = number(matching, part="one_to_one", measure="alike", at="activations", **where)
    said.append(
        f"In {switch}, {percent(close)} of the latents of {dense} have a partner in their direction (null {percent(null)}; in another seed "
        f"{percent(ceiling)}), and {percent(alike)} one that fires like them on other documents (another seed {percent(alike_ceiling)})."
    )
    shares = {kind: number(fates, part="latents", measure=kind, **where) for kind in ("matched", "copied", "split", "absorbed", "lost")}
    told = ", ".join(f"{kind} {percent(share)} (control {percent(control)})" for kind, (share, _, control) in shares.items())
    said.append(f"Their fates: {told}.")
for kind in dict.fromkeys(record["sae"] for record in chosen(means(matching), part="stability", measure="pw_mcc")):
    recurs, _, _ = number(matching, part="stability", measure="recurs", sae=kind)
    mcc, null, _ = number(matching, part="stability", measure="pw_mcc", sae=kind)
    said.append(f"Between seeds of {kind}, {percent(recurs)} of latents recur (PW-MCC {mcc:.2f}, rotated {null:.2f}).")
for name in dict.fromkeys(record["sae"] for record in chosen(geometry, part="neighbours", measure="own_share") if record["experts"] > 1):
    (decoder,), (encoder,) = (chosen(geometry, part="neighbours", measure="own_share", at=rows_of, sae=name) for rows_of in ("decoder", "encoder"))
    if decoder["value"] is not None and encoder["value"] is not None:
        said.append(
            f"In {name} the nearest decoder row is in the own expert for {percent(decoder['value'])} of latents, the nearest encoder row for "
            f"{percent(encoder['value'])} (experts at random: {percent(decoder['null'])})."
        )
print(" ".join(said) if said else "No answer: a dense SAE and one with experts, on the same activations, are needed.")
