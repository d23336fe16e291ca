"""Script 04, sparse classifiers (paper 3.5, Stage 3, Eq. 9-10) on similarities.

Solves Eq. (10) on folds 1-8, for each branch and for all. Weights of other classes
have L1, chosen on fold 9. In our recipe a label has one weight for the prototypes of a
class, and none counts for its own patient.

reads   PREP, RUN/MODEL/projected.pt, RUN/blackbox-*/joint.pt
writes  RUN/classifiers/NAME.pt: logits of folds 9 and 10 [., 71], thresholds [C],
        W [C, F], b [C], mean, std [F] of pieces A [P, F]. NAMEs:
        each model; fusion; fusion-own (own-class weights alone);
        macro, blackbox-macro (each label from its own branch);
        NAME-joint, NAME-projected (Stage 1's head), NAME-unprojected

    python 04_fusion.py                  all models, and the fusion
    python 04_fusion.py --model rhythm   one of them
Takes minutes. Last line:
`RUN: classifiers of rhythm, morphology, global -> RUN/classifiers`.
"""
import copy
import sys
from types import SimpleNamespace

import numpy as np
import torch
from scipy.special import expit, logit
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import common
from common import BOXES, BRANCHES, CODES, MODELS, columns

STRENGTHS = {  # of L1, from strong to weak
    "default": [5e-2, 3e-2, 2e-2, 1.3e-2, 9e-3, 6e-3, 4e-3, 2.5e-3, 1.5e-3, 1e-3],
    "paper": [1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 3e-4, 2e-4, 1e-4],
}
WITHIN, RESAMPLES = 0.002, 20  # of the best AUROC, a mean of resamples
SHORT = 0.005  # of our fusion, so that its explanations are short
L2 = 1e-4  # else some classes have no optimum
TOLERANCE = 1e-5  # of optimality
ROUNDS, ENTERING = 200, 64  # Newton's; weights that may join
FEWEST = 10  # positives, for a threshold
TRAINED = "config round seconds epochs best_epoch val_auroc hardware threads".split()


# ---- Eq. (10)

def lambda_of(strength, Y, recipe):
    """lambda of Eq. (10) for each class of Y [N, C]: [C].

    The paper has one. Ours lets the same correlation in for all labels.
    """
    if recipe == "paper":
        return np.full(Y.shape[1], strength)
    return strength * Y.std(0).clip(1e-6)


@threadpool_limits.wrap(limits=1, user_api="blas")  # threads would wait
def fit(X, Y, off, lambda_, W=None, b=None):
    """Minimise Eq. (10): mean BCE + lambda |W| over `off` + L2 / 2 |W|^2.

    X [N, F], Y [N, C], off [C, F]: True for other classes, lambda_ [C] or one;
    W, b: a start -> W [C, F], b [C], largest violation of optimality.
    """
    if W is None:
        W, b = np.zeros(off.shape), logit(Y.mean(0).clip(1e-9, 1 - 1e-9))
    off = np.column_stack([off, np.zeros(len(b), bool)])  # the bias comes last
    l1 = np.where(off, np.reshape(lambda_, (-1, 1)), 0).clip(max=1e9)
    X = np.column_stack([X, np.ones(len(X))])
    l2 = np.append(np.full(W.shape[1], L2), 0)
    starts = np.column_stack([W, b])
    fits = [newton(X, y, l1[c], l2, starts[c]) for c, y in enumerate(Y.T)]
    V, violation = map(np.array, zip(*fits))
    return V[:, :-1], V[:, -1], float(violation.max())


def newton(X, y, l1, l2, v):
    """Eq. (10) for one class: X [N, F + 1], y [N], l1, l2, start v -> v, violation.

    Proximal Newton, with step halving, on a working set: weights that are not zero,
    have no L1, or violate optimality most.
    """
    def objective(v):
        m = X @ v
        bce = np.mean(np.logaddexp(0, m) - y * m)
        return bce + l2 @ v**2 / 2 + l1 @ abs(v)  # Eq. (10)

    value = objective(v)
    for _ in range(ROUNDS):
        prob = expit(X @ v)
        g = X.T @ (prob - y) / len(y) + l2 * v
        violation = np.where(v != 0, abs(g + l1 * np.sign(v)), abs(g) - l1)
        if violation.max() < TOLERANCE:
            break
        on = (v != 0) | (l1 == 0)
        most = np.argsort(np.where(on, 0, violation))[-ENTERING:]
        on[most] |= violation[most] > 0
        share = np.float32(np.sqrt(prob * (1 - prob) / len(y)))
        R = np.float32(X[:, on]) * share[:, None]
        H = R.T @ R + np.diag(l2[on] + 1e-9)
        step = np.zeros_like(v)
        step[on] = minimise(H, H @ v[on] - g[on], l1[on], v[on]) - v[on]
        while (new := objective(v + step)) > value and abs(step).max() > 1e-9:
            step /= 2
        v, value = v + step, new
    return v, violation.max()


