"""Script 03, projection (paper 3.5, Stage 2, Eq. 8): each prototype becomes a patch of a real ECG.

Of all windows of all training records (folds 1-8) that carry the prototype's label it takes the
most similar; in our recipe prototypes of a class keep apart. Prints the gap (mean of 1 - cosine of
a prototype and its patch). What it costs in AUROC is seen in 04, which fits a classifier to either.

reads   PREP/*.npy, preprocess.json, RUN/MODEL/joint.pt
writes  RUN/MODEL/projected.pt; prototypes.json, with source and similarity of each;
        prototypes.npy.gz: the ECGs themselves

    python 03_project.py                     every prototype model of the run
    python 03_project.py --model rhythm      one of them

Takes half a minute a branch. Last line: `runs/default: projected rhythm, morphology, global`.
"""
import numpy as np
import torch

import common
from common import BOXES, CODES


def project(z, carries, ids, p, p_class, unique=False):
    """Eq. (8): for every prototype the most similar window among records that carry its class.

    z [N, D, L], carries [N, C] bool, ids [N] ascending, p [P, D, T], p_class [P] -> projected p, a
    list of (id, window, cosine). Ties go to the lowest id, then the earliest window. With `unique`
    no two prototypes of a class take the same place, if it has others: the best match is first.
    """
    projected, found = p.clone(), [None] * len(p)
    for c in p_class.unique().tolist():
        own = torch.where(p_class == c)[0].tolist()
        members = np.flatnonzero(carries[:, c])  # Z_j of Eq. (8)
        # in float64, rounded: in float32 equal windows may differ by a last bit
        S = torch.cat([common.similarity(z[part].double(), p[own].double()).float()
                       for part in np.array_split(members, -(-len(members) // 512))])
        S = S.transpose(0, 1).numpy()  # [own, n, windows]
        free = S.copy()
        for i in np.argsort(-S.max((1, 2)), kind="stable"):
            record, window = np.unravel_index(free[i].argmax(), free[i].shape)
            if unique:  # within two latent steps is one place: below every cosine of a free one
                free[:, record, max(0, window - 2):window + 3] -= 4
            j, row = own[i], members[record]
            projected[j] = z[row, :, window:window + p.shape[2]]  # Eq. (8)
            found[j] = int(ids[row]), int(window), float(S[i, record, window])
    return projected, found


def main():
    args = common.parse(common.argument_parser(__doc__, *common.RUN_FLAGS))
    prep = common.load_prep(args.prep)
    rows = np.flatnonzero(prep.train)  # by ecg_id, as 01 sorts them
    names = [n for n in args.model or common.trained_models(args.run) if n not in BOXES]
    for name in names:
        joint, path = (args.run / name / f"{kind}.pt" for kind in ("joint", "projected"))
        model, meta = common.load_model(joint, "02_train_joint.py", args)
        z = common.batched(model.latent, prep, rows, args.device, f"{name}: latents")
        cfg, model = common.Config(**meta["config"]), model.cpu()
        p_joint = model.p.data
        carries = prep.labels[rows][:, common.columns(model.classes)] > 0
        projected, found = project(
            z, carries, prep.ecg_ids[rows], p_joint, model.p_class, cfg.unique)
        model.p.data, source = projected, [prep.row_of[ecg_id] for ecg_id, _, _ in found]
        if not cfg.own_patient:
            model.p_patient.copy_(torch.from_numpy(prep.patient_ids[source]))

        prototypes = [{
            "model": name, "kind": model.kind, "index": j, "ecg_id": ecg_id, "window": window,
            "class": model.classes[model.p_class[j]], "patient": int(model.p_patient[j]),
            "samples": common.window_samples(model.kind, window), "similarity": round(cosine, 6),
            "labels": [c for c, on in zip(CODES, prep.labels[source[j]]) if on],
        } for j, (ecg_id, window, cosine) in enumerate(found)]
        gap = float(np.mean([1 - cosine for _, _, cosine in found]))
        distinct = len({(q["class"], q["ecg_id"], q["window"]) for q in prototypes})
        microvolt = (1000 * prep.signals[source]).round().clip(-32768, 32767)  # [P, 12, 1000]
        common.save(path.with_name("prototypes.npy.gz"), microvolt.astype(np.int16))
        meta = {**meta, **common.provenance(args, (joint, meta))}
        common.save(path, {"meta": meta, "p_joint": p_joint, "state": model.state_dict()})
        common.save(path.with_name("prototypes.json"), {
            **common.provenance(args, (path, meta)), "gap": gap, "distinct": distinct,
            "descriptions": prep.info["descriptions"], "data": prep.info["data"],
            "prototypes": prototypes})
        print(f"{name:12s} {len(prototypes)} prototypes  gap {gap:.3f}  {distinct} distinct "
              f"windows of {len(set(source))} records", flush=True)
    print(f"{args.run}: projected {', '.join(names)}")


if __name__ == "__main__":
    common.run(main)
