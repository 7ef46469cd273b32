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
# # Which of these sparse autoencoders is better, and in what?
#
# Works on the folders of any finished runs. `make notebook` executes it on the two newest, `make notebook RUNS="runs/a runs/b"` on those you name.
# Or open it in Jupyter (with jupytext) or VS Code, set `RUNS` below, and run all cells.

# %%
import os
import warnings

from IPython.display import Image, display

from switch_sae.activations import SyntheticSource, build_source
from switch_sae.analysis.assignment import LARGEST
from switch_sae.analysis.features.neighbours import decoder_geometry
from switch_sae.analysis.recovery import recovery, recovery_scores
from switch_sae.analysis.text_examples import expert_tokens, format_example, sample_latents, top_examples
from switch_sae.config import config_from_plain
from switch_sae.evaluation import evaluate
from switch_sae.report import margins, render, table
from switch_sae.report.figures.single_runs import curves_figure, geometry_figure, load_figure, scores_figure
from switch_sae.report.tables import expert_tokens_table
from switch_sae.results import finished_runs, load_members, scored
from switch_sae.runs import RunDir

NAMED = os.environ.get("SWITCH_SAE_RUNS", "")  # folders, separated by os.pathsep
RUNS = [RunDir.open(path) for path in NAMED.split(os.pathsep)] if NAMED else finished_runs("runs")[:2]
EVALUATION_ROWS = 20_000  # held-out activations for the sections about tokens and text
LATENTS_PER_EXPERT = 2
EXAMPLES_PER_LATENT = 3

warnings.filterwarnings("ignore", message="IProgress not found")
assert RUNS, "there is no finished run in runs/: train one (make train), or set RUNS"


def show(figure):
    display(Image(data=render(figure), width=100 * figure.get_figwidth()))


# %% [markdown]
# ## What was measured
#
# All SAEs of one run saw the same activations in the same order, and are scored on the same held-out rows. Two controls are scored beside them:
# PCA (the best *linear* reconstruction from k numbers per token) and the main SAE before training.
#
# - **FVU**, the fraction of variance unexplained: squared error over the variance around the mean of the held-out rows. Rows whose norm exceeds
#   10 medians are left out, since a handful of them can make up most of the variance; where there are any, the table says how many and shows the
#   FVU of all rows beside it.
# - **delta CE**: by how many nats per token the language model's cross-entropy rises when reconstructions replace its activations; **KL** is the
#   divergence of its predictions from the original ones.
# - **Intervals** come from resampling documents. They say how far the numbers depend on which documents were held out. They do *not* hold the spread
#   over training seeds: for a claim about an architecture, train several seeds (`make sweep SEEDS=3`).
# - SAEs with more latents or more computation reconstruct better as a rule. Compare at equal width (`width_matched`) or at equal FLOPs per token
#   (`flop_matched`), and after equally many tokens; short runs favour narrow SAEs, which have fewer latents to train.

# %%
print(table(RUNS))

# %% [markdown]
# How far the main SAE's FVU lies below (-) or above (+) the others', in percent of theirs. All SAEs of a run share their held-out documents, so the
# interval in brackets is that of the ratio, and a star marks one that holds 0. Older runs have no such interval: there a star marks SAEs whose own
# intervals overlap, which is the more cautious test.

# %%
for run in RUNS:
    print(run.path.name, margins(run), sep="\n", end="\n\n")

# %%
rows = scored(RUNS)
show(scores_figure(rows))

# %% [markdown]
# ## Training
#
# These are numbers of single training batches, logged while training: good for seeing whether a run had converged, not for comparing final scores.
# A curve that still falls steeply at its end, the last fifth apart (where the learning rate decays), says that the ranking may change with more
# tokens.

# %%
show(curves_figure(RUNS, ("fvu", "loss/mse")))

# %% [markdown]
# ## How the router spreads tokens
#
# Each expert's share of the held-out rows, and the router's mean probability for it. Balance is trained for, so an even spread says that the
# load-balance loss works; it says nothing about whether experts specialise.

# %%
if any(row.num_experts > 1 and row.role != "control" for row in rows):
    show(load_figure(rows))
else:
    print("None of these SAEs has experts.")

# %% [markdown]
# ## Where decoders store a direction twice
#
# For each decoder row, the highest cosine to another row, within its own expert and in all others. An SAE whose experts learn the same latents again
# wastes width: those have a neighbour near cosine 1 in another expert.
#
# Other experts hold E - 1 times as many rows, so the nearest of them is closer by chance alone. The fair comparison is a dense SAE of the same
# width, cut into E arbitrary blocks: there a block means nothing. Latents that never fired are left out.

# %%
members = {run.path: load_members(run) for run in RUNS}
geometries, cut = {run.path: {} for run in RUNS}, {run.path: [] for run in RUNS}
for row in rows:
    if row.role not in ("main", "baseline"):
        continue
    main_experts = next(r for r in rows if r.path == row.path and r.role == "main").num_experts
    blocks = row.num_experts if row.num_experts > 1 or row.num_latents % main_experts else main_experts
    label = row.label if blocks == row.num_experts else f"{row.label}, cut into {blocks} blocks"
    cut[row.path] += [label] if blocks != row.num_experts else []
    geometries[row.path][label] = decoder_geometry(members[row.path][row.sae].decoder_weight(), blocks, row.firing_counts, row.num_shared)

for run in RUNS:
    show(geometry_figure(geometries[run.path], cut[run.path]))