def minimise(H, r, l1, v):
    """Least v H v / 2 - r v + l1 |v|, by FISTA (Beck, Teboulle 2009)."""
    d = np.sqrt(np.diag(H))
    H, r, l1, v = H / d / d[:, None], r / d, l1 / d, v * d
    L = np.linalg.eigvalsh(H)[-1]
    z, t = v, 1.0
    for _ in range(5000):
        u = z - (H @ z - r) / L
        u = np.sign(u) * np.maximum(abs(u) - l1 / L, 0)
        if (z - u) @ (u - v) > 0:  # it overshoots: begin anew
            t = 1.0
        t_next = (1 + np.sqrt(1 + 4 * t * t)) / 2
        z, change = u + (t - 1) / t_next * (u - v), abs(u - v).max()
        v, t = u, t_next
        if change * L < TOLERANCE / 10:
            break
    return v / d


def fit_path(X, Y, off, prep, recipe, strengths, within, W=None, b=None):
    """Eq. (10) with each strength -> W, b, strength chosen, path."""
    X_train, Y_train, Y_val = X[prep.train], Y[prep.train], Y[prep.val]
    draws = np.random.default_rng(0).integers(len(Y_val), size=(RESAMPLES, len(Y_val)))
    fits, path = [], []
    for strength in tqdm(strengths, "L1 strengths", leave=False, disable=None):
        lambda_ = lambda_of(strength, Y_train, recipe)
        W, b, violation = fit(X_train, Y_train, off, lambda_, W, b)
        logits = X[prep.val] @ W.T + b
        auroc = np.mean([common.macro_auroc(Y_val[i], logits[i]) for i in draws])
        fits.append((W, b))
        path.append(dict(strength=strength, val_auroc=float(np.nan_to_num(auroc)),
                         violation=violation, nonzero=int((W != 0).sum())))
    aurocs = np.array([row["val_auroc"] for row in path])
    chosen = np.argmax(aurocs >= aurocs.max() - within)  # the strongest
    return *fits[chosen], strengths[chosen], path


# ---- Scores and classifiers

def standardise(scores, A, prep, p_patient):
    """scores [N, P], A [P, F] -> X [N, F], mean and std of folds 1-8, without what a
    prototype scores on its own patient."""
    s = common.evidence(scores, A, prep.patient_ids[:, None] != p_patient)
    mean, std = np.nanmean(s[prep.train], 0), np.nanstd(s[prep.train], 0).clip(1e-6)
    return np.nan_to_num((s - mean) / std), mean, std


def thresholds_of(y, logits):
    """Thresholds [C] with the best F1 on y, logits [N, C]; 0 if positives are few."""
    thresholds = np.zeros(y.shape[1])
    for c in np.flatnonzero(y.sum(0) >= FEWEST):
        scores, own = np.sort(logits[:, c]), np.sort(logits[y[:, c] > 0, c])
        over = len(scores) - np.searchsorted(scores, scores)  # >= each
        hits = len(own) - np.searchsorted(own, scores)
        f1 = 2 * hits / (over + len(own))
        thresholds[c] = scores[f1 == f1.max()][-1]
    return thresholds


def save_classifier(args, prep, name, logits, classes, inputs, arrays={}, **more):
    """Write NAME.pt, made of `inputs` [(path, meta)]; `more` joins meta."""
    own = columns(classes)
    full = np.full((len(logits), len(CODES)), np.nan, np.float32)
    full[:, own] = logits  # of folds 9 and 10
    on_val = full[prep.val[prep.later]][:, own]
    y, trained = prep.labels[prep.val][:, own], {}
    auroc = common.macro_auroc(y, on_val)
    for _, m in inputs:  # models, or classifiers
        trained |= m.get("trained") or {m["model"]: {k: m.get(k) for k in TRAINED}}
    meta = {**common.provenance(args, *inputs), "name": name, "classes": classes,
            "branches": [], "config": inputs[0][1]["config"], "trained": trained,
            "val_auroc": None if np.isnan(auroc) else auroc, **more}
    arrays = {**arrays, "logits": full, "thresholds": thresholds_of(y, on_val)}
    tensors = {k: torch.tensor(v) for k, v in arrays.items()}
    common.save(args.run / f"classifiers/{name}.pt", {"meta": meta, **tensors})
    sparse = "{nonzero:6,} of {weights:6,} weights".format(**more) if more else ""
    print(f"{name:22s} fold 9 {auroc:.4f}  {sparse}")


