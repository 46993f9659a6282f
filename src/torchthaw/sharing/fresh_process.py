"""The proof that a saved folder speaks for itself: a new process without torchthaw loads it and gives the same."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from torchthaw.errors import SavedModelError

# float32 rounding of another order of additions; logits of classifiers are of the size of 1 to 30.
TOLERANCE = 1e-4
_TIMEOUT = 600
# What a launcher tells its processes is not meant for this one.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")

# Run with `-c` in an empty folder, so that it sees installed packages only; torchthaw is made impossible to import.
_PROGRAM = """
import json, sys
sys.modules["torchthaw"] = None
import torch
from PIL import Image
from transformers import pipeline

folder, images, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
classify = pipeline("image-classification", model=folder, trust_remote_code=True, device="cpu")
pixels = classify.image_processor([Image.open(file) for file in images], return_tensors="pt")
with torch.inference_mode():
    logits = classify.model(**pixels).logits
best = [classify(Image.open(file), top_k=1)[0]["label"] for file in images[:1]]
names = [classify.model.config.id2label[index] for index in range(logits.shape[1])]
print(json.dumps({"names": names, "logits": logits.tolist(), "best": best}))
"""


def check_saved_folder(
    folder: Path, images: Sequence[Image.Image], logits: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """Loads a saved folder in a new process that cannot import torchthaw, by `pipeline`, and compares what it gives.

    Args:
        folder: The saved model, with its code.
        images: A few RGB images.
        logits: What the model gives for them on the CPU, shape (images, classes).
        class_names: In the order of the logits.

    Returns:
        `images`, their number, and `largest_difference`, of any two logits.

    Raises:
        SavedModelError: the folder does not load, or gives other class names or logits.
    """
    with tempfile.TemporaryDirectory(prefix="torchthaw-") as scratch:
        files = [str(Path(scratch, f"{number}.png")) for number in range(len(images))]
        for file, image in zip(files, images, strict=True):
            image.save(file, compress_level=1)
        found = _load_elsewhere(folder, files, Path(scratch))
    where = f"{folder} was saved, but a new process that loads it without torchthaw"
    if found["names"] != list(class_names):
        raise SavedModelError(f"{where} gives the class names {found['names'][:10]} instead of {class_names[:10]}")
    got = np.asarray(found["logits"], dtype=np.float64)
    difference = float(np.abs(got - logits).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(logits).max())):
        raise SavedModelError(
            f"{where} gives logits that differ by up to {difference:.3g} on {len(images)} validation images"
        )
    if found["best"] != [class_names[index] for index in logits[:1].argmax(1)]:
        raise SavedModelError(f"{where} gives {found['best'][0]!r} for the first validation image in its pipeline")
    return {"images": len(images), "largest_difference": difference}


def _load_elsewhere(folder: Path, files: Sequence[str], scratch: Path) -> dict[str, Any]:
    import torch

    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _LAUNCHER and not key.startswith(("TORCHELASTIC_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    }
    # A cache of its own, so that the code is the folder's and not what was loaded from one of that name before.
    environment |= {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    arguments = [str(folder.resolve()), json.dumps(files), str(torch.get_num_threads())]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *arguments],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SavedModelError(f"{folder} was saved, but a new process did not load it in {_TIMEOUT} s") from error
    if done.returncode != 0:
        reason = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise SavedModelError(f"{folder} was saved, but a new process cannot load it without torchthaw:\n{reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])
