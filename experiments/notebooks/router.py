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
# # What is a router, geometrically?
#
# A Switch SAE's router is a small matrix: one direction per expert. Is it approximately a down-projection of the features that a dense SAE learns on
# the same activations, so that each direction is a sum of a few of them? Or is it something else, and if so, what?
#
# Works on the folders of any finished runs on the same activations, best with a dense SAE and several seeds of each:
# `make notebook NAME=router RUNS="runs/a runs/b"`. Or set `RUNS` below and run all cells. What is missing is said. Tables stay in the run folders, so
# a second time is quick.

# %%
import os
import warnings

from IPython.display import Image, display

from switch_sae.analysis import analyze, build_analysis
from switch_sae.analysis.findings import chosen, compact
from switch_sae.analysis.observed import saw_other_activations
from switch_sae.analysis.router_geometry.figure import pooled, series_of
from switch_sae.report import render
from switch_sae.report.tables import records_table
from switch_sae.results import collect, finished_runs
from switch_sae.results.rows import grouped
from switch_sae.runs import RunDir

NAMED = os.environ.get("SWITCH_SAE_RUNS", "")  # folders, separated by os.pathsep
RUNS = [RunDir.open(path) for path in NAMED.split(os.pathsep)] if NAMED else finished_runs("runs")[:2]
SETTINGS = {"rows": 20_000, "draws": 3}

warnings.filterwarnings("ignore", message="IProgress not found")
assert RUNS, "there is no finished run in runs/: train one (make train), or set RUNS"

finished = [row for row in collect([run.path for run in RUNS]) if row.has_weights]
other = saw_other_activations(finished)
saes = [row for row in finished if row.name not in other]
for name in other:
    print(f"left out, since it saw other activations than {saes[0].name}: {name}")
routed = [row for row in saes if row.num_experts > 1]
print(f"{len(routed)} SAEs with experts, {len(saes) - len(routed)} dense ones")
analysis = build_analysis("router", SETTINGS)
table = analyze("router", saes, SETTINGS) if routed else []


def show(part, measures=None, at=None):
    """The findings of a part; of several seeds their mean, with the lowest and the highest in place of the interval."""
    records = [r for r in chosen(table, part=part) if (measures is None or r["measure"] in measures) and (at is None or r["at"] in at)]
    alike = grouped(records, lambda r: (series_of(r), r["measure"], r["against"] if part != "stability" else "", r["at"]))
    lines = [(pooled(group) or group[0]) | {"sae": key[0]} for key, group in alike.items()]
    print(records_table(compact(lines)) if lines else "None of these SAEs has experts.")


# %% [markdown]
# ## The answer in one figure
#
# Each mark stands against a null: what the same measurement gives where there is nothing to find.

# %%
if table:
    figure = analysis.draw(table)
    display(Image(data=render(figure), width=100 * figure.get_figwidth()))

# %% [markdown]
# ## Is it a sparse sum of dense features?
#
# Softmax ignores what is added to all logits, so router rows are centred first. There are more features than dimensions: *some* sum of dense rows
# always gives a router row, and only a sum of *few* means anything. `R2 encoder` and `R2 decoder` are the share of a row's squared norm that its
# best s dense rows explain (orthogonal matching pursuit); `>= 0` allows positive weights only; `on tokens` compares logits with pre-activations
# instead of directions. `rotated` is the same against the dense rows after a random rotation; `gaussian` against random rows with the covariance of
# the activations; `frequency` takes random rows that fire as often as the chosen ones. The ceiling is what the same sums explain of a latent of the
# dense SAE trained with another seed: a direction that is a feature.

# %%
show("sparsity", ("R2 encoder", "R2 encoder >= 0", "R2 decoder", "R2 encoder on tokens", "R2 components", "R2 another seed"), at=(1, 4, 16, ""))

# %%
show("sparsity", tuple(f"rows for half, {name}" for name in ("encoder", "decoder", "components", "another seed")))

# %% [markdown]
# ## Do a few dense features predict the route?
#
# Fitted on half of the documents, scored on the others. The features are those that enter a group lasso first.

# %%
show("prediction")

# %% [markdown]
# ## What does the router see, and what not?
#
# Its centred rows span at most E - 1 dimensions, the *control* part of an activation; the rest is *content*. What a linear reader gets out of each is
# held against random subspaces of the same rank, and against the first components, which hold the most variance that so few dimensions can. In the
# swap two tokens exchange their control part: the route changes to the partner's, and its expert reconstructs content that it was not meant for.

# %%
show("control")

# %% [markdown]
# ## Does a router row point to what its expert reads, or to what it writes?
#
# Cosines of a router row with the mean of its expert's encoder rows, decoder rows and tokens, against the other experts': an AUC of 1 says that the
# own expert is always nearest, 0.5 that it is like any other, 0 that it is always farthest.

