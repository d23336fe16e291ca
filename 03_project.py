"""Script 03, projection (paper 3.5, Stage 2, Eq. 8): prototypes become patches of ECGs.

Each takes the most similar window of training records with its label; in our recipe
those of a class keep apart. Gap: mean of 1 - cosine of prototype and patch.

reads   PREP, RUN/MODEL/joint.pt
writes  RUN/MODEL/projected.pt; prototypes.json, .npy.gz: sources, ECGs

    python 03_project.py                  all prototype models
    python 03_project.py --model rhythm   one of them

Takes a minute. Last line: `RUN: projected rhythm, morphology, global`.
"""
import numpy as np
import torch

import common
from common import BOXES, CODES


def project(z, carries, p, p_class, unique=False):
    """Eq. (8): a prototype takes the most similar window of records of its class.

    z [N, D, L], carries [N, C] bool, p [P, D, T], p_class [P] -> projected p,
    [(row, window, cosine)]. Ties of rounded cosines go to the first row, window.
    With `unique` those of a class lie apart, if they can, the best match first.
    """
    projected, found = p.clone(), [None] * len(p)
    for c in p_class.unique().tolist():
        own = torch.where(p_class == c)[0].tolist()
        members = np.flatnonzero(carries[:, c])  # Z_j of Eq. (8)
        S, p_own = [], p[own].double()
        for part in np.array_split(members, -(-len(members) // 512)):
            S.append(common.similarity(z[part].double(), p_own).float())  # equal ones tie
        S = torch.cat(S).transpose(0, 1).numpy()  # [own, n, windows]
        free = S.copy()
        for i in np.argsort(-S.max((1, 2)), kind="stable"):
            n, window = np.unravel_index(free[i].argmax(), free[i].shape)
            if unique:  # 2 steps around: below all free
                free[:, n, max(0, window - 2):window + 3] -= 4
            j, row = own[i], members[n]
            projected[j] = z[row, :, window:window + p.shape[2]]  # Eq. (8)
            found[j] = int(row), int(window), float(S[i, n, window])
    return projected, found


def main():
    args = common.parse(common.argument_parser(__doc__, *common.RUN_FLAGS))
    prep = common.load_prep(args.prep)
    rows = np.flatnonzero(prep.train)
    names = [n for n in args.model or common.trained_models(args.run) if n not in BOXES]
    for name in names:
        path = args.run / name / "joint.pt"
        model, meta = common.load_model(path, "02_train_joint.py", args)
        cfg, made = meta["config"], common.provenance(args, (path, meta))
        z = common.batched(model.latent, prep, rows, args.device, f"{name}: latents")
        model = model.cpu()
        carries = prep.labels[rows][:, common.columns(model.classes)] > 0
        p_joint = model.p.data
        model.p.data, found = project(z, carries, p_joint, model.p_class, cfg["unique"])
        source = [rows[n] for n, _, _ in found]
        if not cfg["own_patient"]:
            model.p_patient.copy_(torch.from_numpy(prep.patient_ids[source]))
        prototypes = []
        for j, (_, window, cosine) in enumerate(found):
            labels = [c for c, on in zip(CODES, prep.labels[source[j]]) if on]
            prototypes.append({
                "model": name, "kind": model.kind, "index": j,
                "class": model.classes[model.p_class[j]], "labels": labels,
                "ecg_id": int(prep.ecg_ids[source[j]]), "window": window,
                "samples": common.window_samples(model.kind, window),
                "patient": int(model.p_patient[j]), "similarity": round(cosine, 6)})
        gap = float(np.mean([1 - cosine for _, _, cosine in found]))
        distinct = len({(q["class"], q["ecg_id"], q["window"]) for q in prototypes})
        uV = (1000 * prep.signals[source]).round().clip(-32768, 32767)
        common.save(path.with_name("prototypes.npy.gz"), uV.astype(np.int16))
        path, meta = path.with_name("projected.pt"), {**meta, **made}
        common.save(path, dict(meta=meta, p_joint=p_joint, state=model.state_dict()))
        info = {k: prep.info[k] for k in ("descriptions", "data")}
        info.update(gap=gap, distinct=distinct, prototypes=prototypes)
        common.save(
            path.with_name("prototypes.json"),
            {**common.provenance(args, (path, meta)), **info})
        print(f"{name:12s} {len(found)} prototypes  gap {gap:.3f}  {distinct} windows "
              f"of {len(set(source))} records")
    print(f"{args.run}: projected {', '.join(names)}")


if __name__ == "__main__":
    common.run(main)
