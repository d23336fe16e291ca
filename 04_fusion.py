"""Stage 04, classifiers (paper 3.5, Stage 3, Eq. 9-10): sparse linear layers on the frozen prototypes' similarities.

One forward pass per branch caches every record's similarity to every prototype. On the standardised scores of folds
1-8 it then solves the convex problem of Eq. (10) to its optimum, for each branch on its own labels and for the fusion
of all branches on all labels; the L1 strength is chosen on fold 9. Only off-class weights carry the L1 term. In the
default recipe lambda depends on the label, and scores of a prototype's own patient are left out.

reads   PREP/*.npy, RUN/MODEL/joint.pt, projected.pt and prototypes.json (the highest round), RUN/blackbox-*/joint.pt
writes  RUN/MODEL/scores.npy   float32 [N, P], every record's similarities, in PREP's order
        RUN/MODEL/classifier.pt, RUN/fusion.pt, RUN/fusion-own.pt    W [C, P], b [C], mean [P], std [P]; what they
        are and how sparse stands in the .json beside each
        RUN/logits_NAME.npy, probabilities_NAME.npy    [records of folds 9 and 10, 71], NaN for labels not modelled
        RUN/predictions.json   what each NAME is, and what it was made from

    python 04_fusion.py                      every model of the run, and the fusion if the three branches are there
    python 04_fusion.py --model rhythm       one of them

Takes a few minutes on 2 CPU cores, half of it the forward passes; not yet timed on a GPU.
Last line: `runs/default: fold-9 macro-AUROC fusion 0.9350, macro 0.9300, ...`, with your own numbers.
"""
import json
import sys
import time

import numpy as np
import torch
from scipy.special import expit
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import common
from common import BOXES, BRANCHES, CODES, MODELS

STRENGTHS = {"default": [5e-2, 2e-2, 1e-2, 7e-3, 5e-3, 3e-3, 2e-3, 1e-3],  # lambda of Eq. (10), tried from strong
             "paper": [1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 3e-4, 2e-4, 1e-4]}    # to weak; see `lambda_of`
MOST_OFF = {"default": 0.1, "paper": 1.0}  # share of off-class weights that may be non-zero; the paper sets no limit
L2 = 1e-4         # on all weights, in units of the mean BCE; without it a class that is separable has no optimum
ENTERING = 64     # weights that may join a class's working set at a time
TOLERANCE = 1e-5  # on the optimality conditions, in the same units


def lambda_of(strength, Y, recipe):
    """lambda of Eq. (10) for each class of Y [N, C], from one strength: [C].

    Under the paper recipe lambda is the strength, for all classes; under the default recipe it is that times the
    standard deviation of the class's label, a departure from the paper. At W = 0 the gradient of the BCE is the
    covariance of score and label, so then the same correlation, and not the same covariance, lets a weight in: a rare
    label is not kept from evidence that a frequent one has in plenty.
    """
    return strength * (np.maximum(Y.std(0), 1e-6) if recipe == "default" else np.ones(Y.shape[1]))


