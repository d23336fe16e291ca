"""Can the explanations of a finished run be trusted? Measured on fold 10; what alters records, on 1,000 of them.

    python tests/faithfulness.py --run runs/default --prep runs/prep     writes RUN/faithfulness.json, prints a table

duplicates: share of prototypes whose window an earlier one of the class has (0 by construction where `unique` is on).
dead: prototypes without any weight, or whose similarity varies by less than 1 % of its scale. diversity, separation:
1 - mean cosine of two prototypes of one class, of different classes. agreement: rank correlation of the mean cosine of
two classes with the Jaccard index of their labels (Eq. 7). purity lift: share of a prototype's label among its ten
nearest test records, over the label's prevalence. prototypes for 95 %: how many contributions to a predicted label's
logit hold 95 % of their sum without sign; negative evidence: the share of it that speaks against the label. drops: what
similarity and logit lose when the windows that match a label's first prototype are cut out of all leads and bridged
("cut"), or as much elsewhere ("control"). top class, window: share of records whose highest label, or best window of its
first prototype, stays under 20 dB of noise, baseline wander before the filter, and circular shifts.
"""
import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import BRANCHES, RATE, SAMPLES  # noqa: E402


def geometry(p, p_class, jaccard):
    """How prototypes lie to each other: p [P, D, T] float64, p_class [P], jaccard [C, C] of the training labels."""
    p = p.reshape(len(p), -1)
    unit = p / np.linalg.norm(p, axis=1, keepdims=True)
    S, same = unit @ unit.T, p_class[:, None] == p_class  # [P, P]
    member = np.eye(len(jaccard))[p_class] / np.bincount(p_class)[p_class, None]  # [P, C]
    a, b = np.triu_indices(len(jaccard), 1)
    between = (member.T @ S @ member)[a, b]  # [pairs of classes]
    return {"diversity": 1 - S[same & ~np.eye(len(p), dtype=bool)].mean(), "separation": 1 - S[~same].mean(),
            "agreement": spearmanr(between, jaccard[a, b])[0] if len(a) > 3 else np.nan}


def purity_lift(s, y, p_class, nearest=10, positives=10, prevalence=0.02):
    """The mean over classes with at least 10 positives and under 2 % prevalence (NaN without one): s [N, P], y [N, C]."""
    count, lifts = y.sum(0), []
    for c in np.flatnonzero((count >= positives) & (count < prevalence * len(y))):
        own = np.argsort(-s[:, p_class == c], axis=0, kind="stable")[:nearest]  # [10, own]
        lifts.append(y[own, c].mean() / y[:, c].mean())
    return np.mean(lifts) if lifts else np.nan


def evidence(X, W, b, thresholds):
    """How much of a prediction one must read, the mean over all predicted (record, label): X [N, P] standardised."""
    predicted, needed, against = X @ W.T + b >= thresholds, [], []  # [N, C]
    for w, rows in zip(W, predicted.T):
        terms = X[rows] * w  # [n, P]
        size = -np.sort(-np.abs(terms), axis=1)
        total = np.maximum(size.sum(1, keepdims=True), 1e-12)
        needed += (1 + (size.cumsum(1) < 0.95 * total).sum(1)).tolist()
        against += (np.maximum(-terms, 0).sum(1) / total[:, 0]).tolist()
    return {"prototypes for 95 %": np.mean(needed), "negative evidence": np.mean(against)}


