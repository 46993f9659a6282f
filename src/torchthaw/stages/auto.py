"""The rules of `plan: auto`: how a backbone is unfrozen, by what a linear probe on its features finds.

A linear probe that tells held-out training images well says that the pretrained features serve for them as they are,
so that large steps would rather spoil them; one that does not says that they have farther to go. And where activations
have other statistics than in pretraining, a head fitted to features with the pretrained ones holds the backbone back:
with images enough, of classes that are learned easily, BatchNorm learns their own, and the head anew along with it.
With fewer images that is one more stage, kept unless validation speaks against it. The numbers were chosen on small
sets of images with `tests/benchmarks/accuracy/run.py`; README says which, and what they came to there and on others.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torchthaw.stages.freezing import SMALL_BATCH
from torchthaw.stages.plan import Stage, StagePlan
from torchthaw.stages.presets import family_defaults, fill_defaults

# Macro F1 on held-out training images from which on they count as near to what the backbone was pretrained for.
NEAR = 0.85
# With layer decay 0.3 and BatchNorm in eval mode.
NEAR_RATE = 5e-4
FARTHER_RATE = 1e-3
# A shift (see `backbones.norm_shift`) from which on BatchNorm trains, with so many images. Measured with mobilenet_v2:
# photos 0.23, CIFAR-10 enlarged to 64 to 128 pixels 0.30 to 0.39, brain scans and hand signs 0.6, drawn digits 1.0.
FAR_SHIFT = 0.5
FAR_IMAGES = 500
# Macro F1 of the probe from which on. 80 drawn digits a class, told with 0.95, gain 0.03 by learning anew; 80 edges of
# photos a class, as far by their statistics but told with 0.38, lose 0.02, since it would take more of them.
FAR_PROBE = 0.7
# And what labels say, in bits, from which on. Macro F1 of learning anew with 200 to 240 drawn digits and edge images:
# -0.054 and -0.019 with 240 and 220 bits (two classes), +0.003 with 460 (five), +0.025 with 660 (ten).
FAR_BITS = 600
# A new head and BatchNorm take their time: of drawn digits 150 steps were enough, 28 were not.
FAR_STEPS = 100
# Below so many images a stage that trains everything goes too far more often than not, and half of its way is better
# than the probe and than all of it. From 200 to 400 images it was better or worse from set to set.
FEW_IMAGES = 200
FEW_SHARE = 0.5
# From so many images, batches and steps on, but below those above, both ways are tried. Measured with 200 drawn digits
# in batches of 16, for 78 steps.
TRY_IMAGES = FEW_IMAGES
TRY_BATCH = 16
TRY_STEPS = 50
# Of all layers alike: with layer decay 0.3, most of them learn too slowly for the statistics that they then get.
FAR_RATE = 1e-3


@dataclass(frozen=True)
class Findings:
    """What is known of a run's images when its backbone is to be unfrozen.

    Attributes:
        macro_f1: Of the linear probe on held-out training images, from 0 to 1; None where there was no probe, or
            nothing was held out.
        shift: Of BatchNorm's statistics; None where it was not measured.
        images: Number of training images; None where it is unknown.
        enough: Whether images, batches and steps are enough for BatchNorm to learn new statistics for certain.
    """

    macro_f1: float | None
    shift: float | None = None
    images: int | None = None
    enough: bool = True


@dataclass(frozen=True)
class Choice:
    """How a backbone is unfrozen.

    Attributes:
        rate: Learning rate of the head, which layer decay lowers towards the input.
        reason: Why, as a part of a sentence.
        relearns: Whether BatchNorm trains, and the head anew, without layer decay if that is the family's.
        keeps_statistics: Whether BatchNorm keeps the pretrained statistics, which the probe's head was fitted to,
            however many images there are.
        share: Of the stage's weights in what it proposes; the rest are those before it (WiSE-FT). None leaves it open.
        tries_anew: Whether a further stage tries what `relearns` says, for validation to choose.
    """

    rate: float
    reason: str
    relearns: bool = False
    keeps_statistics: bool = False
    share: float | None = None
    tries_anew: bool = False


@dataclass(frozen=True)
class Extent:
    """What a stage has to learn from.

    Attributes:
        images: Number of training images; None when it is unknown.
        batch_size: Images per device and step, over which BatchNorm takes its statistics.
        steps: Length of the stage in optimizer steps.
        label_bits: How much the labels of the images say (see `data.class_balance`); None when they are unknown.
    """

    images: int | None
    batch_size: int
    steps: int
    label_bits: float | None

    @property
    def is_enough(self) -> bool:
        """Whether BatchNorm can learn new statistics for certain."""
        return self._reaches(FAR_IMAGES, SMALL_BATCH, FAR_STEPS)

    @property
    def is_worth_a_try(self) -> bool:
        """Whether it may."""
        return self._reaches(TRY_IMAGES, TRY_BATCH, TRY_STEPS)

    def _reaches(self, images: int, batch_size: int, steps: int) -> bool:
        if self.images is None or self.label_bits is None or self.label_bits < FAR_BITS:
            return False
        return self.images >= images and self.batch_size >= batch_size and self.steps >= steps


def may_relearn(stage: Stage, extent: Extent, *, validates: bool, transformer: bool) -> bool:
    """Whether BatchNorm and head may learn anew in a stage, or in one that is added, if its images are far.

    Args:
        stage: What the plan says; only one with `by_probe` may.
        extent: What it has to learn from.
        validates: Whether validation decides which stages are kept.
        transformer: Whether the backbone trains by the habits of vision transformers.
    """
    enough = extent.is_enough or (validates and extent.is_worth_a_try)
    return enough and stage.by_probe and stage.batch_norm == "auto" and stage.unfreeze == "all" and not transformer


def choose(found: Findings, *, transformer: bool) -> Choice:
    """Chooses how the backbone is unfrozen.

    Args:
        found: What is known of the images.
        transformer: Whether the backbone trains by the habits of vision transformers, for which nothing was measured:
            their family's defaults stand.
    """
    family = family_defaults(transformer=transformer).unfrozen_rate
    if found.macro_f1 is None:
        return Choice(family, "without a linear probe the family's defaults stand")
    reason = f"the linear probe has macro F1 {found.macro_f1:.3f} on held-out images"
    if transformer:
        return Choice(family, f"{reason}; for transformers the family's defaults stand")
    is_far = found.shift is not None and found.shift >= FAR_SHIFT and found.macro_f1 >= FAR_PROBE
    if is_far and found.enough:
        return Choice(FAR_RATE, f"{_far(found)}: BatchNorm trains, and the head anew", relearns=True)
    if found.macro_f1 >= NEAR:
        rate, reason = NEAR_RATE, f"{reason}, {NEAR:g} or more: its features serve, so smaller steps"
    else:
        rate, reason = FARTHER_RATE, f"{reason}, below {NEAR:g}: its features have farther to go, so larger steps"
    if found.images is None or found.images >= FEW_IMAGES:
        more = f"; {_far(found)}, so that a further stage has BatchNorm and a new head learn" if is_far else ""
        return Choice(rate, reason + more, keeps_statistics=True, tries_anew=is_far)
    reason += f", and of fewer than {FEW_IMAGES} images {100 * FEW_SHARE:g} % of their way"
    return Choice(rate, reason, keeps_statistics=True, share=FEW_SHARE)


def added(stage: Stage) -> Stage:
    """Returns the stage that `Choice.tries_anew` asks for: as long as the one that it comes after."""
    return dataclasses.replace(stage, name=f"{stage.name} anew")


def may_add(stages: Sequence[Stage], extent: Extent, *, validates: bool, transformer: bool) -> Stage | None:
    """Returns the stage that a plan may get after its last one, by what the probe finds; None if it gets none."""
    last = stages[-1]
    finds_out = any(stage.solver == "probe" for stage in stages)
    may = may_relearn(last, extent, validates=validates, transformer=transformer)
    return added(last) if finds_out and may and not extent.is_enough else None


def sentence_on_added(name: str, steps: int) -> str:
    """Returns what is said of such a stage before it is known whether it comes."""
    return (
        f"If the probe has macro F1 {FAR_PROBE:g} or more, and BatchNorm's statistics are {FAR_SHIFT:g} or more from "
        f"the pretrained ones, BatchNorm and a new head learn in {steps} further steps, a stage {name!r}; it is "
        "kept unless validation speaks against it beyond one standard error."
    )


def written_out(stage: Stage, *, head_rate: float | None) -> Stage:
    """Returns an added stage as a plan says it, for a run that has no probe to add it by.

    Args:
        stage: What `added` gives.
        head_rate: The run's rate of a new head; None for the family's.
    """
    defaults = family_defaults(transformer=False)
    (filled,) = fill_defaults(StagePlan((stage,)), transformer=False, head_rate=head_rate).stages
    relearns = Choice(FAR_RATE, "as in the folds", relearns=True)
    found = chosen(filled, relearns, head_rate=head_rate or defaults.head_rate, transformer=False)
    return dataclasses.replace(found, by_probe=False)


def with_added(stages: Sequence[Stage], names: Collection[str], *, head_rate: float | None) -> tuple[Stage, ...]:
    """Returns the stages of a plan and, written out, the one that a probe added in runs whose stages have `names`."""
    further = added(stages[-1])
    return (*stages, written_out(further, head_rate=head_rate)) if further.name in names else tuple(stages)


def anew(found: Findings) -> Choice:
    """Returns how that stage is run, which begins with the best weights so far."""
    reason = f"{_far(found)}: BatchNorm trains, and the head anew, and is kept unless validation speaks against it"
    return Choice(FAR_RATE, reason, relearns=True)


def _far(found: Findings) -> str:
    return f"BatchNorm's statistics are {found.shift:.2f} from the pretrained ones, {FAR_SHIFT:g} or more"


def chosen(stage: Stage, choice: Choice, *, head_rate: float, transformer: bool) -> Stage:
    """Returns a stage with what was chosen for it.

    Args:
        stage: One with `by_probe`, its defaults filled in.
        choice: What was chosen.
        head_rate: The run's rate of a new head, with which all rates move.
        transformer: Whether the backbone trains by the habits of vision transformers.
    """
    family = family_defaults(transformer=transformer)
    rate = choice.rate * head_rate / family.head_rate
    if choice.relearns:
        layer_decay = 1.0 if stage.layer_decay == family.layer_decay else stage.layer_decay
        return dataclasses.replace(
            stage, learning_rate=rate, layer_decay=layer_decay, batch_norm="train", new_head=True
        )
    keeps = choice.keeps_statistics and stage.batch_norm == "auto"
    mixes = stage.wise_ft is None and not stage.trains_head_alone
    return dataclasses.replace(
        stage,
        learning_rate=rate,
        batch_norm="eval" if keeps else stage.batch_norm,
        wise_ft=choice.share if mixes else stage.wise_ft,
    )
