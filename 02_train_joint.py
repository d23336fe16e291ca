"""Stage 02, joint training (paper 3.5, Stage 1): backbone, add-on and prototypes of each branch under Eq. (2).

Keeps the epoch with the best macro-AUROC on fold 9 and stops early when it no longer improves. The default recipe
starts each branch from a black box (the rhythm branch's on its own labels, the others' on all 71; trained here first if
the run has none) and its prototypes from real training windows; `--recipe paper` starts as the authors do. Fold 10 is
never touched.

reads   PREP/*.npy, preprocess.json; what a model starts from: a black box's joint.pt, ImageNet weights, or for
        --round 2 RUN/MODEL/projected.pt
writes  RUN/MODEL/joint.pt (joint_r2.pt), the same provenance as joint.json, log.jsonl with a line per epoch,
        last.pt to resume from; with --tune only RUN/MODEL/tuned.json

    python 02_train_joint.py                     the three branches: rhythm, morphology, global
    python 02_train_joint.py --model rhythm      one of them
    python 02_train_joint.py --small             the small rhythm branch, on its 16 labels alone, in runs/small
    python 02_train_joint.py --recipe paper      the authors' settings, in runs/paper
    python 02_train_joint.py --resume            after an interruption: finished models are kept
    torchrun --nproc_per_node=4 -- 02_train_joint.py         on four GPUs
    python 02_train_joint.py --model rhythm --tune 200 --study sqlite:///tune.db
                                                 search better settings: RUN/MODEL/tuned.json, which --config takes

Takes, on 2 CPU cores with AVX512-bf16, half an hour to an hour for each of the two black boxes and half of that for
the three branches; less than half of all at --width 32. Not yet timed on a GPU.
Last line: `runs/default: blackbox-rhythm 0.9700, blackbox-1d 0.9300, rhythm 0.9600, morphology 0.9200, global 0.9400
(fold-9 macro-AUROC)`, with your own numbers.
"""
import copy
import dataclasses
import datetime
import importlib
import math
import os
import sys
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch.optim import lr_scheduler

import common
from common import BOXES, CHOICES, GROUPS, IMAGENET, LEADS, MODELS, SAMPLES

stage_3 = importlib.import_module("04_fusion")  # whose solver of Eq. (10) Stage 1 needs too
RANK, WORLD = [int(os.environ[k]) for k in ("RANK", "WORLD_SIZE")] if "TORCHELASTIC_RUN_ID" in os.environ else (0, 1)
SCHEDULERS = {  # optimizer, learning rate, steps in all, steps of an epoch -> a torch scheduler, stepped every step
    "constant": lambda o, lr, steps, epoch: lr_scheduler.ConstantLR(o, 1.0),
    "cosine": lambda o, lr, steps, epoch: lr_scheduler.CosineAnnealingLR(o, steps),
    "step": lambda o, lr, steps, epoch: lr_scheduler.StepLR(o, 10 * epoch, 0.5),
    "cyclic": lambda o, lr, steps, epoch: lr_scheduler.CyclicLR(o, lr / 10, lr, 2 * epoch, cycle_momentum=False),
    "onecycle": lambda o, lr, steps, epoch: lr_scheduler.OneCycleLR(o, lr, max(steps, 2)),
    "plateau": lambda o, lr, steps, epoch: lr_scheduler.ReduceLROnPlateau(o, "max", 0.5, 3),  # stepped every epoch
}


def augment(x):
    """Random changes that mostly keep the diagnosis, drawn for each record: x [B, 12, 1000] mV -> the same shape.

    Not always: the splice of the circular shift makes one odd beat interval, a blanked span looks like a pause, and
    another amplitude may cross a voltage criterion (LVH, HVOLT, LVOLT).
    """
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


def boolean(text):
    """Command-line yes or no."""
    if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("yes", "true", "1")


def whole(text):
    """Command-line whole number, not negative."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def amount(text):
    """Command-line number, finite and not negative."""
    if not 0 <= float(text) < np.inf:
        raise ValueError
    return float(text)


def bfloat16_is_fast(device):
    """Whether bf16 autocast pays: a GPU with bf16, or a CPU with AVX512-bf16 or AMX instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, f, bool)() for f in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