def disturbed(x, rng):
    """x [N, 12, 1000] mV as it might have been recorded: {name: (x, shift in samples)}."""
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
def respond(head, x):
    """x [N, 12, 1000] -> similarities s [N, P], and every prototype's windows, best first, a list of [N, k]."""
    s, windows = [], []
    for part in np.array_split(x, 1 + len(x) // 256):
        part = np.ascontiguousarray(part, np.float32)
        s.append(common.similarities(head, part))
        best = []
        for network in head.networks:
            S = common.similarity(network.latent(torch.from_numpy(part)), network.p, network.a)
            k = min(network.top_k, 5, S.shape[2])
            best += list(S.topk(k, 2).indices.numpy().transpose(1, 0, 2))
        windows.append(best)
    return np.concatenate(s), [np.concatenate(each) for each in zip(*windows)]


def drops(head, x, X, windows, rng):
    """Comprehensiveness (DeYoung et al. 2020) with a control, of the label that exceeds its threshold most."""
    over = np.nan_to_num(X @ head.W.T + head.b - head.thresholds, nan=-np.inf)
    label = over.argmax(1)
    rows = np.flatnonzero(over[np.arange(len(x)), label] >= 0)
    X, label = X[rows], label[rows]
    j = (X * head.W[label]).argmax(1)  # [n] first prototype
    cut, control = x[rows], x[rows]
    for n, i in enumerate(rows):
        mask = np.zeros(SAMPLES, bool)
        for w in windows[j[n]][i]:
            mask[slice(*common.window_samples("partial", int(w)))] = True
        cut[n], control[n] = bridged(x[i], mask), bridged(x[i], elsewhere(mask, rng))
    found = {}
    for name, changed in (("cut", cut), ("control", control)):
        move = X - (respond(head, changed)[0] - head.mean) / head.std  # [n, P]
        found[f"similarity drop, {name}"] = (move[np.arange(len(j)), j] * head.std[j]).mean()
        found[f"logit drop, {name}"] = (move * head.W[label]).sum(1).mean()
    return found


def stability(head, seen, variants, partial):
    """What stays under every disturbance: seen {variant: (s [N, P], windows)}, variants {variant: (x, shift)}."""
    X = {v: (s - head.mean) / head.std for v, (s, _) in seen.items()}
    top = {v: (X[v] @ head.W.T + head.b).argmax(1) for v in X}
    found = {f"top class, {v}": (top[v] == top[""]).mean() for v in X if v}
    if partial:
        j = (X[""] * head.W[top[""]]).argmax(1)
        best = {v: np.array([windows[k][i, 0] for i, k in enumerate(j)], float) for v, (_, windows) in seen.items()}
        found |= {f"window, {v}": (np.abs(best[v] - best[""] - round(shift / 32)) <= 1).mean()
                  for v, (_, shift) in variants.items() if v}
    return found


def measure(head, prep, x, variants, rng):
    """All measures of one classifier; of the fusion those that do not depend on a branch."""
    test = np.array(prep.signals[prep.test])
    s, own = respond(head, test)[0], common.columns(head.classes)
    y, found = prep.labels[prep.test][:, own], {}
    if len(head.networks) == 1:
        network, places = head.networks[0], [(q["class"], q["ecg_id"], q["window"]) for q in head.prototypes]
        p_class, jaccard = network.p_class.numpy(), np.array(prep.info["jaccard"])[np.ix_(own, own)]
        dead = (head.W == 0).all(0) | (s.std(0) < 0.01 * network.a)
        found = {"duplicates": 1 - len(set(places)) / len(places), "dead": int(dead.sum()),
                 **geometry(network.p.detach().double().numpy(), p_class, jaccard),
                 "purity lift": purity_lift(s, y, p_class)}
    found |= evidence((s - head.mean) / head.std, head.W, head.b, head.thresholds)
    seen = {v: respond(head, changed) for v, (changed, _) in variants.items()}
    partial = len(head.networks) == 1 and head.networks[0].kind == "partial"
    found |= stability(head, seen, variants, partial)
    if partial:
        found |= drops(head, x, (seen[""][0] - head.mean) / head.std, seen[""][1], rng)
    return {k: None if np.isnan(v) else round(float(v), 5) for k, v in found.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/default"))
    p.add_argument("--prep", type=Path, default=Path("runs/prep"))
    p.add_argument("--records", type=int, default=1000, help="of fold 10 that are altered (default 1000)")
    args = p.parse_args()
    prep, rng, found = common.load_prep(args.prep), np.random.default_rng(42), {}
    rows = np.flatnonzero(prep.test)
    x = np.array(prep.signals[np.sort(rng.choice(rows, min(args.records, len(rows)), replace=False))])
    variants = {"": (x, 0), **disturbed(x, rng)}
    for name in (*BRANCHES, "fusion"):
        if (args.run / "classifiers" / f"{name}.pt").is_file():
            found[name] = measure(common.load_run(args.run, [name])[0], prep, x, variants, rng)
    common.save(args.run / "faithfulness.json", found)
    metrics = dict.fromkeys(k for each in found.values() for k in each)
    table = importlib.import_module("05_evaluate").table
    print(table(["measure", *found], [[k, *(each.get(k, "–") for each in found.values())] for k in metrics]))


if __name__ == "__main__":
    main()
