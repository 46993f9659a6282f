"""Advice is a line of a recipe: pasted at a recipe's end it loads, and it changes what it is to change."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from torchthaw import Stage
from torchthaw.recipe import load_recipe
from torchthaw.recipe.reading import RecipeLoader
from torchthaw.stages.plan import StagePlan
from torchthaw.stages.presets import PRESETS, preset_plan
from torchthaw.training.diagnosis import Course
from torchthaw.training.diagnosis import advice as lines
from torchthaw.training.records import StageRecord

OWN = StagePlan(
    (
        Stage("head: off", "head", epochs=3, learning_rate=1e-2),
        Stage("blocks", ["layer[34]", "head"], epochs=2, learning_rate={"head": 1e-3, "backbone": 1e-4}),
        Stage("range", 2, steps=70, learning_rate="1e-5..1e-3", schedule_args={"num_cycles": 2},
              schedule="cosine_with_restarts", augmentation={"mixup": 0.2}),
        Stage("open", "all", epochs=4, layer_decay=0.5, batch_norm="train", patience=3),
    )
)  # fmt: skip


# A tenth of the rates above.
EXPECTED = [1e-3, {"head": 1e-4, "backbone": 1e-5}, "1e-06..0.0001"]


def record_of(stage):
    return StageRecord(
        name=stage.name, epochs=stage.epochs or 1, steps=30, seconds=30.0, train_images_per_second=50.0,
        trainable_parameters=100, best_metric=0.9, learning_rates={"layer4": 1e-5, "head": 1e-3}, batch_norm="train",
        accepted=True, reason="better",
    )  # fmt: skip


def course_of(plan, **options):
    records = [record_of(stage) for stage in plan.stages]
    return Course(log=[], records=records, plan=plan, learning_rate=1e-3, **options)


def pasted(plan, line):
    """Returns the recipe of a plan with a line at its end, as its file would be read."""
    own = f"plan: {plan.name}" if plan.name in PRESETS else lines.stages_line(plan)
    text = f"backbone: resnet50\ndata: {{path: photos}}\naudit: off\n{own}\n"
    load_recipe(yaml.load(text, RecipeLoader))
    return load_recipe(yaml.load(f"{text}{line}\n", RecipeLoader))


def every_advice(course):
    for index in range(len(course.records)):
        yield from (lines.scaled_rate(course, index, factor) for factor in (0.1, 10, 1 / 3))
        yield lines.frozen_statistics(course, index)
        yield lines.shorter(course, index, 2)
        yield lines.against_overfitting(course, index)
    yield lines.less_frozen(course)
    yield lines.with_head(course)
    yield lines.against_bad_labels(course)
    yield lines.faster_loading(course)


OPTIONS = [
    {},
    {"suspicious_labels": (3, 100), "num_workers": 2, "cores": 4},
    {"suspicious_labels": (3, 100), "label_smoothing": 0.1, "augmentation": "strong", "image_size": 224},
    {"augmentation": "strong", "num_workers": 4, "cores": 4, "image_size": 64},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "nothing")
@pytest.mark.parametrize("plan", [*map(preset_plan, PRESETS), OWN], ids=lambda plan: plan.name)
def test_every_advice_is_a_line_that_loads(plan, options):
    given = [line for line in every_advice(course_of(plan, **options)) if line is not None]
    assert len(given) > 5
    for line in given:
        assert "\n" not in line
        assert pasted(plan, line) != pasted(plan, "")


@pytest.mark.parametrize("plan", [preset_plan("staged"), OWN], ids=lambda plan: plan.name)
def test_rates_are_scaled_where_the_plan_has_them(plan):
    for index, stage in enumerate(plan.stages):
        recipe = pasted(plan, lines.scaled_rate(course_of(plan), index, 0.1))
        after = recipe.stage_plan().stages[index]
        if stage.learning_rate is None:
            assert recipe.learning_rate == pytest.approx(1e-4)
            assert after == stage
        else:
            assert after.learning_rate == EXPECTED[index]
            assert after == dataclasses.replace(stage, learning_rate=EXPECTED[index])
        others = [number for number in range(len(plan.stages)) if number != index]
        assert [recipe.stage_plan().stages[number] for number in others] == [plan.stages[number] for number in others]


def test_what_lines_change():
    course = course_of(OWN)
    assert pasted(OWN, lines.frozen_statistics(course, 3)).stage_plan().stages[3].batch_norm == "eval"
    assert pasted(OWN, lines.shorter(course, 0, 2)).stage_plan().stages[0].patience == 2
    assert pasted(OWN, lines.less_frozen(course)).stage_plan().stages[3].unfreeze == "all"
    assert pasted(OWN, lines.with_head(course)).stage_plan().stages[0].unfreeze == ("layer4", "head")
    assert pasted(OWN, lines.against_overfitting(course, 2)).stage_plan().stages[2].augmentation == "strong"
    assert lines.against_overfitting(course, 0) == "augmentation: strong"
    staged = preset_plan("staged", epochs=14)
    # Two of the head's six epochs were worth it, so the whole gets a third as long.
    assert lines.shorter(course_of(staged), 0, 2) == "epochs: 5"
    assert lines.shorter(course_of(preset_plan("staged", epochs=3)), 0, 1) is None
    assert lines.less_frozen(course_of(staged)) == "plan: full"


@given(name=st.text(min_size=1, max_size=12), group=st.text(min_size=1, max_size=12))
@settings(deadline=None, max_examples=300)
def test_any_name_stands_in_a_line_as_it_is(name, group):
    plan = StagePlan((Stage(name, [group], learning_rate={group: 1e-3}),))
    line = lines.stages_line(plan)
    assert line.isprintable()
    assert yaml.load(line, RecipeLoader)["stages"][0]["name"] == name
    assert StagePlan(tuple(Stage(**stage) for stage in yaml.load(line, RecipeLoader)["stages"])) == plan


def test_where_little_is_known_no_line_is_made_up():
    bare = dataclasses.replace(course_of(OWN), plan=None, learning_rate=None)
    assert lines.scaled_rate(bare, 0, 0.1) == "learning_rate: 1e-4"
    assert lines.scaled_rate(dataclasses.replace(bare, records=[]), 0, 0.1) is None
    assert lines.shorter(bare, 0, 2) is None
    assert lines.frozen_statistics(bare, 0) is None
