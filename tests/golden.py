"""Is a rewritten version the same function? Runs the demo, and the paper recipe for one epoch and two rounds, in both
versions and compares what they made: arrays and trained tensors by sha256, weights of Eq. (10) to 1e-9, AUROCs.

    python tests/golden.py write FILE [--root DIR]     run the version in DIR (default: this one), keep what it made
    python tests/golden.py compare OLD NEW             list every difference of two such files; exits with 1 if any

Both files must come from the same machine: other CPUs add up in another order. Tensors are compared, not files, since
the layout of files may change. Takes about five minutes on 2 CPU cores.
"""
import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
PREP_ARRAYS = ["signals", "labels", "folds", "ecg_ids", "patient_ids"]


def digest(array):
    """The first 16 hex digits of the sha256 of an array's type, shape and bytes."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()[:16]


def run_stages(root, work):
    """The demo and a short run of the paper recipe by the scripts in `root`, below the folder `work`."""
    new = "--set" in (root / "02_train_joint.py").read_text(encoding="utf-8")

    def stage(name, *flags):
        subprocess.run([sys.executable, name, *map(str, flags)], cwd=root, check=True, stdout=subprocess.DEVNULL)

    data, prep = work / "data", work / "prep"
    stage("00_download.py", "--demo", "--data", data)
    stage("01_preprocess.py", "--demo", "--data", data, "--prep", prep)
    demo = ["--demo", "--prep", prep, "--run", work / "demo", "--threads", 1]
    for name in ("02_train_joint.py", "03_project.py", "04_fusion.py", "05_evaluate.py", "06_plot_prototypes.py"):
        stage(name, *demo)
    paper = ["--recipe", "paper", *demo[:4], work / "paper", *demo[5:]]
    short = ["--set", "epochs=1"] if new else ["--epochs", 1]
    stage("02_train_joint.py", *paper, *short)
    stage("03_project.py", *paper)
    stage("02_train_joint.py", *paper, *short, "--round", 2)
    stage("03_project.py", *paper)
    stage("04_fusion.py", *paper)


def tensors(path):
    return {k: digest(v.numpy()) for k, v in torch.load(path, weights_only=True)["state"].items()}


def collect(work):
    """What is compared: {name: value}, from the layout of either version."""
    found = {f"prep {name}": digest(np.load(work / "prep" / f"{name}.npy")) for name in PREP_ARRAYS}
    for run in ("demo", "paper"):
        for kind in ("joint", "projected"):
            for folder in sorted(p for p in (work / run).iterdir() if (p / f"{kind}.pt").is_file()):
                path = max(folder.glob(f"{kind}*.pt"))  # the last round
                found.update({f"{run} {folder.name} {kind} {k}": v for k, v in tensors(path).items()})
        for name in ("rhythm", "morphology", "global", "fusion", "fusion-own"):
            old = work / run / ("" if "fusion" in name else name) / ("classifier.pt" if "fusion" not in name else
                                                                     f"{name}.pt")
            path = old if old.is_file() else work / run / "classifiers" / f"{name}.pt"
            saved = torch.load(path, weights_only=True)
            for k in ("W", "b", "mean", "std"):
                found[f"{run} {name} {k}"] = saved[k].double().flatten().tolist()
        for folder in sorted((work / run).iterdir()):
            if (folder / "log.jsonl").is_file():
                lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                found[f"{run} {folder.name} fold 9 by epoch"] = [e["val_auroc"] for e in lines if e["epoch"]]
    metrics = json.loads((work / "demo" / "metrics.json").read_text())
    for name, p in metrics["predictions"].items():
        for k, v in {**{k: p[k] for k in ("auroc", "frequent", "auprc", "f1", "fold 9", "per batch")},
                     **p["groups"]}.items():
            found[f"demo metrics {name} {k}"] = v
    for rows in metrics["differences"].values():
        found.update({f"demo difference {what}": v for what, v in rows.items()})
    for path in sorted((work / "demo" / "cases").glob("*.json")):
        case = json.loads(path.read_text())
        for r in case["labels"]:
            found[f"demo case {path.stem} {r['label']}"] = [r["probability"], r["logit"], r["threshold"]]
    return found


def compare(old, new):
    """Print what differs between two collections; True if nothing does."""
    same = 0
    for key in sorted({*old, *new}):
        if key not in old or key not in new:
            print(f"only in {'OLD' if key in old else 'NEW'}: {key}")
        elif old[key] == new[key]:
            same += 1
        elif isinstance(old[key], list) and len(old[key]) == len(new[key]):
            moves = np.subtract(np.array(old[key], float), np.array(new[key], float))  # None: NaN
            print(f"largest difference {np.nanmax(np.abs(moves)):.1e}: {key}")
        else:
            print(f"different: {key}: {old[key]} {new[key]}")
    print(f"{same} of {len({*old, *new})} are equal")
    return same == len({*old, *new})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["write", "compare"])
    p.add_argument("files", nargs="+", type=Path)
    p.add_argument("--root", type=Path, default=ROOT)
    args = p.parse_args()
    if args.what == "compare":
        old, new = (json.loads(f.read_text()) for f in args.files)
        sys.exit(not compare(old, new))
    with tempfile.TemporaryDirectory(prefix="golden-") as work:
        run_stages(args.root.resolve(), Path(work))
        args.files[0].write_text(json.dumps(collect(Path(work)), indent=1) + "\n")


if __name__ == "__main__":
    main()
