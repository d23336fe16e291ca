"""What do short explanations cost? Eq. (10) of finished runs at every L1 strength: AUROC over the
pieces of evidence that one must read; five minutes a run on 2 CPU cores.

    python tests/pieces.py runs/default runs/seed-43 runs/seed-44 --prep runs/prep

writes tests/results/pieces.csv and pieces.png: of each run, strength and fold the macro-AUROC of
the fusion and, as means over all that it predicts, the pieces that hold 95 % of a label's logit
(without sign), the share of the three largest, and what speaks against the label. Last in the csv
is how many of the classes with a weight for a label two runs have in common (Jaccard index).
"""
import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from faithfulness import evidence  # noqa: E402

fusion = importlib.import_module("04_fusion")
STRENGTHS = [2e-1, 1e-1, *fusion.STRENGTHS["default"]]


def curve(run, prep):
    """The rows of a run's csv, and its W [C, F] != 0 as chosen by 04."""
    head, rows = common.load_run(run, ["fusion"])[0], []
    s = [common.batched(lambda x: network.scores(network.latent(x)), prep,
                        np.arange(len(prep.folds)), "cpu", network.kind)
         for network in head.networks]
    patients = np.array([q["patient"] for q in head.prototypes])
    X, _, _ = fusion.standardise(np.concatenate(s, 1), head.A, prep, patients)  # Eq. (9)
    Y = prep.labels[:, common.columns(head.classes)].astype(float)
    off, W, b = np.array(head.pieces) != np.array(head.classes)[:, None], None, None
    for strength in STRENGTHS:
        lambda_ = fusion.lambda_of(strength, Y[prep.train], "default")
        W, b, _ = fusion.fit(X[prep.train], Y[prep.train], off, lambda_, W, b)
        logits = X @ W.T + b
        thresholds = fusion.thresholds_of(Y[prep.val], logits[prep.val])
        for fold, part in ((9, prep.val), (10, prep.test)):
            rows.append({"run": run.name, "strength": strength, "fold": fold,
                         "chosen": strength == head.strength, "weights": int((W != 0).sum()),
                         "auroc": common.macro_auroc(Y[part], logits[part]),
                         **evidence(X[part], W, b, thresholds)})
    return rows, head.W != 0


def plot(table):
    """AUROC over pieces, a line a run and fold, a ring where 04 stands."""
    figure = Figure((7, 4.5), layout="constrained")
    ax = figure.subplots()
    for (run, fold), part in table.groupby(["run", "fold"]):
        colour, style = ("#0072B2", "-") if fold == 9 else ("#D55E00", "--")
        marker = "os^Dv"[[*table["run"].unique()].index(run) % 5]
        ax.plot(part["pieces for 95 %"], part["auroc"], marker + style, color=colour, ms=4,
                label=f"{run}, fold {fold}")
        here = part[part["chosen"]]
        ax.plot(here["pieces for 95 %"], here["auroc"], "o", color=colour, mfc="none", ms=11)
    ax.set(xlabel="pieces of evidence that hold 95 % of a predicted label's logit",
           ylabel="macro-AUROC of the fusion, 71 labels", title="ring: the strength that 04 chooses")
    ax.grid(color="#BBBBBB", lw=0.5)
    ax.legend(fontsize=8)
    return figure


def main():
    p = common.argument_parser(__doc__, "prep", "threads", "demo")
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    args = common.parse(p)
    prep, rows, used = common.load_prep(args.prep), [], {}
    for run in args.runs:
        more, used[run.name] = curve(run, prep)
        rows += more
    table, out = pd.DataFrame(rows), ROOT / "tests/results"
    out.mkdir(parents=True, exist_ok=True)
    plot(table).savefig(out / "pieces.png", dpi=130)
    text = table.round(5).to_csv(index=False)
    for (a, A), (b, B) in itertools.combinations(used.items(), 2):
        text += f"# {a} and {b} {(A & B).sum() / (A | B).sum():.1%}\n"
    common.save(out / "pieces.csv", text)
    print(text)


if __name__ == "__main__":
    common.run(main)