@threadpool_limits.wrap(limits=1, user_api="blas")  # systems this small: on a busy machine threads wait for each other
def fit(X, Y, off, lambda_, W=None, b=None, l2=L2, tolerance=TOLERANCE, rounds=200):
    """Minimise Eq. (10), mean BCE + lambda |W| over `off` + l2 / 2 * |W|^2, for all classes from a start W, b (if
    there is none, W = 0 and b at the log odds of each class).

    X [N, P] standardised scores, Y [N, C] in {0, 1}, off [C, P] True where a weight is of another class's prototype,
    all float64; lambda_ is a number or [C] (inf forbids weights of other classes' prototypes). Every class is a convex
    problem of its own: Newton's method on a working set of own-class weights, non-zero weights and those that violate
    optimality most, each step a small quadratic problem with L1. Returns W [C, P], b [C] and the largest violation of
    the optimality conditions.
    """
    if W is None:
        prior = Y.mean(0).clip(1e-9, 1 - 1e-9)
        W, b = np.zeros(off.shape), np.log(prior / (1 - prior))
    W, b, largest = W.copy(), b.copy(), np.full(len(W), np.inf)
    X_1 = np.column_stack([X, np.ones(len(X))])                                             # the bias comes last
    todo, lambda_ = np.arange(len(W)), np.broadcast_to(lambda_, len(W))
    for _ in range(rounds):
        W_c, off_c = W[todo], off[todo]
        error = expit(X @ W_c.T + b[todo]) - Y[:, todo]                                     # [N, classes to do]
        G = error.T @ X / len(X) + l2 * W_c                                                 # [., P] smooth gradient
        l1 = np.where(off_c, lambda_[todo, None].clip(max=1e9), 0.0)                        # [., P]
        violation = np.where(W_c != 0, np.abs(G + l1 * np.sign(W_c)), np.maximum(np.abs(G) - l1, 0))
        largest[todo] = np.maximum(violation.max(1), np.abs(error.mean(0)))                 # weights and bias
        unsolved = largest[todo] > tolerance
        todo, violation = todo[unsolved], violation[unsolved]
        if len(todo) == 0:
            break
        for c, v in zip(todo, violation):
            entering = np.flatnonzero(off[c] & (W[c] == 0) & (v > 0))
            entering = entering[np.argsort(-v[entering])[:ENTERING]]
            work = np.union1d(np.flatnonzero(~off[c] | (W[c] != 0)), entering)
            l1 = np.where(off[c, work], lambda_[c], 0.0)
            W[c, work], b[c] = newton(X_1[:, [*work, -1]], Y[:, c], l1, W[c, work], b[c], l2, tolerance / 2)
    return W, b, float(largest.max())


def newton(X, y, l1, w, b, l2, tolerance):
    """Eq. (10) for one class: X [N, A + 1] with ones in its last column, y [N], l1 [A], start w [A], b -> w, b.

    Proximal Newton with step halving. The Hessian is made in float32: it says how to get to the optimum, and the
    gradient, in float64, where that is.
    """
    X_32 = X.astype(np.float32)
    v, l1 = np.append(w, b), np.append(l1, 0.0)
    ridge = np.append(np.full(len(w), l2), 0.0)

    def objective(v):
        m = X @ v
        return np.mean(np.logaddexp(0, m) - y * m) + (ridge * v * v).sum() / 2 + (l1 * np.abs(v)).sum(), m

    value, m = objective(v)
    for _ in range(50):
        prob = expit(m)
        g = X.T @ (prob - y) / len(y) + ridge * v
        slope = np.where(v != 0, np.abs(g + l1 * np.sign(v)), np.maximum(np.abs(g) - l1, 0))
        if slope.max() < tolerance:
            break
        R = X_32 * np.sqrt(prob * (1 - prob) / len(y)).astype(np.float32)[:, None]
        H = (R.T @ R).astype(np.float64) + np.diag(ridge + 1e-9)
        step = feature_sign(H, H @ v - g, l1, v, tolerance / 10) - v
        for t in 0.5 ** np.arange(20):
            trial, m_trial = objective(v + t * step)
            if trial <= value:
                break
        else:
            break
        v, value, m = v + t * step, trial, m_trial
    return v[:-1], v[-1]


def feature_sign(H, r, l1, v, tolerance):
    """Minimise v H v / 2 - r v + l1 |v| exactly by guessing signs (Lee et al. 2006): H [A, A], r, l1, start v [A]."""
    v = v.copy()
    sign = np.sign(v)
    for _ in range(20 * len(v)):
        on = np.flatnonzero((sign != 0) | (l1 == 0))
        new = np.linalg.solve(H[np.ix_(on, on)], r[on] - l1[on] * sign[on])
        wrong = (l1[on] > 0) & (np.sign(new) != sign[on])
        if wrong.any():  # go along the line to the best point where a weight reaches zero
            old, move = v[on], new - v[on]
            stops = np.append(-old[wrong] / move[wrong], 1.0)
            points = old + stops[:, None] * move
            points[np.arange(len(stops) - 1), np.flatnonzero(wrong)] = 0
            cost = ((points @ H[np.ix_(on, on)]) * points).sum(1) / 2 - points @ r[on] + np.abs(points) @ l1[on]
            v[on] = points[cost.argmin()]
            sign = np.sign(v)
            continue
        v[on] = new
        g = H @ v - r
        excess = np.where((sign == 0) & (l1 > 0), np.abs(g) - l1, 0)
        j = excess.argmax()
        if excess[j] <= tolerance:
            break
        sign[j] = -np.sign(g[j])
    return v


