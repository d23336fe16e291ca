"""Nothing lost: every stage killed, interrupted and run on a full disk at random moments, over the results of an earlier
run. What lies there afterwards is the old file or the new one, never half of one, and the next run ends as if nothing
had been. Stages run in forks of one process that has imported them all, so that a kill costs what the stage costs."""
import json
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, write_prep
from synthetic import write_dataset

import common

DRIVER = """
import importlib, json, os, pathlib, resource, signal, sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
stages = {{name: importlib.import_module(name) for name in {stages!r}}}
stages["05_evaluate"].DRAWS = 20
write = pathlib.Path.write_bytes
def slowly(path, data):  # so that kills meet half-written files
    with open(path, "wb") as f:
        f.write(data[:len(data) // 2])
        f.flush()
        time.sleep(0.01)
        f.write(data[len(data) // 2:])
pathlib.Path.write_bytes = slowly
pathlib.Path.write_text = lambda path, text, encoding="utf-8": slowly(path, text.encode(encoding))
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    began, (ready, say) = time.monotonic(), os.pipe()
    pid = os.fork()
    if pid == 0:
        sys.argv = [order["stage"] + ".py", *order["argv"]]
        os.chdir(order["folder"])
        with open(order["log"], "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["most"], order["most"]))  # a write beyond it fails
        os.write(say, b"x")
        code = 0
        try:
            stages[order["stage"]].common.run(stages[order["stage"]].main)
        except SystemExit as e:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 9
        sys.stdout.flush()
        os._exit(code)
    os.read(ready, 1)
    if order["after"] is not None:
        time.sleep(order["after"])
        os.kill(pid, order["signal"])
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(ready), os.close(say)
    print(json.dumps([status, time.monotonic() - began]), flush=True)
"""
STAGES = ["01_preprocess", "02_train_joint", "03_project", "04_fusion", "05_evaluate", "06_plot_prototypes"]


