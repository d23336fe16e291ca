"""Nothing lost, nothing silently wrong: kills, full disks, changed and damaged inputs, permuted labels, unsafe calls."""
import ast
import json
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, change_prep, run_stage, sentence, write_prep, write_run

import common

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of 05, which filters its own; pytest undoes that

# ---- Kills and full disks over the results of an earlier run. What lies there afterwards is the old file or the new
# one, never half of one, and the next run ends as if nothing had been. Stages run in forks of one process that has
# imported them all, so that a kill costs no more than the stage.

DRIVER = """
import importlib, json, os, pathlib, resource, signal, sys, time, types
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
stages = {{name: importlib.import_module(name) for name in {stages!r}}}
stages["05_evaluate"].DRAWS = 20
stages["02_train_joint"].time = types.SimpleNamespace(time=lambda: 0.0)  # else two equal runs differ in their seconds
def slowly(path, data):  # so that kills meet half-written files
    with open(path, "wb") as f:
        f.write(data[:len(data) // 2])
        f.flush()
        time.sleep(0.01)
        f.write(data[len(data) // 2:])
pathlib.Path.write_bytes = slowly
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
            stages[order["stage"]].common.run(stages[order["stage"]].main)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
            print(e.code, file=sys.stderr)
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 9
        sys.stdout.flush()
        os._exit(code or 0)
    os.read(ready, 1)
    if order["after"] is not None:
        time.sleep(order["after"])
        os.kill(pid, order["signal"])
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(ready), os.close(say)
    print(json.dumps([status, time.monotonic() - began]), flush=True)
"""
STAGES = ["02_train_joint", "03_project", "04_fusion", "05_evaluate", "06_plot_prototypes"]
FOLDERS = ["--prep", "prep", "--run", "run", "--threads", 1]
DEVICE = ["--device", "cpu"]
JOBS = {
    "02": ["02_train_joint", *FOLDERS, *DEVICE, "--model", "rhythm", "--set", "width=16", "batch=16", "epochs=2",
           "blackbox_epochs=2"],
    "03": ["03_project", *FOLDERS, *DEVICE], "04": ["04_fusion", *FOLDERS, *DEVICE], "05": ["05_evaluate", *FOLDERS],
    "06": ["06_plot_prototypes", *FOLDERS, *DEVICE], "case": ["06_plot_prototypes", *FOLDERS, *DEVICE, "--case", 37]}


