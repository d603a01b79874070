"""Teachers: pixels, class order, mixtures, refusals, and that nothing of a teacher ever moves or leaks."""

import argparse
import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from support.classifiers import ID2LABEL, NAMES, OWN_MEAN, OWN_STD, save_vit
from torch import nn
from torch.nn import functional as F
from transformers import ViTImageProcessorPil

from hf_deit.teachers.teacher import Teacher, load_teacher


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STUDENT = {"id2label": ID2LABEL, "mean": MEAN, "std": STD}


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


class OneSize(TinyConvnet):
    """Reads images of one size alone, or of so many pixels and more."""

    def __init__(self, only=None, least=0):
        super().__init__()
        self.only, self.least = only, least

    def forward(self, pixel_values):
        side = pixel_values.shape[-1]
        assert side >= self.least and self.only in (None, side), f"wrong size {side}"
        return super().forward(pixel_values)


@pytest.mark.parametrize(
    ("network", "cfg", "student_size", "seen", "warns"),
    [
        ({"only": 24}, {}, 24, 24, False),  # written for the student's size, and says so nowhere
        ({"only": 224}, {}, 24, 224, True),
        ({"least": 75}, {}, 24, 224, True),
        ({"least": 75}, {}, 96, 96, False),
        ({"only": 40}, {"input_size": (3, 40, 40)}, 24, 40, True),  # a cfg that does not say that the size is fixed
        ({"only": 40}, {"input_size": (3, 40, 40), "fixed_input_size": True}, 24, 40, False),
        ({}, {"input_size": (3, 40, 40)}, (24, 32), (24, 32), False),
    ],
)
def test_a_teacher_is_tried_at_the_students_size_and_then_at_its_own(network, cfg, student_size, seen, warns, caplog):
    model = OneSize(**network)
    model.default_cfg = cfg
    teacher = load_teacher(model, student_size=student_size, trust_class_order=True, **STUDENT)
    shapes = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[-2:])))
    teacher(torch.zeros(2, 3, *(student_size if isinstance(student_size, tuple) else (student_size,) * 2)))
    assert shapes == [seen if isinstance(seen, tuple) else (seen, seen)]
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == warns and all("cannot read the student's 24x24 pixels" in line for line in told)


def test_a_teacher_of_one_size_still_reads_others_later():
    teacher = load_teacher(OneSize(only=24), student_size=24, **STUDENT)
    assert teacher(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_a_teacher_that_reads_neither_size_is_refused_with_the_students():
    with pytest.raises(ValueError, match="could not read a blank 32x32 image .wrong size 32.*pass image_size"):
        load_teacher(OneSize(only=48), student_size=32, **STUDENT)
    assert load_teacher(OneSize(only=48), student_size=32, image_size=48, **STUDENT)(torch.zeros(1, 3, 32, 32)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_teacher_of_another_precision_gets_pixels_of_its_own(pixels, dtype):
    logits = load_teacher(TinyConvnet().to(dtype), **STUDENT)(pixels)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, by_hand(TinyConvnet(), pixels), atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_quantised_and_a_scripted_teacher_answer_in_batches(pixels):
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, torch.qint8)
    with torch.no_grad():
        expected = plain(pixels)
    for network in (quantised, torch.jit.script(plain), torch.jit.trace(plain, pixels)):
        teacher = load_teacher(network, student_size=24, **STUDENT)
        teacher.train()
        torch.testing.assert_close(teacher(pixels), expected, atol=0.02, rtol=0.02)


def test_bfloat16_autocast_still_returns_float32(pixels):
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
    with pytest.raises(ValueError, match="could not read a blank 224x224 image .* pass image_size"):
        load_teacher(model, **STUDENT)
    assert load_teacher(model, image_size=8, **STUDENT)(torch.zeros(1, 3, 24, 24)).shape == (1, 4)


# --- classes -----------------------------------------------------------------------------------------------------


def named(names, classes=None):
    model = TinyConvnet(classes or len(names))
    model.config = argparse.Namespace(id2label={str(i): name for i, name in enumerate(names)})
    return model


def test_classes_in_another_order_are_reordered(pixels, caplog):
    model = named(["fox", "cat", "emu", "dog"])
    with caplog.at_level(logging.INFO, "hf_deit.teachers.teacher"):
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


def test_other_classes_are_refused_with_both_sides_and_the_fix(pixels):
    model = named(["cat", "dog", "gnu", "hen"])
    with pytest.raises(ValueError, match=r"4, such as gnu, hen, against 4, such as emu, fox\..*run_teacher\.py"):
        load_teacher(model, **STUDENT)
    trusted = load_teacher(model, trust_class_order=True, **STUDENT)
    torch.testing.assert_close(trusted(pixels), by_hand(model, pixels))


def test_another_number_of_classes_is_refused_even_when_names_are_trusted():
    message = r"has 5 classes, the student has 4 \(cat, dog, emu, ...\)\. Fine-tune .*run_teacher\.py"
    with pytest.raises(ValueError, match=message):
        load_teacher(TinyConvnet(5), trust_class_order=True, **STUDENT)


def test_features_of_another_width_are_refused():
    model = TinyConvnet()
    model.head = nn.Identity()
    with pytest.raises(ValueError, match="has 6 classes, the student has 4"):
        load_teacher(model, **STUDENT)


def test_a_student_without_names_takes_the_teachers(pixels):
    teacher = load_teacher(named(NAMES), id2label=None, mean=MEAN, std=STD)
    assert teacher.id2label == ID2LABEL


# --- specs and several teachers ----------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="have 4 and 5 classes"):
        load_teacher([TinyConvnet(4), TinyConvnet(5)], id2label=None, mean=MEAN, std=STD)


def test_a_transformers_directory_is_fed_as_its_image_processor_would(tmp_path, pixels):
    model = save_vit(tmp_path)
    ViTImageProcessorPil(image_mean=OWN_MEAN, image_std=OWN_STD, size={"height": 16, "width": 16}).save_pretrained(
        tmp_path
    )
    resized = F.interpolate(renormalised(pixels), (16, 16), mode="bicubic", antialias=True)  # a ViT takes one size
    with torch.no_grad():
        torch.testing.assert_close(load_teacher(str(tmp_path), **STUDENT)(pixels), model(resized).logits)


def test_a_directory_without_a_processor_gets_the_students_pixels(tmp_path, pixels):
    model = save_vit(tmp_path, image_size=24)
    teacher = load_teacher(tmp_path, **STUDENT)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels), model(pixels).logits)


