"""What two or more stages share, in the order of the paper: labels (3.1), settings (Appendix E),
model and Eq. (1) (3.3), AUROC; then finished runs, flags and files.

Shapes: x [B, 12, 1000] mV, z [B, D, L] latent map, p [P, D, T] prototypes, s [B, P] similarities,
W [C, F] weights of F pieces of evidence (F = P where they are the prototypes), y [B, C] labels.
"""
import argparse
import ctypes
import gzip
import hashlib
import io
import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import butter, filtfilt
from scipy.special import expit
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits
from torch import nn
from tqdm import tqdm

FORMAT = 3  # of files, raised when their layout changes
torch.backends.cudnn.allow_tf32 = False  # projection compares cosines near 1

# ---- Labels (3.1 and Appendix G, in PTB-XL's spelling and the row order of its scp_statements.csv)

LEADS = "I II III AVR AVL AVF V1 V2 V3 V4 V5 V6".split()
SAMPLES, RATE = 1000, 100  # ten seconds at 100 Hz
CODES = """
    NDT NST_ DIG LNGQT NORM IMI ASMI LVH LAFB ISC_ IRBBB 1AVB IVCD ISCAL CRBBB CLBBB ILMI LAO/LAE
    AMI ALMI ISCIN INJAS LMI ISCIL LPFB ISCAS INJAL ISCLA RVH ANEUR RAO/RAE EL WPW ILBBB IPLMI ISCAN
    IPMI SEHYP INJIN INJLA PMI 3AVB INJIL 2AVB ABQRS PVC STD_ VCLVH QWAVE LOWT NT_ PAC LPR INVT
    LVOLT HVOLT TAB_ STE_ PRC(S) SR AFIB STACH SARRH SBRAD PACE SVARR BIGU AFLT SVTAC PSVT TRIGU
    """.split()
_RHYTHM = """1AVB IVCD 3AVB 2AVB SR AFIB STACH SARRH SBRAD PACE SVARR BIGU AFLT SVTAC PSVT
    TRIGU""".split()
_GLOBAL = "DIG NORM EL".split()
GROUPS = {
    "rhythm": _RHYTHM,
    "morphology": [c for c in CODES if c not in _RHYTHM + _GLOBAL],
    "global": _GLOBAL,
    "all": CODES}

MODELS = {  # (kind of prototype, label group); blackbox-2d can start from ImageNet, -1d cannot
    "rhythm": ("1d", "rhythm"), "morphology": ("partial", "morphology"),
    "global": ("global", "global"),
    "all-1d": ("1d", "all"), "all-partial": ("partial", "all"), "all-global": ("global", "all"),
    "blackbox-1d": ("blackbox", "all"), "blackbox-2d": ("blackbox", "all"),
    "blackbox-rhythm": ("blackbox", "rhythm"), "blackbox-morphology": ("blackbox", "morphology"),
    "blackbox-global": ("blackbox", "global"),
}
BOXES = [m for m in MODELS if MODELS[m][0] == "blackbox"]
BRANCHES = ["rhythm", "morphology", "global"]  # the paper's three
IMAGENET = "resnet18-f37072fd.pth"  # torchvision's weights, fetched by 00_download.py --imagenet


def columns(codes):
    """Column numbers of `codes` in labels.npy and in all logits."""
    return [CODES.index(c) for c in codes]


def highpass(x):
    """First-order 0.5 Hz Butterworth high-pass, zero phase (3.2): x [..., 1000] -> the same."""
    b, a = butter(1, 0.5, "highpass", fs=RATE)
    return filtfilt(b, a, x, axis=-1)


# ---- Settings

