"""Can the explanations of a finished run be trusted? Measured on fold 10, on up to 1,000 records of
it where records are altered; some minutes on 2 CPU cores.

    python tests/faithfulness.py --run runs/default --prep runs/prep
    python tests/faithfulness.py --save NAME           also into tests/results/NAME.json, for tables.py

writes RUN/faithfulness.json and prints a table of what follows. The first prototype of a label is,
of the piece of evidence (common.evidence) with the largest contribution, the nearest to the record.

duplicates            share of prototypes whose window an earlier one of the class has; aim: 5 %
dead                  prototypes of a piece without weights, or that hardly vary; aim: none
diversity             1 - mean cosine of two prototypes of a class
separation            1 - mean cosine of two prototypes of different classes
agreement             rank correlation of the mean cosine of two classes with the Jaccard index of
                      their labels, Eq. (7)
purity lift           share of a prototype's label among its ten nearest records, over the label's
                      prevalence; for labels with 10 or more positives and under 2 %; aim: 5
pieces for 95 %       how many pieces' contributions to a predicted label's logit, largest first,
                      hold 95 % of their sum without sign
three largest         share of that sum in the three largest pieces
negative evidence     share of that sum which speaks against the label
similarity drop       what the similarity to a predicted label's first prototype loses when its best
                      windows (five at most) are cut out of all leads and bridged ("cut"), and when
                      as much is cut elsewhere ("control"); aim: 3 times as much
logit drop            the same of the label's logit
top class             share of records whose highest logit stays with its class under white noise of
                      20 dB (aim: 95 %), 0.5 mV of baseline wander before the filter, and shifts
window                share of records in which the first prototype of that class matches the same
                      place, to one latent step
"""
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import BRANCHES, RATE, SAMPLES  # noqa: E402


# ---- Prototypes and contributions

def standardised(head, s):
    """Similarities s [N, P] -> X [N, F], pieces of evidence as the weights see them."""
    return (common.evidence(s, head.A) - head.mean) / head.std


def first_prototypes(head, s, label):
    """The first prototype (see above) of label [N] in records of similarities s [N, P]: [N]."""
    piece = (standardised(head, s) * head.W[label]).argmax(1)
    return np.where(head.A.T[piece] > 0, s, -np.inf).argmax(1)


def geometry(p, p_class, jaccard):
    """How prototypes lie to each other: p [P, D, T], p_class [P], jaccard [C, C]."""
    p = p.reshape(len(p), -1)
    unit = p / np.linalg.norm(p, axis=1, keepdims=True)
    S, same = unit @ unit.T, p_class[:, None] == p_class  # [P, P]
    member = np.eye(len(jaccard))[p_class] / np.bincount(p_class)[p_class, None]  # [P, C]
    a, b = np.triu_indices(len(jaccard), 1)
    between = (member.T @ S @ member)[a, b]  # [pairs of classes]
    agreement = np.nan
    if len(a) > 3:  # three classes have no rank correlation to speak of
        agreement = spearmanr(between, jaccard[a, b])[0]
    return {"diversity": 1 - S[same & ~np.eye(len(p), dtype=bool)].mean(),
            "separation": 1 - S[~same].mean(), "agreement": agreement}


def purity_lift(s, y, p_class, nearest=10, positives=10, prevalence=0.02):
    """Mean over prototypes of a class, then over classes (NaN without one): s [N, P], y [N, C]."""
    count, lifts = y.sum(0), []
    for c in np.flatnonzero((count >= positives) & (count < prevalence * len(y))):
        own = np.argsort(-s[:, p_class == c], axis=0, kind="stable")[:nearest]  # [10, own]
        lifts.append(y[own, c].mean() / y[:, c].mean())
    return np.mean(lifts) if lifts else np.nan


