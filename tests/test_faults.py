"""Nothing lost, nothing silently wrong: every stage killed, interrupted and on a full disk; permuted labels; what
--force overrode; flags that make no sense; no unsafe call in the sources; and the README's table of all this."""
import ast
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, change_prep, run_stage, sentence, write_joint, write_prep
from synthetic import write_dataset

import common

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of 05, which filters its own; pytest undoes that

# ---------------------------------------------------------------------------------------------------------------------
# Kills, Ctrl-C and full disks over the results of an earlier run. What lies there afterwards is the old file or the new
# one, never half of one, and the next run ends as if nothing had been. Stages run in forks of one process that has
# imported them all, so that a kill costs no more than the stage.

DRIVER = """
import importlib, json, os, pathlib, resource, signal, sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
stages = {{name: importlib.import_module(name) for name in {stages!r}}}
stages["05_evaluate"].DRAWS = 20
machine = dict(hardware="", device="cpu", threads=1, models={{}})  # times and memory differ between two equal runs
stages["05_evaluate"].efficiency = lambda args, models: machine
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
        signal.alarm(300)  # a stage that hangs is killed, and fails its test
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["most"], order["most"]))  # a write beyond it fails
        os.write(say, b"x")
        code = 0
        try:
            try:
                stages[order["stage"]].common.run(stages[order["stage"]].main)
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 1
                if isinstance(e.code, str):
                    print(e.code, file=sys.stderr)
            except Exception:
                import traceback
                traceback.print_exc()
                code = 9
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:
            pass  # before the stage began or after it had ended: within it common.run makes it one sentence
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
    small = ["--width", 8, "--batch", 16, "--epochs", 1, "--blackbox-epochs", 2, "--model", "blackbox-rhythm", "rhythm"]

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


@pytest.mark.parametrize("job", ["01", "02", "04", "05"])
def test_killed_at_a_random_moment(world, job):
    killed(world, job, 1, np.random.default_rng())


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_many_kills(world, job):
    killed(world, job, 50 if job == "02" else 20, np.random.default_rng())


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


@pytest.mark.parametrize("job", ["01", "02", "06"])  # all of them under -m slow
def test_ctrl_c(world, job):
    interrupted(world, job, 1, np.random.default_rng())


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_many_ctrl_c(world, job):
    interrupted(world, job, 10, np.random.default_rng())


def full_disk(world, job, sizes):
    """No file can grow beyond `most` bytes: the system call that writes fails, as it does on a full disk."""
    for most in sizes:
        folder = fresh(world, job)
        done = world.go(world.jobs[job], folder, most=int(most))
        last = done.text.splitlines()[-1]
        assert done.code == 1 and "Traceback" not in done.text, done.text
        assert re.fullmatch(r"the disk is full \((run|records)/.+\): free .* run the same command again", last), last
        assert not list(folder.rglob("*.tmp"))
        old_or_new(world, job, folder)


def sizes_of(world, job):
    """The sizes of the files that a job makes, less one byte; smaller ones than the log are left out."""
    before = tree(world.before[job])
    after = world.base / f"after-{job.replace(' ', '-')}"
    made = {name for name, content in world.after[job].items() if before.get(name) != content}
    return sorted({(after / n).stat().st_size - 1 for n in made if (after / n).is_file()} - {*range(4096)})


@pytest.mark.parametrize("job", ["01", "02", "06"])
def test_full_disk(world, job):
    full_disk(world, job, sizes_of(world, job)[:1])


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_disk_that_is_full_at_any_file(world, job):
    full_disk(world, job, sizes_of(world, job))


def test_leftovers_of_killed_runs_are_removed_and_others_stay(tmp_path, monkeypatch):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)  # so that its number belongs to no process
    node = platform.node()
    dead, alive = (tmp_path / f".signals.npy.{pid}@{node}.tmp" for pid in (child, os.getppid()))
    elsewhere = tmp_path / f".signals.npy.{child}@another-{node}.tmp"  # whose processes cannot be asked from here
    for path in (dead, alive, elsewhere, tmp_path / ".notes.tmp", tmp_path / "mine.1.tmp"):
        path.write_text("half")
    monkeypatch.setattr(common, "_swept", set())
    common.save_json(tmp_path / "preprocess.json", {})
    assert {p.name for p in tmp_path.iterdir()} == {alive.name, elsewhere.name, ".notes.tmp", "mine.1.tmp",
                                                    "preprocess.json"}


def test_same_artifact_same_bytes(tmp_path):
    """The fingerprint of a model does not depend on the process that saved it, nor on the folder."""
    for name in ("a", "b"):
        common.save_pt(tmp_path / name / f"{name}.pt", {"w": common.torch.ones(3)})
    assert common.file_hash(tmp_path / "a/a.pt") == common.file_hash(tmp_path / "b/b.pt")


@pytest.mark.parametrize("what", ["a file", "below a file", "name too long"])
def test_run_folder_that_cannot_be(tmp_path, monkeypatch, what):
    write_prep(tmp_path / "prep")
    (tmp_path / "file").write_text("mine")
    run = tmp_path / {"a file": "file", "below a file": "file/run", "name too long": "x" * 300}[what]
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, "02_train_joint", "--prep", tmp_path / "prep", "--run", run, "--model", "blackbox-1d",
                  "--width", 8, "--blackbox-epochs", 1, "--device", "cpu")
    assert "cannot be used" in e.value.code and str(run) in e.value.code and "--run" in e.value.code
    assert (tmp_path / "file").read_text() == "mine"


def test_copies_and_leftovers_in_a_models_folder_do_not_stop_training(tmp_path, monkeypatch):
    """Training removes later rounds of what it replaces, and nothing else."""
    write_prep(tmp_path / "prep")
    folder = tmp_path / "run" / "blackbox-1d"
    folder.mkdir(parents=True)
    leftover = f".last_r2.pt.{os.getppid()}@{platform.node()}.tmp"
    for name in ("joint_run2.pt", leftover, "joint_r2.pt"):
        (folder / name).touch()
    run_stage(monkeypatch, "02_train_joint", "--prep", tmp_path / "prep", "--run", tmp_path / "run", "--model",
              "blackbox-1d", "--width", 8, "--blackbox-epochs", 1, "--device", "cpu")
    assert {p.name for p in folder.iterdir()} >= {"joint_run2.pt", leftover, "joint.pt"}
    assert not (folder / "joint_r2.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Leakage, and what --force overrode

@pytest.mark.parametrize("leak", [False, True])
def test_permuted_labels_predict_nothing(tmp_path, monkeypatch, leak):
    """02, 03 and 04 on permuted labels of folds 1-9: AUROC .5 on the true labels of fold 10. With a `leak`, fold 10
    among the training records, it is far above that: so this test would find one."""
    rng, folder = np.random.default_rng(0), tmp_path / "prep"
    codes = ("SR", "AFIB", "STACH", "SBRAD", "SARRH", "PACE", "1AVB", "IVCD")
    folds = np.repeat([*range(1, 9), 9, 10], [20] * 8 + [40, 240])
    on = rng.random((len(folds), len(codes))) < 0.5
    pitch = np.geomspace(1, 24, 2 * len(codes)).reshape(-1, 2, 1)  # Hz: a label is one of two waves, equally strong
    waves = np.sin(2 * np.pi * pitch * np.arange(1000) / 100)                                             # [8, 2, 1000]
    signals = np.where(on[:, :, None], waves[:, 0], waves[:, 1]).sum(1)[:, None]
    signals = signals + rng.normal(0, 0.3, (len(on), 12, 1000))
    known = np.flatnonzero(folds <= 9)
    labels = np.zeros((len(on), 71), np.uint8)
    labels[:, common.columns(codes)] = on
    labels[known] = labels[rng.permutation(known)]
    write_prep(folder, n=len(on), codes=codes)
    prep, real = change_prep(folder, signals=signals.astype(np.float32), labels=labels, folds=folds), common.load_prep
    if leak:
        monkeypatch.setattr(common, "load_prep", lambda folder: SimpleNamespace(
            **{**vars(real(folder)), "train": (folds <= 8) | (folds == 10)}))
    flags = ["--prep", folder, "--run", tmp_path / "run", "--device", "cpu"]
    run_stage(monkeypatch, "02_train_joint", *flags, "--model", "rhythm", "--width", 8, "--batch", 16,
              "--augment", "no", "--epochs", 1, "--blackbox-epochs", 4)
    run_stage(monkeypatch, "03_project", *flags)
    run_stage(monkeypatch, "04_fusion", *flags)
    columns, found = common.columns(codes), {}
    for name in ("blackbox-rhythm", "rhythm"):
        logits = np.load(tmp_path / "run" / f"logits_{name}.npy")[prep.test[prep.val | prep.test]]
        found[name] = common.macro_auroc(prep.labels[prep.test][:, columns], logits[:, columns])
    assert all(v > 0.65 if leak else abs(v - 0.5) < 0.1 for v in found.values()), found


@pytest.mark.parametrize("stage", ["02", "03", "04"])
def test_what_force_overrode_stands_in_results_md(tmp_path, monkeypatch, stage):
    """A mismatch is refused by the stage that meets it; forced, it is a warning in results.md, whoever met it."""
    prep, other = write_prep(tmp_path / "prep"), write_prep(tmp_path / "other", seed=1)
    run, flags = tmp_path / "run", ["--prep", tmp_path / "prep", "--run", tmp_path / "run", "--device", "cpu"]
    write_joint(run, other if stage == "02" else prep, "blackbox-rhythm")
    if stage != "02":
        write_joint(run, other if stage == "03" else prep, "rhythm")
    for name, *more in (["02_train_joint", "--model", "rhythm", "--width", 8, "--seed", 0, "--epochs", 0],
                        ["03_project"], ["04_fusion", "--model", "rhythm"], ["05_evaluate"]):
        if name == "02_train_joint" and stage != "02":
            continue
        if name == "04_fusion" and stage == "04":
            write_joint(run, prep, "rhythm", seed=1)  # trained again, not projected again
        if name.startswith(stage):
            with pytest.raises(SystemExit) as e:
                run_stage(monkeypatch, name, *flags, *more)
            assert "--force" in sentence(e) and "was made from another" in sentence(e)
            more = [*more, "--force"]
        if name == "05_evaluate":
            meta = common.load_pt(run / "rhythm" / "joint.pt", "")["meta"]
            common.save_json(run / "rhythm" / "joint.json", {**meta, "seconds": 0.0})
        run_stage(monkeypatch, name, *flags, *more)
    wrong = {"02": "blackbox-rhythm/joint.pt", "03": "rhythm/joint.pt", "04": "rhythm/projected.pt"}[stage]
    warning = [line for line in (run / "results.md").read_text().splitlines() if line.startswith("**WARNING**")]
    assert len(warning) == 1 and f"{wrong} was made from another" in warning[0] and "run `python 0" in warning[0]


# ---------------------------------------------------------------------------------------------------------------------
# Flags

@pytest.mark.parametrize("argv, says", [(argv.split(), says) for argv, says in (
    ("01_preprocess --seed -1", "--seed"), ("05_evaluate --seed 4294967296", "--seed"),
    ("02_train_joint --width 0", "--width"), ("02_train_joint --patience 0", "--patience"),
    ("02_train_joint --top-k 0", "--top-k"),
    ("02_train_joint --batch 0", "--batch"), ("02_train_joint --blackbox-epochs 0", "--blackbox-epochs"),
    ("02_train_joint --epochs -1", "--epochs"), ("02_train_joint --dropout 1", "--dropout"),
    ("02_train_joint --dropout nan", "--dropout"), ("02_train_joint --blackbox-ema 2", "--blackbox-ema"),
    ("02_train_joint --lr -1", "--lr"), ("02_train_joint --lr nan", "--lr"), ("02_train_joint --lr inf", "--lr"),
    ("02_train_joint --weight-decay -1", "--weight-decay"), ("02_train_joint --lambda-clst nan", "--lambda-clst"),
    ("02_train_joint --add-on sigmoid", "--add-on"), ("02_train_joint --project-every 2", "--project-every"),
    ("02_train_joint --round 0", "--round"), ("02_train_joint --model blackbox-1d --round 2", "--round"),
    ("03_project --unique yes", "unrecognized"), ("04_fusion --model 3d", "--model"),
    ("05_evaluate --save ../results", "--save"), ("05_evaluate --save a/b", "--save"),
    ("06_plot_prototypes --top 0", "--top"), ("06_plot_prototypes --case x", "--case"),
    ("06_plot_prototypes --label SR", "--label"), ("06_plot_prototypes --case 10 --review", "--review"))],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_flags_that_make_no_sense(tmp_path, monkeypatch, capsys, argv, says):
    """Refused before anything is read but PREP, with exit code 2 and the name of the flag in the last line."""
    write_prep(tmp_path / "prep", n=10) if argv[0] == "02_train_joint" else None
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, *argv, "--prep", tmp_path / "prep", "--run", tmp_path / "run", "--device", "cpu")
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err.splitlines()[-1] and "error:" in err, err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Safety, by reading the sources

def unsafe(source):
    """Calls in Python source that could run what a file or the network says: a list of them, in words."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
                found.append("np.load without allow_pickle=False")
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "input"):
                found.append(name)
            if name.split(".")[0] in ("pickle", "subprocess", "joblib", "marshal", "shelve", "yaml"):
                found.append(name)
            if given.get("shell", "False") != "False" or given.get("verify", "True") != "True":
                found.append(f"{name} with shell or without verify")
        if isinstance(node, ast.Attribute) and node.attr in ("CERT_NONE", "_create_unverified_context",
                                                             "check_hostname"):
            found.append(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"http://(?!www\.w3\.org/2000/svg)\w[\w.]*", node.value)  # the name of a namespace
    return found


SOURCES = ["common.py", *(p.name for p in sorted(ROOT.glob("0?_*.py")))]


@pytest.mark.parametrize("name", SOURCES)
def test_no_unsafe_call(name):
    assert unsafe((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("line", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)", "np.load(path, allow_pickle=True)",
    "eval(text)", "exec(text)", "os.system(text)", "subprocess.run(text)", "f(text, shell=True)",
    "f(url, verify=False)", "ssl._create_unverified_context()", "c.check_hostname = False",
    "c.verify_mode = ssl.CERT_NONE",
    "url = 'http://example.org/x'", "pickle.load(f)"])
def test_an_unsafe_call_would_be_found(line):
    assert unsafe(line)


# ---------------------------------------------------------------------------------------------------------------------
# The README's table

def test_every_fault_in_the_readme_is_backed_by_a_test():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Faults tried, faults survived")[1].split("\n## ")[0]
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names, f"no test named: {row}"
        assert all(f"def {name}(" in tests for name in names), row
    assert len(rows) > 10
