"""What stages share: labels (3.1), settings (Appendix E), model and Eq. (1) (3.3), AUROC;
then finished runs, flags and files.

Shapes: x [B, 12, 1000] mV, z [B, D, L] latents, p [P, D, T] prototypes,
s [B, P] similarities, W [C, F] weights of evidence, y [B, C] labels.
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
from dataclasses import make_dataclass
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

FORMAT = 3  # of files; raise it with their layout
torch.backends.cudnn.allow_tf32 = False  # projection compares cosines near 1

# ---- Labels (3.1, Appendix G), in the order of scp_statements.csv

LEADS = "I II III AVR AVL AVF V1 V2 V3 V4 V5 V6".split()
SAMPLES, RATE = 1000, 100  # 10 s at 100 Hz
CODES = """
    NDT NST_ DIG LNGQT NORM IMI ASMI LVH LAFB ISC_ IRBBB 1AVB IVCD ISCAL CRBBB CLBBB
    ILMI LAO/LAE AMI ALMI ISCIN INJAS LMI ISCIL LPFB ISCAS INJAL ISCLA RVH ANEUR RAO/RAE
    EL WPW ILBBB IPLMI ISCAN IPMI SEHYP INJIN INJLA PMI 3AVB INJIL 2AVB ABQRS PVC STD_
    VCLVH QWAVE LOWT NT_ PAC LPR INVT LVOLT HVOLT TAB_ STE_ PRC(S) SR AFIB STACH SARRH
    SBRAD PACE SVARR BIGU AFLT SVTAC PSVT TRIGU""".split()
_RHYTHM = "1AVB IVCD 3AVB 2AVB".split() + CODES[CODES.index("SR"):]
_GLOBAL = "DIG NORM EL".split()
GROUPS = {
    "rhythm": _RHYTHM,
    "morphology": [c for c in CODES if c not in _RHYTHM + _GLOBAL],
    "global": _GLOBAL,
    "all": CODES}

BRANCHES = ["rhythm", "morphology", "global"]
MODELS = {  # (kind of prototype, label group); 1D never starts from ImageNet
    "rhythm": ("1d", "rhythm"), "morphology": ("partial", "morphology"),
    "global": ("global", "global"), "all-1d": ("1d", "all"),
    "all-partial": ("partial", "all"), "all-global": ("global", "all"),
    "blackbox-1d": ("blackbox", "all"), "blackbox-2d": ("blackbox", "all"),
    **{f"blackbox-{b}": ("blackbox", b) for b in BRANCHES},
}
BOXES = [m for m in MODELS if MODELS[m][0] == "blackbox"]
IMAGENET = "resnet18-f37072fd.pth"  # of 00_download.py --imagenet


def columns(codes):
    """Columns of `codes` in labels and logits."""
    return [CODES.index(c) for c in codes]


def highpass(x):
    """0.5 Hz Butterworth, order 1, zero phase (3.2): x [..., 1000] -> the same."""
    b, a = butter(1, 0.5, "highpass", fs=RATE)
    return filtfilt(b, a, x, axis=-1)


# ---- Settings

SETTINGS = dict(  # ours, the authors'; * from their code, as the paper does not say
    recipe=("default", "paper"),
    seed=(42, 42),
    # Network (3.3)
    width=(32, 64),  # channels of the first stage
    dropout=(0.2, 0.35),  # before the last stage *
    linear_dropout=(0.5, 0.0),  # before the linear layer
    scale_input=(True, False),  # standardise leads, by folds 1-8
    start=("random", "imagenet"),  # of 2D backbones; 1D: random
    pool=("meanmax", "mean"),  # over time; 1D, black boxes
    add_on=("centred", "sigmoid"),  # centred: linear, mean 0, variance 1 *
    latent_dim=(128, 0),  # D; 0: as channels, 512
    per_class=((5, 5, 5), (5, 18, 7)),  # prototypes: 1D, partial, global *
    a=((1.0, 1.0, 1.0), (1.0, 13.0, 4.0)),  # scale of Eq. (1) *
    top_k=(5, 30),  # windows in a partial score; 30: all *
    tie=("class", "none"),  # class: its prototypes share one weight
    # Loss (3.4)
    lambda_clst=(0.02, 0.004),  # * ours: small, as the BCE of rare labels
    lambda_sep=(0.004, 0.0004),  # *
    lambda_div=(0.1, 250.0),  # *
    lambda_cntrst=(0.1, 600.0),  # *
    auxiliary=(1.0, 0.0),  # weight of the BCE of a linear head
    class_weights=(False, True),  # w of Eq. (3) *; ours: of mean 1
    sampler=("shuffle", "shuffle"),  # or weighted: rare labels more often
    # Stage 1 (3.5, Appendix E)
    head=("free", "frozen"),  # whether W learns *
    own=(1.0, 0.0),  # weight of the BCE of own-class weights alone
    head_start=((10.0, 0.0), (1.0, -0.5)),  # W_cp: own class, others
    epochs=(45, 200),
    patience=(45, 10),  # epochs without a better fold 9
    batch=(64, 32),  # *
    lr=(3e-3, 1e-4),  # *
    optimizer=("adamw", "adam"),  # adam: decay is an L2 term
    weight_decay=(0.02, 1.7e-4),  # *
    scheduler=("onecycle", "cosine"),  # or step *
    augment=(True, False),  # 02's augment
    crop=(500, 1000),  # samples, to 4/5 of epochs; global: all
    ema=(0.99, 0.0),  # moving average of weights
    # Stages 2 and 3
    unique=(True, False),  # prototypes of a class lie apart (03)
    own_patient=(False, True),  # prototypes count for their patient
)
Config = make_dataclass(
    "Config", [(k, type(a), a) for k, (a, _) in SETTINGS.items()], frozen=True)
RECIPES = dict(default=Config(), paper=Config(*(b for _, b in SETTINGS.values())))


# ---- Backbone (3.3)

class Conv(nn.Conv1d):
    """A 1D convolution as a faster 2D one of x [1, C, B, L]."""

    def forward(self, x):
        weight, stride = self.weight[:, :, None], (1, *self.stride)
        if weight.requires_grad and not x.is_cuda:  # oneDNN adds 0 times stray NaN
            weight.register_hook(lambda g: g.nan_to_num(0, 0, 0))
        return F.conv2d(x, weight, stride=stride, padding=(0, *self.padding))


class Block(nn.Module):
    """Two convolutions, a shortcut (He et al. 2015); torchvision's names."""

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
        h = self.bn2(self.conv2(h)).add_(self.downsample(x))
        return F.relu(h, inplace=True)


