"""Stage 05, evaluation (paper 4.1-4.3, Tables 1 and 2): macro-AUROC on the whole of fold 10 at once, with intervals.

How good every prediction of 04 is and how sure that is (bootstrap of test patients, the same draws for all, so that
differences are paired), what interpretability cost step by step, how far the explanations can be trusted, what the
models ask of a machine, and the paper's numbers beside ours.

reads   PREP/*.npy, RUN/predictions.json, RUN/logits_NAME.npy; of each model joint.json and joint.pt or projected.pt,
        prototypes.json, scores.npy and classifier.pt; RUN/fusion.pt; for the report RUN/cases/*.json and their
        pages, README.md
writes  RUN/metrics.json (every number), RUN/results.md (made from it, byte for byte the same each time),
        RUN/figures/per_class_auroc.png and roc.png; RUN/interpretability.json and efficiency.json, each measured once;
        RUN/report.html

    python 05_evaluate.py                        everything that 04 has predicted in the run
    python 05_evaluate.py --against runs/plain   also paired differences to another run, such as one without contrastive
                                                 loss, which then fills that column of the paper's tables
    python 05_evaluate.py --ensemble runs/b runs/c      also the mean of these runs' 1D black boxes and ours
    python 05_evaluate.py --report               also write report.html: the whole run on one page, to read or to print
    python 05_evaluate.py --save NAME            also keep the numbers as tests/results/NAME.json
    python 05_evaluate.py --ratings A.json B.json       the paper's Table 3 from files that 06's review page exported
    python 05_evaluate.py --readme               only write the README's tables from tests/results/*.json

Takes 10 to 20 s on 2 CPU cores, the first time half a minute more for each model; no GPU needed.
Last line: `runs/default: fusion .9321 [.9250, .9390] over 71 classes -> runs/default/results.md`, with your numbers.
"""
import base64
import html
import itertools
import json
import multiprocessing
import re
import resource
import signal
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, cohen_kappa_score, roc_curve
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import common
from common import BOXES, BRANCHES, CODES, GROUPS, MODELS, RATE, SAMPLES, columns, decision_thresholds, load_json

warnings.filterwarnings("ignore", category=RuntimeWarning)  # NaN is "no such class" here, and the mean of none is NaN
HERE = Path(__file__).parent
DRAWS, BATCH, RARE = 1000, 32, 10  # bootstrap draws; the authors' batch; a class with fewer test positives is rare
SETS = {**{b: GROUPS[b] for b in BRANCHES},  # Strodthoff et al. 2021 count four of the 16 as diagnostic statements
        "Strodthoff's rhythm": [c for c in GROUPS["rhythm"] if c not in ("1AVB", "2AVB", "3AVB", "IVCD")]}
EFFICIENCY = ["parameters", "MB of weights", "ms per ECG (batch 1 / 256)", "peak MB (batch 1 / 256)"]
STEPS = ("-joint", "-projected", "-unprojected")  # predictions on the way to a model's final one
ORDER = ["fusion", "fusion-own", "macro", *MODELS, "blackbox-macro", "blackbox-ensemble"]
PAPER = [  # Tables 1 and 2: setting, prediction, AUROC without and with contrastive loss, black box, its AUROC
    ("rhythm branch, 16 labels", "rhythm", .8730, .8758, "blackbox-rhythm", None),
    ("morphology branch, 52", "morphology", .9023, .9056, "blackbox-morphology", None),
    ("global branch, 3", "global", .7461, .8606, "blackbox-global", None),
    ("one branch, 1D, 71", "all-1d", .8462, .8794, "blackbox-1d", .9219),
    ("one branch, 2D partial, 71", "all-partial", .9031, .9137, None, None),
    ("one branch, 2D global, 71", "all-global", .8719, .8983, "blackbox-2d", .9060),
    ("macro aggregation, 71", "macro", .8918, .9048, "blackbox-macro", .9052),
    ("fusion classifier, 71", "fusion", .9010, .9248, None, None)]
MEASURES = {  # metric of interpretability: what it is
    "duplicates": "Share of prototypes whose window an earlier prototype of the same class has. Aim: 5 % or less.",
    "dead": "Prototypes without any weight, or whose similarity varies by less than 1 % of its scale. Aim: 0.",
    "diversity": "1 - mean cosine of two prototypes of a class.",
    "separation": "1 - mean cosine of two prototypes of different classes.",
    "agreement": "Rank correlation of the mean cosine of two classes with the Jaccard index of their labels (Eq. 7).",
    "purity lift": "Share of a prototype's label among its ten nearest test records, over the label's prevalence; for "
                   "classes with 10 or more test positives and a prevalence under 2 %. Aim: 5 or more.",
    "prototypes for 95 %": "How many contributions to a predicted label's logit, largest first, hold 95 % of their sum "
                           "without sign.",
    "negative evidence": "Share of that sum which speaks against the label.",
    "similarity drop": "What the similarity loses when the windows (at most five) that match a predicted label's first "
                       "prototype are cut out of all leads and bridged, and when as much is cut elsewhere. Aim: 3 "
                       "times as much.",
    "logit drop": "The same of the label's logit.",
    "top class": "Share of records whose highest logit stays with its class: under white noise of 20 dB (aim: 95 % or "
                 "more), 0.5 mV of baseline wander before the filter, and circular shifts.",
    "window": "Share of records in which the first prototype of that class matches the same place, to one latent step."}
DEFINITIONS = "Measured on fold 10; what alters records, on 1,000 of them.\n\n" + "\n".join(
    f"- {metric}: {definition}" for metric, definition in MEASURES.items())
COURSE = [  # size against quality: what, prediction, width, rhythm_alone (None: a black box itself)
    ("rhythm branch, small (`--small`)", "rhythm", 32, True),
    ("the same from a black box on 71 labels (`--small --rhythm-alone no`)", "rhythm", 32, False),
    ("rhythm branch, full (the default recipe)", "rhythm", 64, True),
    ("the same from a black box on 71 labels (`--rhythm-alone no`)", "rhythm", 64, False),
    ("ResNet18 black box, small (`--small --model blackbox-rhythm`)", "blackbox-rhythm", 32, None),
    ("ResNet18 black box, full (`--model blackbox-rhythm`)", "blackbox-rhythm", 64, None)]
PAIRS = {  # paired differences, first - second, by the question that they answer
    "Do three branches beat one? (4.1)": [
        ("fusion", m) for m in ("all-1d", "all-partial", "all-global", *BRANCHES)],
    "Does the fusion beat each label from its own branch? (4.1)": [("fusion", "macro")],
    "As good as a black box? (4.3)": [(name, box) for _, name, _, _, box, _ in PAPER if box] + [
        (m, "blackbox-1d") for m in (*BRANCHES, "fusion", "fusion-own")] + [
        ("fusion", "blackbox-macro"), ("fusion", "blackbox-ensemble")],
    "Cost of projection, and of own-class weights alone (3.5)": [
        (m, f"{m}-unprojected") for m in ("fusion", "fusion-own", *MODELS)] + [("fusion-own", "fusion")]}


# Numbers. AUROCs are [1 + draws, 71]: row 0 of the test set as it is, then one row a bootstrap draw; NaN: no such class

def patient_weights(patient_ids, draws, seed):
    """How often each record counts: patient_ids [N] -> [N, 1 + draws] float32; in column 0 each counts once. A draw
    takes as many patients as there are, with replacement, and with a patient all of the patient's records."""
    patients, patient = np.unique(patient_ids, return_inverse=True)
    rng, n = np.random.default_rng(seed), len(patients)
    counts = [np.ones(n)] + [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws)]
    return np.stack(counts, 1)[patient].astype(np.float32)


def weighted_auroc(y, score, weights):
    """AUROC of one class in every draw: y, score [N], weights [N, D] -> [D]; NaN without a positive or a negative.

    Mann-Whitney: over all pairs of a positive and a negative +1 if in order, -1 if not, 0 if tied. The pairs are
    compared once for all draws, and sums of whole weights are exact in float32.
    """
    positive, negative = weights[y > 0], weights[y == 0]
    order = np.sign(score[y > 0, None] - score[None, y == 0]).astype(weights.dtype)        # [positives, negatives]
    right = (positive * (order @ negative)).sum(0, dtype=np.float64)                       # [D]
    return 0.5 + 0.5 * right / (positive.sum(0, dtype=np.float64) * negative.sum(0, dtype=np.float64))


def rounded(v):
    """A number as JSON takes it: five digits, None for NaN."""
    return round(float(v), 5) if np.isfinite(v) else None


def macro(aurocs, codes):
    """Macro mean over `codes` of AUROCs (or a difference of two) [1 + draws, 71], as it stands in metrics.json:
    [value, lower and upper end of the 95 % interval, classes in the mean, codes].

    A draw seldom has every rare class, and the mean of those that it has is another quantity. So a draw says how far
    its classes move from their values on the test set, on average; the interval is the value plus these moves.
    """
    each = aurocs[:, columns(codes)]
    value, moves = np.nanmean(each[0]), np.nanmean(each[1:] - each[0], 1)
    ends = (value + np.nanpercentile(moves, [2.5, 97.5])).clip(-1, 1)
    return [rounded(value), *map(rounded, ends), int(np.isfinite(each[0]).sum()), len(codes)]


def per_batch_auroc(y, score, batch=BATCH):
    """What the authors log, y, score [N, C]: the mean over consecutive batches of the macro-AUROC over the classes with
    both a positive and a negative in the batch. Not the macro-AUROC: most batches miss the rare classes."""
    return np.nanmean([common.macro_auroc(y[i:i + batch], score[i:i + batch]) for i in range(0, len(y), batch)])


# What 02-04 left behind

