"""Stage 02, joint training (paper 3.5, Stage 1): backbone and prototypes under Eq. (2).

Keeps the epoch with the best macro-AUROC on fold 9. Our recipe starts branches from a black box,
trained first if the run has none, and prototypes from real training windows; the authors' start is
ImageNet or random. Fold 10 is never touched. The same command again goes on after the last whole
epoch and keeps finished models.

reads   PREP/*.npy, preprocess.json; with --round 2 RUN/MODEL/projected.pt
writes  RUN/MODEL/joint.pt, log.jsonl (a line an epoch, epoch 0 is the start); last.pt to go on from

    python 02_train_joint.py                      the three branches: rhythm, morphology, global
    python 02_train_joint.py --model rhythm       one of them
    python 02_train_joint.py --recipe paper       the authors' settings, in runs/paper
    python 02_train_joint.py --recipe paper --round 2    again, from the projected prototypes
    python 02_train_joint.py --no-contrastive --run runs/plain    without Eq. (7)
    python 02_train_joint.py --set width=32 per_class=5,5,5 --run runs/small    other settings
                                                  (Config in common.py lists and explains them)

Takes two to three hours on 2 CPU cores with AVX512-bf16, less than half of that with width=32.
Last line: `runs/default: rhythm 0.9600, morphology 0.9200, global 0.9400 (fold-9 macro-AUROC)`.
"""
import copy
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.optim import lr_scheduler

import common
from common import (
    BOXES, BRANCHES, CODES, GROUPS, IMAGENET, LEADS, MODELS, SAMPLES, WINDOW, columns)

MAKER = "02_train_joint.py"
ONE_DIM = "rhythm", "all-1d", "blackbox-1d", "blackbox-rhythm"  # never from ImageNet
DEMO = dict(width=16, epochs=6, blackbox_epochs=40, batch=32)  # what --demo changes
CHOICES = {
    "start": ["random", "imagenet", "blackbox"],
    "pool": ["mean", "meanmax"],
    "add_on": ["whitened", "sigmoid"],
    "prototypes": ["data", "random"],
    "sampler": ["shuffle", "weighted"],
    "head": ["refit", "free", "frozen"],
    "optimizer": ["adam", "adamw"],
    "scheduler": ["cosine", "onecycle", "plateau"],
}


# ---- Data

def augment(x):
    """Random changes for each record of x [B, 12, 1000] mV that mostly keep the diagnosis.

    Not always: a shift makes one odd beat interval, a blanked span looks like a pause, and another
    amplitude may cross a voltage criterion (LVH, HVOLT, LVOLT).
    """
    B, d = len(x), x.device
    t = torch.arange(SAMPLES, device=d)
    shift = torch.randint(SAMPLES, (B, 1, 1), device=d)
    x = x.gather(2, ((t + shift) % SAMPLES).expand(-1, len(LEADS), -1))  # circular
    x = x * torch.empty(B, 1, 1, device=d).uniform_(0.8, 1.25)  # amplitude
    x = x + torch.randn_like(x) * torch.empty(B, 1, 1, device=d).uniform_(0, 0.05)  # noise, mV
    x = x * (torch.rand(B, len(LEADS), 1, device=d) > 0.08)  # lost leads
    first = torch.randint(SAMPLES, (B, 1, 1), device=d)
    length = torch.randint(150, (B, 1, 1), device=d)  # a blanked span of up to 1.5 s
    return x * ((t < first) | (t >= first + length))


def record_weights(y):
    """How often `sampler=weighted` draws each record: the mean inverse frequency of its labels;
    without a label as the commonest. y [N, C] -> [N]."""
    rarity = 1 / y.sum(0).clamp_min(1)  # [C]
    weight = (y * rarity).sum(1) / y.sum(1).clamp_min(1)
    return torch.where(weight > 0, weight, weight[weight > 0].min())


