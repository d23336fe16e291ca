"""Packs what a finished run needs to explain an ECG, as small as it gets: weights in half
precision, no logits, and of PTB-XL the prototypes' own ECGs alone.

    python tests/pack.py --run runs/default                    writes tests/pretrained
    python tests/pack.py --run runs/demo --out packed          another run, another folder

Then `python 06_plot_prototypes.py --run tests/pretrained --record my/ecg` needs nothing else.
The model card, tests/pretrained/README.md, is made from RUN/metrics.json.
"""
import importlib
import json
import shutil
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import common  # noqa: E402

CARD = """# A trained ProtoECGNet

Made by `python tests/pack.py` from a run of the default recipe, seed {seed}, by these commands
(03 after all of 02):

```
{commands}
```

- **Says**: how probable each of {labels} diagnostic, form and rhythm statements of PTB-XL is for a
  12-lead ECG of 10 s, and which training ECGs it is like.
- **Trained on**: folds 1-8 of PTB-XL v1.0.3 at 100 Hz, {counts[train]:,} records; epoch, L1
  strength and thresholds were chosen on fold 9 ({counts[validation]:,}), but most settings in trials
  that had seen fold 10 too; figures are of fold 10 ({counts[test]:,} records of
  {counts[test_patients]:,} patients).
- **Macro-AUROC of the fusion** [95 % interval]: {auroc}; over labels with ten or more positives
  there: {frequent}.
- **Thresholds**: the best F1 on fold 9; .5 for labels with fewer than ten positives there.
- **Limits**: one data set, decades old, from few devices; rare labels are hardly measured; a
  prototype shows what the network finds alike, not what caused a diagnosis. For research, **not a
  medical device**.
- **Networks** are stored in half precision.

`*/prototypes.npy.gz` hold {prototypes} ECGs of PTB-XL (Wagner et al., *PTB-XL, a large publicly
available electrocardiography dataset*, version 1.0.3, PhysioNet 2022, doi:10.13026/kfzx-aw45, licence
CC BY 4.0), filtered at 0.5 Hz and rounded to whole microvolts.
"""


def pack(run, out):
    """Write the fusion of `run` and its branches to `out`."""
    path = run / "classifiers/fusion.pt"
    fusion = common.load(path, "04_fusion.py")
    del fusion["logits"]
    fusion["A"] = fusion["A"].to(torch.int8)  # zeros and ones
    fusion["meta"]["made_from"] = {}
    for branch in fusion["meta"]["branches"]:
        saved = common.load(run / branch / "projected.pt", "03_project.py")
        half = {k: v.half() if v.is_floating_point() else v for k, v in saved["state"].items()}
        name = f"{branch}/projected.pt"
        common.save(out / name, {"meta": {**saved["meta"], "made_from": {}}, "state": half})
        made_from = {name: common.file_hash(out / name)}
        fusion["meta"]["made_from"].update(made_from)
        info = common.load(run / branch / "prototypes.json", "03_project.py")
        common.save(out / branch / "prototypes.json", {**info, "made_from": made_from})
        shutil.copy(run / branch / "prototypes.npy.gz", out / branch)
    common.save(out / "classifiers/fusion.pt", fusion)


def card(run):
    """The model card, from the numbers of a run."""
    m = json.loads((run / "metrics.json").read_text())
    p, cell = m["predictions"]["fusion"], importlib.import_module("05_evaluate").cell
    prototypes = next(row["prototypes"] for row in m["cost"] if row["name"] == "fusion")
    m["commands"] = "\n".join(m["commands"])
    return CARD.format(**m, labels=p["auroc"][4], prototypes=prototypes, auroc=cell(p["auroc"]),
                       frequent=cell(p["frequent"]))


def main():
    p = common.argument_parser(__doc__, "run", "demo")
    p.add_argument("--out", type=Path, default=ROOT / "tests/pretrained", metavar="FOLDER")
    args = common.parse(p)
    pack(args.run, args.out)
    common.save(args.out / "README.md", card(args.run))
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.run} -> {args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    common.run(main)
