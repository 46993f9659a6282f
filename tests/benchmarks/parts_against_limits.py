"""How fast the parts of a training step are: kernels by themselves, and `ThawTrainer` against a bare loop with them.

    python tests/benchmarks/parts_against_limits.py --sizes 128 224 --batch 32 --repeats 10 --output parts.json

Forward passes and training steps in the forms that they can take, each in a process of its own, with the C library's
memory allocator as it is (`default`) and keeping the memory of freed tensors (`raised`; on Linux with glibc, CPU only).
Then the seconds of a training step in `ThawTrainer.train()` over those of a bare loop with the same fast form,
optimizer and data; both raise the allocator. Images and weights are random, unless `--weights` gives a state_dict of
torchvision's for the first architecture. Where there is CUDA, all runs there, with the steps in bfloat16 autocast.
Prints a table and writes JSON. The medians of the repetitions count; leave the machine alone meanwhile.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from torch import nn
from transformers import TrainerCallback

import torchthaw
from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionForImageClassification
from torchthaw.backbones.allocator import tensors_kept_in_memory
from torchthaw.backbones.folding import put_on_fast_form
from torchthaw.stages.freezing import freeze_for_stage

CLASSES = ("ant", "bee")
WARM_UP = 3

# Name: channels_last, folded, bfloat16.
FORWARD = {
    "eager, contiguous": (False, False, False),
    "channels_last": (True, False, False),
    "folded": (True, True, False),
    "folded, bfloat16": (True, True, True),
}
# Name: what trains, BatchNorm policy, channels_last, folded, bfloat16. None: what the device trains in.
STEPS = {
    "all layers, BatchNorm train": ("all", "train", False, False, None),
    "all layers, BatchNorm frozen, channels_last": ("all", "eval", True, False, None),
    "all layers, folded": ("all", "eval", True, True, None),
    "all layers, folded, bfloat16": ("all", "eval", True, True, True),
    "last block and head, folded": (1, "eval", True, True, None),
    "head only, folded": ("head", "eval", True, True, None),
}
# The stages of a comparison with ThawTrainer: those that have a live part of the network.
LOOPS = {"all layers, folded": "all", "last block and head, folded": 1}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def new_model(options: argparse.Namespace, size: int) -> TorchvisionForImageClassification:
    torch.manual_seed(0)
    architecture = options.architectures[0]
    fixed = {"image_size": size} if architecture.startswith("vit") else {}
    return TorchvisionForImageClassification.from_torchvision(
        architecture, options.weights, id2label=CLASSES, **fixed
    ).to(device())


def batch(options: argparse.Namespace, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(options.batch, 3, size, size, generator=generator).to(device())
    return pixels, (torch.arange(options.batch) % len(CLASSES)).to(device())


def autocast(bfloat16: bool | None) -> torch.autocast:
    enabled = device().type == "cuda" if bfloat16 is None else bfloat16
    return torch.autocast(device().type, torch.bfloat16, enabled=enabled)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Returns the median seconds of a piece of work."""
    times = []
    for _ in range(WARM_UP + repeats):
        begin = now()
        work()
        times.append(now() - begin)
    return statistics.median(times[WARM_UP:])


def now() -> float:
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_form(model: nn.Module, pixels: torch.Tensor, channels_last: bool, folded: bool) -> torch.Tensor:
    """Puts the fast form on where the form is asked for whole; returns the images as that form takes them."""
    if folded:
        put_on_fast_form(model)
    return pixels.contiguous(memory_format=torch.channels_last) if channels_last and not folded else pixels


def forward(options: argparse.Namespace, size: int, part: str) -> dict[str, float]:
    channels_last, folded, bfloat16 = FORWARD[part]
    model, (pixels, _) = new_model(options, size).eval(), batch(options, size)
    freeze_for_stage(model, Stage("head", unfreeze="head"), "eval")
    pixels = in_form(model, pixels, channels_last, folded)

    def work() -> None:
        with torch.inference_mode(), autocast(bfloat16):
            model(pixel_values=pixels)

    return {"images_per_second": options.batch / seconds(work, options.repeats)}


def step(options: argparse.Namespace, size: int, part: str) -> dict[str, float]:
    unfreeze, policy, channels_last, folded, bfloat16 = STEPS[part]
    work = one_step(options, size, unfreeze, policy, channels_last, folded, bfloat16)
    taken = seconds(work, options.repeats)
    return {"images_per_second": options.batch / taken, "seconds": taken}


