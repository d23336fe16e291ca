"""Stage 04, classifiers (paper 3.5, Stage 3, Eq. 9-10): sparse linear layers on similarities.

Solves the convex problem of Eq. (10) to its optimum on the standardised similarities of folds 1-8,
for each branch on its own labels and for the fusion of all branches on all labels. In our recipe a
label has one weight for all prototypes of a class, on the mean similarity to them; lambda depends
on the label; what a prototype scores on its own patient's records is left out. Weights of other
classes alone carry the L1 term, of the largest strength that costs almost nothing on fold 9.

reads   PREP/*.npy, preprocess.json, RUN/MODEL/projected.pt, RUN/blackbox-*/joint.pt
writes  RUN/classifiers/NAME.pt: logits of folds 9 and 10 [., 71], thresholds [C] chosen on fold 9,
        W [C, F], b [C], mean [F], std [F] of the pieces of evidence A [P, F]. NAMEs: each model;
        fusion; fusion-own (own-class weights alone); macro and blackbox-macro (each label from its
        own branch); steps on the way: NAME-joint, -projected (Stage 1's head), -unprojected

    python 04_fusion.py                      every model of the run, and the fusion of the three
    python 04_fusion.py --model rhythm       one of them

Takes a few minutes on 2 CPU cores, half of it the forward passes.
Last line: `runs/default: classifiers of rhythm, morphology, global -> runs/default/classifiers`.
"""
import sys
from types import SimpleNamespace

import numpy as np
import torch
from scipy.special import expit
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import common
from common import BOXES, BRANCHES, CODES, MODELS, columns

# lambda of Eq. (10), from strong to weak; see `lambda_of`
STRENGTHS = {
    "default": [5e-2, 2e-2, 1e-2, 7e-3, 5e-3, 3e-3, 2e-3, 1e-3],
    "paper": [1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 3e-4, 2e-4, 1e-4],
}
WITHIN, RESAMPLES = 0.002, 20  # of the best fold-9 macro-AUROC, a mean over so many resamples
L2 = 1e-4  # on all weights; without it a class that is separable has no optimum
ENTERING = 64  # weights that may join a class's working set at a time
TOLERANCE = 1e-5  # on the optimality conditions, in units of the mean BCE
TRAINED = "config round seconds epochs best_epoch val_auroc hardware threads".split()
FEWEST = 10  # positives in fold 9 that a label needs for a threshold of its own


# ---- Eq. (10)

def lambda_of(strength, Y, recipe):
    """lambda of Eq. (10) for each class of Y [N, C]: [C]; the paper has one for all.

    In our recipe it is the strength times the standard deviation of the label: so the same
    correlation, and not the same covariance, lets a weight in for rare and frequent labels.
    """
    scale = Y.std(0).clip(1e-6) if recipe == "default" else np.ones(Y.shape[1])
    return strength * scale


@threadpool_limits.wrap(limits=1, user_api="blas")  # for systems this small threads only wait
def fit(X, Y, off, lambda_, W=None, b=None, l2=L2, tolerance=TOLERANCE, rounds=200):
    """Minimise Eq. (10), mean BCE + lambda |W| over `off` + l2 / 2 |W|^2, for every class.

    X [N, P] standardised scores, Y [N, C] in {0, 1}, off [C, P] True for other classes' prototypes,
    in float64; lambda_ is [C] or a number, inf for no such weights. Starts from W and b if given.
    Returns W [C, P], b [C] and the largest violation of the optimality conditions.
    """
    if W is None:
        prior = Y.mean(0).clip(1e-9, 1 - 1e-9)
        W, b = np.zeros(off.shape), np.log(prior / (1 - prior))
    W, b, largest = W.copy(), b.copy(), 0.0
    X_1 = np.column_stack([X, np.ones(len(X))])  # the bias comes last
    ridge = np.append(np.full(X.shape[1], l2), 0.0)
    for c, strength in enumerate(np.broadcast_to(lambda_, len(W))):
        l1 = np.append(np.where(off[c], min(strength, 1e9), 0.0), 0.0)
        v, violation = newton(X_1, Y[:, c], l1, ridge, np.append(W[c], b[c]), tolerance, rounds)
        W[c], b[c], largest = v[:-1], v[-1], max(largest, violation)
    return W, b, float(largest)