def evidence(X, W, b, thresholds):
    """How much of a prediction one must read, the mean over all predicted (record, label):
    X [N, F], W [C, F]; the contribution of the piece f of evidence is W_cf X_f."""
    predicted, needed, three, against = X @ W.T + b >= thresholds, [], [], []  # [N, C]
    for w, rows in zip(W, predicted.T):
        terms = X[rows] * w  # [n, F]
        size = -np.sort(-np.abs(terms), axis=1)
        total = size.sum(1, keepdims=True).clip(1e-12)
        needed += (1 + (size.cumsum(1) < 0.95 * total).sum(1)).tolist()
        three += (size[:, :3].sum(1) / total[:, 0]).tolist()
        against += ((-terms).clip(0).sum(1) / total[:, 0]).tolist()
    return {"pieces for 95 %": np.mean(needed), "three largest": np.mean(three),
            "negative evidence": np.mean(against)}


# ---- Altered records

def disturbed(x, rng):
    """x [N, 12, 1000] mV as it might have been recorded: {name: (x, shift in samples)}.

    20 dB: white noise of a hundredth of each record's power. Wander: a sine of 0.5 mV and 0.15 to
    0.3 Hz in each lead, as the high-pass leaves it. Shifts of 0.2 s are circular.
    """
    power, t = np.square(x).mean((1, 2), keepdims=True), np.arange(SAMPLES) / RATE
    frequency = rng.uniform(0.15, 0.3, (len(x), 1, 1))
    phase = rng.uniform(0, 2 * np.pi, (*x.shape[:2], 1))
    wander = common.highpass(0.5 * np.sin(2 * np.pi * frequency * t + phase))
    noise = rng.normal(size=x.shape) * np.sqrt(power / 100)
    return {"20 dB noise": (x + noise, 0), "wander": (x + wander, 0),
            "shift +0.2 s": (np.roll(x, 20, 2), 20), "shift -0.2 s": (np.roll(x, -20, 2), -20)}


def bridged(x, mask):
    """x [12, 1000] with straight lines in every lead where mask [1000] is True."""
    t = np.arange(x.shape[1])
    return np.stack([np.interp(t, t[~mask], lead[~mask]) for lead in x])


def elsewhere(mask, rng):
    """The same cut, circularly moved to one of the places where it overlaps mask [1000] least."""
    overlap = np.array([np.roll(mask, shift)[mask].sum() for shift in range(len(mask))])
    return np.roll(mask, rng.choice(np.flatnonzero(overlap == overlap.min())))


