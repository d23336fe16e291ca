"""Stage 05, evaluation (paper 4.1-4.3, Tables 1 and 2): macro-AUROC on the whole of fold 10.

How good every prediction of 04 is and how sure that is (bootstrap of test patients, the same draws
for all, so that differences are paired), what each step towards interpretability cost, and the
paper's numbers beside ours.

reads   PREP/*.npy, preprocess.json; RUN/classifiers/*.pt; RUN/MODEL/prototypes.json, log.jsonl;
        RUN/cases/*.json and their pages
writes  RUN/metrics.json (every number); results.md, results.html and figures/*.png, made from it

    python 05_evaluate.py                        all predictions of the run
    python 05_evaluate.py --against runs/plain   also paired differences to another run; one without
                                                 contrastive loss fills that column of the tables
    python 05_evaluate.py --save NAME            also keep the numbers as tests/results/NAME.json
    python 05_evaluate.py --ratings A.json B.json    only Table 3, from what 06's page exported

Takes half a minute on 2 CPU cores.
Last line: `runs/default: fusion .9321 [.9250, .9390] over 71 classes -> runs/default/results.md`.
"""
import base64
import html
import io
import itertools
import json
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, cohen_kappa_score, f1_score
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import common
from common import BRANCHES, CODES, GROUPS, MODELS, columns

warnings.filterwarnings("ignore", category=RuntimeWarning)  # NaN: no such class here
DRAWS, SEED = 1000, 42  # of the bootstrap
BATCH, RARE = 32, 10  # the authors' batch; a class with fewer test positives is rare
STEPS = "-joint", "-projected", "-unprojected"  # predictions on the way to a final one
ORDER = ["fusion", "fusion-own", "macro", *MODELS, "blackbox-macro"]
SETS = {b: GROUPS[b] for b in BRANCHES}
PAPER = [  # Tables 1 and 2: setting, prediction, without and with contrastive loss, black box
    ("rhythm branch, 16 labels", "rhythm", .8730, .8758, "blackbox-rhythm", None),
    ("morphology branch, 52", "morphology", .9023, .9056, "blackbox-morphology", None),
    ("global branch, 3", "global", .7461, .8606, "blackbox-global", None),
    ("one branch, 1D, 71", "all-1d", .8462, .8794, "blackbox-1d", .9219),
    ("one branch, 2D partial, 71", "all-partial", .9031, .9137, None, None),
    ("one branch, 2D global, 71", "all-global", .8719, .8983, "blackbox-2d", .9060),
    ("macro aggregation, 71", "macro", .8918, .9048, "blackbox-macro", .9052),
    ("fusion classifier, 71", "fusion", .9010, .9248, None, None),
]
PAIRS = {  # paired differences, first - second, by the question that they answer
    "Do three branches beat one? (4.1)": [
        ("fusion", m) for m in ("all-1d", "all-partial", "all-global", *BRANCHES)],
    "Does the fusion beat each label from its own branch? (4.1)": [("fusion", "macro")],
    "As good as a black box? (4.3)": [
        *((name, box) for _, name, _, _, box, _ in PAPER if box),
        *((m, "blackbox-1d") for m in (*BRANCHES, "fusion", "fusion-own")),
        ("fusion", "blackbox-macro")],
    "Cost of projection, and of own-class weights alone (3.5)": [
        *((m, f"{m}-unprojected") for m in ("fusion", "fusion-own", *MODELS)),
        ("fusion-own", "fusion")],
}


# ---- Numbers. AUROCs are [1 + draws, 71]: row 0 of the test set as it is; NaN: no such class

def patient_weights(patient_ids, draws, seed):
    """How often each record counts: patient_ids [N] -> [N, 1 + draws]; in column 0 once. A draw
    takes as many patients as there are, with replacement, with all of their records."""
    patients, patient = np.unique(patient_ids, return_inverse=True)
    rng, n = np.random.default_rng(seed), len(patients)
    counts = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws)]
    return np.stack([np.ones(n), *counts], 1)[patient].astype(np.float32)