def fit_classifier(args, prep, name, branches, own_only=False):
    """Fit Eq. (10) to scores; then, with the same L1, to those before 03."""
    cfg, models = branches[0].cfg, [branch.model for branch in branches]
    p_code = [m.classes[c] for m in models for c in m.p_class.tolist()]
    p_patient = torch.cat([m.p_patient for m in models]).cpu().numpy()
    pieces, A = p_code, np.eye(len(p_code))
    if cfg.tie == "class":  # W = V A^T
        pieces = list(dict.fromkeys(p_code))
        A = np.eye(len(pieces))[[pieces.index(c) for c in p_code]]  # [P, F]
    classes = sorted({c for m in models for c in m.classes}, key=CODES.index)
    off = np.array(pieces) != np.array(classes)[:, None]  # [C, F]
    Y = prep.labels[:, columns(classes)].astype(float)
    strengths, W, b = STRENGTHS[cfg.recipe], None, None
    within = SHORT if cfg.recipe == "default" and len(branches) > 1 else WITHIN
    if own_only:
        strengths = [np.inf]  # no other weight pays that
    for which in ("", "-unprojected"):
        s = [branch.before if which else branch.scores for branch in branches]
        X, mean, std = standardise(np.concatenate(s, 1), A, prep, p_patient)  # Eq. (9)
        W, b, strength, path = fit_path(X, Y, off, prep, cfg.recipe, strengths, within, W, b)
        strengths = [strength]
        save_classifier(
            args, prep, name + which, X[prep.later] @ W.T + b, classes,
            [branch.made for branch in branches],
            dict(W=W, b=b, mean=mean, std=std, A=A), pieces=pieces, path=path,
            branches=[branch.name for branch in branches], weights=W.size,
            nonzero=int((W != 0).sum()), strength=None if own_only else strength)


def score_branch(args, prep, name):
    """A branch, its scores [N, P] before and after 03; saves Stage 1's logits."""
    path = args.run / name / "projected.pt"
    model, meta = common.load_model(path, "03_project.py", args)
    joint = copy.deepcopy(model)  # before projection
    joint.p.data = common.load(path, "03_project.py")["p_joint"].to(args.device)

    def both(x):
        z = model.latent(x)
        return torch.cat([joint.scores(z), model.scores(z)], 1)

    rows, made = np.arange(len(prep.folds)), (path, meta)
    s = common.batched(both, prep, rows, args.device, f"{name}: scores")
    before, after = s.chunk(2, dim=1)
    for step, s in (("joint", before), ("projected", after)):
        s = s[prep.later].to(args.device)
        logits = model.logits(s).detach().cpu().numpy()
        save_classifier(args, prep, f"{name}-{step}", logits, model.classes, [made])
    return SimpleNamespace(
        name=name, model=model, cfg=common.Config(**meta["config"]), made=made,
        scores=after.numpy(), before=before.numpy())


def merge(args, prep, name, members):
    """Macro aggregation: labels from their branches."""
    paths = [args.run / f"classifiers/{m}.pt" for m in members]
    if not all(p.is_file() for p in paths):
        return
    saved = [common.load(p, "04_fusion.py", args) for p in paths]
    metas = [s["meta"] for s in saved]
    classes = [c for m in metas for c in m["classes"]]  # disjoint
    logits = torch.stack([s["logits"] for s in saved]).nansum(0)[:, columns(classes)]
    save_classifier(args, prep, name, logits, classes, [*zip(paths, metas)])


def main():
    args = common.parse(common.argument_parser(__doc__, *common.RUN_FLAGS))
    prep = common.load_prep(args.prep)
    names = args.model or [m for m in MODELS if (args.run / m / "joint.pt").is_file()]
    if not names:
        sys.exit(f"{args.run} holds no model: run 02_train_joint.py first")
    later, branches = np.flatnonzero(prep.later), {}
    for name in [n for n in names if n in BOXES]:
        path = args.run / name / "joint.pt"
        model, meta = common.load_model(path, "02_train_joint.py", args)
        logits = common.batched(model, prep, later, args.device, name).numpy()
        save_classifier(args, prep, name, logits, model.classes, [(path, meta)])

    for name in [n for n in names if n not in BOXES]:
        branches[name] = score_branch(args, prep, name)
        fit_classifier(args, prep, name, [branches[name]])

    if all(b in branches for b in BRANCHES):
        three = [branches[b] for b in BRANCHES]
        if len({(b.cfg.recipe, b.cfg.tie) for b in three}) > 1:
            sys.exit(f"{args.run} has branches of two recipes or ties")
        fit_classifier(args, prep, "fusion", three)
        fit_classifier(args, prep, "fusion-own", three, own_only=True)
    merge(args, prep, "macro", BRANCHES)
    merge(args, prep, "blackbox-macro", [f"blackbox-{b}" for b in BRANCHES])
    print(f"{args.run}: classifiers of {', '.join(names)} -> {args.run}/classifiers")


if __name__ == "__main__":
    common.run(main)