@dataclass(frozen=True)
class Config:
    """Every choice of a run. The defaults are our recipe; `PAPER` holds the authors' settings."""
    recipe: str = "default"
    seed: int = 42
    # Network (3.3)
    width: int = 32              # channels of the first stage; paper: 64, ResNet18
    dropout: float = 0.2         # before the last stage; paper: tuned, place: authors' code
    linear_dropout: float = 0.5  # ours, before the layer of a black box; paper: 0
    scale_input: bool = True     # StandardScaler per lead, fitted on folds 1-8; paper: silent
    start: str = "random"        # of the backbone; paper: imagenet (2D branches)
    pool: str = "meanmax"        # over time, 1D and black boxes; paper: mean
    add_on: str = "centred"      # ours: linear, mean 0, variance 1; authors' code: sigmoid
    latent_dim: int = 128        # D; authors' code: 512, as many as channels (0)
    per_class: tuple = (5, 5, 5)  # prototypes: 1D, partial, global; authors' code: 5, 18, 7
    a: tuple = (1.0, 1.0, 1.0)   # scale of Eq. (1); authors' code: 1, 13, 4
    top_k: int = 5               # windows in a partial score; paper: k unstated, code: all 30
    tie: str = "class"           # ours: W has one weight for all prototypes of a class; paper: none
    # Loss (3.4)
    lambda_clst: float = 0.02    # ours: small, as the BCE of rare labels is itself about .05
    lambda_sep: float = 0.004    # ours
    lambda_div: float = 0.1      # ours
    lambda_cntrst: float = 0.1   # ours
    auxiliary: float = 1.0       # ours: weight of a black box's BCE on the same backbone; paper: 0
    class_weights: bool = False  # w of Eq. (3), as the authors' code has them; ours: of mean 1
    sampler: str = "shuffle"     # or weighted: by the inverse frequency of a record's labels
    # Stage 1 (3.5, Appendix E)
    head: str = "free"           # whether W learns, or is frozen (authors' code)
    own: float = 1.0             # ours: weight of the BCE of own-class weights alone; paper: 0
    head_start: tuple = (10.0, 0.0)  # W_cp at the start, own class and others; paper: 1, -0.5
    epochs: int = 45
    patience: int = 45           # epochs without a better fold-9 macro-AUROC; paper: 10
    batch: int = 64              # authors' code: 32
    lr: float = 3e-3             # authors' code: 1e-4
    optimizer: str = "adamw"     # ours; paper: adam, whose weight decay is an L2 term
    weight_decay: float = 0.02
    scheduler: str = "onecycle"  # authors' code: cosine
    augment: bool = True         # amplitude, noise, wander, lost leads, shift, blank; paper: silent
    crop: int = 500              # samples of a training crop, to 4/5 of the epochs; global: all
    ema: float = 0.99            # ours: moving average of weights over steps; paper: 0, none
    # Stages 2 and 3
    unique: bool = True          # ours: prototypes of a class lie apart, if they can (03)
    own_patient: bool = False    # whether prototypes count for ECGs of their patient; paper: yes


PAPER = Config(  # the authors' settings, run through the paper's equations
    recipe="paper", width=64, dropout=0.35, linear_dropout=0.0, scale_input=False, start="imagenet",
    pool="mean", add_on="sigmoid", latent_dim=0, per_class=(5, 18, 7), a=(1.0, 13.0, 4.0), top_k=30,
    tie="none", lambda_clst=0.004, lambda_sep=0.0004, lambda_div=250.0, lambda_cntrst=600.0,
    auxiliary=0.0, own=0.0, class_weights=True, head="frozen", head_start=(1.0, -0.5),
    own_patient=True, epochs=200, patience=10, batch=32, lr=1e-4, optimizer="adam",
    weight_decay=1.7e-4, scheduler="cosine", augment=False, crop=SAMPLES, ema=0.0, unique=False)
RECIPES = {"default": Config(), "paper": PAPER}


# ---- Backbone (3.3)

class Conv(nn.Conv1d):
    """A 1D convolution as a faster 1 x k 2D one, the batch on the height axis: x [1, C, B, L]."""

    def forward(self, x):
        weight, stride = self.weight[:, :, None], (1, *self.stride)
        if weight.requires_grad:  # oneDNN takes 0 times memory that it never wrote, perhaps NaN
            weight.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        return F.conv2d(x, weight, stride=stride, padding=(0, *self.padding))


