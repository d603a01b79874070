"""FrozenClassifier: what is frozen, what is probed, and how classes are matched, whoever builds on it."""

import pytest
import torch
from torch import nn

from hf_deit.models.classifiers import FoundClassifier
from hf_deit.models.frozen_classifier import FrozenClassifier
from hf_deit.models.weight_files import fingerprint


NAMES = ["cat", "dog", "emu"]


class Network(nn.Module):
    """A convolution and a batch norm, then the mean over the image."""

    def __init__(self, classes=3, wrap=lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.wrap = nn.Conv2d(3, classes, 3), nn.BatchNorm2d(classes), wrap

    def forward(self, pixels):
        return self.wrap(self.norm(self.conv(pixels)).mean((2, 3)))


def frozen(names=None, classes=3, wrap=lambda logits: logits, kind=FrozenClassifier, image_size=None):
    classifier = kind(FoundClassifier(Network(classes, wrap), "net", names, image_size=image_size))
    classifier.num_labels = classes
    return classifier


class Numbered(FrozenClassifier):
    """The kind for which numbers are no names, as in evaluation."""

    role, owner_of_classes, remedy, numbers_are_names = "model", "dataset", "Train it", False


def test_the_network_is_frozen_in_evaluation_mode_and_known_by_its_weights():
    network = Network().train()
    before = fingerprint(network)
    classifier = FrozenClassifier(FoundClassifier(network, "net"))
    assert classifier.model is network and not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert classifier.sha256 == before and classifier.num_parameters == 3 * 3 * 9 + 3 + 6
    assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert classifier.device == torch.device("cpu")


def test_a_blank_image_changes_nothing_and_needs_no_gradient():
    classifier = frozen()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    output = classifier.probe((8, 12))
    assert output.shape == (1, 3) and not output.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


@pytest.mark.parametrize(
    ("wrap", "got"),
    [
        (lambda x: x[:, :, None], r"a tensor of shape \(1, 3, 1\)"),
        (lambda x: {"features": x}, "a dict"),
        (lambda x: None, "a NoneType"),
    ],
)
def test_an_output_without_logits_is_refused(wrap, got):
    with pytest.raises(ValueError, match=f"^model 'net' returns no class logits: got {got} for one image, expected"):
        frozen(wrap=wrap).probe((8, 8))


@pytest.mark.parametrize(("own", "shown"), [(None, "not known"), ((24, 32), "24x32")])
def test_an_image_that_the_network_cannot_read_is_refused_in_one_line(own, shown):
    message = f"^model 'net' could not read a blank 2x2 image .*The network's own size: {shown}.*pass image_size$"
    with pytest.raises(ValueError, match=message) as caught:
        frozen(image_size=own).probe((2, 2))  # smaller than the kernel
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("own", "wanted", "how", "order"),
    [
        (NAMES, NAMES, "by name", None),
        (["emu", "cat", "dog"], NAMES, "by name, re-ordered", [1, 2, 0]),
        (["Dog, domestic dog", "cat", "emu"], NAMES, "by name, re-ordered", [1, 0, 2]),
        (None, NAMES, "by position: the model has no class names", None),
        (NAMES, None, "by position: the dataset has no class names", None),
        (NAMES, ["LABEL_0", "LABEL_1", "LABEL_2"], "by position: the dataset has no class names", None),
        (["2", "0", "1"], ["0", "1", "2"], "by name, re-ordered", [1, 2, 0]),
    ],
)
@pytest.mark.parametrize("kind", [FrozenClassifier, Numbered])
def test_classes_are_matched_by_name_where_both_sides_have_names(kind, own, wanted, how, order):
    classifier = frozen(own, kind=kind)
    assert classifier.match_classes(wanted, 3, trust_class_order=False) == how
    logits = torch.randn(2, 3)
    expected = logits if order is None else logits[:, order]
    assert torch.equal(classifier.in_wanted_order(logits), expected)


@pytest.mark.parametrize(("own", "wanted"), [(["0", "1", "2"], NAMES), (NAMES, ["0", "1", "2"])])
def test_whether_numbers_are_names_is_the_kinds_to_say(own, wanted):
    with pytest.raises(ValueError, match="model 'net' has other classes than the dataset"):
        frozen(own).match_classes(wanted, 3, trust_class_order=False)
    assert "by position: the " in frozen(own, kind=Numbered).match_classes(wanted, 3, trust_class_order=False)


def test_other_classes_are_refused_unless_the_order_is_trusted():
    classifier = frozen(["cat", "dog", "gnu"])
    with pytest.raises(ValueError, match="3, such as gnu, against 3, such as emu. Fine-tune .*trust_class_order=True"):
        classifier.match_classes(NAMES, 3, trust_class_order=False)
    assert classifier.match_classes(NAMES, 3, trust_class_order=True) == "by position (trust_class_order)"
    assert classifier.class_order is None


@pytest.mark.parametrize("trust", [False, True])
def test_another_number_of_classes_is_always_refused(trust):
    message = r"model 'net' has 4 classes, the dataset has 3 \(cat, dog, emu\)\. Train it"
    with pytest.raises(ValueError, match=message):
        frozen(NAMES, classes=4, kind=Numbered).match_classes(NAMES, 3, trust)  # its names are three: not shown
    assert frozen(classes=4).match_classes(None, None, trust)  # unknown classes: none to compare with


def test_the_order_of_classes_moves_with_the_classifier():
    classifier = frozen(["emu", "cat", "dog"])
    classifier.match_classes(NAMES, 3, trust_class_order=False)
    assert classifier.to("meta").class_order.device.type == "meta"