def newton(X, y, l1, ridge, v, tolerance, rounds):
    """Eq. (10) for one class: X [N, A], y [N], l1, ridge and start v [A] -> v, its violation.

    Proximal Newton with step halving, on a working set: weights without L1, non-zero weights, and
    those that violate optimality most. The Hessian may be float32: it only leads to the optimum.
    """
    def objective(v):
        m = X @ v
        bce = np.mean(np.logaddexp(0, m) - y * m)
        return bce + (ridge * v * v).sum() / 2 + (l1 * np.abs(v)).sum(), m

    value, m = objective(v)
    for _ in range(rounds):
        prob = expit(m)
        g = X.T @ (prob - y) / len(y) + ridge * v
        violation = np.where(v != 0, np.abs(g + l1 * np.sign(v)), np.abs(g) - l1)
        if violation.max() < tolerance:
            break
        on = (l1 == 0) | (v != 0)
        others = np.where(on, -1, violation)
        on |= (others > 0) & (others >= np.sort(others)[-min(ENTERING, len(v))])
        share = np.sqrt(prob * (1 - prob) / len(y))
        R = X[:, on].astype(np.float32) * share.astype(np.float32)[:, None]
        H = (R.T @ R).astype(np.float64) + np.diag(ridge[on] + 1e-9)
        step = np.zeros_like(v)
        step[on] = minimise(H, H @ v[on] - g[on], l1[on], v[on], tolerance / 10) - v[on]
        for t in 0.5 ** np.arange(20):
            trial, m_trial = objective(v + t * step)
            if trial <= value:
                break
        else:
            break
        v, value, m = v + t * step, trial, m_trial
    return v, violation.max()


def minimise(H, r, l1, v, tolerance, rounds=5000):
    """Minimise v H v / 2 - r v + l1 |v| by FISTA (Beck and Teboulle 2009), in units in which the
    diagonal of H is 1, started anew whenever it overshoots."""
    d = np.sqrt(np.diag(H))
    H, r, v = H / d / d[:, None], r / d, v * d
    L = np.linalg.eigvalsh(H)[-1]
    z, t = v, 1.0
    for _ in range(rounds):
        u = z - (H @ z - r) / L
        u = np.sign(u) * np.maximum(np.abs(u) - l1 / d / L, 0)
        if (z - u) @ (u - v) > 0:
            t = 1.0
        t_next = (1 + np.sqrt(1 + 4 * t * t)) / 2
        z, change = u + (t - 1) / t_next * (u - v), np.abs(u - v).max()
        v, t = u, t_next
        if change * L < tolerance:
            break
    return v / d


def fit_path(X, Y, off, X_val, y_val, recipe, what):
    """Fit Eq. (10) from strong to weak L1: W, b, the strength chosen on fold 9, the path.

    Chosen is the strongest within WITHIN of the best: a maximum alone would be chance.
    X [N, F], Y [N, C], off [C, F], X_val [M, F], y_val [M, C].
    """
    path, fits, W, b = [], [], None, None
    draws = np.random.default_rng(0).integers(len(y_val), size=(RESAMPLES, len(y_val)))
    for strength in tqdm(STRENGTHS[recipe], f"{what}: L1 strengths", leave=False, disable=None):
        W, b, violation = fit(X, Y, off, lambda_of(strength, Y, recipe), W, b)
        logits = X_val @ W.T + b
        auroc = np.mean([common.macro_auroc(y_val[i], logits[i]) for i in draws])
        path.append({"strength": strength, "val_auroc": float(np.nan_to_num(auroc)),
                     "violation": violation, "nonzero": int((W != 0).sum())})
        fits.append((W, b))
    aurocs = np.array([row["val_auroc"] for row in path])
    chosen = int(np.argmax(aurocs >= aurocs.max() - WITHIN))  # the first, so the strongest
    return *fits[chosen], path[chosen]["strength"], path


# ---- Scores, and what is kept of a classifier

def standardise(scores, A, prep, p_patient):
    """scores [N, P] and pieces A [P, F] -> X [N, F], mean [F], std [F] of folds 1-8, in float64.

    How well a prototype matches the records of its own patient, p_patient [P], says nothing about
    new patients, so it does not count there; -1: all count (Config.own_patient).
    """
    s = common.evidence(scores, A, prep.patient_ids[:, None] != p_patient)
    mean, std = np.nanmean(s[prep.train], 0), np.nanstd(s[prep.train], 0).clip(1e-6)
    return np.nan_to_num((s - mean) / std), mean, std


