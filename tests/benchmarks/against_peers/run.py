"""torchthaw beside a hand-written loop, Trainer, Lightning, fastai and timm: one recipe, the same weights and images.

    python tests/benchmarks/against_peers/run.py --data FOLDER --weights FILE --size 224 --plan 3 2 2 --seeds 0 1 2

FOLDER has train/ and val/, each with a folder of images for each class, or is one of parquet files, from which --subset
TRAIN VAL draws; FILE is a torchvision state_dict of mobilenet_v2 in safetensors. The recipe trains the head, then the
head and the last block, then everything (see common.py). Each tool's script runs in a process of its own, with as many
threads, and in its default environment: variables that change the allocator are removed. Tools that have to be
installed get a virtual environment each, on top of this one, so that all use the same torch; one that cannot be
installed is skipped by name. torchthaw's caches on disk are empty at the start of each run, but for the precision of
the frozen part, which it chooses once for a machine.

Prints a table of medians over the seeds with their ranges, and the ratio to torchthaw; writes every figure as JSON.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from data_sets import write_images
from environments import CannotInstallError, environment

HERE = Path(__file__).resolve().parent
# Script, and the package that it needs beyond what torchthaw needs.
TOOLS: dict[str, tuple[str, str | None]] = {
    "torchthaw": ("thaw.py", None),
    "torchthaw-command": ("thaw_command.py", None),
    "hand": ("hand.py", None),
    "trainer": ("stock_trainer.py", None),
    "lightning": ("lightning_staged.py", "lightning"),
    "fastai": ("fastai_staged.py", "fastai"),
    "timm": ("timm_staged.py", "timm"),
}
_PRECISION = Path(tempfile.gettempdir(), "torchthaw-against-peers", "precision.jsonl")
_ALLOCATOR_VARIABLES = ("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES", "PYTORCH_CUDA_ALLOC_CONF")


def main() -> None:
    arguments = _parse()
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "data": arguments.data.name,
        "subset": arguments.subset,
        "size": arguments.size,
        "plan": arguments.plan,
        "threads": arguments.threads,
        "workers": arguments.workers,
        "runs": [],
        "skipped": {},
    }
    _PRECISION.parent.mkdir(exist_ok=True)
    pythons = _pythons(arguments, result["skipped"])
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        write_images(arguments.data, images, arguments.subset and tuple(arguments.subset))
        result["images"] = {split: len(list((images / split).glob("*/*"))) for split in ("train", "val")}
        for number, seed in enumerate(arguments.seeds):
            # Another order for each seed, so that what changes with time falls on all alike.
            turn = number % max(1, len(pythons))
            for tool in [*list(pythons)[turn:], *list(pythons)[:turn]]:
                figures = _run(tool, pythons[tool], images, seed, arguments)
                result["runs"].append({"tool": tool, "seed": seed, **figures})
                print(f"seed {seed}, {tool}: {_in_short(figures)}", file=sys.stderr, flush=True)
                arguments.output.write_text(json.dumps(result, indent=2), encoding="utf-8")
    result["summary"] = summary(result["runs"])
    arguments.output.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(table(result))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--subset", type=int, nargs=2, metavar=("TRAIN", "VAL"))
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--plan", type=int, nargs=3, default=[3, 2, 2], help="Epochs of each stage.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=2, help="Loading processes; torchthaw takes its own default.")
    cache = Path(tempfile.gettempdir(), "torchthaw-benchmark-environments")
    parser.add_argument("--environments", type=Path, default=cache)
    parser.add_argument("--output", type=Path, default=Path("against_peers.json"))
    return parser.parse_args()


def _pythons(arguments: argparse.Namespace, skipped: dict[str, str]) -> dict[str, Path]:
    pythons = {}
    for tool in arguments.tools:
        package = TOOLS[tool][1]
        try:
            pythons[tool] = Path(sys.executable) if package is None else environment(package, arguments.environments)
        except CannotInstallError as error:
            skipped[tool] = str(error)
            print(f"{tool} is left out: {error}", file=sys.stderr, flush=True)
    return pythons


def _run(tool: str, python: Path, images: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    options = {"data": images, "weights": arguments.weights.resolve(), "size": arguments.size, "seed": seed}
    command = [str(python), str(HERE / TOOLS[tool][0]), "--plan", *map(str, arguments.plan)]
    for name, value in {**options, "workers": arguments.workers}.items():
        command += [f"--{name}", str(value)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_ALLOCATOR_VARIABLES)}
    if "PYTHONPATH" in kept:
        # The tools run elsewhere.
        kept["PYTHONPATH"] = os.pathsep.join(str(Path(part).resolve()) for part in kept["PYTHONPATH"].split(os.pathsep))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        cache.mkdir()
        if _PRECISION.is_file():
            shutil.copy(_PRECISION, cache)
        environ = {**kept, "OMP_NUM_THREADS": str(arguments.threads), "TORCHTHAW_CACHE": str(cache)}
        errors = Path(folder, "stderr")
        start = time.perf_counter()
        with errors.open("w") as stream:
            done = subprocess.run(
                command, env=environ, cwd=folder, stdout=subprocess.PIPE, stderr=stream, text=True, check=False
            )
        if (cache / _PRECISION.name).is_file():
            shutil.copy(cache / _PRECISION.name, _PRECISION)
        seconds = time.perf_counter() - start
        if done.returncode:
            lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return {"failed": "\n".join(lines[-15:]) or f"exit code {done.returncode}"}
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "seconds_process": seconds}


def _in_short(figures: dict[str, Any]) -> str:
    if "failed" in figures:
        return f"failed: {figures['failed']}"
    stages = ", ".join(f"{stage['name']} {stage['seconds']:.1f} s" for stage in figures["stages"])
    return f"{figures['seconds']:.1f} s ({stages}), accuracy {figures['accuracy']:.4f}"


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the median and range over seeds of each tool's figures, and ratios to torchthaw's in seconds."""
    tools = list(dict.fromkeys(run["tool"] for run in runs if "failed" not in run))
    result: dict[str, dict[str, Any]] = {}
    for tool in tools:
        mine = [_flat(run) for run in runs if run["tool"] == tool and "failed" not in run]
        result[tool] = {key: _spread([figures[key] for figures in mine]) for key in mine[0]}
    reference = result.get("torchthaw")
    for figures in result.values():
        for key, value in figures.items():
            if reference is not None and key.startswith("seconds") and key in reference:
                value["ratio_to_torchthaw"] = value["median"] / reference[key]["median"]
    return result


