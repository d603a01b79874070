"""Teachers: every spec form, pixels, class order, refusals, and that nothing of a teacher ever moves or leaks."""

import argparse
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_deit.teachers import Teacher, load_teacher, new_classifier


NAMES = ["cat", "dog", "emu", "fox"]
ID2LABEL = dict(enumerate(NAMES))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OWN_MEAN, OWN_STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.2)
STUDENT = {"id2label": ID2LABEL, "mean": MEAN, "std": STD}
TINY_RESNET = {"channels": (8, 8, 8, 8), "stem_width": 8}


class TinyConvnet(nn.Module):
    """A convolution, a batch norm with moved statistics, and a head."""

    def __init__(self, classes=4, wrap=lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, classes)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.wrap = wrap

    def forward(self, pixel_values):
        return self.wrap(self.head(self.norm(self.conv(pixel_values)).relu().mean((2, 3))))


def by_hand(model, pixels):
    """A TinyConvnet's logits from its tensors alone."""
    features = F.conv2d(pixels, model.conv.weight, model.conv.bias)
    mean, var = (t[:, None, None] for t in (model.norm.running_mean, model.norm.running_var))
    return ((features - mean) / (var + 1e-5).sqrt()).relu().mean((2, 3)) @ model.head.weight.T + model.head.bias


def renormalised(pixels):
    """From the student's normalisation through [0, 1] to the teacher's own."""
    own_mean, own_std, mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OWN_MEAN, OWN_STD, MEAN, STD))
    return (pixels * std + mean - own_mean) / own_std


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def save_timm_wrapper(path, **changes):
    arguments = {"id2label": ID2LABEL, "mean": MEAN, "std": STD, "image_size": 24, "model_args": TINY_RESNET} | changes
    model = new_classifier("timm:resnet10t", **arguments).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
    model.save_pretrained(path)
    return model


def save_vit(path, names=NAMES, **config):
    torch.manual_seed(0)
    config = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8} | config
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
    model = ViTForImageClassification(ViTConfig(**config, id2label=dict(enumerate(names)))).eval()
    model.save_pretrained(path)
    return model


# --- frozen ------------------------------------------------------------------------------------------------------


