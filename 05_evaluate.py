"""Stage 05, evaluation (paper 4.1-4.3, Tables 1 and 2): macro-AUROC on the whole of fold 10.

How good every prediction of 04 is and how sure that is (bootstrap of test patients, the same draws
for all, so that differences are paired), what interpretability cost step by step, and the paper's
numbers beside ours.

reads   PREP/*.npy, RUN/classifiers/*.pt, RUN/MODEL/log.jsonl, prototypes.json, RUN/cases/*.json
writes  RUN/metrics.json (every number), results.md and results.html (made from it), figures/*.png

    python 05_evaluate.py                        everything that 04 has predicted in the run
    python 05_evaluate.py --against runs/plain   also paired differences to another run, such as one
                                                 without contrastive loss, for the paper's tables
    python 05_evaluate.py --save NAME            also keep the numbers as tests/results/NAME.json
    python 05_evaluate.py --ratings A.json B.json    the paper's Table 3 from what 06's page exports

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
from sklearn.metrics import average_precision_score, cohen_kappa_score, roc_curve
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import common
from common import BRANCHES, CODES, GROUPS, MODELS, columns

warnings.filterwarnings("ignore", category=RuntimeWarning)  # NaN: no such class here
DRAWS, SEED = 1000, 42  # of the bootstrap
BATCH = 32  # the authors'
RARE = 10  # a class with fewer test positives is rare
STEPS = "-joint", "-projected", "-unprojected"  # predictions on the way to a final one
ORDER = ["fusion", "fusion-own", "macro", *MODELS, "blackbox-macro"]
WITHOUT = "1AVB", "2AVB", "3AVB", "IVCD"  # Strodthoff et al. 2021 count them as diagnostic
SETS = {
    **{b: GROUPS[b] for b in BRANCHES},
    "Strodthoff's rhythm": [c for c in GROUPS["rhythm"] if c not in WITHOUT],
}
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
    """How often each record counts: patient_ids [N] -> [N, 1 + draws]; in column 0 once each. A
    draw takes as many patients as there are, with replacement, with all of their records."""
    patients, patient = np.unique(patient_ids, return_inverse=True)
    rng, n = np.random.default_rng(seed), len(patients)
    counts = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws)]
    return np.stack([np.ones(n), *counts], 1)[patient].astype(np.float32)


def weighted_auroc(y, score, weights):
    """AUROC of one class in every draw: y, score [N], weights [N, D] -> [D].

    Mann-Whitney: over all pairs of a positive and a negative +1 if in order, -1 if not, 0 if tied.
    The pairs are compared once for all draws, and sums of whole weights are exact in float32.
    """
    positive, negative = weights[y > 0], weights[y == 0]
    order = np.sign(score[y > 0, None] - score[None, y == 0]).astype(weights.dtype)
    right = (positive * (order @ negative)).sum(0, dtype=np.float64)  # [D]
    pairs = positive.sum(0, dtype=np.float64) * negative.sum(0, dtype=np.float64)
    return 0.5 + 0.5 * right / pairs


def rounded(v):
    """A number as JSON takes it: five digits, None for NaN."""
    return round(float(v), 5) if np.isfinite(v) else None


def macro(aurocs, codes):
    """Macro mean over `codes` of AUROCs (or a difference of two) [1 + draws, 71]: [value, lower and
    upper end of the 95 % interval, classes in the mean, codes].

    A draw seldom has every rare class, and the mean of those that it has is another quantity. So a
    draw says how far its classes move from their values on the test set, on average; the interval
    is the value plus these moves.
    """
    each = aurocs[:, columns(codes)]
    value, moves = np.nanmean(each[0]), np.nanmean(each[1:] - each[0], 1)
    ends = (value + np.nanpercentile(moves, [2.5, 97.5])).clip(-1, 1)
    return [rounded(value), *map(rounded, ends), int(np.isfinite(each[0]).sum()), len(codes)]


def per_batch_auroc(y, score):
    """What the authors log, y, score [N, C]: the mean over batches of the macro-AUROC over the
    classes with both a positive and a negative in the batch, which is seldom a rare one."""
    parts = range(0, len(y), BATCH)
    return np.nanmean([common.macro_auroc(y[i:i + BATCH], score[i:i + BATCH]) for i in parts])


# ---- What 02-04 left behind

def load_predictions(run, prep, args):
    """{name: namespace of meta, val and test logits [., 71], thresholds [71]} of a run."""
    place = SimpleNamespace(run=run, prep=args.prep)
    paths = sorted((run / "classifiers").glob("*.pt"))
    if not paths:
        sys.exit(f"{run} holds no classifiers: run 04_fusion.py first")
    on_test, found = prep.test[prep.val | prep.test], {}
    for path in paths:
        saved = common.load(path, "04_fusion.py", place)
        meta, logits = saved["meta"], saved["logits"].numpy()
        thresholds = np.full(len(CODES), np.nan)
        thresholds[columns(meta["classes"])] = saved["thresholds"].numpy()
        name = meta["name"].removesuffix(next((s for s in STEPS if meta["name"].endswith(s)), ""))
        wanted = not args.model or name in args.model
        if wanted:
            found[meta["name"]] = SimpleNamespace(
                meta=meta, val=logits[~on_test], test=logits[on_test], thresholds=thresholds)
    if all(name.endswith(STEPS) for name in found):
        sys.exit(f"{run} has no predictions of what is asked for: run 04_fusion.py first")
    return {n: found[n] for n in sorted(found, key=[*ORDER, *found].index)}


def evaluate(p, aurocs, prep, codes):
    """All numbers of one final prediction, over the `codes` that it is about."""
    y, true = prep.labels[prep.test], prep.labels[prep.test] > 0
    by_id, over = np.argsort(prep.ecg_ids[prep.test], kind="stable"), p.test >= p.thresholds
    f1 = 2 * (true & over).sum(0) / (true.sum(0) + over.sum(0))  # [71]
    f1[~true.any(0) | np.isnan(p.test[0])] = np.nan
    auprc = np.full(len(CODES), np.nan)
    for c in columns(p.meta["classes"]):
        if true[:, c].any():
            auprc[c] = average_precision_score(true[:, c], p.test[:, c])
    frequent = [c for c, n in zip(CODES, y.sum(0)) if c in codes and n >= RARE]
    numbers = {
        "auroc": macro(aurocs, codes),
        "groups": {g: macro(aurocs, s) for g, s in SETS.items()},
        "frequent": macro(aurocs, frequent),
        "auprc": rounded(np.nanmean(auprc)),
        "f1": rounded(np.nanmean(f1)),
        "fold 9": rounded(common.macro_auroc(prep.labels[prep.val], p.val)),
        "per batch": rounded(per_batch_auroc(y[by_id], p.test[by_id])),
    }
    each = {c: [*macro(aurocs, [c])[:3], *map(rounded, (auprc[i], f1[i], p.thresholds[i]))]
            for i, c in enumerate(CODES) if c in p.meta["classes"]}
    return numbers, each


def cost_of(name, found, aurocs, args):
    """What interpretability cost: the AUROC of each step, and how much there is to read."""
    meta, codes = found[name].meta, found[name].meta["classes"]
    boxes = [f"blackbox-{name}", "blackbox-1d"]
    steps = {s: name + s for s in STEPS} | {"sparse": name}
    steps |= {"black box": b for b in boxes[::-1] if b in aurocs}
    row = {s: macro(aurocs[n], codes)[0] for s, n in steps.items() if n in aurocs}
    parts = [common.load(args.run / m / "prototypes.json", "03_project.py", args)
             for m in meta["branches"]]
    count = [len(part["prototypes"]) for part in parts]
    gap = np.average([part["gap"] for part in parts], weights=count)
    return {"name": name, **row, "nonzero": meta["nonzero"], "weights": meta["weights"],
            "distinct": sum(part["distinct"] for part in parts), "gap": rounded(gap),
            "prototypes": sum(count)}


def measure(args, prep):
    """All numbers of a run, as they stand in metrics.json; and its predictions."""
    found, pairs, against = load_predictions(args.run, prep, args), dict(PAIRS), {}
    own = [n for n in found if not n.endswith(STEPS)]
    final, first = [*own], found[own[0]].meta
    contrastive = first["config"]["lambda_cntrst"] != 0
    if args.against:  # its predictions join ours as "NAME of RUN2"
        run_2 = args.against.name
        theirs = {n: p for n, p in load_predictions(args.against, prep, args).items() if n in own}
        found |= {f"{n} of {run_2}": p for n, p in theirs.items()}
        final += [f"{n} of {run_2}" for n in theirs]
        question, other = f"Against {run_2}", next(iter(theirs.values())).meta["config"]
        if (other["lambda_cntrst"] != 0) != contrastive:
            against[run_2] = not contrastive
            question = "Does the contrastive loss help? (4.2)" if contrastive else question
        pairs[question] = [(n, f"{n} of {run_2}") for n in theirs]

    y, patients = prep.labels[prep.test], prep.patient_ids[prep.test]
    weights = patient_weights(patients, DRAWS, SEED)
    aurocs = {n: np.full((1 + DRAWS, len(CODES)), np.nan) for n in found}
    with threadpool_limits(1):  # many small products: on a busy machine threads would wait
        for name, p in tqdm(found.items(), "bootstrap", leave=False, disable=None):
            for c in columns(p.meta["classes"]):
                aurocs[name][:, c] = weighted_auroc(y[:, c], p.test[:, c], weights)
    predictions, per_class = {}, {}
    for name in final:
        codes = GROUPS[MODELS.get(name.partition(" of ")[0], (None, "all"))[1]]
        predictions[name], per_class[name] = evaluate(found[name], aurocs[name], prep, codes)
    differences = {
        question: {f"{a} - {b}": macro(aurocs[a] - aurocs[b], CODES)
                   for a, b in some if a in aurocs and b in aurocs}
        for question, some in pairs.items()}
    # which prediction stands for a group of labels: the first that has it
    shown = {g: n for n in reversed(own) for g in BRANCHES
             if set(GROUPS[g]) & set(found[n].meta["classes"])}
    metas = [found[n].meta for n in own]
    return {
        **common.provenance(args, (prep.path, prep.info)), "run": args.run.name,
        "commands": list(dict.fromkeys(c for meta in metas for c in meta["commands"])),
        "config": first["config"], "contrastive": contrastive, "against": against,
        **{k: first["config"][k] for k in ("recipe", "seed", "width")},
        "trained": {k: v for meta in metas for k, v in meta["trained"].items()},
        "counts": {**prep.info["sizes"], "test_patients": len(np.unique(patients)),
                   "test_positives": dict(zip(CODES, y.sum(0).tolist()))},
        "left_out": prep.info["without_training_record"], "predictions": predictions,
        "differences": {q: rows for q, rows in differences.items() if rows},
        "cost": [cost_of(n, found, aurocs, args) for n in own if found[n].meta["branches"]],
        "shown": shown, "per_class": per_class}, found


# ---- results.md, all of it made from metrics.json

def number(v, sign=""):
    """.9321 as the paper prints it, +.0012 or -.0000 with sign "+", a dash for None."""
    return "–" if v is None else re.sub(r"^([+-]?)0", r"\1", f"{v:{sign or 'z'}.4f}")


def cell(v, sign=""):
    """[value, low, high, classes in it, codes] -> .9321 [.9250, .9390] (over 68 of 71)."""
    text = f"{number(v[0], sign)} [{number(v[1], sign)}, {number(v[2], sign)}]"
    return f"{text} (over {v[3]} of {v[4]})" if v[3:] and v[3] < v[4] else text


def table(head, rows):
    """A markdown table, padded so that it reads in a terminal too."""
    rows = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def headline(m):
    """The table that the terminal shows too: every final prediction of the run."""
    head = ["prediction", "macro-AUROC [95 %]", f"{RARE}+ positives", "AUPRC", "F1", "fold 9",
            f"per batch of {BATCH}*"]
    return table(head, [
        [n, cell(p["auroc"]), f"{number(p['frequent'][0])} over {p['frequent'][3]}",
         *(number(p[k]) for k in ("auprc", "f1", "fold 9", "per batch"))]
        for n, p in m["predictions"].items()])


def paper_table(m):
    """The paper's Tables 1 and 2 with ours beside, for what the run has."""
    suffix = {m["contrastive"]: "", **{on: f" of {run}" for run, on in m["against"].items()}}

    def ours(name, contrastive):
        p = m["predictions"].get(f"{name}{suffix.get(contrastive)}")
        return cell(p["auroc"]) if p else "not run"

    rows = []
    for setting, name, off, on, box, box_auroc in PAPER:
        if name in m["predictions"] or box in m["predictions"]:
            black_box = ours(box, m["contrastive"]) if box else "–"
            rows.append([setting, number(off), ours(name, False), number(on), ours(name, True),
                         number(box_auroc), black_box])
    return table(["macro-AUROC", "no contrastive: paper", "ours", "contrastive: paper", "ours",
                  "black box: paper", "ours"], rows)