class ResNet18(nn.Module):
    """The paper's 1D and 2D ResNet18: x [B, 12, 1000] -> h [B, 8 * width, 32]. After
    the 12 x 7 stem the 2D one has height 1: only middle rows of kernels meet data."""

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
    """Eq. (1): a times the cosine of every window of z [B, D, L] and every prototype
    p [P, D, T] -> S [B, P, L - T + 1]."""
    windows = z.to(p.dtype).unfold(2, p.shape[2], 1)  # [B, D, L-T+1, T]
    windows = windows.transpose(1, 2).flatten(2)  # [B, L-T+1, D T]
    unit_z = F.normalize(windows, dim=2)  # z / |z|
    unit_p = F.normalize(p.flatten(1))  # p / |p|
    with torch.autocast(z.device.type, enabled=False):  # bf16 blurs cosines near 1
        return a * (unit_z @ unit_p.T).transpose(1, 2)  # Eq. (1)


def pool_over_time(h, how):
    """h [B, D, L] -> mean [B, D, 1]; meanmax: and maximum [B, 2 D, 1]."""
    mean = h.mean(2, keepdim=True)
    return mean if how == "mean" else torch.cat([mean, h.amax(2, keepdim=True)], 1)


class BlackBox(nn.Module):
    """A baseline of 4.3: backbone, pooling over time, linear layer."""

    def __init__(self, classes, cfg):
        super().__init__()
        self.kind, self.classes, self.pool = "blackbox", list(classes), cfg.pool
        self.register_buffer("mean", torch.zeros(12, 1))  # scale_input
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
    """A branch: backbone, add-on, prototypes p [P, D, T], linear head W [C, P] (3.3).

    kind: "1d", "partial" or "global"; per_class [C]: numbers of prototypes.
    p_class [P] says whose a prototype is, p_patient [P] for whom it does not count.
    With cfg.tie = "class" the head sees mean similarities to classes: W = V A^T.
    """

    def __init__(self, kind, classes, per_class, cfg):
        super().__init__(CODES, cfg)  # linear: for Config.auxiliary
        self.kind, self.classes = kind, list(classes)
        self.a = cfg.a[list(WINDOW).index(kind)]
        self.top_k = cfg.top_k if kind == "partial" else 1
        channels = self.linear.in_features if kind == "1d" else self.backbone.channels
        dim = cfg.latent_dim or channels
        p_class = torch.repeat_interleave(torch.as_tensor(per_class))
        self.register_buffer("p_class", p_class)
        self.register_buffer("p_patient", torch.full_like(p_class, -1))
        shape = len(p_class), dim, WINDOW[kind]
        if cfg.add_on == "sigmoid":  # as in the authors' code
            first, second = nn.Conv1d(channels, dim, 1), nn.Conv1d(dim, dim, 1)
            for m in (first, second) if kind != "1d" else ():
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)
            self.add_on = nn.Sequential(first, nn.ReLU(), second, nn.Sigmoid())
            self.p = nn.Parameter(torch.randn(shape))
        else:  # latents share no direction: a cosine can be 0
            self.add_on = nn.Sequential(
                nn.Conv1d(channels, dim, 1, bias=False), nn.BatchNorm1d(dim, affine=False))
            self.p = nn.Parameter(torch.rand(shape) - 0.5)
        of_class = F.one_hot(p_class, len(classes)).float()  # [P, C]
        mean_of = of_class / of_class.sum(0).clamp_min(1)
        A = mean_of if cfg.tie == "class" else torch.eye(len(p_class))
        self.register_buffer("A", A, persistent=False)  # [P, C] or [P, P]
        self.register_buffer("own", of_class.T @ A > 0, persistent=False)  # [C, .]
        self.head = nn.Linear(A.shape[1], len(classes))
        self.head.weight.data = torch.where(self.own, *cfg.head_start)  # W_cp of 3.5
        nn.init.zeros_(self.head.bias)

    def latent(self, x):
        """x [B, 12, 1000] mV -> z [B, D, L]."""
        return self.to_latent(self.features(x))

    def to_latent(self, h):
        """h [B, 8 * width, 32] -> z [B, D, L]; 1D pools over time first: L = 1."""
        return self.add_on(pool_over_time(h, self.pool) if self.kind == "1d" else h)

    def scores(self, z):
        """z [B, D, L] -> s [B, P], the mean of the top-k windows (1D, global have 1)."""
        S = similarity(z, self.p, self.a)  # [B, P, windows]
        k = min(self.top_k, S.shape[2])
        return S.mean(2) if k == S.shape[2] else S.topk(k).values.mean(2)

    def logits(self, s, own=False):
        """s [B, P] -> logits [B, C], with `own` of own-class weights alone."""
        V = self.head.weight * self.own if own else self.head.weight
        with torch.autocast(s.device.type, enabled=False):  # bf16 is too coarse
            return F.linear(s @ self.A, V, self.head.bias)

    def forward(self, x):
        return self.logits(self.scores(self.latent(x)))


