"""Script 02, joint training (paper 3.5, Stage 1): backbone and prototypes under Eq. (2).

Keeps the epoch with the best macro-AUROC on fold 9; reads nothing of fold 10. The same
command goes on after the last whole epoch, and keeps finished models.

reads   PREP; with --round 2 RUN/MODEL/projected.pt;
        with --recipe paper ImageNet weights
writes  RUN/MODEL/joint.pt; log.jsonl: a line an epoch, 0 is the start;
        last.pt, to go on

    python 02_train_joint.py                  rhythm, morphology and global
    python 02_train_joint.py --model rhythm   one of them
    python 02_train_joint.py --recipe paper   the authors' settings, in runs/paper
    python 02_train_joint.py --recipe paper --round 2   from projected prototypes
    python 02_train_joint.py --no-contrastive --run runs/plain   without Eq. (7)
    python 02_train_joint.py --set width=64 --run runs/wide   other SETTINGS (common.py)

Takes 35 to 60 minutes on 2 CPU cores with AVX512-bf16. Last line:
`RUN: rhythm 0.9600, morphology 0.9000, global 0.9400 (fold-9 macro-AUROC)`.
"""
import copy
import json
import os
import platform
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

import common
from common import (
    BOXES, BRANCHES, CODES, GROUPS, IMAGENET, LEADS, MODELS, RATE, SAMPLES, WINDOW, columns)

MAKER = "02_train_joint.py"
ONE_DIM = "rhythm", "all-1d", "blackbox-1d", "blackbox-rhythm"  # never from ImageNet
DEMO = dict(width=16, epochs=40, batch=32, start="random")  # by --demo
WITHOUT = {  # by --no-contrastive; paper: Appendix E
    "default": dict(lambda_cntrst=0.0),
    "paper": dict(lambda_cntrst=0.0, lambda_clst=0.8, lambda_sep=0.08, lambda_div=100.0)}
CHOICES = {k: [*v] for k, v in common.SETTINGS.items() if isinstance(v[0], str)}
CHOICES["sampler"] = ["shuffle", "weighted"]
CHOICES["scheduler"] += ["step"]


# ---- Data

def augment(x, samples=SAMPLES):
    """A crop of each record of x [B, 12, 1000] mV, with random changes that mostly keep
    its labels -> [B, 12, samples].

    Not always: a shift makes an odd beat interval, a blank looks like a pause, and
    another amplitude may cross a voltage criterion (LVH, HVOLT, LVOLT).
    """
    B, leads, d = len(x), len(LEADS), x.device

    def uniform(low, high, n=1):
        return torch.empty(B, n, 1, device=d).uniform_(low, high)

    t = torch.arange(samples, device=d)
    shift = torch.randint(SAMPLES, (B, 1, 1), device=d)
    x = x.gather(2, ((t + shift) % SAMPLES).expand(-1, leads, -1))  # circular
    x *= uniform(0.8, 1.25)  # amplitude
    level, noise = uniform(0, 0.05), torch.randn(B, leads, SAMPLES, device=d)
    x += level * noise[:, :, :samples]  # mV; a crop changes no other draw
    turns = uniform(0.1, 0.5) * t / RATE + uniform(0, 1, leads)
    x += uniform(0, 0.15, leads) * turns.mul_(2 * torch.pi).sin_()  # wander, mV
    x *= uniform(0, 1, leads) > 0.08  # lost leads
    first = torch.randint(SAMPLES, (B, 1, 1), device=d)
    length = torch.randint(150, (B, 1, 1), device=d)  # a blank of up to 1.5 s
    return x * ((t < first) | (t >= first + length))


def record_weights(y):
    """How often sampler=weighted draws a record: mean inverse frequency of its labels;
    without any, the least. y [N, C] -> [N]."""
    rarity = 1 / y.sum(0).clamp_min(1)  # [C]
    weight = (y * rarity).sum(1) / y.sum(1).clamp_min(1)
    return torch.where(weight > 0, weight, weight[weight > 0].min())


