"""Script 05, evaluation (paper 4.1-4.3): macro-AUROC on fold 10, Tables 1 and 2.

reads   PREP; RUN/MODEL/prototypes.json, log.jsonl;
        RUN/classifiers/*.pt, cases/*
writes  RUN/metrics.json, results.md, results.html, figures/*.png

    python 05_evaluate.py                  all predictions
    python 05_evaluate.py --against RUN2   and compared to a run
    python 05_evaluate.py --ratings A.json B.json    Table 3, from 06's page

Takes seconds. Last line: `RUN: fusion .9321 [.9250, .9390] over 71 classes -> RUN/...`.
"""
import base64
import io
import itertools
import json
import re
import sys
import warnings
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, cohen_kappa_score, f1_score
from tqdm import tqdm

import common
from common import BRANCHES, CODES, GROUPS, MODELS, columns

warnings.simplefilter("ignore", RuntimeWarning)  # NaN: no such class
DRAWS, SEED = 1000, 42  # of the bootstrap
BATCH = 32  # the authors'
RARE = 10  # positives: with fewer a bootstrap moves little
STEPS = "-joint", "-projected", "-unprojected"
PAPER = [  # setting, prediction, without and with contrastive loss, black box
    ("rhythm branch, 16 labels", "rhythm", .8730, .8758, "blackbox-rhythm", None),
    ("morphology branch, 52", "morphology", .9023, .9056, "blackbox-morphology", None),
    ("global branch, 3", "global", .7461, .8606, "blackbox-global", None),
    ("one branch, 1D, 71", "all-1d", .8462, .8794, "blackbox-1d", .9219),
    ("one branch, 2D partial, 71", "all-partial", .9031, .9137, None, None),
    ("one branch, 2D global, 71", "all-global", .8719, .8983, "blackbox-2d", .9060),
    ("macro aggregation, 71", "macro", .8918, .9048, "blackbox-macro", .9052),
    ("fusion classifier, 71", "fusion", .9010, .9248, None, None),
]
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
TERMS = dict(bce=BLUE, clst=ORANGE, sep=GREEN, div=PINK, cntrst="black")
PAIRS = {  # differences, first - second
    "Do three branches beat one? (4.1)": [
        ("fusion", m) for m in ("all-1d", "all-partial", "all-global")],
    "Do prototypes of other branches help? (4.1)": [("fusion", m) for m in BRANCHES],
    "Does the fusion beat each label from its own branch? (4.1)": [("fusion", "macro")],
    "As good as a black box? (4.3)": [
        *((name, box) for _, name, _, _, box, _ in PAPER if box),
        *((m, "blackbox-1d") for m in (*BRANCHES, "fusion", "fusion-own")),
        ("fusion", "blackbox-macro")],
    "Cost of projection, and of own-class weights alone (3.5)": [
        *((m, f"{m}-unprojected") for m in ("fusion", "fusion-own", *MODELS)),
        ("fusion-own", "fusion")],
}


# ---- Numbers. AUROCs are [1 + draws, 71], the first of the test set

def patient_weights(patient_ids, draws, seed):
    """Counts of records, [N, 1 + draws]: once, then as patients are drawn."""
    _, patient = np.unique(patient_ids, return_inverse=True)
    rng, n = np.random.default_rng(seed), patient.max() + 1
    counts = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws)]
    return np.stack([np.ones(n), *counts], 1)[patient].astype(np.float32)


def weighted_auroc(y, score, weights):
    """AUROC of a class in each draw: y, score [N], weights [N, D] -> [D]."""
    positive, negative = weights[y > 0], weights[y == 0]
    order = np.sign(score[y > 0, None] - score[y == 0])  # Mann-Whitney; ties are 0
    right = (positive * (order @ negative)).sum(0, dtype=float)
    pairs = positive.sum(0, dtype=float) * negative.sum(0, dtype=float)
    return 0.5 + 0.5 * right / pairs


