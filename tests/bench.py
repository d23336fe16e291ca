"""How fast every stage is on this machine: each is run as its user runs it, in a run folder of its own. Epochs of the
default recipe's networks are also timed by themselves: the training pass and fold 9 alone, and then the whole epoch of
the recipe, after which it projects the prototypes and solves the head.

    python tests/bench.py                                       the real data in data/ptbxl, the default width
    python tests/bench.py --synthetic 2000 --width 16           without real data
    python tests/bench.py --save cpu                            also keep the numbers as tests/results/bench/cpu.json
    python tests/bench.py --readme                              only write the README's table from tests/results/bench/

Seconds are wall-clock of the whole process (import of torch included), for an epoch those that 02 prints for the last
of --epochs epochs (fold 9 included, whose FLOP are not counted). FLOP are counted by torch for forward and backward
pass of the network; the peak is the best of six square matrix products in the type that training uses. Memory is the
largest resident set of a process (of the first rhythm epoch: of the black box that it starts from), on a GPU what torch
had allocated at most. Without --whole, 03 to 06 work on models that were trained for one epoch, and their black boxes
for --epochs. Let nothing else run meanwhile.
"""
import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

HEAD = ["step", "seconds", "records/s", "GFLOP/s", "share of peak", "peak memory"]


def run(script, *flags):
    """Run a stage to its end: (wall seconds, peak resident set in GiB, what it printed); exits if it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], stdout=out,
                                 stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        out.seek(0)
        text = out.read()
    if child.returncode:
        sys.exit(f"{script} failed:\n{text}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30, text


def matrix_peak(device, dtype):
    """FLOP/s of the best of six products of square matrices."""
    n, best = (8192 if device.type == "cuda" else 2048), 0
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def step_flop(model, width):
    """FLOP of one training step per record: forward and backward pass of `model`, counted by torch."""
    cfg = common.Config(width=width)
    kind, group = common.MODELS[model]
    classes, n = common.GROUPS[group], 8
    dim = len(common.GROUPS[common.MODELS[common.start_of(model, cfg)][1]])  # a latent for each class of the black box
    each = [0 if kind == "blackbox" else cfg.per_class[list(common.WINDOW).index(kind)]] * len(classes)
    net = common.BlackBox(classes, cfg) if kind == "blackbox" else common.ProtoECGNet(kind, classes, each, cfg,
                                                                                      latent_dim=dim)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(n, 12, common.SAMPLES))[0].sum().backward()
    return counter.get_total_flops() / n


def measure(args, work):
    """All rows of the table, as a list of dicts, with the machine they are of."""
    device = torch.device(args.device)
    fast = importlib.import_module("02_train_joint").bfloat16_is_fast(device)
    peak = matrix_peak(device, torch.bfloat16 if fast else torch.float32)
    rows, data, prep = [], Path(args.data).resolve(), work / "prep"
    shared = ["--data", data, "--prep", prep, "--device", args.device]
    shared += ["--threads", args.threads] if args.threads else []

    def add(step, seconds, memory, records=None, flop=None):
        rate = flop and flop * records / seconds
        rows.append({"step": step, "seconds": round(seconds, 2), "records/s": records and round(records / seconds),
                     "GFLOP/s": rate and round(rate / 1e9, 1), "share of peak": rate and round(rate / peak, 3),
                     "peak memory": f"{memory:.2f} GiB"})
        print(" ".join(f"{k} {v}" for k, v in rows[-1].items() if v is not None), flush=True)

    if args.synthetic:
        data = shared[1] = work / "data"
        run("00_download.py", "--synthetic", args.synthetic, "--data", data)
    seconds, memory, _ = run("01_preprocess.py", *shared)
    arrays = common.load_prep(prep)
    n, n_train = len(arrays.folds), int(arrays.train.sum())
    add("01, preprocessing", seconds, memory, n)

    def epoch(model, batch, *flags):
        """The last epoch of a short training: its seconds, and the peak memory."""
        _, memory, text = run("02_train_joint.py", *shared, "--run", work / f"batch-{batch}", "--model", model,
                              "--force", "--width", args.width, "--batch", batch, "--epochs", args.epochs,
                              "--blackbox-epochs", args.epochs, *flags)
        each = re.findall(rf"(?m)^{model} +epoch .* best [\d.]+ +([\d.]+) s ", text)
        gpu = re.search(r"GPU memory ([\d.]+) GiB", text)
        return float(each[-1]), float(gpu[1]) if gpu else memory

    batches = (32, common.Config().batch) if device.type == "cuda" else (common.Config().batch,)  # 32: the authors'
    for model, batch in [(m, b) for b in batches for m in ("blackbox-1d", "rhythm", "morphology", "global")]:
        plain = ["--head", "free", "--project-every", 0]
        add(f"02, an epoch of {model}, batch {batch}", *epoch(model, batch, *plain), n_train,
            step_flop(model, args.width))
        if model != "blackbox-1d":
            add(f"02, a whole epoch of {model} (with projection and head)", *epoch(model, batch), n_train)
    whole, whole_memory = 0, 0
    flags = ["--run", work / "run"]
    short = ["--width", args.width, *(["--blackbox-epochs", args.epochs, "--epochs", 1] if not args.whole else [])]
    for step, script, more, count in (
            ("02, Stage 1", "02_train_joint.py", short, None),
            ("03, projection of the branches", "03_project.py", [], n_train),
            ("04, scores and classifiers", "04_fusion.py", [], None), ("05, evaluation", "05_evaluate.py", [], None),
            ("06, all pictures", "06_plot_prototypes.py", [], None)):
        seconds, memory, _ = run(script, *shared, *flags, *more)
        whole, whole_memory = whole + seconds, max(memory, whole_memory)
        if script != "02_train_joint.py" or args.whole:
            add(step, seconds, memory, count)
    if args.whole:
        add("01 to 06, the whole run", whole + rows[0]["seconds"], whole_memory)
    return {"hardware": common.hardware(device), "threads": args.threads or torch.get_num_threads(), "records": n,
            "training_records": n_train, "width": args.width, "type": "bfloat16" if fast else "float32",
            "peak GFLOP/s": round(peak / 1e9), "torch": torch.__version__, "rows": rows}


def readme():
    """Write the table of every machine in tests/results/bench/ between README.md's two markers."""
    path, tables, evaluate = ROOT / "README.md", [], importlib.import_module("05_evaluate")
    for file in sorted((ROOT / "tests" / "results" / "bench").glob("*.json")):
        m = json.loads(file.read_text())
        tables.append(f"**{m['hardware']}**, {m['threads']} threads, width {m['width']}, {m['training_records']:,} "
                      f"training records, {m['type']} ({m['peak GFLOP/s']:,} GFLOP/s at most), torch {m['torch']}")
        cells = [["–" if r[k] is None else f"{r[k]:.1%}" if k == "share of peak" else str(r[k]) for k in HEAD]
                 for r in m["rows"]]
        tables.append(evaluate.table(HEAD, cells))
    if not tables:
        sys.exit("tests/results/bench holds no measurement: make one with `python tests/bench.py --save NAME` first")
    text = evaluate.fill(path.read_text(encoding="utf-8"), "bench", tables)
    with common.replacing(path) as t:
        t.write_text(text, encoding="utf-8")
    print(f"{path.name}: tables of {len(tables) // 2} machines")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=ROOT / "data" / "ptbxl", help="folder of the PTB-XL records (default data/ptbxl)")
    p.add_argument("--synthetic", type=int, metavar="N", help="time on N synthetic records instead")
    p.add_argument("--width", type=int, default=common.Config().width, help="width of the network (default 64)")
    p.add_argument("--epochs", type=int, default=2, help="epochs of each timed training (default 2)")
    p.add_argument("--whole", action="store_true", help="train the default run to its end, and time all of it")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    p.add_argument("--work", help="folder for what the stages write (default: a new temporary one)")
    p.add_argument("--save", metavar="NAME", help="keep the numbers as tests/results/bench/NAME.json")
    p.add_argument("--readme", action="store_true", help="only write the README's table")
    args = p.parse_args()
    if args.readme:
        return readme()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        found = measure(args, Path(args.work or temporary).resolve())
    if args.save:
        common.save_json(ROOT / "tests" / "results" / "bench" / f"{args.save}.json", found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