def weighted_auroc(y, score, weights):
    """AUROC of one class in every draw: y, score [N], weights [N, D] -> [D].

    Mann-Whitney: over all pairs of a positive and a negative +1 if in order, -1 if not, 0 if tied.
    The pairs are compared once for all draws; sums of whole weights are exact in float32.
    """
    positive, negative = weights[y > 0], weights[y == 0]
    order = np.sign(score[y > 0, None] - score[None, y == 0])
    right = positive * (order.astype(weights.dtype) @ negative)
    pairs = positive.sum(0, dtype=np.float64) * negative.sum(0, dtype=np.float64)
    return 0.5 + 0.5 * right.sum(0, dtype=np.float64) / pairs


def rounded(v):
    """A number as JSON takes it: five digits, None for NaN."""
    return round(float(v), 5) if np.isfinite(v) else None


def macro(aurocs, codes, lowest=0):
    """Macro mean over `codes` of AUROCs [1 + draws, 71], or of differences, whose `lowest` is -1:
    [value, lower and upper end of the 95 % interval, classes in the mean, codes].

    A draw seldom has every rare class, and the mean of those that it has is another quantity. So
    the ends are the value moved by as much as the mean of a draw's classes moves from the mean of
    their values, on the scale of atanh, which no interval leaves.
    """
    def stretched(v):  # [lowest, 1] -> the whole line
        return np.arctanh((1 - 1e-9) * (2 * v - 1 - lowest) / (1 - lowest))

    each = aurocs[:, columns(codes)]
    value = np.nanmean(each[0])
    values = np.where(np.isnan(each[1:]), np.nan, each[0])  # of the classes of each draw
    moves = stretched(np.nanmean(each[1:], 1)) - stretched(np.nanmean(values, 1))
    ends = np.tanh(stretched(value) + np.nanpercentile(moves, [2.5, 97.5]))
    ends = (ends * (1 - lowest) + 1 + lowest) / 2
    return [rounded(value), *map(rounded, ends), int(np.isfinite(each[0]).sum()), len(codes)]


def per_batch_auroc(y, score):
    """What the authors log, y, score [N, C]: the mean over batches of the macro-AUROC over the
    classes with both a positive and a negative in the batch, which is seldom a rare one."""
    batches = [slice(i, i + BATCH) for i in range(0, len(y), BATCH)]
    return np.nanmean([common.macro_auroc(y[b], score[b]) for b in batches])


def numbers_of(p, aurocs, prep, codes):
    """All numbers of a prediction over `codes`, and those of each of its classes: [AUROC, lower
    and upper end, AUPRC, F1, threshold on the logit]."""
    y = prep.labels[prep.test] > 0  # [N, 71]
    auprc, f1 = np.full((2, len(CODES)), np.nan)
    per_class = {}
    for i, c, threshold in zip(columns(p.classes), p.classes, p.thresholds):
        if y[:, i].any():
            auprc[i] = average_precision_score(y[:, i], p.test[:, i])
            f1[i] = f1_score(y[:, i], p.test[:, i] >= threshold)
        more = map(rounded, (auprc[i], f1[i], threshold))
        per_class[c] = [*macro(aurocs, [c])[:3], *more]
    by_id = np.argsort(prep.ecg_ids[prep.test], kind="stable")
    frequent = [c for c in codes if y[:, CODES.index(c)].sum() >= RARE]
    return {
        "auroc": macro(aurocs, codes),
        "groups": {group: macro(aurocs, some) for group, some in SETS.items()},
        "frequent": macro(aurocs, frequent),
        "auprc": rounded(np.nanmean(auprc)),
        "f1": rounded(np.nanmean(f1)),
        "fold 9": rounded(common.macro_auroc(prep.labels[prep.val], p.val)),
        "per batch": rounded(per_batch_auroc(y[by_id], p.test[by_id])),
    }, per_class


# ---- A run

def load_predictions(run, prep, args):
    """{name: what 04 says of it} of the predictions of a run, with thresholds [C] and logits val
    and test [., 71], NaN for labels that it does not model; final ones first, in ORDER."""
    place = SimpleNamespace(run=run, prep=args.prep)
    on_test, found = prep.test[prep.val | prep.test], {}
    for path in sorted((run / "classifiers").glob("*.pt")):
        model = re.sub("-(joint|projected|unprojected)$", "", path.stem)
        if args.model and model not in args.model:
            continue
        saved = common.load(path, "04_fusion.py", place)
        logits, thresholds = saved["logits"].numpy(), saved["thresholds"].numpy()
        found[path.stem] = SimpleNamespace(
            **saved["meta"], thresholds=thresholds, val=logits[~on_test], test=logits[on_test])
    if all(name.endswith(STEPS) for name in found):
        sys.exit(f"{run} has no such predictions: run 04_fusion.py first")
    order = [*ORDER, *found]
    return {name: found[name] for name in sorted(found, key=order.index)}