def redraw_rare(aurocs, y, score):
    """Draw AUROCs [1 + D, 71] of rare labels anew, in place: y, score [N, 71].

    A draw moves such a label by the mean of as many deviations of positives, from all
    labels of its branch; the same for all predictions. Their coverage is simulated in
    tests/test_05_evaluate.py.
    """
    positives, draws = y.sum(0), len(aurocs) - 1
    for branch in BRANCHES:
        own = [c for c in columns(GROUPS[branch]) if np.isfinite(aurocs[0, c])]
        deviations, chances = [np.zeros(0)], [np.zeros(0)]
        for c in own:
            n, s = positives[c], score[:, c]
            order = np.sign(s[y[:, c] > 0, None] - s[y[:, c] == 0])
            alone = 0.5 + 0.5 * order.mean(1)  # AUROC of a positive by itself
            deviations.append((alone - aurocs[0, c]) * (n / max(n - 1, 1)) ** 0.5)
            chances.append(np.full(n, (n > 1) / n))  # each label is as likely
        deviations, chances = map(np.concatenate, (deviations, chances))
        rng = np.random.default_rng(SEED)
        for c in own:
            n = positives[c]
            if n < RARE and chances.any():
                drawn = rng.choice(deviations, (draws, n), p=chances / chances.sum())
                aurocs[1:, c] = aurocs[0, c] + drawn.mean(1) * rng.choice([-1, 1], draws)


def rounded(v):
    """A number for JSON: None for NaN."""
    return round(float(v), 5) if np.isfinite(v) else None


def macro(aurocs, codes, lowest=0):
    """[mean over `codes`, ends of its 95 % interval, how many have one, codes];
    `lowest`: -1 for differences."""
    x = aurocs[:, columns(codes)]
    value, *draws = np.nanmean(x, 1)
    ends = np.nanpercentile(draws, [2.5, 97.5]).clip(lowest, 1)
    return [*map(rounded, (value, *ends)), int(np.isfinite(x[0]).sum()), len(codes)]


def numbers_of(p, aurocs, prep, frequent):
    """Its numbers, and {code: [AUROC, ends, AUPRC, F1, threshold]}."""
    labels, own = prep.labels[prep.test], columns(p.classes)
    per_class, each = {}, []
    for c, y, s, t in zip(p.classes, labels.T[own], p.test.T[own], p.thresholds):
        more = [np.nan, np.nan, t]
        if y.any():
            more[:2] = average_precision_score(y, s), f1_score(y, s >= t)
        each.append(more)
        per_class[c] = [*macro(aurocs, [c])[:3], *map(rounded, more)]
    auprc, f1, _ = np.nanmean(each, 0)
    batches = [slice(i, i + BATCH) for i in range(0, len(labels), BATCH)]
    per_batch = [common.macro_auroc(labels[b], p.test[b]) for b in batches]
    codes = GROUPS[MODELS[p.name][1]] if p.name in MODELS else CODES
    return {
        "auroc": macro(aurocs, codes),
        "groups": {b: macro(aurocs, GROUPS[b]) for b in BRANCHES},
        "frequent": macro(aurocs, frequent),
        "auprc": rounded(auprc),
        "f1": rounded(f1),
        "fold 9": rounded(common.macro_auroc(prep.labels[prep.val], p.val)),
        "per batch": rounded(np.nanmean(per_batch)),
    }, per_class


def load_predictions(run, prep, args):
    """{name: what 04 saved, with logits val, test [., 71]}, final ones first."""
    place = SimpleNamespace(run=run, prep=args.prep)
    test, found = prep.test[prep.later], {}
    for path in sorted(run.glob("classifiers/*.pt")):
        if not args.model or path.stem.startswith(tuple(args.model)):
            saved = common.load(path, "04_fusion.py", place)
            p = found[path.stem] = SimpleNamespace(**saved["meta"], file=path)
            p.thresholds = saved["thresholds"].numpy()
            logits = saved["logits"].numpy()
            p.val, p.test = logits[~test], logits[test]
    if all(name.endswith(STEPS) for name in found):
        sys.exit(f"{run} has no such predictions: run 04_fusion.py first")
    order = ["fusion", "fusion-own", "macro", *MODELS, "blackbox-macro", *found]
    return {n: found[n] for n in sorted(found, key=order.index)}


def cost_of(name, p, aurocs, args):
    """AUROC of each step, and how much is to read."""
    box = f"blackbox-{name}" if f"blackbox-{name}" in aurocs else "blackbox-1d"
    steps = {"sparse": name, **{s: name + s for s in STEPS}, "black box": box}
    row = {k: macro(aurocs[n], p.classes)[0] for k, n in steps.items() if n in aurocs}
    files = [args.run / b / "prototypes.json" for b in p.branches]
    parts = [common.load(f, "03_project.py", args) for f in files]
    count = [len(part["prototypes"]) for part in parts]
    gap = np.average([part["gap"] for part in parts], weights=count)
    distinct = sum(part["distinct"] for part in parts)
    return dict(
        row, name=name, nonzero=p.nonzero, weights=p.weights,
        gap=rounded(gap), prototypes=sum(count), distinct=distinct)