@torch.no_grad()
def respond(network, x):
    """x [N, 12, 1000] mV -> similarities s [N, P] and best windows [N, P, at most 5]."""
    s, windows = [], []
    for part in np.array_split(x, 1 + len(x) // 256):
        z = network.latent(torch.from_numpy(np.ascontiguousarray(part, np.float32)))
        s.append(network.scores(z).double().numpy())
        S = common.similarity(z, network.p, network.a)
        k = min(network.top_k, 5, S.shape[2])
        windows.append(S.topk(k, 2).indices.numpy())
    return np.concatenate(s), np.concatenate(windows)


def drops(head, x, seen, rng):
    """Does the matched window of a partial prototype matter? Of each record x [N, 12, 1000] the
    label that exceeds its threshold most, and its first prototype: the "comprehensiveness" of
    DeYoung et al. 2020, with a control. seen: what x gives, `respond`."""
    network, (s, windows) = head.networks[0], seen
    over = standardised(head, s) @ head.W.T + head.b - head.thresholds
    rows = np.flatnonzero(over.max(1) >= 0)
    if not len(rows):
        return {}
    s, label = s[rows], over.argmax(1)[rows]
    n, j = np.arange(len(rows)), first_prototypes(head, s, label)
    cut, control = x[rows], x[rows]
    for i, row in enumerate(rows):
        mask = np.zeros(SAMPLES, bool)
        for w in windows[row, j[i]]:
            mask[slice(*common.window_samples(network.kind, int(w)))] = True
        cut[i], control[i] = bridged(x[row], mask), bridged(x[row], elsewhere(mask, rng))
    found = {}
    for name, changed in (("cut", cut), ("control", control)):
        left, _ = respond(network, changed)  # [n, P]
        move = standardised(head, s) - standardised(head, left)  # [n, F]
        found[f"similarity drop, {name}"] = (s - left)[n, j].mean()
        found[f"logit drop, {name}"] = (move * head.W[label]).sum(1).mean()
    return found


def stability(head, seen, variants):
    """What stays as it is under every disturbance: seen {variant: (s [N, P], windows or None)},
    variants {variant: (x, shift in samples)}; "" is the undisturbed."""
    top = {v: (standardised(head, s) @ head.W.T + head.b).argmax(1) for v, (s, _) in seen.items()}
    found = {f"top class, {v}": (top[v] == top[""]).mean() for v in top if v}
    if [network.kind for network in head.networks] == ["partial"]:
        n, j = np.arange(len(top[""])), first_prototypes(head, seen[""][0], top[""])
        best = {v: windows[n, j, 0].astype(float) for v, (_, windows) in seen.items()}
        for v in [v for v in best if v]:
            moved = best[v] - best[""] - round(variants[v][1] / 32)
            found[f"window, {v}"] = (np.abs(moved) <= 1).mean()
    return found


def measure_branch(head, s, y, jaccard):
    """What depends on a branch alone: similarities s [N, P] and labels y [N, C] of fold 10."""
    network = head.networks[0]
    distinct = {(q["class"], q["ecg_id"], q["window"]) for q in head.prototypes}
    p, p_class = network.p.detach().double().numpy(), network.p_class.numpy()
    dead = (head.W == 0).all(0)[head.A.argmax(1)] | (s.std(0) < 0.01 * network.a)  # [P]
    return {"duplicates": 1 - len(distinct) / len(p), "dead": int(dead.sum()),
            **geometry(p, p_class, jaccard), "purity lift": purity_lift(s, y, p_class)}


def main():
    p = common.argument_parser(__doc__, "prep", "run", "demo")
    p.add_argument("--save", metavar="NAME", help="of a run that tables.py --keep RUN NAME kept")
    args = common.parse(p)
    prep, rng, found, parts = common.load_prep(args.prep), np.random.default_rng(42), {}, {}
    test, jaccard = np.flatnonzero(prep.test), np.array(prep.info["jaccard"])
    x = prep.signals[np.sort(rng.choice(test, min(1000, len(test)), replace=False))]
    variants = {"": (x, 0), **disturbed(x, rng)}
    names = [n for n in (*BRANCHES, "fusion") if (args.run / f"classifiers/{n}.pt").is_file()]
    if not names:
        sys.exit(f"{args.run} holds no classifiers: run 04_fusion.py first")
    for name in tqdm(names, disable=None):
        head = common.load_run(args.run, [name])[0]
        if name == "fusion":  # similarities of all branches side by side, Eq. (9)
            found[name], every = {}, [parts[b] for b in head.branches]
            s = np.concatenate([s for s, _ in every], 1)
            seen = {v: (np.concatenate([seen[v][0] for _, seen in every], 1), None)
                    for v in variants}
        else:
            network, own = head.networks[0], common.columns(head.classes)
            s, _ = respond(network, prep.signals[test])
            seen = {v: respond(network, changed) for v, (changed, _) in variants.items()}
            parts[name] = s, seen
            y = prep.labels[test][:, own]
            found[name] = measure_branch(head, s, y, jaccard[np.ix_(own, own)])
        found[name].update(evidence(standardised(head, s), head.W, head.b, head.thresholds))
        found[name].update(stability(head, seen, variants))
        if [network.kind for network in head.networks] == ["partial"]:
            found[name].update(drops(head, x, seen[""], rng))
        for k, v in found[name].items():
            if not isinstance(v, int):
                found[name][k] = round(float(v), 5) if np.isfinite(v) else None
    common.save(args.run / "faithfulness.json", found)
    if args.save:
        path = ROOT / f"tests/results/{args.save}.json"
        common.save(path, {**json.loads(path.read_text()), "interpretability": {"": found}})
    measures = dict.fromkeys(k for each in found.values() for k in each)
    table = importlib.import_module("05_evaluate").table
    print(table(["measure", *found], [[k, *(found[n].get(k) for n in found)] for k in measures]))


if __name__ == "__main__":
    common.run(main)
