"""Writes tests/results/README.md: all tables, from the files NAME.json beside it.

    python tests/tables.py                   write the page
    python tests/tables.py --keep RUN NAME   write what 05_evaluate.py measured of RUN as NAME.json;
                                             again/NAME: of a seed that is in the tables already
    python tests/tables.py --glance          print the table of the project's README
"""
import importlib
import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import BOXES, BRANCHES  # noqa: E402

evaluate = importlib.import_module("05_evaluate")
train = importlib.import_module("02_train_joint")
PAPER, cell, number, table = evaluate.PAPER, evaluate.cell, evaluate.number, evaluate.table
RESULTS = ROOT / "tests" / "results"
MORE = [("fusion, own-class weights only", "fusion-own", *[None] * 4),
        ("black box, 1D, 71", "blackbox-1d", None, .9219, None, None)]
ABLATED = "fusion", "fusion-own", *BRANCHES
DIGITS = {"dead": 0, "purity lift": 1, "pieces for 95 %": 1}
COURSE = [  # what, prediction, width, settings that are not the recipe's
    ("rhythm branch", "rhythm", 32, ()), ("rhythm branch", "rhythm", 32, ("epochs 30",)),
    ("black box", "blackbox-rhythm", 32, ())]
HEAD = """# All results

Written by `python tests/tables.py` from `tests/results/*.json`. Macro-AUROC on the 2,198 records of
fold 10; in brackets 95 % intervals over test patients. A bootstrap of fewer than 10 positives gives
intervals that are too short: those of such a label are drawn from the positives of all labels of
its branch. In simulations intervals over 71 labels then cover what they claim (a slow test of
tests/test_05_evaluate.py); those of the rhythm branch are too wide, those of the global branch too
narrow. Whether a difference is one is judged by the labels with 10 or more positives; the value
over all labels stands beside. With several seeds: mean ± standard deviation over seeds, and the
mean of their intervals' ends.

Fold 10 is not untouched: most settings of the default recipe were tried in runs whose results on it
were seen too, and it was read for recipes before this one; a first full run of the authors'
settings led to another start and other class weights, those of the authors' code. Epoch, L1
strength and thresholds are chosen on fold 9 alone.

The run of the paper recipe has two rounds of rhythm and global and the first of morphology, whose
second was stopped after 40 epochs, still rising, at .8972 on fold 9 (the first has .9120). Its
epochs and minutes are those of the last round. Many of its prototypes become the same ECG once
projected (rhythm, global), or lie so far from every ECG that projection ruins Stage 1's classifier
(morphology) until Stage 3 fits another; for rhythm Stage 3's is the worse one. A mean over batches
gives rare labels little weight, and hides that this run is worse on them (morphology, global). Not
tested: one branch for all labels; the authors' settings without the contrastive loss; black boxes
but for those shown (in our recipe the 2D one is the 1D one); clinicians.

Of the default recipe: without the contrastive loss seeds 43 and 44 have rhythm and morphology
alone. On labels that are not rare projection costs the fusion little, and own-class weights more;
over all labels no cost of projection is shown. "Unprojected" is at the L1 strength that was chosen
for projected prototypes. Cutting out the windows that a prototype of the morphology branch matches
costs far more than a cut elsewhere. In the global branch the ten records that are most like a
prototype of DIG do not carry it."""


def load_runs():
    """The saved runs of each recipe, those with the fewest changes of settings first."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(runs, key=lambda r: (r["recipe"], len(changed(r)), changed(r),
                                       not r["contrastive"], r["seed"]))


def changed(run):
    """What settings of a run are not its recipe's, but for seed and contrastive loss."""
    base = common.RECIPES[run["recipe"]]
    if not run["contrastive"]:
        base = replace(base, **train.WITHOUT[run["recipe"]])
    usual = json.loads(json.dumps(asdict(base)))
    usual.update(seed=run["seed"])
    config = run["config"]
    found = [f"{k} {v}" for k, v in config.items() if v != usual.get(k, v)]
    for name in [n for n in run["trained"] if n not in BOXES]:
        own = run["trained"][name].get("config", config).items()
        found += [f"{k} {v} ({name})" for k, v in own if v != config[k]
                  and (k != "patience" or v < config["epochs"])]  # else it never ends a training
    return tuple(found)