def join_other(found, prep, args):
    """Let the predictions of --against join `found` as "NAME of RUN2". Returns what to compare,
    and {RUN2: has it the contrastive loss?} if the runs differ in the loss's lambdas alone."""
    run_2 = args.against.name
    theirs = load_predictions(args.against, prep, args)
    a, b = (next(iter(some.values())).config for some in (found, theirs))
    pairs = [(n, f"{n} of {run_2}") for n in theirs if n in found and not n.endswith(STEPS)]
    found.update({name: theirs[n] for n, name in pairs})
    loss, loss_2 = a["lambda_cntrst"] != 0, b["lambda_cntrst"] != 0
    if loss == loss_2 or any(a[k] != b[k] and not k.startswith("lambda_") for k in a):
        return {f"Against {run_2}": pairs}, {}
    question = "Does the contrastive loss help? (4.2)" if loss else f"Against {run_2}"
    return {question: pairs}, {run_2: loss_2}


def cost_of(name, p, aurocs, args):
    """What interpretability cost: the AUROC of each step, and how much there is to read."""
    steps = {"sparse": name, **{step: name + step for step in STEPS}}
    for box in ("blackbox-1d", f"blackbox-{name}"):  # the last that there is
        if box in aurocs:
            steps["black box"] = box
    row = {key: macro(aurocs[n], p.classes)[0] for key, n in steps.items() if n in aurocs}
    paths = [args.run / branch / "prototypes.json" for branch in p.branches]
    parts = [common.load(path, "03_project.py", args) for path in paths]
    count = [len(part["prototypes"]) for part in parts]
    gap = np.average([part["gap"] for part in parts], weights=count)
    distinct = sum(part["distinct"] for part in parts)
    return {"name": name, **row, "nonzero": p.nonzero, "weights": p.weights, "gap": rounded(gap),
            "prototypes": sum(count), "distinct": distinct}


def measure(args, prep):
    """All numbers of a run, as they stand in metrics.json."""
    found, pairs, against = load_predictions(args.run, prep, args), dict(PAIRS), {}
    inputs = [(args.run / f"classifiers/{n}.pt", vars(p)) for n, p in found.items()]
    made = common.provenance(args, *inputs)
    own = [n for n in found if not n.endswith(STEPS)]
    if args.against:
        more, against = join_other(found, prep, args)
        pairs.update(more)
    y, patients = prep.labels[prep.test], prep.patient_ids[prep.test]
    weights = patient_weights(patients, DRAWS, SEED)  # the same for all
    aurocs = {n: np.full((1 + DRAWS, len(CODES)), np.nan) for n in found}
    with threadpool_limits(1):  # many small products: on a busy machine threads would wait
        for name in tqdm(found, "bootstrap", leave=False, disable=None):
            for c in columns(found[name].classes):
                aurocs[name][:, c] = weighted_auroc(y[:, c], found[name].test[:, c], weights)

    predictions, per_class, differences, trained, shown = {}, {}, {}, {}, {}
    for name in [*own, *(n for n in found if " of " in n)]:
        model = name.partition(" of ")[0]
        codes = GROUPS[MODELS[model][1]] if model in MODELS else CODES
        predictions[name], per_class[name] = numbers_of(found[name], aurocs[name], prep, codes)
    for question, some in pairs.items():
        for a, b in some:
            if a in found and b in found:
                rows = differences.setdefault(question, {})
                rows[f"{a} - {b}"] = macro(aurocs[a] - aurocs[b], CODES, -1)
    for name in own:
        trained.update(found[name].trained)
        for group in BRANCHES:  # the first that has a group's labels stands for it
            if set(GROUPS[group]) & set(found[name].classes):
                shown.setdefault(group, name)
        if name.startswith("blackbox"):
            shown.setdefault("black box", name)
    config = found[own[0]].config
    return {
        **made, "commands": made["commands"][:-1], "run": args.run.name, "config": config,
        "data": prep.info["data"],
        **{k: config[k] for k in ("recipe", "seed", "width")},
        "contrastive": config["lambda_cntrst"] != 0, "against": against, "trained": trained,
        "counts": {**prep.info["sizes"], "test_patients": len(np.unique(patients)),
                   "test_positives": dict(zip(CODES, y.sum(0).tolist()))},
        "left_out": prep.info["without_training_record"], "rule": RULE.format(DRAWS),
        "predictions": predictions, "differences": differences,
        "cost": [cost_of(n, found[n], aurocs, args) for n in own if found[n].branches],
        "shown": shown, "per_class": per_class}