def load_data(model, args, cfg, prep):
    """What models learn from and are judged by: x [all, 12, 1000] mV; rows [N] of folds
    1-8 with y [N, C], all_y [N, 71], draw [N] (how often), w [C] of Eq. (3), or None;
    jaccard [C, C]; val_rows of fold 9, val_y."""
    own = columns(model.classes)
    rows, val = np.flatnonzero(prep.train), np.flatnonzero(prep.val)
    data = SimpleNamespace(x=prep.x, w=None, draw=None, val_y=prep.labels[val][:, own])
    data.rows, data.val_rows = (torch.from_numpy(r).to(args.device) for r in (rows, val))
    data.all_y = torch.from_numpy(prep.labels[rows]).float().to(args.device)  # [N, 71]
    data.y = data.all_y[:, own]  # [N, C]
    data.jaccard = torch.tensor(prep.info["jaccard"], device=args.device)[own][:, own]
    if cfg.class_weights:
        n = data.y.sum(0)
        data.w = (n.sum() - n) / n  # [C], as in the authors' code
        if cfg.recipe == "default":  # lambdas mean the same
            data.w /= data.w.mean()
    if cfg.sampler == "weighted":
        data.draw = record_weights(data.y.cpu())
    return data


# ---- Loss (3.4)

def bce(logits, y, w=None):
    """Eq. (3), a mean over logits and y [B, C]; w [C] weighs positives."""
    each = F.binary_cross_entropy_with_logits(logits, y, pos_weight=w, reduction="none")
    return each.mean()


def composite_loss(logits, s, y, p, p_class, jaccard, cfg, w=None):
    """Eq. (2) and its terms as a dict: total, bce, clst, sep, div, cntrst.

    logits [N, C], s [N, P], y [N, C] in {0, 1}, p [P, D, T], p_class [P], jaccard [C, C]
    of training labels, cfg with lambdas, w [C] or None. As in the authors' code w
    multiplies the positive term alone, BCE is a mean over classes, and lambda_div and
    lambda_cntrst are divided: they mean the same for 3 and 71 labels. A record with
    nothing to choose from has clst or sep 0, but counts in N.
    """
    N, P = s.shape
    L_bce = bce(logits, y, w)  # Eq. (3)
    present = y[:, p_class] > 0  # [N, P]
    clst = -_best(s, present).sum() / N  # Eq. (4)
    sep = _best(s, ~present).sum() / N  # Eq. (5)
    unit_p = F.normalize(p.flatten(1))  # [P, D T]
    S = unit_p @ unit_p.T  # [P, P] cosines
    I = torch.eye(P, dtype=S.dtype, device=S.device)
    div = (S - I).square().sum()  # Eq. (6)
    C = jaccard[p_class][:, p_class]  # [P, P], of prototypes' classes
    near = (C * S).sum() / C.sum()
    far = ((1 - C) * S).sum() / (1 - C).sum().clamp_min(1e-12)
    cntrst = -(near - far) / 2  # Eq. (7)
    total = (L_bce + cfg.lambda_clst * clst + cfg.lambda_sep * sep
             + cfg.lambda_div / P**2 * div + cfg.lambda_cntrst / P**0.5 * cntrst)  # Eq. (2)
    terms = dict(bce=L_bce, clst=clst, sep=sep, div=div, cntrst=cntrst)
    return {"total": total, **terms}


def _best(s, mask):
    """Row maxima [B] of s [B, P] over mask; 0 for rows with nothing to choose from."""
    best = s.masked_fill(~mask, -torch.inf).amax(1)
    return torch.where(mask.any(1), best, 0.0)


# ---- Stage 1 (3.5)