def identity(m):
    """Whether the macro aggregation is what it must be, (16 r + 52 m + 3 g) / 71."""
    each = [m["predictions"][b]["auroc"] for b in BRANCHES]
    value, n = m["predictions"]["macro"]["auroc"][0], sum(v[3] for v in each)
    total = sum(v[0] * v[3] for v in each if v[3]) / n
    verdict = "equal" if abs(total - value) < 2e-5 else "NOT EQUAL"
    terms = " + ".join(f"{v[3]} x {number(v[0])}" for v in each)
    return (f"Check: ({terms}) / {n} = {number(total)}; macro aggregation {number(value)}: "
            f"{verdict}. (The paper's branches would give .8891 and .8970, where .8918 and .9048 "
            "are printed; means over batches, which they are, need not obey this.)")


def cost_table(m):
    """What each step towards interpretability cost, and how much there is to read."""
    steps = {"-joint": "joint", "-projected": "projected", "-unprojected": "sparse, unprojected",
             "sparse": "sparse, projected", "black box": "black box", "gap": "gap"}
    return table(
        ["model", *steps.values(), "prototypes", "distinct", "non-zero weights"],
        [[r["name"], *(number(r.get(s)) for s in steps), r["prototypes"], r["distinct"],
          f"{r['nonzero']} ({r['nonzero'] / r['weights']:.1%})"] for r in m["cost"]])