def tree(folder):
    """{name: what is in it} of the whole files below `folder`, without what differs between two equal runs."""
    def content(path):
        raw = path.read_bytes()
        if path.name == "last.pt":  # changes with every epoch: it must load
            return sorted(common.load_pt(path, "02_train_joint.py"))
        if path.suffix == ".pdf":  # holds the date
            return raw[:5], raw[-6:]
        return strip(json.loads(raw)) if path.suffix == ".json" else raw

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k != "seconds"}
        return [strip(v) for v in value] if isinstance(value, list) else value

    found = {p.relative_to(folder).as_posix(): content(p) for p in sorted(folder.rglob("*"))
             if p.is_file() and p.suffix != ".tmp"}
    if "run/predictions.json" in found:  # grows with every prediction: each of them is an artifact
        found |= {f"run/predictions.json, {k}": v for k, v in found["run/predictions.json"].pop("models").items()}
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """For every job (a stage with its flags) the folder before it, with results of an earlier run, and after it; and
    go(job, folder, ...), which runs it in a fork and returns its exit code and all that it printed."""
    base = tmp_path_factory.mktemp("faults")
    log, seconds = base / "log", {}
    process = subprocess.Popen([sys.executable, "-c", DRIVER.format(root=str(ROOT), stages=STAGES)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(argv, folder, after=None, how=signal.SIGKILL, most=-1):
        process.stdin.write(json.dumps({"stage": argv[0], "argv": [str(a) for a in argv[1:]], "folder": str(folder),
                                        "log": str(log), "after": after, "signal": how, "most": most}) + "\n")
        process.stdin.flush()
        code, took = json.loads(process.stdout.readline())
        return SimpleNamespace(code=code, seconds=took, text=log.read_text())

    write_dataset(base / "data", 40, 0, False)
    write_prep(base / "start" / "prep")
    folders = ["--prep", "prep", "--run", "run", "--device", "cpu", "--threads", 1]
    small = ["--width", 8, "--batch", 16, "--epochs", 1, "--blackbox-epochs", 2, "--model", "blackbox-1d", "rhythm"]

    def jobs(seed):
        yield "01", ["01_preprocess", "--data", base / "data", "--prep", "records", "--records", 30 + 5 * seed,
                     "--device", "cpu", "--threads", 1]
        yield "02", ["02_train_joint", *folders, *small, "--seed", seed, "--force"]
        for stage in STAGES[2:5]:
            yield stage[:2], [stage, *folders]
        yield "06", ["06_plot_prototypes", *folders, "--model", "rhythm"]
        yield "06 case", ["06_plot_prototypes", *folders, "--model", "rhythm", "--case", 37, "--top", 1]

    assert process.stdout.readline() == "ready\n"
    now, before, after = base / "start", {}, {}
    for seed in (1, 2):
        for job, argv in jobs(seed):
            if seed == 2:
                before[job] = now
                now = base / f"after-{job.replace(' ', '-')}"
                shutil.copytree(before[job], now)
            done = go(argv, now)
            assert done.code == 0, done.text
            seconds[job], after[job] = done.seconds, tree(now)
    yield SimpleNamespace(go=go, before=before, after=after, seconds=seconds, jobs=dict(jobs(2)), base=base)
    process.stdin.close()
    process.wait(10)


JOBS = ["01", "02", "03", "04", "05", "06", "06 case"]


def old_or_new(world, job, folder):
    """Every file is as before the job or as after it. For a moment at its end 01 has no preprocess.json, without which
    every stage refuses the arrays; with it they are one set."""
    before, after, now = tree(world.before[job]), world.after[job], tree(folder)
    for name, content in now.items():
        assert content in (before.get(name), after.get(name)), name
    gone = before.keys() & after.keys() - now.keys()
    assert gone <= {"records/preprocess.json"}, gone
    if job == "01" and not gone:
        assert now in (before, after)


def fresh(world, job):
    """A folder as it was before the job."""
    shutil.rmtree(world.base / "now", ignore_errors=True)
    return shutil.copytree(world.before[job], world.base / "now")


def killed(world, job, kills, rng):
    """`kills` times kill -9 at a random moment, now and then twice in a row, and each time the next run succeeds."""
    while kills > 0:
        folder = fresh(world, job)
        for _ in range(min(kills, int(rng.integers(1, 4)))):
            kills -= 1
            done = world.go(world.jobs[job], folder, after=rng.uniform(0, world.seconds[job]))
            assert done.code in (-signal.SIGKILL, 0), done.text
            old_or_new(world, job, folder)
        done = world.go(world.jobs[job], folder)
        assert done.code == 0 and tree(folder) == world.after[job], done.text
        assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("job", JOBS)
def test_killed_at_a_random_moment(world, job):
    killed(world, job, 1, np.random.default_rng())


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_fifty_kills(world, job):
    killed(world, job, 50, np.random.default_rng())


def resumed(world, kills, rng):
    """02 --resume from nothing, killed again and again: each run goes on, and the last one ends with the bytes of one
    that was never killed."""
    folder = world.base / "now"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world.base / "start" / "prep", folder / "prep")
    command = [*(a for a in world.jobs["02"] if a != "--force"), "--resume"]
    for _ in range(kills):
        done = world.go(command, folder, after=rng.uniform(0, 0.6 * world.seconds["02"]))
        assert done.code in (-signal.SIGKILL, 0), done.text
        tree(folder)  # last.pt can be read
    done = world.go(command, folder)
    assert done.code == 0, done.text
    now = tree(folder)
    assert now == {name: world.after["02"][name] for name in now} and "run/rhythm/joint.pt" in now


def test_resumed_after_a_kill(world):
    resumed(world, 2, np.random.default_rng())


@pytest.mark.slow
def test_resumed_after_many_kills(world):
    for _ in range(10):
        resumed(world, 5, np.random.default_rng())


def interrupted(world, job, times, rng):
    """Ctrl-C at a random moment: one sentence that says how to go on, nothing half-written, every file old or new."""
    for _ in range(times):
        folder = fresh(world, job)
        done = world.go(world.jobs[job], folder, after=rng.uniform(0, world.seconds[job]), how=signal.SIGINT)
        assert done.code in (0, 1) and "Traceback" not in done.text, done.text
        assert done.code == 0 or re.search("interrupted: .* run the same command again", done.text.splitlines()[-1])
        assert not list(folder.rglob("*.tmp"))
        old_or_new(world, job, folder)


@pytest.mark.parametrize("job", JOBS)
def test_ctrl_c(world, job):
    interrupted(world, job, 1, np.random.default_rng())


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_many_ctrl_c(world, job):
    interrupted(world, job, 20, np.random.default_rng())


def full_disk(world, job, sizes):
    """No file can grow beyond `most` bytes: the system call that writes fails, as it does on a full disk."""
    for most in sizes:
        folder = fresh(world, job)
        done = world.go(world.jobs[job], folder, most=int(most))
        last = done.text.splitlines()[-1]
        assert done.code == 1 and "Traceback" not in done.text, done.text
        assert re.match(r"the disk is full \((run|records)/.+\): free", last) and "run the same command again" in last, last
        assert not list(folder.rglob("*.tmp"))
        old_or_new(world, job, folder)


def sizes_of(world, job):
    """The sizes of the files that a job makes, less one byte; smaller ones than the log are left out."""
    before = tree(world.before[job])
    after = world.base / f"after-{job.replace(' ', '-')}"
    made = {name for name, content in world.after[job].items() if before.get(name) != content}
    return sorted({(after / name).stat().st_size - 1 for name in made if (after / name).is_file()} - {*range(4096)})


@pytest.mark.parametrize("job", JOBS)
def test_full_disk(world, job):
    full_disk(world, job, sizes_of(world, job)[:1])


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_disk_that_is_full_at_any_file(world, job):
    full_disk(world, job, sizes_of(world, job))
