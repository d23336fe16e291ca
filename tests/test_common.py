"""common.py: every equation against a slow double loop written from the paper, the network against the literal 2D one,
projection against brute force, AUROC against scikit-learn, and artifacts under every kind of damage."""
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

import common
from common import CODES, GROUPS, PAPER, Config
from conftest import arguments, sentence, stage, write_run


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- Labels and settings

def test_labels_are_16_52_3_disjoint_with_union_71():
    rhythm, morphology, global_ = (GROUPS[g] for g in ("rhythm", "morphology", "global"))
    assert (len(rhythm), len(morphology), len(global_)) == (16, 52, 3)
    assert len(CODES) == len(set(CODES)) == len(set(rhythm) | set(morphology) | set(global_)) == 71
    assert sorted(rhythm) == ("1AVB 2AVB 3AVB AFIB AFLT BIGU IVCD PACE PSVT SARRH SBRAD SR STACH SVARR SVTAC "
                              "TRIGU").split()
    assert set(global_) == {"DIG", "EL", "NORM"}
    assert {"INVT", "ISC_", "NST_", "STD_", "STE_", "TAB_", "NT_", "LAO/LAE", "PRC(S)"} <= set(morphology)
    for group in GROUPS.values():
        assert list(group) == sorted(group, key=CODES.index)  # columns in the order of scp_statements.csv
        assert [CODES[c] for c in common.columns(group)] == list(group)


def test_paper_recipe_has_the_authors_numbers():
    assert PAPER.per_class == (5, 18, 7) and PAPER.a == (1.0, 13.0, 4.0) and PAPER.top_k == 30
    assert PAPER.lambdas == (0.004, 0.0004, 250.0, 600.0)
    assert (PAPER.lr, PAPER.batch, PAPER.dropout, PAPER.weight_decay, PAPER.seed) == (1e-4, 32, 0.35, 1.7e-4, 42)
    assert not PAPER.scale_input and PAPER.add_on == "sigmoid" and PAPER.head == "frozen" and PAPER.rounds == 2
    assert (PAPER.optimizer, PAPER.scheduler, PAPER.epochs, PAPER.patience) == ("adam", "cosine", 200, 10)
    assert (PAPER.start, PAPER.prototypes, PAPER.pool, PAPER.class_weights) == ("imagenet", "random", "mean", True)
    assert not (PAPER.augment or PAPER.project_every or PAPER.unique or PAPER.blackbox_ema) and PAPER.own_patient


# ---- Eq. (1)

def slow_similarity(z, p, a):
    """Eq. (1) for every window: the patch and the prototype flattened, normalised, multiplied."""
    z, p = z.double().numpy(), p.double().numpy()
    B, D, L = z.shape
    P, _, T = p.shape
    S = np.zeros((B, P, L - T + 1))
    for i in range(B):
        for j in range(P):
            for t in range(L - T + 1):
                patch, proto = z[i, :, t:t + T].reshape(-1), p[j].reshape(-1)
                S[i, j, t] = sum(a * u * v for u, v in zip(patch / math.sqrt((patch * patch).sum()),
                                                          proto / math.sqrt((proto * proto).sum())))
    return S


SHAPES = [(1, 1, 1.0), (3, 9, 13.0), (32, 32, 4.0)]  # T, L, a


@pytest.mark.parametrize("T, L, a", SHAPES)
def test_similarity_equals_explicit_windows(T, L, a):
    z, p = random(3, 5, L, seed=1) * 3 + 1, random(4, 5, T, seed=2)
    S = common.similarity(z.float(), p.float(), a)
    assert S.shape == (3, 4, L - T + 1) and S.dtype == torch.float32
    np.testing.assert_allclose(S.numpy(), slow_similarity(z.float(), p.float(), a), rtol=0, atol=1e-6 * a)


@pytest.mark.parametrize("T, L, a", SHAPES)
def test_similarity_in_float64(T, L, a):
    z, p = random(2, 5, L, seed=1), random(4, 5, T, seed=2)
    S = common.similarity(z, p, a)
    assert S.dtype == torch.float64
    np.testing.assert_allclose(S.numpy(), slow_similarity(z, p, a), rtol=0, atol=1e-12 * a)


def test_similarity_ignores_length_and_is_a_for_itself():
    z, p = random(2, 5, 9, dtype=torch.float32), random(4, 5, 3, seed=2, dtype=torch.float32)
    torch.testing.assert_close(common.similarity(7 * z, 0.01 * p, 2.0), common.similarity(z, p, 2.0))
    torch.testing.assert_close(common.similarity(z[:1], z[:1, :, 4:7], 13.0)[0, 0, 4], torch.tensor(13.0))
    assert (common.similarity(torch.zeros(1, 5, 9), p) == 0).all()  # an empty latent resembles nothing; no NaN