def load_data(model, args, cfg, prep):
    """The records that a model learns from and is judged by, as a namespace on the device."""
    own, rows, val = columns(model.classes), np.flatnonzero(prep.train), np.flatnonzero(prep.val)
    data = SimpleNamespace(x=prep.x, w=None, draw=None, val_y=prep.labels[val][:, own])
    data.rows, data.val_rows = (torch.from_numpy(r).to(args.device) for r in (rows, val))
    data.y = torch.from_numpy(prep.labels[rows][:, own]).float().to(args.device)  # [N, C]
    data.patients = torch.from_numpy(prep.patient_ids[rows]).to(args.device)
    data.jaccard = torch.tensor(prep.info["jaccard"], device=args.device)[own][:, own]
    if cfg.class_weights:
        n = data.y.sum(0)
        data.w = (len(rows) - n) / n  # [C], w of Eq. (3)
    if cfg.sampler == "weighted":
        data.draw = record_weights(data.y.cpu())
    return data


# ---- Stage 1

def train_epoch(model, average, data, optimizer, scheduler, cfg, epoch):
    """One pass over folds 1-8 (3.5): the mean of each term of Eq. (2), as a dict.

    `average` follows the weights of a black box; of a prototype model it is the model itself.
    """
    device, N = data.y.device.type, len(data.rows)
    if data.draw is None:
        order = torch.randperm(N)
    else:
        order = torch.multinomial(data.draw, N, replacement=True)
    model.train()
    seen, per_epoch = [], -(-N // cfg.batch)
    for step, i in enumerate(order.to(data.rows.device).split(cfg.batch)):
        x, y = data.x[data.rows[i]], data.y[i]
        x = augment(x) if cfg.augment else x
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16_is_fast(device)):
            logits, s = model(x)  # [B, C], [B, P]
        if model.kind == "blackbox":
            bce = F.binary_cross_entropy_with_logits(logits.float(), y, reduction="none")
            bce = (bce if data.w is None else data.w * bce).mean()
            loss = {"total": bce, "bce": bce}
        else:
            if not cfg.own_patient:  # a prototype knows its own patient: the batch mean there
                same = data.patients[i][:, None] == model.p_patient
                s = torch.where(same, s.detach().sum(0) / len(i), s)
                logits = model.head(s)
            loss = common.composite_loss(
                logits.float(), s, y, model.p, model.p_class, data.jaccard, cfg.lambdas, data.w)
        optimizer.zero_grad(set_to_none=True)
        loss["total"].backward()  # Eq. (2)
        optimizer.step()
        if cfg.scheduler != "plateau":
            scheduler.step()
        if average is not model:
            done = epoch * per_epoch + step
            follow(average, model, 1 - min(cfg.blackbox_ema, done / (10 + done)))
        seen.append(torch.stack([term.detach() for term in loss.values()]))
    return dict(zip(loss, torch.stack(seen).mean(0).tolist()))


def follow(average, model, weight):
    """Move the weights of `average` towards those of `model`."""
    for theirs, ours in zip(average.state_dict().values(), model.state_dict().values()):
        if theirs.is_floating_point():
            theirs.lerp_(ours, weight)
        else:
            theirs.copy_(ours)