def fit_path(X, Y, off, X_val, y_val, what, recipe):
    """Fit Eq. (10) from strong to weak L1 and keep the strength with fold 9's best macro-AUROC.

    Strengths that leave more than MOST_OFF[recipe] of the off-class weights are not considered, but for the strongest:
    nobody could read them.
    X [N, P], X_val [M, P] standardised, Y [N, C], y_val [M, C], off [C, P]. Returns W, b, the table of the path and the
    strength chosen.
    """
    path, fits, W, b = [], [], None, None
    for strength in tqdm(STRENGTHS[recipe], desc=f"{what}: L1 strengths", leave=False, disable=None):
        W, b, violation = fit(X, Y, off, lambda_of(strength, Y, recipe), W, b)
        if fits and off.any() and (W[off] != 0).mean() > MOST_OFF[recipe]:
            break
        auroc = common.macro_auroc(y_val, X_val @ W.T + b)
        path.append({"strength": strength, "val_auroc": known(auroc), "nonzero": int((W != 0).sum()),
                     "violation": violation})
        fits.append((W, b))
    chosen = int(np.argmax([row["val_auroc"] or 0 for row in path]))  # of equals the strongest
    return *fits[chosen], path, path[chosen]["strength"]


def known(value):
    """NaN, the AUROC of labels that fold 9 does not have, as JSON takes it: None."""
    return None if np.isnan(value) else value


def standardise(scores, prep, p_patient):
    """scores [N, P] -> (X of folds 1-8, X of fold 9, X of folds 9 and 10, mean [P], std [P]), float64.

    p_patient [P] is the patient each prototype was taken from. How well it matches the records of that patient says
    nothing about new patients, so those entries of X are set to the mean (0); -1 sets none (Config.own_patient).
    """
    scores = scores.astype(np.float64)
    mean, std = scores[prep.train].mean(0), scores[prep.train].std(0).clip(1e-6)
    X = (scores - mean) / std
    X[prep.patient_ids[:, None] == p_patient] = 0
    return X[prep.train], X[prep.val], X[prep.val | prep.test], mean, std