def load_run(run, prep, force):
    """A run's ({prediction: what 04 says of it, with its logits of fold 9 and of fold 10 [., 71]}, {model: joint.json},
    warnings). Exits when something that the predictions were made from has changed; with `force` that is a warning."""
    path, again, stale = run / "predictions.json", f"{common.rerun('04_fusion.py')} again", []
    saved = load_json(path, "04_fusion.py", "inputs", "models")
    models = {n: saved["models"][n] for n in sorted(saved["models"], key=[*ORDER, *saved["models"]].index)}
    if not any(n in MODELS for n in models):
        sys.exit(f"{path} names no model: {again}")
    if saved["inputs"]["prep"] != common.file_hash(prep.path):
        stale.append(f"{path} was made from another {prep.path}: {again}")
    made_from = {(run / k, v) for m in models.values() for k, v in m["inputs"].items()}
    for source, fingerprint in sorted(made_from):
        latest = source.is_file() and common.newest(source.parent, source.stem.partition("_r")[0], "")[1] == source
        if not latest or common.file_hash(source) != fingerprint:
            stale.append(f"{source} is not what the predictions were made from: {again}")
    joint = {}
    for name in [n for n in models if n in MODELS]:
        maker = common.command("02_train_joint.py", name)
        round_, newest = common.newest(run / name, "joint", maker)
        joint[name] = {**load_json(newest.with_suffix(".json"), maker, "config", "device", "seconds"), "round": round_}
        joint[name]["seconds"] = sum(load_json(f.with_suffix(".json"), maker, "seconds")["seconds"]  # of all rounds
                                     for f in newest.parent.glob("joint*.pt")
                                     if re.fullmatch(r"joint(_r\d+)?", f.stem))  # as common.newest: copies are none
        if name not in BOXES:
            found = load_json(run / name / "prototypes.json", common.command("03_project.py", name), "inputs")
            forced = any(f"another {newest}:" in w for w in models[name].get("warnings", []))   # in 04, which says so
            if found["inputs"].get("joint") != common.file_hash(newest) and not forced:
                stale.append(f"{run / name} was not projected from its {newest.name}: {common.rerun('03_project.py')}, "
                             "then 04")
    if stale and not force:
        sys.exit(f"{stale[0]} (or --force to evaluate it all the same)")
    for name, model in models.items():
        path, on_test = run / f"logits_{name}.npy", prep.test[prep.val | prep.test]
        logits = common.load_npy(path, "04_fusion.py")
        whole = logits.shape == (len(on_test), len(CODES)) and logits.dtype == np.float32
        if not whole or not np.isfinite(logits[:, columns(model["classes"])]).all():
            sys.exit(f"{path} lacks a number for some record of folds 9 and 10 or some label of the model: {again}")
        model["fold 9"], model["fold 10"] = logits[~on_test], logits[on_test]
    first, *rest = [n for n in joint if n not in BOXES] or joint
    stale += [f"{run.name}: {n} has other settings than {first}" for n in rest
              if joint[n]["config"] != joint[first]["config"]]
    stale += sorted({w for m in models.values() for w in m.get("warnings", [])} - {*stale})  # forced in 02-04
    for warning in stale:
        print(f"WARNING: {warning}", file=sys.stderr)
    return models, joint, stale


def config_in(m, name):
    """The Config of one model of metrics `m`; "trained" holds those that are not the run's."""
    return common.config_of({"config": m["trained"].get(name, {}).get("config") or m["config"]})


def another_run(run, prep, force):
    """`load_run` of another run than this call's, with remedies that name it."""
    given = [*common.given]
    common.given[:] = [*(flag for flag in given if not flag.startswith(" --run")), f" --run {run}"]
    found = load_run(run, prep, force)
    common.given[:] = given
    return found


def cost_of(name, cfg, run, model, aurocs):
    """A row of the table of what interpretability costs: the AUROC of each step, and how much there is to read."""
    parts = [load_json(run / m / "prototypes.json", common.command("03_project.py", m), "gap", "distinct", "prototypes")
             for m in ([name] if name in MODELS else BRANCHES)]
    count = [len(part["prototypes"]) for part in parts]
    box = next((b for b in (common.start_of(name, cfg), "blackbox-1d") if b in aurocs), f"blackbox-{name}")
    steps = {**{s: name + s for s in STEPS}, "sparse": name, "black box": box}
    return {"name": name, **{s: macro(aurocs[n], model["classes"])[0] for s, n in steps.items() if n in aurocs},
            **{k: model[k] for k in ("nonzero", "weights")}, "distinct": sum(part["distinct"] for part in parts),
            "gap": rounded(np.average([part["gap"] for part in parts], weights=count)), "prototypes": sum(count)}


# Interpretability: is what an explanation shows what the model goes by?

def geometry(p, p_class, jaccard):
    """How prototypes lie to each other (see MEASURES; Eq. 6 and 7 train for it, "diversity" and "separation" are the
    course proposal's terms): p [P, D, T] float64, p_class [P], jaccard [C, C] of the training labels."""
    p = p.reshape(len(p), -1)
    unit = p / np.linalg.norm(p, axis=1, keepdims=True)
    S, same = unit @ unit.T, p_class[:, None] == p_class                                    # [P, P]
    member = np.eye(len(jaccard))[p_class] / np.bincount(p_class)[p_class, None]            # [P, C]
    a, b = np.triu_indices(len(jaccard), 1)
    between = (member.T @ S @ member)[a, b]                                                 # [pairs of classes]
    return {"diversity": 1 - S[same & ~np.eye(len(p), dtype=bool)].mean(), "separation": 1 - S[~same].mean(),
            "agreement": spearmanr(between, jaccard[a, b])[0] if len(a) > 3 else np.nan}  # not of three classes


def purity_lift(s, y, p_class, nearest=10, positives=10, prevalence=0.02):
    """Do the test records most like a prototype share its label? s [N, P], y [N, C] of the test set, p_class [P].

    The share of the label among a prototype's ten nearest records, over the label's prevalence; the mean over the
    prototypes of a class, then over classes with at least 10 positives and under 2 % prevalence (NaN without one).
    """
    count = y.sum(0)
    lifts = []
    for c in np.flatnonzero((count >= positives) & (count < prevalence * len(y))):
        own = np.argsort(-s[:, p_class == c], axis=0, kind="stable")[:nearest]              # [10, own]
        lifts.append(y[own, c].mean() / y[:, c].mean())
    return np.mean(lifts)


def evidence(X, W, b, thresholds):
    """How much of a prediction one must read (see MEASURES), the mean over all predicted (record, label): standardised
    scores X [N, P], W [C, P], b [C], thresholds [C] on logits; the contribution of prototype p is W_cp X_p."""
    predicted, needed, against = X @ W.T + b >= thresholds, [], []                          # [N, C]
    for w, rows in zip(W, predicted.T):
        terms = X[rows] * w                                                                 # [n, P]
        size = -np.sort(-np.abs(terms), axis=1)
        total = np.maximum(size.sum(1, keepdims=True), 1e-12)
        needed += (1 + (size.cumsum(1) < 0.95 * total).sum(1)).tolist()
        against += (np.maximum(-terms, 0).sum(1) / total[:, 0]).tolist()
    return {"prototypes for 95 %": np.mean(needed), "negative evidence": np.mean(against)}


def disturbed(x, rng):
    """x [N, 12, 1000] mV as it might have been recorded: {name: (x, shift in samples)}.

    20 dB: white noise of a hundredth of each record's power. Wander: a sine of 0.5 mV and 0.15 to 0.3 Hz in each lead,
    as 01's linear high-pass leaves it (the record has been through it). Shifts of 0.2 s are circular.
    """
    power, t = np.square(x).mean((1, 2), keepdims=True), np.arange(SAMPLES) / RATE
    frequency, phase = rng.uniform(0.15, 0.3, (len(x), 1, 1)), rng.uniform(0, 2 * np.pi, (*x.shape[:2], 1))
    return {"20 dB noise": (x + rng.normal(size=x.shape) * np.sqrt(power / 100), 0),
            "wander": (x + common.highpass(0.5 * np.sin(2 * np.pi * frequency * t + phase)), 0),
            "shift +0.2 s": (np.roll(x, 20, 2), 20), "shift -0.2 s": (np.roll(x, -20, 2), -20)}


def bridged(x, mask):
    """x [12, 1000] with the samples of mask [1000] replaced, in every lead, by straight lines between their ends."""
    t = np.arange(x.shape[1])
    return np.stack([np.interp(t, t[~mask], lead[~mask]) for lead in x])


def elsewhere(mask, rng):
    """The same cut, circularly moved to where it overlaps mask [1000] least; at random among equally good places."""
    overlap = np.array([np.roll(mask, shift)[mask].sum() for shift in range(len(mask))])
    return np.roll(mask, rng.choice(np.flatnonzero(overlap == overlap.min())))