def pooled(runs, name, contrastive=None, key="auroc", note=True):
    """A cell for runs that differ in seed; "per batch" and "fold 9" have no interval. contrastive
    None takes runs with and without that loss; a note says of how many seeds it is."""
    by_seed = {r["seed"]: r["predictions"][name][key] for r in runs
               if name in r["predictions"] and contrastive in (None, r["contrastive"])}
    if not by_seed:
        return "not run"
    if len(by_seed) == 1:
        [(seed, v)] = by_seed.items()
        text = cell(v) if key == "auroc" else number(v)
        several = len({r["seed"] for r in runs}) > 1
        return f"{text} (seed {seed})" if note and several else text
    values = np.array([*by_seed.values()], float).reshape(len(by_seed), -1)
    mean = [number(v) for v in values.mean(0)]
    text = f"{mean[0]} ± {number(values[:, 0].std(ddof=1))}"
    text += f" ({len(by_seed)} seeds)" if note else ""
    return f"{text} [{mean[1]}, {mean[2]}]" if key == "auroc" else text


def glance(runs):
    """The README's table: the paper, its authors' settings and ours, by both measures."""
    ours = [r for r in runs if r["recipe"] == "default" and r["width"] == 32
            and r["contrastive"] and not changed(r)]
    paper = [r for r in runs if r["recipe"] == "paper" and r["contrastive"]]
    rows = []
    for what, name, _, on, *_ in PAPER + MORE:
        if not name.startswith("all-"):
            batch, whole = (pooled(paper, name, key=key) for key in ("per batch", "auroc"))
            rows.append([what, on, batch, pooled(ours, name, key="per batch", note=False),
                         whole.split(" [")[0], pooled(ours, name, note=False)])
    return table(["macro-AUROC, fold 10", "paper*", "authors' settings*", "ours*",
                  "authors' settings", "ours [95 %]"], rows)


def recipes_table(recipes):
    """Recipes {what: runs} as they are side by side, by both measures."""
    heads, rows = [], []
    for what, runs in recipes.items():
        seeds = {r["seed"] for r in runs if r["contrastive"]}
        only = f", seed {min(seeds)}" if len(seeds) == 1 else ""
        heads.append(what.replace(" recipe", "") + only)
    for what, name, _, on, *_ in PAPER + MORE:
        loss = None if name in BOXES else True
        rows.append([what, on, *(pooled(runs, name, loss, key) for key in ("per batch", "auroc")
                                 for runs in recipes.values())])
    return table(["macro-AUROC", "paper*", *(f"{head}*" for head in heads), *heads], rows)


def paper_table(runs, key="auroc"):
    """Tables 1 and 2 beside runs that differ in seed and contrastive loss."""
    rows = []
    for what, name, off, on, box, box_auroc in PAPER:
        without, with_, ours = (pooled(runs, *some, key) for some in (
            (name, False), (name, True), (box, None)))
        rows.append([what, off, without, on, with_, box_auroc, ours if box else None])
    return table(["macro-AUROC", "no contrastive: paper*", "here", "contrastive: paper*", "here",
                  "black box: paper*", "here"], rows)


def paired_table(runs):
    """Paired differences of runs that differ in seed, a column each, and what they say; or []."""
    seeds, found, rows = sorted({r["seed"] for r in runs}), {}, []
    for r in runs:
        for question, pairs in r["differences"].items():
            for pair, (frequent, every) in pairs.items():
                if frequent[3]:
                    found.setdefault((question, pair), {})[r["seed"]] = frequent, every
    for (question, pair), v in found.items():
        answers = dict.fromkeys(evaluate.answer(v[seed][0]) for seed in seeds if seed in v)
        values = [cell(v[seed][i][:3], "+") if seed in v else None for i in (0, 1) for seed in seeds]
        rows.append([question, pair, *values, " / ".join(answers)])
    heads = [f"{labels}, seed {s}" for labels in ("10+ positives", "all labels") for s in seeds]
    found = table(["question", "difference", *heads, "is the first better?"], rows)
    return ["Paired differences on the test set:", found] if rows else []


def training_table(runs):
    """How each model of runs was trained."""
    rows = []
    for r in runs:
        loss = "" if r["contrastive"] else ", no contrastive"
        for name, t in r["trained"].items():
            rows.append([f"{name}, seed {r['seed']}{loss}", t["round"], t["epochs"],
                         t["best_epoch"], t["val_auroc"], f"{t['seconds'] / 60:.0f}",
                         t["threads"], t["hardware"]])
    return table(["model", "round", "epochs", "epoch kept", "its fold 9", "minutes", "threads",
                  "hardware"], rows)


