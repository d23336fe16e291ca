"""The seven scripts together, as a user runs them: their layout, budgets, --help and safety; and
from records to pictures on a small data set."""
import ast
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import wfdb
from conftest import (
    PTBXL, ROOT, arguments, needs_ptbxl, run_stage, stage, training_latents)

import common

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # 05 filters its own
STAGES = ["00_download.py", "01_preprocess.py", "02_train_joint.py", "03_project.py",
          "04_fusion.py", "05_evaluate.py", "06_plot_prototypes.py"]
SCRIPTS = [*STAGES, "common.py"]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def lines_of(name):
    return text_of(name).splitlines()


# ---- Layout and budgets

def test_layout():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    files = {*SCRIPTS, "README.md", "requirements.txt", ".gitignore", "LICENSE"}
    assert all((ROOT / f).is_file() for f in files)
    assert STAGES == sorted(p.name for p in ROOT.glob("0?_*.py"))
    assert {f for f in tracked.split() if "/" not in f} in (files, set())  # none: no checkout


BUDGETS = dict(zip(SCRIPTS, (170, 150, 450, 90, 280, 550, 500, 600)))  # lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_budgets(script):
    lines = lines_of(script)
    assert len(lines) <= BUDGETS[script] and max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse(text_of(script))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def test_budget_of_all_scripts():
    lines = [line for script in SCRIPTS for line in lines_of(script)]
    assert len(lines) <= 2800 and sum(len(line.encode()) + 1 for line in lines) <= 150_000
    assert np.mean([len(line) for line in lines if line.strip()]) <= 52


def test_budget_of_readme_and_tests():
    assert len(lines_of("README.md")) <= 300 and len(text_of("README.md").encode()) <= 20_000
    assert sum(len(lines_of(path)) for path in (ROOT / "tests").glob("test_*.py")) <= 5000


@pytest.mark.parametrize("script", STAGES)
def test_help_is_the_docstring_on_one_screen(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, script[:-3], "--help")
    text, doc = capsys.readouterr().out, ast.get_docstring(ast.parse(text_of(script)))
    assert e.value.code == 0 and len(text.splitlines()) <= 60 and doc.splitlines()[0] in text
    assert all(f"\n{word} " in text for word in ("reads", "writes")) and "Last line:" in text
    flags = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE))
    assert {"--help", "--demo"} <= flags
    commands = re.findall(rf"^    python {re.escape(script)}(.*?)(?:   |$)", doc, re.MULTILINE)
    assert commands and set(re.findall(r"--[\w-]+", " ".join(commands))) <= flags


# ---- Safety, by reading the sources

UNSAFE = "np.load eval exec compile __import__ os.system os.popen input joblib.load".split()
UNSAFE_MODULES = "pickle subprocess marshal shelve yaml".split()


def unsafe(source):
    """What in Python source could run what a file or the network says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            bad = name in UNSAFE or name.split(".")[0] in UNSAFE_MODULES
            bad |= name == "torch.load" and given.get("weights_only") != "True"
            bad |= given.get("shell", "False") != "False" or given.get("verify", "True") != "True"
            found += [name] * bad
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.replace("http://www.w3.org/2000/svg", "")  # a name, not fetched
            found += re.findall(r"http://(?!127\.0\.0\.1)\w[\w.]*", text)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_unsafe_call(script):
    assert unsafe(text_of(script)) == []


@pytest.mark.parametrize("line", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)", "eval(text)",
    "os.system(text)", "subprocess.run(text)", "pickle.load(f)", "f(text, shell=True)",
    "f(url, verify=False)", "url = 'http://example.org/x'"])
def test_an_unsafe_call_would_be_found(line):
    assert unsafe(line)


# ---- All stages

def test_from_records_to_pictures(tmp_path, monkeypatch, capsys):
    """00 to 06 on 120 synthetic records with a tiny network: all is there and agrees."""
    monkeypatch.setattr(stage("05_evaluate"), "DRAWS", 100)
    data, place = ["--data", tmp_path / "data"], ["--prep", tmp_path / "prep"]
    flags = [*place, "--run", tmp_path / "run", "--threads", 1]
    tiny = ["width=16", "batch=32", "epochs=2", "per_class=2,3,2"]
    for name, *more in (
            ["00_download", "--synthetic", 120, *data], ["01_preprocess", *data, *place],
            ["02_train_joint", *flags, "--set", *tiny], ["03_project", *flags],
            ["04_fusion", *flags], ["05_evaluate", *flags],
            ["06_plot_prototypes", *flags, "--model", "global"],
            ["06_plot_prototypes", *flags, "--review"]):
        run_stage(monkeypatch, name, *more)
        assert str(tmp_path) in capsys.readouterr().out.splitlines()[-1]
    run, prep = tmp_path / "run", common.load_prep(tmp_path / "prep")
    for ecg_id, x in zip(prep.ecg_ids.tolist(), prep.signals):
        record = wfdb.rdrecord(str(tmp_path / f"data/records100/00000/{ecg_id:05d}_lr"))
        np.testing.assert_allclose(x, common.highpass(record.p_signal.T), atol=1e-5)
    found = {}
    for model in common.BRANCHES:
        args = arguments(run, tmp_path / "prep")
        net, _ = common.load_model(run / model / "projected.pt", "", args)
        z, rows = training_latents(net, prep)
        order, T = prep.ecg_ids[rows].tolist(), net.p.shape[2]
        found[model] = json.loads((run / model / "prototypes.json").read_text())["prototypes"]
        for q in found[model]:  # from folds 1-8, and exactly the patch that it names
            patch = z[order.index(q["ecg_id"]), :, q["window"]:q["window"] + T]
            assert torch.equal(patch, net.p[q["index"]].detach()) and q["class"] in q["labels"]
    names = {p.stem for p in (run / "classifiers").glob("*.pt")}
    assert names > {"fusion", "fusion-own", "macro", "rhythm", "rhythm-joint",
                    "rhythm-projected"}
    commands = json.loads((run / "metrics.json").read_text())["commands"]
    assert [c.split()[1][:2] for c in commands] == ["01", "02", "03", "04"]
    assert (run / "figures/gallery.html").read_text().count("<svg") == len(found["global"])
    assert (run / "results.html").is_file() and (run / "review.html").is_file()


def python(script, *flags):
    """Run a stage as its user does; fails the test with what it wrote to standard error."""
    done = subprocess.run(
        [sys.executable, script, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{script}: {done.stderr}"


@needs_ptbxl
def test_real_records_through_the_stages(tmp_path):
    """The rhythm branch, trained for a moment on 1,500 real records, is far above chance."""
    flags = ["--prep", tmp_path / "prep", "--run", tmp_path / "run", "--threads", 1]
    python("01_preprocess.py", "--data", PTBXL, *flags[:2], "--records", 1500)
    python("02_train_joint.py", *flags, "--model", "rhythm", "--set", "width=16", "batch=32",
           "epochs=12")
    for script in STAGES[3:6]:
        python(script, *flags)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["predictions"]["rhythm"]["auroc"][0] > 0.7