def test_teacher_statistics_do_not_move(pixels):
    model = TinyConvnet()
    teacher = load_teacher(model, **STUDENT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = nn.Sequential(teacher)
    student.train()
    teacher.train()
    first = teacher(pixels)
    model.train()  # even on the bare model
    torch.testing.assert_close(teacher(pixels), first, rtol=0, atol=0)
    assert not teacher.training and not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_teacher_has_no_gradients_and_its_logits_serve_in_a_loss(pixels):
    model = TinyConvnet()
    teacher = load_teacher(model, **STUDENT)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    logits = teacher(pixels.requires_grad_())
    assert not logits.requires_grad and not logits.is_inference() and logits.dtype == torch.float32
    scale = torch.ones((), requires_grad=True)
    F.kl_div(
        F.log_softmax(scale * logits, -1), F.log_softmax(logits * scale, -1), log_target=True, reduction="batchmean"
    ).backward()
    F.cross_entropy(scale * logits, logits.argmax(1)).backward()
    assert scale.grad is not None


def test_teacher_on_a_student_leaks_nothing_and_moves_with_it(pixels):
    student = nn.Linear(2, 2)
    model = TinyConvnet()
    student.teacher = load_teacher(model, **STUDENT | {"mean": OWN_MEAN})
    assert set(student.state_dict()) == {"weight", "bias"} == {name for name, _ in student.named_parameters()}
    assert not list(student.buffers()) and not hasattr(student.teacher, "save_pretrained")
    student.load_state_dict(nn.Linear(2, 2).state_dict(), strict=True)
    student.to("meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_facts_name_the_teacher():
    model = TinyConvnet()
    teacher = load_teacher(model, **STUDENT)
    assert (teacher.name, teacher.num_labels, teacher.id2label) == ("TinyConvnet", 4, ID2LABEL)
    assert teacher.num_parameters == (3 * 9 * 6 + 6) + 12 + (6 * 4 + 4)
    assert len(teacher.sha256) == 16 and teacher.sha256 == load_teacher(TinyConvnet(), **STUDENT).sha256
    changed = TinyConvnet()
    changed.norm.running_mean[0] += 1e-6
    assert load_teacher(changed, **STUDENT).sha256 != teacher.sha256


# --- pixels ------------------------------------------------------------------------------------------------------


def test_equal_normalisation_is_skipped_exactly(pixels):
    model = TinyConvnet()
    model.default_cfg = {"mean": MEAN, "std": STD, "input_size": (3, 24, 24)}
    teacher = load_teacher(model, **STUDENT)
    torch.testing.assert_close(teacher(pixels), by_hand(model, pixels))
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher(pixels)
    assert torch.equal(seen[0], pixels)


def test_pixels_are_renormalised_to_the_teachers_own(pixels):
    model = TinyConvnet()
    model.default_cfg = {"mean": OWN_MEAN, "std": OWN_STD, "input_size": (3, 24, 24)}
    torch.testing.assert_close(load_teacher(model, **STUDENT)(pixels), by_hand(model, renormalised(pixels)))


@pytest.mark.parametrize(
    ("cfg", "image_size", "expected"),
    [
        ({"input_size": (3, 16, 16)}, None, (24, 24)),  # a convnet works at the student's resolution
        ({"input_size": (3, 16, 16), "fixed_input_size": True}, None, (16, 16)),
        ({"input_size": (3, 16, 16), "fixed_input_size": True}, 32, (32, 32)),
        ({}, (20, 28), (20, 28)),
        ({}, None, (24, 24)),
    ],
)
def test_size_is_the_students_unless_fixed_or_asked_for(pixels, cfg, image_size, expected):
    model = TinyConvnet()
    model.default_cfg = cfg
    teacher = load_teacher(model, image_size=image_size, **STUDENT)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher(pixels)
    reference = F.interpolate(pixels, expected, mode="bicubic", antialias=True) if expected != (24, 24) else pixels
    torch.testing.assert_close(seen[0], reference)


def test_bfloat16_autocast_still_answers_in_float32(pixels):
    model = TinyConvnet()
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    exact, rounded = (load_teacher(model, dtype=dtype, **STUDENT) for dtype in (torch.float32, torch.bfloat16))
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = exact(pixels)  # an autocast around it does not reach a float32 teacher
    logits = rounded(pixels)
    assert seen == [torch.float32, torch.bfloat16] and logits.dtype == reference.dtype == torch.float32
    torch.testing.assert_close(logits, reference, atol=0.05, rtol=0.05)


@pytest.mark.slow
def test_compiled_teacher_gives_the_same_logits(pixels):
    model = TinyConvnet()
    teacher = load_teacher(model, compile=True, **STUDENT)
    torch.testing.assert_close(teacher(pixels), by_hand(model, pixels), atol=1e-5, rtol=1e-5)
    assert teacher.sha256 == load_teacher(TinyConvnet(), **STUDENT).sha256


# --- outputs -----------------------------------------------------------------------------------------------------


class Named:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "wrap", [lambda x: (x, "features"), lambda x: {"logits": x}, Named], ids=["tuple", "dict", "attribute"]
)
def test_every_form_of_output_is_read(pixels, wrap):
    model = TinyConvnet(wrap=wrap)
    torch.testing.assert_close(load_teacher(model, **STUDENT)(pixels), by_hand(model, pixels))


@pytest.mark.parametrize(
    ("wrap", "got"),
    [
        (lambda x: x[:, :, None, None], r"a tensor of shape \(1, 4, 1, 1\)"),
        (lambda x: {"last_hidden_state": x}, "a dict"),
        (lambda x: None, "a NoneType"),
    ],
)
def test_a_model_without_logits_is_refused(wrap, got):
    with pytest.raises(ValueError, match=f"no class logits: got {got} .* expected \\(1, classes\\)"):
        load_teacher(TinyConvnet(wrap=wrap), **STUDENT)


def test_a_model_that_cannot_read_the_size_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    with pytest.raises(ValueError, match="could not read a blank 3x224x224 image .* pass image_size"):
        load_teacher(model, **STUDENT)
    assert load_teacher(model, image_size=8, **STUDENT)(torch.zeros(1, 3, 24, 24)).shape == (1, 4)


# --- classes -----------------------------------------------------------------------------------------------------


def named(names, classes=None):
    model = TinyConvnet(classes or len(names))
    model.config = argparse.Namespace(id2label={str(i): name for i, name in enumerate(names)})
    return model


def test_classes_in_another_order_are_reordered(pixels, caplog):
    model = named(["fox", "cat", "emu", "dog"])
    with caplog.at_level(logging.INFO, "hf_deit.teachers"):
        teacher = load_teacher(model, **STUDENT)
    cat, dog, emu, fox = 1, 3, 2, 0
    torch.testing.assert_close(teacher(pixels), by_hand(model, pixels)[:, [cat, dog, emu, fox]])
    assert teacher.id2label == ID2LABEL
    assert sum("re-ordered" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (NAMES, [0, 1, 2, 3]),
        (["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"], [0, 1, 2, 3]),  # made up by Transformers: not known
        (["Dog, domestic dog", "cat", "emu", "fox"], [1, 0, 2, 3]),
    ],
)
def test_names_are_compared_by_meaning(pixels, names, order):
    model = named(names)
    torch.testing.assert_close(load_teacher(model, **STUDENT)(pixels), by_hand(model, pixels)[:, order])