def tree(folder):
    """{name: content} of the whole files below `folder`; last.pt changes with every epoch: it must load."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tmp"):
        content = path.read_bytes()
        if path.name == "last.pt":
            content = sorted(common.load(path, ""))
        elif path.suffix == ".pdf":  # holds the date
            content = content[:5], content[-6:]
        found[path.relative_to(folder).as_posix()] = content
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """For every job the folder before it, with results of another seed, and after it; and go(job, folder, ...)."""
    base = tmp_path_factory.mktemp("faults")
    process = subprocess.Popen([sys.executable, "-c", DRIVER.format(root=str(ROOT), stages=STAGES)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(job, folder, after=None, how=signal.SIGKILL, most=-1, seed=None):
        argv = [str(a) for a in JOBS[job]] + (["--seed", str(seed)] if seed else [])
        order = {"stage": argv[0], "argv": argv[1:], "folder": str(folder), "log": str(base / "log"), "after": after,
                 "signal": how, "most": most}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        code, took = json.loads(process.stdout.readline())
        return SimpleNamespace(code=code, seconds=took, text=(base / "log").read_text())

    assert process.stdout.readline() == "ready\n"
    now, before, after, seconds = base / "start", {}, {}, {}
    write_prep(now / "prep")
    for seed in (1, None):
        for joint in now.glob("run/*/joint.pt"):  # 02 keeps a model until it is deleted
            joint.unlink()
        for job in JOBS:
            if seed is None:
                before[job], now = now, base / f"after-{job}"
                shutil.copytree(before[job], now)
            done = go(job, now, seed=seed if job == "02" else None)
            assert done.code == 0, done.text
            seconds[job], after[job] = done.seconds, tree(now)
    yield SimpleNamespace(go=go, before=before, after=after, seconds=seconds, base=base)
    process.stdin.close()
    process.wait(10)


def old_or_new(world, job, folder):
    before, after, now = tree(world.before[job]), world.after[job], tree(folder)
    for name, content in now.items():
        assert name.endswith("last.pt") or content in (before.get(name), after.get(name)), name
    assert not before.keys() & after.keys() - now.keys()


def fresh(world, job):
    shutil.rmtree(world.base / "now", ignore_errors=True)
    return shutil.copytree(world.before[job], world.base / "now")


def killed(world, job, kills, rng):
    """Kill -9 at random moments, now and then several in a row; then the next run ends as if there had been none. For
    02 that means: continued training is bit for bit the uninterrupted one."""
    while kills > 0:
        folder = fresh(world, job)
        for _ in range(min(kills, int(rng.integers(1, 4)))):
            kills -= 1
            done = world.go(job, folder, after=rng.uniform(0, 0.9 * world.seconds[job]))
            assert done.code in (-signal.SIGKILL, 0), done.text
            old_or_new(world, job, folder)
        done = world.go(job, folder)
        assert done.code == 0 and tree(folder) == world.after[job], done.text
        assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("job", ["02", "04", "05"])
def test_killed_at_a_random_moment(world, job):
    killed(world, job, 2 if job == "02" else 1, np.random.default_rng())


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_many_kills(world, job):
    killed(world, job, 15 if job == "02" else 6, np.random.default_rng())


def full_disk(world, job, sizes):
    """No file can grow beyond `most` bytes: the system call that writes fails, as it does on a full disk."""
    for most in sizes:
        folder = fresh(world, job)
        done = world.go(job, folder, most=int(most))
        assert done.code == 1 and "Traceback" not in done.text and "[Errno 27]" in done.text.splitlines()[-1], done.text
        old_or_new(world, job, folder)


def sizes_of(world, job):
    """The sizes of the files that a job makes, less one byte; smaller ones than the log are left out."""
    before, folder = tree(world.before[job]), world.base / f"after-{job}"
    made = [name for name, content in world.after[job].items() if before.get(name) != content]
    return sorted({(folder / n).stat().st_size - 1 for n in made} - {*range(4096)})


@pytest.mark.parametrize("job", ["02", "04"])
def test_full_disk(world, job):
    full_disk(world, job, sizes_of(world, job)[:1])


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_disk_that_is_full_at_any_file(world, job):
    full_disk(world, job, sizes_of(world, job))


def test_ctrl_c_is_one_sentence(world):
    folder = fresh(world, "02")
    done = world.go("02", folder, after=world.seconds["02"] / 2, how=signal.SIGINT)
    assert done.code in (0, 1) and "Traceback" not in done.text
    assert done.code == 0 or "interrupted" in done.text
    old_or_new(world, "02", folder)


# ---- Changed and damaged inputs

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A PREP and a run of the rhythm branch through 04."""
    folder, monkeypatch = tmp_path_factory.mktemp("whole"), pytest.MonkeyPatch()
    write_run(monkeypatch, folder / "run", write_prep(folder / "prep"), models=["rhythm"])
    monkeypatch.undo()
    return folder