def one_step(options, size, unfreeze, policy, channels_last, folded, bfloat16) -> Callable[[], None]:
    """Returns a training step of a bare loop: AdamW, clipped gradients, images in memory."""
    model, (pixels, labels) = new_model(options, size), batch(options, size)
    freeze_for_stage(model, Stage("stage", unfreeze=unfreeze), policy)
    model.train()
    pixels = in_form(model, pixels, channels_last, folded)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=device().type == "cuda" or None)

    def work() -> None:
        with autocast(bfloat16):
            loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return work


class StepTimes(TrainerCallback):
    """Notes when each step ends; between two lies all that a step costs, the loader's work included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_args: object, **_kwargs: object) -> None:
        self.ends.append(now())


def trainer(options: argparse.Namespace, size: int, part: str) -> dict[str, float]:
    pixels, labels = (tensor.cpu() for tensor in batch(options, size))
    steps = WARM_UP + options.repeats
    rows = [{"pixel_values": pixels[i], "labels": labels[i]} for i in range(options.batch)] * steps
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ThawTrainingArguments(
            output_dir=folder,
            plan=[Stage("stage", unfreeze=LOOPS[part], epochs=1, learning_rate=1e-5, batch_norm="eval")],
            per_device_train_batch_size=options.batch,
            bf16=device().type == "cuda",
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            gate="off",
            disable_tqdm=True,
            report_to="none",
        )
        ThawTrainer(new_model(options, size), arguments, train_dataset=rows, callbacks=[times]).train()
    gaps = [end - begin for begin, end in zip(times.ends, times.ends[1:], strict=False)]
    return {"seconds": statistics.median(gaps[WARM_UP:])}


KINDS = {"forward": (forward, FORWARD), "step": (step, STEPS), "bare loop": (step, LOOPS), "trainer": (trainer, LOOPS)}


@contextlib.contextmanager
def allocator(name: str) -> Iterator[None]:
    with tensors_kept_in_memory() if name == "raised" and device().type == "cpu" else contextlib.nullcontext():
        yield


def in_process(options: argparse.Namespace, architecture: str, size: int, kind: str, part: str, name: str) -> dict:
    """Measures one part in a fresh process."""
    weights = options.weights if architecture == options.architectures[0] else None
    command = [sys.executable, __file__, "--architectures", architecture, "--sizes", str(size)]
    command += ["--batch", str(options.batch), "--repeats", str(options.repeats), "--one", kind, part, name]
    command += ["--weights", weights] if weights else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> list[dict]:
    allocators = ("default", "raised") if device().type == "cpu" else ("default",)
    results = []
    for architecture in options.architectures:
        for size in options.sizes:
            print(f"\n{architecture}, {size} px, batch {options.batch}, {device().type}\n")
            print(f"| images/s | {' | '.join(allocators)} |\n|---|{'---|' * len(allocators)}", flush=True)
            run = {"architecture": architecture, "size": size}
            for kind in ("forward", "step"):
                for part in KINDS[kind][1]:
                    found = [in_process(options, architecture, size, kind, part, name) for name in allocators]
                    for name, value in zip(allocators, found, strict=True):
                        results.append({**run, "kind": kind, "part": part, "allocator": name, **value})
                    cells = [f"{value.get('images_per_second', float('nan')):.0f}" for value in found]
                    print(f"| {kind}: {part} | {' | '.join(cells)} |", flush=True)
            print("\n| seconds per step | bare loop | ThawTrainer | ratio |\n|---|---|---|---|", flush=True)
            for part in LOOPS:
                bare, whole = (
                    in_process(options, architecture, size, kind, part, allocators[-1]).get("seconds", float("nan"))
                    for kind in ("bare loop", "trainer")
                )
                compared = {"bare_seconds": bare, "seconds": whole, "ratio": whole / bare}
                results.append({**run, "kind": "trainer", "part": part, **compared})
                print(f"| {part} | {bare:.3f} | {whole:.3f} | {whole / bare:.3f} |", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["mobilenet_v2", "resnet50", "vit_b_16"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--weights", help="state_dict of torchvision's for the first architecture")
    parser.add_argument("--output", type=Path, default=Path("parts_against_limits.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, part, name = options.one
        with allocator(name):
            print(json.dumps(KINDS[kind][0](options, options.sizes[0], part)))
        return
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "torchthaw": torchthaw.__version__}
    machine = {
        "device": device().type,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
    }
    if device().type == "cuda":
        machine["device"] = torch.cuda.get_device_name()
    results = measure(options)
    settings = {"batch": options.batch, "repeats": options.repeats, "weights": options.weights}
    document = {"machine": machine, "versions": versions, "settings": settings, "results": results}
    options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