def window_samples(kind, window):
    """(first, end) sample of a latent window (Appendix D): of a partial one 0.94 s around
    the middle of its three steps of 32 samples; else all."""
    if kind != "partial":
        return 0, SAMPLES
    centre = 32 * (window + 1)
    return max(0, centre - 47), min(SAMPLES, centre + 47)


# ---- AUROC (3.1)

def auroc(y, score):
    """AUROC of columns (Mann-Whitney): y, score [N, C] -> [C]; NaN if all y agree."""
    y = np.asarray(y, bool)
    ranks = rankdata(score, axis=0)
    positive = y.sum(0)
    negative = len(y) - positive
    with np.errstate(all="ignore"):
        wins = (ranks * y).sum(0) - positive * (positive + 1) / 2
        return wins / (positive * negative)


def macro_auroc(y, score):
    """Mean AUROC over columns with both classes; NaN if none has."""
    each = auroc(y, score)
    return float(np.nanmean(each)) if np.isfinite(each).any() else np.nan


# ---- A finished run, for 06 and notebooks

def load_run(run, models=None, device="cpu"):
    """The classifiers of a run: `models`, or its fusion, or else each model's own.

    Each has name, classes [C], W [C, F], b [C], mean, std [F], thresholds [C] on the
    logit, pieces [F] (classes), A [P, F] (whose mean similarity a piece is),
    descriptions {code: text}, mark (of other data than PTB-XL), networks,
    prototypes [P]: dicts of prototypes.json with the ECG x [12, 1000] mV.
    """
    args = SimpleNamespace(run=Path(run), prep=None, device=torch.device(device))
    fusion = ["fusion"] if (args.run / "classifiers/fusion.pt").is_file() else None
    heads = []
    for name in models or fusion or trained_models(args.run):
        saved = load(args.run / f"classifiers/{name}.pt", "04_fusion.py", args)
        head = SimpleNamespace(**saved.pop("meta"), networks=[], prototypes=[])
        vars(head).update({k: v.numpy() for k, v in saved.items()})
        for branch in head.branches:
            folder, maker = args.run / branch, "03_project.py"
            head.networks.append(load_model(folder / "projected.pt", maker, args)[0])
            info = load(folder / "prototypes.json", maker, args)
            ecgs = load(folder / "prototypes.npy.gz", maker)  # uV
            head.prototypes += [
                {**q, "x": x / 1000} for q, x in zip(info["prototypes"], ecgs)]
            head.descriptions, data = info["descriptions"], info["data"]
            head.mark = "" if data == "PTB-XL v1.0.3" else f"{data}: "
        heads.append(head)
    return heads


