"""What the diagnosis says of runs that show each signal, and of healthy ones: a table.

    python tests/benchmarks/diagnosis_table.py --data FOLDER --weights FILE --seeds 0 1 2

FOLDER holds the image folders `hymenoptera` (with splits), `trashnet-sixth` and `sign-digits` (with `groups.csv`), each
of which is trained with the preset `staged` and `torchthaw train`'s own way: audit, validation images cut off where
there are none, gate. FILE is a torchvision state_dict of mobilenet_v2. Runs that show a signal are made of
hymenoptera, whose 153 validation images explain too much for jumps: those, and waiting, are shown in tests/training.
Prints a Markdown table, and says at its end how many healthy runs got an alarm.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from torchthaw.console import Reporter
from torchthaw.recipe import load_recipe
from torchthaw.run import run_recipe
from torchthaw.training.diagnosis.course import ALARMS

SIZES = {"hymenoptera": 128, "trashnet-sixth": 128, "sign-digits": 96}
_ALL = {"name": "all", "unfreeze": "all", "layer_decay": 1.0}
# What is changed in a healthy recipe, and what that is to show.
SHOWN: dict[str, dict[str, Any]] = {
    "rate too high": {"stages": [{**_ALL, "epochs": 3, "learning_rate": 0.1}]},
    "not finite": {"stages": [{"name": "head", "unfreeze": "head", "epochs": 1},
                              {**_ALL, "epochs": 1, "learning_rate": 1e12, "optimizer": "sgd"}], "max_grad_norm": 0},
    "rate too low": {"plan": "head", "epochs": 3, "learning_rate": 1e-7},
    "too much frozen": {"plan": "head", "epochs": 3, "weights": None, "batch_norm": "eval"},
    "overfitting": {"plan": "full", "epochs": 12, "augmentation": "none", "labels": 0.4},
    "labels": {"plan": "full", "epochs": 8, "augmentation": "none", "labels": 1.0},
    "plateau": {"stages": [{"name": "head", "unfreeze": "head", "epochs": 12, "learning_rate": 3e-3,
                            "schedule": "polynomial", "schedule_args": {"power": 12, "lr_end": 1e-9}}]},
    "small validation": {"plan": "head", "epochs": 2, "few": 16},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=("healthy", "shown"))
    parser.add_argument("--signals", nargs="+", choices=SHOWN, help="shown signals to run; all by default")
    parser.add_argument("--output", type=Path, default=Path("diagnosis_table.json"))
    options = parser.parse_args()
    rows = []

    def add(name: str, seed: int, results: dict[str, Any]) -> None:
        rows.append({"run": name, "seed": seed, "accuracy": results["validation"]["accuracy"],
                     "said": results["diagnosis"]})  # fmt: skip
        print(f"| {name} | {seed} | {rows[-1]['accuracy']:.3f} | {_said(rows[-1]['said'])} |", flush=True)
        options.output.write_text(json.dumps(rows, indent=2) + "\n")

    print("| run | seed | accuracy | said |\n|---|---|---|---|")
    if options.only != "shown":
        for name in SIZES:
            for seed in options.seeds:
                add(name, seed, healthy(options, name, seed))
        signals = {finding["signal"] for row in rows for finding in row["said"]}
        print(f"\nalarms in {len(rows)} healthy runs: {', '.join(sorted(signals & set(ALARMS))) or 'none'}\n")
    if options.only != "healthy":
        for name in options.signals or SHOWN:
            add(name, options.seeds[0], shown(options, name, options.seeds[0]))


def healthy(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    return _run(options, {}, options.data / name, SIZES[name], seed)


def shown(options: argparse.Namespace, signal: str, seed: int) -> dict[str, Any]:
    changes = dict(SHOWN[signal])
    with tempfile.TemporaryDirectory() as folder:
        data = _with_links(options.data / "hymenoptera", Path(folder) / "data", seed=seed,
                           wrong=changes.pop("labels", 0.0), few=changes.pop("few", None))  # fmt: skip
        if changes.pop("batch_norm", None):
            changes.pop("plan")
            changes["stages"] = [{"name": "head", "unfreeze": "head", "epochs": changes.pop("epochs"),
                                  "batch_norm": "eval"}]  # fmt: skip
        return _run(options, {"gate": "off", **changes}, data, 96, seed)


def _run(options: argparse.Namespace, changes: dict[str, Any], data: Path, size: int, seed: int) -> dict[str, Any]:
    recipe = {"backbone": "mobilenet_v2", "weights": str(options.weights), "image_size": size, "seed": seed,
              "data": {"path": str(data), "on_bad_image": "drop"}, **changes}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return run_recipe(load_recipe({**recipe, "output": f"{folder}/run"}), Reporter(quiet=True))


def _with_links(source: Path, target: Path, *, seed: int, wrong: float, few: int | None) -> Path:
    """Links images into a folder of the same layout: some in another class's, and only few for validation."""
    import numpy as np

    random = np.random.default_rng(seed)
    for split in sorted(path for path in source.iterdir() if path.is_dir()):
        classes = sorted(path.name for path in split.iterdir() if path.is_dir())
        files = [(name, file) for name in classes for file in sorted((split / name).iterdir())]
        labels = np.array([name for name, _ in files])
        chosen = random.random(len(labels)) < wrong
        labels[chosen] = random.permutation(labels[chosen])
        order = random.permutation(len(files))[: few if few and split.name != "train" else None]
        for number in order:
            folder = target / split.name / labels[number]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / files[number][1].name).symlink_to(files[number][1].resolve())
    return target


def _said(findings: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"**{finding['signal']}**: {finding['evidence']}" + (f" (`{finding['advice']}`)" if finding["advice"] else "")
        for finding in findings
    ) or "nothing"  # fmt: skip


if __name__ == "__main__":
    main()
