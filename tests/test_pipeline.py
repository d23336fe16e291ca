"""The seven scripts together, as a user runs them: every --help, and from records to pictures on a small data set."""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import wfdb
from conftest import PTBXL, ROOT, needs_ptbxl, run_stage, sentence, write_prep

import common

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of 05, which filters its own; pytest undoes that
STAGES = sorted(p.name for p in ROOT.glob("0?_*.py"))


def python(script, *flags):
    """Run a stage as its user does; returns its standard output, and fails the test with its standard error."""
    done = subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}: {done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_layout():
    assert STAGES == ["00_download.py", "01_preprocess.py", "02_train_joint.py", "03_project.py", "04_fusion.py",
                      "05_evaluate.py", "06_plot_prototypes.py"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = {*STAGES, "common.py", "README.md", "requirements.txt", ".gitignore", "LICENSE"}
    assert all((ROOT / f).is_file() for f in files)
    assert {f for f in tracked if "/" not in f} in (files, set())  # none: not a git checkout


@pytest.mark.parametrize("script", STAGES)
def test_help_is_the_docstring_and_names_every_flag(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run_stage(monkeypatch, script[:-3], "--help")
    text = capsys.readouterr().out
    assert e.value.code == 0
    first = (ROOT / script).read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    assert first in text
    for flag in "--data --prep --run --recipe --model --small --demo --seed --device --threads".split():
        assert flag in text
    assert re.search(r"(?m)^reads ", text) and re.search(r"(?m)^writes ", text) and "Last line:" in text


def test_from_records_to_pictures(tmp_path, monkeypatch, capsys):
    """00 to 06 on 120 synthetic records with a tiny network: every artifact is there and they agree. (The README's demo
    starts each stage as a process of its own.)"""
    flags = ["--data", tmp_path / "data", "--prep", tmp_path / "prep", "--run", tmp_path / "run", "--device", "cpu",
             "--threads", 1]
    small = ["--width", 8, "--batch", 32, "--epochs", 1, "--blackbox-epochs", 2, "--per-class", 2, 3, 2]
    last = []
    for name, *more in (["00_download", "--synthetic", 120], ["01_preprocess"], ["02_train_joint", *small],
                        ["03_project"], ["04_fusion"]):
        run_stage(monkeypatch, name, *flags, *more)
        last.append(capsys.readouterr().out.splitlines()[-1])
    last.append(python("05_evaluate.py", *flags).splitlines()[-1])
    run, prep = tmp_path / "run", common.load_prep(tmp_path / "prep")
    for ecg_id, x in zip(prep.ecg_ids.tolist(), prep.signals):  # 01 reads them in parts of 64: each in its own row
        record = wfdb.rdrecord(str(tmp_path / "data" / "records100" / "00000" / f"{ecg_id:05d}_lr")).p_signal.T
        np.testing.assert_allclose(x, common.highpass(record), atol=1e-5)
    assert "120 records" in last[1] and all(str(tmp_path) in line for line in last)
    ids, count = set(prep.ecg_ids[prep.train].tolist()), 0
    for model in common.BRANCHES:
        found = json.loads((run / model / "prototypes.json").read_text())
        net, _ = common.load_model(run / model / "projected.pt", "")
        z, carries, z_ids = common.training_set(net, prep, net.p.device)
        for q in found["prototypes"]:  # from folds 1-8, of its own class, and exactly the patch that it names
            assert q["ecg_id"] in ids and q["class"] in q["labels"]
            row = int(np.flatnonzero(z_ids == q["ecg_id"])[0])
            patch = z[row, :, q["window"]:q["window"] + net.p.shape[2]]
            assert (patch - net.p[q["index"]].detach()).abs().max() < 1e-5
        count += len(found["prototypes"])
    boxes = ["blackbox-1d", "blackbox-rhythm"]
    predictions = json.loads((run / "predictions.json").read_text())["models"]
    assert {"fusion", "fusion-own", "macro", *common.BRANCHES, *boxes} <= set(predictions)
    for name in predictions:
        logits, probabilities = (np.load(run / f"{k}_{name}.npy") for k in ("logits", "probabilities"))
        assert logits.shape == probabilities.shape == ((prep.val | prep.test).sum(), 71)
        assert np.array_equal(np.isnan(logits), np.isnan(probabilities))
    assert (run / "results.md").is_file() and (run / "figures" / "per_class_auroc.png").is_file()

    # Every model and the fusion were measured, each in a process of its own: as large as they are, more memory for more
    # ECGs, at least that of the ECGs themselves
    sizes = {n: r for n, r in json.loads((run / "efficiency.json").read_text())["models"].items()}
    assert set(sizes) == {"fusion", *common.BRANCHES, *boxes}
    for model in (*common.BRANCHES, *boxes):
        net, _ = common.load_model(common.newest(run / model, "joint", "")[1], "")
        assert sizes[model]["parameters"] == sum(w.numel() for w in net.parameters())
    for row in sizes.values():
        assert row["ms 256"] > 0 < row["ms 1"] and 0 <= row["peak 1"] < row["peak 256"]
        assert 256 * 12 * 1000 * 4 / 1e6 < row["peak 256"] < 500

    # A second evaluation writes the same bytes; a changed data set is refused with the stage to run
    before = (run / "results.md").read_bytes()
    run_stage(monkeypatch, "05_evaluate", *flags)
    assert (run / "results.md").read_bytes() == before
    run_stage(monkeypatch, "06_plot_prototypes", *flags, "--model", "global")
    assert len(list((run / "figures" / "global").glob("*.png"))) == len(
        json.loads((run / "global" / "prototypes.json").read_text())["prototypes"])
    run_stage(monkeypatch, "01_preprocess", *flags, "--records", 118)
    for script in STAGES[3:6]:
        with pytest.raises(SystemExit) as e:
            run_stage(monkeypatch, script[:-3], *flags)
        assert re.search(r"run `python 0\d_\w+\.py", sentence(e)), script


@needs_ptbxl
def test_real_records_through_the_stages(tmp_path):
    """The rhythm branch on the first 1,500 real records, trained on for a moment, is far better than chance."""
    flags = ["--data", PTBXL, "--prep", tmp_path / "prep", "--run", tmp_path / "run", "--device", "cpu"]
    python("01_preprocess.py", *flags, "--records", 1500)
    python("02_train_joint.py", *flags, "--model", "rhythm", "--width", 16, "--batch", 32, "--blackbox-epochs", 12,
           "--epochs", 1)
    for script in STAGES[3:6]:
        python(script, *flags)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["predictions"]["rhythm"]["auroc"][0] > 0.7


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A PREP and a run of the rhythm branch through 05, with a tiny network."""
    base = tmp_path_factory.mktemp("trained")
    write_prep(base / "prep")
    with pytest.MonkeyPatch.context() as patch:
        for script, *flags in (["02_train_joint", "--model", "rhythm", "--width", 8, "--batch", 16, "--epochs", 0,
                                "--blackbox-epochs", 1], ["03_project"], ["04_fusion"], ["05_evaluate"]):
            run_stage(patch, script, "--prep", base / "prep", "--run", base / "run", "--device", "cpu", *flags)
    return base


@pytest.fixture
def small_run(trained, tmp_path, monkeypatch):
    """A copy of it in tmp_path, to be damaged; returns run(script, *flags)."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return lambda script, *flags: run_stage(monkeypatch, script, "--prep", tmp_path / "prep", "--run", tmp_path / "run",
                                            "--device", "cpu", *flags)


def spoil(path, how):
    """Damage an artifact: gone, cut in half, of another kind, of another network, or its numbers replaced by NaN."""
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    elif how == "foreign":
        path.write_bytes(b"not an artifact of this project")
    elif path.suffix == ".pt":
        saved = torch.load(path, weights_only=True)
        if how == "architecture":
            saved["meta"]["config"]["width"] = 16
        for name in ("p", "head.weight") if how == "NaN" else ():
            saved["state"].get(name, torch.ones(1)).mul_(torch.nan)
        torch.save(saved, path)
    else:
        np.save(path, np.load(path) * np.float32(np.nan))


INPUTS = [  # what each stage reads
    ("02_train_joint", "prep/signals.npy"), ("02_train_joint", "run/blackbox-rhythm/joint.pt"),
    ("03_project", "prep/signals.npy"), ("03_project", "run/rhythm/joint.pt"),
    ("04_fusion", "prep/signals.npy"), ("04_fusion", "run/rhythm/projected.pt"), ("04_fusion", "run/rhythm/joint.pt"),
    ("04_fusion", "run/rhythm/prototypes.json"),
    ("05_evaluate", "run/logits_rhythm.npy"), ("05_evaluate", "run/predictions.json"),
    ("06_plot_prototypes", "run/rhythm/projected.pt"), ("06_plot_prototypes", "run/rhythm/prototypes.json"),
    ("06_plot_prototypes", "run/rhythm/classifier.pt"),
    *((script[:-3], f"prep/{name}") for script in STAGES[2:] for name in ("preprocess.json", "labels.npy"))]


WEIGHTS = ("joint.pt", "projected.pt")
SPOILED = [(script, file, how) for script, file in INPUTS for how in (
    "missing", "truncated", "foreign", *["NaN"] * file.endswith((*WEIGHTS, "signals.npy", "logits_rhythm.npy")),
    *["architecture"] * file.endswith(WEIGHTS))]
SPOILED.remove(("02_train_joint", "run/blackbox-rhythm/joint.pt", "missing"))  # it is trained then


@pytest.mark.parametrize("script, file, how", SPOILED)
def test_spoiled_input_gives_one_sentence(small_run, tmp_path, script, file, how):
    path = tmp_path / file
    spoil(path, how)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    small = ["--width", 8, "--blackbox-epochs", 1, "--epochs", 0, "--force"]
    flags = {"02_train_joint": [*small, "--model", "rhythm" if "joint.pt" in file else "blackbox-1d"],
             "06_plot_prototypes": ["--case", 10, "--force"]}.get(script, [])
    with pytest.raises(SystemExit) as e:
        small_run(script, *flags)
    message = sentence(e)
    assert re.search(r"run `python 0\d_\w+\.py|lower --(blackbox-)?lr", message), message
    left = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "last.pt"}
    if (script, how) != ("04_fusion", "missing"):  # its black box needs no prototypes and is done before
        assert {p: b for p, b in before.items() if p.name != "last.pt"} == left  # no partial output