def train_epoch(model, average, data, optimizer, scheduler, cfg, epoch):
    """One pass over folds 1-8 (3.5) -> {term of the loss: mean}.

    `average` follows the model, or is the model itself.
    """
    device, N, boxed = data.y.device.type, len(data.rows), model.kind == "blackbox"
    if data.draw is None:
        order = torch.randperm(N)
    else:
        order = torch.multinomial(data.draw, N, replacement=True)
    if N % cfg.batch == 1:  # a batch of one has no variance
        order = order[:-1]
    model.train()
    slow, fast = (  # all but counters
        [t for t in m.state_dict().values() if t.is_floating_point()]
        for m in (average, model))
    seen, per_epoch = [], -(-len(order) // cfg.batch)
    for step, i in enumerate(order.to(data.rows.device).split(cfg.batch)):
        x, y = data.x[data.rows[i]], data.y[i]
        if cfg.augment:
            short = model.kind != "global" and epoch <= 0.8 * cfg.epochs
            x = augment(x, cfg.crop if short else SAMPLES)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16_is_fast(device)):
            h = model.features(x)  # [B, 8 * width, L]
            if not boxed:
                s = model.scores(model.to_latent(h))  # [B, P]
            if boxed or cfg.auxiliary:
                m = model.linear_logits(h)  # [B, C], of prototype models [B, 71]
        if boxed:
            loss = {"total": bce(m.to(y), y, data.w)}
        else:
            loss = composite_loss(
                model.logits(s), s, y, model.p, model.p_class, data.jaccard, cfg, data.w)
            if cfg.own:  # own prototypes alone should do
                loss["own"] = bce(model.logits(s, own=True), y, data.w)
                loss["total"] += cfg.own * loss["own"]
            if cfg.auxiliary:
                loss["auxiliary"] = bce(m.to(y), data.all_y[i])
                loss["total"] += cfg.auxiliary * loss["auxiliary"]
        optimizer.zero_grad()
        loss["total"].backward()
        optimizer.step()
        scheduler.step()
        if average is not model:
            done = (epoch - 1) * per_epoch + step
            torch._foreach_lerp_(slow, fast, 1 - min(cfg.ema, done / (10 + done)))
        seen.append(torch.stack([*loss.values()]).detach())
    return dict(zip(loss, torch.stack(seen).mean(0).tolist()))


