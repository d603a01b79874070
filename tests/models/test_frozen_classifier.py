"""FrozenClassifier: what is frozen, what is probed, and how classes are matched, whoever builds on it."""

import pytest
import torch
from torch import nn

from hf_deit.models.classifiers import FoundClassifier, find_classifier
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


def test_a_doubtful_match_of_classes_is_one_warning(caplog):
    frozen(NAMES).match_classes(NAMES, 3, trust_class_order=False)
    frozen().match_classes(["0", "1", "2"], 3, trust_class_order=True)
    frozen(NAMES).match_classes(None, 3, trust_class_order=False)
    assert not caplog.records
    for own, message in (
        (["EMU", "cat", "dog"], "model 'net': class names differ in case or blanks: 'EMU' for 'emu'"),
        (["cat, puss", "dog", "emu"], "model 'net': class names are compared up to the first comma: 'cat, puss' for"),
        (None, "model 'net' has no class names: its classes are taken by position for cat, dog, emu. Check"),
    ):
        caplog.clear()
        frozen(own).match_classes(NAMES, 3, trust_class_order=False)
        assert [record.levelname for record in caplog.records] == ["WARNING"] and message in caplog.text


@pytest.mark.parametrize(
    ("own", "wanted", "side"), [(["a", "A ", "b"], NAMES, "model"), (NAMES, ["b", "b", "a"], "da")]
)
def test_a_name_that_two_classes_share_is_the_reason_of_the_refusal(own, wanted, side):
    with pytest.raises(ValueError, match=f"the {side}.* names more than one class '[ab]'.*trust_class_order=True"):
        frozen(own).match_classes(wanted, 3, trust_class_order=False)


# --- networks of other kinds -------------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution, a batch norm, dropout and a head; reads 8x8 pixels and more."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.drop, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Dropout(0.5),
            nn.Linear(8, 3),
        )

    def forward(self, pixels):
        return self.head(self.drop(self.norm(self.conv(pixels)).relu().mean((2, 3))))


def exported(network, dynamic=True):
    shapes = {"pixels": {0: torch.export.Dim("batch")}} if dynamic else None
    return torch.export.export(network, (torch.zeros(2 if dynamic else 1, 3, 8, 8),), dynamic_shapes=shapes)


KINDS = {
    "quantised": lambda net: torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8),
    "scripted": torch.jit.script,
    "traced": lambda net: torch.jit.trace(net, torch.zeros(1, 3, 8, 8)),
    "frozen program": lambda net: torch.jit.freeze(torch.jit.script(net)),
    "quantised and scripted": lambda net: torch.jit.script(KINDS["quantised"](net)),
    "exported": exported,
    "exported, as a module": lambda net: exported(net).module(),
    "symbolic": torch.fx.symbolic_trace,
    "float16": lambda net: net.half(),
    "bfloat16": lambda net: net.bfloat16(),
    "float64": lambda net: net.double(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_networks_of_every_kind_answer_as_the_plain_one(kind):
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = Small().eval()(pixels)
    first, again, other = (FrozenClassifier(find_classifier(KINDS[kind](Small(seed).eval()))) for seed in (0, 0, 1))
    assert first.probe((8, 8)).shape == (1, 3)
    first.train()
    first.eval()
    logits = first.run(pixels).float()
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)
    assert first.sha256 == again.sha256 != other.sha256
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exported(Small().eval(), dynamic=False), "reads one image, but not two .*dynamic batch dimension"),
        (lambda: exported(Small().train()), "recorded in training mode. Call eval"),
        (
            lambda: torch.jit.trace(Small().train(), torch.zeros(4, 3, 8, 8), check_trace=False),
            "recorded in training mode. Call eval",
        ),
    ],
)
def test_a_program_of_one_batch_or_in_training_mode_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^model .*{message}") as caught:
        FrozenClassifier(find_classifier(make())).probe((8, 8))
    assert "\n" not in str(caught.value)


def test_a_network_that_cannot_be_frozen_is_refused_in_one_line():
    class Odd(Small):
        def state_dict(self, *args, **kwargs):
            raise AttributeError("'tuple' object has no attribute '_parameters'\nand more")

    with pytest.raises(
        ValueError, match="model 'odd' is a Odd that cannot be frozen .*_parameters'.*nn.Module$"
    ) as got:
        FrozenClassifier(FoundClassifier(Odd(), "odd"))
    assert "\n" not in str(got.value)


def test_quantised_weights_are_counted_and_part_of_the_fingerprint():
    networks = [KINDS["quantised"](nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()) for _ in range(2)]
    one, other = (FrozenClassifier(FoundClassifier(network, "net")) for network in networks)
    assert one.num_parameters == 36 and one.sha256 != other.sha256