# %%
print("Share of live latents with another row at cosine > 0.9, and of latents whose nearest row is in their own expert:")
for label, geometry in (item for run in RUNS for item in geometries[run.path].items()):
    shares = geometry.duplicate_shares(0.9)
    print(
        f"{label:45} any {shares['any']:6.2%}   within {shares['within']:6.2%}   across {shares['across']:6.2%}   nearest within "
        f"{geometry.same_expert_share():6.1%} (by chance {1 / geometry.cosine_ME.shape[1]:.1%})"
    )

# %% [markdown]
# ## Which directions a dense SAE finds too
#
# For each SAE beside the main one: the share of its directions that the main SAE also has (cosine > 0.7), and the mean cosine over one-to-one
# matches. Two dense SAEs that differ in the seed alone do not agree fully either, so a low share is not by itself a fault of routing. And all SAEs
# of a run start from one seed, those of equal width from the same decoder: after little training they agree because they have hardly moved.

# %%
for run in RUNS:
    (main, main_sae), *others = members[run.path].items()
    firing = {row.sae: row.firing_counts for row in rows if row.path == run.path}
    for name, sae in others:
        if min(main_sae.num_latents, sae.num_latents) > LARGEST:
            print(f"{run.path.name}: {name} is too large to match one to one (LARGEST)")
            continue
        match = recovery(main_sae.decoder_weight(), sae.decoder_weight()[firing[name] > 0], threshold=0.7, firing_counts=firing[main])
        print(f"{run.path.name}: {match.recall:6.1%} of the directions of {name} are in {main}; mean cosine of matches {match.mcc:.2f}")

# %% [markdown]
# ## What experts and latents respond to
#
# The first run's main SAE. With a language model: the tokens that each expert receives more often than its share, and the text that activates some
# latents most. With synthetic activations: whether the known dictionary and the known topics were found.

# %%
run = RUNS[0]
sae = next(iter(members[run.path].values()))
config = config_from_plain(run.read_json("config.json"))
source = build_source(config.source, config.batch_size)
evaluation = source.evaluation_set(EVALUATION_ROWS)
results = evaluate(sae, evaluation, bootstrap=0)
firing_counts = results.firing_counts
print(f"{len(evaluation.x_TD):,} held-out rows; {int((firing_counts > 0).sum()):,} of {sae.num_latents:,} latents of {rows[0].sae} fire on them")

# %% [markdown]
# ### Tokens by expert
#
# Each line: the expert's share of rows, then tokens by lift = P(expert | token) / P(expert), with P(expert | token) in percent. Only tokens on at
# least 20 rows. The router sees the activation, not the token, so a share well below 100 % means that context decides.

# %%
has_text = evaluation.tokens_CS is not None
if has_text and sae.num_experts > 1:
    decode = source.language_model.tokenizer.decode
    print(expert_tokens_table(expert_tokens(sae, evaluation, decode, top=12), results.vectors["expert_load"]))
else:
    print("Needs a language model and an SAE with experts.")

# %% [markdown]
# ### Text by latent
#
# Latents are drawn at random among those that fired on at least 10 rows, not picked: what you see is typical. One example per context, highest
# activation first, the token that activates the latent most in brackets. The top of a latent's range is its most flattering part; a latent that is
# clear here may be vague at lower activations.

# %%
if has_text:
    decode = source.language_model.tokenizer.decode
    chosen = sample_latents(firing_counts, sae.num_experts, LATENTS_PER_EXPERT if sae.num_experts > 1 else 16, num_shared=sae.num_shared)
    found = top_examples(sae, evaluation, [latent for latents in chosen for latent in latents], decode, EXAMPLES_PER_LATENT)
    for expert, latents in enumerate(chosen):
        for latent in latents:
            print(f"expert {expert}, latent {latent}, fires on {firing_counts[latent] / len(evaluation.x_TD):.2%} of rows")
            for example in found[latent]:
                print("  " + format_example(example))
else:
    print("These activations have no text.")

# %% [markdown]
# ### Recovery of a known dictionary
#
# Synthetic activations only. **MCC**: mean cosine after matching latents with true directions one to one. **Recall**: share of true directions that
# some latent has (cosine > 0.9), for directions common to all topics and for those of single topics. **NMI** of the routed expert and the true
# topic: 1 when experts are topics, near 0 when they have nothing to do with each other.

# %%
if isinstance(source, SyntheticSource):
    for name, member in members[run.path].items():
        scores = {score: "-" if value is None else f"{value:.2f}" for score, value in recovery_scores(member, source, evaluation.rows).items()}
        recalls = "   ".join(f"{score.replace('_', ' of ')} {value}" for score, value in scores.items() if score.startswith("recall"))
        print(f"{name:15} MCC {scores['mcc']}   {recalls}   NMI of experts and topics {scores['nmi']}")
else:
    print("The true dictionary of a language model's activations is not known.")

# %%
source.close()

# %% [markdown]
# ## Answer

# %%
for run in RUNS:
    own = [row for row in rows if row.path == run.path and row.role in ("main", "baseline") and row.value("fvu_inliers") is not None]
    main, best = own[0], min(own, key=lambda row: row.value("fvu_inliers"))
    said = [f"In {run.path.name}, {best.label or best.sae} has the least error of {len(own)} trained SAEs (FVU {best.value('fvu_inliers'):.4f})"]
    for row in own[1:]:
        change = main.value("fvu_inliers") / row.value("fvu_inliers") - 1
        said.append(f"{main.label or main.sae} leaves {abs(change):.1%} {'more' if change > 0 else 'less'} than {row.label or row.sae}")
    said.append(f"{main.value('dead_latents'):.1%} of its latents are dead")
    if (spread := main.value("load_cv")) is not None:
        said.append(f"the load of its experts varies by {spread:.2f} of the mean")
    print("; ".join(said) + ". One run of each: train several seeds before it is a claim about architectures.\n")