def bfloat16_is_fast(device):
    """Whether bfloat16 pays on this type of device."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.no_grad()
def validate(model, data):
    """Macro-AUROC on fold 9, in float32."""
    model.eval()
    logits = torch.cat([model(data.x[i]) for i in data.val_rows.split(256)])
    return common.macro_auroc(data.val_y, logits.cpu().numpy())


def make_optimizer(model, cfg, steps):
    """Optimizer and schedule (Appendix E) of so many steps."""
    make = torch.optim.Adam if cfg.optimizer == "adam" else torch.optim.AdamW
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = make(weights, cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    if cfg.scheduler == "cosine":
        return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if cfg.scheduler == "onecycle":
        return optimizer, lr_scheduler.OneCycleLR(optimizer, cfg.lr, max(steps, 2))
    return optimizer, lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])


def train(meta, args, cfg, prep):
    """Train the model of `meta`, write joint.pt -> its fold-9 macro-AUROC."""
    name = meta["model"]
    out = args.run / name / "joint.pt"
    last = out.with_name("last.pt")
    if done := made_before(out, meta):
        print(f"{name}: {out} is finished, kept")
        return done["meta"]["val_auroc"]
    torch.manual_seed(cfg.seed)
    model = start(meta, args, cfg, prep)
    data = load_data(model, args, cfg, prep)
    if model.kind != "blackbox" and cfg.head == "frozen":
        model.head.requires_grad_(False)
    average = copy.deepcopy(model).requires_grad_(False) if cfg.ema else model
    steps = cfg.epochs * -(-(len(data.rows) - 1) // cfg.batch)
    optimizer, scheduler = make_optimizer(model, cfg, steps)
    parts = dict(
        model=model, average=average, optimizer=optimizer, scheduler=scheduler)
    if saved := made_before(last, meta):
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        log, kept = saved["log"], saved["kept"]
        seconds = saved["seconds"]
        torch.set_rng_state(saved["random"])
        torch.cuda.set_rng_state_all(saved["random_cuda"])
        print(f"{name}: goes on after epoch {log[-1]['epoch']}")
    else:  # the start is epoch 0
        log = [dict(epoch=0, val_auroc=validate(model, data))]
        kept = copy.deepcopy(model.state_dict())
        seconds = 0.0
        print(f"{name}: {len(model.classes)} labels, fold 9 at first "
              f"{log[0]['val_auroc']:.4f}")

    for epoch in range(len(log), cfg.epochs + 1):
        if epoch - 1 - best_of(log)["epoch"] >= cfg.patience:
            break
        began = time.time()
        terms = train_epoch(model, average, data, optimizer, scheduler, cfg, epoch)
        if not np.isfinite(list(terms.values())).all():
            sys.exit(f"{name}: no number in epoch {epoch}: {terms}: train with a lower lr")
        auroc = validate(average, data)
        if auroc > best_of(log)["val_auroc"]:
            kept = copy.deepcopy(average.state_dict())
        lr = optimizer.param_groups[0]["lr"]
        log.append(dict(epoch=epoch, lr=lr, val_auroc=auroc, **terms))
        seconds += time.time() - began
        left = seconds / epoch * (cfg.epochs - epoch) / 60
        print(f"{name:12s} epoch {epoch:3d}/{cfg.epochs}  loss {terms['total']:8.4f}  fold 9 "
              f"{auroc:.4f} (best {best_of(log)['val_auroc']:.4f})  "
              f"{time.time() - began:5.1f} s  {left:4.0f} min left")
        states = {k: part.state_dict() for k, part in parts.items()}
        random = dict(
            random=torch.get_rng_state(), random_cuda=torch.cuda.get_rng_state_all())
        common.save(last, dict(
            meta=meta, **states, **random, log=log, kept=kept, seconds=seconds))

    best = best_of(log)
    meta.update(
        val_auroc=best["val_auroc"], best_epoch=best["epoch"],
        epochs=log[-1]["epoch"], seconds=round(seconds, 1),
        hardware=hardware(args), threads=torch.get_num_threads())
    lines = "".join(json.dumps(line) + "\n" for line in log)
    common.save(out.with_name("log.jsonl"), lines)
    state = {k: v.cpu() for k, v in kept.items()}
    common.save(out, {"meta": meta, "state": state})  # now the model is finished
    last.unlink(missing_ok=True)
    return meta["val_auroc"]


def hardware(args):
    """The name of the GPU, or of the CPU and its cores."""
    if args.device.type == "cuda":
        return torch.cuda.get_device_name(args.device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return f"{[*names, platform.machine()][0]}, {os.cpu_count()} cores"


def best_of(log):
    """The first epoch best on fold 9."""
    return max(log, key=lambda e: e["val_auroc"])


def made_before(path, meta):
    """What joint.pt or last.pt holds of the training of `meta`; None if it is missing or
    of the round before; exits if settings, inputs or code differ."""
    saved = common.load(path, MAKER) if path.is_file() else None
    if saved is None or saved["meta"]["round"] < meta["round"]:
        return None
    if any(saved["meta"][k] != meta[k] for k in ("config", "made_from", "code")):
        sys.exit(f"{path} is of other settings, inputs or code: delete {path.parent}, or "
                 "take another --run")
    return saved


# ---- Where a model starts from

def describe(name, args, cfg, prep):
    """A model's meta: what it is, and is made from."""
    kind, group = MODELS[name]
    count = dict(zip(CODES, prep.labels[prep.train].sum(0).tolist()))
    classes = [c for c in GROUPS[group] if count[c]]
    y = prep.labels[prep.val][:, columns(classes)]
    if (y == y[:1]).all():
        sys.exit(f"{args.prep} has no {group} label both in folds 1-8 and in fold 9: "
                 "run 01_preprocess.py with more records")
    files = [Path(__file__).with_name(f) for f in ("common.py", MAKER)]
    meta = dict(
        config=asdict(cfg), model=name, round=args.round, classes=classes,
        per_class=None, code={f.name: common.file_hash(f) for f in files})
    if kind != "blackbox":  # no more than windows
        most = cfg.per_class[list(WINDOW).index(kind)]
        windows = 32 - WINDOW["partial"] + 1 if kind == "partial" else 1
        meta["per_class"] = [min(most, windows * count[c]) for c in classes]
    if args.round == 1:
        return {**meta, **common.provenance(args, (prep.path, prep.info))}
    path = args.run / name / "projected.pt"
    past = common.load(path, "03_project.py")["meta"]
    meta.update(common.provenance(args, (path, past)))
    for file in ("joint.pt", "projected.pt"):  # which this round replaces
        del meta["made_from"][f"{name}/{file}"]
    return meta