def thresholds_of(y, logits):
    """From which logit on a label is predicted, y, logits [N, C] of fold 9 -> [C]: the best F1 (a
    score >= threshold is positive), or 0 for fewer than FEWEST positives: it would be chance."""
    order = np.argsort(-logits, axis=0, kind="stable")
    score = np.take_along_axis(logits, order, 0)
    hits = np.take_along_axis(y > 0, order, 0).cumsum(0)
    f1 = 2 * hits / (np.arange(1, len(y) + 1)[:, None] + hits[-1])
    f1[:-1][score[:-1] == score[1:]] = -1  # equal scores stay together
    best = np.take_along_axis(score, f1.argmax(0)[None], 0)[0]
    return np.where(hits[-1] >= FEWEST, best, 0.0)


def save_classifier(args, prep, name, about, logits, classes, inputs, **more):
    """Write RUN/classifiers/NAME.pt from logits [folds 9 and 10, C] and print a line.

    `inputs` [(path, meta)] are what it was made from; arrays in `more` are saved, the rest joins
    the meta. Returns (path, meta)."""
    later = prep.val | prep.test
    y = prep.labels[prep.val][:, columns(classes)]
    full = np.full((later.sum(), len(CODES)), np.nan, np.float32)
    full[:, columns(classes)] = logits
    on_val = full[prep.val[later]][:, columns(classes)]
    auroc, trained = common.macro_auroc(y, on_val), {}
    for _, meta in inputs:
        own = {k: meta[k] for k in TRAINED if k in meta}
        trained.update(meta.get("trained") or {meta["model"]: own})
    arrays = {k: torch.from_numpy(v) for k, v in more.items() if isinstance(v, np.ndarray)}
    thresholds = thresholds_of(y, on_val).astype(np.float64)
    meta = {**common.provenance(args, *inputs), "name": name, "about": about, "classes": classes,
            "branches": [], "config": inputs[0][1]["config"], "trained": trained,
            "val_auroc": None if np.isnan(auroc) else auroc,
            **{k: v for k, v in more.items() if k not in arrays}}
    path = args.run / "classifiers" / f"{name}.pt"
    common.save(path, {"meta": meta, "logits": torch.from_numpy(full),
                       "thresholds": torch.from_numpy(thresholds), **arrays})
    sparse = f"{meta['nonzero']:6,} of {meta['weights']:6,} weights" if "weights" in meta else ""
    print(f"{name:22s} fold 9 {auroc:.4f}  {sparse}", flush=True)
    return path, meta


def classify(args, prep, name, about, branches, own_only=False):
    """Fit Eq. (10) on the scores of one or several branches side by side, Eq. (9), and save it.

    Then at the same strength on the scores before projection.
    """
    cfg = branches[0].cfg
    p_code = [c for branch in branches for c in branch.p_code]
    p_patient = np.concatenate([branch.p_patient for branch in branches])
    pieces, A = p_code, np.eye(len(p_code))
    if cfg.tie == "class":  # W = V A^T
        pieces = list(dict.fromkeys(p_code))
        A = np.eye(len(pieces))[[pieces.index(c) for c in p_code]]  # [P, F]
    found = {c for branch in branches for c in branch.classes}
    classes = branches[0].classes if len(branches) == 1 else [c for c in CODES if c in found]
    off = np.array(pieces) != np.array(classes)[:, None]  # [C, F]
    y = prep.labels[:, columns(classes)].astype(np.float64)
    train, later, W, b, strength, path = prep.train, prep.val | prep.test, None, None, np.inf, []
    for step in ("", "-unprojected"):
        scores = [branch.before if step else branch.scores for branch in branches]
        X, mean, std = standardise(np.concatenate(scores, 1), A, prep, p_patient)  # Eq. (9)
        if step or own_only:
            lambda_ = lambda_of(strength, y[train], cfg.recipe)
            W, b, violation = fit(X[train], y[train], off, lambda_, W, b)
        else:
            W, b, strength, path = fit_path(
                X[train], y[train], off, X[prep.val], y[prep.val], cfg.recipe, name)
            violation = max(row["violation"] for row in path)
        save_classifier(
            args, prep, name + step, about + (", before projection" if step else ""),
            X[later] @ W.T + b, classes, [branch.made for branch in branches],
            branches=[branch.name for branch in branches], pieces=pieces, l2=L2, path=path,
            violation=violation, strength=None if own_only else strength,
            nonzero=int((W != 0).sum()), weights=W.size, W=W, b=b, mean=mean, std=std, A=A)