@pytest.mark.parametrize("T, L, a", [(1, 1, 1.0), (3, 6, 13.0), (5, 5, 4.0)])
def test_similarity_gradcheck(T, L, a):
    z, p = random(2, 3, L, seed=3).requires_grad_(), random(2, 3, T, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, p: common.similarity(z, p, a), (z, p))


def small_model(kind, cfg=Config(width=2, per_class=(2, 3, 2)), classes=("SR", "AFIB", "IMI"), per_class=(2, 3, 2)):
    torch.manual_seed(1)
    return common.ProtoECGNet(kind, classes, per_class, cfg, latent_dim=5).eval()


@pytest.mark.parametrize("k", [1, 5, 30, 99])
def test_partial_score_is_the_mean_of_the_top_k_windows(k):
    model = small_model("partial", Config(width=2, top_k=k, a=(1.0, 13.0, 4.0)))
    z = random(3, 5, 32, seed=5, dtype=torch.float32)
    S = slow_similarity(z, model.p.data, 13.0)
    assert S.shape[2] == 30
    slow = [[sum(sorted(windows, reverse=True)[:k]) / min(k, 30) for windows in record] for record in S]
    np.testing.assert_allclose(model.scores(z).detach(), slow, atol=1e-5)


@pytest.mark.parametrize("kind, L, a", [("1d", 1, 1.0), ("global", 32, 4.0)])
def test_global_prototypes_have_one_window(kind, L, a):
    model = small_model(kind, Config(width=2, a=(1.0, 13.0, 4.0)))
    z = random(3, 5, L, seed=5, dtype=torch.float32)
    np.testing.assert_allclose(model.scores(z).detach(), slow_similarity(z, model.p.data, a)[:, :, 0], atol=1e-5)


