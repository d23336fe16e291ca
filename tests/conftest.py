"""What the test files share: the repository on the import path, `stage`, makers of small PREP and RUN folders, and a
browser."""
import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background inherits an ignored Ctrl-C
torch.set_num_threads(1)  # the tensors here are small: on a busy machine threads would only wait for each other
threadpool_limits(1, user_api="blas")

# no time limit per example (the machine may be busy), none kept, the same examples in every run
settings.register_profile("tests", deadline=None, database=None, derandomize=True)
settings.load_profile("tests")

PTBXL = Path(os.environ["PTBXL_DIR"]).resolve() if os.environ.get("PTBXL_DIR") else None
needs_ptbxl = pytest.mark.skipif(PTBXL is None, reason="PTBXL_DIR does not name the unpacked PTB-XL")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the long runs of kills and damaged files; only with -m slow")
    for noise in ("ignore:The inplace keyword in DataFrame:Warning", "ignore:Detected pickle protocol:UserWarning"):
        config.addinivalue_line("filterwarnings", noise)  # of wfdb's imports, and of torch on damaged files


def pytest_collection_modifyitems(config, items):
    """Slow tests run only when -m names them, so that plain `python -m pytest -q` stays short."""
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def stage(name):
    """The module of a stage, whose file name begins with a digit: stage("01_preprocess")."""
    return importlib.import_module(name)


def run_stage(monkeypatch, name, *argv):
    """Run a stage's main() in this process as `python NAME.py ARGV` would; SystemExit passes through."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    common.run(stage(name).main)


def sentence(error):
    """The text of a SystemExit: exit code 1, and one line on stderr."""
    message = error.value.code
    assert isinstance(message, str), f"exit code {message!r} without a sentence"  # Python prints a str and exits with 1
    assert message.strip() and "\n" not in message and len(message) < 500, message
    return message


def write_prep(folder, n=60, seed=0, codes=("SR", "AFIB", "NORM", "IMI", "LVH"), order=None):
    """A small PREP folder as 01_preprocess.py writes it: n random records, folds 1-10 in turn, each of `codes` in turn
    and some by chance. `order` permutes the records. Returns common.load_prep of it."""
    rng = np.random.default_rng(seed)
    order = np.arange(n) if order is None else np.asarray(order)
    labels = np.zeros((n, len(common.CODES)), np.uint8)
    for i in range(n):
        labels[i, common.CODES.index(codes[(i + i // 10) % len(codes)])] = 1
    for c in codes:
        labels[:, common.CODES.index(c)] |= rng.random(n) < 0.2
    folds = 1 + np.arange(n) % 10
    signals = rng.normal(size=(n, 12, 1000)).astype(np.float32) * 0.2 + np.sin(
        np.arange(1000) * (0.05 + 0.05 * labels[:, common.columns(codes)].argmax(1))[:, None, None]).astype(np.float32)
    x = signals[folds <= 8].astype(np.float64)
    arrays = {"signals": signals[order], "labels": labels[order], "folds": folds[order].astype(np.int64),
              "ecg_ids": (10 + 3 * np.arange(n))[order], "patient_ids": (1000 + np.arange(n))[order]}
    for name, array in arrays.items():
        common.save_npy(folder / f"{name}.npy", array)
    train = labels[folds <= 8]
    common.save_json(folder / "preprocess.json", {
        "format": common.FORMAT, "records": n, "codes": common.CODES, "descriptions": {c: c for c in common.CODES},
        "sizes": {"train": len(train), "validation": int((folds == 9).sum()), "test": int((folds == 10).sum())},
        "shapes": {name: list(array.shape) for name, array in arrays.items()},
        "training_positives": dict(zip(common.CODES, train.sum(0).tolist())),
        "without_training_record": [c for c, k in zip(common.CODES, train.sum(0)) if k == 0],
        "filter": "none", "skipped": [], "flat_leads": [], "saturated": [], "inputs": {},
        "scaler": {"mean": x.mean((0, 2)).tolist(), "std": x.std((0, 2)).tolist()},
        "jaccard": stage("01_preprocess").jaccard(train).tolist(),
        "sha256": {name: common.file_hash(folder / f"{name}.npy") for name in arrays}})
    return common.load_prep(folder)


def change_prep(folder, **arrays):
    """Put other arrays into a PREP folder, and what 01 says of them into preprocess.json. Returns load_prep of it."""
    info = json.loads((folder / "preprocess.json").read_text())
    for name, array in arrays.items():
        common.save_npy(folder / f"{name}.npy", array)
        info["shapes"][name], info["sha256"][name] = list(array.shape), common.file_hash(folder / f"{name}.npy")
    common.save_json(folder / "preprocess.json", info)
    return common.load_prep(folder)


@pytest.fixture
def tiny_prep(tmp_path):
    """tiny_prep(name="prep", **how): write_prep in a folder of this test."""
    return lambda name="prep", **how: write_prep(tmp_path / name, **how)


def write_joint(run, prep, model="rhythm", seed=0, **settings_):
    """An untrained `model` of width 8 as RUN/MODEL/joint.pt, the way 02_train_joint.py saves it; returns its path."""
    cfg = common.replace(common.Config(seed=seed), **{"width": 8, "per_class": (2, 3, 2), **settings_})
    kind, group = common.MODELS[model]
    classes, left_out = common.learnable(prep, common.GROUPS[group])
    per_class = None if kind == "blackbox" else [cfg.per_class[list(common.WINDOW).index(kind)]] * len(classes)
    meta = {**common.provenance(cfg, "02_train_joint.py", prep=prep.path), "model": model, "round": 1,
            "classes": classes, "left_out": left_out, "device": "cpu", "per_class": per_class, "latent_dim": None}
    torch.manual_seed(seed)
    net = common.build(meta, common.Scaler(**prep.info["scaler"]))
    path = run / model / "joint.pt"
    common.save_pt(path, {"meta": json.loads(json.dumps(meta)), "state": net.state_dict()})
    common.save_json(path.with_suffix(".json"), {**meta, "seconds": 1.5, "hardware": "none", "epochs": 0,
                                                 "best_epoch": 0})
    return path


BROWSER_FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --window-size=1280,800").split()


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that saves downloads in tmp_path."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
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
    """A stage run in this process sets the number of threads, and denormal numbers to zero; put it back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    threadpool_limits(1, user_api="blas")
    torch.set_flush_denormal(False)
