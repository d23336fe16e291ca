"""What the test files share: the repository on the import path, `stage`, small PREP and RUN
folders, and a browser."""
import importlib
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores Ctrl-C
torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other
threadpool_limits(1, user_api="blas")
settings.register_profile("tests", deadline=None, database=None, derandomize=True)
settings.load_profile("tests")

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers of a CPU are the same in every run
PTBXL = Path(os.environ["PTBXL_DIR"]).resolve() if os.environ.get("PTBXL_DIR") else None
needs_ptbxl = pytest.mark.skipif(PTBXL is None, reason="PTBXL_DIR names no unpacked PTB-XL")
CPU = torch.device("cpu")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long runs of kills and damaged files; with -m slow")
    for noise in ("ignore:The inplace keyword in DataFrame:Warning",
                  "ignore:Detected pickle protocol:UserWarning"):
        config.addinivalue_line("filterwarnings", noise)


def pytest_collection_modifyitems(config, items):
    """Slow tests run only when -m names them."""
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def random32(*shape, seed=0):
    """Normal numbers, drawn in float64 and rounded, so that torch's generator plays no part."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def training_latents(model, prep):
    """What Eq. (8) searches, folds 1-8 by ecg_id: z [N, D, L] and the rows [N] of PREP."""
    rows = np.flatnonzero(prep.train)
    rows = rows[np.argsort(prep.ecg_ids[rows], kind="stable")]
    return common.batched(model.latent, prep, rows, CPU), rows


def stage(name):
    """The module of a stage, whose file name begins with a digit: stage("01_preprocess")."""
    return importlib.import_module(name)


def run_stage(monkeypatch, name, *argv):
    """Run a stage's main() in this process as `python NAME.py ARGV` would."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    common.run(stage(name).main)


def sentence(error):
    """The text of a SystemExit: exit code 1, and one line on stderr."""
    message = error.value.code
    assert isinstance(message, str), f"exit code {message!r} without a sentence"
    assert message.strip() and "\n" not in message and len(message) < 500, message
    return message


def arguments(run=None, prep=None, **more):
    """What common.parse would give, for functions that take `args`."""
    found = {"run": run, "prep": prep, "device": CPU, "round": 1, "model": None, "threads": 1}
    return common.SimpleNamespace(**{**found, **more})


def save_prep(folder, arrays):
    """Write arrays {signals, labels, folds, ecg_ids, patient_ids} and preprocess.json, as 01."""
    for name, array in arrays.items():
        common.save(folder / f"{name}.npy", array)
    labels, folds = arrays["labels"], arrays["folds"]
    train = folds <= 8
    x = arrays["signals"][train].astype(np.float64)
    common.save(folder / "preprocess.json", {
        **common.provenance(arguments(folder, folder)), "records": len(labels),
        "codes": common.CODES, "descriptions": {c: f"about {c}" for c in common.CODES},
        "sizes": {"train": int(train.sum()), "validation": int((folds == 9).sum()),
                  "test": int((folds == 10).sum())},
        "without_training_record": [
            c for c, k in zip(common.CODES, labels[train].sum(0)) if k == 0],
        "data": "PTB-XL v1.0.3", "skipped": [],
        "scaler": {"mean": x.mean((0, 2)).tolist(), "std": x.std((0, 2)).tolist()},
        "jaccard": stage("01_preprocess").jaccard(labels[train]).tolist(),
        "sha256": {name: common.file_hash(folder / f"{name}.npy") for name in arrays}})
    return common.load_prep(folder)


def write_prep(folder, n=60, seed=0, codes=("SR", "AFIB", "NORM", "IMI", "LVH"), order=None):
    """A small PREP folder: n random records, folds 1-10 in turn, each of `codes` in turn and some
    by chance; `order` permutes the records. Returns common.load_prep of it."""
    rng = np.random.default_rng(seed)
    order = np.arange(n) if order is None else np.asarray(order)
    labels = np.zeros((n, len(common.CODES)), np.uint8)
    for i in range(n):
        labels[i, common.CODES.index(codes[(i + i // 10) % len(codes)])] = 1
    for c in codes:
        labels[:, common.CODES.index(c)] |= rng.random(n) < 0.2
    shape = labels[:, common.columns(codes)].argmax(1)
    wave = np.sin(np.arange(1000) * (0.05 + 0.05 * shape)[:, None, None])
    signals = (rng.normal(size=(n, 12, 1000)) * 0.2 + wave).astype(np.float32)
    return save_prep(folder, {
        "signals": signals[order], "labels": labels[order],
        "folds": (1 + np.arange(n) % 10)[order].astype(np.int64),
        "ecg_ids": (10 + 3 * np.arange(n))[order], "patient_ids": (1000 + np.arange(n))[order]})


def change_prep(folder, **arrays):
    """Put other arrays into a PREP folder, and what 01 says of them."""
    prep = common.load_prep(folder)
    names = ("signals", "labels", "folds", "ecg_ids", "patient_ids")
    return save_prep(folder, {**{n: np.array(getattr(prep, n)) for n in names}, **arrays})


@pytest.fixture
def tiny_prep(tmp_path):
    """tiny_prep(name="prep", **how): write_prep in a folder of this test."""
    return lambda name="prep", **how: write_prep(tmp_path / name, **how)


def write_joint(run, prep, model="rhythm", seed=0, **changes):
    """An untrained `model` of width 16 as RUN/MODEL/joint.pt, as 02 saves it; returns its path."""
    small = {"width": 16, "latent_dim": 16, "per_class": (2, 3, 2)}
    cfg = replace(common.Config(seed=seed), **{**small, **changes})
    args = arguments(run, prep.path.parent)
    torch.manual_seed(seed)
    meta = stage("02_train_joint").describe(model, args, cfg, prep)
    net = stage("02_train_joint").start({**meta, "config": asdict(cfg)}, args, cfg, prep)
    meta.update(config=asdict(cfg), val_auroc=0.5, epochs=0, best_epoch=0, seconds=1.5, threads=1)
    path = run / model / "joint.pt"
    common.save(path, {"meta": meta, "state": net.state_dict()})
    common.save(path.with_name("log.jsonl"), json.dumps({"epoch": 0, "val_auroc": 0.5}) + "\n")
    return path


def write_run(monkeypatch, run, prep, models=tuple(common.BRANCHES), **changes):
    """A whole run folder of untrained models, made by 03 and 04 in this process."""
    for model in models:
        write_joint(run, prep, model, **changes)
    flags = ["--run", run, "--prep", prep.path.parent, "--threads", 1, "--device", "cpu"]
    for name in ("03_project", "04_fusion"):
        run_stage(monkeypatch, name, *flags)
    return run


BROWSER_FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --window-size=1280,800""".split()


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that saves downloads in tmp_path."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in BROWSER_FLAGS:
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield page
    page.quit()


@pytest.fixture(autouse=True)
def same_process():
    """A stage in this process sets threads, and denormal numbers to zero; put them back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    threadpool_limits(1, user_api="blas")
    torch.set_flush_denormal(False)
