"""Layer groups of a model: runs of layers that are frozen and trained together."""

from dataclasses import dataclass

from torch import nn

from .anatomy import HEAD, group_paths


@dataclass(frozen=True)
class LayerGroup:
    """A run of layers that are frozen and trained together.

    Attributes:
        name: Name of the group, such as `stem`, `layer4`, `block11` or `head`.
        modules: Top-level modules of the group in forward order, by dotted name from the model's root.
        parameters: All parameters of the group by dotted name from the model's root.
    """

    name: str
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]


def layer_groups(model: nn.Module, architecture: str, prefix: str) -> dict[str, LayerGroup]:
    """Returns the layer groups of a model by name, in forward order; the last one is `head`.

    Args:
        model: The model that holds the network.
        architecture: torchvision's name of the network.
        prefix: Where in the model the network is.
    """
    paths = {
        name: [f"{prefix}.{path}" for path in group]
        for name, group in group_paths(architecture, model.get_submodule(prefix)).items()
    }
    paths[HEAD] += _additions(model, {path for group in paths.values() for path in group})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {}
    for name, group in paths.items():
        modules = {path: model.get_submodule(path) for path in group if path not in parameters}
        found = [parameters[path] for path in group if path in parameters]
        found += [parameter for module in modules.values() for parameter in module.parameters()]
        # A parameter that several groups share belongs to the first.
        members = {names.pop(id(parameter)): parameter for parameter in found if id(parameter) in names}
        groups[name] = LayerGroup(name=name, modules=modules, parameters=members)
    return groups


def _additions(model: nn.Module, listed: set[str]) -> list[str]:
    """Returns the uppermost modules and the parameters of a model that are not within the listed ones, by name."""
    modules = {path: module for path, module in model.named_modules() if path in listed}
    known = {part for module in modules.values() for part in module.modules()}
    added: list[str] = []

    def search(module: nn.Module, path: str) -> None:
        added.extend(name for name, _ in module.named_parameters(path, recurse=False) if name not in listed)
        for name, child in module.named_children():
            if child in known:
                continue
            child_path = f"{path}.{name}" if path else name
            if known.isdisjoint(child.modules()):
                added.append(child_path)
                known.update(child.modules())
            else:
                search(child, child_path)

    search(model, "")
    return added