def measure(args, prep):
    """All numbers, for metrics.json."""
    found = load_predictions(args.run, prep, args)
    made = common.provenance(args, *((p.file, vars(p)) for p in found.values()))
    own = [n for n in found if not n.endswith(STEPS)]
    config, pairs, both, against = found[own[0]].config, dict(PAIRS), {}, {}
    loss = config["lambda_cntrst"] != 0
    if args.against:
        run_2, other = args.against.name, load_predictions(args.against, prep, args)
        both = {n: f"{n} of {run_2}" for n in own if n in other}
        found.update({m: other[n] for n, m in both.items()})
        theirs, question = next(iter(other.values())).config, f"Against {run_2}"
        changed = {k.split("_")[0] for k in config if config[k] != theirs[k]}
        if changed == {"lambda"} and loss != (theirs["lambda_cntrst"] != 0):
            against[run_2] = not loss
            if loss:
                question = "Does the contrastive loss help? (4.2)"
        pairs[question] = both.items()
    y, patients = prep.labels[prep.test], prep.patient_ids[prep.test]
    weights = patient_weights(patients, DRAWS, SEED)  # shared by all
    frequent = [c for c, n in zip(CODES, y.sum(0)) if n >= RARE]
    aurocs, numbers, per_class, differences = {}, {}, {}, {}
    for name, p in tqdm(found.items(), "bootstrap", leave=False, disable=None):
        each = aurocs[name] = np.full((1 + DRAWS, len(CODES)), np.nan)
        for c in columns(p.classes):
            each[:, c] = weighted_auroc(y[:, c], p.test[:, c], weights)
        redraw_rare(each, y, p.test)
    for n in [*own, *both.values()]:
        numbers[n], per_class[n] = numbers_of(found[n], aurocs[n], prep, frequent)
    for question, some in pairs.items():
        some = [(a, b) for a, b in some if {a, b} <= found.keys()]
        if some:
            rows = differences[question] = {}
            for a, b in some:
                gain = aurocs[a] - aurocs[b]
                rows[f"{a} - {b}"] = [macro(gain, c, -1) for c in (frequent, CODES)]
    shown = {  # first with labels of a group
        g: n for g in BRANCHES for n in reversed(own) if numbers[n]["groups"][g][3]}
    shown.update({"black box": n for n in reversed(own) if n.startswith("blackbox")})
    return dict(
        made, commands=made["commands"][:-1], run=args.run.name,
        config=config, data=prep.info["data"], contrastive=loss,
        **{k: config[k] for k in ("recipe", "seed", "width")},
        against=against,
        trained={k: v for n in own for k, v in found[n].trained.items()},
        counts=dict(
            prep.info["sizes"], test_patients=len(np.unique(patients)),
            test_positives=dict(zip(CODES, y.sum(0).tolist()))),
        left_out=prep.info["without_training_record"],
        rule=RULE.format(DRAWS, RARE), shown=shown,
        predictions=numbers, differences=differences, per_class=per_class,
        cost=[cost_of(n, found[n], aurocs, args) for n in own if found[n].branches])


# ---- results.md of metrics.json

RULE = (
    "Intervals: 95 % percentiles of {:,} bootstrap draws by patient, the same for all; a "
    "label with fewer than {} positives moves by deviations of positives of its branch.")
REPORT = """# {mark}Results of {run}

Recipe {recipe}, seed {seed}, width {width}, {loss} contrastive loss. {counts[test]:,} test
records (the paper: 2,198) of {counts[test_patients]:,} patients.

## Headline
{headline}

Macro-AUROC on all of fold 10. {rule} {rare}+ positives: over classes with so many in
fold 10. F1: at the logit with the best F1 on fold 9, or at 0 for labels rare there.
Fold 9: choices were made on it. Per batch: the authors' measure, the mean over batches
of the AUROC over the classes in a batch.

## The paper's Tables 1 and 2
{papers}

## The cost of interpretability
{costs}

Macro-AUROC on the model's labels: after Stage 1; after projection, with Stage 1's head;
of Stage 3's classifier on prototypes before and after projection; of a black box. Gap:
mean of 1 - cosine of prototype and patch. Distinct: different patches in a class.

## Training
{training}{kept}

## Label groups
{groups}

## Paired differences
{paired}

## Classes
{classes}

Under {rare} positives in fold 10, so that intervals say little: {few}. Not modelled,
without a training record: {missing}.
"""