class AllReduce(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return AllReduce.forward(None, grad)


class BatchNormOverRanks(torch.nn.BatchNorm2d):
    """Batch norm over the records of all ranks on the CPU, for which torch.nn.SyncBatchNorm is not made."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.float()                                    # [1, C, B of this rank, L] or [0, C, 1, L]
        n = AllReduce.apply(x.new_tensor(x[:, 0].numel()))
        mean = AllReduce.apply(x.sum((0, 2, 3))) / n                             # [C]
        variance = AllReduce.apply((x - mean[:, None, None]).square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]).to(dtype)


def over_ranks(model):
    """`model` with its batch norm over the records of all ranks; the names in its state_dict stay the same."""
    if next(model.parameters()).is_cuda:
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.__class__ = BatchNormOverRanks
    return model


@torch.no_grad()
def validate(name, model, x, y):
    """Macro-AUROC of a model on x [N, 12, 1000], y [N, C], in float32; every rank computes its share of the logits."""
    model.eval()
    logits = torch.zeros_like(y)
    for i in range(256 * RANK, len(x), 256 * WORLD):
        logits[i:i + 256] = model(x[i:i + 256])[0]
    if WORLD > 1:
        dist.all_reduce(logits)
    if not logits.isfinite().all():
        raise common.Diverged(f"{name}: a logit on fold 9 is not a number any more: train again with a lower "
                              "learning rate")
    return common.macro_auroc(y.cpu().numpy(), logits.cpu().numpy())


@torch.no_grad()
def refit_head(model, z, y, patients):
    """Solve Eq. (10) with own-class weights alone for z [N, D, L], y [N, C], patients [N]; the head's other weights: 0.

    A head that follows SGD lags behind the prototypes; this one makes the fold-9 AUROC of an epoch tell how far the
    evidence of a class's own prototypes goes. As in Stage 3, a record's similarity to prototypes of its own patient is
    taken as the mean.
    """
    s = torch.cat([model.scores(part.to(model.p.device)) for part in z.split(128)]).double().cpu().numpy()  # [N, P]
    mean, std = s.mean(0), s.std(0).clip(1e-6)
    X = np.where((patients[:, None] == model.p_patient.cpu()).numpy(), 0.0, (s - mean) / std)
    off = model.p_class.cpu().numpy() != np.arange(len(model.classes))[:, None]                         # [C, P]
    W, b, _ = stage_3.fit(X, y.astype(np.float64), off, np.inf)
    model.head.weight.copy_(torch.from_numpy(W / std))
    model.head.bias.copy_(torch.from_numpy(b - W / std @ mean))


def black_box_heads(model, prep, device, strengths):
    """Solve a black box's head on its frozen features, as Stage 3 does for prototypes: for each L2 strength, weakening,
    the logistic regressions that minimise the sum over classes of the mean BCE + L2 / 2 |W|^2 on standardised features,
    by at most 100 steps of L-BFGS from the one before, which for weak strengths stop short of the optimum.
    Returns [(W [C, 512 or 1024], b [C])], for features that are not standardised."""
    rows = np.flatnonzero(prep.train)
    h = common.batched(lambda x: model(x)[1], prep, rows, device).to(device)          # [N, 512 or 1024]
    y = torch.from_numpy(prep.labels[rows][:, common.columns(model.classes)]).float().to(device)
    mean, std = h.mean(0), h.std(0).clamp_min(1e-6)
    X, W = (h - mean) / std, torch.zeros_like(model.head.weight, requires_grad=True)
    b, heads = torch.logit(y.mean(0), 1e-6).requires_grad_(), []
    for l2 in strengths:
        solver = torch.optim.LBFGS([W, b], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            bce = torch.nn.functional.binary_cross_entropy_with_logits(X @ W.T + b, y) * len(b)
            loss = bce + l2 / 2 * W.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        weight = (W / std).detach()
        heads.append((weight, (b - weight @ mean).detach()))
    return heads


def refit_black_box(model, prep, device):
    """Give a black box the head that is best on fold 9, a solved one or its own; returns its macro-AUROC there."""
    h = common.batched(lambda x: model(x)[1], prep, np.flatnonzero(prep.val), device).to(device)
    y, head = prep.labels[prep.val][:, common.columns(model.classes)], model.head
    heads = [(head.weight.data, head.bias.data), *black_box_heads(model, prep, device, (0.1, 0.03, 0.01, 0.003))]
    aurocs = [common.macro_auroc(y, (h @ W.T + b).cpu().numpy()) for W, b in heads]
    head.weight.data, head.bias.data = heads[int(np.argmax(aurocs))]
    return max(aurocs)


def train(name, args, cfg, prep, folder=None, report=None):
    """Train one model and write its joint.pt; returns the fold-9 macro-AUROC of the epoch that it holds.

    `folder` is RUN/MODEL if not given. `report(epoch, auroc)` is called after every epoch and may end the training by
    raising. Under torchrun every rank goes through all of it with the same random order; each takes its share of a
    batch, and the gradients are those of the whole batch.
    """
    kind, group = MODELS[name]
    black_box = kind == "blackbox"
    folder, device = folder or args.run / name, args.device
    suffix = "" if args.round == 1 else f"_r{args.round}"
    out, last, done = folder / f"joint{suffix}.pt", folder / f"last{suffix}.pt", None
    inputs, again = sources(name, args, cfg, prep), common.command("02_train_joint.py", name, args.round)
    if out.is_file() and not args.force:
        done = common.load_model(out, f"{again} --force")[1]
        if common.config_of(done) != cfg:
            sys.exit(f"{out} is of another setting: name another folder with --run, or replace it with --force")
        if args.resume and done["inputs"] == inputs:
            print(f"{name}: {out} is finished, kept", flush=True)
            return done["val_auroc"]
    epochs, lr = (cfg.blackbox_epochs, cfg.blackbox_lr) if black_box else (cfg.epochs, cfg.lr)
    torch.manual_seed(cfg.seed)

    classes, left_out = common.learnable(prep, GROUPS[group])
    if not classes:
        sys.exit(f"none of the {len(left_out)} {group} labels has a training record in {args.prep}")
    if left_out:
        print(f"{name}: left out, without a training record: {' '.join(left_out)}", flush=True)
    x = prep.x
    y = torch.from_numpy(prep.labels[:, common.columns(classes)]).float().to(device)              # [N, C]
    train_rows, val_rows = (torch.from_numpy(np.flatnonzero(m)).to(device) for m in (prep.train, prep.val))
    y_train, y_val = y[train_rows], y[val_rows]
    patients = torch.from_numpy(prep.patient_ids).to(device)[train_rows]
    if (y_val == y_val[:1]).all():
        sys.exit(f"fold 9 in {args.prep} has no {group} label both present and absent, so no epoch can be chosen: "
                 "use more records")
    jaccard = torch.tensor(prep.info["jaccard"], device=device)[common.columns(classes)][:, common.columns(classes)]
    w = (len(y_train) - y_train.sum(0)) / y_train.sum(0) if cfg.class_weights else None           # w_c = (N - n) / n
    draw = record_weights(y_train.cpu()) if cfg.sampler == "weighted" else None

    # Model and where it starts from
    meta = {**common.provenance(cfg, "02_train_joint.py"), "inputs": inputs, "model": name, "round": args.round,
            "classes": classes, "left_out": left_out, "device": device.type}
    model = start(name, args, cfg, prep, meta).to(device)
    if cfg.head == "refit" and not black_box and (args.round > 1 or not cfg.start.startswith("blackbox")):
        z, carries, ids = common.training_set(model, prep, device)
        refit_head(model, z, carries, common.patients_of(ids, prep))
    ema = cfg.blackbox_ema if black_box else 0
    average = copy.deepcopy(model).requires_grad_(False) if ema else model
    if cfg.head != "free" and not black_box:
        model.head.requires_grad_(False)
    net = model
    if WORLD > 1:  # starts every rank from rank 0's weights
        model = over_ranks(model)
        net = torch.nn.parallel.DistributedDataParallel(model)

    per_epoch = -(-len(train_rows) // cfg.batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[cfg.optimizer]
    optimizer = make(parameters, lr=lr, weight_decay=cfg.weight_decay, fused=True)
    scheduler = SCHEDULERS[cfg.scheduler](optimizer, lr, epochs * per_epoch, per_epoch)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_fast(device))
    terms = ("total", "bce") if black_box else ("total", "bce", "clst", "sep", "div", "cntrst")
    log, best, best_state, since, first, seconds = [], -np.inf, None, 0, 1, 0.0

    saved = common.load_pt(last, again) if args.resume and last.is_file() else None
    if saved and {**saved["meta"], "versions": 0, "code": 0} != {**meta, "versions": 0, "code": 0}:
        if not done or {**done, **saved["meta"]} != done:  # not what the training left whose joint.pt is replaced now
            sys.exit(f"{last} is of another setting or data set: train without --resume, or in another --run")
        saved = None
    if saved:
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        log, best, best_state, since = saved["log"], saved["best"], saved["best_state"], saved["since"]
        first, seconds = len(log) + 1, saved["seconds"]
        torch.set_rng_state(saved["random"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["random_cuda"], device)
        print(f"{name}: resumed after epoch {len(log)}")
    elif not black_box:  # the start counts as epoch 0, so that training can only be kept if it helps fold 9
        best = validate(name, model, x[val_rows], y_val)
        best_state = copy.deepcopy(model.state_dict())
        print(f"{name}: {len(model.p)} prototypes for {len(classes)} labels; at the start val {best:.4f}", flush=True)

    for epoch in range(first, epochs + 1):
        if since >= cfg.patience:
            break
        began = time.time()
        model.train()
        order = (torch.multinomial(draw, len(train_rows), replacement=True) if draw is not None
                 else torch.randperm(len(train_rows))).to(device)
        if WORLD > 1:  # the order is alike on all ranks; augmentation and dropout each draws for itself
            alike = torch.get_rng_state()
            torch.manual_seed(10**6 * cfg.seed + 1000 * epoch + RANK)
        seen = torch.zeros(per_epoch, len(terms), device=device)  # stays on the device: no waiting within an epoch
        for step, chosen in enumerate(order.split(cfg.batch)):
            mine = chosen.tensor_split(WORLD)[RANK]
            share = len(mine) / len(chosen)  # weighs the means over this rank's records, and the terms of p alone
            x_batch, y_batch = x[train_rows[mine]], y_train[mine]
            with autocast:
                logits, s = net(augment(x_batch) if cfg.augment else x_batch)
            if not (black_box or cfg.own_patient):  # similarities to prototypes of a record's own patient: the mean
                mean = s.detach().sum(0)                                                                # [P]
                if WORLD > 1:
                    dist.all_reduce(mean)
                s = torch.where(patients[mine][:, None] == model.p_patient, mean / len(chosen), s)
                logits = model.head(s)
            if black_box:
                bce = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), y_batch, reduction="none")
                total = (bce if w is None else w * bce).mean()
                loss = {"total": total, "bce": total}
            else:
                loss = common.composite_loss(logits.float(), s, y_batch, model.p, model.p_class, jaccard,
                                             cfg.lambdas, w)
            optimizer.zero_grad(set_to_none=True)
            (loss["total"] * (share * WORLD)).backward()  # DistributedDataParallel averages over the ranks
            optimizer.step()
            if cfg.scheduler != "plateau":
                scheduler.step()
            if ema:
                decay = min(ema, (epoch * per_epoch + step) / (10 + epoch * per_epoch + step))
                for theirs, ours in zip(average.state_dict().values(), model.state_dict().values()):
                    theirs.lerp_(ours, 1 - decay) if theirs.is_floating_point() else theirs.copy_(ours)
            if share:  # a last batch may have fewer records than there are ranks
                seen[step] = torch.stack([loss[t].detach() for t in terms]) * share

        if WORLD > 1:
            torch.set_rng_state(alike)
            dist.all_reduce(seen)
        seen = seen.cpu()
        if not seen.isfinite().all():
            step = int((~seen.isfinite()).any(1).nonzero()[0])
            bad = [t for t, v in zip(terms, seen[step]) if not v.isfinite()][-1]
            value = float(seen[step, terms.index(bad)])
            raise common.Diverged(f"{name}: the {bad} term became {value} in epoch {epoch}, "
                                  f"step {step + 1}: train again with a lower --{'blackbox-' * black_box}lr")
        if not black_box and RANK == 0:
            p = model.p.detach().clone()
            if cfg.head == "refit" or cfg.project_every:
                z, carries, ids = common.training_set(model, prep, device)
            if cfg.project_every:
                projected, found = common.project(z, carries, ids, model.p.data, model.p_class, cfg.unique)
                model.p.data.copy_(projected)
                model.p_patient.copy_(common.own_patients(found, prep, cfg))
            if cfg.head == "refit":
                refit_head(model, z, carries, common.patients_of(ids, prep))
        if not black_box and WORLD > 1:
            for theirs in (model.p, model.p_patient, model.head.weight, model.head.bias):
                dist.broadcast(theirs.data, 0)
        auroc = validate(name, average, x[val_rows], y_val)
        if cfg.scheduler == "plateau":
            scheduler.step(auroc)
        since = 0 if auroc > best else since + 1
        if auroc > best:
            kept = copy.deepcopy(average)
            if not black_box and RANK == 0:  # judged as projected, kept as it was before: Stage 2 proper is 03's
                kept.p.data.copy_(p)
                if cfg.head == "refit":
                    refit_head(kept, z, carries, common.patients_of(ids, prep))
            best, best_state = auroc, kept.state_dict()
        log.append({"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "val_auroc": auroc,
                    **{t: float(v) for t, v in zip(terms, seen.mean(0))}})
        seconds += time.time() - began
        left = seconds / epoch * (epochs - epoch) / 60
        print(f"{name:12s} epoch {epoch:3d}/{epochs}  loss {log[-1]['total']:8.4f}  bce {log[-1]['bce']:7.4f}  "
              f"val {auroc:.4f}  best {best:.4f}  {time.time() - began:5.1f} s  {left:4.0f} min left", flush=True)
        if RANK == 0:
            common.save_pt(last, {"meta": meta, "model": model.state_dict(), "average": average.state_dict(),
                                  "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "log": log,
                                  "best": best, "best_state": best_state, "since": since, "seconds": seconds,
                                  "random": torch.get_rng_state(), "random_cuda":
                                  torch.cuda.get_rng_state(device) if device.type == "cuda" else None})
        if report:
            report(epoch, auroc)

    if RANK:
        dist.barrier()  # until rank 0 has written
        return best

    if black_box and cfg.head == "refit":
        model.load_state_dict(best_state)
        before, best = best, refit_black_box(model.eval(), prep, device)
        best_state = model.state_dict()
        print(f"{name}: head solved on frozen features, val {before:.4f} -> {best:.4f}", flush=True)
    meta.update(val_auroc=best, epochs=len(log), best_epoch=len(log) - since)
    with common.replacing(folder / f"log{suffix}.jsonl") as t:
        t.write_text("".join(common.json.dumps(line) + "\n" for line in log))
    for later in folder.glob("*_r*"):  # of rounds that started from what is replaced now
        number = later.stem.rpartition("_r")[2]
        if number.isdecimal() and int(number) > args.round:
            later.unlink()
    # joint.pt last: with it a model counts as finished, so --resume after a kill cannot miss what stands beside it
    common.save_json(out.with_suffix(".json"), {**meta, "seconds": round(seconds, 1),
                                                "threads": torch.get_num_threads(), "processes": WORLD,
                                                "hardware": common.hardware(device)})
    common.save_pt(out, {"meta": meta, "state": {k: v.cpu() for k, v in best_state.items()}})
    if WORLD > 1:
        dist.barrier()
    return best


def round_before(args, name):
    """The projected.pt of the round before this one."""
    return args.run / name / f"projected{'' if args.round == 2 else f'_r{args.round - 1}'}.pt"


def sources(name, args, cfg, prep):
    """{input: fingerprint} of what a model's training starts from: PREP, and the black box or the round before."""
    key, path = "start", args.run / common.start_of(name, cfg) / "joint.pt"  # not there for random and imagenet
    if args.round > 1:
        key, path = "projected", round_before(args, name)
    found = {"prep": common.file_hash(prep.path)}
    if name not in BOXES and path.is_file():
        found[key] = common.file_hash(path)
    return found


def start(name, args, cfg, prep, meta):
    """The model that training starts from; adds to `meta` what is needed to build it again (per_class, latent_dim)."""
    kind = MODELS[name][0]
    scaler = common.Scaler(**prep.info["scaler"]) if cfg.scale_input else common.Scaler()

    if kind != "blackbox" and args.round > 1:  # Stages 1 and 2 repeated (Appendix E), from the projected prototypes
        path = round_before(args, name)
        model, past = common.load_model(path, common.command("03_project.py", name))
        if past["classes"] != meta["classes"]:
            sys.exit(f"{path} has other labels than the arrays in {args.prep}: train round 1 again")
        common.same_input(past, "prep", prep.path, path, common.command("02_train_joint.py", name), args.force)
        common.same_input(past, "joint", path.with_name(path.name.replace("projected", "joint")), path,
                          common.command("03_project.py", name), args.force)
        old = common.config_of(past)
        for k in ("recipe", "seed", "width", "dropout", "scale_input", "pool", "add_on", "a", "top_k", "per_class",
                  "own_patient"):
            if getattr(old, k) != getattr(cfg, k):
                sys.exit(f"{path} was trained with another {k} ({getattr(old, k)}): give 02 the flags of round 1")
        meta.update(per_class=past["per_class"], latent_dim=past["latent_dim"], warnings=past.get("warnings", []))
        return model

    if kind != "blackbox":  # no more prototypes than the class has windows
        windows = 30 if kind == "partial" else 1
        count = prep.labels[prep.train][:, common.columns(meta["classes"])].sum(0)
        most = cfg.per_class[list(common.WINDOW).index(kind)]
        meta.update(per_class=[min(most, windows * int(n)) for n in count], latent_dim=None)
        if cfg.start.startswith("blackbox"):
            return start_from_black_box(name, args, cfg, prep, meta, scaler)
    model = common.build(meta, scaler)
    if cfg.start == "random" or kind == "1d" or name in ("blackbox-1d", "blackbox-rhythm"):
        return model
    if cfg.width != 64:
        print(f"{name}: starts at random, as the 1D network does, because ImageNet weights fit width 64 only")
        return model
    path = args.imagenet or args.data.parent / IMAGENET
    try:
        model.backbone.load_imagenet(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # torch raises many kinds for a missing, truncated or foreign file
        sys.exit(f"{path} is missing or damaged: {common.rerun('00_download.py --imagenet')}, or use --start random")
    return model


def whitening(u):
    """Damped ZCA of the latent steps of u [N, D, L]: x -> Q (x - mean), with Q = (Cov + its mean eigenvalue)^(-1/2).

    Returns Q [D, D] and mean [D] in float64. A function by itself, so that its float64 copies of u are gone after it.
    """
    steps = u.transpose(1, 2).reshape(-1, u.shape[1]).double()                        # [N L, D]
    variance, E = torch.linalg.eigh(torch.cov(steps.T).reshape(u.shape[1], -1))
    return E @ torch.diag((variance + variance.mean()).rsqrt()) @ E.T, steps.mean(0)


def start_from_black_box(name, args, cfg, prep, meta, scaler):
    """A prototype model on the backbone of a trained black box, with whitened latents and real windows as prototypes.

    The add-on maps each latent step to the black box's class directions (the rows of a head solved on its features) and
    whitens them over the training records, so that a cosine compares diagnoses and not the few channels with the
    largest variance. Prototypes start as real training windows: k-means groups, of each record of a class, the window
    that points most in the class's direction, and the class's windows nearest to the centres are taken.
    """
    kind, box = MODELS[name][0], common.start_of(name, cfg)
    path, maker = args.run / box / "joint.pt", common.command("02_train_joint.py", box)
    box, before = common.load_model(path, maker, args.device)
    common.same_input(before, "prep", prep.path, path, maker, args.force)
    for k in ("width", "pool", "scale_input", "seed", "blackbox_epochs", "blackbox_lr", "blackbox_ema"):
        if before["config"][k] != getattr(cfg, k):
            sys.exit(f"{path} has another {k} ({before['config'][k]}, not {getattr(cfg, k)}): give "
                     f"--{k.replace('_', '-')} {before['config'][k]}, or name another folder with --run")
    meta.update(latent_dim=len(box.classes), warnings=before.get("warnings", []))
    model = common.build(meta, scaler).to(args.device).eval()
    model.backbone.load_state_dict(box.backbone.state_dict())

    # A class's direction has a stronger L2 than the black box's own head: classes of few records need the restraint
    V = black_box_heads(box, prep, args.device, [0.1])[0][0]                          # [71, 512 or 1024]
    if kind != "1d" and cfg.pool == "meanmax":  # one step's evidence through the average and through the maximum
        V = V[:, :V.shape[1] // 2] + V[:, V.shape[1] // 2:]
    model.add_on.weight.data, model.add_on.bias.data = V[:, :, None].clone(), torch.zeros_like(V[:, 0])
    z, carries, ids = common.training_set(model, prep, args.device)                   # [N, 71, L]
    Q, mean = whitening(z)
    z = torch.einsum("ed,ndl->nel", Q.float(), z - mean.float()[:, None])             # [N, D, L]
    Q, mean = Q.to(V), mean.to(V)
    model.add_on.weight.data = (Q @ V)[:, :, None].clone()
    model.add_on.bias.data = -(Q @ mean)

    if cfg.prototypes == "data":
        T, p = common.WINDOW[kind], []
        for c, k in enumerate(meta["per_class"]):
            windows = z[carries[:, c]].unfold(2, T, 1).permute(0, 2, 1, 3).flatten(2)     # [n, windows, D T]
            unit = torch.nn.functional.normalize(windows, dim=2)
            direction = unit.mean((0, 1))
            best = (unit @ direction).argmax(1)                                       # [n] the window of each record
            unit = unit[torch.arange(len(unit)), best].numpy()
            with threadpool_limits(1, "openmp"):  # several threads add up in any order
                p.append(KMeans(k, n_init=1, random_state=cfg.seed).fit(unit).cluster_centers_ if k <= len(unit)
                         else np.resize(unit, (k, unit.shape[1])))                    # each again and again
        centres = torch.from_numpy(np.concatenate(p)).float().view(-1, z.shape[1], T)
        model.p.data, found = common.project(z, carries, ids, centres.to(model.p), model.p_class, cfg.unique)
        model.p_patient.copy_(common.own_patients(found, prep, cfg))
    if cfg.head == "refit":
        refit_head(model, z, carries, common.patients_of(ids, prep))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Tuning (Appendix E): the paper says which settings it searched, not within which ranges

def suggest(trial, cfg, search, i):
    """`cfg` with what an Optuna trial proposes for each of `search`; i is the model's place in per_class."""
    new = {}
    if "training" in search:
        new.update(lr=trial.suggest_float("lr", 1e-5, 1e-2, log=True),
                   weight_decay=trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
                   dropout=trial.suggest_float("dropout", 0.0, 0.6),
                   scheduler=trial.suggest_categorical("scheduler", CHOICES["scheduler"]))
    if "lambdas" in search:  # two decades around those of `cfg`; a term that is off stays off
        new.update((k, trial.suggest_float(k, v / 100, v * 100, log=True)) for k, v in dataclasses.asdict(cfg).items()
                   if k.startswith("lambda_") and v)
    if "batch" in search:
        new["batch"] = trial.suggest_categorical("batch", [32, 64, 128, 256])
    if "per_class" in search:  # the authors recommend 5-10, 15-20 and 3-8
        count = trial.suggest_int("per_class", *[(2, 20), (5, 40), (2, 16)][i])
        new["per_class"] = (*cfg.per_class[:i], count, *cfg.per_class[i + 1:])
    return dataclasses.replace(cfg, **new)


def after_stage_3(path, args, prep):
    """Fold-9 macro-AUROC of a joint.pt after projection (03) and sparse classifier (04); fold 10 is not computed."""
    model, meta = common.load_model(path, "02_train_joint.py", args.device)
    z, carries, ids = common.training_set(model, prep, args.device)
    cfg = common.config_of(meta)
    model.p.data, found = common.project(z, carries, ids, model.p.data, model.p_class, cfg.unique)      # Eq. (8)
    rows = np.flatnonzero(prep.train | prep.val)
    scores = np.zeros((len(prep.folds), len(model.p)), np.float32)
    scores[rows] = common.batched(lambda x: model.scores(model.latent(x)), prep, rows, args.device)
    X, X_val, *_ = stage_3.standardise(scores, prep, common.own_patients(found, prep, cfg).numpy())
    Y, y_val = (prep.labels[m][:, common.columns(model.classes)].astype(np.float64) for m in (prep.train, prep.val))
    off = model.p_class.cpu().numpy() != np.arange(len(model.classes))[:, None]                         # [C, P]
    W, b, *_ = stage_3.fit_path(X, Y, off, X_val, y_val, meta["model"], cfg.recipe)                     # Eq. (10)
    return common.macro_auroc(y_val, X_val @ W.T + b)


def tune(name, args, cfg, prep):
    """Search settings for one model until the study holds --tune finished trials; writes RUN/MODEL/tuned.json.

    A trial is seeded by --seed and its number, so that the workers on one study differ.
    """
    try:
        import optuna
    except ImportError:
        sys.exit("--tune needs Optuna, which is not installed: run `pip install optuna`")
    COMPLETE, PRUNED = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    i, out = list(common.WINDOW).index(MODELS[name][0]), args.run / name / "tuned.json"

    for attempt in (1, 2):
        try:
            storage = args.study if "://" in args.study else optuna.storages.JournalStorage(
                optuna.storages.journal.JournalFileBackend(args.study))
            study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True,
                                        pruner=optuna.pruners.MedianPruner())
            break
        except Exception as e:  # every database has its own kinds
            if attempt == 2:
                sys.exit(f"--study {args.study} cannot be opened ({str(e).splitlines()[0]}): "
                         "give sqlite:///FILE or FILE")
            time.sleep(2)  # perhaps another worker was creating the same tables
    about = common.json.loads(common.json.dumps({
        "search": sorted(set(args.search)), "config": dataclasses.asdict(cfg),
        "inputs": sources(name, args, cfg, prep)}))
    if study.user_attrs.get("about", about) != about:
        sys.exit(f"--study {args.study} holds a search for {name} with other settings or data: name another one")
    study.set_user_attr("about", about)

    def objective(trial):
        study.sampler = optuna.samplers.TPESampler(seed=(10**4 * args.seed + trial.number) % 2**32)

        def report(epoch, auroc):
            trial.report(auroc, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        with tempfile.TemporaryDirectory() as folder:  # RUN/MODEL/joint.pt stays as it is
            try:
                train(name, args, suggest(trial, cfg, args.search, i), prep, common.Path(folder), report)
                return after_stage_3(common.Path(folder) / "joint.pt", args, prep)
            except common.Diverged as e:
                raise optuna.TrialPruned(str(e))

    while True:
        finished = study.get_trials(deepcopy=False, states=(COMPLETE, PRUNED))  # of all workers
        if any(t.state == COMPLETE for t in finished):
            best = study.best_trial
            tuned = suggest(optuna.trial.FixedTrial(best.params), cfg, args.search, i)
            common.save_json(out, {**common.provenance(tuned, "02_train_joint.py"), "inputs": about["inputs"],
                                   "model": name, "search": about["search"], "trial": best.number,
                                   "val_auroc": best.value, "trials": len(finished)})
        if len(finished) >= args.tune:
            break
        study.optimize(objective, n_trials=1)
    if all(t.state == PRUNED for t in finished):
        sys.exit(f"no trial of --study {args.study} reached its end: use more trials or another --search")
    print(f"{args.run}: {name} tuned, fold-9 macro-AUROC {study.best_value:.4f} in trial {study.best_trial.number} of "
          f"{len(finished)}: {out}")


def read_config(path, cfg):
    """`cfg` with the settings in a JSON file, or in its "config" (tuned.json, joint.json); the seed is not taken."""
    new = common.load_json(path, "02_train_joint.py --model MODEL --tune TRIALS --study FILE")
    old = dataclasses.asdict(cfg)
    new = new["config"] if isinstance(new.get("config"), dict) else new
    for k, v in new.items():
        if k not in old:
            sys.exit(f"{path}: {k} is no setting; Config in common.py lists them")
        values, likes = (v, old[k]) if isinstance(v, list) and isinstance(old[k], tuple) else ([v], [old[k]])
        right = all(type(a) in (type(b), int if type(b) is float else None) for a, b in zip(values, likes))
        if not right or len(values) != len(likes) or v not in CHOICES.get(k, [v]) or not all(
                0 <= a < math.inf for a in values if not isinstance(a, str)):
            sys.exit(f"{path}: {k} cannot be {common.json.dumps(v)}; an example is {common.json.dumps(old[k])}")
    if new.get("recipe", cfg.recipe) != cfg.recipe:
        sys.exit(f"{path} is of the {new['recipe']} recipe: add --recipe {new['recipe']}")
    return common.config_of({"config": {**old, **new, "seed": cfg.seed}})


def main():
    p = common.argument_parser(__doc__)
    p.add_argument("--round", type=int, default=1, help="2 continues from the projected prototypes of round 1")
    p.add_argument("--resume", action="store_true", help="continue after the last whole epoch; keep finished models")
    p.add_argument("--no-contrastive", action="store_true", help="train without the contrastive loss, Eq. (7)")
    p.add_argument("--imagenet", type=common.Path, metavar="FILE", help=f"default: {IMAGENET} beside the folder DATA")
    p.add_argument("--config", type=common.Path, metavar="FILE",
                   help="settings from a JSON file, such as tuned.json; flags and --seed count for more")
    g = p.add_argument_group("tuning of one prototype model with Optuna (Appendix E)")
    g.add_argument("--tune", type=whole, metavar="TRIALS", help="trials that the study shall hold in the end")
    g.add_argument("--study", metavar="URL", help="sqlite:///FILE, another database that Optuna knows, or a FILE for "
                   "Optuna's journal (also on network file systems); any number of workers can share it")
    g.add_argument("--search", nargs="+", choices=["training", "lambdas", "batch", "per_class"], default=["training"],
                   help="what to search: training (lr, weight decay, dropout, scheduler; the default), the four "
                   "lambdas, batch size, prototypes per class")
    g = p.add_argument_group("change one setting of the recipe", "Config in common.py says what each one is.")
    for field in dataclasses.fields(common.Config):
        if field.name not in ("recipe", "seed", "rounds"):
            three = field.type is tuple  # one for each branch
            value = type(field.default[0]) if three else field.type
            metavar = "|".join(map(str, CHOICES.get(field.name, ()))) or {bool: "yes|no", int: "N", float: "X"}[value]
            g.add_argument(f"--{field.name.replace('_', '-')}", metavar=metavar, nargs=3 if three else None,
                           type={bool: boolean, int: whole, float: amount}.get(value, str),
                           choices=CHOICES.get(field.name), help=f"default recipe {field.default}, paper recipe "
                           f"{getattr(common.PAPER, field.name)}")
    args = common.parse(p)
    if (args.tune is None) != (args.study is None) or args.tune == 0:
        p.error("--tune TRIALS, at least 1, and --study URL go together")
    if args.tune and (len(args.model or ()) != 1 or args.model[0] in BOXES or args.round > 1
                      or WORLD > 1):
        p.error("--tune works on round 1 of one prototype model, named by --model, in one process")
    if WORLD > 1:
        if args.device.type == "cuda":
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                p.error(f"there are only {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        dist.init_process_group(  # the others wait while rank 0 projects and refits
            "nccl" if args.device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
        if RANK:
            sys.stdout = open(os.devnull, "w")
    prep = common.load_prep(args.prep)
    # All of the data on the device (1 GB); on the CPU the memory-mapped file itself
    prep.x = torch.from_numpy(prep.signals).to(args.device)
    cfg = common.recipe(args)
    if args.no_contrastive:
        cfg = common.without_contrastive(cfg)
    if args.config:
        width, cfg = cfg.width, read_config(args.config, cfg)
        if args.small or args.demo:  # flags count for more
            cfg = dataclasses.replace(cfg, width=width)
    flags = {k: v for k, v in vars(args).items() if k in vars(cfg) and v is not None}
    cfg = common.config_of({"config": {**vars(cfg), **flags}})
    if args.no_contrastive:  # a file and flags may set the other lambdas, but not this one
        cfg = dataclasses.replace(cfg, lambda_cntrst=0.0)
    if min(cfg.batch, cfg.blackbox_epochs, cfg.patience, cfg.width, cfg.top_k, *cfg.per_class) < 1:
        p.error("--batch, --blackbox-epochs, --patience, --width, --top-k and --per-class must be at least 1")
    if max(cfg.dropout, cfg.blackbox_ema) >= 1:
        p.error("--dropout and --blackbox-ema must be below 1")
    if not cfg.start.startswith("blackbox"):  # has no latents yet to take real windows from
        if args.prototypes == "data":
            p.error("--prototypes data needs a start from a black box: no other backbone has latents to take them from")
        cfg = dataclasses.replace(cfg, prototypes="random")
    elif cfg.add_on == "sigmoid":
        p.error("--add-on sigmoid needs --start random or imagenet: a start from a black box is a linear add-on's")
    names = dict.fromkeys(args.model or (["rhythm"] if args.small else common.BRANCHES))
    if args.round < 1 or args.round > 1 and any(n in BOXES for n in names):
        p.error("--round 2 continues prototype models; black boxes have one round")
    starts = dict.fromkeys(common.start_of(n, cfg) for n in names if n not in BOXES and args.round == 1)
    boxes = [start for start in starts if start.startswith("blackbox")]
    if args.tune:
        for box in boxes:
            common.load_pt(args.run / box / "joint.pt", common.command("02_train_joint.py", box))
        return tune(*names, args, cfg, prep)
    missing = [box for box in boxes if box not in names and not (args.run / box / "joint.pt").is_file()]
    if missing:
        print(f"{args.run} has no {' and no '.join(missing)} yet, from which prototype models start: first comes that",
              flush=True)
    best = {name: train(name, args, cfg, prep) for name in sorted([*missing, *names], key=lambda n: n not in boxes)}
    if args.device.type == "cuda":
        print(f"GPU memory {torch.cuda.max_memory_allocated(args.device) / 2**30:.2f} GiB at most")
    print(f"{args.run}: {', '.join(f'{n} {v:.4f}' for n, v in best.items())} (fold-9 macro-AUROC)")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    common.run(main)