class Block(nn.Module):
    """Two 3-tap convolutions and a shortcut (He et al. 2015), with torchvision's names."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = Conv(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = Conv(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                Conv(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(h)) + self.downsample(x), inplace=True)


class ResNet18(nn.Module):
    """The paper's ResNet1D-18 and its ResNet2D-18: x [B, 12, 1000] -> h [B, 8 * width, 32]. The
    12 x 7 stem of the 2D network leaves a lead axis of height 1, so that of its 3 x 3 kernels only
    the middle rows meet data (tests/test_common.py)."""

    def __init__(self, width=64, dropout=0.0):
        super().__init__()
        self.conv1 = Conv(12, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        c_in = width
        for i in range(4):
            c_out, stride = width * 2**i, 1 if i == 0 else 2
            blocks = nn.Sequential(Block(c_in, c_out, stride), Block(c_out, c_out, 1))
            setattr(self, f"layer{i + 1}", blocks)
            c_in = c_out
        self.dropout = nn.Dropout(dropout)
        self.channels = c_in
        for m in self.modules():
            if isinstance(m, Conv):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = x.transpose(0, 1)[None]  # [1, 12, B, 1000]
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # [1, width, B, 500]
        x = F.max_pool2d(x, (1, 3), (1, 2), (0, 1))  # [1, width, B, 250]
        x = self.layer3(self.layer2(self.layer1(x)))  # [1, 4 * width, B, 63]
        x = self.layer4(self.dropout(x))  # [1, 8 * width, B, 32]
        return x.transpose(1, 2).flatten(0, 1)  # [B, 8 * width, 32]


# ---- Prototype layer (3.3)

WINDOW = {"1d": 1, "partial": 3, "global": 32}  # T: latent steps of a prototype


def similarity(z, p, a=1.0):
    """Eq. (1) between every window of z and every prototype.

    z [B, D, L], p [P, D, T], scale a -> S [B, P, L - T + 1], each a * cosine of D x T patches.
    """
    windows = z.to(p.dtype).unfold(2, p.shape[2], 1).transpose(1, 2).flatten(2)  # [B, L-T+1, D T]
    unit_z = F.normalize(windows, dim=2)  # z / |z|
    unit_p = F.normalize(p.flatten(1), dim=1)  # p / |p|
    with torch.autocast(z.device.type, enabled=False):  # bf16 does not resolve cosines near 1
        return a * (unit_z @ unit_p.T).transpose(1, 2)  # Eq. (1)


def pool_over_time(h, how):
    """h [B, D, L] -> [B, D, 1], the time average (paper), or with its maximum [B, 2 D, 1]."""
    mean = h.mean(2, keepdim=True)
    return mean if how == "mean" else torch.cat([mean, h.amax(2, keepdim=True)], 1)


class BlackBox(nn.Module):
    """The baselines of 4.3: backbone, pooling over time and a linear layer."""

    def __init__(self, classes, cfg):
        super().__init__()
        self.kind, self.classes, self.pool = "blackbox", list(classes), cfg.pool
        self.register_buffer("mean", torch.zeros(12, 1))  # of the leads: Config.scale_input
        self.register_buffer("std", torch.ones(12, 1))
        self.backbone = ResNet18(cfg.width, cfg.dropout)
        self.dropout = nn.Dropout(cfg.linear_dropout)
        many = 2 if cfg.pool == "meanmax" else 1
        self.linear = nn.Linear(many * self.backbone.channels, len(classes))

    def features(self, x):
        """x [B, 12, 1000] mV -> h [B, 8 * width, 32]."""
        return self.backbone((x - self.mean) / self.std)

    def linear_logits(self, h):
        """h [B, 8 * width, 32] -> logits [B, C]."""
        return self.linear(self.dropout(pool_over_time(h, self.pool).squeeze(2)))

    def forward(self, x):
        return self.linear_logits(self.features(x))


class ProtoECGNet(BlackBox):
    """One branch of the paper: backbone, add-on, prototypes p [P, D, T], linear head W [C, P].

    kind "1d", "partial" or "global" (3.3); per_class [C] counts prototypes. p_class [P] says whose
    a prototype is, p_patient [P] whose records do not count for it. With cfg.tie = "class" the head
    sees the mean similarity to each class: W = V A^T with V [C, C] and A [P, C].
    """

    def __init__(self, kind, classes, per_class, cfg):
        super().__init__(CODES, cfg)  # all 71 labels help to train the backbone: Config.auxiliary
        self.kind, self.classes = kind, list(classes)
        self.a = cfg.a[list(WINDOW).index(kind)]
        self.top_k = cfg.top_k if kind == "partial" else 1
        channels = self.linear.in_features if kind == "1d" else self.backbone.channels
        dim = cfg.latent_dim or channels
        p_class = torch.repeat_interleave(torch.as_tensor(per_class))
        self.register_buffer("p_class", p_class)
        self.register_buffer("p_patient", torch.full_like(p_class, -1))
        shape = len(p_class), dim, WINDOW[kind]
        if cfg.add_on == "sigmoid":
            self.add_on = nn.Sequential(
                nn.Conv1d(channels, dim, 1), nn.ReLU(), nn.Conv1d(dim, dim, 1), nn.Sigmoid())
            if kind != "1d":  # as in the authors' code
                for layer in self.add_on[0], self.add_on[2]:
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                    nn.init.zeros_(layer.bias)
            self.p = nn.Parameter(torch.randn(shape))
        else:  # without a direction that all latents share, so that a cosine can be 0
            self.add_on = nn.Sequential(
                nn.Conv1d(channels, dim, 1, bias=False), nn.BatchNorm1d(dim, affine=False))
            self.p = nn.Parameter(torch.rand(shape) - 0.5)
        of_class = F.one_hot(p_class, len(classes)).float()  # [P, C]
        mean_of = of_class / of_class.sum(0).clamp_min(1)
        A = mean_of if cfg.tie == "class" else torch.eye(len(p_class))
        self.register_buffer("A", A, persistent=False)  # [P, C] or [P, P]
        self.register_buffer("own", of_class.T @ A > 0, persistent=False)  # [C, .], as V
        self.head = nn.Linear(A.shape[1], len(classes))
        self.head.weight.data = torch.where(self.own, *cfg.head_start)  # W_cp of 3.5
        nn.init.zeros_(self.head.bias)

    def latent(self, x):
        """x [B, 12, 1000] mV -> z [B, D, L]."""
        return self.to_latent(self.features(x))

    def to_latent(self, h):
        """h [B, 8 * width, 32] -> z [B, D, L]; the 1D branch pools over time first: L = 1."""
        return self.add_on(pool_over_time(h, self.pool) if self.kind == "1d" else h)

    def scores(self, z):
        """z [B, D, L] -> s [B, P]: the mean of the top-k windows; 1D and global have only one."""
        S = similarity(z, self.p, self.a)  # [B, P, windows]
        k = min(self.top_k, S.shape[2])
        return S.mean(2) if k == S.shape[2] else S.topk(k, dim=2).values.mean(2)

    def logits(self, s, own=False):
        """s [B, P] -> logits [B, C] of Stage 1's head, or of its own-class weights alone."""
        V = self.head.weight * self.own if own else self.head.weight
        with torch.autocast(s.device.type, enabled=False):  # V adds up small differences
            return F.linear(s @ self.A, V, self.head.bias)

    def forward(self, x):
        return self.logits(self.scores(self.latent(x)))