def _flat(run: dict[str, Any]) -> dict[str, float]:
    keys = ("seconds", "seconds_process", "accuracy", "macro_f1")
    keys += ("rss_after_imports_mb", "peak_rss_mb", "peak_worker_rss_mb")
    figures = {key: run[key] for key in keys}
    for stage in run["stages"]:
        figures[f"seconds, {stage['name']}"] = stage["seconds"]
        figures[f"images per second, {stage['name']}"] = stage["images_per_second"]
    return figures


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def table(result: dict[str, Any]) -> str:
    """Returns the summary as Markdown."""
    summaries = result["summary"]
    stages = [key for key in next(iter(summaries.values()), {}) if key.startswith("seconds, ")]
    heads = ["seconds in all", "times torchthaw", *(f"s, images/s: {key[9:]}" for key in stages)]
    heads += ["whole process, s", "memory after imports, MB", "peak, MB", "of a worker, MB", "accuracy", "macro F1"]
    memory = ("rss_after_imports_mb", "peak_rss_mb", "peak_worker_rss_mb")
    lines = [
        f"{result['data']}, {result['images']['train']} + {result['images']['val']} images, {result['size']} px, "
        f"{' + '.join(map(str, result['plan']))} epochs, {result['threads']} threads, {result['date']}, "
        f"{result['machine']['processor']}. Median (lowest - highest).",
        "",
        f"| tool | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(heads),
    ]
    for tool, figures in summaries.items():
        ratio = figures["seconds"].get("ratio_to_torchthaw")
        cells = [_cell(figures["seconds"], ".1f"), "" if ratio is None else f"{ratio:.2f} x"]
        for key in stages:
            seconds, speed = figures.get(key), figures.get(key.replace("seconds", "images per second"))
            cells.append("" if seconds is None else f"{seconds['median']:.1f}, {speed['median']:.0f}")
        cells += [_cell(figures["seconds_process"], ".1f")]
        cells += [f"{figures[key]['median']:.0f}" for key in memory]
        cells += [_cell(figures[key], ".4f") for key in ("accuracy", "macro_f1")]
        lines.append(f"| {tool} | {' | '.join(cells)} |")
    lines += [f"\nleft out: {tool}, {reason}" for tool, reason in result["skipped"].items()]
    broken = [run for run in result["runs"] if "failed" in run]
    lines += [f"\nfailed: {run['tool']}, seed {run['seed']}: {run['failed']}" for run in broken]
    return "\n".join(lines)


def _cell(value: dict[str, float], form: str) -> str:
    if value["lowest"] == value["highest"]:
        return format(value["median"], form)
    return f"{value['median']:{form}} ({value['lowest']:{form}} - {value['highest']:{form}})"


def _machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1024**3, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
