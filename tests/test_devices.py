"""Stages on a stand-in for a GPU, to notice without one when a tensor stays on the wrong device.

Its tensors name torch's "meta" as their device, but hold numbers and compute on the CPU. As a GPU's
do, they refuse to meet tensors of the CPU, but for single numbers, copies and indices.
"""
import contextlib
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_stage, stage, write_prep
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import common

as_tensor, save, LBFGS = torch.tensor, torch.save, torch.optim.LBFGS
waited = set()  # lines of 02's train_epoch at which the CPU would wait for a GPU


class Away(torch.Tensor):
    """A tensor of the stand-in, with its numbers in `on_cpu`."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(lambda cls, *call: compute(*call))

    @staticmethod
    def __new__(cls, t):
        layout = {"strides": t.stride(), "storage_offset": t.storage_offset()}
        away = torch.Tensor._make_wrapper_subclass(
            cls, t.shape, dtype=t.dtype, device="meta", **layout)
        away.on_cpu = t
        return away

    def set_data(self, other):
        assert isinstance(other, Away), "a tensor of the CPU becomes a parameter on the device"
        torch.Tensor.data.__set__(self, other)
        self.on_cpu = other.on_cpu

    data = property(torch.Tensor.detach, set_data)

    def __getitem__(self, index):  # of a list torch would make a real tensor of "meta"
        index = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(as_tensor(i) if isinstance(i, list) else i for i in index))

    def tolist(self):
        return self.to("cpu").tolist()


class StandIn(TorchDispatchMode):
    def __torch_dispatch__(self, *call):
        return compute(*call)


def fetched(value):
    return tree_map(lambda v: v.on_cpu if isinstance(v, Away) else v, value)


def compute(operator, types, args=(), kwargs=None):
    """An operator of torch on tensors of either device, but not of both."""
    kwargs, name = dict(kwargs or {}), operator.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
    away, home = ([t for t in tensors if isinstance(t, Away) == there] for there in (True, False))
    on_device, index = bool(away), []
    if "device" in kwargs:
        on_device, kwargs["device"] = str(kwargs["device"]) == "meta", torch.device("cpu")
    if name == "copy_":
        on_device = isinstance(args[0], Away)
    elif away and name.startswith("index"):
        index = [i for i in tree_leaves(args[1]) if torch.is_tensor(i)]
    mixed = [t for t in home if away and t.ndim and not any(t is i for i in index)]
    if mixed and name != "copy_":
        raise RuntimeError(f"{operator} is given tensors of two devices")
    sizes = name in ("_local_scalar_dense", "nonzero", "_unique2") and away
    sizes = sizes or any(i.dtype == torch.bool or not isinstance(i, Away) for i in index)
    if sizes or mixed or tensors and on_device != bool(away):
        waited.update(f.line for f in traceback.extract_stack() if f.name == "train_epoch")
    out = operator(*fetched(args), **fetched(kwargs))
    if not on_device or name == "_local_scalar_dense":
        return out
    out = tree_map(lambda t: Away(t) if torch.is_tensor(t) else t, out)
    return return_and_correct_aliasing(operator, args, kwargs, out) if away else out


@pytest.fixture
def stand_in(monkeypatch):
    """`--device meta` is the stand-in."""
    optimizers, swap = sys.modules["torch.optim.optimizer"], torch.__future__
    for owner, name, function in (
            (torch, "tensor", lambda v, device="cpu", **how: as_tensor(v, **how).to(device)),
            (torch, "save", lambda value, file: save(fetched(value), file)),
            (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # knows no "meta"
            (torch.optim, "LBFGS", lambda w, **how: LBFGS(w, **{**how, "max_iter": 5})),  # time
            (stage("02_train_joint"), "bfloat16_is_fast", lambda device: False),
            (optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])):
        monkeypatch.setattr(owner, name, function)
    swap.set_swap_module_params_on_conversion(True)
    yield
    swap.set_swap_module_params_on_conversion(False)


def test_the_stand_in_is_strict(stand_in):
    with StandIn():
        away, home = torch.ones(3, device="meta"), torch.ones(3)
        assert torch.equal((away + 1).cpu(), home + 1) and float(away.sum()) == 3
        for mix in (lambda: away + home, lambda: home[away > 0], lambda: torch.stack([away, home]),
                    lambda: np.asarray(away), away.numpy):
            with pytest.raises((RuntimeError, TypeError)):
                mix()


def test_every_stage_keeps_to_the_device(tmp_path, monkeypatch, stand_in):
    """Both recipes give the numbers of the CPU, which waits for the device once an epoch."""
    write_prep(tmp_path / "prep")
    monkeypatch.chdir(tmp_path)
    small = "--set width=16 epochs=1 per_class=2,2,2"
    paper = f"--recipe paper --model morphology {small} start=random sampler=weighted"
    commands = [f"02_train_joint {small}", "03_project", "04_fusion",
                "06_plot_prototypes --case 10", f"02_train_joint {paper}",
                "03_project --recipe paper", f"02_train_joint {paper} --round 2"]
    for device in ("cpu", "meta"):
        for name, *flags in map(str.split, commands):
            run = f"{device}/paper" if "paper" in flags else f"{device}/default"
            flags += ["--prep", "prep", "--run", run, "--device", device, "--threads", 1]
            with StandIn() if device == "meta" else contextlib.nullcontext():
                run_stage(monkeypatch, name, *flags)
    files = [*Path("cpu").glob("*/*/joint.pt"), *Path("cpu").glob("*/*/projected.pt")]
    assert len(files) == 2 * 3 + 2
    for file in files:
        states = [common.load(Path(d, *file.parts[1:]), "")["state"] for d in ("cpu", "meta")]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]), file
    assert {line.split("(")[0] for line in waited} == {"for step, i in enumerate", "return dict"}
