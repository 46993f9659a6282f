"""What the outputs of pretrained weights stand for."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from torchthaw import TorchvisionConfig, TorchvisionForImageClassification
from torchthaw.backbones.anatomy import list_architectures
from torchthaw.backbones.categories import categories_of
from torchthaw.errors import WeightsError

ARCHITECTURE = "shufflenet_v2_x0_5"


def test_torchvisions_weights_have_names_and_need_no_download():
    for architecture in list_architectures():
        found = categories_of(architecture, "DEFAULT")
        assert (found.number, found.imagenet) == (1000, True)
        assert found.names[0] == "tench"
        assert found.names[309] == "bee"


@pytest.mark.parametrize("outputs", [1000, 10])
def test_a_file_is_of_imagenet_if_it_has_as_many_outputs(tmp_path, outputs):
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=outputs)
    file = tmp_path / "w.safetensors"
    save_file(network.state_dict(), file)
    found = categories_of(ARCHITECTURE, str(file))
    assert found.number == outputs
    assert found.imagenet == (outputs == 1000)
    assert (None if found.names is None else found.names[309]) == ("bee" if outputs == 1000 else None)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"no weights of resnet18: it has no tensor 'fc.weight'"):
        categories_of("resnet18", str(tmp_path / "other.pth"))


def test_what_torchthaw_saved_knows_its_names(tmp_path):
    assert categories_of(ARCHITECTURE, "builtin").number == 10
    for several in (False, True):
        kind = {"problem_type": "multi_label_classification"} if several else {}
        config = TorchvisionConfig(architecture=ARCHITECTURE, id2label=["ant", "bee"], **kind)
        TorchvisionForImageClassification(config).save_pretrained(tmp_path / str(several))
    found = categories_of(ARCHITECTURE, str(tmp_path / "False"))
    assert (found.names, found.imagenet) == (("ant", "bee"), False)
    with pytest.raises(WeightsError, match="gives an image several labels"):
        categories_of(ARCHITECTURE, str(tmp_path / "True"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="empty holds a resnet50, not a shufflenet_v2_x0_5"):
        categories_of(ARCHITECTURE, str(tmp_path / "empty"))