def test_imagenet_names_match_in_each_of_their_spellings():
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    wordnet, full = info.label_names(), info.label_descriptions()
    first = [name.split(",")[0].replace(" ", "_") for name in full]
    assert len(set(first)) < 1000  # two cranes: no permutation could tell them apart
    for student in (wordnet, full, first):
        for names in (wordnet, full, first):
            assert load_teacher(named(names), **STUDENT | {"id2label": dict(enumerate(student))}).num_labels == 1000
    with pytest.raises(ValueError, match="other classes"):
        load_teacher(named(first[::-1]), **STUDENT | {"id2label": dict(enumerate(wordnet))})


def test_other_classes_are_refused_with_both_sides_and_the_fix(pixels):
    model = named(["cat", "dog", "gnu", "hen"])
    with pytest.raises(ValueError, match=r"4, such as gnu, hen, against 4, such as emu, fox\..*run_teacher\.py"):
        load_teacher(model, **STUDENT)
    trusted = load_teacher(model, trust_class_order=True, **STUDENT)
    torch.testing.assert_close(trusted(pixels), by_hand(model, pixels))


def test_another_number_of_classes_is_refused_even_when_names_are_trusted():
    message = r"answers with 5 classes, the student has 4 \(cat, dog, emu, ...\)\. Fine-tune .*run_teacher\.py"
    with pytest.raises(ValueError, match=message):
        load_teacher(TinyConvnet(5), trust_class_order=True, **STUDENT)


def test_features_of_another_width_are_refused():
    model = TinyConvnet()
    model.head = nn.Identity()
    with pytest.raises(ValueError, match="answers with 6 classes, the student has 4"):
        load_teacher(model, **STUDENT)


def test_a_student_without_names_takes_the_teachers(pixels):
    teacher = load_teacher(named(NAMES), id2label=None, mean=MEAN, std=STD)
    assert teacher.id2label == ID2LABEL


# --- several teachers --------------------------------------------------------------------------------------------


def test_a_mixture_averages_probabilities_in_the_students_order(pixels):
    first, second = named(NAMES), named(["dog", "cat", "emu", "fox"])
    second.head.weight.data.mul_(-3)
    teacher = load_teacher([first, second], **STUDENT)
    probabilities = [by_hand(first, pixels).softmax(1), by_hand(second, pixels)[:, [1, 0, 2, 3]].softmax(1)]
    logits = teacher(pixels)
    torch.testing.assert_close(logits, (sum(probabilities) / 2).log())
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(2))
    assert teacher.name == "TinyConvnet + TinyConvnet" and len(teacher.sha256) == 16
    assert teacher.num_parameters == 2 * load_teacher(first, **STUDENT).num_parameters