# ---- results.md, all of it made from metrics.json

RULE = ("Intervals: 95 % percentiles of {:,} bootstrap draws by patient, the same for all; a draw "
        "moves a macro mean, on the scale of atanh, by what it moves that of the classes it has.")
REPORT = """# {mark}Results of {run}

Recipe {recipe}, seed {seed}, width {width}, {loss} contrastive loss. {counts[test]:,} test
records (the paper: 2,198) of {counts[test_patients]:,} patients.

## Headline
{headline}

Macro-AUROC of the logits on the whole of fold 10 at once. {rule} {rare}+ positives: over the
classes with {rare} or more in fold 10. F1: at the logit with the best F1 on fold 9, or at 0
for labels that are rare there. Fold 9: the fold that all choices were made on. Per batch: what the
authors' code measures, the mean over batches of the AUROC over the classes that a batch has.

## The paper's Tables 1 and 2
{papers}

## The cost of interpretability
{costs}

Macro-AUROC on the model's labels: after Stage 1; after projection, with Stage 1's head; of
Stage 3's classifier on the prototypes before and after projection; of a black box. Gap: mean of
1 - cosine of a prototype and the patch that it became. Distinct: different patches in a class.

## Training
{training}

## Label groups
{groups}

## Paired differences
{paired}

## Classes
{classes}

Fewer than {rare} positives in fold 10, so that their intervals say little: {few}. Not
modelled, without a training record: {missing}.
"""


def number(v, sign=""):
    """.9321 as the paper prints it, +.0012 or -.0000 with sign "+", a dash for None."""
    return "–" if v is None else re.sub(r"^([+-]?)0", r"\1", f"{v:{sign or 'z'}.4f}")


def cell(v, sign=""):
    """[value, low, high, classes in it, codes] -> .9321 [.9250, .9390] (over 68 of 71)."""
    if v[0] is None:
        return "–"
    value, low, high = (number(x, sign) for x in v[:3])
    some = f" (over {v[3]} of {v[4]})" if v[3:] and v[3] < v[4] else ""
    return f"{value} [{low}, {high}]{some}"