@pytest.mark.parametrize("kind", common.WINDOW)
def test_similarities_and_head_are_float32_under_autocast(kind):
    """With W of 1 / -0.5 over hundreds of prototypes, logits differ by less than bf16 resolves."""
    model = small_model(kind)
    model.head.weight.data *= 1e4
    x = random(2, 12, 1000, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits, s = model(x)
    assert logits.dtype == s.dtype == torch.float32
    torch.testing.assert_close(logits, model.head(s), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", common.WINDOW)
@pytest.mark.parametrize("recipe", common.RECIPES)
def test_model_shapes_and_head_start(kind, recipe):
    cfg = replace(common.RECIPES[recipe], width=2)
    model = common.ProtoECGNet(kind, ["SR", "AFIB", "IMI"], [2, 0, 1], cfg).eval()
    assert model.p_class.tolist() == [0, 0, 2]
    assert model.head.weight.tolist() == [[1, 1, -0.5], [-0.5, -0.5, -0.5], [-0.5, -0.5, 1]]
    assert model.head.bias.tolist() == [0, 0, 0]
    assert model.p.shape[2] == {"1d": 1, "partial": 3, "global": 32}[kind]
    with torch.no_grad():
        x = random(2, 12, 1000, dtype=torch.float32)
        logits, s = model(x)
        z = model.latent(x)
    assert logits.shape == (2, 3) and s.shape == (2, 3)
    assert z.shape[2] == (1 if kind == "1d" else 32)
    torch.testing.assert_close(logits, s @ model.head.weight.detach().T)
    if recipe == "paper":
        assert ((z >= 0) & (z <= 1)).all()  # sigmoid add-on


@pytest.mark.parametrize("how", ["mean", "meanmax"])
def test_pooling_over_time(how):
    h = random(2, 3, 7)
    pooled = common.pool_over_time(h, how)
    mean = [[sum(row) / 7 for row in record] for record in h.tolist()]
    want = mean if how == "mean" else [m + [max(row) for row in record] for m, record in zip(mean, h.tolist())]
    torch.testing.assert_close(pooled, torch.tensor(want, dtype=h.dtype)[:, :, None])


def test_scaler_is_per_lead():
    mean, std = list(range(12)), list(range(1, 13))
    x = random(2, 12, 1000, dtype=torch.float32)
    scaled = common.Scaler(mean, std)(x)
    for lead in range(12):
        torch.testing.assert_close(scaled[:, lead], (x[:, lead] - mean[lead]) / std[lead])
    assert torch.equal(common.Scaler()(x), x)


def test_sample_range_of_a_latent_window():
    ranges = [common.window_samples("partial", k) for k in range(30)]
    assert ranges[0] == (0, 79) and ranges[1] == (17, 111) and ranges[14] == (433, 527) and ranges[29] == (913, 1000)
    for k, (first, end) in enumerate(ranges):
        samples = [t for t in range(1000) if 32 * (k + 1) - 47 <= t < 32 * (k + 1) + 47]  # centre of step k + 1, 0.94 s
        assert (first, end) == (samples[0], samples[-1] + 1)
    assert common.window_samples("1d", 0) == common.window_samples("global", 0) == (0, 1000)


# ---- Eq. (2)-(7)

def slow_loss(logits, s, y, p, p_class, jaccard, lambdas, w):
    """The paper's loss, term by term; the BCE also divided by the number of classes, as composite_loss says."""
    logits, s, y, p = (t.detach().double().numpy() for t in (logits, s, y, p))
    N, C, P = len(y), y.shape[1], len(p)
    bce = clst = sep = div = 0.0
    for i in range(N):
        for j in range(C):                                                                          # Eq. (3)
            prob = 1 / (1 + math.exp(-logits[i, j]))
            term = y[i, j] * math.log(prob) + (1 - y[i, j]) * math.log(1 - prob)
            bce -= (1 if w is None else float(w[j])) * term / N / C
        positive = [s[i, q] for q in range(P) if y[i, p_class[q]] == 1]
        negative = [s[i, q] for q in range(P) if y[i, p_class[q]] == 0]
        clst -= max(positive) / N if positive else 0                                                # Eq. (4)
        sep += max(negative) / N if negative else 0                                                 # Eq. (5)
    unit = [p[q].reshape(-1) / math.sqrt((p[q] ** 2).sum()) for q in range(P)]
    near = near_sum = far = far_sum = 0.0
    for q in range(P):
        for r in range(P):
            S, C_qr = float((unit[q] * unit[r]).sum()), float(jaccard[p_class[q], p_class[r]])
            div += (S - (q == r)) ** 2                                                              # Eq. (6)
            near, near_sum = near + C_qr * S, near_sum + C_qr
            far, far_sum = far + (1 - C_qr) * S, far_sum + (1 - C_qr)
    cntrst = -(near / near_sum - (far / far_sum if far_sum else 0)) / 2                             # Eq. (7)
    total = bce + lambdas[0] * clst + lambdas[1] * sep + lambdas[2] / P**2 * div + lambdas[3] / math.sqrt(P) * cntrst
    return dict(total=total, bce=bce, clst=clst, sep=sep, div=div, cntrst=cntrst)


def loss_case(name):
    """(logits, s, y, p, p_class, jaccard) in float64 of one situation."""
    g = torch.Generator().manual_seed(7)
    N, per_class = 6, [2, 3, 1, 2]
    if name == "one record":
        N = 1
    if name == "class without prototypes":
        per_class = [2, 0, 3, 0]
    if name == "one class":
        per_class = [4]
    C = len(per_class)
    p_class = torch.repeat_interleave(torch.arange(C), torch.tensor(per_class))
    y = (torch.rand(N, C, generator=g) < 0.5).double()
    y[0] = torch.tensor([1.0, 0, 1, 0][:C])
    if name == "records without a positive":
        y[1], y[4] = 0, 0
    if name == "only records without a positive":
        y[:] = 0
    if name == "records with all labels":
        y[0], y[3] = 1, 1
    if name == "only records with all labels":
        y[:] = 1
    if name == "class without prototypes":
        y[2] = torch.tensor([0.0, 1, 0, 1])  # a positive record, but nothing to cluster around
    s = torch.rand(N, len(p_class), generator=g, dtype=torch.float64) * 2 - 1
    if name == "negative similarities":  # a mask of 0 instead of -inf would win the maximum
        s = s.abs().neg() - 0.1
    J = torch.rand(C, C, generator=g, dtype=torch.float64)
    J = (J + J.T) / 2
    J.fill_diagonal_(1)
    return (torch.randn(N, C, generator=g, dtype=torch.float64) * 2, s, y,
            torch.randn(len(p_class), 4, 3, generator=g, dtype=torch.float64), p_class, J)


CASES = ["ordinary", "one record", "records without a positive", "only records without a positive", "one class",
         "records with all labels", "only records with all labels", "class without prototypes", "negative similarities"]
LAMBDAS = (0.5, 0.1, 7.0, 3.0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_loss_equals_the_double_loop(name, weighted):
    logits, s, y, p, p_class, J = loss_case(name)
    w = torch.linspace(0.5, 30, y.shape[1], dtype=torch.float64) if weighted else None
    fast = common.composite_loss(logits, s, y, p, p_class, J, LAMBDAS, w)
    slow = slow_loss(logits, s, y, p, p_class.tolist(), J, LAMBDAS, w)
    assert list(fast) == list(slow)
    for term in slow:
        assert float(fast[term]) == pytest.approx(slow[term], rel=1e-12, abs=1e-13), term


@pytest.mark.parametrize("name", CASES)
def test_loss_gradcheck(name):
    logits, s, y, p, p_class, J = loss_case(name)
    w = torch.linspace(0.5, 30, y.shape[1], dtype=torch.float64)
    for t in (logits, s, p):
        t.requires_grad_()
    every = lambda logits, s, p: tuple(common.composite_loss(logits, s, y, p, p_class, J, LAMBDAS, w).values())
    assert torch.autograd.gradcheck(every, (logits, s, p))


def test_records_with_nothing_to_choose_from_have_no_gradient():
    logits, s, y, p, p_class, J = loss_case("ordinary")
    y[1], y[3] = 0, 1
    s.requires_grad_()
    terms = common.composite_loss(logits, s, y, p, p_class, J, LAMBDAS)
    clst, sep = (torch.autograd.grad(terms[t], s, retain_graph=True)[0] for t in ("clst", "sep"))
    assert clst.isfinite().all() and sep.isfinite().all()
    assert (clst[1] == 0).all() and (sep[3] == 0).all()
    assert (clst[[0, 3]].sum(1) == -1 / 6).all() and (sep[[0, 1]].sum(1) - 1 / 6).abs().max() < 1e-15


def test_lambdas_of_the_paper_recipe_are_the_authors():
    logits, s, y, p, p_class, J = loss_case("ordinary")
    t = common.composite_loss(logits, s, y, p, p_class, J, PAPER.lambdas)
    P = len(p)  # paper_facts 4: 250 with 1 / P^2, 300 with 1 / sqrt(P) in place of the paper's 1/2
    want = t["bce"] + 0.004 * t["clst"] + 0.0004 * t["sep"] + 250 * t["div"] / P**2 + 600 * t["cntrst"] / math.sqrt(P)
    assert float(t["total"]) == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize("kind, T", [("1d", 1), ("partial", 3), ("global", 6)])
def test_gradcheck_of_a_branch_from_latent_to_loss(kind, T):
    """The whole of 3.3-3.4 in float64: latents -> Eq. (1) -> top-k mean -> head -> Eq. (2)."""
    _, _, y, _, p_class, J = loss_case("records without a positive")
    z, p = random(6, 3, T if kind != "partial" else 6, seed=8), random(len(p_class), 3, T, seed=9)
    W = random(4, len(p_class), seed=10)

    def total(z, p, W):
        s = common.similarity(z, p, 2.0)
        s = s.topk(min(2, s.shape[2]), dim=2).values.mean(2)
        return common.composite_loss(s @ W.T, s, y, p, p_class, J, LAMBDAS)["total"]

    assert torch.autograd.gradcheck(total, tuple(t.requires_grad_() for t in (z, p, W)))


# ---- Backbone: the 2D network taken literally

class Block2D(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class LiteralResNet2D(nn.Module):
    """torchvision's ResNet18 (its key names) with the paper's stem: one input channel, 12 x 7, stride (1, 2)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, (12, 7), (1, 2), (0, 3), bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block2D(64, 64, 1), Block2D(64, 64, 1))
        self.layer2 = nn.Sequential(Block2D(64, 128, 2), Block2D(128, 128, 1))
        self.layer3 = nn.Sequential(Block2D(128, 256, 2), Block2D(256, 256, 1))
        self.layer4 = nn.Sequential(Block2D(256, 512, 2), Block2D(512, 512, 1))

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


@pytest.fixture(scope="module")
def both_networks(tmp_path_factory):
    """(literal 2D network, ours started from its weights by load_imagenet), in float64."""
    torch.manual_seed(3)
    literal = LiteralResNet2D().double()
    for name, value in literal.state_dict().items():  # no statistics of batch norm at their neutral start
        if name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.2)
        if name.endswith("running_var") or ("bn" in name or "downsample.1" in name) and name.endswith("weight"):
            value.uniform_(0.5, 1.5)
    state = literal.state_dict()
    torchvision = {**state, "conv1.weight": torch.randn(64, 3, 7, 7), "fc.weight": torch.randn(1000, 512),
                   "fc.bias": torch.randn(1000)}  # the three tensors of torchvision's file that do not fit
    ours = common.ResNet18().double()
    stem = ours.conv1.weight.detach().clone()
    path = tmp_path_factory.mktemp("imagenet") / "weights.pth"
    torch.save(torchvision, path)
    stage("02_train_joint").load_imagenet(ours, path)
    assert torch.equal(ours.conv1.weight, stem), "the 12-lead stem stays random"
    ours.conv1.weight.data = state["conv1.weight"][:, 0].clone()
    return literal, ours


@pytest.mark.parametrize("training", [False, True])
def test_1d_network_equals_the_literal_2d_network(both_networks, training):
    literal, ours = both_networks
    x = random(2, 12, 1000, seed=11)
    states = [{k: v.clone() for k, v in net.state_dict().items()} for net in both_networks]
    with torch.no_grad():
        h2, h1 = literal.train(training)(x[:, None]), ours.train(training)(x)
    assert h2.shape == (2, 512, 1, 32) and h1.shape == (2, 512, 32)
    assert h1.abs().max() > 0.1
    assert (h1 - h2[:, :, 0]).abs().max() <= 1e-12 * h2.abs().max()
    for net, before in zip(both_networks, states):
        net.load_state_dict(before)


def test_off_row_weights_of_the_2d_network_do_nothing(both_networks):
    literal, ours = both_networks
    x = random(2, 12, 1000, seed=11)
    literal.eval().zero_grad(), ours.eval().zero_grad()
    probe = random(2, 512, 32, seed=12)
    (literal(x[:, None])[:, :, 0] * probe).sum().backward()
    (ours(x) * probe).sum().backward()
    theirs = dict(literal.named_parameters())
    seen = 0
    for name, p in ours.named_parameters():
        g = theirs[name].grad
        if name == "conv1.weight":
            g = g[:, 0]
        elif g.ndim == 4:
            if g.shape[2] == 3:
                assert (g[:, :, 0] == 0).all() and (g[:, :, 2] == 0).all(), name
                seen += 1
            g = g[:, :, g.shape[2] // 2]
        assert (g - p.grad).abs().max() <= 1e-10 * g.abs().max(), name
    assert seen == 16


def test_backbone_size_and_map_length():
    net = common.ResNet18().eval()
    assert sum(p.numel() for p in net.parameters()) == 3_848_832
    lengths = []
    for part in (net.conv1, net.layer1, net.layer2, net.layer3, net.layer4):
        part.register_forward_hook(lambda m, i, o: lengths.append(o.shape[3]))
    with torch.no_grad():
        assert net(torch.zeros(1, 12, 1000)).shape == (1, 512, 32)
        assert common.ResNet18(width=16).eval()(torch.zeros(3, 12, 1000)).shape == (3, 128, 32)
    assert lengths == [500, 250, 125, 63, 32]


def test_dropout_stands_before_the_last_stage():
    net, seen = common.ResNet18(width=16, dropout=0.5).train(), []
    net.layer4.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    net.layer3.register_forward_hook(lambda m, i, o: seen.append(o))
    net(random(4, 12, 1000, dtype=torch.float32))
    before, after = seen[0], seen[1]
    dropped = (after == 0) & (before != 0)
    assert 0.3 < dropped.float().sum() / (before != 0).sum() < 0.7
    assert torch.equal(after[~dropped], 2 * before[~dropped])


@pytest.mark.parametrize("pool, share", [("meanmax", 0.5), ("mean", 0.0)])
def test_a_black_box_of_two_poolings_has_dropout_before_its_head(pool, share):
    net, heads = common.BlackBox(["SR", "AFIB"], Config(width=16, pool=pool, dropout=0.0)), []
    net.head.register_forward_pre_hook(lambda m, i: heads.append(i[0]))
    x = random(8, 12, 1000, dtype=torch.float32)
    pooled = net.train()(x)[1]
    dropped = (heads[0] == 0) & (pooled != 0)
    assert abs(dropped.float().sum() / (pooled != 0).sum() - share) < 0.1
    assert torch.equal(heads[0][~dropped], pooled[~dropped] / (1 - share))
    pooled = net.eval()(x)[1]
    assert torch.equal(heads[1], pooled)


# ---- Eq. (8)

def brute_force(z, carries, ids, p, p_class, unique=False, runners=0):
    """Eq. (8) written out: every window of every record of the class, in float64; values within 1e-5 are equal."""
    z, p64 = z.double().numpy(), p.double().numpy()
    P, _, T = p.shape
    found = [None] * P
    for c in sorted(set(p_class.tolist())):
        own = [j for j in range(P) if int(p_class[j]) == c]
        table = {}  # prototype -> [(-cosine rounded, ecg_id, window, cosine)], best first
        for j in own:
            unit = p64[j].reshape(-1) / np.linalg.norm(p64[j])
            table[j] = []
            for r in range(len(z)):
                for t in range(z.shape[2] - T + 1) if carries[r, c] else ():
                    patch = z[r, :, t:t + T].reshape(-1)
                    cosine = float(patch @ unit / np.linalg.norm(patch))
                    table[j].append((-round(cosine, 5), int(ids[r]), t, cosine))
            table[j].sort()
        taken = set()
        for j in sorted(own, key=lambda j: (table[j][0][0], j)):
            choice = next((row for row in table[j] if not unique or row[1:3] not in taken), table[j][0])
            taken.add(choice[1:3])
            best_of = {}
            for row in table[j]:
                best_of.setdefault(row[1], row)
            others = [row for row in best_of.values() if row[1] != choice[1]][:runners]
            found[j] = [row[1:] for row in [choice, *others]]
    return found


def same_found(found, want):
    assert [[f[:2] for f in each] for each in found] == [[f[:2] for f in each] for each in want]
    for each, other in zip(found, want):
        np.testing.assert_allclose([f[2] for f in each], [f[2] for f in other], atol=1e-5)


def project_by_class(z_of_class, ids_of_class, p, p_class, unique=False, runners=0):
    """common.project() with latents and ecg_ids given class by class, as the tests below plant them."""
    projected, found = p.clone(), [None] * len(p)
    for c in p_class.unique().tolist():
        own, z, ids = torch.where(p_class == c)[0], z_of_class(c), ids_of_class(c)
        all_carry = np.ones((len(z), 1), bool)
        zeros = torch.zeros(len(own), dtype=int)
        projected[own], some = common.project(z, all_carry, ids, p[own], zeros, unique, runners)
        for j, f in zip(own.tolist(), some):
            found[j] = f
    return projected, found


def planted(n, D, L, T, per_class, seed=0, copies=4):
    """(z, carries, ids, p, p_class): latents where `copies` windows hold each prototype exactly, so ties at cosine 1,
    some of them in records that do not carry the class."""
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    p_class = torch.repeat_interleave(torch.arange(len(per_class)), torch.tensor(per_class))
    p, z = torch.randn(len(p_class), D, T, generator=g), torch.randn(n, D, L, generator=g)
    carries = rng.random((n, len(per_class))) < 0.6
    carries[:5] = True
    for j in range(len(p)):
        for r, t in zip(rng.integers(n, size=copies), rng.integers(L - T + 1, size=copies)):
            z[r, :, t:t + T] = p[j]
    return z, carries, np.sort(rng.choice(10 * n, n, replace=False)), p, p_class


def one_class(z, ids):
    return z, np.ones((len(z), 1), bool), np.asarray(ids)


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("D, L, T", [(4, 6, 3), (6, 1, 1), (3, 5, 5)])
def test_projection_equals_brute_force_with_ties(D, L, T, unique):
    for seed in range(5):
        case = z, carries, ids, p, p_class = planted(12, D, L, T, (4, 3), seed)
        projected, found = common.project(*case, unique, runners=3)
        same_found(found, brute_force(*case, unique, runners=3))
        for j, (ecg_id, window, cosine) in enumerate(f[0] for f in found):
            record = list(ids).index(ecg_id)
            assert carries[record, p_class[j]]
            assert torch.equal(projected[j], z[record, :, window:window + T])  # exactly a patch, nothing averaged
            assert len({f[0] for f in found[j]}) == len(found[j]) == 4  # distinct records, the source not twice
            assert all(f[2] <= cosine + 1e-6 for f in found[j][1:]) or unique


def test_ties_go_to_the_lowest_ecg_id_then_the_earliest_window():
    z = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(1))
    p = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(2))
    for record, window in ((4, 0), (2, 5), (2, 1), (3, 0)):
        z[record, :, window:window + 3] = p[0]
    _, found = common.project(*one_class(z, [5, 7, 30, 31, 40]), p, torch.zeros(1, dtype=int), runners=2)
    assert [f[:2] for f in found[0]] == [(30, 1), (31, 0), (40, 0)]


def test_unique_forbids_a_window_twice():
    z, carries, ids, p, p_class = planted(8, 4, 5, 3, (1, 1))
    p, p_class = torch.cat([p[:1] + 0.01 * random(8, 4, 3, dtype=torch.float32), p[1:]]), torch.tensor([0] * 8 + [1])
    case = z, carries, ids, p, p_class
    assert len({f[0][:2] for f in common.project(*case)[1][:8]}) < 8
    only = common.project(*case, unique=True)[1]
    assert len({f[0][:2] for f in only[:8]}) == 8
    same_found(only, brute_force(*case, unique=True))


def test_class_without_prototypes_and_class_with_one_record():
    z, p = random(4, 4, 6, dtype=torch.float32), random(2, 4, 3, seed=2, dtype=torch.float32)
    carries = np.array([[0, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]], bool)
    carries[3, 2] = True
    _, found = common.project(z, carries, np.array([3, 4, 5, 6]), p, torch.tensor([0, 2]), runners=3)
    assert [f[0] for f in found[1]] == [6] and len(found[0]) == 3 and 3 not in [f[0] for f in found[0]]


# ---- Metrics

@given(st.integers(1, 25).flatmap(lambda n: st.tuples(
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=n, max_size=n),
    st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=n, max_size=n))))
def test_auroc_equals_scikit_learn_with_ties(drawn):
    y, score = np.array(drawn[0]), np.array(drawn[1]) / 7
    each = common.auroc(y, score)
    for c in range(3):
        if y[:, c].all() or not y[:, c].any():
            assert np.isnan(each[c])
        else:
            assert each[c] == pytest.approx(roc_auc_score(y[:, c], score[:, c]), abs=1e-12)
    defined = each[~np.isnan(each)]
    macro = common.macro_auroc(y, score)
    assert np.isnan(macro) if not len(defined) else macro == pytest.approx(sum(defined) / len(defined), abs=1e-12)


def test_auroc_of_many_records():
    rng = np.random.default_rng(0)
    y, score = rng.random((5000, 4)) < [0.5, 0.1, 0.001, 0.9], rng.normal(size=(5000, 4)).astype(np.float32)
    want = [roc_auc_score(y[:, c], score[:, c]) for c in range(4)]
    np.testing.assert_allclose(common.auroc(y.astype(np.uint8), score), want, atol=1e-12)  # no overflow in uint8
    np.testing.assert_allclose(common.auroc(y, -score), 1 - np.array(want), atol=1e-12)


# ---- Results per record

@pytest.mark.parametrize("kind", ["blackbox", "1d", "partial", "global"])
def test_batched_results_belong_to_the_record_alone(tiny_prep, kind):
    prep = tiny_prep(n=40)
    torch.manual_seed(0)
    cfg = Config(width=16)
    codes = ["SR", "AFIB"]
    model = common.BlackBox(codes, cfg) if kind == "blackbox" else common.ProtoECGNet(kind, codes, [2, 2], cfg)
    model.eval()
    f = lambda x: model(x)[0]
    rows = np.arange(40)
    every = common.batched(f, prep, rows, "cpu", batch=16)
    assert every.shape == (40, 2)
    for few in (rows[:1], rows[:15], rows[:16], rows[:17], rows[:33]):  # however many records there are
        assert torch.equal(common.batched(f, prep, few, "cpu", batch=16), every[:len(few)])
    shuffled = np.random.default_rng(0).permutation(40)  # and whoever its neighbours are
    assert torch.equal(common.batched(f, prep, shuffled, "cpu", batch=16), every[shuffled])
    alone = torch.cat([f(torch.from_numpy(prep.signals[i:i + 1])) for i in (0, 17, 39)]).detach()
    torch.testing.assert_close(every[[0, 17, 39]], alone, rtol=1e-4, atol=1e-5)


# ---- Settings and flags

@pytest.mark.parametrize("recipe", common.RECIPES)
def test_config_survives_json(recipe):
    cfg = common.RECIPES[recipe]
    assert common.config_of(json.loads(json.dumps({"config": asdict(cfg)}))) == cfg


def parsed(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["02_train_joint.py", *argv])
    return common.parse(common.argument_parser("", *common.RUN_FLAGS, "seed"))


@pytest.mark.parametrize("argv, run, prep", [
    ([], "runs/default", "runs/prep"), (["--recipe", "paper"], "runs/paper", "runs/prep"),
    (["--demo"], "runs/demo", "runs/demo-prep"), (["--run", "r", "--prep", "p"], "r", "p"),
    (["--demo", "--recipe", "paper"], "runs/demo-paper", "runs/demo-prep")])
def test_default_folders(monkeypatch, argv, run, prep):
    args = parsed(monkeypatch, *argv)
    assert (str(args.run), str(args.prep)) == (run, prep)


@pytest.mark.parametrize("argv", [["--model", "3d"], ["--recipe", "x"], ["--seed", "x"], ["--x"],
                                  *[["--device", "cuda"]] * (not torch.cuda.is_available())])
def test_wrong_flags_exit_with_2(monkeypatch, capsys, argv):
    with pytest.raises(SystemExit) as e:
        parsed(monkeypatch, *argv)
    assert e.value.code == 2 and capsys.readouterr().err


def test_threads_bound_numpy_and_scipy_too():
    """Two threads of numpy's on one free core made a small `solve` 160 times slower."""
    code = """
import sys, threadpoolctl, common
sys.argv = ["x", "--threads", "1"]
common.parse(common.argument_parser("", *common.RUN_FLAGS))
print({p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"})"""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(common.__file__).parent, env=env,
                         capture_output=True, text=True)
    assert out.stdout == "{1}\n", out.stderr


# ---- Files

META = {"format": common.FORMAT, "made_from": {}}
VALUES = {"a.npy": np.arange(5), "a.json": {**META, "a": 1}, "a.pt": {"meta": META, "a": 1}, "a.txt": "text"}


@pytest.mark.parametrize("name", VALUES)
def test_saved_values_come_back_and_give_the_same_bytes(tmp_path, name):
    for folder in ("x", "y"):
        common.save(tmp_path / folder / name, VALUES[name])
    assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    assert [p.name for p in (tmp_path / "x").iterdir()] == [name]
    if name != "a.txt":
        found = common.load(tmp_path / "x" / name, "01_preprocess.py")
        assert np.array_equal(found, VALUES[name]) if name == "a.npy" else found == VALUES[name]


@pytest.mark.parametrize("name", VALUES)
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, name):
    common.save(tmp_path / name, VALUES[name])
    old = (tmp_path / name).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for target in ("write_bytes", "replace"):
        with monkeypatch.context() as m:
            m.setattr(*((Path, "write_bytes") if target == "write_bytes" else (os, "replace")), full)
            with pytest.raises(OSError):
                common.save(tmp_path / name, VALUES[name])
        assert (tmp_path / name).read_bytes() == old
    common.save(tmp_path / name, VALUES[name])  # the next run takes the place of what was left
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_values_that_must_not_be_written(tmp_path):
    for name, value in (("a.json", {"a": float("nan")}), ("a.npy", np.array([{}], object))):
        with pytest.raises(ValueError):
            common.save(tmp_path / name, value)
        assert not any(tmp_path.iterdir())


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damaged(path, how):
    """Put something else than the right file at `path`."""
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "hostile pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    elif how == "hostile torch":
        torch.save({"meta": META, "x": Hostile()}, path)
    elif how == "hostile numpy":
        with open(path, "wb") as f:
            np.save(f, np.array([Hostile()], object), allow_pickle=True)
    elif how == "text":
        path.write_text("not what it should be")
    elif how == "other json":
        path.write_text('[1, 2]')


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "hostile pickle", "hostile torch",
                                 "hostile numpy", "text", "other json"])