def test_a_mixture_of_different_widths_is_refused():
    with pytest.raises(ValueError, match="know 4 and 5 classes"):
        load_teacher([TinyConvnet(4), TinyConvnet(5)], id2label=None, mean=MEAN, std=STD)


# --- directories -------------------------------------------------------------------------------------------------


def test_a_new_timm_classifier_saves_a_directory_that_a_teacher_reads(tmp_path, pixels):
    model = save_timm_wrapper(tmp_path, mean=OWN_MEAN, std=OWN_STD, id2label={0: "dog", 1: "cat", 2: "emu", 3: "fox"})
    teacher = load_teacher(tmp_path, **STUDENT)
    with torch.no_grad():
        expected = model.timm_model(renormalised(pixels))[:, [1, 0, 2, 3]]
    torch.testing.assert_close(teacher(pixels), expected)
    assert teacher.name == str(tmp_path) and teacher.models[0].config.id2label[0] == "dog"


def test_a_new_timm_classifier_starts_from_timms_own_initialisation():
    options = {"id2label": ID2LABEL, "mean": MEAN, "std": STD, "image_size": 24}
    wrapper = new_classifier("timm:resnet10t", **options).timm_model
    plain = timm.create_model("resnet10t", num_classes=4)
    stock = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=4)).timm_model
    for name in ("conv1.0.weight", "layer2.0.conv1.weight"):
        ours, timms, stocks = (model.get_parameter(name).std().item() for model in (wrapper, plain, stock))
        assert ours == pytest.approx(timms, rel=0.1) and stocks < 0.5 * timms
    assert wrapper.layer1[0].bn2.weight.abs().max() == 0 and stock.layer1[0].bn2.weight.min() == 1


def test_fine_tuning_to_new_classes_saves_their_names(tmp_path):
    save_timm_wrapper(tmp_path / "old")
    names = {0: "ant", 1: "bee"}
    model = new_classifier(str(tmp_path / "old"), id2label=names, mean=OWN_MEAN, std=OWN_STD, image_size=32)
    old = load_file(tmp_path / "old" / "model.safetensors")
    assert torch.equal(model.timm_model.conv1[0].weight, old["timm_model.conv1.0.weight"])
    model.save_pretrained(tmp_path / "new")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "new").config.id2label == names
    assert json.loads((tmp_path / "new" / "config.json").read_text())["pretrained_cfg"]["mean"] == list(OWN_MEAN)
    assert load_teacher(tmp_path / "new", **STUDENT | {"id2label": names}).id2label == names


def test_a_transformers_directory_with_its_image_processor(tmp_path, pixels):
    model = save_vit(tmp_path)
    ViTImageProcessorPil(image_mean=OWN_MEAN, image_std=OWN_STD, size={"height": 16, "width": 16}).save_pretrained(
        tmp_path
    )
    resized = F.interpolate(renormalised(pixels), (16, 16), mode="bicubic", antialias=True)  # a ViT takes one size
    with torch.no_grad():
        torch.testing.assert_close(load_teacher(str(tmp_path), **STUDENT)(pixels), model(resized).logits)


def test_a_processor_that_does_not_normalise_or_rescales_otherwise_is_understood(tmp_path):
    model = save_vit(tmp_path, image_size=24)
    image = torch.rand(1, 3, 24, 24)
    student_pixels = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for settings, seen in [
        ({"do_normalize": False}, image),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, image * 2 - 1),
    ]:
        ViTImageProcessorPil(**settings).save_pretrained(tmp_path)
        with torch.no_grad():
            expected = model(seen).logits
        torch.testing.assert_close(load_teacher(tmp_path, **STUDENT)(student_pixels), expected)