def minutes(runs, models):
    """Minutes of Stage 1 of `models` on one core: the sum of their means over runs."""
    spent = [[r["trained"][m]["seconds"] * r["trained"][m]["threads"] / 60
              for r in runs if m in r["trained"]] for m in models]
    return f"{sum(np.mean(each) for each in spent if each):.0f}" if any(spent) else None


def curves_of(run):
    """The training curves of a run, where 05's picture of them was kept."""
    name = f"{run['recipe']}-training.png"
    found = (RESULTS / name).is_file()
    return [f"![Training of the {run['recipe']} recipe]({name})"] if found else []


def against_table(runs):
    """Ablations that were compared, record by record, with the default recipe."""
    rows = []
    for r in runs:
        pairs = r["differences"].get("Against default", {}).items()
        rows += [[", ".join(changed(r)), pair, cell(frequent[:3], "+"), cell(every[:3], "+"),
                  evaluate.answer(frequent)] for pair, (frequent, every) in pairs if frequent[3]]
    return table(["setting", "difference", "10+ positives", "all labels", "is the first better?"],
                 rows)


def measures_table(measured):
    """Measures of interpretability {run: {model: {measure: value}}}, the models in one cell."""
    models = [each for found in measured.values() for each in found.values()]
    rows = {k.split(", c")[0]: [k.split(", c")[0]] for each in models for k in each}
    for found, (k, row) in itertools.product(measured.values(), rows.items()):
        cells = [measure_cell(k, found[m]) for m in (*BRANCHES, "fusion") if m in found]
        known = [c for c in cells if c != "–"]
        row.append(" / ".join(cells if len(known) > 1 else known) or "–")
    return table(["", *measured], rows.values())


def measure_cell(k, found):
    """One measure of one model; of a drop both cuts, and their ratio."""
    v, cut, control = (found.get(name) for name in (k, f"{k}, cut", f"{k}, control"))
    if cut is not None:
        times = f" ({cut / control:.1f} times)" if min(cut, control) > 0 else ""
        return f"{number(cut)}, elsewhere {number(control)}{times}"
    return f"{v:.{DIGITS[k]}f}" if k in DIGITS and v is not None else number(v)


def pieces_section():
    """What few pieces of evidence cost, from what tests/pieces.py wrote."""
    path = RESULTS / "pieces.csv"
    if not path.is_file():
        return []
    found = pd.read_csv(path, comment="#")
    rows = [[f"{run}, fold {fold}", what, f"{r['strength']:g}", r["auroc"],
             f"{r['pieces for 95 %']:.1f}", r["three largest"], r["negative evidence"]]
            for (run, fold), part in found.groupby(["run", "fold"])
            for what, r in (("chosen", part[part["chosen"]].iloc[0]),
                            ("weakest", part.loc[part["strength"].idxmin()]))]
    shared = [line[2:] for line in path.read_text().splitlines() if line[0] == "#"]
    return ["## Few pieces of evidence", "What the L1 strength of Eq. (10) does to the fusion, by "
            "`python tests/pieces.py` ([all numbers](pieces.csv)): the strength that 04 chose, and "
            "the weakest tried.", table(
                ["run", "L1", "strength", "macro-AUROC", "pieces for 95 %", "three largest",
                 "negative evidence"], rows),
            "![AUROC over pieces](pieces.png)\n\nOf the (label, class) pairs with a weight "
            f"in one of two seeds, so many have it in both: {'; '.join(shared)}."]


def course_table(runs):
    """The branch of the course and its black box on the 16 rhythm labels."""
    rows = []
    for what, name, width, changes in COURSE:
        some = [r for r in runs if r["recipe"] == "default" and r["contrastive"]
                and r["width"] == width and changed(r) == changes and name in r["predictions"]]
        rows.append([", ".join([what, *changes]), minutes(some, [name]), *(
            pooled(some, name, key=key) for key in ("auroc", "per batch"))])
    rows.append(["the paper's rhythm branch", None, None, PAPER[0][3]])
    return table(["model", "core minutes", "macro-AUROC, 16 labels", "mean over batches of 32"],
                 rows)


def again_section(runs):
    """Runs of one setting and seed with other threads, or on other machines."""
    rows = []
    for path in sorted((RESULTS / "again").glob("*.json")):
        second = json.loads(path.read_text())
        for r in (next(r for r in runs if r["config"] == second["config"]), second):
            trained = [r["trained"][b] for b in BRANCHES]
            rows.append([f"{r['recipe']}, seed {r['seed']}", trained[0]["hardware"],
                         trained[0]["threads"], f"{sum(t['seconds'] for t in trained) / 60:.0f}",
                         *(pooled([r], name) for name in ABLATED)])
    return ["## The same seed again", "One seed, trained twice; the order of sums differs, and "
            "training makes it grow. Minutes: of Stage 1; more threads than one had an idle machine.",
            table(["run", "hardware", "threads", "minutes", *ABLATED], rows)] if rows else []