def score_branch(args, prep, name):
    """All records' similarities to a branch's prototypes, and logits with Stage 1's head."""
    path = args.run / name / "projected.pt"
    model, meta = common.load_model(path, "03_project.py", args)
    p_joint = common.load(path, "03_project.py", args)["p_joint"].to(args.device)
    prototypes, later = (model.p.data, p_joint), prep.val | prep.test

    def both_scores(x):
        """x [B, 12, 1000] -> similarities after and before projection [B, 2, P]."""
        z, scores = model.latent(x), []
        for p in prototypes:
            model.p.data = p
            scores.append(model.scores(z))
        return torch.stack(scores, 1)

    rows = np.arange(len(prep.folds))
    both = common.batched(both_scores, prep, rows, args.device, f"{name}: scores")  # [N, 2, P]
    for step, s in (("joint", both[:, 1]), ("projected", both[:, 0])):
        with torch.no_grad():
            logits = model.logits(s[later].to(args.device)).cpu().numpy()
        save_classifier(args, prep, f"{name}-{step}", f"{name} with Stage 1's head, {step}",
                        logits, model.classes, [(path, meta)])
    scores, before = (np.ascontiguousarray(s) for s in both.numpy().transpose(1, 0, 2))
    return SimpleNamespace(
        name=name, scores=scores, before=before, classes=model.classes, made=(path, meta),
        p_code=[model.classes[c] for c in model.p_class.tolist()],
        p_patient=model.p_patient.cpu().numpy(), cfg=common.config_of(meta))


def merge(args, prep, name, members):
    """Macro aggregation: each label from the classifier of its own branch."""
    paths = [args.run / "classifiers" / f"{m}.pt" for m in members]
    if not all(path.is_file() for path in paths):
        return
    saved = [common.load(path, "04_fusion.py", args) for path in paths]
    classes = [c for s in saved for c in s["meta"]["classes"]]
    logits = np.nan_to_num(np.stack([s["logits"] for s in saved])).sum(0)  # groups are disjoint
    inputs = [(path, s["meta"]) for path, s in zip(paths, saved)]
    save_classifier(args, prep, name, "each label from its own branch",
                    logits[:, columns(classes)], classes, inputs)


def main():
    p = common.argument_parser(__doc__, *common.RUN_FLAGS)
    args = common.parse(p)
    prep = common.load_prep(args.prep)
    names = args.model or [m for m in MODELS if (args.run / m / "joint.pt").is_file()]
    if not names:
        sys.exit(f"{args.run} holds no trained model: run 02_train_joint.py first")

    # Black boxes: their own logits
    for name in [n for n in names if n in BOXES]:
        path = args.run / name / "joint.pt"
        model, meta = common.load_model(path, "02_train_joint.py", args)
        later = np.flatnonzero(prep.val | prep.test)
        logits = common.batched(model, prep, later, args.device).numpy()
        save_classifier(args, prep, name, "black box", logits, model.classes, [(path, meta)])

    # Branches: one pass for all scores, then the branch classifier
    branches = {}
    for name in [n for n in names if n not in BOXES]:
        branches[name] = score_branch(args, prep, name)
        classify(args, prep, name, f"{name} branch", [branches[name]])

    # Fusion: the branches' scores side by side
    if all(b in branches for b in BRANCHES):
        three = [branches[b] for b in BRANCHES]
        if len({branch.cfg.recipe for branch in three}) > 1:
            sys.exit(f"{args.run} holds branches of both recipes: train them with one of them")
        classify(args, prep, "fusion", "fusion classifier", three)
        classify(args, prep, "fusion-own", "fusion, own-class weights", three, own_only=True)
    merge(args, prep, "macro", BRANCHES)
    merge(args, prep, "blackbox-macro", [f"blackbox-{b}" for b in BRANCHES])
    print(f"{args.run}: classifiers of {', '.join(names)} -> {args.run}/classifiers")


if __name__ == "__main__":
    common.run(main)