def test_a_directory_without_a_processor_gets_the_students_pixels(tmp_path, pixels, caplog):
    model = save_vit(tmp_path, image_size=24)
    teacher = load_teacher(tmp_path, **STUDENT)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels), model(pixels).logits)
    assert "no preprocessor_config.json" in caplog.text


def test_half_precision_checkpoints_run_in_float32(tmp_path, pixels):
    model = save_vit(tmp_path, image_size=24)
    model.half().save_pretrained(tmp_path)
    assert load_teacher(tmp_path, **STUDENT).models[0].dtype == torch.float32


@pytest.mark.parametrize("change", ["missing", "mismatched"])
def test_a_freshly_initialised_head_is_refused(tmp_path, change):
    save_vit(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier")}
    else:
        weights["classifier.weight"], weights["classifier.bias"] = torch.zeros(7, 8), torch.zeros(7)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"untrained weights: classifier\.bias, classifier\.weight are not in its checkpoint.*run_teacher\.py"
    with pytest.raises(ValueError, match=message):
        load_teacher(tmp_path, **STUDENT)


def test_a_backbone_without_a_head_is_refused(tmp_path):
    save_vit(tmp_path).vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="untrained weights: classifier"):
        load_teacher(tmp_path, **STUDENT | {"id2label": {0: "a", 1: "b"}})


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda path: path / "nowhere", "nowhere' does not exist"),
        (lambda path: path, "has no config.json"),
        (lambda path: (path / "w.pth").write_bytes(b"x") and path / "w.pth", r"is a file: .*timm:<name>\?checkpoint="),
    ],
)
def test_an_unreadable_path_is_one_clear_line(tmp_path, make, got):
    with pytest.raises(ValueError, match=got) as caught:
        load_teacher(str(make(tmp_path)), **STUDENT)
    assert "python:<module>:<factory>, or an nn.Module" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"junk" * 100, None])
def test_corrupt_or_absent_weights_are_one_clear_line(tmp_path, content):
    save_vit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if content:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="cannot load model") as caught:
        load_teacher(tmp_path, **STUDENT)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_hub_id_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot load model 'nobody/nothing'") as caught:
        load_teacher("nobody/nothing", **STUDENT)
    assert "\n" not in str(caught.value)


# --- timm: -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_timm():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    model.get_classifier().weight.data.normal_()
    return model


@pytest.mark.parametrize("form", ["safetensors", "plain", "authors", "timm", "prefixed"])
def test_a_timm_checkpoint_is_loaded_from_every_form_of_file(tmp_path, pixels, small_timm, form):
    weights = small_timm.state_dict()
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(weights, file)
    else:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        content = {
            "plain": weights,
            "authors": {"model": weights},
            "timm": {"args": argparse.Namespace(lr=1), "epoch": 3, "state_dict": zeros, "state_dict_ema": weights},
            "prefixed": {"module." + name: tensor for name, tensor in weights.items()},
        }[form]
        torch.save(content, file)
    teacher = load_teacher(f"timm:test_resnet?checkpoint={file}", **STUDENT | {"mean": OWN_MEAN, "std": OWN_STD})
    cfg = small_timm.pretrained_cfg
    mean, std, own_mean, own_std = (
        torch.tensor(v).view(3, 1, 1) for v in (OWN_MEAN, OWN_STD, cfg["mean"], cfg["std"])
    )
    with torch.no_grad():
        expected = small_timm((pixels * std + mean - own_mean) / own_std)
    torch.testing.assert_close(teacher(pixels), expected, atol=1e-4, rtol=1e-4)