@pytest.mark.parametrize("name", ["a.npy", "a.json", "a.pt"])
def test_damaged_and_foreign_files_give_one_sentence(tmp_path, monkeypatch, name, how):
    monkeypatch.chdir(tmp_path)
    common.save(tmp_path / name, VALUES[name])
    damaged(tmp_path / name, how)
    with pytest.raises(SystemExit) as e:
        common.load(tmp_path / name, "01_preprocess.py")
    assert "01_preprocess.py" in sentence(e) and name in sentence(e)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["a.json", "a.pt"])
def test_another_format_is_refused(tmp_path, name):
    other = {**META, "format": common.FORMAT - 1}
    common.save(tmp_path / name, other if name == "a.json" else {"meta": other})
    with pytest.raises(SystemExit) as e:
        common.load(tmp_path / name, "03_project.py")
    assert "version" in sentence(e) and "03_project.py" in sentence(e)


def test_chain_is_transitive_and_a_change_is_noticed(tmp_path):
    args = arguments(tmp_path / "run", tmp_path / "prep")
    first, second, third = tmp_path / "prep/preprocess.json", args.run / "m/joint.pt", args.run / "m/p.json"
    common.save(first, {**common.provenance(args), "x": 1})
    common.save(second, {"meta": common.provenance(args, (first, common.load(first, "01")))})
    common.save(third, common.provenance(args, (second, common.load(second, "02")["meta"])))
    assert set(common.load(third, "03", args)["made_from"]) == {"preprocess.json", "m/joint.pt"}
    assert len(common.load(third, "03", args)["commands"]) == 1  # of one process: each once
    common.load(third, "03", arguments(args.run, None))  # without PREP only what is there is compared
    common.save(first, {**common.provenance(args), "x": 2})
    common.load(third, "03", arguments(args.run, None))
    for path, maker in ((second, "02"), (third, "03")):
        with pytest.raises(SystemExit) as e:
            common.load(path, maker, args)
        assert "another" in sentence(e) and str(first) in sentence(e) and f"run {maker} again" in sentence(e) and "delete" in sentence(e)
    second.unlink()
    with pytest.raises(SystemExit):
        common.load(third, "03", arguments(args.run, None))


