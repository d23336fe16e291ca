"""The paper's searches (Appendix E) with Optuna: lr, weight decay, dropout and scheduler, or the four lambdas.

    python tests/tune.py --model rhythm --trials 200 --study sqlite:///tune.db
    python tests/tune.py --model rhythm --trials 1000 --study sqlite:///lambdas.db --search lambdas \\
        --set dropout=0.3 batch=32 lr=1e-3 scheduler=plateau weight_decay=1e-4

A trial trains (02), projects (03) and fits the sparse classifier (04) in a folder of its own, in which it finds the black
boxes of --run; its value is the macro-AUROC on fold 9. Labels of fold 10 are not read. The same command goes on where a
search was; any number of workers may share a study and stop together. The paper gives no ranges: ours are in `suggest`.
Prints the settings of the best trial for 02's --set.
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import optuna
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


def suggest(trial, args, cfg):
    """What a trial proposes for each of --search, as {setting: value}."""
    new = {}
    if "training" in args.search:
        new.update(lr=trial.suggest_float("lr", 1e-5, 1e-2, log=True),
                   weight_decay=trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
                   dropout=trial.suggest_float("dropout", 0.0, 0.6),
                   scheduler=trial.suggest_categorical("scheduler", ["cosine", "onecycle", "plateau"]))
    if "lambdas" in args.search:  # two decades around those of the recipe
        for k in ("lambda_clst", "lambda_sep", "lambda_div", "lambda_cntrst"):
            new[k] = trial.suggest_float(k, getattr(cfg, k) / 100, getattr(cfg, k) * 100, log=True)
    if "batch" in args.search:
        new["batch"] = trial.suggest_categorical("batch", [32, 64, 128, 256])
    if "per_class" in args.search:  # the authors recommend 5-10, 15-20 and 3-8
        i = list(common.WINDOW).index(common.MODELS[args.model][0])
        each = list(cfg.per_class)
        each[i] = trial.suggest_int("per_class", *[(2, 20), (5, 40), (2, 16)][i])
        new["per_class"] = ",".join(map(str, each))
    return new


def value_of(args, settings, seed):
    """Fold-9 macro-AUROC of a branch trained with these settings, after projection and sparse classifier."""
    with tempfile.TemporaryDirectory(prefix="trial-") as folder:
        run = Path(folder)
        for box in common.BOXES:
            if (args.run / box / "joint.pt").is_file():
                (run / box).symlink_to((args.run / box).resolve())
        shared = ["--prep", args.prep, "--run", run, "--recipe", args.recipe, "--model", args.model]
        shared += ["--threads", args.threads] if args.threads else []
        text = [*args.set, *(f"{k}={v}" for k, v in settings.items())]
        for script, *more in (["02_train_joint.py", "--seed", seed, "--set", *text], ["03_project.py"],
                              ["04_fusion.py"]):
            done = subprocess.run([sys.executable, str(ROOT / script), *map(str, [*shared, *more])],
                                  capture_output=True, text=True)
            if done.returncode:
                raise optuna.TrialPruned(done.stderr.strip().splitlines()[-1])
        saved = torch.load(run / "classifiers" / f"{args.model}.pt", weights_only=True)
        return saved["meta"]["val_auroc"]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, choices=[m for m in common.MODELS if m not in common.BOXES])
    p.add_argument("--trials", type=int, required=True, help="finished trials that the study shall hold in the end")
    p.add_argument("--study", required=True, help="sqlite:///FILE or another database that Optuna knows")
    p.add_argument("--search", nargs="+", choices=["training", "lambdas", "batch", "per_class"], default=["training"])
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings that are not searched")
    p.add_argument("--recipe", choices=list(common.RECIPES), default="default")
    p.add_argument("--run", type=Path, default=Path("runs/default"), help="the run whose black boxes trials start from")
    p.add_argument("--prep", type=Path, default=Path("runs/prep"))
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--threads", type=int)
    args = p.parse_args()
    cfg = common.RECIPES[args.recipe]
    study = optuna.create_study(study_name=args.model, storage=args.study, direction="maximize", load_if_exists=True)
    about = [sorted(args.search), sorted(args.set), args.recipe, common.file_hash(args.prep / "preprocess.json")]
    if study.user_attrs.get("about", about) != about:
        sys.exit(f"--study {args.study} holds a search with other settings or data: name another one")
    study.set_user_attr("about", about)

    def objective(trial):
        study.sampler = optuna.samplers.TPESampler(seed=(10**4 * args.seed + trial.number) % 2**32)
        return value_of(args, suggest(trial, args, cfg), args.seed)

    states = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    while len(study.get_trials(deepcopy=False, states=states)) < args.trials:
        study.optimize(objective, n_trials=1)
    complete = study.get_trials(deepcopy=False, states=states[:1])
    if not complete:
        sys.exit(f"no trial of --study {args.study} reached its end: search something else")
    best = suggest(optuna.trial.FixedTrial(study.best_params), args, cfg)
    print(f"{args.model}: fold 9 {study.best_value:.4f} in trial {study.best_trial.number} of {len(complete)}: --set "
          + " ".join(f"{k}={v}" for k, v in best.items()))


if __name__ == "__main__":
    main()