# %%
show("coupling")

# %% [markdown]
# ## What flips a route, and what do routes follow in text?
#
# Noise has 1 or 3 % of the activations' root mean square distance from their mean. The information that a token's expert gives on the next one's is
# held against routes shuffled within documents, and against routes shuffled among equal tokens, which keeps what follows from the words alone.

# %%
show("margins")

# %% [markdown]
# ## Does another seed find the same router?
#
# Experts of two seeds are matched one to one on half of the documents; the rest is scored on the others. No statement about what a router *is* can be
# more reproducible than the router.

# %%
show("stability")

# %% [markdown]
# ## What do its mistakes cost?
#
# Every token through every expert. The *oracle* takes the expert with the least error, which no router can know. What the oracle gains is *routing*;
# what is still missing to a dense SAE is *partition*: no other route to the same experts could repair it. Below, who can stand in for whom: the FVU
# of the tokens of expert e when forced through expert f.

# %%
costs = []
if [row for row in routed if row.config.get("sae.experts_per_token", 1) == 1]:
    costs = analyze("regret", saes, {"rows": SETTINGS["rows"]})
    figure = build_analysis("regret").draw(costs)
    display(Image(data=render(figure), width=100 * figure.get_figwidth()))
    lines = chosen(costs, part="split", measure=("regret", "routing", "partition", "routing_share"), at="gate")
    print(records_table(compact(lines)))
else:
    print("Regret is defined for one expert per token.")

# %% [markdown]
# ## Answer

# %%


def found(series, measure, against="", at=""):
    """A pooled record of a series, None where it has no value."""
    records = [r for r in table if series_of(r) == series and r["measure"] == measure and r["against"].startswith(against) and r["at"] == at]
    return pooled([r for r in records if "null" not in r["against"] or r["against"].endswith(("rotated", "random"))])


def said(record, name="null"):
    """0.22 against 0.11."""
    return f"{record['value']:.2f} against {record['null']:.2f} ({name})"


for series in dict.fromkeys(series_of(record) for record in table):
    sentences = []
    four, same = found(series, "R2 decoder", at=4), found(series, "R2 another seed", at=1)
    if (encoder := found(series, "R2 encoder", at=4)) and four:
        is_sum = encoder["value"] > encoder["null_high"]
        text = f"four dense encoder rows explain {said(encoder, 'rotated')} of a router row, four decoder rows {said(four, 'rotated')}"
        text += f", and of a dense latent of another seed {four['ceiling']:.2f}" if four["ceiling"] is not None else ""
        sentences.append(f"{text}: it is {'' if is_sum else 'not '}closer to a sparse sum of what a dense encoder reads than a random direction is")
    else:
        sentences.append("without a dense SAE nothing can be said about its features")
    if same:
        sentences.append(f"one router row of another seed explains {same['value']:.2f}")
    pairs = {size: [found(series, "accuracy", source, size) for source in ("dense latents", "components")] for size in (4, 8, 16)}
    size, (codes, components) = next((item for item in reversed(pairs.items()) if all(item[1])), (0, (None, None)))
    means, bigram = found(series, "accuracy", "nearest mean"), found(series, "accuracy", "bigram")
    if codes and components:
        text = f"{size} dense latents predict {codes['value']:.0%} of routes, {size} principal components {components['value']:.0%}"
        text += f", the nearest mean {means['value']:.0%}" if means else ""
        sentences.append(text + (f", the token with the one before it {bigram['value']:.0%}" if bigram else ""))
    if share := found(series, "share of x", "null random"):
        sentences.append(f"what it sees holds {share['value']:.0%} of the variance (random subspaces of that rank: {share['null']:.0%})")
    reads, writes = found(series, "AUC cosine encoder centred mean"), found(series, "AUC cosine decoder centred mean")
    if reads and writes:
        sentences.append(
            f"its rows tell their own expert's decoder from others' with AUC {writes['value']:.2f}, its encoder with {reads['value']:.2f}"
        )
    if agreement := found(series, "agreement"):
        sentences.append(f"matched experts of other seeds agree on {agreement['value']:.0%} of tokens (chance {agreement['null']:.0%})")
    else:
        sentences.append("with one seed nothing is known about how much of this recurs")
    lost = [
        record for record in chosen(costs, part="split", measure="regret", at="gate") if series_of(record) == series and record["value"] is not None
    ]
    if lost:
        regret = sum(record["value"] for record in lost) / len(lost)
        sentences.append(f"the best expert for every token would leave {regret / (1 + regret):.1%} less error than its routes (regret {regret:.3f})")
    print(f"{series}: " + "; ".join(sentences) + ".\n")
if not table:
    print("None of these SAEs has experts, so there is no router to describe. Give a Switch run.")
