"""Stage 03, projection (paper 3.5, Stage 2, Eq. 8): every prototype becomes a patch of a training ECG of its class.

Looks through all windows of all training records (folds 1-8) that carry the prototype's label, whatever else they
carry, takes the most similar one, and notes where it came from. Prints what the move costs: the similarity gap
(1 - cosine between a prototype and its patch), distinct sources, and the fold-9 macro-AUROC before and after.

reads   PREP/*.npy, RUN/MODEL/joint.pt (the highest round)
writes  RUN/MODEL/projected.pt (projected_r2.pt), RUN/MODEL/prototypes.json: of each prototype the class, ecg_id,
        latent window, sample range, similarity, all labels of the source, and three runners-up

    python 03_project.py                     every prototype model of the run
    python 03_project.py --model rhythm      one of them
    python 03_project.py --unique            no two prototypes of a class on the same window

Takes up to a minute a branch on 2 CPU cores, nearly all of it the forward pass; not yet timed on a GPU.
Last line: `runs/default: projected rhythm, morphology, global`.
"""
import argparse
import time

import numpy as np
import torch

import common
from common import CODES


def main():
    p = common.argument_parser(__doc__)
    p.add_argument("--unique", action=argparse.BooleanOptionalAction, default=None,
                   help="no two prototypes of a class on the same window (default: as the recipe says)")
    args = common.parse(p)
    prep = common.load_prep(args.prep)
    following = {}  # {round: models that have not been through it}
    for name in (names := common.prototype_models(args)):
        began = time.time()
        round_, path = common.newest(args.run / name, "joint", common.command("02_train_joint.py", name))
        maker = common.command("02_train_joint.py", name, round_)
        model, meta = common.load_model(path, maker, args.device)
        common.same_input(meta, "prep", prep.path, path, maker, args.force)
        cfg = common.config_of(meta)
        unique = cfg.unique if args.unique is None else args.unique

        z, carries, ids = common.training_set(model, prep, args.device)
        projected, found = common.project(z, carries, ids, model.p.data, model.p_class, unique, runners=3)  # Eq. (8)
        model.p_patient.copy_(common.own_patients(found, prep, cfg))

        # What it costs on fold 9, with the head of Stage 1
        val = np.flatnonzero(prep.val)
        y = prep.labels[val][:, common.columns(model.classes)]
        z_val = common.batched(model.latent, prep, val, args.device)
        auroc = {}
        for when, prototypes in (("before", model.p.data), ("after", projected)):
            model.p.data = prototypes
            with torch.no_grad():
                logits = torch.cat([model.head(model.scores(part.to(args.device))).cpu() for part in z_val.split(256)])
            auroc[when] = common.macro_auroc(y, logits.numpy())

        def place(ecg_id, window, cosine):
            """One found patch as it goes into prototypes.json."""
            first, end = common.window_samples(model.kind, window)
            labels = [c for c, on in zip(CODES, prep.labels[prep.row_of[ecg_id]]) if on]
            return {"ecg_id": ecg_id, "window": window, "samples": [first, end], "similarity": round(cosine, 6),
                    "labels": labels}

        prototypes = [{"index": j, "class": model.classes[c], **place(*f[0]), "runners_up": [place(*r) for r in f[1:]]}
                      for j, (c, f) in enumerate(zip(model.p_class.tolist(), found))]
        sources = {(q["class"], q["ecg_id"], q["window"]) for q in prototypes}
        gap = float(np.mean([1 - q["similarity"] for q in prototypes]))
        out = path.with_name(path.name.replace("joint", "projected"))
        made = {**common.provenance(cfg, "03_project.py", joint=path, prep=prep.path), "unique": unique,
                "warnings": meta.get("warnings", []),
                **{k: meta[k] for k in ("model", "round", "classes", "left_out", "per_class", "latent_dim")}}
        report = {"gap": gap, "distinct": len(sources), "records": len({q["ecg_id"] for q in prototypes}),
                  **{f"val_auroc_{when}": None if np.isnan(v) else v for when, v in auroc.items()}}
        common.save_pt(out, {"meta": made, "state": {k: v.cpu() for k, v in model.state_dict().items()}})
        common.save_json(out.with_name("prototypes.json"), {**made, **report, "kind": model.kind, "a": model.a,
                         "top_k": model.top_k, "projected": common.file_hash(out), "prototypes": prototypes})
        left_out = f"  (left out: {' '.join(meta['left_out'])})" if meta["left_out"] else ""
        print(f"{name:12s} {len(prototypes)} prototypes  gap {gap:.3f}  {len(sources)} distinct windows of "
              f"{report['records']} records  fold-9 macro-AUROC {auroc['before']:.4f} -> {auroc['after']:.4f}  "
              f"{time.time() - began:.1f} s{left_out}", flush=True)
        if round_ < cfg.rounds:
            following.setdefault(round_ + 1, []).append(name)
    for number, some in following.items():
        maker = f"02_train_joint.py --model {' '.join(some)} --round {number}"
        print(f"the recipe of {', '.join(some)} has more rounds: next {common.rerun(maker)} with the flags of round 1")
    print(f"{args.run}: projected {', '.join(names)}")


if __name__ == "__main__":
    common.run(main)
