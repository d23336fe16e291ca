"""How fast every stage is on this machine, run as its user runs it, and how large networks are.

    python tests/bench.py --save NAME          the real data; keeps tests/results/bench/NAME.json
    python tests/bench.py --synthetic 2000 --width 16           without real data

Seconds are of a process, or what 02 prints for its second epoch; none where other programs took
over 5 % of the machine. Share of peak: FLOP of forward and backward pass as torch counts them, over
the best of six matrix products. Latency: median of 25 single ECGs, one thread, networks in turn.
"""
import importlib
import os
import re
import subprocess
import sys
import tempfile
import timeit
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import plain  # noqa: E402

stage_2, stage_5 = (importlib.import_module(name) for name in ("02_train_joint", "05_evaluate"))
BUSY = "busy machine: not a measurement"


def clocks():
    """Seconds so far: wall, CPU of this program and its finished children, CPU of everything."""
    stat = Path("/proc/stat").read_text().split()
    user, nice, system, _, _, irq, softirq, steal = map(int, stat[1:9])
    ticks = user + nice + system + irq + softirq + steal
    return np.array([timeit.default_timer(), sum(os.times()[:4]), ticks / os.sysconf("SC_CLK_TCK")])


def watched(f, *args):
    """What f gives, its wall and CPU seconds, and whether the machine was busy with others."""
    began = clocks()
    result = f(*args)
    wall, own, everything = clocks() - began
    return result, wall, own, everything - own > 0.05 * wall * os.cpu_count()


def stage(script, *flags):
    """Run a stage to its end: its largest resident set in GiB, and what it printed."""
    out = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], **out) as child:
        text = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)  # wait() would not tell the memory
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{script} failed:\n{text}")
    return usage.ru_maxrss / 2**20, text


def matrix_peak(dtype, device):
    """FLOP/s of the best of six products of square matrices."""
    a = torch.randn(4096, 4096, dtype=dtype, device=device)
    seconds = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=6)  # waits for a GPU
    return 2 * len(a)**3 / min(seconds)


def step_flop(model, width):
    """FLOP of one training step per record: forward and backward pass, counted by torch."""
    classes = common.GROUPS[common.MODELS[model][1]]
    meta = dict(config={"width": width}, model=model, classes=classes, per_class=[5] * len(classes))
    with FlopCounterMode(display=False) as counter:
        common.build(meta)(torch.randn(8, 12, common.SAMPLES)).sum().backward()
    return counter.get_total_flops() / 8


@torch.inference_mode()
def sizes_and_latency(run):
    """A row for each network of a run: name, parameters, MB, milliseconds for an ECG."""
    args = common.SimpleNamespace(run=run, prep=None, device=torch.device("cpu"))
    names = [m for m in common.MODELS if (run / m / "joint.pt").is_file()]
    nets = [common.load_model(run / m / "joint.pt", "02_train_joint.py", args)[0] for m in names]
    x, seconds = torch.randn(1, 12, common.SAMPLES), np.zeros((26, len(nets)))
    torch.set_num_threads(1)
    for i, j in np.ndindex(*seconds.shape):  # networks in turn, the first round to warm up
        seconds[i, j] = timeit.timeit(lambda: nets[j](x), number=1)
    return [[name, sum(w.numel() for w in net.parameters()),
             round(sum(w.nbytes for w in net.state_dict().values()) / 1e6, 2), round(ms, 2)]
            for name, net, ms in zip(names, nets, 1000 * np.median(seconds[1:], 0))]


def measure_stages(args, work, peak):
    """A table with a row for each stage, and for an epoch of each model."""
    rows = [["step", "seconds", "records/s", "share of peak", "CPU seconds", "peak memory, GiB"]]
    prep = ["--prep", work / "prep", "--threads", torch.get_num_threads()]
    run = [*prep, "--run", work / "run"]

    def add(script, *flags, model=None):
        (memory, text), seconds, cpu, busy = watched(stage, script, *flags)
        step, timed = script[:2], [round(seconds, 1), "–", "–"]
        if model:
            step = f"02, an epoch of {model}"
            seconds = float(re.findall(r"([\d.]+) s +\d+ min left", text)[-1])
            rate = common.load_prep(work / "prep").train.sum() / seconds
            share = round(step_flop(model, args.width) * rate / peak, 3) if peak else "–"
            timed = [seconds, round(rate), share]
        timed = [BUSY, "–", "–"] if busy else timed
        rows.append([step, *timed, round(cpu, 1), round(memory, 2)])
        print(*rows[-1], sep="  ", flush=True)

    if args.synthetic:
        args.data = work / "data"
        stage("00_download.py", "--synthetic", args.synthetic, "--data", args.data)
    add("01_preprocess.py", "--data", args.data, *prep)
    settings = [f"width={args.width}", "epochs=2"]
    for model in ("blackbox-1d", *common.BRANCHES):
        add("02_train_joint.py", *run, "--model", model, "--set", *settings, model=model)
    for script in ("03_project.py", "04_fusion.py", "05_evaluate.py", "06_plot_prototypes.py"):
        add(script, *run)
    return rows


def main():
    p = common.argument_parser(__doc__, "data", "threads")
    p.add_argument("--synthetic", type=int, metavar="N", help="take N synthetic records")
    p.add_argument("--width", type=int, default=32)
    p.add_argument("--save", metavar="NAME", help="keep as tests/results/bench/NAME.json")
    args = common.parse(p)
    dtype = [torch.float32, torch.bfloat16][stage_2.bfloat16_is_fast(args.device.type)]
    peak, _, _, busy = watched(matrix_peak, dtype, args.device)
    machine = {"hardware": stage_2.hardware(args), "threads": torch.get_num_threads(),
               "load average": os.getloadavg()[0], "torch": torch.__version__, "width": args.width,
               "type": str(dtype), "peak GFLOP/s": BUSY if busy else round(peak / 1e9)}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stages = measure_stages(args, Path(folder), None if busy else peak)
        (theirs, ours), *_, busy = watched(plain.compare, Path(folder) / "prep", args.width)
        machine["a plain ResNet's step over ours"] = BUSY if busy else round(theirs / ours, 2)
        networks, _, _, busy = watched(sizes_and_latency, Path(folder) / "run")
    networks = [["network", "parameters", "MB", "ms for an ECG"],
                *([*row[:3], BUSY if busy else row[3]] for row in networks)]
    print(*(f"{k}: {v}" for k, v in machine.items()), sep="\n")
    for head, *rows in (stages, networks):
        print(stage_5.table(head, rows))
    if args.save:
        path = ROOT / f"tests/results/bench/{args.save}.json"
        common.save(path, {**machine, "stages": stages, "networks": networks})


if __name__ == "__main__":
    common.run(main)