def test_a_two_headed_timm_deit_is_a_teacher(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    teacher = load_teacher(f"timm:deit_tiny_distilled_patch16_224?checkpoint={tmp_path / 'w.safetensors'}", **STUDENT)
    large = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        resized = F.interpolate(large, (224, 224), mode="bicubic", antialias=True)
        torch.testing.assert_close(teacher(large), model(resized), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", [" , ", []])
def test_no_spec_at_all_is_refused(spec):
    with pytest.raises(ValueError, match="no teacher in .* Accepted: a directory"):
        load_teacher(spec, **STUDENT)


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


# --- one size, and other kinds of network ----------------------------------------------------------------------------


def seen_sizes(model):
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append((*args, *kwargs.values())[0].shape[-1]), with_kwargs=True
    )
    return sizes


def test_a_stock_vit_with_fixed_positions_gets_views_of_its_size(tmp_path, pixels):
    model = save_vit(tmp_path)  # 16 pixels, and patches of 8
    ViTImageProcessorPil(do_normalize=True, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), student_size=24, **STUDENT)
    resized = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels), model(resized).logits, atol=1e-5, rtol=1e-5)


def test_a_timm_network_of_one_size_gets_views_of_it(pixels):
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4)
    assert network.patch_embed.strict_img_size
    sizes = seen_sizes(network)
    load_teacher(network, student_size=24, **STUDENT)(pixels)
    assert sizes[-1] == 32
    sizes.clear()
    load_teacher(network, image_size=32, student_size=24, **STUDENT)(pixels)
    assert set(sizes) == {32}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["traced", "exported"])
def test_a_program_of_one_size_gets_views_of_it(pixels, kind):
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 4)).eval()
    example = torch.zeros(2, 3, 16, 16)
    if kind == "traced":
        program = torch.jit.trace(plain, example)
    else:
        program = torch.export.export(plain, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.raises(ValueError, match="could not read a blank 24x24 .*teacher_image_size in a"):
        load_teacher(program, student_size=24, **STUDENT)  # nothing in it says its size
    teacher = load_teacher(program, student_size=24, image_size=16, **STUDENT)
    resized = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels), plain(resized), atol=1e-5, rtol=1e-5)


def test_the_resizing_is_pillows_bicubic():
    """Of a photo; Pillow rounds to bytes and clips after each of two passes, so a few pixels at edges differ more."""
    image = Image.fromarray(load_sample_image("flower.jpg")[:240, :240])
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None].float() / 255
    network = TinyConvnet()
    seen = []
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    load_teacher(network, image_size=96, id2label=ID2LABEL, mean=(0, 0, 0), std=(1, 1, 1))(pixels)
    expected = np.array(image.resize((96, 96), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    levels = 255 * np.abs(seen[-1][0].clamp(0, 1).numpy() - expected)
    assert levels.mean() < 0.5 and levels.max() < 4


def test_an_onnx_session_in_a_module_teaches(tmp_path, pixels):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 4)).eval()
    path, example = str(tmp_path / "net.onnx"), torch.zeros(2, 3, 16, 16)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(plain, (example,), path, input_names=["pixels"], dynamic_shapes=shapes, verbose=False)

    class Session(nn.Module):
        def __init__(self):
            super().__init__()
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def forward(self, pixels):
            return torch.from_numpy(self.session.run(None, {"pixels": pixels.contiguous().numpy()})[0])

    teacher = load_teacher(Session(), student_size=24, image_size=16, **STUDENT)
    resized = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels), plain(resized), atol=1e-4, rtol=1e-4)


class Moody(TinyConvnet):
    """A network that answers otherwise after it was loaded."""

    answer = None

    def forward(self, pixels):
        logits = super().forward(pixels)
        return logits if self.answer is None else self.answer(logits)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda logits: {}, "returned a dict; expected logits of shape"),
        (lambda logits: "text", "returned a str; expected logits"),
        (lambda logits: logits[:, :2], r"returned logits of shape \(4, 2\) for 4 images; expected \(4, 10\)"),
        (lambda logits: logits[:1], "returned logits of shape"),
        (lambda logits: logits.mean(), r"returned logits of shape \(\) for 4 images"),
    ],
)
def test_a_teacher_that_returns_something_else_in_mid_run_is_named(answer, message):
    network = Moody()
    teacher = load_teacher(network, id2label=None, mean=(0, 0, 0), std=(1, 1, 1), image_size=32)
    pixels = torch.zeros(4, 3, 32, 32)
    classes = teacher(pixels).shape[1]
    network.answer = answer
    with pytest.raises(ValueError, match=f"teacher 'Moody' {message.replace('10', str(classes))}"):
        teacher(pixels)
