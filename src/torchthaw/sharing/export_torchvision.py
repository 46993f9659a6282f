"""Export to plain torchvision: a state_dict that its own model loads strictly."""

from pathlib import Path
from typing import Any

import torch
import torchvision

from torchthaw.backbones.network import network_options
from torchthaw.errors import SavedModelError
from torchthaw.sharing.saved_models import (
    describe_input,
    image_shape,
    load_saved,
    new_folder,
    without_temperature,
    write_json,
)

WEIGHTS_FILE = "model.pth"
DESCRIPTION_FILE = "model.json"


def export_torchvision(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes a saved model for use with torchvision alone, and checks that it gives the same logits, bit for bit.

    Args:
        source: A folder or Hub repository that torchthaw saved.
        output: A folder to make, with `model.pth`, the state_dict, and `model.json`: class names in the order of the
            logits, preprocessing, and the lines of Python that load it.

    The temperature of calibrated scores cannot go with it.

    Returns:
        `files`, `largest_difference` of the logits (0.0) and `load`, the lines of Python; `note`, also in
        `model.json`, says what to do about a temperature.

    Raises:
        SharingError: there is no such model, or `output` exists.
        SavedModelError: torchvision's model gives something else.
    """
    model, processor = load_saved(source)
    # What only changes training, or how weights start, is not needed to load them.
    options = {
        name: value for name, value in network_options(model.config).items() if name not in ("dropout", "init_weights")
    }
    if "aux_logits" in options:
        options["init_weights"] = False
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    load = [
        "import torch",
        "import torchvision",
        f'model = torchvision.models.get_model("{model.config.architecture}", weights=None{arguments})',
        f'model.load_state_dict(torch.load("{WEIGHTS_FILE}", weights_only=True))',
        "model.eval()",
    ]
    described = describe_input(model, processor)
    with without_temperature(model) as advice, new_folder(output) as folder:
        note = {} if advice is None else {"note": advice}
        torch.save(model.backbone.state_dict(), folder / WEIGHTS_FILE)
        write_json(folder / DESCRIPTION_FILE, {**described, "load": load, **note})
        plain = torchvision.models.get_model(model.config.architecture, weights=None, **options).eval()
        plain.load_state_dict(torch.load(folder / WEIGHTS_FILE, weights_only=True))
        images = torch.randn(2, 3, *image_shape(model, processor), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            difference = float((plain(images) - model(pixel_values=images).logits).abs().max())
        if difference != 0:
            raise SavedModelError(
                f"torchvision's {model.config.architecture} gives logits that differ by up to {difference:.3g} from "
                f"those of {source}; nothing was written"
            )
    files = [str(Path(output) / name) for name in (WEIGHTS_FILE, DESCRIPTION_FILE)]
    return {"files": files, "largest_difference": difference, "load": load, **note}