def training_table(m):
    """How each model was trained; epoch 0 is the start, which training did not better."""
    rows = []
    for name, t in m["trained"].items():
        kept = "0: the start" if t["best_epoch"] == 0 else t["best_epoch"]
        rows.append([name, t["round"], f"{t['seconds'] / 60:.1f}", t["epochs"], kept,
                     number(t["val_auroc"]), t["threads"], t["hardware"]])
    return table(["model", "round", "minutes", "epochs", "epoch kept", "its fold 9", "threads",
                  "hardware"], rows)


def classes_table(m):
    """Every label, by the prediction that stands for its group, beside a black box."""
    box_name, box = beside(m)
    return table(
        ["label", "prediction", "positives", "AUROC [95 %]", "AUPRC", "F1", "at logit", box_name],
        [[c, name, m["counts"]["test_positives"][c], cell(v[:3]), *map(number, v[3:]),
          cell(box[c][:3]) if c in box else "–"] for _, name, each in by_group(m)
         for c, v in each.items()])


def beside(m):
    """(name, {code: its numbers}) of the black box to show beside classes."""
    names = ["blackbox-1d", *(f"blackbox-{b}" for b in BRANCHES)]
    return next(((n, m["per_class"][n]) for n in names if n in m["per_class"]), ("black box", {}))