@torch.no_grad()
def similarities(head, x):
    """x [B, 12, 1000] mV, filtered -> s [B, P] of all branches, Eq. (9)."""
    x = torch.as_tensor(x).to(head.networks[0].p)
    s = [n.scores(n.latent(x)).cpu() for n in head.networks]
    return torch.cat(s, 1).double().numpy()


def evidence(s, A, counts=True):
    """s [N, P] -> means [N, F] over those prototypes of a piece (A [P, F]) that count
    [N, P]; NaN where none does."""
    counts = np.broadcast_to(counts, s.shape).astype(float)
    with np.errstate(invalid="ignore"):
        return (s * counts) @ A / (counts @ A)


def explain(heads, x, patient=None):
    """What classifiers say of x [12, 1000] mV, filtered, and why: a dict a label, the most
    probable first. `pieces`, largest first, their prototypes nearest first, lead from
    the average training record's logit to `logit`; none of `patient` counts."""
    results = []
    for head in heads:
        s = similarities(head, np.array(x)[None])[0]  # [P]
        counts = np.array([q["patient"] < 0 or q["patient"] != patient for q in head.prototypes])
        mean_s = evidence(s[None], head.A, counts)[0]  # [F]
        terms = head.W * np.nan_to_num((mean_s - head.mean) / head.std)  # [C, F]
        logits = head.b + terms.sum(1)  # Eq. (10)
        pieces = _pieces(head, s, mean_s, counts)
        for c, code in enumerate(head.classes):
            p, threshold = expit([logits[c], head.thresholds[c]])
            largest = np.argsort(-abs(terms[c]), kind="stable")
            results.append(dict(
                label=code, classifier=head.name, probability=p, threshold=threshold,
                predicted=bool(p >= threshold), logit=logits[c], average=head.b[c], pieces=[
                    {**pieces[f], "weight": head.W[c, f], "contribution": terms[c, f]}
                    for f in largest if head.W[c, f] and pieces[f]["prototypes"]]))
    return sorted(results, key=lambda r: -r["probability"])