def table(head, rows):
    """A markdown table, padded for the terminal."""
    rows = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    padded = [[c.ljust(w) for c, w in zip(row, widths)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def results(head, rows):
    """A table with floats as `number` and lists as `cell`."""
    show = {float: number, list: cell, type(None): number}
    return table(head, [[show.get(type(c), str)(c) for c in row] for row in rows])


def headline(m):
    """The table that the terminal shows too: every final prediction of the run."""
    keys, rows = ("auprc", "f1", "fold 9", "per batch"), []
    for name, p in m["predictions"].items():
        rows.append([name, p["auroc"], p["frequent"][0], *map(p.get, keys)])
    return results(["prediction", "macro-AUROC [95 %]", f"{RARE}+ positives", "AUPRC", "F1",
                    "fold 9", f"per batch of {BATCH}"], rows)


def paper_table(m):
    """The paper's Tables 1 and 2 with ours beside, for what the run has."""
    suffix = {on: f" of {run}" for run, on in m["against"].items()} | {m["contrastive"]: ""}
    rows, found = [], m["predictions"]

    def ours(name, contrastive):
        p = found.get(f"{name}{suffix.get(contrastive)}")
        return p["auroc"] if p else "not run"

    for setting, name, off, on, box, box_auroc in PAPER:
        if name in found or box in found:
            own_box = ours(box, m["contrastive"]) if box else None
            rows.append([setting, off, ours(name, False), on, ours(name, True), box_auroc, own_box])
    return results(["macro-AUROC", "no contrastive: paper", "ours", "contrastive: paper", "ours",
                    "black box: paper", "ours"], rows)


def cost_table(m):
    """What each step towards interpretability cost, and how much there is to read."""
    keys, rows = [*STEPS, "sparse", "black box", "gap", "prototypes", "distinct"], []
    for r in m["cost"]:
        share = f"{r['nonzero']} ({r['nonzero'] / r['weights']:.1%})"
        rows.append([r["name"], *map(r.get, keys), share])
    return results(["model", "joint", "projected", "sparse, unprojected", "sparse, projected",
                    *keys[4:], "non-zero weights"], rows)


def training_table(m):
    """How each model was trained, and a line on those of which Stage 1 kept the start."""
    keys, trained = ("round", "epochs", "best_epoch", "val_auroc", "hardware"), m["trained"].items()
    rows = [[name, f"{t['seconds'] / 60:.1f}", *map(t.get, keys)] for name, t in trained]
    kept = [name for name, t in trained if t["best_epoch"] == 0]
    text = results(["model", "minutes", "round", "epochs", "best epoch", "its fold 9", "hardware"],
                   rows)
    if kept:
        text += f"\n\nStage 1 kept the start, epoch 0, of {', '.join(kept)}."
    return text


def by_group(m):
    """[(group, the prediction that stands for it, {code: its numbers}, best first)]."""
    groups = []
    for group in BRANCHES:
        name = m["shown"].get(group)
        known = [(c, v) for c, v in m["per_class"].get(name, {}).items()
                 if c in GROUPS[group] and v[0] is not None]
        best_first = sorted(known, key=lambda item: -item[1][0])
        if known:
            groups.append((group, name, dict(best_first)))
    return groups


def report(m):
    """results.md of a run's metrics."""
    found, positives = m["predictions"], m["counts"]["test_positives"]
    sets = [s for s in SETS if any(p["groups"][s][3] for p in found.values())]
    groups = [[name, *(p["groups"][s] for s in sets)] for name, p in found.items()]
    box_name, classes, paired, few = m["shown"].get("black box", "black box"), [], [], []
    for _, name, each in by_group(m):
        few += [c for c in each if positives[c] < RARE]
        for c, v in each.items():
            box = m["per_class"].get(box_name, {}).get(c, [None])
            classes.append([c, name, positives[c], v[:3], *v[3:], box[:3]])
    for question, pairs in m["differences"].items():
        rows = [[what, v[3], cell(v[:3], "+"), ["no", "yes"][v[1] > 0 or v[2] < 0]]
                for what, v in pairs.items() if v[3]]
        paired.append(table([question, "classes", "AUROC [95 %]", "interval excludes 0"], rows))
    return REPORT.format(
        **m, rare=RARE, loss=["without", "with"][m["contrastive"]], headline=headline(m),
        mark="" if m["data"] == "PTB-XL v1.0.3" else f"{m['data']}: ",
        papers=paper_table(m), costs=cost_table(m),
        training=training_table(m), paired="\n\n".join(paired),
        groups=results(["prediction", *(f"{s} ({len(SETS[s])})" for s in sets)], groups),
        classes=results(["label", "prediction", "positives", "AUROC [95 %]", "AUPRC", "F1",
                         "at logit", box_name], classes),
        few=" ".join(few) or "none", missing=" ".join(m["left_out"]) or "none")


# ---- Figures, in colours of Okabe and Ito that the colour-blind can tell apart

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
TERMS = {"bce": BLUE, "clst": ORANGE, "sep": GREEN, "div": "#CC79A7", "cntrst": "black"}


def plot_classes(m):
    """Every class with its interval, by group, best first, in columns read from top to bottom."""
    positives, box_name = m["counts"]["test_positives"], m["shown"].get("black box", "black box")
    rows, none = [], [np.nan] * 3
    for group, name, each in by_group(m):
        rows.append((f"{group.upper()} ({name})", none, none, BLUE))
        for c, v in each.items():
            box = m["per_class"].get(box_name, {}).get(c, none)
            fill = "white" if positives[c] < RARE else BLUE
            rows.append((f"{c}  {positives[c]}", v, box, fill))
    height = -(-len(rows) // -(-len(rows) // 26))  # rows of a column
    parts = [rows[i:i + height] for i in range(0, len(rows), height)]
    fig = Figure((4.8 * len(parts), 1.5 + 0.24 * height), layout="constrained")
    for ax, part in zip(fig.subplots(1, len(parts), sharex=True, squeeze=False)[0], parts):
        for i, (_, v, box, fill) in enumerate(part):
            ax.plot(v[1:3], [i, i], color=BLUE, lw=1.5)
            ax.plot(v[0], i, "o", color=BLUE, mfc=fill, ms=5)
            ax.plot(box[0], i, "|", color=ORANGE, ms=9, mew=2)
        ax.set_yticks(range(len(part)), [row[0] for row in part], fontsize=8)
        ax.set(ylim=(height - 0.5, -0.5), xlabel="AUROC, fold 10")
        ax.grid(axis="x", color=GREY, lw=0.5)
        ax.spines[["top", "right", "left"]].set_visible(False)
    fig.suptitle("AUROC of each class, 95 % interval, number of test positives\n"
                 f"hollow: fewer than {RARE}; orange bar: {box_name}", fontsize=10)
    return fig


def plot_training(run, names):
    """Fold-9 macro-AUROC and the terms of Eq. (2) of each model by epoch, from log.jsonl."""
    fig = Figure((9, 2.4 * len(names)), layout="constrained")
    axes = fig.subplots(len(names), 2, squeeze=False)
    for name, (left, right) in zip(names, axes):
        lines = (run / name / "log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        epochs = [line["epoch"] for line in log]
        left.plot(epochs, [line["val_auroc"] for line in log], "o-", color=BLUE, ms=3)
        left.set(ylabel=name, xlabel="epoch", title="macro-AUROC, fold 9")
        for term, colour in TERMS.items():
            values = np.array([line.get(term, np.nan) for line in log])
            if np.isfinite(values).any():
                values /= np.nanmax(np.abs(values))
                right.plot(epochs, values, ".-", color=colour, label=term)
                right.legend(fontsize=8)
        right.set(xlabel="epoch", title="terms of Eq. (2), each over its largest")
    return fig


# ---- results.html: results.md, figures and cases in one file, for the browser and for paper

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>TITLE</title><style>
body { font: 16px/1.5 sans-serif; max-width: 1100px; margin: auto; padding: 16px }
h1, h2, h3, p, pre, figcaption { overflow-wrap: anywhere }
h2 { border-bottom: 2px solid; margin-top: 40px; color: #0b4f8a }
h2, h3 { break-after: avoid } tr, figure { break-inside: avoid }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 16px 0 }
th, td { border-bottom: 1px solid #ccc; padding: 3px 12px 3px 0; text-align: left; font-size: 14px }
td { white-space: nowrap } pre { background: #f1f1f1; padding: 12px; white-space: pre-wrap }
figure { margin: 16px 0 } img { max-width: 100% }
@page { size: A4; margin: 14mm }
@media print { body { max-width: none; padding: 0; font-size: 10pt } table { display: table }
  th, td { font-size: 7pt; padding-right: 5px; white-space: normal } img { max-height: 240mm } }
</style></head><body><p>For research, not for clinical use.</p>
"""
FIGURES = {"per_class_auroc": "AUROC of each class on fold 10 with its 95 % interval",
           "training": "Training"}


def plain(text):
    """Text from a file as markdown that says just that."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(str(text).split()))


def image(path, text):
    """A PNG file as a figure that is part of the page."""
    data, text = base64.b64encode(path.read_bytes()).decode(), html.escape(text)
    return (f'<figure><img src="data:image/png;base64,{data}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>\n")


def case_html(path, args, render):
    """A case that 06 explained: its labels, and the page of each."""
    case = common.load(path, "06_plot_prototypes.py")
    if common.changed_input(case, args):
        return render(f"{plain(path)} is of another model: run 06_plot_prototypes.py again.")
    true = plain(" ".join(case["true_labels"] or ["not known"]))
    page = render(f"### {plain(case['title'])}\n\nTrue labels: {true}")
    for r in case["explained"]:
        text = f"{case['title']}: {r['label']}, probability {r['probability']:.3f}"
        page += image(path.parent / r["page"], text)
    return page


def results_html(args, m, text):
    """results.md, figures and cases as a page without links to anything outside it."""
    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    page = PAGE.replace("TITLE", html.escape(f"ProtoECGNet: {m['run']}")) + render(text)
    page += "<h2>Figures</h2>"
    for name, about in FIGURES.items():
        page += image(args.run / f"figures/{name}.png", about)
    page += "<h2>ECGs explained</h2>"
    cases = sorted((args.run / "cases").glob("*.json"))
    for path in cases:
        page += case_html(path, args, render)
    if not cases:
        page += "<p>None yet: run 06_plot_prototypes.py --case ECG_ID, then 05_evaluate.py.</p>"
    commands = html.escape("\n".join(m["commands"]))
    return page + f"<h2>Commands that made this</h2><pre>{commands}</pre></body></html>\n"


# ---- Table 3 (4.4)

def ratings_table(files):
    """Print mean and 95 % interval (normal) of each reviewer's ratings, which 06's page exported,
    and quadratically weighted kappas, without prototypes that anyone marked as a label error."""
    found = [json.loads(f.read_text()) for f in files]
    reviewers = {r.get("reviewer"): r.get("ratings") for r in found}
    kinds = {(r.get("kind"), str(r.get("made"))) for r in found}
    if len(kinds) > 1 or len(reviewers) < len(files) or "protoecgnet-ratings" not in kinds.pop():
        sys.exit("these are not ratings of one review page of 06, one file for each reviewer")
    criteria = "representativeness", "clarity"
    marks = {(j, r["mark"]) for ratings in reviewers.values() for j, r in ratings.items()}
    wrong = {j for j, mark in marks if mark == "label-error"}
    rated, scores, rows = sorted({j for j, _ in marks} - wrong), {}, []
    for name, ratings in reviewers.items():
        each = [[ratings.get(j, {}).get(k) for j in rated] for k in criteria]
        scores[name], row = np.array(each, float), [name]  # [2, prototypes], NaN: not rated
        for v in scores[name]:
            v = v[np.isfinite(v)]
            half = 1.96 * v.std(ddof=1) / len(v) ** 0.5
            row.append(f"{v.mean():.2f} [{v.mean() - half:.2f}, {v.mean() + half:.2f}] of {len(v)}")
        rows.append(row)
    rows += [["paper: cardiologist", "4.29 [4.22, 4.35]", "4.48 [4.42, 4.54]"],
             ["paper: internist", "3.59 [3.52, 3.66]", "4.73 [4.69, 4.77]"]]
    for a, b in itertools.combinations(scores, 2):
        row = [f"weighted kappa, {a} and {b}"]
        for x, y in zip(scores[a], scores[b]):
            both = np.isfinite(x + y)
            kappa = cohen_kappa_score(x[both], y[both], labels=range(1, 6), weights="quadratic")
            row.append(f"{kappa:.2f} of {both.sum()}")
        rows.append(row)
    print(table(["1-5, mean [95 %]", *criteria], rows))
    print(f"left out, marked as label errors by a reviewer: {len(wrong)}")


def main():
    p = common.argument_parser(__doc__, "prep", "run", "recipe", "model", "threads", "demo")
    p.add_argument("--against", type=Path, metavar="RUN2", help="another run to compare with")
    p.add_argument("--save", metavar="NAME", help="keep the numbers as tests/results/NAME.json")
    p.add_argument("--ratings", type=Path, nargs="+", metavar="FILE", help="only print Table 3")
    args = common.parse(p)
    if args.ratings:
        return ratings_table(args.ratings)
    prep = common.load_prep(args.prep)
    m = measure(args, prep)
    common.save(args.run / "metrics.json", m)
    if args.save:
        small = {k: v for k, v in m.items() if k != "per_class"}
        common.save(Path(__file__).parent / f"tests/results/{args.save}.json", small)
    figures = plot_classes(m), plot_training(args.run, list(m["trained"]))
    for name, figure in zip(FIGURES, figures):
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
        common.save(args.run / f"figures/{name}.png", content.getvalue())
    text, path = report(m), args.run / "results.md"
    common.save(path, text)
    common.save(args.run / "results.html", results_html(args, m, text))
    print(headline(m))
    name, p = next(iter(m["predictions"].items()))
    print(f"{args.run}: {name} {cell(p['auroc'][:3])} over {p['auroc'][3]} classes -> {path}")


if __name__ == "__main__":
    common.run(main)
