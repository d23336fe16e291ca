"""The paper's searches (Appendix E) with Optuna: training, then lambdas, on fold 9.

    python tests/tune.py --model rhythm --trials 200 --study sqlite:///tune.db
    python tests/tune.py --model rhythm --trials 1000 --study sqlite:///lambdas.db \\
        --search lambdas --set dropout=0.3 batch=32 lr=1e-3 scheduler=step

A trial trains (02), projects (03) and fits the sparse classifier (04) in a temporary run folder.
Its value is the classifier's macro-AUROC on fold 9; no label of fold 10 is read. Trials that
diverge are pruned. The same command goes on where a search was, and several workers may share a
study: all stop when it holds --trials finished trials. The paper gives no ranges; ours are in
`suggest`. Last line: the best trial as 02 takes it, `--set lr=... `.
"""
import importlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import optuna

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

stage_2 = importlib.import_module("02_train_joint")
COMPLETE, PRUNED = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED


def suggest(trial, args, cfg):
    """What a trial proposes for each of --search, as [NAME=VALUE]."""
    new = {}
    if "training" in args.search:
        new["lr"] = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
        new["weight_decay"] = trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True)
        new["dropout"] = trial.suggest_float("dropout", 0.0, 0.6)
        new["scheduler"] = trial.suggest_categorical("scheduler", stage_2.CHOICES["scheduler"])
    if "lambdas" in args.search:  # two decades around what they are; without a term, none
        for name in ("clst", "sep", "div", "cntrst"):
            k, value = f"lambda_{name}", getattr(cfg, f"lambda_{name}")
            if value:
                new[k] = trial.suggest_float(k, value / 100, value * 100, log=True)
    if "batch" in args.search:
        new["batch"] = trial.suggest_categorical("batch", [32, 64, 128, 256])
    if "per_class" in args.search:  # the authors recommend 5-10, 15-20 and 3-8
        each = list(cfg.per_class)
        i = list(common.WINDOW).index(common.MODELS[args.model][0])
        each[i] = trial.suggest_int("per_class", *[(2, 20), (5, 40), (2, 16)][i])
        new["per_class"] = ",".join(map(str, each))
    return [f"{k}={v}" for k, v in new.items()]


def value_of(args, settings):
    """Fold-9 macro-AUROC of the sparse classifier of a model trained with these settings."""
    with tempfile.TemporaryDirectory(prefix="trial-") as run:
        flags = ["--model", args.model, "--recipe", args.recipe, "--run", run, "--prep", args.prep]
        if args.threads:
            flags += ["--threads", args.threads]
        training = ["--seed", args.seed, "--set", *args.set, *settings]
        for script, more in (("02_train_joint", training), ("03_project", []), ("04_fusion", [])):
            command = [sys.executable, ROOT / f"{script}.py", *flags, *more]
            done = subprocess.run([*map(str, command)], capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1]
                if "lower lr" in reason:  # it diverged
                    raise optuna.TrialPruned(reason)
                sys.exit(reason)
        path = Path(run) / "classifiers" / f"{args.model}.pt"
        return common.load(path, "04_fusion.py")["meta"]["val_auroc"]


def open_study(args, about):
    """The study of this model in --study, new or as it was; exits if it is not about `about`."""
    how = dict(study_name=args.model, direction="maximize", load_if_exists=True)
    try:
        study = optuna.create_study(storage=args.study, **how)
    except Exception:  # of any database, when another worker is creating the same tables
        time.sleep(3)
        study = optuna.create_study(storage=args.study, **how)
    if study.user_attrs.get("about", about) != about:
        sys.exit(f"--study {args.study} is of other settings or data: name another one")
    study.set_user_attr("about", about)
    return study


def main():
    p = common.argument_parser(__doc__, "prep", "recipe", "seed", "threads")
    branches = [m for m in common.MODELS if m not in common.BOXES]
    p.add_argument("--model", required=True, choices=branches, metavar="MODEL")
    p.add_argument("--trials", type=int, required=True, help="finished trials in the end")
    p.add_argument("--study", required=True, help="sqlite:///FILE or what else Optuna takes")
    searches = ["training", "lambdas", "batch", "per_class"]
    p.add_argument("--search", nargs="+", choices=searches, default=searches[:1])
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of all trials")
    p.set_defaults(no_contrastive=False)
    args = common.parse(p)
    cfg = stage_2.settings(args, p)
    data = common.file_hash(common.load_prep(args.prep).path)
    study = open_study(args, json.dumps([sorted(args.search), asdict(cfg), data]))

    def objective(trial):
        seed = (10**4 * args.seed + trial.number) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed)  # workers differ, and repeat
        return value_of(args, suggest(trial, args, cfg))

    while len(study.get_trials(deepcopy=False, states=(COMPLETE, PRUNED))) < args.trials:
        study.optimize(objective, n_trials=1)
    complete = study.get_trials(deepcopy=False, states=(COMPLETE,))
    if not complete:
        sys.exit(f"every trial of --study {args.study} diverged: search something else")
    best = suggest(optuna.trial.FixedTrial(study.best_params), args, cfg)
    print(f"{args.model}: trial {study.best_trial.number} of {len(complete)} is best, "
          f"fold 9 {study.best_value:.4f}: --set {' '.join([*args.set, *best])}")


if __name__ == "__main__":
    common.run(main)