def _pieces(head, s, mean_s, counts):
    """What similarities s [P], their means mean_s [F] say of each class."""
    nearest = [j for j in np.argsort(-s, kind="stable") if counts[j]]
    known = [{k: q[k] for k in ("model", "index", "ecg_id")} for q in head.prototypes]
    pieces = []
    for f, code in enumerate(head.pieces):
        like = "like" if mean_s[f] > head.mean[f] else "unlike"
        pieces.append({
            "class": code, "claim": f"{like} {code}", "similarity": mean_s[f],
            "mean": head.mean[f], "std": head.std[f], "prototypes": [
                {**known[j], "similarity": s[j]} for j in nearest if head.A[j, f]]})
    return pieces


def predict(heads, x):
    """x [B, 12, 1000] mV, filtered -> probabilities [B, 71]; NaN: not modelled."""
    out = np.full((len(x), len(CODES)), np.nan)
    for head in heads:
        X = (evidence(similarities(head, x), head.A) - head.mean) / head.std
        out[:, columns(head.classes)] = expit(X @ head.W.T + head.b)
    return out


# ---- Command line: flags are the same in all stages

FLAGS = dict(
    data=dict(type=Path, help="folder of records (default data/ptbxl)"),
    prep=dict(type=Path, help="folder of arrays (default runs/prep)"),
    run=dict(type=Path, help="folder of a run (default runs/RECIPE)"),
    recipe=dict(choices=[*RECIPES], help="ours (default), or the authors'"),
    model=dict(
        nargs="+", choices=[*MODELS], metavar="MODEL",
        help=f"some of {', '.join(MODELS)} (default: branches, or all in RUN)"),
    seed=dict(type=int, default=42, help="of everything random (default 42)"),
    device=dict(help="cpu, or cuda (default if there is one)"),
    threads=dict(type=int, help="CPU threads (default: all; if busy: 1)"),
    demo=dict(action="store_true", help="small, synthetic, in own folders"),
)
RUN_FLAGS = "prep", "run", "recipe", "model", "device", "threads", "demo"