def start(meta, args, cfg, prep):
    """The model at the start."""
    name = meta["model"]
    if args.round > 1:  # Stages 1 and 2 again (Appendix E)
        path = args.run / name / "projected.pt"
        model, past = common.load_model(path, "03_project.py", args)
        if past["round"] != args.round - 1 or past["config"] != meta["config"]:
            sys.exit(f"{path} is of another round or other settings: run 03_project.py "
                     "after the round before, and give 02 its settings")
        return model
    model = common.build(meta).to(args.device)
    if cfg.scale_input:
        for k, v in prep.info["scaler"].items():  # mean, std
            getattr(model, k).copy_(torch.tensor(v)[:, None])
    if cfg.head != "frozen":  # predict the frequency of each label
        frequency = torch.from_numpy(prep.labels[prep.train].mean(0))  # [71]
        log_odds = torch.logit(frequency, 1e-5)
        ours = log_odds[columns(meta["classes"])]
        model.linear.bias.data.copy_(ours if name in BOXES else log_odds)
        if name not in BOXES:
            model.head.bias.data.copy_(ours)
    if cfg.start == "imagenet" and name not in ONE_DIM:
        load_imagenet(model.backbone, args.imagenet)
    return model


def load_imagenet(backbone, path):
    """Copy torchvision's ResNet18, middle rows of kernels; not the stem (3.3)."""
    own = backbone.state_dict()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in own:
            if key != "conv1.weight" and not key.endswith("num_batches_tracked"):
                w = state[key]
                own[key] = w[:, :, w.shape[2] // 2] if w.ndim == 4 else w
        backbone.load_state_dict(own)
    except Exception:  # of many kinds
        sys.exit(f"{path} is missing, damaged or not of width 64: run "
                 "00_download.py --imagenet, or take --set start=random")


# ---- Settings

def settings(args, p):
    """The Config of --recipe, --seed, --demo, --no-contrastive and --set."""
    cfg = replace(common.RECIPES[args.recipe], seed=args.seed)
    if args.demo:
        cfg = replace(cfg, **DEMO)
    if args.no_contrastive:
        cfg = replace(cfg, **WITHOUT[args.recipe])
    for text in args.set:
        name, _, value = text.partition("=")
        old = asdict(cfg).get(name) if name not in ("recipe", "seed") else None
        try:
            if isinstance(old, bool):
                new = {"yes": True, "no": False}[value]
            elif isinstance(old, tuple):
                new = tuple(type(o)(v) for o, v in zip(old, value.split(","), strict=True))
            else:
                new = type(old)(value)
        except (KeyError, ValueError, TypeError):
            like = "lists all" if old is None else f"has {name}={old}"
            p.error(f"--set {text}: SETTINGS in common.py {like}")
        if new not in CHOICES.get(name, [new]):
            p.error(f"--set {text}: choose from {', '.join(CHOICES[name])}")
        cfg = replace(cfg, **{name: new})
    counts = cfg.batch, cfg.patience, cfg.width, cfg.top_k, *cfg.per_class
    if min(counts) < 1 or cfg.width % 16:
        p.error("--set: counts are at least 1, width is a multiple of 16")
    return cfg


def main():
    p = common.argument_parser(__doc__, *common.RUN_FLAGS, "seed")
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change the "
                   "recipe: number, word, yes or no, numbers with commas")
    p.add_argument("--no-contrastive", action="store_true", help="without Eq. (7)")
    p.add_argument("--round", type=int, default=1, help="2: from projected prototypes")
    p.add_argument("--imagenet", type=Path, metavar="FILE", default=Path("data", IMAGENET),
                   help=f"default: data/{IMAGENET}")
    args = common.parse(p)
    cfg = settings(args, p)
    prep = common.load_prep(args.prep)
    prep.x = torch.from_numpy(prep.signals).to(args.device)  # 1 GB; CPU: the file
    names = dict.fromkeys(args.model or BRANCHES)
    metas = [describe(n, args, cfg, prep) for n in names]
    for meta in metas:  # what cannot be trained ends here
        files = [args.run / meta["model"] / f for f in ("joint.pt", "last.pt")]
        any(made_before(f, meta) for f in files) or start(meta, args, cfg, prep)
    best = {m["model"]: train(m, args, cfg, prep) for m in metas}
    results = ", ".join(f"{name} {auroc:.4f}" for name, auroc in best.items())
    print(f"{args.run}: {results} (fold-9 macro-AUROC)")


if __name__ == "__main__":
    common.run(main)
