"""Trains with PyTorch-BigGraph. Runs in PyTorch-BigGraph's own environment: `pbg.py work.json`.

`settings` of the file are fields of its `ConfigSchema`; what they lack has its default there. No edge is withheld.
"""

import json
import sys
from pathlib import Path

import h5py
import numpy as np
from torchbiggraph.config import ConfigFileLoader
from torchbiggraph.train import train
from torchbiggraph.util import SubprocessInitializer, set_logging_verbosity, setup_logging


def main(path: str) -> None:
    work = json.loads(Path(path).read_text())
    home = Path(work["home"])
    edges = np.load(work["edges"])
    (home / "edges").mkdir(parents=True, exist_ok=True)
    (home / "entities").mkdir(exist_ok=True)
    for name, count in work["entities"].items():
        (home / "entities" / f"entity_count_{name}_0.txt").write_text(str(count))
    with h5py.File(home / "edges" / "edges_0_0.h5", "w") as file:
        file.attrs["format_version"] = 1
        for name in ("rel", "lhs", "rhs"):
            file[name] = edges[name].astype(np.int64)
    names = ("name", "lhs", "rhs")
    relations = [{**dict(zip(names, told, strict=True)), "operator": "translation"} for told in work["relations"]]
    config = {
        "entity_path": str(home / "entities"),
        "edge_paths": [str(home / "edges")],
        "checkpoint_path": str(home / "model"),
        "entities": {name: {"num_partitions": 1} for name in work["entities"]},
        "relations": relations,
        "eval_fraction": 0.0,
        **work["settings"],
    }
    (home / "config.py").write_text(f"def get_torchbiggraph_config():\n    return {config!r}\n")
    setup_logging()
    loaded = ConfigFileLoader().load_config(str(home / "config.py"))
    set_logging_verbosity(1)
    initializer = SubprocessInitializer()
    initializer.register(setup_logging, 1)
    train(loaded, subprocess_init=initializer)
    version = (home / "model" / "checkpoint_version.txt").read_text().strip()
    found = {}
    for name in work["entities"]:
        with h5py.File(home / "model" / f"embeddings_{name}_0.v{version}.h5") as file:
            found[name] = file["embeddings"][...]
    with h5py.File(home / "model" / f"model.v{version}.h5") as file:
        shifts = [file[f"model/relations/{i}/operator/rhs/translation"][...] for i in range(len(work["relations"]))]
        if loaded.global_emb:
            for name, vectors in found.items():
                vectors += file[f"model/entities/{name}/global_embedding"][...]
    np.savez(home / "vectors.npz", translation=np.stack(shifts), **found)


if __name__ == "__main__":
    main(sys.argv[1])
