"""What bounds a stage, from where the time of its steps goes, and what of a recipe could change that."""

from collections.abc import Mapping
from dataclasses import dataclass

# Parts of an optimizer step: waiting for its batches; moving them to the device and running the frozen part; the rest
# of the forward pass; loss, backward pass and clipping; the optimizer; what is left, such as callbacks.
PARTS = ("data", "frozen", "forward", "backward", "optimizer", "other")
_COMPUTING = ("frozen", "forward", "backward")
# Waiting for data is the cheapest to change, so that less than the largest share is worth saying.
_WORTH_LOADING_FASTER = 0.25
# With less of a stage in its steps, making them faster would not be felt.
_LEAST_IN_STEPS = 0.5
_SMALLEST_SIZE = 64
_SIZE_STEP = 32


@dataclass(frozen=True)
class Circumstances:
    """What of a stage decides which advice fits.

    Attributes:
        num_workers: Processes that load images.
        cores: Processors that they could use.
        batch_size: Images per step and device.
        image_size: Side of the training images in pixels; None if it is not known.
        device: Kind of the device, such as `cpu`.
        frozen_dtype: What the frozen part is computed in; None where there is none.
        train_cached: Whether training reads the frozen part's results instead of images.
        augmented: Whether each epoch sees other views of the images.
    """

    num_workers: int
    cores: int
    batch_size: int
    image_size: int | None = None
    device: str = "cpu"
    frozen_dtype: str | None = None
    train_cached: bool = False
    augmented: bool = True


@dataclass(frozen=True)
class Bottleneck:
    """What bounds a stage.

    Attributes:
        bound: `data`, `computing`, `optimizer`, `overhead`, or `outside of steps`.
        sentence: The same in words, with the figures.
        advice: A line of a recipe that would change it; None if there is none.
    """

    bound: str
    sentence: str
    advice: str | None


def find_bottleneck(
    stage: str, shares: Mapping[str, float], in_steps: float, largest_operator: str | None, given: Circumstances
) -> Bottleneck:
    """Says what bounds a stage.

    Args:
        stage: Its name.
        shares: Share of a step's time that each of `PARTS` takes.
        in_steps: Share of the stage's time that its steps take.
        largest_operator: Name of the operator that takes most.
        given: What the advice depends on.
    """
    computing = sum(shares[part] for part in _COMPUTING)
    operator = "" if largest_operator is None else f", above all {largest_operator}"
    if in_steps < _LEAST_IN_STEPS:
        return Bottleneck(
            "outside of steps",
            f"stage {stage}: only {in_steps:.0%} of its time is in training steps; the rest fills caches, validates "
            "and saves",
            None,
        )
    if shares["data"] >= _WORTH_LOADING_FASTER:
        why, advice = load_faster(given.num_workers, given.cores, given.image_size)
        return Bottleneck(
            "data", f"stage {stage} is bound by data: {shares['data']:.0%} of a step waits for images{why}", advice
        )
    largest = max(("computing", computing), ("optimizer", shares["optimizer"]), ("overhead", shares["other"]),
                  key=lambda pair: pair[1])[0]  # fmt: skip
    if largest == "computing":
        why, advice = _compute_less(shares, given)
        text = f"stage {stage} is bound by computing: {computing:.0%} of a step{operator}{why}"
        return Bottleneck(largest, text, advice)
    what = "the optimizer takes" if largest == "optimizer" else "what lies between the network's work takes"
    share = shares["optimizer"] if largest == "optimizer" else shares["other"]
    return Bottleneck(
        largest,
        f"stage {stage} has steps of little work: {what} {share:.0%} of them; larger batches make fewer steps (and "
        "want a look at the accuracy)",
        f"batch_size: {2 * given.batch_size}",
    )


def load_faster(num_workers: int, cores: int, image_size: int | None) -> tuple[str, str | None]:
    """Says why images come too slowly, and what of a recipe could change it.

    Args:
        num_workers: Processes that load images.
        cores: Processors that they could use.
        image_size: Side of the images in pixels; None if it is not known.
    """
    if num_workers < cores:
        return f", which {num_workers} of {cores} possible workers load", f"num_workers: {cores}"
    smaller = _smaller_size(image_size)
    if smaller is None:
        return ", and all cores load already", None
    return ", and all cores load already; smaller images cost less", f"image_size: {smaller}"


def _compute_less(shares: Mapping[str, float], given: Circumstances) -> tuple[str, str | None]:
    if shares["frozen"] > shares["forward"] + shares["backward"] and not given.train_cached:
        if given.device != "cpu" and given.frozen_dtype == "float32":
            return "; most of it is the frozen part, in float32", "frozen_precision: bfloat16"
        if given.augmented:
            why = "; most of it is the frozen part, which views that never change would need only once (and want a "
            return why + "look at the accuracy)", "augmentation: none"
    smaller = _smaller_size(given.image_size)
    if smaller is None or given.train_cached:
        return "", None
    assert given.image_size is not None
    part = (smaller / given.image_size) ** 2
    return f"; {smaller} px have {part:.0%} of the pixels (and want a look at the accuracy)", f"image_size: {smaller}"


def _smaller_size(size: int | None) -> int | None:
    """Returns about three quarters of a side, in steps that networks like."""
    if size is None:
        return None
    smaller = round(0.75 * size / _SIZE_STEP) * _SIZE_STEP
    return smaller if _SMALLEST_SIZE <= smaller < size else None
