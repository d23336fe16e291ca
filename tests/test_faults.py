"""Nothing lost, nothing silently wrong: kills, full disks, changed and damaged inputs, garbage in
fold 10, permuted labels."""
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import wfdb
from conftest import ROOT, change_prep, run_stage, save_prep, sentence, write_prep, write_run
from synthetic import write_dataset

import common

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # 05 filters its own
STAGES = ["02_train_joint", "03_project", "04_fusion", "05_evaluate", "06_plot_prototypes"]


# ---- Kills and full disks over the results of an earlier run: what lies there afterwards is the
# old file or the new one. Stages run in forks of a process that has imported them all.

DRIVER = """
import importlib, json, os, pathlib, resource, signal, sys, time, traceback, types
import torch
torch.set_num_threads(1)
stages = {name: importlib.import_module(name) for name in sys.argv[1:]}
stages["05_evaluate"].DRAWS = 20
stages["02_train_joint"].time = types.SimpleNamespace(time=lambda: 0.0)  # equal in all runs
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
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
        name, *argv = order["argv"]
        sys.argv = [name + ".py", *argv]
        os.chdir(order["folder"])
        log = os.open(order["log"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(300)  # a stage that hangs is killed, and fails its test
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["most"], order["most"]))
        code = 1
        try:
            stages[name].common.run(stages[name].main)
            code = 0
        except SystemExit as e:
            print(e, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)  # at once: to tear torch down takes longer than most stages
    if order["after"] is not None:
        time.sleep(order["after"])
        os.kill(pid, order["how"])
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code, time.monotonic() - began]), flush=True)
"""
FOLDERS = ["--prep", "prep", "--run", "run", "--threads", "1"]
TINY = "--set width=16 batch=16 epochs=2 per_class=2,2,2".split()
JOBS = {
    "02": ["02_train_joint", *FOLDERS, "--model", "rhythm", *TINY, "--seed", "2"],
    **{name[:2]: [name, *FOLDERS] for name in STAGES[1:]},
    "case": ["06_plot_prototypes", *FOLDERS, "--case", "37"]}


def tree(folder):
    """{name: content} of the whole files below a folder."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tmp"):
        content = path.read_bytes()
        if path.name == "last.pt":  # changes with every epoch: it must load
            content = sorted(common.load(path, ""))
        elif path.suffix == ".pdf":  # holds the date
            content = content[:5], content[-6:]
        found[path.relative_to(folder).as_posix()] = content
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """For every job the folder before it, with results of another seed, and after it; and go."""
    base = tmp_path_factory.mktemp("faults")
    process = subprocess.Popen([sys.executable, "-c", DRIVER, *STAGES], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def go(job, folder, *more, after=None, how=signal.SIGKILL, most=-1):
        order = {"argv": [*JOBS[job], *more], "folder": str(folder), "log": str(base / "log"),
                 "after": after, "how": how, "most": most}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        code, seconds = json.loads(process.stdout.readline())
        return SimpleNamespace(code=code, seconds=seconds, text=(base / "log").read_text())

    process.stdout.readline()  # ready
    now, before, after, seconds = base / "start", {}, {}, {}
    write_prep(now / "prep")
    for seed in (1, 2):
        for joint in now.glob("run/*/joint.pt"):  # 02 keeps a finished model until it is deleted
            joint.unlink()
        for job in JOBS:
            if seed == 2:
                before[job], now = now, base / f"after-{job}"
                shutil.copytree(before[job], now)
            done = go(job, now, *(["--seed", "1"] if job == "02" and seed == 1 else []))
            assert done.code == 0, done.text
            seconds[job], after[job] = done.seconds, tree(now)
    yield SimpleNamespace(go=go, before=before, after=after, seconds=seconds, base=base)
    process.stdin.close()
    process.wait(10)


def fresh(world, job):
    """The folder as it was before a job."""
    shutil.rmtree(world.base / "now", ignore_errors=True)
    return shutil.copytree(world.before[job], world.base / "now")


def old_or_new(world, job, folder):
    before, after, now = tree(world.before[job]), world.after[job], tree(folder)
    for name, content in now.items():
        assert name.endswith("last.pt") or content in (before.get(name), after.get(name)), name
    assert not before.keys() & after.keys() - now.keys()


def killed(world, job, kills):
    """Kill -9 at random moments, now and then several in a row; then the next run ends as if there
    had been none. So training that goes on is the uninterrupted one, bit for bit."""
    rng = np.random.default_rng()
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


@pytest.mark.parametrize("job", JOBS)
def test_killed_at_a_random_moment(world, job):
    killed(world, job, 2 if job == "02" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_many_kills(world, job):
    killed(world, job, 40 if job == "02" else 15)


def test_ctrl_c_is_one_sentence(world):
    folder = fresh(world, "02")
    done = world.go("02", folder, after=world.seconds["02"] / 2, how=signal.SIGINT)
    assert done.code == 0 or done.code == 1 and "interrupted" in done.text
    assert "Traceback" not in done.text
    old_or_new(world, "02", folder)


def full_disk(world, job, first):
    """No file can grow to its size: the call that writes fails, as it does on a full disk."""
    before, folder = tree(world.before[job]), world.base / f"after-{job}"
    made = [name for name, content in world.after[job].items() if before.get(name) != content]
    sizes = sorted({(folder / name).stat().st_size - 1 for name in made} - {*range(4096)})
    for most in sizes[:first]:  # what is printed goes to a file too: it must fit
        now = fresh(world, job)
        done = world.go(job, now, most=most)
        assert done.code == 1 and "Traceback" not in done.text, done.text
        assert "[Errno 27]" in done.text.splitlines()[-1]
        old_or_new(world, job, now)


@pytest.mark.parametrize("job", ["02", "04"])
def test_full_disk(world, job):
    full_disk(world, job, 1)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_disk_that_is_full_at_any_file(world, job):
    full_disk(world, job, None)


# ---- Changed and damaged inputs

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A PREP and a run of the rhythm branch through 04, with its black box."""
    folder, models = tmp_path_factory.mktemp("whole"), ["blackbox-rhythm", "rhythm"]
    with pytest.MonkeyPatch.context() as patch:
        write_run(patch, folder / "run", write_prep(folder / "prep"), models)
    return folder