def number(v, sign=""):
    """.9321 as in the paper, with sign "+" +.0012, for None a dash."""
    return "–" if v is None else re.sub(r"^([+-]?)0", r"\1", f"{v:{sign or 'z'}.4f}")


def cell(v, sign=""):
    """[value, low, high, n, codes] -> .9321 [.9250, .9390] (over 68 of 71)."""
    if v[0] is None:
        return "–"
    value, low, high = (number(x, sign) for x in v[:3])
    some = f" (over {v[3]} of {v[4]})" if v[3:] and v[3] < v[4] else ""
    return f"{value} [{low}, {high}]{some}"


def table(head, rows):
    """A padded markdown table; floats as `number`, lists as `cell`."""
    show = {float: number, list: cell, type(None): number}
    rows = [[show.get(type(v), str)(v) for v in row] for row in (head, *rows)]
    widths = [max(map(len, v)) for v in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def headline(m):
    """Every final prediction."""
    head = ["prediction", "macro-AUROC [95 %]", f"{RARE}+ positives", "AUPRC", "F1", "fold 9",
            f"per batch of {BATCH}"]
    keys, rows = ("auprc", "f1", "fold 9", "per batch"), []
    for name, p in m["predictions"].items():
        rows.append([name, p["auroc"], p["frequent"][0], *map(p.get, keys)])
    return table(head, rows)


def paper_table(m):
    """The paper's Tables 1 and 2, and ours."""
    head = ["macro-AUROC", "no contrastive: paper", "ours", "contrastive: paper", "ours",
            "black box: paper", "ours"]
    of = {m["contrastive"]: "", not m["contrastive"]: " of no run"}
    of |= {loss: f" of {run}" for run, loss in m["against"].items()}
    found, rows = m["predictions"], []
    for setting, name, off, on, box, box_auroc in PAPER:
        if name in found or box in found:
            names = name + of[False], name + of[True], box
            ours = [found[n]["auroc"] if n in found else "not run" for n in names]
            rows.append([setting, off, ours[0], on, ours[1], box_auroc, box and ours[2]])
    return table(head, rows)


def cost_table(m):
    """What each step cost."""
    head = [
        "model", "joint", "projected", "sparse, unprojected", "sparse, projected",
        "black box", "gap", "prototypes", "distinct", "non-zero weights"]
    keys, rows = [*STEPS, "sparse", *head[5:9]], []
    for r in m["cost"]:
        share = f"{r['nonzero']} ({r['nonzero'] / r['weights']:.1%})"
        rows.append([r["name"], *map(r.get, keys), share])
    return table(head, rows)


def answer(v):
    """What a difference [value, low, high] says."""
    if v[0] is None or v[1] <= 0 <= v[2]:
        return "not shown"
    return "yes" if v[1] > 0 else "no, the second"


def by_group(m):
    """{(group, prediction): [(label, positives, numbers, box)]}, best first."""
    groups, shown, n = {}, m["shown"], m["counts"]["test_positives"]
    box = m["per_class"].get(shown.get("black box"), {})
    for group in [b for b in BRANCHES if b in shown]:
        rows = [
            (c, n[c], v, box.get(c, [None])[:3])
            for c, v in m["per_class"][shown[group]].items()
            if c in GROUPS[group] and v[0] is not None]
        groups[group, shown[group]] = sorted(rows, key=lambda r: -r[2][0])
    return groups


def report(m):
    """results.md of a run's metrics."""
    by, classes, trained, paired = by_group(m), [], [], []
    for (_, name), rows in by.items():
        classes += [[c, name, n, v[:3], *v[3:], box] for c, n, v, box in rows]
    few = [c for c, _, n, *_ in classes if n < RARE]
    each = m["predictions"].items()
    groups = [[n, *(p["groups"][b] for b, _ in by)] for n, p in each]
    keys = "round", "epochs", "best_epoch", "val_auroc", "hardware"
    for name, t in m["trained"].items():
        trained.append([name, f"{t['seconds'] / 60:.1f}", *map(t.get, keys)])
    kept = ", ".join(n for n, t in m["trained"].items() if t["best_epoch"] == 0)
    for question, pairs in m["differences"].items():
        rows = [
            [what, cell(some[:3], "+"), some[3], answer(some), cell(all_[:3], "+"), all_[3]]
            for what, (some, all_) in pairs.items() if all_[3]]
        head = [question, f"AUROC, {RARE}+ positives [95 %]", "labels",
                "is the first better?", "AUROC, all [95 %]", "labels"]
        paired.append(table(head, rows))
    return REPORT.format(
        **m, rare=RARE, loss="with" if m["contrastive"] else "without",
        mark="" if m["data"] == "PTB-XL v1.0.3" else f"{m['data']}: ",
        headline=headline(m), papers=paper_table(m), costs=cost_table(m),
        training=table([
            "model", "minutes", "round", "epochs", "best epoch", "its fold 9", "hardware",
        ], trained),
        kept=f"\n\nStage 1 kept the start, epoch 0, of {kept}." if kept else "",
        groups=table(["prediction", *(b for b, _ in by)], groups),
        paired="\n\n".join(paired),
        classes=table([
            "label", "prediction", "positives", "AUROC [95 %]", "AUPRC", "F1", "at logit",
            m["shown"].get("black box", "black box")], classes),
        few=" ".join(few) or "none", missing=" ".join(m["left_out"]) or "none")


# ---- Figures

def plot_classes(m):
    """Classes with intervals, by group, best first."""
    rows, box_name = [], m["shown"].get("black box", "black box")
    for (group, name), each in by_group(m).items():
        rows.append((f"{group.upper()} ({name})", [None] * 3, [None], BLUE))
        for c, n, v, box in each:
            rows.append((f"{c}  {n}", v, box, "white" if n < RARE else BLUE))
    height = -(-len(rows) // -(-len(rows) // 26))  # rows of a column
    parts = [rows[i:i + height] for i in range(0, len(rows), height)]
    fig = Figure((4.8 * len(parts), 1.5 + 0.24 * height), layout="constrained")
    axes = fig.subplots(1, len(parts), sharex=True, squeeze=False)[0]
    for ax, part in zip(axes, parts):
        for i, (_, v, box, fill) in enumerate(part):
            ax.plot(v[1:3], [i, i], color=BLUE, lw=1.5)
            ax.plot(v[:1], [i], "o", color=BLUE, mfc=fill, ms=5)
            ax.plot(box[:1], [i], "|", color=ORANGE, ms=9, mew=2)
        ax.set_yticks(range(len(part)), [row[0] for row in part], fontsize=8)
        ax.set(ylim=(height - 0.5, -0.5), xlabel="AUROC, fold 10")
        ax.grid(axis="x", color="#BBBBBB", lw=0.5)
        ax.spines[["top", "right", "left"]].set_visible(False)
    fig.suptitle("AUROC of each class, 95 % interval, test positives\n"
                 f"hollow: under {RARE}; orange: {box_name}", fontsize=10)
    return fig


def plot_training(run, names):
    """Fold-9 macro-AUROC and terms of Eq. (2)."""
    fig = Figure((9, 2.4 * len(names)), layout="constrained")
    axes = fig.subplots(len(names), 2, squeeze=False)
    for name, (left, right) in zip(names, axes):
        log = pd.read_json(run / name / "log.jsonl", lines=True)
        left.plot(log["epoch"], log["val_auroc"], "o-", color=BLUE, ms=3)
        left.set(ylabel=name, xlabel="epoch", title="macro-AUROC, fold 9")
        right.set(xlabel="epoch", title="terms of Eq. (2), each over its largest")
        for t in [t for t in TERMS if t in log]:
            values = log[t] / log[t].abs().max()
            right.plot(log["epoch"], values, ".-", color=TERMS[t], label=t)
            right.legend(fontsize=8)
    return fig


# ---- results.html

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>ProtoECGNet: RUN</title><style>
body { font: 16px/1.5 sans-serif; max-width: 1200px; margin: auto; padding: 16px;
  overflow-wrap: anywhere }
table { display: block; overflow-x: auto; white-space: nowrap; font-size: 14px;
  border-collapse: collapse; margin: 16px 0 }
th, td { padding: 2px 12px 2px 0; text-align: left; border-bottom: 1px solid #ccc }
pre { white-space: pre-wrap }
figure { margin: 0 }
img, svg { max-width: 100%; height: auto }
@page { size: A4; margin: 14mm }
@media print {
  table { display: table; font-size: 7pt; white-space: normal; overflow-wrap: normal }
  h2, h3 { break-after: avoid } img, svg { max-height: 260mm }
}
</style><p>For research, not for clinical use.</p>
"""


def image(path, text):
    """A PNG file in the page."""
    data, text = base64.b64encode(path.read_bytes()).decode(), escape(text)
    picture = f'<img src="data:image/png;base64,{data}" alt="{text}">'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>\n"


def results_html(args, m, text):
    """results.md, figures and cases as a page."""
    page = PAGE.replace("RUN", escape(m["run"]))
    page += MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    page += "<h2>Figures</h2>"
    page += image(args.run / "figures/per_class_auroc.png", "AUROC of classes, fold 10")
    page += image(args.run / "figures/training.png", "Training")
    page += "<h2>ECGs explained</h2>"
    cases = sorted(args.run.glob("cases/*.json"))
    for path in cases:
        try:
            common.load(path, "06_plot_prototypes.py", args)
            text = path.with_suffix(".html").read_text("utf-8")
            page += text.partition("</style>")[2]
        except SystemExit as e:
            page += f"<p>{escape(str(e))}</p>"
    if not cases:
        page += "<p>None yet: run 06_plot_prototypes.py --case ECG_ID, then 05.</p>"
    commands = escape("\n".join(m["commands"]))
    return page + f"<h2>Commands that made this</h2><pre>{commands}</pre></html>\n"


def ratings_table(files):
    """Print Table 3 (4.4): means, intervals, quadratic kappas."""
    criteria, rows = ["representativeness", "clarity"], []
    try:
        found = [json.loads(f.read_text("utf-8")) for f in files]
        (kind, _), = {(r["kind"], str(r["made"])) for r in found}  # of one page
        types = dict.fromkeys(criteria, float)
        each = {r["reviewer"]: pd.DataFrame(r["ratings"], [*types, "mark"]).T.astype(types)
                for r in found}
        assert kind == "protoecgnet-ratings" and len(each) == len(files)
    except (AssertionError, KeyError, TypeError, ValueError):
        sys.exit("these are not ratings of one review.html, a file a reviewer")
    wrong = {j for r in each.values() for j in r.index[r["mark"] == "label-error"]}
    for name, r in each.items():
        each[name] = r = r[~r.index.isin(wrong)][criteria]
        half = 1.96 * r.sem()
        cells = zip(r.mean(), r.mean() - half, r.mean() + half, r.count())
        rows.append([name, *("{:.2f} [{:.2f}, {:.2f}] of {}".format(*v) for v in cells)])
    rows += [
        ["paper: cardiologist", "4.29 [4.22, 4.35]", "4.48 [4.42, 4.54]"],
        ["paper: internist", "3.59 [3.52, 3.66]", "4.73 [4.69, 4.77]"]]
    for a, b in itertools.combinations(each, 2):
        row = [f"weighted kappa, {a} and {b}"]
        for k in criteria:
            x, y = pd.concat([each[a][k], each[b][k]], axis=1).dropna().values.T
            kappa = cohen_kappa_score(
                x, y, labels=range(1, 6), weights="quadratic") if len(x) else np.nan
            row.append(f"{kappa:.2f} of {len(x)}")
        rows.append(row)
    print(table(["1-5, mean [95 %]", *criteria], rows))
    print(f"left out, marked as label errors by a reviewer: {len(wrong)}")


def main():
    p = common.argument_parser(__doc__, "prep", "run", "recipe", "model", "threads", "demo")
    p.add_argument("--against", type=Path, metavar="RUN2", help="compare with it")
    p.add_argument("--ratings", type=Path, nargs="+", metavar="FILE", help="print Table 3")
    args = common.parse(p)
    if args.ratings:
        return ratings_table(args.ratings)
    m = measure(args, common.load_prep(args.prep))
    common.save(args.run / "metrics.json", m)
    figures = plot_classes(m), plot_training(args.run, m["trained"])
    for name, figure in zip(("per_class_auroc", "training"), figures):
        content = io.BytesIO()
        figure.savefig(content, dpi=130)
        common.save(args.run / f"figures/{name}.png", content.getvalue())
    text, path = report(m), args.run / "results.md"
    common.save(path, text)
    common.save(args.run / "results.html", results_html(args, m, text))
    print(headline(m))
    name, p = next(iter(m["predictions"].items()))
    value, over = cell(p["auroc"][:3]), p["auroc"][3]
    print(f"{args.run}: {name} {value} over {over} classes -> {path}")


if __name__ == "__main__":
    common.run(main)
