"""Stage 02, joint training (paper 3.5, Stage 1): backbone, add-on and prototypes of each branch under Eq. (2).

Keeps the epoch with the best macro-AUROC on fold 9 and stops early when it no longer improves. The default recipe
starts each branch from a black box on all 71 labels (trained here first if the run has none) and its prototypes from
real training windows; `--recipe paper` starts as the authors do. Fold 10 is never touched.

reads   PREP/*.npy, preprocess.json; RUN/MODEL/projected.pt for --round 2
writes  RUN/MODEL/joint.pt (joint_r2.pt), the same provenance as joint.json, log.jsonl with a line per epoch,
        last.pt to resume from

    python 02_train_joint.py                     the three branches: rhythm, morphology, global
    python 02_train_joint.py --model rhythm      one of them
    python 02_train_joint.py --recipe paper      the authors' settings, in runs/paper
    python 02_train_joint.py --resume            after an interruption: finished models are kept

Last line: `runs/default: rhythm .938, morphology .918, global .940 (fold-9 macro-AUROC)`, with your own numbers.
"""
import argparse
import copy
import dataclasses
import sys
import time

import numpy as np
import torch
from torch.optim import lr_scheduler

import common
from common import CODES, GROUPS, IMAGENET, LEADS, MODELS, SAMPLES

SCHEDULERS = {  # optimizer, learning rate, steps in all, steps of an epoch -> a torch scheduler, stepped every step
    "constant": lambda o, lr, steps, epoch: lr_scheduler.ConstantLR(o, 1.0),
    "cosine": lambda o, lr, steps, epoch: lr_scheduler.CosineAnnealingLR(o, steps),
    "step": lambda o, lr, steps, epoch: lr_scheduler.StepLR(o, 10 * epoch, 0.5),
    "cyclic": lambda o, lr, steps, epoch: lr_scheduler.CyclicLR(o, lr / 10, lr, 2 * epoch, cycle_momentum=False),
    "onecycle": lambda o, lr, steps, epoch: lr_scheduler.OneCycleLR(o, lr, max(steps, 2)),
    "plateau": lambda o, lr, steps, epoch: lr_scheduler.ReduceLROnPlateau(o, "max", 0.5, 3),  # stepped every epoch
}


def augment(x):
    """Random changes that keep the diagnosis, one draw per record: x [B, 12, 1000] mV -> the same shape and device."""
    B, d = len(x), x.device
    shift = torch.randint(SAMPLES, (B, 1, 1), device=d)
    x = x.gather(2, ((torch.arange(SAMPLES, device=d) + shift) % SAMPLES).expand(-1, len(LEADS), -1))   # circular shift
    x = x * torch.empty(B, 1, 1, device=d).uniform_(0.8, 1.25)                                          # amplitude
    x = x + torch.randn_like(x) * torch.empty(B, 1, 1, device=d).uniform_(0, 0.05)                      # noise, mV
    x = x * (torch.rand(B, len(LEADS), 1, device=d) > 0.08)                                             # lost leads
    first = torch.randint(SAMPLES, (B, 1, 1), device=d)
    length = torch.randint(150, (B, 1, 1), device=d)                                                    # up to 1.5 s
    t = torch.arange(SAMPLES, device=d)
    return x * ((t < first) | (t >= first + length))                                                    # a blanked span


def record_weights(y):
    """Sampling weight of each record for `--sampler weighted`: the mean inverse frequency of its labels; y [N, C]."""
    rarity = 1 / y.sum(0).clamp_min(1)                                                # [C]
    weight = (y * rarity).sum(1) / y.sum(1).clamp_min(1)
    return torch.where(weight > 0, weight, weight[weight > 0].min())                  # [N]; no label: as the commonest