@pytest.fixture
def refused(whole, tmp_path, monkeypatch):
    """refused(stage, *flags) on a copy of it: the sentence; nothing was written."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    folders = ["--prep", tmp_path / "prep", "--run", tmp_path / "run", "--threads", 1]

    def go(stage, *flags):
        before = tree(tmp_path)
        with pytest.raises(SystemExit) as e:
            run_stage(monkeypatch, stage, *folders, *flags)
        assert before == tree(tmp_path)
        return sentence(e)

    return go


PREP, BOX, JOINT, PROJECTED = "prep", "blackbox-rhythm/joint", "rhythm/joint", "rhythm/projected"
CHANGES = [
    ("02_train_joint --model rhythm --round 2", JOINT, "03_project"),
    ("03_project", PREP, "02_train_joint"),
    *(("04_fusion --model rhythm", changed, "03_project") for changed in (PREP, JOINT)),
    *(("05_evaluate", changed, "04_fusion") for changed in (PREP, BOX, JOINT, PROJECTED)),
    *(("06_plot_prototypes", changed, "04_fusion") for changed in (JOINT, PROJECTED)),
    ("06_plot_prototypes --case 10", PREP, "04_fusion")]


@pytest.mark.parametrize("command, changed, named", CHANGES)
def test_a_changed_input_stops_every_later_stage_which_names_the_one_to_run(
        refused, tmp_path, command, changed, named):
    path = tmp_path / f"run/{changed}.pt"
    if changed == PREP:
        change_prep(tmp_path / "prep", patient_ids=np.arange(60))
    else:
        common.save(path, {**torch.load(path, weights_only=True), "more": 1})
    message = refused(*command.split())
    assert "another" in message and f"run {named}.py again" in message, message


BOX_02 = "02_train_joint --model blackbox-1d --set width=16 batch=16 epochs=1"
INPUTS = [
    (BOX_02, "prep/labels.npy"), ("03_project", "prep/preprocess.json"),
    ("03_project", "run/rhythm/joint.pt"), ("04_fusion --model rhythm", "run/rhythm/projected.pt"),
    ("05_evaluate", "run/rhythm/prototypes.json"), *(("06_plot_prototypes", f"run/{f}") for f in (
        "rhythm/projected.pt", "rhythm/prototypes.npy.gz", "classifiers/rhythm.pt"))]
SPOILED = [(*each, how) for each in INPUTS for how in ("missing", "truncated", "foreign")]
SPOILED += [(command, "prep/signals.npy", "NaN") for command in (BOX_02, "03_project", "04_fusion")]
SPOILED += [("05_evaluate", "run/classifiers/rhythm.pt", how) for how in ("truncated", "foreign")]


@pytest.mark.parametrize("command, file, how", SPOILED)
def test_spoiled_input_gives_one_sentence(refused, tmp_path, command, file, how):
    path, content = tmp_path / file, (tmp_path / file).read_bytes()
    path.unlink()
    if how == "NaN":
        common.save(path, np.full((60, 12, 1000), np.nan, np.float32))
    elif how != "missing":
        path.write_bytes(content[:len(content) // 2] if how == "truncated" else b"foreign")
    message = refused(*command.split())
    assert re.search(r"run 0\d_\w+\.py|train with a lower lr", message), message


# ---- Leakage

def fitted(folder):
    """All that 01 to 04 learned, as a list of values."""
    prep = common.load_prep(folder / "prep")
    found = [prep.info[k] for k in ("scaler", "jaccard", "without_training_record")]
    for path in sorted((folder / "run").rglob("*.pt")):
        saved = torch.load(path, weights_only=True)
        if "logits" in saved:  # of folds 9 and 10
            saved["logits"] = saved["logits"][prep.val[prep.val | prep.test]].nan_to_num(-1)
        found += [saved["meta"].get(k) for k in ("val_auroc", "best_epoch", "strength", "path")]
        tensors = {**saved, **saved.get("state", {})}.values()
        found += [t.tolist() for t in tensors if torch.is_tensor(t)]
    return found


def test_nothing_that_is_fitted_depends_on_fold_10(tmp_path, monkeypatch):
    """01 to 04 twice, the second time with garbage as signals and labels of fold 10."""
    write_dataset(tmp_path / "clean/data", 40)
    data = shutil.copytree(tmp_path / "clean/data", tmp_path / "garbage/data")
    table = pd.read_csv(data / "ptbxl_database.csv", dtype=str, keep_default_na=False)
    test = table["strat_fold"] == "10"
    table.loc[test, "scp_codes"] = "{'AFIB': 100.0, 'DIG': 0.0}"
    table.to_csv(data / "ptbxl_database.csv", index=False)
    for name in table["filename_lr"][test]:
        record = wfdb.rdrecord(str(data / name), physical=False)
        record.d_signal = 500 - 3 * record.d_signal
        record.checksum = record.calc_checksum()
        record.wrsamp(write_dir=str((data / name).parent))
    for folder in ("clean", "garbage"):
        monkeypatch.chdir(tmp_path / folder)
        run_stage(monkeypatch, "01_preprocess", "--data", "data", "--prep", "prep")
        for job in ("02", "03", "04"):
            run_stage(monkeypatch, *JOBS[job])
    clean, garbage = (common.load_prep(tmp_path / f) for f in ("clean/prep", "garbage/prep"))
    for a, b in ((clean.signals, garbage.signals), (clean.labels, garbage.labels)):
        assert ((a != b).reshape(40, -1).any(1) == clean.test).all()
    assert fitted(tmp_path / "clean") == fitted(tmp_path / "garbage")


@pytest.mark.parametrize("leak", [False, True])
def test_permuted_labels_predict_nothing(tmp_path, monkeypatch, leak):
    """02 to 04 on permuted labels of folds 1-9: AUROC .5 on the true labels of fold 10. With a
    `leak`, fold 10 among folds 1-8 and 9, it is far above that: this test would find one."""
    rng = np.random.default_rng(0)
    codes = ("SR", "AFIB", "STACH", "SBRAD", "SARRH", "PACE", "1AVB", "IVCD")
    folds = np.repeat([*range(1, 9), 9, 10], [20] * 8 + [40, 200])
    on = rng.random((len(folds), len(codes))) < 0.5
    pitch = np.geomspace(1, 24, 16).reshape(8, 2, 1)  # Hz: a label is one of two waves
    waves = np.sin(2 * np.pi * pitch * np.arange(1000) / 100)  # [8, 2, 1000]
    signals = np.where(on[:, :, None], waves[:, 0], waves[:, 1]).sum(1)[:, None].astype("f4")
    signals = signals + rng.normal(0, 0.3, (len(on), 12, 1000)).astype("f4")
    known, ids = np.flatnonzero(folds <= 9), np.arange(len(on))
    labels = np.zeros((len(on), 71), np.uint8)
    labels[:, common.columns(codes)] = on
    labels[known] = labels[rng.permutation(known)]
    monkeypatch.chdir(tmp_path)
    prep = save_prep(Path("prep"), {"signals": signals, "labels": labels, "folds": folds,
                                    "ecg_ids": ids, "patient_ids": ids})
    if leak:
        leaks = {**vars(prep), "train": prep.train | prep.test, "val": prep.val | prep.test}
        monkeypatch.setattr(common, "load_prep", lambda folder: SimpleNamespace(**leaks))
    run_stage(monkeypatch, "02_train_joint", *FOLDERS, "--model", "rhythm", "--set", "width=16",
              "batch=16", "augment=no", "epochs=8")
    run_stage(monkeypatch, *JOBS["03"])
    run_stage(monkeypatch, *JOBS["04"])
    logits = torch.load("run/classifiers/rhythm.pt", weights_only=True)["logits"]
    logits = logits[prep.test[prep.val | prep.test]][:, common.columns(codes)]
    auroc = common.macro_auroc(on[prep.test], logits)
    assert auroc > 0.6 if leak else abs(auroc - 0.5) < 0.1


def test_every_fault_in_the_readme_of_the_tests_is_backed_by_a_test():
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8").split("## Faults tried")[1]
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names and all(f"def {name}(" in tests for name in names), row
    assert len(rows) > 10
