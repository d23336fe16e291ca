"""Stages 02 to 06 on a stand-in for a GPU, to notice without one when a tensor stays on the wrong device.

Tensors of the stand-in name torch's "meta" as their device, but hold numbers, and compute with them on the CPU. As a
GPU's do, they refuse to meet tensors of the CPU, but for single numbers, copies and indices. The same numbers as on the
CPU must come out. What only a GPU has (its bfloat16, its kernels, its speed) is not seen here.
"""
import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_stage, stage, write_prep
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import common

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of 05, which filters its own; pytest undoes that
STAND_IN = torch.device("meta")
as_tensor, save, LBFGS = torch.tensor, torch.save, torch.optim.LBFGS


class Away(torch.Tensor):
    """A tensor of the stand-in, with its numbers in `on_cpu`."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, t):
        away = torch.Tensor._make_wrapper_subclass(cls, t.shape, strides=t.stride(), dtype=t.dtype, device=STAND_IN,
                                                   storage_offset=t.storage_offset())
        away.on_cpu = t
        return away

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        assert isinstance(other, Away), "a tensor of the CPU becomes a parameter on the device"
        torch.Tensor.data.__set__(self, other)
        self.on_cpu = other.on_cpu

    def __getitem__(self, index):  # of a list torch would make a real tensor of "meta"
        index = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(as_tensor(i) if isinstance(i, list) else i for i in index))

    def tolist(self):
        return self.on_cpu.tolist()

    def numpy(self, *_, **__):
        raise TypeError("a tensor on the device is no array")

    __array__ = numpy


def fetched(value):
    """`value` with tensors of the CPU in place of the stand-in's."""
    return tree_map(lambda v: v.on_cpu if isinstance(v, Away) else v, value)


def compute(operator, args, kwargs):
    """An operator of torch on tensors of either device, but not of both."""
    name, tensors = operator.overloadpacket.__name__, [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
    away, home = ([t for t in tensors if isinstance(t, Away) == there] for there in (True, False))
    device = kwargs.get("device")
    on_device = bool(away) if device is None else torch.device(device) == STAND_IN
    if name == "copy_":
        on_device = isinstance(args[0], Away)
    indices = [i for i in tree_leaves(args[1]) if torch.is_tensor(i)] if away and name.startswith("index") else []
    if away and name != "copy_" and any(t.ndim and not any(t is i for i in indices) for t in home):
        raise RuntimeError(f"{operator} is given tensors of two devices: {[(type(t), t.shape) for t in tensors]}")
    cpu = {"device": torch.device("cpu")} if device is not None else {}
    out = operator(*fetched(args), **{**fetched(kwargs), **cpu})
    if not on_device or name == "_local_scalar_dense":
        return out
    out = tree_map(lambda t: Away(t) if torch.is_tensor(t) else t, out)
    return return_and_correct_aliasing(operator, args, kwargs, out) if away else out


class StandIn(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


@pytest.fixture
def stand_in(monkeypatch):
    """`--device meta` is the stand-in."""
    monkeypatch.setattr(torch, "tensor", lambda v, device=None, **how: as_tensor(v, **how).to(device or "cpu"))
    monkeypatch.setattr(torch, "save", lambda value, file: save(fetched(value), file))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no "meta"
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices",
                        lambda: ["cpu", "meta"])
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_the_stand_in_is_strict(stand_in):
    with StandIn():
        away, home = torch.ones(3, device="meta"), torch.ones(3)
        assert torch.equal((away + 1).cpu(), home + 1) and float(away.sum()) == 3
        for mix in (lambda: away + home, lambda: home[away > 0], lambda: torch.stack([away, home])):
            with pytest.raises(RuntimeError, match="two devices"):
                mix()
        with pytest.raises(TypeError):
            np.asarray(away)


def test_every_stage_keeps_to_the_device(tmp_path, monkeypatch, stand_in):
    """Both recipes give the numbers of the CPU."""
    write_prep(tmp_path / "prep")
    monkeypatch.setattr(stage("02_train_joint"), "bfloat16_is_fast", lambda device: False)
    monkeypatch.setattr(torch.optim, "LBFGS", lambda w, max_iter, **how: LBFGS(w, max_iter=5, **how))  # not 100: time
    small = ["--set", "width=16", "epochs=1", "blackbox_epochs=1"]
    paper = ["--recipe", "paper", "--model", "morphology", *small, "start=random", "sampler=weighted"]
    commands = [["02_train_joint", *small], ["03_project"], ["04_fusion"], ["06_plot_prototypes", "--case", 10],
                ["02_train_joint", *paper], ["03_project", "--recipe", "paper"],
                ["02_train_joint", *paper, "--round", 2]]
    for device in ("cpu", "meta"):
        monkeypatch.chdir(tmp_path)
        for name, *flags in commands:
            run = f"{device}/{'paper' if 'paper' in flags else 'default'}"
            with StandIn() if device == "meta" else contextlib.nullcontext():
                run_stage(monkeypatch, name, "--prep", "prep", "--run", run, "--device", device, "--threads", 1, *flags)
    files = sorted(f.relative_to("cpu") for f in Path("cpu").glob("*/*/*.pt") if f.name[:4] in ("join", "proj"))
    assert len(files) == 2 + 2 * 3 + 2
    for file in files:
        ours, theirs = (common.load(Path(device) / file, "")["state"] for device in ("cpu", "meta"))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), file
