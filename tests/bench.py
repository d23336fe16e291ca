"""How fast every stage is on this machine, each run as its user runs it, and what a trained model asks of it.

    python tests/bench.py --save NAME                 the real data in data/ptbxl; keeps tests/results/bench/NAME.json
    python tests/bench.py --synthetic 2000 --width 16 without real data

Seconds are of the whole process; of an epoch those that 02 prints for the last of --epochs epochs, fold 9, projection and
the head's refit included. FLOP are counted by torch for forward and backward pass; the peak is the best of six square
matrix products in the type that training uses. Latency: medians of 25 single ECGs, one thread, models in turn. When other
programs took more than 5 % of the machine meanwhile, the row says "busy" in place of seconds.
"""
import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

stage_2, stage_5 = (importlib.import_module(name) for name in ("02_train_joint", "05_evaluate"))
HEAD = ["step", "seconds", "CPU seconds", "records/s", "share of peak", "peak memory, GiB"]


def busy_seconds():
    """CPU seconds that all programs of the machine have used so far."""
    user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def run(script, *flags):
    """Run a stage to its end: (wall seconds or None if the machine was busy, CPU seconds, peak GiB, what it printed)."""
    began, machine = time.perf_counter(), busy_seconds()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], stdout=out,
                                 stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
        out.seek(0)
        text = out.read()
    if child.returncode:
        sys.exit(f"{script} failed:\n{text}")
    others = busy_seconds() - machine - cpu
    idle = others < 0.05 * seconds * os.cpu_count()
    return seconds if idle else None, cpu, usage.ru_maxrss / 2**20, text


def matrix_peak(dtype):
    """FLOP/s of the best of six products of square matrices."""
    n, best = 2048, 0
    a = torch.randn(n, n, dtype=dtype)
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def step_flop(model, width):
    """FLOP of one training step per record: forward and backward pass, counted by torch."""
    cfg, (kind, group) = common.Config(width=width), common.MODELS[model]
    classes, n = common.GROUPS[group], 8
    each = [cfg.per_class[list(common.WINDOW).index(kind)] if kind in common.WINDOW else 0] * len(classes)
    net = common.BlackBox(classes, cfg) if kind == "blackbox" else common.ProtoECGNet(
        kind, classes, each, cfg, latent_dim=71)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(n, 12, common.SAMPLES))[0].sum().backward()
    return counter.get_total_flops() / n


@torch.inference_mode()
def latencies(folder):
    """Parameters, MB and milliseconds for one ECG of each model of a run, one thread, the models in turn."""
    args = SimpleNamespace(run=folder, prep=None, device=torch.device("cpu"))
    names = [m for m in common.MODELS if (folder / m / "joint.pt").is_file()]
    nets = {m: common.load_model(folder / m / "joint.pt", "02_train_joint.py", args)[0] for m in names}
    x, seconds = torch.randn(1, 12, common.SAMPLES), {m: [] for m in names}
    torch.set_num_threads(1)
    for _ in range(26):
        for name, net in nets.items():
            began = time.perf_counter()
            net(x)
            seconds[name].append(time.perf_counter() - began)
    return [{"model": m, "parameters": sum(w.numel() for w in nets[m].parameters()),
             "MB": round(sum(w.nbytes for w in nets[m].state_dict().values()) / 1e6, 2),
             "ms": round(1000 * float(np.median(seconds[m][1:])), 2)} for m in names]


def measure(args, work):
    """All rows, with the machine that they are of."""
    fast, data = stage_2.bfloat16_is_fast("cpu"), Path(args.data).resolve()
    peak, rows, prep = matrix_peak(torch.bfloat16 if fast else torch.float32), [], work / "prep"
    threads = ["--threads", args.threads] if args.threads else []
    if args.synthetic:
        data = work / "data"
        run("00_download.py", "--synthetic", args.synthetic, "--data", data)

    def add(step, seconds, cpu, memory, records=None, flop=None):
        known = seconds and records
        share = round(flop * records / seconds / peak, 3) if known and flop else None
        rows.append(dict(zip(HEAD, [step, round(seconds, 1) if seconds else "busy", round(cpu, 1),
                                    round(records / seconds) if known else None, share, round(memory, 2)])))
        print(rows[-1], flush=True)

    add("01", *run("01_preprocess.py", "--data", data, "--prep", prep, *threads)[:3])
    arrays = common.load_prep(prep)
    n = int(arrays.train.sum())
    shared = ["--prep", prep, "--run", work / "run", *threads]
    settings = ["--set", f"width={args.width}", f"epochs={args.epochs}", f"blackbox_epochs={args.epochs}"]
    for model in ("blackbox-rhythm", "blackbox-1d", "rhythm", "morphology", "global"):
        seconds, cpu, memory, text = run("02_train_joint.py", *shared, "--model", model, *settings)
        last = float(re.findall(r"([\d.]+) s +\d+ min left", text)[-1])
        add(f"02, an epoch of {model}", last if seconds else None, cpu, memory, n, step_flop(model, args.width))
    for script in ("03_project.py", "04_fusion.py", "05_evaluate.py", "06_plot_prototypes.py"):
        add(script[:2], *run(script, *shared)[:3])
    return {"hardware": common.hardware(torch.device("cpu")), "threads": args.threads or torch.get_num_threads(),
            "load": os.getloadavg()[0], "records": len(arrays.folds), "width": args.width, "torch": torch.__version__,
            "type": "bfloat16" if fast else "float32", "peak GFLOP/s": round(peak / 1e9), "rows": rows,
            "latency": latencies(work / "run")}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=ROOT / "data" / "ptbxl", help="default data/ptbxl")
    p.add_argument("--synthetic", type=int, metavar="N", help="time on N synthetic records instead")
    p.add_argument("--width", type=int, default=common.Config().width)
    p.add_argument("--epochs", type=int, default=2, help="epochs of each timed training (default 2)")
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    p.add_argument("--save", metavar="NAME", help="keep the numbers as tests/results/bench/NAME.json")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        found = measure(args, Path(work))
    if args.save:
        common.save(ROOT / "tests" / "results" / "bench" / f"{args.save}.json", found)
    print(f"{found['hardware']}, {found['threads']} threads, load {found['load']:.1f}, width {found['width']}, "
          f"{found['type']} ({found['peak GFLOP/s']} GFLOP/s at most), torch {found['torch']}")
    print(stage_5.table(HEAD, [[("–" if r[k] is None else r[k]) for k in HEAD] for r in found["rows"]]))
    print(stage_5.table(["model", "parameters", "MB", "ms"], [list(r.values()) for r in found["latency"]]))


if __name__ == "__main__":
    main()