def window_samples(kind, window):
    """(first, end) sample that a latent window stands for (Appendix D): of a partial one k..k+2
    0.94 s around step k + 1, at sample 32 (k + 1), clipped; else the whole record."""
    if kind != "partial":
        return 0, SAMPLES
    centre = 32 * (window + 1)
    return max(0, centre - 47), min(SAMPLES, centre + 47)


# ---- AUROC (3.1)

def auroc(y, score):
    """AUROC of each column (Mann-Whitney, midranks): y, score [N, C] -> [C]; NaN if all y agree."""
    y = np.asarray(y, bool)
    ranks = rankdata(score, axis=0)
    positive = y.sum(0)
    negative = len(y) - positive
    with np.errstate(invalid="ignore", divide="ignore"):
        wins = (ranks * y).sum(0) - positive * (positive + 1) / 2
        return wins / (positive * negative)


def macro_auroc(y, score):
    """Mean AUROC over the columns that have a positive and a negative; NaN if none has."""
    each = auroc(y, score)
    return float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")


# ---- A finished run: what 06 and a notebook need

def load_run(run, models=None, device="cpu"):
    """The classifiers of a run folder alone: `models`, or its fusion, or else each model's own.

    Each is a namespace of name, classes [C], W [C, F], b [C], mean [F], std [F], thresholds [C] on
    the logit, pieces [F] (the class of each piece of evidence), A [P, F] (whose mean similarity a
    piece is), descriptions {code: text}, mark (what it was trained on, if not PTB-XL), networks,
    and prototypes [P]: dicts of prototypes.json with the ECG x [12, 1000] mV.
    """
    args = SimpleNamespace(run=Path(run), prep=None, device=torch.device(device))
    fusion = ["fusion"] if (args.run / "classifiers/fusion.pt").is_file() else None
    heads = []
    for name in models or fusion or trained_models(args.run):
        saved = load(args.run / f"classifiers/{name}.pt", "04_fusion.py", args)
        head = SimpleNamespace(**saved.pop("meta"), networks=[], prototypes=[])
        vars(head).update({key: array.numpy() for key, array in saved.items()})
        for branch in head.branches:
            folder, maker = args.run / branch, "03_project.py"
            head.networks.append(load_model(folder / "projected.pt", maker, args)[0])
            info = load(folder / "prototypes.json", maker, args)
            ecgs = load(folder / "prototypes.npy.gz", maker)  # uV
            head.prototypes += [{**q, "x": x / 1000} for q, x in zip(info["prototypes"], ecgs)]
            head.descriptions, data = info["descriptions"], info["data"]
            head.mark = "" if data == "PTB-XL v1.0.3" else f"{data}: "
        heads.append(head)
    return heads