@pytest.fixture
def copied(whole, tmp_path, monkeypatch):
    """A copy of it; returns run(stage, *flags)."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    folders = ["--prep", tmp_path / "prep", "--run", tmp_path / "run"]
    return lambda stage, *flags: run_stage(monkeypatch, stage, *folders, *flags)


LATER = {"03_project": "02_train_joint.py", "04_fusion": "03_project.py", "05_evaluate": "04_fusion.py",
         "06_plot_prototypes": "0[34]_"}
CHANGES = [(stage, changed) for i, stage in enumerate(LATER) for changed in
           ["prep", "joint", "projected"][:i + 1] if (stage, changed) != ("06_plot_prototypes", "prep")]


@pytest.mark.parametrize("stage, changed", CHANGES)
def test_a_changed_input_stops_every_later_stage_which_names_the_one_to_run(copied, tmp_path, stage, changed):
    if changed == "prep":
        change_prep(tmp_path / "prep", patient_ids=np.arange(60))
    else:
        path = tmp_path / "run/rhythm" / f"{changed}.pt"
        common.save(path, {**torch.load(path, weights_only=True), "more": 1})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as e:
        copied(stage, *(["--case", 10] if stage.startswith("06") else []))
    assert "another" in sentence(e) and re.search(rf"run {LATER[stage]}", sentence(e)), sentence(e)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    elif how == "foreign":
        path.write_bytes(b"not a file of this project")


INPUTS = [("02_train_joint", "prep/labels.npy"), ("03_project", "prep/preprocess.json"),
          ("03_project", "run/rhythm/joint.pt"), ("04_fusion", "run/rhythm/projected.pt"),
          ("05_evaluate", "run/classifiers/rhythm.pt"), ("06_plot_prototypes", "run/rhythm/prototypes.json"),
          ("06_plot_prototypes", "run/rhythm/prototypes.npy"), ("06_plot_prototypes", "run/classifiers/rhythm.pt")]


@pytest.mark.parametrize("how", ["missing", "truncated", "foreign"])
@pytest.mark.parametrize("stage, file", INPUTS)
def test_spoiled_input_gives_one_sentence(copied, tmp_path, stage, file, how):
    damage(tmp_path / file, how)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    flags = ["--case", 10] if stage.startswith("06") else ["--model", "rhythm"]
    with pytest.raises(SystemExit) as e:
        copied(stage, *flags)
    assert re.search(r"run 0\d_\w+\.py", sentence(e)), sentence(e)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


# ---- Leakage

@pytest.mark.parametrize("leak", [False, True])
def test_permuted_labels_predict_nothing(tmp_path, monkeypatch, leak):
    """02, 03 and 04 on permuted labels of folds 1-9: AUROC .5 on the true labels of fold 10. With a `leak`, fold 10
    among the training records, it is far above that: so this test would find one."""
    rng, folder = np.random.default_rng(0), tmp_path / "prep"
    codes = ("SR", "AFIB", "STACH", "SBRAD", "SARRH", "PACE", "1AVB", "IVCD")
    folds = np.repeat([*range(1, 9), 9, 10], [20] * 8 + [40, 240])
    on = rng.random((len(folds), len(codes))) < 0.5
    pitch = np.geomspace(1, 24, 2 * len(codes)).reshape(-1, 2, 1)  # Hz: a label is one of two waves, equally strong
    waves = np.sin(2 * np.pi * pitch * np.arange(1000) / 100)  # [8, 2, 1000]
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
    run_stage(monkeypatch, "02_train_joint", *flags, "--model", "rhythm", "--set", "width=16", "batch=16", "augment=no",
              "epochs=1", "blackbox_epochs=4")
    run_stage(monkeypatch, "03_project", *flags)
    run_stage(monkeypatch, "04_fusion", *flags)
    columns, found = common.columns(codes), {}
    for name in ("blackbox-rhythm", "rhythm"):
        saved = torch.load(tmp_path / "run/classifiers" / f"{name}.pt", weights_only=True)
        logits = saved["logits"].numpy()[prep.test[prep.val | prep.test]]
        found[name] = common.macro_auroc(prep.labels[prep.test][:, columns], logits[:, columns])
    assert all(v > 0.6 if leak else abs(v - 0.5) < 0.1 for v in found.values()), found


# ---- Safety, by reading the sources

def unsafe(source):
    """Calls in Python source that could run what a file or the network says: a list of them, in words."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if name in ("np.load", "eval", "exec", "compile", "__import__", "os.system", "os.popen", "input"):
                found.append(name)
            if name.split(".")[0] in ("pickle", "subprocess", "marshal", "shelve", "yaml") or name == "joblib.load":
                found.append(name)
            if given.get("shell", "False") != "False" or given.get("verify", "True") != "True":
                found.append(f"{name} with shell or without verify")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"http://(?!www\.w3\.org/2000/svg|127\.0\.0\.1)\w[\w.]*", node.value)
    return found


@pytest.mark.parametrize("name", ["common.py", *(p.name for p in sorted(ROOT.glob("0?_*.py")))])
def test_no_unsafe_call(name):
    assert unsafe((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("line", ["torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)",
                                  "eval(text)", "os.system(text)", "subprocess.run(text)", "f(url, verify=False)",
                                  "url = 'http://example.org/x'", "pickle.load(f)"])
def test_an_unsafe_call_would_be_found(line):
    assert unsafe(line)


def test_every_fault_in_the_readme_of_the_tests_is_backed_by_a_test():
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    rows = [line for line in text.split("## Faults tried")[1].splitlines() if line.startswith("| ")][2:]
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names and all(f"def {name}(" in tests for name in names), row
    assert len(rows) > 10