def test_a_two_headed_timm_deit_is_a_teacher(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    teacher = load_teacher(f"timm:deit_tiny_distilled_patch16_224?checkpoint={tmp_path / 'w.safetensors'}", **STUDENT)
    large = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        resized = F.interpolate(large, (224, 224), mode="bicubic", antialias=True)
        torch.testing.assert_close(teacher(large), model(resized), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv1.weight") is None, r"1 missing: conv1\.weight$"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 unexpected: extra$"),
        (lambda w: w.update({"conv1.weight": torch.zeros(1, 1)}), r"of another shape: conv1\.weight \(1, 1\) instead"),
    ],
)
def test_a_timm_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    weights = timm.create_model("resnet18", num_classes=4).state_dict()
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_teacher(f"timm:resnet18?checkpoint={tmp_path / 'w.pth'}", **STUDENT)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, save):
    file, trace = tmp_path / "w.pth", tmp_path / "it_ran"
    save({"state_dict": Bomb(trace)}, file)
    with pytest.raises(ValueError, match="holds more than weights. Only .* plain values, are read") as caught:
        load_teacher(f"timm:resnet18?checkpoint={file}", **STUDENT)
    assert not trace.exists() and "\n" not in str(caught.value)


def test_a_directory_of_pickled_weights_is_refused_even_when_they_are_good(tmp_path):
    model = save_vit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load model .* no file named model\.safetensors"):
        load_teacher(tmp_path, **STUDENT)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet18?weights=x", r"expected timm:<name>\?checkpoint=<file>, got 'weights=x'"),
        ("timm:resnet18?checkpoint=nowhere.pth", "checkpoint 'nowhere.pth' does not exist"),
        ("timm:resnet1O1", "timm has no model 'resnet1O1'; close ones are .*resnet101"),
        (7, "cannot read a model from a int"),
        ("python:json", "expected python:<module>:<factory>"),
        ("python:no_such_module_here:build", "No module named .* PYTHONPATH"),
        ("python:json:no_such_factory", "no attribute 'no_such_factory'.* PYTHONPATH"),
        ("python:builtins:dict", "returned a dict, expected an nn.Module"),
        (" , ", "no teacher in"),
        ([], "no teacher in"),
    ],
)
def test_a_malformed_spec_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(spec, **STUDENT)


def test_timm_weights_that_cannot_be_downloaded_name_the_local_forms(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nmore lines")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(ValueError, match=r"no network\. Without a network .* timm:resnet18\?checkpoint=<file>"):
        load_teacher("timm:resnet18", **STUDENT)


def test_published_timm_weights_bring_imagenet_names(monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *args, **kwargs: None)
    teacher = load_teacher("timm:test_resnet", id2label=None, mean=MEAN, std=STD)
    assert teacher.id2label[0] == "tench, Tinca tinca" and teacher.num_labels == 1000
    with pytest.raises(ValueError, match=r"answers with 1000 classes \(tench.*the student has 4 \(cat"):
        load_teacher("timm:test_resnet", **STUDENT)


# --- python: and lists -------------------------------------------------------------------------------------------


def test_a_python_factory_and_a_comma_separated_mixture(tmp_path, pixels, monkeypatch):
    (tmp_path / "my_teacher_module.py").write_text(f"from {__name__} import TinyConvnet\nbuild = TinyConvnet\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = save_vit(tmp_path / "vit", image_size=24)
    both = load_teacher(f"python:my_teacher_module:build, {tmp_path / 'vit'}", **STUDENT)
    assert both.name == f"python:my_teacher_module:build + {tmp_path / 'vit'}"
    with torch.no_grad():
        expected = (by_hand(TinyConvnet(), pixels).softmax(1) + model(pixels).logits.softmax(1)) / 2
    torch.testing.assert_close(both(pixels), expected.log())


def test_a_directory_with_a_comma_is_one_teacher(tmp_path):
    save_vit(tmp_path / "a,b")
    assert load_teacher(str(tmp_path / "a,b"), **STUDENT).name.endswith("a,b")


def test_a_loaded_teacher_is_returned_as_it_is():
    teacher = load_teacher(TinyConvnet(), **STUDENT)
    assert isinstance(teacher, Teacher) and load_teacher(teacher, **STUDENT) is teacher


def test_the_module_imports_without_timm():
    code = "import sys, hf_deit.teachers; sys.exit('timm' in sys.modules)"
    source = Path(__file__).parents[1] / "src"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(source)}).returncode == 0