def bfloat16_is_fast(device):
    """Whether autocast to bfloat16 pays on a device, by its type."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.no_grad()
def validate(model, data):
    """Macro-AUROC on fold 9, in float32."""
    model.eval()
    logits = torch.cat([model(data.x[i])[0] for i in data.val_rows.split(256)])
    return common.macro_auroc(data.val_y, logits.cpu().numpy())


@torch.no_grad()
def refit_head(model, z, carries, patients):
    """Solve Eq. (10) with own-class weights alone: z [N, D, L], carries [N, C], patients [N].

    A head that follows SGD lags behind the prototypes; with this one the fold-9 AUROC of an epoch
    tells how far the evidence of a class's own prototypes goes. As in Stage 3, a record's
    similarity to prototypes of its own patient is taken as the mean.
    """
    s = torch.cat([model.scores(part.to(model.p.device)) for part in z.split(128)])
    s = s.double().cpu().numpy()  # [N, P]
    mean, std = s.mean(0), s.std(0).clip(1e-6)
    X = (s - mean) / std
    X[patients[:, None] == model.p_patient.cpu().numpy()] = 0
    p_class, W = model.p_class.cpu().numpy(), np.zeros(model.head.weight.shape)
    b = np.zeros(len(W))
    for c in range(len(W)):
        solver = LogisticRegression(C=1 / (1e-4 * len(X)), solver="newton-cholesky", tol=1e-6)
        solver.fit(X[:, p_class == c], carries[:, c])
        W[c, p_class == c], b[c] = solver.coef_[0], solver.intercept_[0]
    model.head.weight.copy_(torch.from_numpy(W / std))
    model.head.bias.copy_(torch.from_numpy(b - W / std @ mean))


@torch.no_grad()
def project_and_refit(model, prep, cfg, device):
    """Stage 2 between epochs: prototypes go back to real windows, and the head is solved anew.
    Returns what it was solved on: z [N, D, L], carries [N, C], patients [N]."""
    if not cfg.project_every and cfg.head != "refit":
        return None
    z, carries, rows = common.training_set(model, prep, device)
    if cfg.project_every:
        p, found = common.project(
            z, carries, prep.ecg_ids[rows], model.p.data, model.p_class, cfg.unique)  # Eq. (8)
        model.p.copy_(p)
        model.p_patient.copy_(common.own_patients(found, prep, cfg))
    if cfg.head == "refit":
        refit_head(model, z, carries, prep.patient_ids[rows])
    return z, carries, prep.patient_ids[rows]


def unprojected(model, p, solved_on, cfg):
    """The model with the prototypes p that it had before projection, and the head for them."""
    kept = copy.deepcopy(model)
    kept.p.data.copy_(p)
    if cfg.head == "refit":
        refit_head(kept, *solved_on)
    return kept


def make_optimizer(model, cfg, steps):
    """The optimizer and its schedule (Appendix E) of so many steps; plateau goes by epochs."""
    lr = cfg.blackbox_lr if model.kind == "blackbox" else cfg.lr
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[cfg.optimizer]
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(learning, lr=lr, weight_decay=cfg.weight_decay, fused=True)
    if cfg.scheduler == "cosine":
        return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if cfg.scheduler == "onecycle":
        return optimizer, lr_scheduler.OneCycleLR(optimizer, lr, max(steps, 2))
    return optimizer, lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, 3)


def train(name, args, cfg, prep):
    """Train one model and write its joint.pt; returns the fold-9 macro-AUROC of the epoch kept."""
    black_box, out = name in BOXES, args.run / name / "joint.pt"
    last = out.with_name("last.pt")
    meta = describe(name, args, cfg, prep)
    if done := made_before(out, meta):
        print(f"{name}: {out} is finished, kept", flush=True)
        return done["meta"]["val_auroc"]
    torch.manual_seed(cfg.seed)
    model = start(meta, args, cfg, prep)
    data = load_data(model, args, cfg, prep)
    model.head.requires_grad_(black_box or cfg.head == "free")
    average = model
    if black_box and cfg.blackbox_ema:
        average = copy.deepcopy(model).requires_grad_(False)
    epochs = cfg.blackbox_epochs if black_box else cfg.epochs
    steps = epochs * -(-len(data.rows) // cfg.batch)
    optimizer, scheduler = make_optimizer(model, cfg, steps)
    learning = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
    log, kept, seconds = [], model.state_dict(), 0.0
    if saved := made_before(last, meta):
        for key, part in learning.items():
            part.load_state_dict(saved[key])
        log, kept, seconds = saved["log"], saved["kept"], saved["seconds"]
        torch.set_rng_state(saved["random"])
        torch.cuda.set_rng_state_all(saved["random_cuda"])
        print(f"{name}: goes on after epoch {log[-1]['epoch']}", flush=True)
    elif not black_box:  # the start is epoch 0, so that what is kept is never worse on fold 9
        log, kept = [{"epoch": 0, "val_auroc": validate(model, data)}], copy.deepcopy(kept)
        print(f"{name}: {len(model.p)} prototypes for {len(model.classes)} labels, at the start "
              f"fold 9 {log[0]['val_auroc']:.4f}", flush=True)

    for epoch in range(len(log) + black_box, epochs + 1):
        best = best_of(log)
        if epoch - 1 - best["epoch"] >= cfg.patience:
            break
        began = time.time()
        terms = train_epoch(model, average, data, optimizer, scheduler, cfg, epoch)
        if not np.isfinite(list(terms.values())).all():
            sys.exit(f"{name}: no number in epoch {epoch}: {terms}: train again with a lower lr")
        if not black_box:
            p = model.p.detach().clone()
            solved_on = project_and_refit(model, prep, cfg, args.device)
        auroc = validate(average, data)
        if cfg.scheduler == "plateau":
            scheduler.step(auroc)
        if auroc > best["val_auroc"]:  # judged as projected, kept as before: Stage 2 proper is 03's
            better = average if black_box else unprojected(model, p, solved_on, cfg)
            kept = copy.deepcopy(better.state_dict())
        lr = optimizer.param_groups[0]["lr"]
        log.append({"epoch": epoch, "lr": lr, "val_auroc": auroc, **terms})
        seconds += time.time() - began
        left = seconds / epoch * (epochs - epoch) / 60
        print(f"{name:12s} epoch {epoch:3d}/{epochs}  loss {terms['total']:8.4f}  bce "
              f"{terms['bce']:7.4f}  fold 9 {auroc:.4f} (best {best_of(log)['val_auroc']:.4f})  "
              f"{time.time() - began:5.1f} s  {left:4.0f} min left", flush=True)
        states = {key: part.state_dict() for key, part in learning.items()}
        common.save(last, {"meta": meta, **states, "log": log, "kept": kept, "seconds": seconds,
                           "random": torch.get_rng_state(),
                           "random_cuda": torch.cuda.get_rng_state_all()})

    best = best_of(log)
    model.load_state_dict(kept)
    meta.update(val_auroc=best["val_auroc"], best_epoch=best["epoch"], epochs=log[-1]["epoch"],
                seconds=round(seconds, 1), threads=torch.get_num_threads())
    if black_box and cfg.head == "refit":
        meta["val_auroc"] = refit_black_box(model.eval(), prep, args.device)
        print(f"{name}: head solved on frozen features, fold 9 {meta['val_auroc']:.4f}", flush=True)
    common.save(out.with_name("log.jsonl"), "".join(json.dumps(line) + "\n" for line in log))
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    common.save(out, {"meta": meta, "state": state})  # last: with it the model is finished
    last.unlink(missing_ok=True)
    return meta["val_auroc"]


def best_of(log):
    """The first of the epochs with the best fold-9 macro-AUROC."""
    return max(log, key=lambda e: e["val_auroc"], default={"epoch": 0, "val_auroc": -np.inf})


def made_before(path, meta):
    """What joint.pt or last.pt holds of the training that `meta` describes; None if it is not there
    or of the round before; exits if it is of other settings, inputs or code."""
    saved = common.load(path, MAKER) if path.is_file() else None
    if saved is None or saved["meta"]["round"] < meta["round"]:
        return None
    if any(saved["meta"][k] != meta[k] for k in ("config", "made_from", "code")):
        sys.exit(f"{path} is of other settings, inputs or code: delete {path.parent}, or name "
                 "another folder with --run")
    return saved


# ---- Where a model starts from

def start_of(name, cfg):
    """What the backbone of a model starts from: random, imagenet, or a black box of the run."""
    if cfg.start == "blackbox" and name not in BOXES:
        return "blackbox-rhythm" if name == "rhythm" else "blackbox-1d"
    if cfg.start == "random" or name in ONE_DIM:
        return "random"
    return "imagenet"


def describe(name, args, cfg, prep):
    """The meta of a model: what it is and what it is made from."""
    kind, group = MODELS[name]
    count = dict(zip(CODES, prep.labels[prep.train].sum(0).tolist()))
    classes = [c for c in GROUPS[group] if count[c]]
    y_val = prep.labels[prep.val][:, columns(classes)]
    if (y_val == y_val[:1]).all():
        sys.exit(f"{args.prep} has no {group} label to learn in folds 1-8 and to judge in fold 9: "
                 "run 01_preprocess.py with more records")
    here = Path(__file__).parent
    meta = {"config": asdict(cfg), "model": name, "round": args.round, "classes": classes,
            "per_class": None, "latent_dim": None,
            "code": {f: common.file_hash(here / f) for f in ("common.py", MAKER)}}
    inputs, source = [(prep.path, prep.info)], start_of(name, cfg)
    if kind != "blackbox":  # no more prototypes than the class has windows
        most = cfg.per_class[list(WINDOW).index(kind)]
        windows = 30 if kind == "partial" else 1
        meta["per_class"] = [min(most, windows * count[c]) for c in classes]
    if source in BOXES:
        path = args.run / source / "joint.pt"
        inputs.append((path, common.load(path, MAKER, args)["meta"]))
        meta["latent_dim"] = len(inputs[1][1]["classes"])
    if args.round == 1:
        return {**meta, **common.provenance(args, *inputs)}
    path = args.run / name / "projected.pt"
    meta.update(common.provenance(args, (path, common.load(path, "03_project.py")["meta"])))
    for file in ("joint.pt", "projected.pt"):  # which this round replaces
        del meta["made_from"][f"{name}/{file}"]
    return meta


def start(meta, args, cfg, prep):
    """The model that training starts from."""
    name, source = meta["model"], start_of(meta["model"], cfg)
    if args.round > 1:  # Stages 1 and 2 again, from the projected prototypes (Appendix E)
        path = args.run / name / "projected.pt"
        model, past = common.load_model(path, "03_project.py", args)
        if past["round"] != args.round - 1 or past["config"] != meta["config"]:
            sys.exit(f"{path} is of another round or of other settings: run 03_project.py after "
                     "the round before, and give 02 its settings")
    elif source in BOXES:
        model = start_from_black_box(source, meta, args, cfg, prep)
    else:
        model = common.build(meta, scaler_of(prep, cfg)).to(args.device)
        if source == "imagenet":
            load_imagenet(model.backbone, args.imagenet)
    if name not in BOXES and cfg.head == "refit":
        z, carries, rows = common.training_set(model, prep, args.device)
        refit_head(model, z, carries, prep.patient_ids[rows])
    return model


def scaler_of(prep, cfg):
    """The scaling of the leads, which is part of a model."""
    return common.Scaler(**prep.info["scaler"]) if cfg.scale_input else common.Scaler()


def load_imagenet(backbone, path):
    """Start from torchvision's ResNet18: middle kernel rows; the stem stays random (3.3)."""
    own = backbone.state_dict()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in own:
            if key != "conv1.weight" and not key.endswith("num_batches_tracked"):
                weight = state[key]
                own[key] = weight[:, :, weight.shape[2] // 2] if weight.ndim == 4 else weight
        backbone.load_state_dict(own)
    except Exception:  # torch raises many kinds for a missing, truncated or foreign file
        sys.exit(f"{path} is missing, damaged or of another width than 64: run 00_download.py "
                 "--imagenet, or take --set start=random")


def black_box_heads(model, prep, device, strengths):
    """Solve a black box's head on its frozen features, as Stage 3 does for prototypes.

    For each L2 strength, weakening, the logistic regressions that minimise the sum over classes of
    the mean BCE + L2 / 2 |W|^2 on standardised features, by at most 100 steps of L-BFGS from the
    one before. Returns [(W [C, 512 or 1024], b [C])], for features as they are.
    """
    rows = np.flatnonzero(prep.train)
    h = common.batched(lambda x: model(x)[1], prep, rows, device).to(device)  # [N, 512 or 1024]
    y = torch.from_numpy(prep.labels[rows][:, columns(model.classes)]).float().to(device)
    mean, std = h.mean(0), h.std(0).clamp_min(1e-6)
    X, W = (h - mean) / std, torch.zeros_like(model.head.weight, requires_grad=True)
    b, heads = torch.logit(y.mean(0), 1e-6).requires_grad_(), []
    for l2 in strengths:
        solver = torch.optim.LBFGS([W, b], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            bce = F.binary_cross_entropy_with_logits(X @ W.T + b, y) * len(b)
            loss = bce + l2 / 2 * W.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        weight = (W / std).detach()
        heads.append((weight, (b - weight @ mean).detach()))
    return heads


def refit_black_box(model, prep, device):
    """Give a black box the head that is best on fold 9, a solved one or its own: its AUROC."""
    rows, head = np.flatnonzero(prep.val), model.head
    h = common.batched(lambda x: model(x)[1], prep, rows, device).to(device)
    y = prep.labels[rows][:, columns(model.classes)]
    heads = [(head.weight.data, head.bias.data)]
    heads += black_box_heads(model, prep, device, (0.1, 0.03, 0.01, 0.003))
    aurocs = [common.macro_auroc(y, (h @ W.T + b).cpu().numpy()) for W, b in heads]
    head.weight.data, head.bias.data = heads[int(np.argmax(aurocs))]
    return max(aurocs)


def whitening(u):
    """Damped ZCA of the latent steps of u [N, D, L]: Q [D, D] and mean [D] of x -> Q (x - mean),
    with Q = (Cov + its mean eigenvalue)^(-1/2), in float64."""
    steps = u.transpose(1, 2).reshape(-1, u.shape[1]).double()  # [N L, D]
    variance, E = torch.linalg.eigh(torch.cov(steps.T).reshape(u.shape[1], -1))
    return E @ torch.diag((variance + variance.mean()).rsqrt()) @ E.T, steps.mean(0)


def start_from_black_box(source, meta, args, cfg, prep):
    """A prototype model on a black box's backbone: whitened latents, real windows as prototypes.

    The add-on maps each latent step to the black box's class directions (the rows of a head solved
    on its features) and whitens them over the training records, so that a cosine compares diagnoses
    and not the few channels with the largest variance.
    """
    path = args.run / source / "joint.pt"
    box, before = common.load_model(path, MAKER, args)
    for k in ("seed", "width", "pool", "scale_input", "blackbox_epochs", "blackbox_lr"):
        if before["config"][k] != getattr(cfg, k):
            sys.exit(f"{path} has {k} {before['config'][k]}: give 02 that too, or another --run")
    model = common.build(meta, scaler_of(prep, cfg)).to(args.device).eval()
    model.backbone.load_state_dict(box.backbone.state_dict())
    # stronger L2 than for the black box's own head: classes of few records need the restraint
    V = black_box_heads(box, prep, args.device, [0.1])[0][0]  # [71, 512 or 1024]
    if model.kind != "1d" and cfg.pool == "meanmax":  # a step's evidence through both poolings
        V = V[:, :V.shape[1] // 2] + V[:, V.shape[1] // 2:]
    model.add_on.weight.data = V[:, :, None].clone()
    model.add_on.bias.data = torch.zeros_like(V[:, 0])
    z, carries, rows = common.training_set(model, prep, args.device)  # [N, 71, L]
    Q, mean = whitening(z)
    z = torch.einsum("ed,ndl->nel", Q.float(), z - mean.float()[:, None])  # [N, D, L]
    Q, mean = Q.to(V), mean.to(V)
    model.add_on.weight.data = (Q @ V)[:, :, None].clone()
    model.add_on.bias.data = -(Q @ mean)
    if cfg.prototypes == "data":
        set_to_windows(model, z, carries, rows, prep, cfg)
    return model


def set_to_windows(model, z, carries, rows, prep, cfg):
    """Start the prototypes at real training windows: of each record of a class the window that
    points most in the class's direction is taken; then the windows nearest to k-means of these."""
    T, centres = model.p.shape[2], []
    for c, k in enumerate(torch.bincount(model.p_class).tolist()):
        windows = z[carries[:, c]].unfold(2, T, 1).permute(0, 2, 1, 3).flatten(2)
        unit = F.normalize(windows, dim=2)  # [n, windows, D T]
        direction = unit.mean((0, 1))
        best = (unit @ direction).argmax(1)  # [n]
        unit = unit[torch.arange(len(unit)), best].numpy()
        if k > len(unit):  # fewer records than prototypes: each again and again
            centres.append(np.resize(unit, (k, unit.shape[1])))
            continue
        with threadpool_limits(1, "openmp"):  # several threads add up in any order
            k_means = KMeans(k, n_init=1, random_state=cfg.seed).fit(unit)
        centres.append(k_means.cluster_centers_)
    centres = torch.from_numpy(np.concatenate(centres)).float().view_as(model.p)
    p, found = common.project(
        z, carries, prep.ecg_ids[rows], centres.to(model.p), model.p_class, cfg.unique)
    model.p.data = p
    model.p_patient.copy_(common.own_patients(found, prep, cfg))


# ---- Settings

def settings(args, p):
    """The Config that --recipe, --seed, --demo, --no-contrastive and --set ask for."""
    cfg = replace(common.RECIPES[args.recipe], seed=args.seed)
    if args.demo:
        cfg = replace(cfg, **DEMO)
    if args.demo and args.recipe == "paper":  # whose ImageNet weights fit width 64 only
        cfg = replace(cfg, start="random")
    if args.no_contrastive and args.recipe == "paper":  # Barnett et al.'s lambdas (Appendix E)
        cfg = replace(cfg, lambda_clst=0.8, lambda_sep=0.08, lambda_div=100.0)
    if args.no_contrastive:
        cfg = replace(cfg, lambda_cntrst=0.0)
    for text in args.set:
        name, _, value = text.partition("=")
        old = asdict(cfg).get(name) if name not in ("recipe", "seed", "rounds") else None
        try:
            if isinstance(old, bool):
                new = {"yes": True, "no": False}[value]
            elif isinstance(old, tuple):
                new = tuple(type(o)(v) for o, v in zip(old, value.split(","), strict=True))
            else:
                new = type(old)(value)
        except (KeyError, ValueError, TypeError):
            like = "lists all settings" if old is None else f"has {name}={old}"
            p.error(f"--set {text}: Config in common.py {like}")
        if new not in CHOICES.get(name, [new]):
            p.error(f"--set {text}: choose from {', '.join(CHOICES[name])}")
        cfg = replace(cfg, **{name: new})
    counts = cfg.batch, cfg.patience, cfg.blackbox_epochs, cfg.width, cfg.top_k, *cfg.per_class
    shares = cfg.lr, cfg.blackbox_lr, cfg.dropout, cfg.blackbox_ema
    if min(counts) < 1 or cfg.width % 16 or min(shares[:2]) <= 0 or not max(shares) < 1:
        p.error("--set: counts are at least 1, width is a multiple of 16, lr, dropout and "
                "blackbox_ema are below 1")
    if cfg.start != "blackbox":  # there are no latents yet to take prototypes from
        cfg = replace(cfg, prototypes="random")
    elif cfg.add_on == "sigmoid":
        p.error("--set add_on=sigmoid needs start=random or start=imagenet")
    return cfg


def main():
    p = common.argument_parser(__doc__, *common.RUN_FLAGS, "seed")
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change settings of "
                   "the recipe: a number, a word, yes or no, three numbers with commas")
    p.add_argument("--no-contrastive", action="store_true", help="train without Eq. (7)")
    p.add_argument("--round", type=int, default=1, help="2: once more, from projected prototypes")
    p.add_argument("--imagenet", type=Path, metavar="FILE", default=Path("data") / IMAGENET,
                   help=f"default: data/{IMAGENET}")
    args = common.parse(p)
    cfg = settings(args, p)
    names = [*dict.fromkeys(args.model or BRANCHES)]
    if args.round < 1 or args.round > 1 and set(names) & set(BOXES):
        p.error("--round 2 continues prototype models; black boxes have one round")
    prep = common.load_prep(args.prep)
    prep.x = torch.from_numpy(prep.signals).to(args.device)  # 1 GB; on a CPU the file itself
    boxes = [start_of(name, cfg) for name in names if args.round == 1]
    boxes = [box for box in dict.fromkeys(boxes) if box in BOXES]
    missing = [b for b in boxes if b not in names and not (args.run / b / "joint.pt").is_file()]
    if missing:
        print(f"first what the branches start from: {', '.join(missing)}", flush=True)
    names = sorted([*missing, *names], key=lambda name: name not in boxes)
    best = {name: train(name, args, cfg, prep) for name in names}
    results = ", ".join(f"{name} {auroc:.4f}" for name, auroc in best.items())
    print(f"{args.run}: {results} (fold-9 macro-AUROC)")


if __name__ == "__main__":
    common.run(main)