def bfloat16_is_fast(device):
    """Whether bf16 autocast pays: a GPU with bf16, or a CPU with AVX512-bf16 or AMX instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return any(getattr(torch.cpu, f, bool)() for f in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


@torch.no_grad()
def validate(model, x, y, autocast):
    """(macro-AUROC, logits [N, C]) of a model on x [N, 12, 1000], y [N, C]."""
    model.eval()
    with autocast:
        logits = torch.cat([model(part.to(y.device))[0].float() for part in x.split(256)])
    return common.macro_auroc(y.cpu().numpy(), logits.cpu().numpy()), logits


def train(name, args, cfg, prep):
    """Train one model and write its joint.pt; returns the fold-9 macro-AUROC of the epoch that it holds."""
    kind, group = MODELS[name]
    black_box = kind == "blackbox"
    folder, device = args.run / name, args.device
    suffix = "" if args.round == 1 else f"_r{args.round}"
    out, last = folder / f"joint{suffix}.pt", folder / f"last{suffix}.pt"
    epochs, lr = (cfg.blackbox_epochs, cfg.blackbox_lr) if black_box else (cfg.epochs, cfg.lr)
    torch.manual_seed(cfg.seed)

    # Data: all of it on the device (1 GB); on the CPU the memory-mapped file itself
    classes, left_out = common.learnable(prep, GROUPS[group])
    if not classes:
        sys.exit(f"none of the {len(left_out)} {group} labels has a training record in {args.prep}")
    x = torch.from_numpy(prep.signals)
    x = x if device.type == "cpu" else x.to(device)
    y = torch.from_numpy(prep.labels[:, common.columns(classes)]).float().to(device)              # [N, C]
    train_rows, val_rows = (torch.from_numpy(np.flatnonzero(m)) for m in (prep.train, prep.val))
    y_train = y[train_rows.to(device)]
    jaccard = torch.tensor(prep.info["jaccard"], device=device)[common.columns(classes)][:, common.columns(classes)]
    w = (len(y_train) - y_train.sum(0)) / y_train.sum(0) if cfg.class_weights else None           # w_c = (N - n) / n
    draw = record_weights(y_train.cpu()) if cfg.sampler == "weighted" else None

    # Model and where it starts from
    meta = {**common.provenance(cfg, "02_train_joint.py", prep=prep.path), "model": name, "round": args.round,
            "classes": classes, "left_out": left_out, "device": str(device)}
    model = start(name, args, cfg, prep, classes, meta).to(device)
    average = copy.deepcopy(model).requires_grad_(False) if cfg.ema else model
    if cfg.head == "frozen" and not black_box:
        model.head.requires_grad_(False)

    per_epoch = -(-len(train_rows) // cfg.batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[cfg.optimizer]
    optimizer = make(parameters, lr=lr, weight_decay=cfg.weight_decay, fused=True)
    scheduler = SCHEDULERS[cfg.scheduler](optimizer, lr, epochs * per_epoch, per_epoch)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_fast(device))
    exact = torch.autocast(device.type, enabled=False)
    terms = ("total", "bce") if black_box else ("total", "bce", "clst", "sep", "div", "cntrst")
    log, best, best_state, since, first, seconds = [], -np.inf, None, 0, 1, 0.0

    if args.resume and last.is_file():
        saved = common.load_pt(last, "02_train_joint.py", device)
        if {**saved["meta"], "versions": 0, "code": 0} != {**meta, "versions": 0, "code": 0}:
            sys.exit(f"{last} is of another setting or data set: train without --resume, or name another folder with --run")
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        log, best, best_state, since = saved["log"], saved["best"], saved["best_state"], saved["since"]
        first, seconds = len(log) + 1, saved["seconds"]
        torch.set_rng_state(saved["random"].cpu())
        print(f"{name}: resumed after epoch {len(log)}")
    elif not black_box:  # the start counts as epoch 0, so that training can only be kept if it helps fold 9
        best = validate(model, x[val_rows], y[val_rows.to(device)], exact)[0]
        best_state = copy.deepcopy(model.state_dict())
        print(f"{name}: {len(model.p)} prototypes for {len(classes)} labels; at the start val {best:.4f}")

    for epoch in range(first, epochs + 1):
        if since >= cfg.patience:
            break
        began = time.time()
        model.train()
        order = (torch.multinomial(draw, len(train_rows), replacement=True) if draw is not None
                 else torch.randperm(len(train_rows)))
        seen = torch.zeros(per_epoch, len(terms), device=device)  # stays on the device: no waiting within an epoch
        for step, chosen in enumerate(order.split(cfg.batch)):
            rows = train_rows[chosen]
            x_batch, y_batch = x[rows.to(x.device)], y_train[chosen.to(device)]
            with autocast:
                logits, s = model(augment(x_batch) if cfg.augment else x_batch)
            if black_box:
                bce = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), y_batch, reduction="none")
                total = (bce if w is None else w * bce).mean()
                loss = {"total": total, "bce": total}
            else:
                loss = common.composite_loss(logits.float(), s, y_batch, model.p, model.p_class, jaccard, cfg.lambdas, w)
            optimizer.zero_grad(set_to_none=True)
            loss["total"].backward()
            optimizer.step()
            if cfg.scheduler != "plateau":
                scheduler.step()
            if cfg.ema:
                decay = min(cfg.ema, (epoch * per_epoch + step) / (10 + epoch * per_epoch + step))
                for theirs, ours in zip(average.state_dict().values(), model.state_dict().values()):
                    theirs.lerp_(ours, 1 - decay) if theirs.is_floating_point() else theirs.copy_(ours)
            seen[step] = torch.stack([loss[t].detach() for t in terms])

        seen = seen.cpu()
        if not seen.isfinite().all():
            step = int((~seen.isfinite()).any(1).nonzero()[0])
            bad = [t for t, v in zip(terms, seen[step]) if not v.isfinite()][-1]
            sys.exit(f"{name}: the {bad} term became {float(seen[step, terms.index(bad)])} in epoch {epoch}, step {step + 1}; "
                     "lower --lr, or --resume with other data")
        auroc, _ = validate(average, x[val_rows], y[val_rows.to(device)], exact)
        if cfg.scheduler == "plateau":
            scheduler.step(auroc)
        since = 0 if auroc > best else since + 1
        if auroc > best:
            best, best_state = auroc, copy.deepcopy(average.state_dict())
        log.append({"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "val_auroc": auroc,
                    **{t: float(v) for t, v in zip(terms, seen.mean(0))}})
        seconds += time.time() - began
        left = seconds / epoch * (epochs - epoch) / 60
        print(f"{name:12s} epoch {epoch:3d}/{epochs}  loss {log[-1]['total']:8.4f}  bce {log[-1]['bce']:7.4f}  "
              f"val {auroc:.4f}  best {best:.4f}  {time.time() - began:5.1f} s  {left:4.0f} min left", flush=True)
        common.save_pt(last, {"meta": meta, "model": model.state_dict(), "average": average.state_dict(),
                              "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "log": log,
                              "best": best, "best_state": best_state, "since": since, "seconds": seconds,
                              "random": torch.get_rng_state()})

    meta.update(val_auroc=best, epochs=len(log), best_epoch=next((e["epoch"] for e in log if e["val_auroc"] == best), 0))
    with common.replacing(folder / f"log{suffix}.jsonl") as t:
        t.write_text("".join(common.json.dumps(line) + "\n" for line in log))
    common.save_pt(out, {"meta": meta, "state": {k: v.cpu() for k, v in best_state.items()}})
    common.save_json(out.with_suffix(".json"), {**meta, "seconds": round(seconds, 1), "threads": torch.get_num_threads()})
    return best


def start(name, args, cfg, prep, classes, meta):
    """The untrained model of `meta` in the state that cfg asks for; adds to meta what is needed to build it again."""
    kind, _ = MODELS[name]
    scaler = common.Scaler(**prep.info["scaler"]) if cfg.scale_input else common.Scaler()
    model = common.build(meta, scaler)
    return model


def main():
    p = common.argument_parser(__doc__)
    p.add_argument("--round", type=int, default=1, help="2 continues from the projected prototypes of round 1")
    p.add_argument("--resume", action="store_true", help="continue after the last whole epoch; keep finished models")
    p.add_argument("--no-contrastive", action="store_true", help="train without the contrastive loss")
    for field in dataclasses.fields(common.Config):
        if field.name in ("width", "start", "epochs", "blackbox_epochs", "batch", "lr", "scheduler", "sampler"):
            p.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, help="override the recipe")
    args = common.parse(p)
    cfg = dataclasses.replace(common.RECIPES[args.recipe], seed=args.seed)
    prep = common.load_prep(args.prep)
    over = {f.name: getattr(args, f.name) for f in dataclasses.fields(cfg) if getattr(args, f.name, None) is not None
            and f.name not in ("recipe", "seed")}
    cfg = dataclasses.replace(cfg, **over)
    for name in args.model or common.BRANCHES:
        train(name, args, cfg, prep)


if __name__ == "__main__":
    common.run(main)
