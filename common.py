"""What two or more stages share: labels, settings, the model of the paper and its loss, metrics, artifact files.

In the order of the paper: labels (3.1, Appendix G), settings (Appendix E), backbone, prototype layer and Eq. (1) (3.3),
loss, Eq. (2)-(7) (3.4), projection, Eq. (8) (3.5), macro-AUROC (3.1). Then the plumbing: command line, arrays, files.

Shapes: x [B, 12, 1000] mV, z [B, D, L] latent map, p [P, D, T] prototypes, s [B, P] similarities, W [C, P], y [B, C].
"""
import argparse
import contextlib
import errno
import hashlib
import io
import json
import multiprocessing.connection
import os
import platform
import re
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from scipy.signal import butter, filtfilt
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Labels (paper 3.1 and Appendix G, in PTB-XL's spelling and the row order of its scp_statements.csv)

LEADS = "I II III AVR AVL AVF V1 V2 V3 V4 V5 V6".split()
SAMPLES, RATE = 1000, 100  # ten seconds at 100 Hz
CODES = ("NDT NST_ DIG LNGQT NORM IMI ASMI LVH LAFB ISC_ IRBBB 1AVB IVCD ISCAL CRBBB CLBBB ILMI LAO/LAE AMI ALMI ISCIN "
         "INJAS LMI ISCIL LPFB ISCAS INJAL ISCLA RVH ANEUR RAO/RAE EL WPW ILBBB IPLMI ISCAN IPMI SEHYP INJIN INJLA PMI "
         "3AVB INJIL 2AVB ABQRS PVC STD_ VCLVH QWAVE LOWT NT_ PAC LPR INVT LVOLT HVOLT TAB_ STE_ PRC(S) SR AFIB STACH "
         "SARRH SBRAD PACE SVARR BIGU AFLT SVTAC PSVT TRIGU").split()
_RHYTHM = "1AVB IVCD 3AVB 2AVB SR AFIB STACH SARRH SBRAD PACE SVARR BIGU AFLT SVTAC PSVT TRIGU".split()
_GLOBAL = "DIG NORM EL".split()
GROUPS = {"rhythm": _RHYTHM, "morphology": [c for c in CODES if c not in _RHYTHM + _GLOBAL], "global": _GLOBAL,
          "all": CODES}

# Every model that can be trained: (kind of prototype, label group). "blackbox" has no prototypes.
MODELS = {"rhythm": ("1d", "rhythm"), "morphology": ("partial", "morphology"), "global": ("global", "global"),
          "all-1d": ("1d", "all"), "all-partial": ("partial", "all"), "all-global": ("global", "all"),
          "blackbox-1d": ("blackbox", "all"), "blackbox-2d": ("blackbox", "all"),
          "blackbox-rhythm": ("blackbox", "rhythm"), "blackbox-morphology": ("blackbox", "morphology"),
          "blackbox-global": ("blackbox", "global")}
BOXES = [m for m in MODELS if MODELS[m][0] == "blackbox"]
BRANCHES = ["rhythm", "morphology", "global"]  # the paper's three
IMAGENET = "resnet18-f37072fd.pth"  # torchvision's ResNet18 weights, fetched by 00_download.py --imagenet


def highpass(x):
    """First-order 0.5 Hz Butterworth high-pass, zero phase (paper 3.2): x [..., 1000] at 100 Hz -> the same shape."""
    b, a = butter(1, 0.5, "highpass", fs=RATE)
    return filtfilt(b, a, x, axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Settings

@dataclass(frozen=True)
class Config:
    """Every choice of a run. The defaults are the default recipe; `PAPER` holds the authors' settings."""
    recipe: str = "default"
    seed: int = 42
    # Network (3.3)
    width: int = 64                  # channels of the first stage; 64 is ResNet18, 32 the small model
    dropout: float = 0.2             # before the last residual stage (paper: tuned; place: authors' code)
    scale_input: bool = True         # StandardScaler per lead, fitted on folds 1-8 (paper silent)
    start: str = "blackbox-1d"       # backbone starts: random, imagenet (not the 1D models), or a black box of this run
                                     # (2D black boxes then start from imagenet, 1D ones at random)
    rhythm_alone: bool = True        # of a start from blackbox-1d: the rhythm branch's is blackbox-rhythm instead
    pool: str = "meanmax"            # over time, 1D branch and black boxes: mean (paper) or mean and maximum; black
                                     # boxes then have dropout .5 before their head
    add_on: str = "whitened"         # whitened: one linear layer fitted to the start; sigmoid: two layers + sigmoid
    prototypes: str = "data"         # start of p: data (real training windows; needs a black-box start) or random
    per_class: tuple = (5, 18, 7)    # prototypes per class: 1D, partial, global (authors' code)
    a: tuple = (1.0, 1.0, 1.0)       # scale of Eq. (1): 1D, partial, global
    top_k: int = 5                   # windows averaged into a partial prototype's score, of 30 (3.3, k unstated)
    # Loss (3.4): lambda_div is divided by P^2 and lambda_cntrst by sqrt(P), so that they do not depend on P
    lambda_clst: float = 0.01        # small, because the BCE of rare labels is itself about 0.05
    lambda_sep: float = 0.002
    lambda_div: float = 0.1
    lambda_cntrst: float = 0.1
    class_weights: bool = False      # w of Eq. (3): (N - n) / n instead of 1
    sampler: str = "shuffle"         # shuffle, or weighted: records drawn by the inverse frequency of their labels
    # Stage 1 (3.5, Appendix E)
    head: str = "refit"              # W: refit (own-class weights, solved anew after every epoch), or from 1 / -0.5
                                     # free (learns) or frozen (authors' code)
    own_patient: bool = False        # whether a record's match with prototypes of its own patient counts, here and in
                                     # Stage 3; it says nothing about new patients
    epochs: int = 6
    patience: int = 10               # epochs without a better fold-9 macro-AUROC before stopping, amid any schedule
    batch: int = 128
    lr: float = 1e-4
    optimizer: str = "adamw"         # adamw, or adam (paper), whose weight decay is an L2 term
    weight_decay: float = 0.02
    scheduler: str = "onecycle"      # constant, cosine, plateau, step, cyclic, onecycle
    augment: bool = True             # amplitude, noise, lead drop, time shift, blanked span; per record, on the device
    blackbox_epochs: int = 60
    blackbox_lr: float = 3e-3
    blackbox_ema: float = 0.99       # moving average of a black box's weights over steps; 0 is none
    # Stage 2
    project_every: int = 1           # 1: project after every epoch of Stage 1 too, which keeps p on real patches; 0: no
    rounds: int = 1                  # how often to run Stages 1 + 2 (paper: twice); see --round
    unique: bool = True              # no two prototypes of a class on the same window

    @property
    def lambdas(self):
        return self.lambda_clst, self.lambda_sep, self.lambda_div, self.lambda_cntrst


# The authors' settings, run through the paper's equations. From the paper: Adam, 200 epochs, patience 10, ImageNet
# start, two rounds, W at 1 / -0.5. From their code: the rest, among it sigmoid add-on, frozen head, a, k and per_class.
PAPER = Config(recipe="paper", dropout=0.35, scale_input=False, start="imagenet", pool="mean", add_on="sigmoid",
               prototypes="random", a=(1.0, 13.0, 4.0), top_k=30, lambda_clst=0.004, lambda_sep=0.0004,
               lambda_div=250.0, lambda_cntrst=600.0, class_weights=True, head="frozen", epochs=200, patience=10,
               batch=32, lr=1e-4, optimizer="adam", weight_decay=1.7e-4, scheduler="cosine", augment=False,
               blackbox_ema=0.0, blackbox_epochs=200, blackbox_lr=1e-4, own_patient=True, project_every=0, rounds=2,
               unique=False)
RECIPES = {"default": Config(), "paper": PAPER}
DEMO = dict(width=16, epochs=6, blackbox_epochs=40, batch=32)  # what --demo changes
SMALL = dict(width=32)                             # what --small changes, to be under a million parameters


def recipe(args):
    """The Config that --recipe, --seed, --small and --demo ask for."""
    changes = {**(SMALL if args.small else {}), **(DEMO if args.demo else {})}
    if changes and args.recipe == "paper":  # whose ImageNet weights fit width 64 only
        changes["start"] = "random"
    return replace(RECIPES[args.recipe], seed=args.seed, **changes)


def start_of(name, cfg):
    """What the backbone of prototype model `name` starts from: random, imagenet or a black box of the run."""
    return "blackbox-rhythm" if (name, cfg.start) == ("rhythm", "blackbox-1d") and cfg.rhythm_alone else cfg.start


def without_contrastive(cfg):
    """The same settings with lambda_cntrst = 0; the paper recipe then takes Barnett et al.'s lambdas (Appendix E)."""
    if cfg.recipe == "paper":
        return replace(cfg, lambda_clst=0.8, lambda_sep=0.08, lambda_div=100.0, lambda_cntrst=0.0)
    return replace(cfg, lambda_cntrst=0.0)


# What the settings of several kinds may be
CHOICES = {"start": ("random", "imagenet", *BOXES),
           "pool": ("mean", "meanmax"), "add_on": ("whitened", "sigmoid"), "prototypes": ("data", "random"),
           "sampler": ("shuffle", "weighted"), "project_every": (0, 1),
           "head": ("refit", "free", "frozen"), "optimizer": ("adam", "adamw"),
           "scheduler": ("constant", "cosine", "plateau", "step", "cyclic", "onecycle")}


# ---------------------------------------------------------------------------------------------------------------------
# Backbone (3.3)

torch.backends.cudnn.allow_tf32 = False  # a GPU's float32 is to be float32: projection compares cosines near 1
torch.backends.cuda.matmul.allow_tf32 = False


class Conv(nn.Conv1d):
    """A 1D convolution of records on the height axis, [1, C, B, L]. It is 2D because only that has channels last, with
    which a CPU takes a quarter less time; and of one high image it finds a wide kernel's gradient in half the time that
    B low ones take."""

    def forward(self, x):
        stride = self.stride[0]
        if self.kernel_size == (1,) and self.in_channels % 16:  # here oneDNN 3.12 writes past its memory: a kernel of
            x, stride = x[..., ::stride], 1                     # one tap only sees every stride-th step anyway
        return F.conv2d(x, self.weight[:, :, None], stride=(1, stride), padding=(0, *self.padding))


class Block(nn.Module):
    """Two 3-tap convolutions and a shortcut (He et al. 2015, BasicBlock; torchvision's names, so its weights fit)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = Conv(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = Conv(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(Conv(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class ResNet18(nn.Module):
    """The paper's ResNet1D-18 and its ResNet2D-18: x [B, 12, 1000] -> h [B, 8 * width, 32].

    The 2D network takes 1 x 12 x 1000 and begins with a 12 x 7 kernel, so from there on the lead axis has height 1 and
    of every 3 x 3 kernel only the middle row meets data. With (1, 3) kernels it is the same function at a third of the
    arithmetic, and with the axis of height 1 left out it is this network: the 1D and 2D backbones are one function
    class and differ in their start (`load_imagenet`) and in what follows. tests/test_common.py proves the equality.
    Time: 1000 -> 500 (stem) -> 250 (pool) -> 250, 125, 63, 32. Width 64 has 3,848,832 parameters.
    """

    def __init__(self, width=64, dropout=0.0):
        super().__init__()
        self.conv1 = Conv(12, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        c_in = width
        for i, (c_out, stride) in enumerate([(width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)], start=1):
            setattr(self, f"layer{i}", nn.Sequential(Block(c_in, c_out, stride), Block(c_out, c_out, 1)))
            c_in = c_out
        self.dropout = nn.Dropout(dropout)
        self.channels = c_in
        for m in self.modules():
            if isinstance(m, Conv):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = x.transpose(0, 1)[None] if len(x) else x[:, :, None]            # [1, 12, B, 1000]: an image of height 0
        x = x.contiguous(memory_format=torch.channels_last)                 # is none, so of no record [0, 12, 1, 1000]
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)                   # [1, width, B, 500]
        x = F.max_pool2d(x, (1, 3), (1, 2), (0, 1))                         # [1, width, B, 250]
        x = self.layer3(self.layer2(self.layer1(x)))                        # [1, 4 * width, B, 63]
        return self.layer4(self.dropout(x)).transpose(1, 2).flatten(0, 1)   # [B, 8 * width, 32]

    def load_imagenet(self, state):
        """Start from torchvision's ResNet18 `state` dict: middle kernel rows; the 12-lead stem stays random (3.3)."""
        if self.channels != 512:
            raise ValueError("ImageNet weights need width 64")
        own = self.state_dict()
        for key in own:
            if key == "conv1.weight" or key.endswith("num_batches_tracked"):
                continue
            weight = state[key]
            own[key] = weight[:, :, weight.shape[2] // 2] if weight.ndim == 4 else weight
        self.load_state_dict(own)


# ---------------------------------------------------------------------------------------------------------------------
# Prototype layer (3.3)

WINDOW = {"1d": 1, "partial": 3, "global": 32}  # T: latent steps of a prototype (1D: after pooling over time)


def similarity(z, p, a=1.0):
    """Eq. (1) between every window of z and every prototype.

    z [B, D, L], p [P, D, T], scale a -> S [B, P, L - T + 1], each a * cosine of the flattened D x T patches.
    """
    windows = z.to(p.dtype).unfold(2, p.shape[2], 1).transpose(1, 2).flatten(2)      # [B, windows, D T]
    unit_z, unit_p = F.normalize(windows, dim=2), F.normalize(p.flatten(1), dim=1)   # z / |z|, p / |p|
    with torch.autocast(z.device.type, enabled=False):  # cosines near 1 differ by less than bf16 resolves
        return a * (unit_z @ unit_p.T).transpose(1, 2)                               # Eq. (1)


def pool_over_time(h, how):
    """h [B, D, L] -> [B, D or 2 D, 1]: the time average (paper), or average and maximum (`how` = "meanmax")."""
    mean = h.mean(2, keepdim=True)
    return mean if how == "mean" else torch.cat([mean, h.amax(2, keepdim=True)], 1)


class Scaler(nn.Module):
    """StandardScaler per lead as part of the model: (x - mean) / std, from 01; by default the identity."""

    def __init__(self, mean=(0.0,) * 12, std=(1.0,) * 12):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).float().view(12, 1))
        self.register_buffer("std", torch.tensor(std).float().view(12, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


class ProtoECGNet(nn.Module):
    """One branch of the paper: backbone, add-on, prototypes p [P, D, T] with classes p_class [P], linear head W [C, P].

    kind is "1d", "partial" or "global" (3.3): T = 1, 3 or 32 latent steps. `per_class` [C] counts prototypes by class.
    `latent_dim` is D; by default what the backbone gives.
    """

    def __init__(self, kind, classes, per_class, cfg, scaler=None, latent_dim=None):
        super().__init__()
        i = list(WINDOW).index(kind)
        self.kind, self.classes, self.pool, self.a = kind, list(classes), cfg.pool, cfg.a[i]
        self.top_k = cfg.top_k if kind == "partial" else 1
        self.scaler = scaler or Scaler()
        self.backbone = ResNet18(cfg.width, cfg.dropout)
        channels = self.backbone.channels * (2 if kind == "1d" and cfg.pool == "meanmax" else 1)
        dim = latent_dim or channels
        if cfg.add_on == "sigmoid":
            self.add_on = nn.Sequential(nn.Conv1d(channels, dim, 1), nn.ReLU(), nn.Conv1d(dim, dim, 1), nn.Sigmoid())
        else:
            self.add_on = nn.Conv1d(channels, dim, 1)
        p_class = torch.repeat_interleave(torch.arange(len(classes)), torch.as_tensor(per_class))     # [P]
        self.register_buffer("p_class", p_class)
        self.register_buffer("p_patient", torch.full_like(p_class, -1))  # see own_patients
        p = torch.rand(len(p_class), dim, WINDOW[kind])
        self.p = nn.Parameter(p if cfg.add_on == "sigmoid" else p - 0.5)              # among latents, signed or not
        self.head = nn.Linear(len(p_class), len(classes))
        own = F.one_hot(p_class, len(classes)).T.float()                              # [C, P]
        self.head.weight.data = 1.5 * own - 0.5                                       # W_cp = 1 own, -0.5 else (3.5)
        nn.init.zeros_(self.head.bias)

    def latent(self, x):
        """x [B, 12, 1000] mV -> z [B, D, L]; the 1D branch pools over time first, so that L = 1."""
        h = self.backbone(self.scaler(x))                                             # [B, 512, 32]
        return self.add_on(pool_over_time(h, self.pool) if self.kind == "1d" else h)

    def scores(self, z):
        """z [B, D, L] -> s [B, P]: the mean of the top-k windows of Eq. (1); 1D and global have one window."""
        S = similarity(z, self.p, self.a)                                             # [B, P, windows]
        k = min(self.top_k, S.shape[2])
        return S.mean(2) if k == S.shape[2] else S.topk(k, dim=2).values.mean(2)

    def forward(self, x):
        """x [B, 12, 1000] mV -> logits [B, C], s [B, P]."""
        s = self.scores(self.latent(x))
        with torch.autocast(s.device.type, enabled=False):  # W adds up differences that bf16 does not resolve
            return self.head(s), s


class BlackBox(nn.Module):
    """The same backbone with pooling over time and one linear layer (the paper's baselines, 4.3)."""

    def __init__(self, classes, cfg, scaler=None):
        super().__init__()
        self.kind, self.classes, self.pool = "blackbox", list(classes), cfg.pool
        self.scaler = scaler or Scaler()
        self.backbone = ResNet18(cfg.width, cfg.dropout)
        self.dropout = nn.Dropout(0.5 if cfg.pool == "meanmax" else 0.0)
        self.head = nn.Linear(self.backbone.channels * (2 if cfg.pool == "meanmax" else 1), len(classes))

    def forward(self, x):
        """x [B, 12, 1000] mV -> logits [B, C], pooled features [B, 512 or 1024]."""
        h = pool_over_time(self.backbone(self.scaler(x)), self.pool).squeeze(2)
        return self.head(self.dropout(h)), h


def window_samples(kind, window):
    """(first, end) sample that latent window `window` stands for (Appendix D): step k is centred on sample 32 k.

    A partial window k..k+2 is [32 (k+1) - 47, 32 (k+1) + 47), 0.94 s, clipped to the record; the others are all of it.
    """
    if kind != "partial":
        return 0, SAMPLES
    centre = 32 * (window + 1)
    return max(0, centre - 47), min(SAMPLES, centre + 47)


# ---------------------------------------------------------------------------------------------------------------------
# Loss (3.4)

def composite_loss(logits, s, y, p, p_class, jaccard, lambdas, w=None):
    """Eq. (2) and its terms, as a dict of scalars: total, bce, clst, sep, div, cntrst.

    logits [B, C], s [B, P], y [B, C] in {0, 1}, p [P, D, T], p_class [P], jaccard [C, C] of the training labels,
    lambdas (clst, sep, div, cntrst) as in Config, w [C] class weights or None. The BCE of Eq. (3) is averaged over
    classes, which keeps the lambdas comparable between 3 and 71 labels. A record without a positive has no clustering
    term, one with all labels no separation term; both still count in N.
    """
    N, P = s.shape
    bce = F.binary_cross_entropy_with_logits(logits, y, reduction="none")                  # [B, C]
    bce = (bce if w is None else w * bce).mean()                                           # Eq. (3)
    present = y[:, p_class] > 0                                                            # [B, P]
    clst = -_best(s, present).sum() / N                                                    # Eq. (4)
    sep = _best(s, ~present).sum() / N                                                     # Eq. (5)
    unit_p = F.normalize(p.flatten(1), dim=1)                                              # [P, D T]
    S = unit_p @ unit_p.T                                                                  # [P, P] cosines
    div = (S - torch.eye(P, dtype=S.dtype, device=S.device)).square().sum()                # Eq. (6)
    C = jaccard[p_class][:, p_class]                                                       # [P, P], A J A^T
    apart = 1 - C
    cntrst = -((C * S).sum() / C.sum() - (apart * S).sum() / apart.sum().clamp_min(1e-12)) / 2       # Eq. (7)
    l_clst, l_sep, l_div, l_cntrst = lambdas
    total = bce + l_clst * clst + l_sep * sep + l_div / P**2 * div + l_cntrst / P**0.5 * cntrst      # Eq. (2)
    return {"total": total, "bce": bce, "clst": clst, "sep": sep, "div": div, "cntrst": cntrst}


def _best(s, mask):
    """Row maximum of s [B, P] over mask, 0 where a row has nothing to choose from: [B]."""
    best = s.masked_fill(~mask, -torch.inf).amax(1)
    return torch.where(mask.any(1), best, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Projection (3.5, Stage 2)

def project(z, carries, ids, p, p_class, unique=False, runners=0):
    """Eq. (8): for every prototype the most similar window among the training records that carry its class.

    z [N, D, L] latents of the training records, carries [N, C] bool their labels, ids [N] their ecg_id, ascending,
    p [P, D, T], p_class [P]. Ties go to the lowest ecg_id, then the earliest window. With `unique` no two prototypes of
    a class take the same window: the best match chooses first (if the class has enough windows). Exits if a class has
    no record.
    Returns the projected p [P, D, T] and per prototype a list of (ecg_id, window, cosine): its source, then the best
    window of up to `runners` other records.
    """
    projected, found = p.clone(), [None] * len(p)
    for c in p_class.unique().tolist():
        own = torch.where(p_class == c)[0]
        members = np.flatnonzero(carries[:, c])                                             # Z_j of Eq. (8)
        if not len(members):
            sys.exit(f"a class of the model has no training record in these arrays: {rerun('02_train_joint.py')}")
        parts = np.array_split(members, -(-len(members) // 512))
        # In float64, rounded: in float32 two equal windows may differ by a last bit that depends on where they stand
        S = torch.cat([similarity(z[part].to(p).double(), p[own].double()).float() for part in parts])
        S = S.transpose(0, 1).cpu().numpy()                                                 # [own, n, windows]
        flat = S.reshape(len(own), -1).copy()
        for taken, i in enumerate(np.argsort(-flat.max(1), kind="stable"), start=1):
            at = int(flat[i].argmax())                     # the first maximum: lowest ecg_id, then earliest window
            record, window = divmod(at, S.shape[2])
            if unique and taken < flat.shape[1]:
                flat[:, at] = -np.inf
            j = int(own[i])
            projected[j] = z[members[record], :, window:window + p.shape[2]].to(p)
            best, score = S[i].argmax(1), S[i].max(1)                                       # [n] of each record
            others = [r for r in np.argsort(-score, kind="stable")[:runners + 1] if r != record][:runners]
            found[j] = [(int(ids[members[r]]), int(w), float(S[i, r, w])) for r, w in
                        [(record, window), *((r, best[r]) for r in others)]]
    return projected, found


def patients_of(ecg_ids, prep):
    """The patient of each of `ecg_ids`: [n]."""
    return torch.from_numpy(prep.patient_ids[[prep.row_of[int(e)] for e in ecg_ids]])


def own_patients(found, prep, cfg):
    """[P] for the prototypes `found` by projection the patient whose match with them does not count; -1: all count."""
    patients = patients_of([places[0][0] for places in found], prep)
    return torch.full_like(patients, -1) if cfg.own_patient else patients


def training_set(model, prep, device):
    """What Stage 2 looks through, folds 1-8 in ascending ecg_id: z [N, D, L], carries [N, C] bool, ids [N]."""
    rows = np.flatnonzero(prep.train)
    rows = rows[np.argsort(prep.ecg_ids[rows], kind="stable")]
    return (batched(model.eval().latent, prep, rows, device), prep.labels[rows][:, columns(model.classes)] > 0,
            prep.ecg_ids[rows])


# ---------------------------------------------------------------------------------------------------------------------
# Metrics (3.1)

def auroc(y, score):
    """AUROC of each column (Mann-Whitney with midranks): y, score [N, C] -> [C]; NaN without both a positive and a
    negative. The macro-AUROC of Strodthoff et al. 2021 is the mean over columns, on the whole set at once."""
    y = np.asarray(y, bool)
    ranks = rankdata(score, axis=0)
    positive = y.sum(0)
    negative = len(y) - positive
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((ranks * y).sum(0) - positive * (positive + 1) / 2) / (positive * negative)


def macro_auroc(y, score):
    """Mean AUROC over the columns that have both a positive and a negative; NaN if none has."""
    each = auroc(y, score)
    return float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")


FEWEST = 10  # positives in fold 9 that a label needs for a threshold of its own


def best_f1_thresholds(y, score):
    """Per class the threshold with the best F1 (score >= threshold is positive), or NaN; y, score [N, C] -> [C]."""
    order = np.argsort(-score, axis=0, kind="stable")
    score, hits = np.take_along_axis(score, order, 0), np.take_along_axis(y > 0, order, 0).cumsum(0)
    f1 = 2 * hits / (np.arange(1, len(y) + 1)[:, None] + hits[-1])
    f1[:-1][score[:-1] == score[1:]] = -1                                                  # equal scores stay together
    return np.where(hits[-1] > 0, np.take_along_axis(score, f1.argmax(0)[None], 0)[0], np.nan)


def decision_thresholds(y, logits):
    """From which logit on each label is predicted, y, logits [N, C] of fold 9 -> [C]: the one with the best F1, or 0, a
    probability of one half, for a label with fewer than 10 positives, of which a threshold would be chance."""
    return np.where((y > 0).sum(0) >= FEWEST, best_f1_thresholds(y, logits), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Command line: the same flags in every stage

def argument_parser(doc):
    """An ArgumentParser whose --help is the stage's docstring, with the flags that every stage shares."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("shared by all stages")
    g.add_argument("--data", type=Path, help="folder of the PTB-XL records (default data/ptbxl)")
    g.add_argument("--prep", type=Path, help="folder of the preprocessed arrays (default runs/prep)")
    g.add_argument("--run", type=Path, help="folder of this run: one recipe, seed and setting (default runs/RECIPE)")
    g.add_argument("--recipe", choices=list(RECIPES), default="default", help="our default, or the authors' settings")
    g.add_argument("--model", nargs="+", choices=list(MODELS), metavar="MODEL",
                   help=f"one or more of: {', '.join(MODELS)} (default: in 02 the paper's three branches, with "
                   "--small rhythm; later what RUN holds)")
    g.add_argument("--small", action="store_true", help="the rhythm branch alone with half the channels, under a "
                   "million parameters, for a laptop; in runs/small")
    g.add_argument("--demo", action="store_true", help="small complete run on synthetic records in folders of its own")
    g.add_argument("--seed", type=int, default=42, help="seed of everything random (default 42)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if present")
    g.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    g.add_argument("--force", action="store_true",
                   help="use artifacts of another data set (results.md then says so), or replace a model of another "
                   "setting")
    return p


def parse(p, argv=None):
    """Parse, fill in the default folders, and set threads and device: the Namespace every stage works with."""
    args = p.parse_args(argv)
    kind = ["demo"] * args.demo + ["small"] * args.small
    run = Path("runs") / "-".join(kind + [args.recipe] * (not kind or args.recipe != "default"))
    usual = {"data": Path("data/demo" if args.demo else "data/ptbxl"),
             "prep": Path("runs/demo-prep" if args.demo else "runs/prep"), "run": run}
    args.data, args.prep, args.run = (getattr(args, k) or usual[k] for k in usual)
    torch.set_flush_denormal(True)  # weights that decay to nothing pass 1e-38, where a CPU multiplies far slower
    if not 0 <= args.seed < 2**32:
        p.error("--seed must be between 0 and 4294967295")
    if args.threads is not None:
        if args.threads < 1:
            p.error("--threads must be at least 1")
        torch.set_num_threads(args.threads)
        threadpool_limits(args.threads, user_api="blas")                                    # numpy's and scipy's own
    try:
        torch.ones(1, device=args.device).item()  # a GPU may be there that this torch has no code for
    except (RuntimeError, AssertionError, ImportError) as e:
        p.error(f"--device {args.device} cannot be used here ({str(e).splitlines()[0]}); try --device cpu")
    args.device = torch.device(args.device)
    given[:] = [f" --{k} {getattr(args, k)}" for k in usual if getattr(args, k) != usual[k]]
    given[:0] = [f" --recipe {args.recipe}"] * (args.recipe != "default") + [f" --{k}" for k in kind]
    return args


given = []  # the flags of this call that say which run it works on, for `rerun`


def command_line(maker):
    """The command that runs stage `maker` with the flags that say which run this is; only 00 and 01 read --data."""
    return f"python {maker}" + "".join(flag for flag in given if maker < "02" or not flag.startswith(" --data"))


def rerun(maker):
    """What to do, for messages: run stage `maker` on this run."""
    return f"run `{command_line(maker)}`"


@contextlib.contextmanager
def process_pool(args):
    """Yield an executor of as many processes as --threads allows. When the block ends, what they have not begun they
    never begin, and one that does not come back within PATIENCE seconds (a stuck disk) is killed.
    (A multiprocessing.Pool can wait for ever, once a task has failed or a process was killed.)"""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # those that are ours
    workers = min(args.threads or cores, cores)
    context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")
    pool = ProcessPoolExecutor(workers, context, begin_worker)
    results = pool._result_queue
    try:
        yield pool
    except BrokenProcessPool:
        sys.exit("a process was killed, perhaps for want of memory: run the same command again, with --threads 1")
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C is not to stop this
        processes = multiprocessing.active_children()

        def give_up():
            for process in processes:
                process.kill()
            results._writer.close()  # a process killed in the middle of a result leaves a thread here waiting for more

        timer = threading.Timer(PATIENCE, give_up)
        timer.start()
        pool.shutdown(cancel_futures=True)
        timer.cancel()
        signal.signal(signal.SIGINT, before)


PATIENCE = 5


def begin_worker():
    """A process of the pool leaves Ctrl-C to the stage and ends when the stage was killed."""
    def end_with_stage():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        for temporary in list(_writing):
            temporary.unlink(missing_ok=True)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_stage, daemon=True).start()


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, a quota, a limit on the size of a file
BARRED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}


def _interrupt_later(unraisable):
    """Where Python cannot raise (a finaliser, the hooks of a fork) it prints a Ctrl-C and goes on: send it again."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        again = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        again.daemon = True  # not if the stage ends first
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def run(main):
    """Call a stage's main(); turn Ctrl-C, a full disk and a folder that cannot be used into one sentence."""
    sys.unraisablehook = _interrupt_later
    before, pressed = signal.getsignal(signal.SIGINT), []

    def interrupt(*how):  # of which a library may make an error of its own: matplotlib, "Invalid bounding box"
        pressed.append(True)
        signal.default_int_handler(*how)

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except (KeyboardInterrupt, Exception) as e:
        if pressed or isinstance(e, KeyboardInterrupt):
            sys.exit("\ninterrupted: finished files are whole; run the same command again (02 continues with --resume)")
        if isinstance(e, OSError) and e.errno in FULL:
            sys.exit(f"the disk is full ({e.filename or 'while writing'}): free some space and run the same command "
                     "again")
        if isinstance(e, OSError) and e.errno in BARRED and e.filename:
            sys.exit(f"{e.filename} cannot be used ({e.strerror}): put that right, or name another folder with --data, "
                     "--prep or --run")
        raise
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------------------------
# Artifacts: written whole or not at all; each records what it was made from

FORMAT = 1  # raised when an artifact's layout changes


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path in the same folder; on success it becomes `path` in one step, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _swept:
        _swept.add(path.parent)
        sweep(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.tmp")
    _writing.add(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        e.filename = e.filename or str(path)  # for the sentence of `run`
        raise
    finally:
        temporary.unlink(missing_ok=True)
        _writing.discard(temporary)


_swept = set()    # folders that this process has swept
_writing = set()  # temporary files that it has not finished


def sweep(folder):
    """Remove the half-written files of this machine's processes that are no more: a killed run cannot."""
    for leftover in folder.glob(f".*@{platform.node()}.tmp"):
        pid = leftover.name.rpartition("@")[0].rpartition(".")[2]
        try:
            os.kill(int(pid), 0)  # signal 0 only asks whether the process is there
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except (OverflowError, PermissionError, ValueError):  # not ours, or somebody else's
            pass


def save_json(path, value):
    with replacing(path) as t:
        t.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def save_npy(path, array):
    with replacing(path) as t:  # through memory: writing to a full disk, numpy and torch do not say what went wrong
        np.save(buffer := io.BytesIO(), array, allow_pickle=False)
        t.write_bytes(buffer.getbuffer())


def save_pt(path, value):
    with replacing(path) as t:  # and torch would write the temporary name into it: another fingerprint every time
        torch.save(value, buffer := io.BytesIO())
        t.write_bytes(buffer.getbuffer())


def load_json(path, maker, *keys):
    """JSON object of `path`; exits naming `maker`, the command that writes it, when it is missing or damaged, or if any
    `keys` are asked for, when it lacks one of them or is of another FORMAT."""
    try:
        value = json.loads(_there(path, maker).read_text())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        sys.exit(f"{path} is damaged: {rerun(maker)} again")
    if keys and (value.get("format") != FORMAT or not {*keys} <= {*value}):
        sys.exit(f"{path} is damaged or of another version: {rerun(maker)} again")
    return value


def load_npy(path, maker, mmap=False):
    """Array of `path` (never pickled; memory-mapped if `mmap`); exits naming `maker` when missing or damaged."""
    try:
        array = np.load(_there(path, maker), mmap_mode="c" if mmap else None, allow_pickle=False)
    except Exception:  # numpy raises many kinds for a truncated or foreign file
        array = None
    if not isinstance(array, np.ndarray):
        sys.exit(f"{path} is damaged: {rerun(maker)} again")
    return array


def load_pt(path, maker):
    """CPU tensors and plain values of `path` (weights_only); exits naming `maker` if missing, damaged or not ours."""
    try:
        value = torch.load(_there(path, maker), map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds for a truncated or foreign file
        sys.exit(f"{path} is damaged or not a file of this project: {rerun(maker)} again")
    meta = value.get("meta") if isinstance(value, dict) else None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        sys.exit(f"{path} has another layout than this version writes: {rerun(maker)} again")
    return value


def _there(path, maker):
    if not path.is_file():
        sys.exit(f"{path} is missing: {rerun(maker)} first")
    return path


def file_hash(path):
    """First 16 hex digits of a file's sha256: the fingerprint by which artifacts name their inputs."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def hardware(device):
    """The name of the GPU that `device` is, or else of the CPU with its number of cores."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    cpu = f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def provenance(cfg, stage, **inputs):
    """What goes beside every artifact: settings, versions, code and the fingerprints of the `inputs` (name=path)."""
    here = Path(__file__).parent
    return {"format": FORMAT, "stage": stage, "config": asdict(cfg), "inputs": {
                name: file_hash(path) for name, path in inputs.items()},
            "code": {name: file_hash(here / name) for name in ("common.py", stage)},
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
                         "scipy": scipy.__version__}}


def same_input(meta, name, path, artifact, maker, force=False):
    """Exit if `artifact`'s provenance `meta` was made from another `path` than is there now. With --force that is a
    warning, kept in meta["warnings"], which every stage hands on and 05 prints in results.md."""
    if meta["inputs"].get(name) == file_hash(_there(path, maker)):
        return
    message = f"{artifact} was made from another {path}: {rerun(maker)} again"
    if not force:
        sys.exit(message + " (or --force to use it all the same)")
    meta["warnings"] = [*meta.get("warnings", []), message]
    print(f"WARNING: {message}", file=sys.stderr)


def load_prep(folder):
    """The arrays of 01 as a namespace: signals [N, 12, 1000] mV (memory-mapped), labels [N, 71] uint8, folds, ecg_ids,
    patient_ids [N], row_of {ecg_id: row}, info (preprocess.json) and path, whose fingerprint stands for all of them."""
    path, maker = folder / "preprocess.json", "01_preprocess.py"
    info = load_json(path, maker, "shapes", "sha256", "scaler", "jaccard", "sizes")
    prep = SimpleNamespace(info=info, path=path)
    for name in ("signals", "labels", "folds", "ecg_ids", "patient_ids"):
        file = folder / f"{name}.npy"
        array = load_npy(file, maker, mmap=name == "signals")
        changed = name != "signals" and file_hash(file) != info["sha256"][name]  # signals: 1 GB
        if changed or list(array.shape) != info["shapes"][name]:
            sys.exit(f"{file} does not belong to {path}: {rerun(maker)} again")
        setattr(prep, name, array)
    prep.train, prep.val, prep.test = prep.folds <= 8, prep.folds == 9, prep.folds == 10
    prep.row_of = {e: i for i, e in enumerate(prep.ecg_ids.tolist())}
    return prep


def learnable(prep, codes):
    """(codes with at least one training record, codes without): the second kind is left out of every model."""
    count = dict(zip(CODES, prep.labels[prep.train].sum(0)))
    return [c for c in codes if count[c] > 0], [c for c in codes if count[c] == 0]


def columns(codes):
    """Column numbers of `codes` in labels.npy and in every saved prediction."""
    return [CODES.index(c) for c in codes]


def newest(folder, name, maker):
    """(round, path) of the highest round of name.pt, name_r2.pt, ... in a model's folder; exits if there is none."""
    pattern = re.compile(rf"{name}(?:_r(\d+))?\.pt")
    found = [(int(m[1] or 1), p) for p in folder.glob(f"{name}*.pt") if (m := pattern.fullmatch(p.name))]
    return max(found) if found else (1, _there(folder / f"{name}.pt", maker))


def command(stage, model, round_=1):
    """The command that makes a model's artifact of one round, for messages."""
    return f"{stage} --model {model}" + (f" --round {round_}" if round_ > 1 else "")


def prototype_models(args):
    """The prototype models to work on: those of --model, or all that 02 has trained in the run (in MODELS' order)."""
    names = args.model or [m for m in MODELS if list((args.run / m).glob("joint*.pt"))]
    names = [m for m in names if m not in BOXES]
    if not names:
        sys.exit(f"{args.run} holds no prototype model of those asked for: {rerun('02_train_joint.py')} first")
    return names


def load_head(path, maker):
    """(meta, its arrays W [C, P], b [C], mean [P], std [P] in float64) of a classifier that 04 wrote."""
    saved = load_pt(path, maker)
    return saved["meta"], {k: saved[k].numpy() for k in ("W", "b", "mean", "std")}


def config_of(meta):
    """The Config that an artifact's provenance holds (JSON turns tuples into lists)."""
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()}
    return replace(RECIPES[config["recipe"]], **config)  # a setting that is newer than the artifact: as in its recipe


def build(meta, scaler=None):
    """An untrained model of the architecture that `meta` describes (see 02_train_joint.py)."""
    cfg, kind = config_of(meta), MODELS[meta["model"]][0]
    if kind == "blackbox":
        return BlackBox(meta["classes"], cfg, scaler)
    return ProtoECGNet(kind, meta["classes"], meta["per_class"], cfg, scaler, meta["latent_dim"])


def load_model(path, maker, device="cpu"):
    """(model in evaluation mode, its meta) of a joint.pt or projected.pt."""
    saved = load_pt(path, maker)
    try:
        model = build(saved["meta"])
        model.load_state_dict(saved["state"])
    except (KeyError, RuntimeError, TypeError, ValueError):
        sys.exit(f"{path} holds another architecture than this version builds: {rerun(maker)} again")
    if not all(v.isfinite().all() for v in model.state_dict().values()):
        sys.exit(f"{path} holds weights that are not numbers: {rerun(maker)} again")
    return model.to(device).eval(), saved["meta"]


class Diverged(SystemExit):
    """Weights or a loss are no numbers any more: the end of a training, with one sentence, and of a tuning trial."""


@torch.no_grad()
def batched(f, prep, rows, device, batch=256):
    """f(x) over prep.signals[rows] in batches of one fixed size, concatenated on the CPU: f gives [B, ...] tensors.

    The last batch is padded to full size, so that a record's result does not depend on how many there are.
    """
    out = []
    for i in range(0, len(rows), batch):
        part = rows[i:i + batch]
        x = torch.zeros(batch, len(LEADS), SAMPLES)
        x[:len(part)] = torch.from_numpy(prep.signals[part])
        out.append(f(x.to(device))[:len(part)].cpu())
        if not x.isfinite().all():
            sys.exit(f"{prep.path.parent}/signals.npy holds values that are not numbers: {rerun('01_preprocess.py')}")
        if not out[-1].isfinite().all():
            raise Diverged("what the network gives is not a number any more: train again with a lower learning rate")
    return torch.cat(out)
