"""What the keys of a recipe must have in common."""

from torchthaw.data.augmentation import make_augmentation
from torchthaw.errors import RecipeError, ThawError
from torchthaw.recipe.schema import Recipe
from torchthaw.training.imbalance import ImbalanceSettings


def check_consistency(recipe: Recipe, where: str) -> None:
    """Checks keys against each other.

    Args:
        recipe: The recipe.
        where: What messages call it.

    Raises:
        RecipeError: two keys contradict each other, or one lacks another.
        PlanError: the plan or a stage does not fit.
    """
    if recipe.plan is not None and recipe.stages is not None:
        raise RecipeError(f"{where} has both plan and stages; keep one: plan names a preset, stages spell it out")
    if recipe.data.path is not None and recipe.data.name is not None:
        raise RecipeError(f"{where} has both data.path and data.name; keep one: a folder or file, or a Hub data set")
    for key, share in (("validation", recipe.data.validation), ("test", recipe.data.test)):
        if share < 0 or (isinstance(share, float) and share >= 1):
            raise RecipeError(
                f"data.{key} is {share!r}; write a share below 1 such as 0.15, or a whole number of images"
            )
    if recipe.data.path is None and recipe.data.name is None:
        raise RecipeError(f"{where} names no data; pass --data FOLDER, or write data: {{path: FOLDER}}")
    _check_problem_type(recipe)
    for key, does in (("l2_sp", "pulls towards pretrained weights"), ("forgetting", "asks what these still know")):
        if getattr(recipe, key) is not None and recipe.weights is None:
            raise RecipeError(
                f"{where} has {key}, which {does}, and weights: null; write weights: DEFAULT, or leave {key} out"
            )
    if recipe.cv is None and recipe.cv_final:
        raise RecipeError(f"{where} has cv_final without cv; write the number of folds, such as cv: 5, or leave it out")
    if recipe.cv is not None and not recipe.cv_final and recipe.push.repo is not None:
        raise RecipeError(
            f"{where} asks for a cross-validation and a push to {recipe.push.repo}, but without a final model there is "
            "nothing to push; write cv_final: true, or leave push out"
        )
    if recipe.cv_final and recipe.wise_ft:
        raise RecipeError(
            f"{where} has wise_ft: true and cv_final: true, but the final model of a cross-validation has no "
            "validation images to choose its mixtures by; leave one of them out"
        )
    if recipe.cv is not None and recipe.calibrate != "none":
        raise RecipeError(
            f"{where} has calibrate: {recipe.calibrate} and cv: {recipe.cv}, but the final model of a cross-validation "
            "has no validation images to fit it on; write calibrate: none, or leave cv out"
        )
    ImbalanceSettings.of(recipe).check()
    plan = recipe.stage_plan()
    if recipe.augmentation is not None:
        make_augmentation(recipe.augmentation)
    for stage in plan.stages:
        if stage.augmentation is not None:
            try:
                make_augmentation(stage.augmentation)
            except ThawError as error:
                raise RecipeError(f"stage {stage.name!r}: {error}") from error


def _check_problem_type(recipe: Recipe) -> None:
    """Checks what goes with one or several labels per image, as far as the recipe says which there are."""
    if recipe.problem_type == "single_label":
        given = [key for key in ("labels", "label_separator") if getattr(recipe.data, key) is not None]
        given = [f"data.{key}" for key in given] + [f"metric: {recipe.metric}"] * (recipe.metric in ("map", "micro_f1"))
        given += ["thresholds"] * (recipe.thresholds != 0.5)
        if given:
            raise RecipeError(
                f"problem_type is 'single_label', but {', '.join(given)} go with several labels per image; write "
                "problem_type: multi_label, or leave them out"
            )
    if recipe.thresholds == "per_class" and recipe.cv is not None:
        raise RecipeError(
            "thresholds: per_class is chosen on validation images, which the final model of a cross-validation has not "
            "got; write a number such as 0.5, or leave cv out"
        )