def recipe_section(what, runs):
    """All tables of runs that differ in seed and contrastive loss."""
    first = runs[0]
    same = [r for r in runs if r["contrastive"] == first["contrastive"]]
    return [f"## {what[0].upper()}{what[1:]}",
            paper_table(runs), "\\* by the authors' measure, the mean over batches of 32. By it:",
            paper_table(runs, "per batch"),
            f"The cost of interpretability, seed {first['seed']} (macro-AUROC on the test set):",
            evaluate.cost_table(first),
            "Stage 1, of the last round (its fold 9: by Stage 1's own classifier):",
            training_table(runs), *curves_of(first), *paired_table(same)]


def page():
    """The text of tests/results/README.md."""
    same, recipes, sections, ablations, measured = {}, {}, [], [], {}
    for r in load_runs():
        width = common.RECIPES[r["recipe"]].width
        what, changes = f"{r['recipe']} recipe, width {width}", ", ".join(changed(r))
        same.setdefault((what, changes), []).append(r)
    for (what, changes), some in same.items():
        main = (what, changes) == next(key for key in same if key[0] == what)  # fewest changes
        sections += recipe_section(f"{what} ({changes or 'as it is'})", some) if main else []
        recipes.update({} if changes else {what: some})
        for contrastive, loss in ((True, ""), (False, ", no contrastive")):
            those = [r for r in some if r["contrastive"] == contrastive]
            named = {f"{what}: {changes or 'as it is'}{loss}": those}
            if len(those) > 1 and not changes:  # to compare an ablation, of one seed, with
                named[f"{what}: as it is{loss}, seed {those[0]['seed']}"] = those[:1]
            for setting, each in named.items():
                kept = [" / ".join(str(r["trained"][b]["best_epoch"]) for b in BRANCHES
                                   if b in r["trained"]) for r in each]
                ablations += [[setting, "; ".join(kept), minutes(each, BRANCHES), *(
                    pooled(each, name, None, key) for name in ABLATED
                    for key in ("fold 9", "auroc"))]] if each else []
            found = [r for r in those if main and r.get("interpretability", {}).get("")]
            if found:  # of the first seed
                how = f"{what} (changed)" if changes else what
                measured[f"{how}{loss}, seed {found[0]['seed']}"] = found[0]["interpretability"][""]
    return "\n\n".join([
        HEAD, "## At a glance", recipes_table(recipes),
        "\\* by the authors' measure, the mean over batches of 32 test records.", *sections,
        "## Ablations",
        "One seed, unless several are named: differences may be chance, most of all in the global "
        "branch. Some rows are of one branch alone. Epochs kept: of rhythm / morphology / global. "
        "Core minutes: of their last round. tie none: Stages 2 and 3 alone, on the networks of the run "
        "that is paired below.",
        table(["setting", "epochs kept", "core minutes",
               *(f"{n}, fold {k}" for n in ABLATED for k in (9, 10))], ablations),
        "Paired with the second training of the default recipe's seed 42 (\"The same seed again\"):",
        against_table(load_runs()),
        "## Interpretability", measures_table(measured), "Of rhythm / morphology / global / fusion, or"
        " of morphology alone; `tests/faithfulness.py` says what each measure is. Similarities of the"
        " authors' settings are times a.",
        *again_section(load_runs()), *pieces_section(),
        "## Course: the rhythm branch", course_table(load_runs())]) + "\n"


def keep(run, name):
    """Write RUN/metrics.json without its classes as tests/results/NAME.json, beside what
    faithfulness.py wrote there."""
    path, m = RESULTS / f"{name}.json", json.loads((Path(run) / "metrics.json").read_text())
    old = json.loads(path.read_text()) if path.is_file() else {}
    measured = {k: old[k] for k in ("interpretability",) if k in old}
    common.save(path, {**{k: v for k, v in m.items() if k != "per_class"}, **measured})


def main():
    if "--glance" in sys.argv:
        return print(glance(load_runs()))
    if "--keep" in sys.argv:
        return keep(*sys.argv[-2:])
    common.save(RESULTS / "README.md", page())
    print(f"{RESULTS / 'README.md'} written")


if __name__ == "__main__":
    main()
