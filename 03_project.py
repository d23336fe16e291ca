"""Stage 03, projection (paper 3.5, Stage 2, Eq. 8): each prototype becomes a patch of a real ECG.

Of all windows of all training records (folds 1-8) that carry the prototype's label it takes the
most similar. Prints the gap (mean of 1 - cosine of a prototype and its patch), distinct windows,
and fold 9 with Stage 1's head, which was fitted before; 04's, that counts, is fitted after.

reads   PREP/*.npy, preprocess.json, RUN/MODEL/joint.pt
writes  RUN/MODEL/projected.pt; prototypes.json: of each prototype class, ecg_id, window, samples,
        similarity, all labels of the source, three runners-up; prototypes.npy: the ECGs themselves

    python 03_project.py                     every prototype model of the run
    python 03_project.py --model rhythm      one of them

Takes half a minute a branch on 2 CPU cores. Last line:
`runs/default: projected rhythm, morphology, global`.
"""
import time

import numpy as np

import common
from common import BOXES, CODES


def fold_9_auroc(model, prep, device, prototypes):
    """Macro-AUROC on fold 9 with Stage 1's head and each of several `prototypes` [P, D, T]."""
    rows, aurocs = np.flatnonzero(prep.val), []
    y = prep.labels[rows][:, common.columns(model.classes)]
    for p in prototypes:
        model.p.data = p
        aurocs.append(common.macro_auroc(y, common.batched(model, prep, rows, device)))
    return aurocs


def describe(model, found, prep):
    """What prototypes.json says of each prototype, from the places `found` by `project`."""
    def place(ecg_id, window, cosine):
        labels = prep.labels[prep.row_of[ecg_id]]
        return {"ecg_id": ecg_id, "window": window,
                "samples": common.window_samples(model.kind, window),
                "similarity": round(cosine, 6), "labels": [c for c, on in zip(CODES, labels) if on]}

    return [{"index": j, "class": model.classes[model.p_class[j]], **place(*source),
             "runners_up": [place(*r) for r in runners_up]}
            for j, (source, *runners_up) in enumerate(found)]


def main():
    args = common.parse(common.argument_parser(__doc__, *common.RUN_FLAGS))
    prep = common.load_prep(args.prep)
    names = [n for n in args.model or common.trained_models(args.run) if n not in BOXES]
    for name in names:
        began = time.time()
        path = args.run / name / "joint.pt"
        model, meta = common.load_model(path, "02_train_joint.py", args)
        cfg, p_joint = common.config_of(meta), model.p.data.clone()
        z, carries, rows = common.training_set(model, prep, args.device)
        projected, found = common.project(z, carries, prep.ecg_ids[rows], p_joint,
                                          model.p_class, cfg.unique, runners=3)  # Eq. (8)
        model.p_patient.copy_(common.own_patients(found, prep, cfg))
        before, after = fold_9_auroc(model, prep, args.device, [p_joint, projected])

        prototypes = describe(model, found, prep)
        x = 1000 * prep.signals[[prep.row_of[q["ecg_id"]] for q in prototypes]]  # uV
        distinct = len({(q["class"], q["ecg_id"], q["window"]) for q in prototypes})
        records = len({q["ecg_id"] for q in prototypes})
        gap = float(np.mean([1 - q["similarity"] for q in prototypes]))
        made = common.provenance(args, (path, meta))
        x = x.round().clip(-32768, 32767).astype(np.int16)  # [P, 12, 1000]
        common.save(path.with_name("prototypes.npy"), x)
        common.save(path.with_name("projected.pt"), {
            "meta": {**meta, **made}, "p_joint": p_joint.cpu(),
            "state": {k: v.cpu() for k, v in model.state_dict().items()}})
        made = common.provenance(args, (path.with_name("projected.pt"), {**meta, **made}))
        common.save(path.with_name("prototypes.json"), {
            **made, "model": name, "kind": model.kind, "a": model.a, "top_k": model.top_k,
            "gap": gap, "distinct": distinct, "records": records, "val_auroc_before": before,
            "val_auroc_after": after, "descriptions": prep.info["descriptions"],
            "data": prep.info["data"], "prototypes": prototypes})
        print(f"{name:12s} {len(prototypes)} prototypes  gap {gap:.3f}  {distinct} distinct "
              f"windows of {records} records  fold 9 {before:.4f} -> {after:.4f}  "
              f"{time.time() - began:.1f} s", flush=True)
        if meta["round"] < cfg.rounds:
            again = f"02_train_joint.py --round {meta['round'] + 1}"
            print(f"the recipe has {cfg.rounds} rounds: next {again} with the flags of round 1")
    print(f"{args.run}: projected {', '.join(names)}")


if __name__ == "__main__":
    common.run(main)