def by_group(m):
    """[(group, the prediction that stands for it, {code: its numbers}, best first)]."""
    groups = []
    for group, name in m["shown"].items():
        each = {c: v for c, v in m["per_class"][name].items() if c in GROUPS[group] and v[0]}
        groups.append((group, name, dict(sorted(each.items(), key=lambda item: -item[1][0]))))
    return groups


def report(m):
    """results.md of a run's metrics."""
    positives, counts = m["counts"]["test_positives"], m["counts"]
    rare = [c for _, _, each in by_group(m) for c in each if positives[c] < RARE]
    loss = "with" if m["contrastive"] else "without"
    out = [
        f"# Results of {m['run']}",
        f"Recipe {m['recipe']}, seed {m['seed']}, width {m['width']}, {loss} contrastive loss; "
        f"{counts['test']:,} test records of {counts['test_patients']:,} patients.",
        "## Headline", headline(m),
        "Macro-AUROC of the logits on the whole of fold 10 at once. Intervals: 95 % percentiles of "
        f"{DRAWS:,} bootstrap draws by patient, the same for all; a draw moves a macro mean by "
        f"what it moves the classes that it has. {RARE}+ positives: over the classes with so many "
        "in fold 10. F1: at the logit with the best F1 on fold 9, or at 0 for labels that are rare "
        "there. Fold 9: the fold that all choices were made on.",
        f"\\* as the authors log it: the mean over batches of {BATCH} of the AUROC over the "
        "classes that occur in the batch.",
        "## The paper's Tables 1 and 2", paper_table(m)]
    if counts["test"] != 2198:
        out.insert(2, "**Not the paper's test set**, which has 2,198 records.")
    if all(n in m["predictions"] for n in ("macro", *BRANCHES)):
        out.append(identity(m))
    out += [
        "## The cost of interpretability", cost_table(m),
        "Macro-AUROC on the model's labels: after Stage 1; after projection, with Stage 1's head; "
        "of Stage 3's classifier on the prototypes before and after projection; of a black box. "
        "Gap: mean of 1 - cosine of a prototype and the patch that it became. Distinct: different "
        "patches within each class.",
        "## Training", training_table(m),
        "## Label groups",
        table(["prediction", *(f"{s} ({len(c)})" for s, c in SETS.items())], [
            [n, *(cell(v) if v[3] else "–" for v in p["groups"].values())]
            for n, p in m["predictions"].items()]),
        "Strodthoff et al.'s rhythm task lacks 1AVB 2AVB 3AVB IVCD; it cannot be compared with "
        "the 16.",
        "## Paired differences"]
    for question, rows in m["differences"].items():
        out.append(table(
            [question, "classes", "AUROC [95 %]", "interval excludes 0"],
            [[what, v[3], cell(v[:3], "+"), "yes" if v[1] > 0 or v[2] < 0 else "no"]
             for what, v in rows.items() if v[3]]))
    out += [
        "## Classes", classes_table(m),
        f"Fewer than {RARE} positives in fold 10, so that their intervals say little: "
        f"{' '.join(rare) or 'none'}. Not modelled, without a training record: "
        f"{' '.join(m['left_out']) or 'none'}."]
    return "\n\n".join(out) + "\n"