@pytest.mark.parametrize("name", ["labels", "folds", "ecg_ids", "patient_ids", "signals"])
def test_arrays_of_another_preprocessing_are_refused(tiny_prep, tmp_path, name):
    prep = tiny_prep()
    array = np.array(getattr(prep, name))
    common.save(tmp_path / "prep" / f"{name}.npy", array[:-1] if name == "signals" else array[::-1].copy())
    with pytest.raises(SystemExit) as e:
        common.load_prep(tmp_path / "prep")
    assert f"{name}.npy" in sentence(e) and "01_preprocess.py" in sentence(e)


def test_loaded_signals_cannot_change_the_file(tiny_prep, tmp_path):
    prep = tiny_prep()
    before = (tmp_path / "prep/signals.npy").read_bytes()
    prep.signals[0] = 7
    assert (tmp_path / "prep/signals.npy").read_bytes() == before


# ---- A finished run

def test_a_run_folder_predicts_without_prep(tiny_prep, tmp_path, monkeypatch):
    """predict gives what 04 saved, and needs the run folder only."""
    prep = tiny_prep()
    run = write_run(monkeypatch, tmp_path / "run", prep, a=(2.0, 2.0, 2.0))
    later = np.flatnonzero(prep.val | prep.test)
    x, saved = np.array(prep.signals[later]), torch.load(run / "classifiers/fusion.pt", weights_only=True)
    (tmp_path / "prep").rename(tmp_path / "gone")
    heads = common.load_run(run)
    assert [h.name for h in heads] == ["fusion"] and heads[0].branches == common.BRANCHES
    probability = common.predict(heads, x)
    want = 1 / (1 + np.exp(-saved["logits"].double().numpy()))
    assert probability.shape == (len(later), 71)
    own = [n.p_patient.tolist() for n in heads[0].networks]
    assert not set(sum(own, [])) & set(prep.patient_ids[later].tolist())
    np.testing.assert_allclose(probability, want, atol=1e-5)
    (rhythm,) = common.load_run(run, ["rhythm"])
    assert np.isnan(common.predict([rhythm], x[:2])).sum(1).tolist() == [71 - len(rhythm.classes)] * 2
    for q in heads[0].prototypes:
        row = prep.row_of[q["ecg_id"]]
        assert np.abs(q["x"] - prep.signals[row]).max() <= 0.00051 and q["class"] in q["labels"]


def test_a_run_of_nothing_gives_one_sentence(tmp_path):
    with pytest.raises(SystemExit) as e:
        common.load_run(tmp_path)
    assert "02_train_joint.py" in sentence(e)