def argument_parser(doc, *flags):
    """A parser of some FLAGS, whose --help is a stage's docstring."""
    p = argparse.ArgumentParser(
        usage="%(prog)s ...", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in flags:
        p.add_argument(f"--{name}", **FLAGS[name])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.set_defaults(recipe="default", threads=None, demo=False, device=device)
    return p


def parse(p):
    """A stage's `args`, with default folders; sets threads and device."""
    args = p.parse_args()
    for stream in (sys.stdout, sys.stderr):  # consoles may lack letters
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    usual = dict(data="data/ptbxl", prep="runs/prep", run=f"runs/{args.recipe}")
    if args.demo:
        run = dict(default="runs/demo", paper="runs/demo-paper")[args.recipe]
        usual = dict(data="data/demo", prep="runs/demo-prep", run=run)
    for k, folder in usual.items():
        setattr(args, k, getattr(args, k, None) or Path(folder))
    torch.set_flush_denormal(True)  # weights below 1e-38 are slow
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if libc.mallopt(-3, 2**25):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD:
            libc.mallopt(-1, 2**31 - 1)  # keep memory; new pages cost a fifth of a step
    try:
        args.device = torch.device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
            threadpool_limits(args.threads, user_api="blas")
    except RuntimeError as e:
        p.error(f"--device, --threads: {e}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no GPU; try cpu")
    return args


def trained_models(run):
    """The prototype models of a run, as in MODELS."""
    names = [m for m in MODELS if m not in BOXES and (run / m / "joint.pt").is_file()]
    return names or sys.exit(f"{run} holds no branch: run 02_train_joint.py first")


def run(main):
    """Call main(); Ctrl-C and the system's errors are one sentence."""
    try:
        main()
    except (KeyboardInterrupt, OSError) as e:
        sys.exit(str(e) or "\ninterrupted: give the command again")


# ---- Files: whole or not written; each says what it was made from

def save(path, value):
    """Write .npy, .npy.gz, .pt, .json, text or bytes: all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # else torch stores the temporary name
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
    """The value of a file of stage `maker`; exits if it is missing or damaged and, with
    `args`, if what it was made from has changed."""
    if not path.is_file():
        sys.exit(f"{path} is missing: run {maker} first")
    try:
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, "c")  # no pickle
        if path.suffix == ".gz":
            return np.lib.format.read_array(gzip.open(path), allow_pickle=False)
        if path.suffix == ".pt":
            value = torch.load(path, map_location="cpu", weights_only=True)
        else:
            value = json.loads(path.read_text())
        meta = value["meta"] if path.suffix == ".pt" else value
        assert meta["format"] == FORMAT and isinstance(meta["made_from"], dict)
    except Exception:  # of many kinds
        sys.exit(f"{path} is damaged or of another version: run {maker} again")
    for name, hashed in meta["made_from"].items():
        folder = args and (args.prep if name == "preprocess.json" else args.run)
        source = folder and folder / name
        if source and (not source.is_file() or file_hash(source) != hashed):
            sys.exit(f"{path} was made from another {source}: delete it, run {maker} again")
    return value


def provenance(args, *inputs):
    """Hashes of `inputs` [(path, meta)] and of their inputs; commands; versions."""
    made_from, commands = {}, []
    for path, meta in inputs:
        folder = args.prep if path.parent == args.prep else args.run
        name = path.relative_to(folder).as_posix()
        made_from.update({**meta["made_from"], name: file_hash(path)})
        commands += meta["commands"]
    own = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    again = own in commands and commands[-1] != own  # 03, in round 2
    commands.append(f"{own}  # again" if again else own)
    versions = dict(python=platform.python_version(), torch=str(torch.__version__))
    return dict(format=FORMAT, made_from=made_from, versions=versions,
                commands=[*dict.fromkeys(commands)])


def file_hash(path):
    """First 16 hex digits of a file's sha256."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def load_prep(folder):
    """The arrays of 01: signals [N, 12, 1000] mV, memory-mapped; labels [N, 71]; folds,
    ecg_ids, patient_ids [N]; train, val, test, later [N] bool; row_of {ecg_id: row}."""
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
    """(model in evaluation mode, meta) of joint.pt or projected.pt."""
    saved = load(path, maker, args)
    model = build(saved["meta"])
    model.load_state_dict(saved["state"])
    return model.to(args.device).eval(), saved["meta"]


def build(meta):
    """An untrained model of `meta` (02's describe)."""
    cfg, kind = Config(**meta["config"]), MODELS[meta["model"]][0]
    if kind == "blackbox":
        return BlackBox(meta["classes"], cfg)
    return ProtoECGNet(kind, meta["classes"], meta["per_class"], cfg)


@torch.no_grad()
def batched(f, prep, rows, device, what=None, batch=256):
    """f(x) [B, ...] over prep.signals[rows]; batches are full, so that results agree."""
    out, x = [], torch.zeros(batch, len(LEADS), SAMPLES)
    for i in tqdm(range(0, len(rows), batch), what, leave=False, disable=None):
        part = rows[i:i + batch]
        x[:len(part)] = torch.from_numpy(prep.signals[part])
        out.append(f(x.to(device))[:len(part)].cpu())
        if not out[-1].isfinite().all():
            sys.exit("the network gives NaN: run 02_train_joint.py with a lower lr")
    return torch.cat(out)