@torch.no_grad()
def similarities(head, x):
    """x [B, 12, 1000] mV, filtered -> s [B, P], of all branches side by side, Eq. (9)."""
    x = torch.as_tensor(x, dtype=torch.float32, device=head.networks[0].p.device)
    s = [network.scores(network.latent(x)) for network in head.networks]
    return torch.cat(s, 1).cpu().double().numpy()


def evidence(s, A, counts=True):
    """The mean of s [N, P] over the prototypes of each piece of evidence, which A [P, F] names
    -> [N, F]; over those that count [N, P] alone, NaN where none does."""
    counts = np.broadcast_to(counts, s.shape).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (s * counts) @ A / (counts @ A)


def explain(heads, x, patient=None):
    """What classifiers say of x [12, 1000] mV, filtered, and why: a dict a label, the most probable
    first. Its `pieces`, the largest first, with their prototypes, the nearest first and none from
    `patient`, lead from `average`, the logit of the average training record, to `logit`."""
    results = []
    for head in heads:
        s = similarities(head, np.array(x)[None])[0]  # [P]
        counts = np.array([q["patient"] < 0 or q["patient"] != patient for q in head.prototypes])
        mean_s = evidence(s[None], head.A, counts)[0]  # [F]
        terms = head.W * np.nan_to_num((mean_s - head.mean) / head.std)  # [C, F]
        nearest = [j for j in np.argsort(-s, kind="stable") if counts[j]]
        known = [{"model": q["model"], "index": q["index"], "ecg_id": q["ecg_id"],
                  "similarity": score} for q, score in zip(head.prototypes, s)]
        pieces = []
        for f, code in enumerate(head.pieces):
            like = "like" if mean_s[f] > head.mean[f] else "unlike"
            pieces.append({"class": code, "claim": f"{like} {code}", "similarity": mean_s[f],
                           "mean": head.mean[f], "std": head.std[f],
                           "prototypes": [known[j] for j in nearest if head.A[j, f]]})
        for c, code in enumerate(head.classes):
            order = np.argsort(-np.abs(terms[c]), kind="stable")
            logit = head.b[c] + terms[c].sum()  # Eq. (10)
            p, threshold = expit([logit, head.thresholds[c]])
            results.append({
                "label": code, "classifier": head.name, "probability": p, "threshold": threshold,
                "predicted": bool(p >= threshold), "logit": logit, "average": head.b[c],
                "pieces": [{**pieces[f], "weight": head.W[c, f], "contribution": terms[c, f]}
                           for f in order if head.W[c, f] and pieces[f]["prototypes"]]})
    return sorted(results, key=lambda r: -r["probability"])