# ---- Figures, in colours of Okabe and Ito that the colour-blind can tell apart

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"


def plot_classes(m):
    """Every class with its interval, by group, best first, in columns read from top to bottom."""
    positives, (box_name, box), rows = m["counts"]["test_positives"], beside(m), []
    for group, name, each in by_group(m):
        rows += [(f"{group} labels ({name})", None), *each.items()]
    height = -(-len(rows) // -(-len(rows) // 26))  # rows of a column
    parts = [rows[i:i + height] for i in range(0, len(rows), height)]
    fig = Figure((4.8 * len(parts), 1.5 + 0.24 * height), layout="constrained")
    for ax, part in zip(fig.subplots(1, len(parts), sharex=True, squeeze=False)[0], parts):
        names = [f"{c}  {positives[c]}" if v else c for c, v in part]
        ax.set_yticks(range(len(part)), names, fontsize=8)
        for i, (c, v) in enumerate(part):
            if v is None:
                ax.get_yticklabels()[i].set_fontweight("bold")
                continue
            fill = "white" if positives[c] < RARE else BLUE
            ax.plot(v[1:3], [i, i], color=BLUE, lw=1.5)
            ax.plot(v[0], i, "o", color=BLUE, mfc=fill, ms=5)
            if c in box:
                ax.plot(box[c][0], i, "|", color=ORANGE, ms=9, mew=2)
        ax.set(ylim=(height - 0.5, -0.5), xlabel="AUROC, fold 10")
        ax.grid(axis="x", color=GREY, lw=0.5)
        ax.spines[["top", "right", "left"]].set_visible(False)
    fig.suptitle("AUROC of each class, 95 % interval, number of test positives\n"
                 f"hollow: fewer than {RARE}; orange bar: {box_name}", fontsize=10)
    return fig


def plot_roc(m, y, found):
    """ROC curves by group, the three most frequent classes in colour, and their mean."""
    fig, grid = Figure((4.4 * len(m["shown"]), 5), layout="constrained"), np.linspace(0, 1, 501)
    axes = fig.subplots(1, len(m["shown"]), squeeze=False)[0]
    for ax, (group, name, each) in zip(axes, by_group(m)):
        frequent = sorted(each, key=m["counts"]["test_positives"].get)[-3:]
        colour, curves = dict(zip(frequent, (GREEN, ORANGE, BLUE))), []
        for c in sorted(each, key=colour.__contains__):
            i = CODES.index(c)
            false, true, _ = roc_curve(y[:, i], found[name].test[:, i])
            curves.append(np.interp(grid, false, true))
            label = f"{c} {number(each[c][0])}" if c in colour else None
            ax.plot(false, true, color=colour.get(c, GREY), lw=1.6 if label else 0.6, label=label)
        ax.plot(grid, np.mean(curves, 0), "k--", lw=2, label=f"mean of {len(curves)}")
        ax.legend(loc="lower right", fontsize=9, framealpha=0.9, edgecolor="none")
        ax.set(title=f"{group} labels ({name})", xlabel="1 - specificity", ylabel="sensitivity",
               aspect="equal")
    fig.suptitle("ROC curves on fold 10; grey: the less frequent classes", fontsize=10)
    return fig


def plot_training(run, names):
    """Fold-9 macro-AUROC and the terms of Eq. (2) of each model by epoch, from log.jsonl."""
    fig = Figure((4.0 * len(names), 5.5), layout="constrained")
    for i, (name, column) in enumerate(zip(names, fig.subplots(2, len(names), squeeze=False).T)):
        lines = (run / name / "log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        aurocs = [e["val_auroc"] for e in log]
        column[0].plot([e["epoch"] for e in log], aurocs, "o-", color=BLUE, ms=3)
        column[0].set(title=name)
        later = [e for e in log if "bce" in e]
        for term, colour in zip(("bce", "clst", "sep", "div", "cntrst"),
                                (BLUE, ORANGE, GREEN, "#CC79A7", "black")):
            values = np.array([e.get(term, np.nan) for e in later])
            largest = np.abs(values).max(initial=1e-12)
            column[1].plot([e["epoch"] for e in later], values / largest, color=colour, label=term)
        column[1].set(xlabel="epoch")
        if i == 0:
            column[0].set(ylabel="macro-AUROC, fold 9")
            column[1].set(ylabel="terms of Eq. (2), each over its largest")
            column[1].legend(fontsize=8)
    return fig


# ---- results.html: results.md, figures and cases in one file, for the browser and for paper

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 0 auto;
  padding: 0 16px 48px }
h2 { border-bottom: 2px solid #0b4f8a; margin-top: 40px; color: #0b4f8a }
h2, h3 { break-after: avoid }
h1, h2, h3, p, figcaption { overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: 16px 0 } table { border-collapse: collapse; font-size: 14px }
th, td { border-bottom: 1px solid #ccc; padding: 3px 12px 3px 0; text-align: left }
td { font-variant-numeric: tabular-nums } tr { break-inside: avoid }
pre { background: #f1f1f1; padding: 12px; overflow-x: auto; white-space: pre-wrap }
figure { margin: 16px 0; break-inside: avoid }
img { max-width: 100% } figcaption { font-size: 14px }
@page { size: A4; margin: 14mm }
@media print { body { max-width: none; padding: 0; font-size: 10pt } .wide { overflow: visible }
  table { font-size: 7pt } th, td { padding-right: 5px } }
"""


def plain(text):
    """Text from a file as markdown that says just that."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(str(text).split()))


def image(path, text):
    """A PNG file as a figure that is part of the page."""
    data, text = base64.b64encode(path.read_bytes()).decode(), html.escape(text)
    return (f'<figure><img src="data:image/png;base64,{data}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>")


def case_html(path, render):
    """A case that 06 explained: its labels, the prototypes that speak for them, its pages."""
    case = json.loads(path.read_text())
    true = "not known" if case["true_labels"] is None else " ".join(case["true_labels"]) or "none"
    rows, pages = [], []
    for r in case["explained"]:
        verdict = f"{r['probability']:.3g} (threshold {r['threshold']:.3g})"
        for q in r["prototypes"]:
            who = f"{q['model']} {q['index']}, training ECG {q['ecg_id']}"
            rows.append([plain(r["label"]), verdict, plain(who), plain(" ".join(q["labels"])),
                         f"{q['similarity']:.3f}", f"{q['contribution']:+.3f}"])
            pages.append(image(path.parent / q["page"], f"{case['title']}: {r['label']}, {who}"))
    text = table(["label", "probability", "prototype", "its labels", "similarity", "contribution"],
                 rows)
    head = f"### {plain(case['title'])}\n\nTrue labels: {plain(true)}.\n\n"
    return render(head + text) + "".join(pages)


def write_html(run, m, text):
    """Write RUN/results.html, without links to anything outside it."""
    md = MarkdownIt("commonmark", {"html": False}).enable("table")
    md.add_render_rule("table_open", lambda *_: '<div class="wide"><table>')
    md.add_render_rule("table_close", lambda *_: "</table></div>")
    captions = {"per_class_auroc": "AUROC of each class on fold 10 with its 95 % interval",
                "roc": "ROC curves on fold 10",
                "training": "Training: macro-AUROC on fold 9 and the terms of Eq. (2)"}
    body = md.render(text) + "<h2>Figures</h2>"
    body += "".join(image(run / "figures" / f"{n}.png", c) for n, c in captions.items())
    cases = sorted((run / "cases").glob("*.json"))
    if cases:
        body += "<h2>Cases</h2>" + "".join(case_html(path, md.render) for path in cases)
    commands = html.escape("\n".join(m["commands"]))
    body += f"<h2>Commands that made this run</h2><pre>{commands}</pre>"
    title = html.escape(f"ProtoECGNet: {m['run']}")
    common.save(run / "results.html", f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{STYLE}</style></head><body>
<p>For research, not for clinical use.</p>{body}</body></html>
""")


# ---- Table 3 (4.4)

def read_ratings(path):
    """(reviewer, {prototype: rating}, the prototypes' fingerprints) that 06's page exported."""
    scale = (1, 2, 3, 4, 5, None)
    try:
        value = json.loads(path.read_text())
        right = value["kind"] == "protoecgnet-ratings" and str(value["reviewer"]).strip()
        for r in value["ratings"].values():
            right = right and {r["representativeness"], r["clarity"]} <= set(scale)
            r["mark"]
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        right = False
    if not right:
        sys.exit(f"{path} does not hold ratings exported from 06_plot_prototypes.py --review")
    return str(value["reviewer"]), value["ratings"], str(value["made"])


def ratings_table(files):
    """Mean and 95 % interval (normal) of each reviewer and criterion, without prototypes that any
    reviewer marked as a label error, and quadratically weighted kappa of each two reviewers."""
    found = [read_ratings(f) for f in files]
    reviewers = {reviewer: ratings for reviewer, ratings, _ in found}
    if len({made for _, _, made in found}) > 1 or len(reviewers) < len(files):
        sys.exit("the files are of different models or of one reviewer: give one for each reviewer")
    wrong = {j for each in reviewers.values() for j in each if each[j]["mark"] == "label-error"}

    def scores(reviewer, criterion):
        ratings = reviewers[reviewer].items()
        return {j: r[criterion] for j, r in ratings if j not in wrong and r[criterion]}

    rows = []
    for reviewer in reviewers:
        row = [reviewer]
        for criterion in ("representativeness", "clarity"):
            v = np.array([*scores(reviewer, criterion).values()], float)
            half = 1.96 * v.std(ddof=1) / len(v) ** 0.5
            interval = f" [{v.mean() - half:.2f}, {v.mean() + half:.2f}]" if len(v) > 1 else ""
            row.append(f"{v.mean():.2f}{interval} of {len(v)}" if len(v) else "–")
        rows.append(row)
    rows += [["paper: cardiologist", "4.29 [4.22, 4.35]", "4.48 [4.42, 4.54]"],
             ["paper: internist", "3.59 [3.52, 3.66]", "4.73 [4.69, 4.77]"]]
    for a, b in itertools.combinations(reviewers, 2):
        row = [f"weighted kappa, {a} and {b}"]
        for criterion in ("representativeness", "clarity"):
            x, y = scores(a, criterion), scores(b, criterion)
            both = sorted(x.keys() & y.keys())
            pairs = [x[j] for j in both], [y[j] for j in both]
            kappa = np.nan
            if both:
                kappa = cohen_kappa_score(*pairs, labels=[1, 2, 3, 4, 5], weights="quadratic")
            row.append(f"{kappa:.2f} of {len(both)}" if np.isfinite(kappa) else "–")
        rows.append(row)
    print(table(["1-5, mean [95 %]", "representativeness", "clarity"], rows))
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
    m, found = measure(args, prep)
    common.save(args.run / "metrics.json", m)
    if args.save:
        small = {k: v for k, v in m.items() if k != "per_class"}
        common.save(Path(__file__).parent / "tests" / "results" / f"{args.save}.json", small)
    y = prep.labels[prep.test]
    figures = {"per_class_auroc": plot_classes(m), "roc": plot_roc(m, y, found),
               "training": plot_training(args.run, [*m["trained"]])}
    for name, figure in figures.items():
        figure.savefig(content := io.BytesIO(), format="png", dpi=130)
        common.save(args.run / "figures" / f"{name}.png", content.getvalue())
    text = report(m)
    common.save(args.run / "results.md", text)
    write_html(args.run, m, text)
    name, first = next(iter(m["predictions"].items()))
    print(headline(m))
    print(f"{args.run}: {name} {cell(first['auroc'][:3])} over {first['auroc'][3]} classes -> "
          f"{args.run / 'results.md'}")


if __name__ == "__main__":
    common.run(main)
