"""The whole command `torchthaw train`: imports, audit, training, figures, plots, model card, and a saved folder."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from common import STAGES, Clock, Task, finish
from safetensors.torch import load_file


def main() -> None:
    task = Task.from_command_line()
    with tempfile.TemporaryDirectory() as folder:
        recipe, output = Path(folder, "recipe.yaml"), Path(folder, "run")
        stages = [
            {"name": stage.name, "unfreeze": stage.unfreeze, "epochs": epochs}
            for stage, epochs in zip(STAGES, task.epochs, strict=True)
        ]
        document = {
            "backbone": "mobilenet_v2",
            "weights": str(task.weights),
            "data": {"path": str(task.data)},
            "image_size": task.size,
            "stages": stages,
            "seed": task.seed,
        }
        recipe.write_text(yaml.safe_dump(document), encoding="utf-8")
        clock = Clock(task)
        command = [sys.executable, "-m", "torchthaw", "train", str(recipe), "--output", str(output), "--quiet"]
        subprocess.run(command, check=True)
        clock.stop()
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        weights = load_file(output / "model.safetensors")
    for stage in results["stages"]:
        clock.add_stage(stage["name"], stage["epochs"], stage["seconds"])
    plain = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    finish(clock, plain, ("torchthaw", "transformers", "accelerate"), records=results["stages"])


if __name__ == "__main__":
    main()