def predict(heads, x):
    """x [B, 12, 1000] mV, filtered -> probabilities [B, 71]; NaN for labels not modelled."""
    out = np.full((len(x), len(CODES)), np.nan)
    for head in heads:
        X = (evidence(similarities(head, x), head.A) - head.mean) / head.std
        out[:, columns(head.classes)] = expit(X @ head.W.T + head.b)
    return out


# ---- Command line: the same flags in every stage that has a use for them

FLAGS = {
    "data": dict(type=Path, help="folder of the PTB-XL records (default data/ptbxl)"),
    "prep": dict(type=Path, help="folder of the preprocessed arrays (default runs/prep)"),
    "run": dict(type=Path, help="folder of one recipe, seed and setting (default runs/RECIPE)"),
    "recipe": dict(choices=list(RECIPES), help="ours (default), or the authors' settings"),
    "model": dict(nargs="+", choices=list(MODELS), metavar="MODEL",
                  help=f"some of {', '.join(MODELS)} (default: the branches, or what RUN holds)"),
    "seed": dict(type=int, default=42, help="seed of everything random (default 42)"),
    "device": dict(help="cpu, or cuda (the default if there is one)"),
    "threads": dict(type=int, help="CPU threads (default: all cores; on a busy machine take 1)"),
    "demo": dict(action="store_true", help="a small run on synthetic records, in own folders"),
}
RUN_FLAGS = "prep", "run", "recipe", "model", "device", "threads", "demo"


def argument_parser(doc, *flags):
    """An ArgumentParser whose --help is the stage's docstring, with some of the shared FLAGS."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s ...")
    for name in flags:
        p.add_argument(f"--{name}", **FLAGS[name])
    cuda = torch.cuda.is_available()
    p.set_defaults(recipe="default", threads=None, demo=False, device="cuda" if cuda else "cpu")
    return p


def parse(p):
    """Parse, fill in the default folders, and set threads and device: every stage's `args`."""
    args = p.parse_args()
    for stream in (sys.stdout, sys.stderr):  # a console that does not know a letter
        stream.reconfigure(errors="backslashreplace")
    usual = {"data": "data/ptbxl", "prep": "runs/prep", "run": f"runs/{args.recipe}"}
    if args.demo:
        run = {"default": "runs/demo", "paper": "runs/demo-paper"}[args.recipe]
        usual = {"data": "data/demo", "prep": "runs/demo-prep", "run": run}
    for k, folder in usual.items():
        setattr(args, k, getattr(args, k, None) or Path(folder))
    torch.set_flush_denormal(True)  # weights that decay below 1e-38 slow a CPU down
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if libc.mallopt(-3, 2**25):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: keep freed memory,
            libc.mallopt(-1, 2**31 - 1)  # as to ask for it anew took a fifth of each step
    if args.threads:
        torch.set_num_threads(args.threads)
        threadpool_limits(args.threads, user_api="blas")
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: this torch finds no GPU; try --device cpu")
    return args


def trained_models(run):
    """The prototype models that a run holds, in the order of MODELS."""
    names = [m for m in MODELS if m not in BOXES and (run / m / "joint.pt").is_file()]
    return names or sys.exit(f"{run} holds no prototype model: run 02_train_joint.py first")


def run(main):
    """Call a stage's main(); Ctrl-C and what the system refuses end it with one sentence."""
    try:
        main()
    except (KeyboardInterrupt, OSError) as e:
        sys.exit(str(e) or "\ninterrupted: finished files are whole; give the same command again")


# ---- Files: written whole or not at all; each says what it was made from