def main():
    p = common.argument_parser(__doc__)
    args = common.parse(p)
    prep = common.load_prep(args.prep)
    device, later = args.device, np.flatnonzero(prep.val | prep.test)
    predictions_path = args.run / "predictions.json"
    predictions = {"format": common.FORMAT, "inputs": {"prep": common.file_hash(prep.path)}, "models": {}}
    try:
        old = json.loads(predictions_path.read_text())
        if (old["format"], old["inputs"]) == (predictions["format"], predictions["inputs"]):
            predictions["models"] = old["models"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not whole
        pass
    predictions["left_out"] = prep.info["without_training_record"]
    summary = {}

    def save_predictions(name, about, classes, logits, inputs, forced, **more):
        """logits [folds 9 and 10, C] -> the two arrays of NAME with 71 columns, and its line in predictions.json, where
        `forced` are the warnings that --force overrode here and in the stages before."""
        full, own = np.full((len(later), len(CODES)), np.nan, np.float32), common.columns(classes)
        full[:, own] = logits
        common.save_npy(args.run / f"logits_{name}.npy", full)
        common.save_npy(args.run / f"probabilities_{name}.npy", expit(full.astype(np.float64)))
        summary[name] = common.macro_auroc(prep.labels[prep.val][:, own], full[prep.val[later]][:, own])
        predictions["models"][name] = {"about": about, "classes": classes, "val_auroc": known(summary[name]),
                                       "inputs": inputs, "warnings": forced, **more}
        common.save_json(predictions_path, predictions)

    def classify(name, about, scores, before, p_patient, p_code, classes, inputs, meta, path, own_only=False):
        """Fit Eq. (10) for `classes` on scores [N, P] of prototypes with codes p_code [P]; save it with its logits.
        Then at the same strength on the scores `before` projection, of which only the logits are kept."""
        Y = prep.labels[prep.train][:, common.columns(classes)].astype(np.float64)
        y_val = prep.labels[prep.val][:, common.columns(classes)]
        off = np.array([[q != c for q in p_code] for c in classes])                         # [C, P]
        strength, warnings, W, b = np.inf, meta["warnings"], None, None
        for projected, s in ((True, scores), (False, before)):
            began = time.time()
            X, X_val, X_later, mean, std = standardise(s, prep, p_patient)
            if projected and not own_only:
                W, b, steps, strength = fit_path(X, Y, off, X_val, y_val, name, meta["recipe"])
            else:  # from where it stands, own-class weights at zero or the projected prototypes' solution
                W, b, violation = fit(X, Y, off, lambda_of(strength, Y, meta["recipe"]), W, b)
                steps = [{"violation": violation}]
            key = name if projected else f"{name}-unprojected"
            nonzero, forced = int((W != 0).sum()), [*warnings]
            if (worst := max(row["violation"] for row in steps)) > TOLERANCE:
                forced.append(f"{key}: Eq. (10) is not solved, its optimality conditions are violated by {worst:.0e}")
                print(f"WARNING: {forced[-1]}", file=sys.stderr)
            fitted = {"strength": None if own_only else strength, "l2": L2, "path": steps, "nonzero": nonzero,
                      "weights": W.size}
            save_predictions(key, about if projected else f"{about}, on the prototypes before projection", classes,
                             X_later @ W.T + b, inputs, forced, seconds=round(time.time() - began, 1), **fitted)
            if projected:  # after its logits, whose thresholds 06 takes: 06 compares this file with the prototypes
                meta = {**meta, **fitted, "classes": classes, "warnings": forced}
                common.save_json(path.with_suffix(".json"), meta)
                common.save_pt(path, {"meta": meta, **{k: torch.from_numpy(a) for k, a in
                                      dict(W=W, b=b, mean=mean, std=std).items()}})
            how = "own class only" if own_only else f"L1 strength {strength:.0e}"
            print(f"{key:22s} fold 9 {summary[key]:.4f}  {nonzero:6,} of {W.size:6,} weights  {how}  "
                  f"{time.time() - began:.1f} s", flush=True)

    # Black boxes: their own logits
    present = [m for m in MODELS if any(list((args.run / m).glob(f"{f}*.pt")) for f in ("joint", "projected"))]
    if not args.model and not present:
        sys.exit(f"{args.run} holds no trained model: {common.rerun('02_train_joint.py')} first")
    for name in [m for m in args.model or present if m in BOXES]:
        path = args.run / name / "joint.pt"
        maker = common.command("02_train_joint.py", name)
        model, meta = common.load_model(path, maker, device)
        common.same_input(meta, "prep", prep.path, path, maker, args.force)
        logits = common.batched(lambda x: model(x)[0], prep, later, device)
        save_predictions(name, "black box", model.classes, logits.numpy(), {f"{name}/joint.pt": common.file_hash(path)},
                         meta.get("warnings", []))
        print(f"{name:22s} fold 9 {summary[name]:.4f}", flush=True)

    # Prototype models: one pass for all scores, then the branch classifier
    cached = {}
    for name in [m for m in args.model or present if m not in BOXES]:
        maker = common.command("03_project.py", name)
        round_, path = common.newest(args.run / name, "projected", maker)
        joint = path.with_name(path.name.replace("projected", "joint"))
        model, meta = common.load_model(path, maker, device)
        common.same_input(meta, "joint", joint, path, maker, args.force)
        common.same_input(meta, "prep", prep.path, path, maker, args.force)
        found = common.load_json(path.with_name("prototypes.json"), maker, "projected")
        if found["projected"] != common.file_hash(path):
            sys.exit(f"{path.with_name('prototypes.json')} does not fit {path}: "
                     f"{common.rerun(maker)} again")
        before = common.load_model(joint, common.command("02_train_joint.py", name, round_), device)[0]

        def both_scores(x):
            """x [B, 12, 1000] -> similarities to the projected and to the unprojected prototypes [B, 2, P]."""
            z = model.latent(x)
            return torch.stack([model.scores(z), before.scores(z)], 1)

        parts = np.array_split(np.arange(len(prep.folds)), max(1, len(prep.folds) // 2048))
        parts = tqdm(parts, desc=f"{name}: scores", leave=False, disable=None)
        both = np.concatenate([common.batched(both_scores, prep, part, device).numpy() for part in parts])  # [N, 2, P]
        scores, scores_before = np.ascontiguousarray(both.transpose(1, 0, 2))
        common.save_npy(path.with_name("scores.npy"), scores)
        p_code, p_patient = [model.classes[c] for c in model.p_class.tolist()], model.p_patient.cpu().numpy()
        inputs, forced = {f"{name}/{path.name}": common.file_hash(path)}, meta.get("warnings", [])
        for step, when, head, s in (("joint", "before", before.head, scores_before),
                                    ("projected", "after", model.head, scores)):
            with torch.no_grad():
                logits = head(torch.from_numpy(s[later]).to(device)).cpu().numpy()
            save_predictions(f"{name}-{step}", f"{name} with Stage 1's head, {when} projection", model.classes, logits,
                             inputs, forced)
        cfg = common.config_of(meta)
        made = {**common.provenance(cfg, "04_fusion.py", projected=path, prep=prep.path), "recipe": cfg.recipe,
                "warnings": forced}
        classify(name, f"{name} branch, sparse classifier", scores, scores_before, p_patient, p_code, model.classes,
                 inputs, {**made, "model": name}, path.with_name("classifier.pt"))
        cached[name] = (scores, scores_before, p_patient, p_code, model.classes, inputs, made)

    # Fusion: the branches' scores side by side, Eq. (9)
    if all(b in cached for b in BRANCHES):
        scores, scores_before, p_patient, p_code, codes, inputs, made = zip(*(cached[b] for b in BRANCHES))
        if len({part["recipe"] for part in made}) > 1:
            sys.exit(f"{args.run} holds branches of both recipes: train them all with one, in a folder of its own")
        classes, inputs = [c for c in CODES if c in sum(codes, [])], {k: v for part in inputs for k, v in part.items()}
        fused = {**made[0], "config": {b: part["config"] for b, part in zip(BRANCHES, made)}, "model": "fusion",
                 "inputs": inputs, "warnings": sum((part["warnings"] for part in made), []),
                 "branches": [[b, s.shape[1]] for b, s in zip(BRANCHES, scores)]}
        both = (np.concatenate(scores, 1), np.concatenate(scores_before, 1), np.concatenate(p_patient), sum(p_code, []),
                classes, inputs, fused)
        classify("fusion", "fusion classifier, Eq. (10)", *both, args.run / "fusion.pt")
        classify("fusion-own", "fusion with own-class weights only", *both, args.run / "fusion-own.pt", own_only=True)

    # Of models that are others now or gone, nothing stays
    predictions["models"] = {n: m for n, m in predictions["models"].items() if all(
        (args.run / k).is_file() and common.file_hash(args.run / k) == v for k, v in m["inputs"].items())}
    common.save_json(predictions_path, predictions)

    # Macro aggregation: each label from its own branch
    for name, members in (("macro", BRANCHES), ("blackbox-macro", [f"blackbox-{b}" for b in BRANCHES])):
        if all(m in predictions["models"] for m in members):
            logits = [common.load_npy(args.run / f"logits_{m}.npy", common.command("04_fusion.py", m)) for m in members]
            classes, forced = (sum((predictions["models"][m].get(k, []) for m in members), [])
                               for k in ("classes", "warnings"))
            merged = np.nan_to_num(np.stack(logits)).sum(0)[:, common.columns(classes)]  # the groups are disjoint
            save_predictions(name, "each label from its own branch", classes, merged,
                             {k: v for m in members for k, v in predictions["models"][m]["inputs"].items()}, forced)
            print(f"{name:22s} fold 9 {summary[name]:.4f}")
    if predictions["left_out"]:
        print(f"left out, without a training record: {' '.join(predictions['left_out'])}")
    first = [n for n in ("fusion", "macro", *MODELS) if n in summary]
    print(f"{args.run}: fold-9 macro-AUROC " + ", ".join(f"{n} {summary[n]:.4f}" for n in first))


if __name__ == "__main__":
    common.run(main)
