"""What the BatchNorm policy does to small data: `eval` against `train`, at a usual and at a tiny batch size.

    python tests/benchmarks/batch_norm_policies.py --data FOLDER --weights FILE --seeds 0 1 2

FOLDER has train/ and val/ with a folder for each class; FILE is a torchvision state_dict of the backbone. Every run is
`torchthaw train` with the stages of the plan `staged` and the gate off, so that each stage's own weights are seen.
Prints a table of validation accuracies and writes a JSON document.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

POLICIES = ("eval", "freeze_affine", "train")
UNFROZEN = (("head", "head", 3), ("last block", 1, 2), ("all", "all", 2))


def measure(options: argparse.Namespace, policy: str, batch_size: int, seed: int, folder: Path) -> dict:
    name = f"{policy}-{batch_size}-{seed}"
    recipe = {
        "backbone": options.backbone,
        "weights": options.weights,
        "data": {"path": options.data},
        "stages": [
            {"name": stage, "unfreeze": unfreeze, "epochs": epochs, "batch_norm": policy}
            for stage, unfreeze, epochs in UNFROZEN
        ],
        "image_size": options.size,
        "batch_size": batch_size,
        "metric": "accuracy",
        "gate": "off",
        "seed": seed,
        "output": str(folder / name),
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "torchthaw", "train", str(file), "--json", "--quiet"]
    results = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    best = {stage["name"]: stage["best_metric"] for stage in results["stages"]}
    return {"policy": policy, "batch_size": batch_size, "seed": seed, **best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 4])
    parser.add_argument("--policies", nargs="+", default=["eval", "train"], choices=POLICIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path("batch_norm_policies.json"))
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for batch_size in options.batch_sizes:
            for policy in options.policies:
                for seed in options.seeds:
                    runs.append(measure(options, policy, batch_size, seed, Path(folder)))
                    options.json.write_text(json.dumps(runs, indent=2))
                chosen = [run for run in runs if (run["policy"], run["batch_size"]) == (policy, batch_size)]
                cells = []
                for stage, _, _ in UNFROZEN:
                    values = [run[stage] for run in chosen]
                    cells.append(f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})")
                print(f"| batch {batch_size} | {policy} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