def save(path, value):
    """Write a .npy or .npy.gz array, a .pt or .json value, text or bytes: all of it, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # torch would write the temporary name into the file
    if ".npy" in path.suffixes:
        np.save(content, value, allow_pickle=False)
    elif path.suffix == ".pt":
        torch.save(value, content)
    elif path.suffix == ".json":
        content.write(json.dumps(value, indent=1, allow_nan=False).encode())
    else:
        content.write(value.encode() if isinstance(value, str) else value)
    content = content.getvalue()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def load(path, maker, args=None):
    """The value of a file that stage `maker` wrote; exits in one sentence when it is missing or
    damaged, and, with `args`, when what it was made from in RUN or PREP (if any) has changed."""
    if not path.is_file():
        sys.exit(f"{path} is missing: run {maker} first")
    try:
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, "c")  # no pickle, no archive
        if path.suffix == ".gz":
            return np.lib.format.read_array(gzip.open(path), allow_pickle=False)
        if path.suffix == ".pt":
            value = torch.load(path, map_location="cpu", weights_only=True)
        else:
            value = json.loads(path.read_text())
        meta = value["meta"] if path.suffix == ".pt" else value
        assert meta["format"] == FORMAT and isinstance(meta["made_from"], dict)
    except Exception:  # numpy, torch and json raise many kinds for a damaged file
        sys.exit(f"{path} is damaged, or not a file of this version: run {maker} again")
    for name, fingerprint in meta["made_from"].items():
        folder = args and (args.prep if name == "preprocess.json" else args.run)
        if folder and (not (folder / name).is_file() or file_hash(folder / name) != fingerprint):
            sys.exit(f"{path} was made from another {folder / name}: delete it, run {maker} again")
    return value


def provenance(args, *inputs):
    """Fingerprints of `inputs` [(path, its meta)] and of theirs, the commands so far, versions."""
    made_from, commands = {}, []
    for path, meta in inputs:
        name = path.name if path.parent == args.prep else path.relative_to(args.run).as_posix()
        made_from.update({**meta["made_from"], name: file_hash(path)})
        commands += meta["commands"]
    own = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    again = own in commands and commands[-1] != own  # 03, in a second round
    commands.append(f"{own}  # again" if again else own)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {"format": FORMAT, "made_from": made_from, "commands": list(dict.fromkeys(commands)),
            "versions": versions}


def file_hash(path):
    """First 16 hex digits of a file's sha256."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def load_prep(folder):
    """The arrays of 01: signals [N, 12, 1000] mV (memory-mapped), labels [N, 71]; folds, ecg_ids,
    patient_ids [N]; train, val, test, later [N] bool; row_of {ecg_id: row}; info and its path."""
    path, maker = folder / "preprocess.json", "01_preprocess.py"
    info = load(path, maker)
    prep = SimpleNamespace(info=info, path=path)
    for name, sha256 in info["sha256"].items():
        file = folder / f"{name}.npy"
        setattr(prep, name, load(file, maker))
        whole = len(getattr(prep, name)) == info["records"]
        if not whole or name != "signals" and file_hash(file) != sha256:  # signals: 1 GB
            sys.exit(f"{file} does not belong to {path}: run {maker} again")
    prep.train, prep.val, prep.test = prep.folds <= 8, prep.folds == 9, prep.folds == 10
    prep.later = ~prep.train
    prep.row_of = {e: i for i, e in enumerate(prep.ecg_ids.tolist())}
    return prep


def load_model(path, maker, args):
    """(model in evaluation mode on args.device, its meta) of a joint.pt or projected.pt."""
    saved = load(path, maker, args)
    model = build(saved["meta"])
    model.load_state_dict(saved["state"])
    return model.to(args.device).eval(), saved["meta"]


def build(meta):
    """An untrained model of the architecture that `meta` describes (see 02_train_joint.py)."""
    cfg, kind = Config(**meta["config"]), MODELS[meta["model"]][0]
    if kind == "blackbox":
        return BlackBox(meta["classes"], cfg)
    return ProtoECGNet(kind, meta["classes"], meta["per_class"], cfg)


@torch.no_grad()
def batched(f, prep, rows, device, what=None, batch=256):
    """f(x) over prep.signals[rows] in full batches, so that no result depends on how many rows
    there are; f gives [B, ...] tensors, which are concatenated on the CPU."""
    out, x = [], torch.zeros(batch, len(LEADS), SAMPLES)
    for i in tqdm(range(0, len(rows), batch), what, leave=False, disable=None if what else True):
        part = rows[i:i + batch]
        x[:len(part)] = torch.from_numpy(prep.signals[part])
        out.append(f(x.to(device))[:len(part)].cpu())
        if not out[-1].isfinite().all():
            sys.exit("the network gives no number: run 02_train_joint.py again with a lower lr")
    return torch.cat(out)