@torch.no_grad()
def respond(network, x, device):
    """x [N, 12, 1000] -> similarities s [N, P], and every prototype's windows, best first, [N, P, at most 5]."""
    s, windows = [], []
    for part in np.array_split(x, 1 + len(x) // 256):
        z = network.latent(torch.from_numpy(np.ascontiguousarray(part, np.float32)).to(device))
        s.append(network.scores(z).cpu().numpy())
        S = common.similarity(z, network.p, network.a)
        windows.append(S.topk(min(network.top_k, 5, S.shape[2]), 2).indices.cpu().numpy().astype(np.int16))
    return np.concatenate(s).astype(np.float64), np.concatenate(windows)


def faithfulness(network, head, x, X, windows, thresholds, rng, device):
    """Does the matched window of a partial prototype matter? Of each record x [N, 12, 1000] the label that exceeds its
    threshold most, and of that the prototype with the largest contribution: its best windows (at most five, windows
    [N, P, k]) are cut out of all leads and bridged, and against that equally long cuts elsewhere. X [N, P] are the
    standardised scores. The mean drop of the similarity and of the logit by either cut is the "comprehensiveness" of
    DeYoung et al. 2020, with a control.
    """
    over = np.nan_to_num(X @ head["W"].T + head["b"] - thresholds, nan=-np.inf)
    label = over.argmax(1)
    rows = np.flatnonzero(over[np.arange(len(x)), label] >= 0)
    X, label = X[rows], label[rows]
    j = (X * head["W"][label]).argmax(1)                                                    # [n] first prototype
    cut, control = x[rows], x[rows]
    for n, i in enumerate(rows):
        mask = np.zeros(SAMPLES, bool)
        for w in windows[i, j[n]]:
            mask[slice(*common.window_samples(network.kind, int(w)))] = True
        cut[n], control[n] = bridged(x[i], mask), bridged(x[i], elsewhere(mask, rng))
    moves = {name: X - (respond(network, changed, device)[0] - head["mean"]) / head["std"]  # [n, P]
             for name, changed in (("cut", cut), ("control", control))}
    return {**{f"similarity drop, {name}": (move[np.arange(len(j)), j] * head["std"][j]).mean()
               for name, move in moves.items()},
            **{f"logit drop, {name}": (move * head["W"][label]).sum(1).mean() for name, move in moves.items()}}


def stability(seen, head, variants, kind):
    """Share of records whose class of the highest logit, and for partial prototypes whose best window of that class's
    largest contributor (to within one latent step of where it should be), stay as they are under every disturbance.
    seen {variant: (s [N, P], windows [N, P, k])}, variants {variant: (x, shift in samples)}; "" is the undisturbed."""
    X = {v: (s - head["mean"]) / head["std"] for v, (s, _) in seen.items()}
    top = {v: (X[v] @ head["W"].T + head["b"]).argmax(1) for v in X}
    n, j = np.arange(len(X[""])), (X[""] * head["W"][top[""]]).argmax(1)
    out = {f"top class, {v}": (top[v] == top[""]).mean() for v in X if v}
    if kind == "partial":
        best = {v: windows[n, j, 0].astype(float) for v, (_, windows) in seen.items()}
        out |= {f"window, {v}": (np.abs(best[v] - best[""] - round(shift / 32)) <= 1).mean()
                for v, (_, shift) in variants.items() if v}
    return out


def interpretability(run, prep, models, device, seed, force):
    """{model: {metric: value}} of every prototype model and the fusion in `models`, on fold 10: all of it, or for what
    needs new forward passes 1,000 of its records. Measured once, kept in RUN/interpretability.json."""
    names = [n for n in models if n in MODELS and n not in BOXES]
    files = [*(k for n in names for k in models[n]["inputs"]), *(f"{n}/classifier.pt" for n in names)]
    files += ["fusion.pt"] * ("fusion" in models)
    if missing := [f for f in files if not (run / f).is_file()]:
        sys.exit(f"{run / missing[0]} is missing: {common.rerun('04_fusion.py')} again")
    made_from = {"prep": common.file_hash(prep.path), **{f: common.file_hash(run / f) for f in files},
                 **{k: common.file_hash(HERE / k) for k in ("05_evaluate.py", "common.py")}, "seed": seed}
    path = run / "interpretability.json"
    try:
        kept = json.loads(path.read_text())
        if kept["made_from"] == made_from:
            return kept["models"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not whole
        pass

    rng, test = np.random.default_rng(seed), np.flatnonzero(prep.test)
    rows = np.sort(rng.choice(test, min(1000, len(test)), replace=False))
    x = prep.signals[rows]
    variants, found, scores_of, seen_by = {"": (x, 0), **disturbed(x, rng)}, {}, {}, {}
    for name in tqdm(names, desc="interpretability", leave=False, disable=None):
        (source, *_), maker = models[name]["inputs"], common.command("04_fusion.py", name)
        network = common.load_model(run / source, maker, device)[0]
        meta, head = common.load_head(run / name / "classifier.pt", maker)
        common.same_input(meta, "projected", run / source, run / name / "classifier.pt", maker, force)
        places = load_json(run / name / "prototypes.json", common.command("03_project.py", name), "distinct",
                           "prototypes")
        scores = common.load_npy(run / name / "scores.npy", maker)
        if scores.shape != (len(prep.folds), len(network.p)) or len(head["b"]) != len(network.classes):
            sys.exit(f"{run / name}/scores.npy or classifier.pt does not fit {source}: {common.rerun(maker)} again")
        own, s = columns(network.classes), scores[prep.test].astype(np.float64)
        scores_of[name] = s
        p_class, jaccard = network.p_class.cpu().numpy(), np.array(prep.info["jaccard"])[own][:, own]
        head["thresholds"] = decision_thresholds(prep.labels[prep.val][:, own], models[name]["fold 9"][:, own])
        seen = seen_by[name] = {v: respond(network, changed, device) for v, (changed, _) in variants.items()}
        X = [(scores_ - head["mean"]) / head["std"] for scores_ in (s, seen[""][0])]
        found[name] = {
            "duplicates": 1 - places["distinct"] / len(places["prototypes"]),
            "dead": int(((head["W"] == 0).all(0) | (s.std(0) < 0.01 * network.a)).sum()),
            **geometry(network.p.detach().double().cpu().numpy(), p_class, jaccard),
            "purity lift": purity_lift(s, prep.labels[prep.test][:, own], p_class),
            **evidence(X[0], head["W"], head["b"], head["thresholds"]), **stability(seen, head, variants, network.kind)}
        if network.kind == "partial":
            found[name] |= faithfulness(network, head, x, X[1], seen[""][1], head["thresholds"], rng, device)
    if "fusion" in models:
        meta, head = common.load_head(run / "fusion.pt", "04_fusion.py")
        for source in models["fusion"]["inputs"]:
            common.same_input(meta, source, run / source, run / "fusion.pt", "04_fusion.py", force)
        own = columns(models["fusion"]["classes"])
        seen = {v: (np.concatenate([seen_by[b][v][0] for b in BRANCHES], 1), None) for v in variants}
        thresholds = decision_thresholds(prep.labels[prep.val][:, own], models["fusion"]["fold 9"][:, own])
        s = np.concatenate([scores_of[b] for b in BRANCHES], 1)
        found["fusion"] = {**evidence((s - head["mean"]) / head["std"], head["W"], head["b"], thresholds),
                           **stability(seen, head, variants, "fusion")}
    found = {n: {k: v if isinstance(v, int) else rounded(v) for k, v in each.items()} for n, each in found.items()}
    common.save_json(path, {"format": common.FORMAT, "made_from": made_from, "models": found})
    return found


# What a model asks of a machine: size, time, memory

def measure(paths, outputs, device, threads):
    """Size, time and memory of one model in float32, in a process of its own; device by name.

    paths: joint.pt of a black box, projected.pt of a branch, or those of all branches of a fusion with `outputs`
    labels. Returns parameters, MB of weights, and for batches of 1 and 256 the milliseconds per ECG (fastest of 25 and
    5 repeats after one) from mV on the device to logits, and the peak MB (1e6 bytes) from loading on: of what torch
    allocates on a GPU; on a CPU, by how much the resident set grows over that of Python and its libraries.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    torch.set_num_threads(threads)
    with torch.inference_mode():
        tiny = common.Config(width=8)
        common.ProtoECGNet("partial", ["SR"], [1], tiny)(torch.zeros(2, 12, 1000))  # brings the libraries into memory
        unit = 1e6 if cuda or sys.platform == "darwin" else 1e6 / 1024                      # ru_maxrss is KiB on Linux

        def peak():
            return torch.cuda.max_memory_allocated(device) if cuda else resource.getrusage(
                resource.RUSAGE_SELF).ru_maxrss

        before = peak()
        networks, head = [common.load_model(p, "02_train_joint.py", device)[0] for p in paths], torch.nn.Identity()
        if len(networks) > 1:  # similarities of all branches side by side, Eq. (9), and one classifier for them
            head = torch.nn.Linear(sum(len(n.p) for n in networks), outputs, device=device)
            for network in networks:
                network.head = torch.nn.Identity()
        whole = torch.nn.ModuleList([*networks, head])

        def logits(x):
            return head(torch.cat([network(x)[0] for network in networks], 1))

        out = {"parameters": sum(w.numel() for w in whole.parameters()),
               "MB": sum(w.nbytes for w in whole.state_dict().values()) / 1e6}
        for batch, repeats in ((1, 25), (256, 5)):
            x, seconds = torch.randn(batch, 12, 1000, device=device), []
            for _ in range(1 + repeats):
                began = time.perf_counter()
                logits(x)
                if cuda:
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - began)
            out[f"ms {batch}"] = 1000 * min(seconds[1:]) / batch
            out[f"peak {batch}"] = (peak() - before) / unit
    return {k: v if k == "parameters" else float(f"{v:.3g}") for k, v in out.items()}


def efficiency(args, models):
    """What `measure` says of every network of the run and of its fusion, with the machine it says it of.

    Kept in RUN/efficiency.json, so that an evaluation repeated says the same; measured again when the weights, the
    hardware, the threads or torch are others.
    """
    path = args.run / "efficiency.json"
    machine = {"hardware": common.hardware(args.device), "device": str(args.device),
               "threads": torch.get_num_threads(), "torch": str(torch.__version__),
               "code": common.file_hash(HERE / "common.py")}
    try:
        old = json.loads(path.read_text())
        known = old["models"] if old["machine"] == machine else {}
        known = {n: row for n, row in known.items() if n not in models or row["inputs"] == models[n]["inputs"]}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):  # none yet, or not whole
        known = {}
    # a server that has the libraries but has computed nothing forks a fresh process for each model
    multiprocessing.set_forkserver_preload(["common", "matplotlib.figure", "sklearn.metrics"])
    fresh = ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), common.begin_worker,
                                max_tasks_per_child=1)
    names = [n for n in models if n in MODELS or n == "fusion"]
    stop = []
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C waits for the process at work
    try:
        with fresh:
            for name in tqdm([n for n in names if n not in known], desc="efficiency", leave=False, disable=None):
                paths = [args.run / k for k in models[name]["inputs"]]
                row = fresh.submit(measure, paths, len(models[name]["classes"]), str(args.device), machine["threads"])
                known[name] = {**row.result(), "inputs": models[name]["inputs"]}
                if stop:
                    break
    except BrokenProcessPool:
        sys.exit(f"the process that measured {name} was killed, perhaps for want of memory: "
                 f"{common.rerun('05_evaluate.py')} again")
    finally:
        signal.signal(signal.SIGINT, handler)
    if stop:
        raise KeyboardInterrupt
    common.save_json(path, {"format": common.FORMAT, "machine": machine, "models": known})
    return {**machine, "models": {n: {k: v for k, v in known[n].items() if k != "inputs"} for n in names}}


# Text, all of it made from metrics.json

def number(v, sign=""):
    """.9321 as the paper prints it, +.0012 or -.0000 with sign "+", a dash for None."""
    return "–" if v is None else re.sub(r"^([+-]?)0", r"\1", f"{v:{sign or 'z'}.4f}")


def cell(v, sign=""):
    """[value, low, high, classes in it, codes] -> .9321 [.9250, .9390] (over 68 of 71)."""
    some = f" (over {v[3]} of {v[4]})" if v[3:] and v[3] < v[4] else ""
    return f"{number(v[0], sign)} [{number(v[1], sign)}, {number(v[2], sign)}]{some}"


def table(head, rows):
    """A markdown table, padded so that it reads in a terminal too."""
    rows = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows)


def headline(m):
    """The table that the terminal shows too: every final prediction of the run."""
    head = ["prediction", "macro-AUROC [95 %]", f"{RARE}+ positives", "AUPRC", "F1", "fold 9", f"per batch of {BATCH}*"]
    return table(head, [[n, cell(p["auroc"]), f"{number(p['frequent'][0])} over {p['frequent'][3]}",
                         *(number(p[k]) for k in ("auprc", "f1", "fold 9", "per batch"))]
                        for n, p in m["predictions"].items()])


def paper_table(ours):
    """The paper's Tables 1 and 2 with ours beside: ours(prediction, contrastive, or None for either) -> a cell."""
    head = ["macro-AUROC", "no contrastive: paper", "ours", "contrastive: paper", "ours", "black box: paper", "ours"]
    return table(head, [[setting, number(off), ours(name, False), number(on), ours(name, True), number(box_auroc),
                         ours(box, None) if box else "–"] for setting, name, off, on, box, box_auroc in PAPER])


def cost_table(m):
    """What each step towards interpretability cost, and how much there is to read."""
    steps = {"-joint": "joint", "-projected": "projected", "-unprojected": "sparse, unprojected",
             "sparse": "sparse, projected", "black box": "black box", "gap": "gap"}
    return table(["model", *steps.values(), "prototypes", "distinct", "non-zero weights"],
                 [[r["name"], *(number(r.get(s)) for s in steps), r["prototypes"], r["distinct"],
                   f"{r['nonzero']} ({r['nonzero'] / r['weights']:.1%})"] for r in m["cost"]])


def interpretability_cell(metric, found):
    """A metric of interpretability of one model ({metric: value}) as a cell; of a drop both cuts, and their ratio."""
    drops = [found.get(f"{metric}, {cut}") for cut in ("cut", "control")]
    if None not in drops:
        times = f" ({drops[0] / drops[1]:.1f} times)" if drops[0] > 0 and drops[1] > 0 else ""
        return f"{number(drops[0])}, elsewhere {number(drops[1])}{times}"
    v, digits = found.get(metric), {"dead": 0, "purity lift": 1, "prototypes for 95 %": 1}
    return f"{v:.{digits[metric]}f}" if v is not None and metric in digits else number(v)


def interpretability_table(columns_):
    """Rows of metrics, each in its variants: columns_ {heading: [{metric: value} of a model, ...]}, one cell for all
    models of a column, or for the only one that the metric applies to."""
    measured, rows = dict.fromkeys(k for some in columns_.values() for found in some for k in found), []
    for metric in MEASURES:
        variants = [k for k in measured if k.startswith(metric + ", ") and "drop" not in metric] or [metric]
        for k in variants:
            rows.append([k])
            for some in columns_.values():
                cells = [interpretability_cell(k, found) for found in some]
                known = [c for c in cells if c != "–"]
                rows[-1].append(" / ".join(cells if len(known) > 1 else known) or "–")
    return table(["", *columns_], rows)


def answer(question, v):
    """Yes or no to a question of the paper's section 4, from a paired difference [value, low, high]."""
    if "?" not in question:  # what something cost, or just another run
        return "–"
    if v[1] <= 0 <= v[2]:
        return "no difference shown"
    return "no" if v[2] < 0 else "yes, better" if "as good" in question.lower() else "yes"


def efficiency_cells(row):
    """A row of metrics["efficiency"]["models"] as the cells of a table: parameters, MB, ms and peak at both batches."""
    return [f"{row['parameters']:,}", f"{row['MB']:g}", *(f"{row[f'{k} 1']:g} / {row[f'{k} 256']:g}"
                                                          for k in ("ms", "peak"))]


def machine_text(e):
    """The machine of metrics["efficiency"], in words."""
    threads = f", {e['threads']} CPU thread{'s' * (e['threads'] > 1)}"
    return e["hardware"] + threads * (not e["device"].startswith("cuda"))


def beside(m):
    """(name, {code: its AUROC ...}) of the black box to show beside classes: on all labels, or else of one group."""
    for name in ("blackbox-1d", *(f"blackbox-{b}" for b in BRANCHES)):
        if name in m["per_class"]:
            return name, m["per_class"][name]
    return "black box", {}


def by_group(m):
    """[(group, the prediction that stands for it, {code: [AUROC, low, high, AUPRC, F1, threshold]} best first)]."""
    return [(g, name, {c: v for c, v in sorted(m["per_class"][name].items(), key=lambda item: -(item[1][0] or 0))
                       if c in GROUPS[g] and v[0] is not None}) for g, name in m["shown"].items()]


def report(m):
    """results.md of a run's metrics."""
    predictions, positives, (box_name, box) = m["predictions"], m["counts"]["test_positives"], beside(m)
    suffix = {None: "", **{on: f" of {run}" for run, on in m["against"].items()}, m["contrastive"]: ""}
    codes = [c for c in CODES if any(c in GROUPS[g] for g in m["shown"])]  # of the groups that the run is about
    rare = [c for c in codes if 0 < positives[c] < RARE]

    def ours(name, contrastive):
        p = contrastive in suffix and predictions.get(name + suffix[contrastive])
        return cell(p["auroc"]) if p else "not run"

    out = [f"# Results of {m['run']}",
           f"Recipe {m['recipe']}, seed {m['seed']}, width {m['width']}, with{'' if m['contrastive'] else 'out'} "
           f"contrastive loss; {m['counts']['test']:,} test records of {m['counts']['test_patients']:,} patients.",
           *(f"**WARNING**: {w}" for w in m["warnings"]),
           *["**Not the paper's test set**, which has 2,198 records."] * (m["counts"]["test"] != 2198),
           "## Headline", headline(m),
           f"Macro-AUROC of the logits on the whole of fold 10 at once. {m['rule']} {RARE}+ positives: over the "
           f"classes with {RARE} or more in fold 10. F1: over the classes with positives in fold 10, each at the logit "
           f"with the best F1 on fold 9, or at 0 if it has fewer than {common.FEWEST} positives there. Fold 9: the "
           "macro-AUROC on the fold that all choices were made on.",
           f"\\* per batch of {BATCH}, as the authors log it; not comparable: the mean over batches of the AUROC "
           "over the classes that happen to occur in the batch, which is seldom a rare one.",
           "## The paper's Tables 1 and 2", paper_table(ours)]
    if "macro" in predictions and predictions["macro"]["auroc"][3]:
        each, value = [predictions[b]["auroc"] for b in BRANCHES], predictions["macro"]["auroc"][0]
        n = sum(v[3] for v in each)
        total = sum(v[0] * v[3] for v in each if v[3]) / n
        out += [f"Check: ({' + '.join(f'{v[3]} x {number(v[0])}' for v in each)}) / {n} = {number(total)}; macro "
                f"aggregation {number(value)}: {'equal' if abs(total - value) < 2e-5 else 'NOT EQUAL'}. (The paper's "
                "branches would give .8891 and .8970, where .8918 and .9048 are printed; means over batches, which "
                "they are, need not obey this.)"]
    out += ["## The cost of interpretability", cost_table(m),
            "Macro-AUROC on the model's labels: after Stage 1; after projection, with Stage 1's head; of Stage 3's "
            "sparse classifier on the prototypes before and after projection; of the black box that it starts "
            "from (or else 1D on all labels, or the group's own). Gap: mean of 1 - cosine of a prototype and the patch "
            "that it became. Distinct: different patches within each class.",
            "## Interpretability", interpretability_table(
                {n + suffix: [found] for suffix, some in m["interpretability"].items() for n, found in some.items()}),
            DEFINITIONS,
            "## Efficiency",
            table(["model", *EFFICIENCY], [[n, *efficiency_cells(r)] for n, r in m["efficiency"]["models"].items()]),
            f"Measured in float32 on {machine_text(m['efficiency'])}, for one ECG at a time and for 256 at once. Time: "
            "from millivolts to logits, the fastest of several. Peak memory: while the model is loaded and run, "
            + ("of what torch allocates on the GPU." if m["efficiency"]["device"].startswith("cuda") else
               "the growth of the resident set of a process of its own, beyond Python and its libraries; at batch 256 "
               "another measurement may differ by half."),
            "## Label groups",
            table(["prediction", *(f"{s} ({len(c)})" for s, c in SETS.items())],
                  [[n, *(cell(v) if v[3] else "–" for v in p["groups"].values())] for n, p in predictions.items()]),
            "Strodthoff et al.'s rhythm task lacks 1AVB 2AVB 3AVB IVCD; it cannot be compared with the 16.",
            "## Paired differences",
            *(table([question, "classes", "AUROC [95 %]", "interval excludes 0"],
                    [[what, v[3], cell(v[:3], "+"), "yes" if v[1] > 0 or v[2] < 0 else "no"]
                     for what, v in rows.items() if v[3]]) for question, rows in m["differences"].items()),
            "## Classes",
            table(["label", "prediction", "positives", "AUROC [95 %]", "AUPRC", "F1", "at logit", box_name],
                  [[c, name, positives[c], cell(v[:3]), *map(number, v[3:]), cell(box[c][:3]) if c in box else "–"]
                   for _, name, each in by_group(m) for c, v in each.items()]),
            f"Labels with fewer than {RARE} positives in fold 10; they weigh as much as any other in the macro mean, "
            f"and their own intervals say little: {' '.join(rare) or 'none'}.",
            f"Not modelled, without a training record: {' '.join(c for c in codes if c in m['left_out']) or 'none'}. "
            f"In no mean, without a test positive: {' '.join(c for c in codes if not positives[c]) or 'none'}."]
    return "\n\n".join(out) + "\n"


def course_table(runs):
    """Size against quality on the 16 rhythm labels, from saved `runs` of the default recipe with all of fold 10."""
    rows, free = [], ("seed", "width", "rhythm_alone")
    for what, name, width, alone in COURSE:
        some = [r for r in runs if r["recipe"] == "default" and r["contrastive"] and r["counts"]["test"] == 2198
                and name in r["predictions"] and r["width"] == width and not changed(r, free)
                and alone in (None, r["config"]["rhythm_alone"])]
        e = next((r["efficiency"] for r in some if name in r.get("efficiency", {}).get("models", {})), None)
        rows.append([what, pooled(some, name, True),
                     *([*efficiency_cells(e["models"][name]), machine_text(e)] if e else ["–"] * 5)])
    rows.append(["the paper's rhythm branch, by its authors' measure", number(PAPER[0][3]), *["–"] * 5])
    return table(["model", "macro-AUROC, 16 labels", *EFFICIENCY, "measured on"], rows)


def changed(run, free=("seed", "width")):
    """The settings of a saved run that are not its recipe's (with or without contrastive loss), as a tuple of texts;
    those of `free` may differ."""
    base = common.RECIPES[run["recipe"]]
    base = json.loads(json.dumps(asdict(base if run["contrastive"] else common.without_contrastive(base))))
    own = {n: t["config"] for n, t in run["trained"].items() if "config" in t and n not in BOXES}
    return (*(f"{k} {v}" for k, v in run["config"].items() if k not in free and v != base.get(k)),
            *(f"{k} {v} ({n})" for n, config in own.items() for k, v in config.items() if v != run["config"][k]))


def fill(text, what, parts):
    """`text` with `parts` as paragraphs between its two markers <!-- what:begin --> and <!-- what:end -->."""
    begin, end = f"<!-- {what}:begin -->", f"<!-- {what}:end -->"
    if not (text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)):
        sys.exit(f"README.md needs one line {begin} and below it one line {end}: add them")
    return "\n\n".join([text.split(begin)[0] + begin, *parts, end]) + text.split(end)[1]


def paired_table(some):
    """Paired differences of runs that differ in seed; with contrastive loss, if there are any."""
    some = [r for r in some if r["contrastive"] == some[0]["contrastive"]]
    seeds, rows = sorted({r["seed"] for r in some}), {}
    for r in some:
        for question, pairs in r["differences"].items():
            for pair, v in pairs.items():  # no interval: predictions of one and the same model
                if v[3] and v[1] < v[2]:
                    rows.setdefault((question, pair), {})[r["seed"]] = v
    return table(["question", "difference", *(f"seed {seed}: AUROC [95 %]" for seed in seeds), "answer"], [
        [question, pair, *(cell(v[seed][:3], "+") if seed in v else "–" for seed in seeds),
         " / ".join(dict.fromkeys(answer(question, v[seed]) for seed in seeds if seed in v))]
        for (question, pair), v in rows.items()])


def pooled(some, name, contrastive, key="auroc"):
    """A cell for runs that differ in seed: value [interval] of one; of several mean ± standard deviation [mean of both
    ends]. contrastive None takes runs with and without that loss; key "per batch" and "fold 9" have no interval."""
    by_seed = {r["seed"]: r["predictions"][name][key] for r in some
               if name in r["predictions"] and contrastive in (None, r["contrastive"])}
    if not by_seed:
        return "not run"
    seed, *more = by_seed
    if not more:
        value = cell(by_seed[seed]) if key == "auroc" else number(by_seed[seed])
        return value + f" (seed {seed})" * (len({r["seed"] for r in some}) > 1)
    values = np.array([*by_seed.values()], float).reshape(len(by_seed), -1)
    interval = f" [{number(values[:, 1].mean())}, {number(values[:, 2].mean())}]" if key == "auroc" else ""
    return f"{number(values[:, 0].mean())} ± {number(values[:, 0].std(ddof=1))} ({len(by_seed)} seeds){interval}"


def folded(title, *parts):
    """Paragraphs of the README that a click unfolds."""
    return [f"<details><summary>{title}</summary>", *parts, "</details>"]


def glance(recipes):
    """The README's first table: recipes {what: runs} side by side, by both measures."""
    heads = []
    for what, some in recipes.items():
        seeds = {r["seed"] for r in some if r["contrastive"]}
        heads.append(what.replace(" recipe", "") + f", seed {min(seeds, default='')}" * (len(seeds) == 1))
    rows = [(setting, name, on, True) for setting, name, _, on, *_ in PAPER] + [
        ("fusion, own-class weights only", "fusion-own", None, True), ("black box, 1D, 71", "blackbox-1d", .9219, None)]
    return [table(["macro-AUROC", "paper*", *(f"{head}*" for head in heads), *heads],
                  [[setting, number(paper), *(pooled(some, name, contrastive, key) for key in ("per batch", "auroc")
                                              for some in recipes.values())]
                   for setting, name, paper, contrastive in rows]),
            f"\\* the measure of the authors' code: the mean over batches of {BATCH} test records of the macro-AUROC "
            "over the labels that have both a positive and a negative in the batch. Without the star: on all of fold "
            "10 at once, [95 % interval]."]


def tables_of(title, some):
    """A recipe's own tables, folded: the paper's, by both measures, the cost of interpretability, differences."""
    first = some[0]
    times = ", ".join(f"{n} {t['seconds'] / 60:.0f} ({t['threads']})" for n, t in first["trained"].items())
    trained_on = " and ".join(dict.fromkeys(str(t["hardware"]) for t in first["trained"].values()))
    return folded(
        f"{title}: Tables 1 and 2, the cost of interpretability, paired differences",
        paper_table(lambda *a: pooled(some, *a)),
        f"By the authors' measure, the mean over batches of {BATCH}:",
        paper_table(lambda *a: pooled(some, *a, key="per batch")),
        f"The cost of interpretability, seed {first['seed']} (macro-AUROC on the test set):", cost_table(first),
        f"Minutes of Stage 1 on {trained_on} (threads): {times}.",
        "Paired differences on the test set:", paired_table(some))


def readme():
    """Write the tables of tests/results/*.json between README.md's markers, pooling runs that differ in seed."""
    keys = "recipe seed width contrastive config counts predictions differences cost trained hardware".split()
    files = sorted((HERE / "tests" / "results").glob("*.json"))
    runs, path, seen = [load_json(f, "05_evaluate.py --save NAME", *keys) for f in files], HERE / "README.md", {}
    if not runs:
        sys.exit("tests/results holds no run: write one with `python 05_evaluate.py --save NAME` first")
    for f, r in zip(files, runs):
        key = r["recipe"], r["width"], r["counts"]["test"], changed(r), r["contrastive"], r["seed"]
        if key in seen:
            sys.exit(f"{seen[key]} and {f} are of the same settings and seed: delete the one that does not count")
        seen[key] = f
    same = {}  # runs that differ in nothing but seed and contrastive loss; of a recipe, the fewest changes come first
    runs.sort(key=lambda r: (r["recipe"], -r["width"], r["counts"]["test"], len(changed(r)), changed(r),
                             not r["contrastive"], r["seed"]))
    for r in runs:
        what = f"{r['recipe']} recipe, width {r['width']}"
        what += f", {r['counts']['test']:,} test records" * (r["counts"]["test"] != 2198)
        same.setdefault((what, ", ".join(changed(r))), []).append(r)

    recipes, tables, ablations, measured, names = {}, [], [], {}, ("fusion", "fusion-own", *BRANCHES)
    for (what, changes), some in same.items():
        main = (what, changes) == next(key for key in same if key[0] == what)  # as it is or, failing that, nearest
        for contrastive, loss in ((True, ""), (False, ", no contrastive")):
            if not (those := [r for r in some if r["contrastive"] == contrastive]):
                continue
            rows = {f"{what}: {changes or 'as it is'}{loss}": those}
            if len(those) > 1 and not changes:  # what an ablation, of one seed, is to be compared with
                rows[f"{what}: as it is{loss}, seed {those[0]['seed']}"] = those[:1]
            ablations += [[setting, *(pooled(each, n, None, key) for n in names for key in ("fold 9", "auroc"))]
                          for setting, each in rows.items()]
            found, seed = max(((r.get("interpretability", {}).get("", {}), r["seed"]) for r in those),
                              key=lambda pair: len(pair[0]))  # of the first seed with most
            if main and (shown := [m for m in (*BRANCHES, "fusion") if m in found]):
                only = f", {' / '.join(shown)} only" * (len(shown) < 4)
                measured[f"{what}{' (changed)' * bool(changes)}{loss}, seed {seed}{only}"] = [found[m] for m in shown]
        if main:
            recipes.update({what: some} if not changes else {})
            tables += tables_of(what + f" ({changes})" * bool(changes), some)
    if len(same) > len({what for what, _ in same}):
        tables += folded("Ablations (macro-AUROC on fold 9, where the later choices were made, and on fold 10)",
                         table(["setting", *(f"{n}, fold {k}" for n in names for k in (9, 10))], ablations))
    if measured:
        tables += folded("Interpretability (rhythm / morphology / global / fusion; a single value is of morphology)",
                         interpretability_table(measured), DEFINITIONS)
    text = fill(path.read_text(encoding="utf-8"), "results", glance(recipes) + tables)
    text = fill(text, "course", [course_table(runs)])
    with common.replacing(path) as t:
        t.write_text(text, encoding="utf-8")
    print(f"{path.name}: tables of {len(runs)} runs")


def read_ratings(path):
    """(reviewer, {prototype: its rating}, the prototypes' fingerprints) of a file that 06's review page exported; exits
    if it is none."""
    value, scale = common.load_json(path, "06_plot_prototypes.py --review"), (1, 2, 3, 4, 5, None)
    try:
        if value["kind"] != "protoecgnet-ratings" or value["format"] != 1 or not str(value["reviewer"]).strip():
            raise ValueError
        for r in value["ratings"].values():
            if not {r["representativeness"], r["clarity"]} <= set(scale) or not isinstance(r["mark"], str | None):
                raise ValueError
        return str(value["reviewer"]), value["ratings"], str(value["made"])
    except (AttributeError, KeyError, TypeError, ValueError):
        sys.exit(f"{path} does not hold ratings exported from the review page (06_plot_prototypes.py --review)")


def ratings_table(files):
    """Table 3 (paper 4.4): mean and 95 % interval (normal) per reviewer and criterion, without prototypes that any
    reviewer marked as a label error, and quadratically weighted kappa between each two reviewers."""
    found = [read_ratings(f) for f in files]
    if len({made for _, _, made in found}) > 1:
        sys.exit("the files rate the prototypes of different models: give ratings of one review page")
    reviewers = {reviewer: ratings for reviewer, ratings, _ in found}
    if len(reviewers) < len(files):
        sys.exit("two of the files are of the same reviewer: export each under a name of its own")
    wrong = {j for each in reviewers.values() for j, r in each.items() if r["mark"] == "label-error"}

    def score(reviewer, criterion):
        return {j: r[criterion] for j, r in reviewers[reviewer].items() if j not in wrong and r[criterion]}

    rows = []
    for reviewer in reviewers:
        row = [reviewer]
        for criterion in ("representativeness", "clarity"):
            v = np.array([*score(reviewer, criterion).values()], float)
            half = 1.96 * v.std(ddof=1) / len(v) ** 0.5                                     # NaN of a single rating
            interval = f" [{v.mean() - half:.2f}, {v.mean() + half:.2f}]" * (len(v) > 1)
            row.append(f"{v.mean():.2f}{interval} of {len(v)}" if len(v) else "–")
        rows.append(row)
    rows += [["paper: cardiologist", "4.29 [4.22, 4.35]", "4.48 [4.42, 4.54]"],
             ["paper: internist", "3.59 [3.52, 3.66]", "4.73 [4.69, 4.77]"]]
    for a, b in itertools.combinations(reviewers, 2):
        row = [f"weighted kappa, {a} and {b}"]
        for criterion in ("representativeness", "clarity"):
            x, y = score(a, criterion), score(b, criterion)
            both = sorted(x.keys() & y.keys())
            kappa = cohen_kappa_score([x[j] for j in both], [y[j] for j in both], labels=[1, 2, 3, 4, 5],
                                      weights="quadratic") if both else np.nan
            row.append(f"{kappa:.2f} of {len(both)}" if np.isfinite(kappa) else "–")
        rows.append(row)
    print(table(["1-5, mean [95 %]", "representativeness", "clarity"], rows))
    print(f"left out, marked as label errors by a reviewer: {len(wrong)} prototype{'s' * (len(wrong) != 1)}")


# Figures, in colours of Okabe and Ito that the colour-blind can tell apart

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"


def plot_classes(m):
    """Every class with its interval, by group, best first, in columns read from top to bottom."""
    positives, (box_name, box) = m["counts"]["test_positives"], beside(m)
    rows = [row for group, name, each in by_group(m) for row in [(f"{group} labels ({name})", None), *each.items()]]
    height = -(-len(rows) // -(-len(rows) // 26))                                          # rows of a column
    parts = [rows[i:i + height] for i in range(0, len(rows), height)]
    fig = Figure((4.8 * len(parts), 1.5 + 0.24 * height), layout="constrained")
    for ax, part in zip(fig.subplots(1, len(parts), sharex=True, squeeze=False)[0], parts):
        ax.set_yticks(range(len(part)), [f"{c}  {positives[c]}" if v else c for c, v in part], fontsize=8)
        for i, (c, v) in enumerate(part):
            if v:
                ax.plot(v[1:3], [i, i], color=BLUE, lw=1.5)
                ax.plot(v[0], i, "o", color=BLUE, mfc="white" if positives[c] < RARE else BLUE, ms=5)
                ax.plot(box.get(c, v)[0], i, "|", color=ORANGE, ms=9 * (c in box), mew=2)
            ax.get_yticklabels()[i].set_fontweight("normal" if v else "bold")
        ax.set(ylim=(height - 0.5, -0.5), xlabel="AUROC, fold 10")
        ax.grid(axis="x", color=GREY, lw=0.5)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
    fig.suptitle("AUROC of each class, 95 % interval, number of test positives\n"
                 f"hollow: fewer than {RARE}" + f"; orange bar: {box_name}" * bool(box), fontsize=10)
    return fig


def plot_roc(m, y, models):
    """ROC curves by group, the three most frequent classes in colour, and their mean; y [N, 71] of fold 10."""
    fig, grid, groups = Figure((4.4 * len(m["shown"]), 5), layout="constrained"), np.linspace(0, 1, 501), by_group(m)
    for ax, (group, name, each) in zip(fig.subplots(1, len(groups), squeeze=False)[0], groups):
        color = dict(zip(sorted(each, key=m["counts"]["test_positives"].get)[-3:], (GREEN, ORANGE, BLUE)))
        curves = []
        for c in sorted(each, key=color.__contains__):
            false, true, _ = roc_curve(y[:, CODES.index(c)], models[name]["fold 10"][:, CODES.index(c)])
            curves.append(np.interp(grid, false, true))
            ax.plot(false, true, color=color.get(c, GREY), lw=1.6 if c in color else 0.6,
                    label=f"{c} {number(each[c][0])}" if c in color else None)
        if curves:
            ax.plot(grid, np.mean(curves, 0), color="black", lw=2, ls="--", label=f"mean of {len(curves)}")
            ax.legend(loc="lower right", fontsize=9, framealpha=0.9, edgecolor="none")
        ax.set(title=f"{group} labels ({name})", xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
    fig.suptitle("ROC curves on fold 10; grey: the less frequent classes", fontsize=10)
    return fig


# The final report: one page for the browser and for paper, made from what the stages wrote

def plain(text):
    """Text from a file as markdown that says just that."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(str(text).split()))


def image(path, text):
    """A PNG file as a figure that is part of the page."""
    data, text = base64.b64encode(path.read_bytes()).decode(), html.escape(text)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def summary_text(m):
    """The run in a few sentences: every model with prototypes, and what is known of the first prediction."""
    first, out = next(iter(m["predictions"])), []
    for setting, name, off, on, *_ in PAPER:
        if name in m["predictions"]:
            out.append(f"- {setting}: macro-AUROC **{cell(m['predictions'][name]['auroc'])}** on fold 10. The paper "
                       f"reports {number(on if m['contrastive'] else off)}, by its authors' measure (see Headline).")
    out += [f"- {plain(what)}: {cell(v[:3], '+')}, the paired difference of their macro-AUROCs over {v[3]} labels."
            for rows in m["differences"].values() for what, v in rows.items()
            if what.startswith(f"{first} - ") and v[3]]
    if first in m["efficiency"]["models"]:
        e = m["efficiency"]["models"][first]
        out.append(f"- {first}: {e['parameters']:,} parameters in {e['MB']:g} MB, {e['ms 1']:g} ms for one ECG, peak "
                   f"memory {e['peak 1']:g} MB, on {plain(machine_text(m['efficiency']))}.")
    return "\n".join(out)


def approach_text(m, info):
    """What was done to the records and how the models were trained, by the names of the paper and the proposal."""
    cfg, trained = m["config"], m["trained"]
    loss = " + ".join(f"{cfg[f'lambda_{k}']:g} x {what}" for k, what in (
        ("clst", "clustering"), ("sep", "separation"), ("div", "diversity / P²"), ("cntrst", "contrastive / √P")))
    rows = [
        ("Baseline-wander removal", info["filter"]),
        ("Standardisation", "StandardScaler per lead, fitted on folds 1-8" if cfg["scale_input"] else "none"),
        ("Tensors", "x [records, 12 leads, 1,000 samples], ten seconds at 100 Hz, mV"),
        ("Multi-label encoding", "a label is 1 if its SCP code is stated, whatever the likelihood"),
        ("Predefined folds", "1-8 for training, 9 for every choice, 10 for the results"),
        ("Inverse-frequency class weights", "(N - n) / n" if cfg["class_weights"] else "no (`--class-weights yes`)"),
        ("Weighted random sampling", "by the inverse frequency of a record's labels" if cfg["sampler"] == "weighted"
         else "no (`--sampler weighted`)"),
        ("Backbone", f"ResNet18 with {cfg['width']} channels in its first stage" + "".join(
            f"; {n} starts from {common.start_of(n, config_in(m, n))}" for n in trained if n not in BOXES)),
        ("Five loss terms, Eq. (2)", f"binary cross-entropy + {loss}"),
        ("Stage 1, joint training", "; ".join(
            f"{n}: {t['epochs']} epochs, best {t['best_epoch']}" + f" (round {t['round']})" * (t["round"] > 1)
            for n, t in trained.items() if t.get("epochs"))),
        *(("Stage 2, projection", f"{r['name']}: {r['prototypes']} prototypes became {r['distinct']} different patches "
           f"of training ECGs, at a mean cosine distance of {r['gap']:.3f}") for r in m["cost"] if r["name"] in MODELS),
        *(("Stage 3, classifier", f"{r['name']}: {r['nonzero']} of {r['weights']} weights are not 0")
          for r in m["cost"]),
        ("Measure", "macro-AUROC on the whole of fold 10 at once")]
    return ("ProtoECGNet compares an ECG with prototypes, each a patch of a training ECG of one class, in the latent "
            "space of a residual network, and decides by a sparse linear layer on the similarities (Sethi et al., MLHC "
            "2025). So each decision can be traced to ECGs of other patients.\n\n"
            + table(["step", "in this run"], [(k, v if "`" in v else plain(v)) for k, v in rows]))


def data_text(m, info, what):
    """Records of each split, and how often each modelled label occurs; `what` the data set is called."""
    sizes, codes = info["sizes"], [c for c in CODES for g in m["shown"] if c in GROUPS[g]]
    codes.sort(key=lambda c: -info["training_positives"][c])
    return "\n\n".join([
        f"{what}, {info['records']:,} ten-second 12-lead ECGs at 100 Hz; patients stay within a fold. Skipped as "
        f"unreadable: {len(info['skipped'])}.",
        table(["split", "folds", "records"], [["training", "1-8", f"{sizes['train']:,}"],
              ["validation", "9", f"{sizes['validation']:,}"],
              ["test", "10", f"{sizes['test']:,} of {m['counts']['test_patients']:,} patients"]]),
        table(["label", "meaning", "group", "training records", "test records"],
              [[plain(c), plain(info["descriptions"][c]), next(g for g in BRANCHES if c in GROUPS[g]),
                f"{info['training_positives'][c]:,}", f"{m['counts']['test_positives'][c]:,}"] for c in codes])])


def limits_text(m):
    """What the numbers of this run do not show, then the README's section on limits."""
    rare = [c for c, n in m["counts"]["test_positives"].items() if 0 < n < RARE and any(
        c in GROUPS[g] for g in m["shown"])]
    own = [f"- One run with one seed ({m['seed']}): how much another seed would change is not in the intervals, which "
           "are over test patients.",
           f"- {len(rare)} labels have fewer than {RARE} test records and weigh as much as any other in the mean: "
           f"{', '.join(map(plain, rare)) or 'none'}.",
           "- The paper's numbers are means over test batches of 32, ours are over the whole test set at once."]
    own += ["- **The test set is not the paper's 2,198 records.**"] * (m["counts"]["test"] != 2198)
    page = (HERE / "README.md").read_text(encoding="utf-8")
    return "\n".join(own) + "\n\n" + page.split("\n## Limits\n")[1].split("\n## ")[0].strip()


def reproduce_text(args, m, info):
    """The commands that make this run, then settings, versions, hardware and seed."""
    cfg = common.config_of(m)

    def stage_1(config):
        """02 with the flags that make these settings."""
        own = common.config_of({"config": config})
        base = common.recipe(SimpleNamespace(**{**vars(args), "recipe": own.recipe, "seed": 42}))
        flags = f" --recipe {own.recipe}" * (own.recipe != args.recipe) + f" --seed {own.seed}" * (own.seed != 42)
        for k, v in config.items():
            if k not in ("recipe", "seed", "rounds") and getattr(own, k) != getattr(base, k):
                value = " ".join(map(str, v)) if isinstance(v, list) else ["no", "yes"][v] if isinstance(v, bool) else v
                flags += f" --{k.replace('_', '-')} {value}"
        return common.command_line("02_train_joint.py") + flags

    apart = {n: t["config"] for n, t in m["trained"].items() if t.get("config")}  # with settings of their own
    starts = {common.start_of(n, config_in(m, n)) for n in m["trained"] if n not in BOXES}
    names, models = [n for n in m["trained"] if n not in {*starts, *apart}], ""
    if sorted(names) != sorted(["rhythm"] if args.small else BRANCHES):
        models = f" --model {' '.join(names)}"
    again = f" --model {' '.join(n for n in names if n not in BOXES)}" if models else ""
    asked = info["records"] + len(info["skipped"])
    records = f" --records {asked}" * (asked != 21799 and not args.demo) + " --skip-bad" * bool(info["skipped"])
    imagenet = cfg.width == 64 and cfg.start != "random" and any(
        n in ("blackbox-2d", "blackbox-morphology", "blackbox-global") or cfg.start == "imagenet" for n in m["trained"])
    lines = ["python 00_download.py" + " --demo" * args.demo + " --imagenet" * imagenet,
             common.command_line("01_preprocess.py") + records]
    lines += [f"{stage_1(config)} --model {n}" for n, config in apart.items() if n in BOXES]
    lines += [stage_1(m["config"]) + models]
    for round_ in range(1, cfg.rounds + 1) if starts else ():
        more = f" --round {round_}" * (round_ > 1)
        lines += [stage_1(m["config"]) + again + more] * (round_ > 1)
        lines += [f"{stage_1(config)} --model {n}{more}" for n, config in apart.items() if n not in BOXES]
        lines += [common.command_line("03_project.py")]
    lines += map(common.command_line, ("04_fusion.py", "05_evaluate.py", f"06_plot_prototypes.py{example(info)}",
                                       "05_evaluate.py --report"))
    about = [("seed", cfg.seed), *m["versions"].items(), ("evaluated on", m["hardware"]),
             *((f"{n} trained on", f"{t['hardware']}" + (f", {t['seconds'] / 60:.1f} minutes" if t["seconds"] else ""))
               for n, t in m["trained"].items() if t.get("hardware")),
             *((f"fingerprint of {k}", v) for k, v in {**info["inputs"], **info["sha256"]}.items())]
    settings = [(k, " ".join(map(str, v)) if isinstance(v, list) else v) for k, v in m["config"].items()]
    return "\n\n".join(["Install `requirements.txt`, then in the folder of the scripts:", "```\n" + "\n".join(lines) +
                        "\n```", table(["what", "value"], [map(plain, row) for row in about]),
                        "Every setting (`Config` in common.py says what each one is):",
                        table(["setting", "value"], [map(plain, row) for row in settings])])


def example(info):
    """Flags of 06 for test ECGs worth a look: those of the paper's Figures 3, 4 and 6, or the first ones."""
    test = info["test_ecgs"]
    return " --case " + " ".join(str(e) for e in [e for e in (449, 3908, 12126) if e in test] or test[:3])


def cases_html(args, render, prep, info):
    """Every case that 06 explained: its labels, the prototypes that speak for them, and the pages that it drew."""
    out = []
    for path in sorted((args.run / "cases").glob("*.json"), key=lambda p: (len(p.stem), p.stem)):
        flags = f" --case {path.stem}" if path.stem.isdecimal() else " --record PATH"
        maker = f"06_plot_prototypes.py{flags}"
        found = load_json(path, maker, "inputs", "title", "true_labels", "explained")
        for key in found["inputs"]:
            source = prep.path if key == "prep" else args.run / key
            common.same_input(found, key, source, path, maker, args.force)
        try:
            rows, pages = [], []
            for r in found["explained"]:
                verdict = f"{r['probability']:.3g}, {'≥' if r['predicted'] else '<'} {r['threshold']:.3g}"
                for q in r["prototypes"]:
                    rows.append([plain(r["label"]), verdict, plain(f"{q['model']} {q['index']}"), plain(q["class"]),
                                 f"{q['ecg_id']:d}", plain(" ".join(q["labels"])), f"{q['similarity']:.3f}",
                                 f"{q['contribution']:+.3f}"])
                    text = f"{found['title']} (left) and prototype {q['model']} {q['index']} (right), for {r['label']}"
                    pages.append(image(path.with_suffix("") / Path(q["page"]).name, text))
            true = "not known" if found["true_labels"] is None else ", ".join(found["true_labels"]) or "none"
            stale = "".join(f"**WARNING**: {plain(w)}\n\n" for w in found.get("warnings", []))
            text = f"### {plain(found['title'])}\n\n{stale}True labels: {plain(true)}.\n\n" + table(
                ["label", "probability, threshold", "prototype", "of class", "source ECG", "its labels", "similarity",
                 "contribution"], rows)
        except (AttributeError, KeyError, OSError, TypeError, ValueError):
            sys.exit(f"{path} or one of its pages is damaged: {common.rerun(maker)} again")
        out.append(f'<div class="case">{render(text)}{"".join(pages)}</div>')
    again = f"`{common.command_line('06_plot_prototypes.py' + example(info))}`"
    note = ("A contribution is the weight of a prototype times how far its similarity lies above its mean over the "
            f"training records, in standard deviations. {again} adds more." if out else
            f"No ECG has been explained yet: run {again}, then this command again.")
    return render(note) + "".join(out)


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 0 auto; padding: 0 16px 48px }
h1 { line-height: 1.2; margin-bottom: 0 } h2 { border-bottom: 2px solid #0b4f8a; margin-top: 48px; color: #0b4f8a }
h1, h2, h3, p, li, figcaption { overflow-wrap: anywhere } h2, h3 { break-after: avoid }
nav ul { columns: 3 180px; padding-left: 20px } a { color: #0b4f8a }
.wide { overflow-x: auto; margin: 16px 0 } table { border-collapse: collapse; font-size: 14px }
th, td { border-bottom: 1px solid #ccc; padding: 3px 12px 3px 0; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #777 } td { font-variant-numeric: tabular-nums } tr { break-inside: avoid }
pre { background: #f1f1f1; padding: 12px; overflow-x: auto } code { font-size: 0.9em }
figure { margin: 16px 0; overflow-x: auto; break-inside: avoid } img { max-width: 100% } figcaption { font-size: 14px }
@media screen and (max-width: 700px) { .case img { max-width: none; width: 1000px } img { max-width: max(100%, 560px) }
  table { width: max-content; max-width: 640px } }
@page { size: A4; margin: 14mm } @page wide { size: A4 landscape; margin: 10mm }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt } #results { break-before: page } .wide { overflow: visible }
  table { font-size: 7.5pt } th, td { padding-right: 6px } pre { white-space: pre-wrap; overflow-wrap: anywhere }
  figure { overflow: visible } img { max-height: 110mm } .case { page: wide; break-before: page }
  .case img { max-height: 165mm } a { color: inherit; text-decoration: none } h2 { margin-top: 24pt }
}"""


def final_report(args, m, prep):
    """Write RUN/report.html: results.md, figures and cases in one page without links to anything outside it."""
    md = MarkdownIt("commonmark", {"html": False}).enable("table")
    md.add_render_rule("table_open", lambda *_: '<div class="wide"><table>')
    md.add_render_rule("table_close", lambda *_: "</table></div>")
    info = {**prep.info, "test_ecgs": sorted(prep.ecg_ids[prep.test].tolist())}
    results = (args.run / "results.md").read_text(encoding="utf-8")
    opening, *parts = re.split(r"(?m)^(?=## )", results)
    parts = [re.sub(r"(?m)^##", "###", part) for part in parts]
    about = [part for part in parts if "interpretab" in part.partition("\n")[0].lower()]
    figures = [image(args.run / "figures" / f"{name}.png", text) for name, text in (
        ("per_class_auroc", "AUROC of each class on fold 10 with its 95 % interval"),
        ("roc", "ROC curves on fold 10"))]
    gallery = f"`{common.command_line('06_plot_prototypes.py')}` draws every prototype, with an index by label."
    sections = {"Summary": md.render(summary_text(m)), "Approach": md.render(approach_text(m, info)),
                "Data": md.render(data_text(m, info, "Synthetic records" if args.demo else "PTB-XL")),
                "Results": md.render("\n\n".join(p for p in parts if p not in about)) + "".join(figures),
                "Interpretability": md.render("\n\n".join([*about, gallery])),
                "Test ECGs beside prototypes": cases_html(args, md.render, prep, info),
                "Limitations": md.render(limits_text(m)),
                "How to reproduce": md.render(reproduce_text(args, m, info))}
    title = html.escape(f"ProtoECGNet: report of {m['run']}")
    anchor = {name: name.lower().replace(" ", "-") for name in sections}
    nav = "".join(f'<li><a href="#{anchor[name]}">{name}</a></li>' for name in sections)
    body = "".join(f'<section id="{anchor[name]}"><h2>{name}</h2>{text}</section>' for name, text in sections.items())
    path = args.run / "report.html"
    with common.replacing(path) as t:
        t.write_text(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>{md.render(opening.partition(chr(10))[2])}
<p>For research, not for clinical use.</p><nav><ul>{nav}</ul></nav>{body}</body></html>
""", encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, for any browser and for paper")


def main():
    p = common.argument_parser(__doc__)
    p.add_argument("--against", type=Path, metavar="RUN2", help="another run on the same arrays to compare with")
    p.add_argument("--ensemble", type=Path, nargs="+", default=[], metavar="RUN2",
                   help="also evaluate the mean of the logits of these runs' blackbox-1d and this run's")
    p.add_argument("--save", metavar="NAME", help="keep the numbers as tests/results/NAME.json")
    p.add_argument("--report", action="store_true", help="also write RUN/report.html, all of the run on one page")
    p.add_argument("--readme", action="store_true", help="only write the README's tables from tests/results/*.json")
    p.add_argument("--ratings", type=Path, nargs="+", metavar="FILE", help="Table 3 from exported review files")
    args = common.parse(p)
    if args.save and not re.fullmatch(r"\w[\w.-]*", args.save):
        p.error("--save takes a name of letters, digits, '.', '_' and '-', no path")
    if args.readme:
        return readme()
    if args.ratings:
        return ratings_table(args.ratings)
    prep = common.load_prep(args.prep)
    models, joint, stale = load_run(args.run, prep, args.force)
    if args.ensemble:
        boxes = {args.run.resolve(): models}
        for other in args.ensemble:
            boxes[other.resolve()], _, more = another_run(other, prep, args.force)
            stale += more
        if lacking := [r for r, m in boxes.items() if "blackbox-1d" not in m]:
            sys.exit(f"{lacking[0]} has no predictions of blackbox-1d: run `python 04_fusion.py --run {lacking[0]}`")
        models["blackbox-ensemble"] = {**models["blackbox-1d"], **{
            fold: np.mean([m["blackbox-1d"][fold] for m in boxes.values()], 0) for fold in ("fold 9", "fold 10")}}
    for name in [n for n in args.model or [] if n not in models]:
        sys.exit(f"{args.run} has no predictions of {name}: {common.rerun(common.command('04_fusion.py', name))} first")
    if args.model:
        joint = {n: joint[n] for n in joint if n in args.model}
        wanted = {name + step for name in args.model for step in ("", *STEPS)} | {"blackbox-ensemble"}
        models = {n: m for n, m in models.items() if n in wanted}
    final, pairs, against = [n for n in models if not n.endswith(STEPS)], dict(PAIRS), {}
    own, setting = list(final), next(iter(joint.values()))["config"]  # a prototype model's if there is one
    if args.against:  # its predictions join ours as "NAME of RUN2"
        theirs, joint_2, more = another_run(args.against, prep, args.force)
        run_2, stale = args.against.name, stale + more
        models.update({f"{n} of {run_2}": theirs[n] for n in own if n in theirs})
        final += [f"{n} of {run_2}" for n in own if n in theirs]
        contrastive = next(iter(joint_2.values()))["config"]["lambda_cntrst"] != 0
        question = f"Against {run_2}"
        loss, without = (joint_2, joint) if contrastive else (joint, joint_2)
        both = [(common.config_of(loss[n]), common.config_of(without[n]))
                for n in joint if n in joint_2 and n not in BOXES]
        # do they differ in the contrastive loss, and in nothing that does not go with it?
        if both and all(a.lambda_cntrst and b in (common.without_contrastive(a), replace(a, lambda_cntrst=0.0))
                        for a, b in both):
            against[run_2] = contrastive
            question = question if contrastive else "Does the contrastive loss help? (4.2)"
        pairs[question] = [(n, f"{n} of {run_2}") for n in own]

    # AUROCs of every prediction with the same draws of patients
    y_val, y = prep.labels[prep.val], prep.labels[prep.test]
    positives = dict(zip(CODES, y.sum(0).tolist()))
    weights = patient_weights(prep.patient_ids[prep.test], DRAWS, args.seed)
    aurocs = {n: np.full((1 + DRAWS, len(CODES)), np.nan) for n in models}
    with threadpool_limits(1):  # many small products: on a busy machine threads would wait for each other
        for name, model in tqdm(models.items(), desc="bootstrap", leave=False, disable=None):
            for c in columns(model["classes"]):
                aurocs[name][:, c] = weighted_auroc(y[:, c], model["fold 10"][:, c], weights)

    # What else there is to say of the final ones
    by_id, predictions, per_class = np.argsort(prep.ecg_ids[prep.test], kind="stable"), {}, {}
    for name in final:
        codes = GROUPS[MODELS.get(name.partition(" of ")[0], (None, "all"))[1]]
        s_val, s, true = models[name]["fold 9"], models[name]["fold 10"], y > 0             # [., 71]
        thresholds = decision_thresholds(y_val, s_val)                                      # [71], as f1 and auprc
        f1 = 2 * (true & (s >= thresholds)).sum(0) / (true.sum(0) + (s >= thresholds).sum(0))
        f1[~true.any(0) | np.isnan(s[0])] = np.nan                                          # no such label, or not its
        auprc = np.full(len(CODES), np.nan)
        for c in columns(c for c in models[name]["classes"] if positives[c]):
            auprc[c] = average_precision_score(true[:, c], s[:, c])
        predictions[name] = {
            "auroc": macro(aurocs[name], codes), "groups": {g: macro(aurocs[name], s) for g, s in SETS.items()},
            "frequent": macro(aurocs[name], [c for c in codes if positives[c] >= RARE]),
            "auprc": rounded(np.nanmean(auprc)), "f1": rounded(np.nanmean(f1)),
            "fold 9": rounded(common.macro_auroc(y_val, s_val)),
            "per batch": rounded(per_batch_auroc(y[by_id], s[by_id]))}
        per_class[name] = {c: [*macro(aurocs[name], [c])[:3], *map(rounded, (auprc[i], f1[i], thresholds[i]))]
                           for i, c in enumerate(CODES) if c in models[name]["classes"]}

    read_out = {"": interpretability(args.run, prep, {n: models[n] for n in own}, args.device, args.seed, args.force)}
    if args.against:
        found = interpretability(args.against, prep, theirs, args.device, args.seed, args.force)
        read_out[f" of {run_2}"] = {n: found[n] for n in found if n in own}
    differences = {question: {f"{a} - {b}": macro(aurocs[a] - aurocs[b], CODES) for a, b in some if {a, b} <= {*aurocs}}
                   for question, some in pairs.items()}
    metrics = {
        "format": common.FORMAT, "run": args.run.name, **{k: setting[k] for k in ("recipe", "seed", "width")},
        "contrastive": setting["lambda_cntrst"] != 0, "config": setting, "warnings": stale,
        "hardware": common.hardware(args.device),
        "versions": common.provenance(common.Config(), "05_evaluate.py")["versions"],
        "trained": {n: {**{k: j.get(k) for k in ("device", "hardware", "threads", "seconds", "epochs", "best_epoch",
                                                      "round")},
                        **({"config": j["config"]} if j["config"] != setting else {})}
                    for n, j in joint.items()},
        "counts": {**prep.info["sizes"], "test_patients": len(np.unique(prep.patient_ids[prep.test])),
                   "test_positives": positives},
        "left_out": prep.info["without_training_record"],
        "rule": f"Intervals: 95 % percentiles of {DRAWS:,} bootstrap draws by patient (seed {args.seed}), the same for "
                "all; a draw moves a macro mean by what it moves the classes that it has, on average.",
        "predictions": predictions, "differences": {q: rows for q, rows in differences.items() if rows},
        "against": against, "interpretability": read_out,
        "efficiency": efficiency(args, {n: models[n] for n in own}),
        "cost": [cost_of(n, common.config_of(joint.get(n, {"config": setting})), args.run, models[n], aurocs)
                 for n in own if "nonzero" in models[n]],
        # which prediction stands for a group of labels in figures and the table of classes: the first that has it
        "shown": {g: n for n in reversed(final) for g in BRANCHES if set(GROUPS[g]) & set(models[n]["classes"])},
        "per_class": per_class}
    common.save_json(args.run / "metrics.json", metrics)
    if args.save:
        small = {k: v for k, v in metrics.items() if k != "per_class"}
        common.save_json(HERE / "tests" / "results" / f"{args.save}.json", small)
    text, results, page = report(metrics), args.run / "results.md", args.run / "report.html"
    if page.is_file() and not args.report and text.encode() != (results.read_bytes() if results.is_file() else b""):
        page.unlink()
        print(f"removed {page}, which showed older results; --report writes it anew")
    with common.replacing(results) as t:
        t.write_text(text, encoding="utf-8")
    for name, figure in (("per_class_auroc", plot_classes(metrics)), ("roc", plot_roc(metrics, y, models))):
        with common.replacing(args.run / "figures" / f"{name}.png") as t:
            figure.savefig(t, format="png", dpi=130)
    first = predictions[final[0]]["auroc"]
    print(headline(metrics))
    if args.report:
        final_report(args, metrics, prep)
    print(f"{args.run}: {final[0]} {cell(first[:3])} over {first[3]} classes -> {args.run / 'results.md'}")


if __name__ == "__main__":
    common.run(main)
