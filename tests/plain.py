"""A plain ResNet1D-18, as most code has it: eager, float32, [B, C, L] tensors, a DataLoader.

tests/bench.py compares its training with that of 02's black box.
"""
import importlib
import timeit
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import common

stage_2 = importlib.import_module("02_train_joint")


def conv(c_in, c_out, kernel, stride):
    return nn.Sequential(nn.Conv1d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
                         nn.BatchNorm1d(c_out))


class Residual(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.body = nn.Sequential(conv(c_in, c_out, 3, stride), nn.ReLU(), conv(c_out, c_out, 3, 1))
        self.shortcut = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1, stride)

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(width, classes=71):
    """x [B, 12, 1000] mV -> logits [B, 71]; the same layers as common.ResNet18."""
    blocks, c_in = [], width
    for i in range(4):
        c_out = width * 2**i
        blocks += [Residual(c_in, c_out, 1 + (i > 0)), Residual(c_out, c_out, 1)]
        c_in = c_out
    return nn.Sequential(conv(12, width, 7, 2), nn.ReLU(), nn.MaxPool1d(3, 2, 1), *blocks,
                         nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(c_in, classes))


def compare(prep, width, records=1280, times=3):
    """Median seconds a record of a training epoch: of the plain network, and of 02's black box.

    Both take the same first records of folds 1-8 in batches of Config.batch, without augmentation,
    in turn.
    """
    cfg = common.Config(width=width, augment=False, ema=0.0, pool="mean")
    prep = common.load_prep(prep)
    rows = np.flatnonzero(prep.train)[:records]
    x = torch.from_numpy(np.array(prep.signals[rows]))
    y = torch.from_numpy(prep.labels[rows]).float()
    loader = DataLoader(TensorDataset(x, y), cfg.batch, shuffle=True)
    plain, ours = resnet(width), common.BlackBox(common.CODES, cfg)
    optimizer = torch.optim.AdamW(plain.parameters(), cfg.lr)
    our_training = stage_2.make_optimizer(ours, cfg, 10**6)
    data = SimpleNamespace(x=x, y=y, all_y=y, rows=torch.arange(len(rows)), w=None, draw=None)

    def plain_epoch():
        for batch, labels in loader:
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(plain(batch), labels).backward()
            optimizer.step()

    def our_epoch():
        stage_2.train_epoch(ours, ours, data, *our_training, cfg, 1)

    seconds = [[timeit.timeit(f, number=1) for f in (plain_epoch, our_epoch)]
               for _ in range(times + 1)]
    return np.median(seconds[1:], 0) / len(rows)  # the first to warm up
