"""Classifiers: every form of spec, what is known of pixels and classes, and what is refused."""

import argparse
import json
from collections import Counter

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from support.classifiers import ID2LABEL, NAMES, OWN_MEAN, OWN_STD, save_vit
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessorPil,
)

from hf_deit.errors import UserError
from hf_deit.models.classifiers import (
    find_classifier,
    load_pretrained,
    logits_of,
    new_classifier,
    processor_pixels,
)


NEW = {"id2label": ID2LABEL, "mean": OWN_MEAN, "std": OWN_STD, "image_size": 24}
TINY_RESNET = {"channels": (8, 8, 8, 8), "stem_width": 8}


@pytest.fixture
def image():
    """Values in [0, 1]."""
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def normalised(image, mean, std):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (image - mean) / std


@torch.no_grad()
def assert_answers(spec, image, expected):
    """What is found gives these logits for the image, normalised as it is found to want it."""
    found = find_classifier(spec)
    assert found.name == str(spec)
    logits = logits_of(found.model.eval()(normalised(image, found.mean, found.std)))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    return found


def save_timm_wrapper(path, **changes):
    model = new_classifier("timm:resnet10t", model_args=TINY_RESNET, **NEW | changes).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
    model.save_pretrained(path)
    return model


class Named:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, "features"), lambda x: {"logits": x}, Named],
    ids=["tensor", "tuple", "dict", "attribute"],
)
def test_every_form_of_output_is_read(wrap):
    logits = torch.randn(2, 4)
    assert logits_of(wrap(logits)) is logits
    assert logits_of(wrap("no tensor")) is None


# --- directories -------------------------------------------------------------------------------------------------


def test_a_new_timm_classifier_saves_a_directory_that_is_found_again(tmp_path, image):
    model = save_timm_wrapper(tmp_path, id2label={0: "dog", 1: "cat", 2: "emu", 3: "fox"})
    with torch.no_grad():
        expected = model.timm_model(normalised(image, OWN_MEAN, OWN_STD))
    found = assert_answers(tmp_path, image, expected)
    assert found.names == ["dog", "cat", "emu", "fox"] and found.image_size == (24, 24) and not found.fixed_size
    assert found.model.config.id2label[0] == "dog"


def test_a_new_timm_classifier_starts_from_timms_own_initialisation():
    wrapper = new_classifier("timm:resnet10t", **NEW).timm_model
    plain = timm.create_model("resnet10t", num_classes=4)
    stock = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=4)).timm_model
    for name in ("conv1.0.weight", "layer2.0.conv1.weight"):
        ours, timms, stocks = (model.get_parameter(name).std().item() for model in (wrapper, plain, stock))
        assert ours == pytest.approx(timms, rel=0.1) and stocks < 0.5 * timms
    assert wrapper.layer1[0].bn2.weight.abs().max() == 0 and stock.layer1[0].bn2.weight.min() == 1


def test_fine_tuning_to_new_classes_saves_their_names(tmp_path):
    save_timm_wrapper(tmp_path / "old")
    names = {0: "ant", 1: "bee"}
    model = new_classifier(str(tmp_path / "old"), **NEW | {"id2label": names, "image_size": 32})
    old = load_file(tmp_path / "old" / "model.safetensors")
    assert torch.equal(model.timm_model.conv1[0].weight, old["timm_model.conv1.0.weight"])
    model.save_pretrained(tmp_path / "new")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "new").config.id2label == names
    assert json.loads((tmp_path / "new" / "config.json").read_text())["pretrained_cfg"]["mean"] == list(OWN_MEAN)
    assert find_classifier(tmp_path / "new").names == ["ant", "bee"]


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"image_mean": OWN_MEAN, "image_std": OWN_STD}, OWN_MEAN, OWN_STD),
        ({"do_normalize": False}, (0.0,) * 3, (1.0,) * 3),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, (0.5,) * 3, (0.5,) * 3),
    ],
)
def test_the_processor_beside_a_transformers_model_says_what_it_wants(tmp_path, image, settings, mean, std):
    model = save_vit(tmp_path, image_size=24)
    ViTImageProcessorPil(**settings).save_pretrained(tmp_path)
    with torch.no_grad():
        found = assert_answers(tmp_path, image, model(normalised(image, mean, std)).logits)
    assert found.image_size == (24, 24) and found.names == NAMES


def processor_classes(whatever_the_model=False):
    """The image processors of models that classify images, or all that there are, of every backend."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as ALL
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

    kinds = ALL if whatever_the_model else CLASSIFIERS
    return sorted({name for kind in kinds for name in ALL.get(kind, {}).values()} | {"VivitImageProcessor"})


def made(name, settings):
    try:
        return getattr(transformers, name)(**settings)
    except (TypeError, ImportError):  # made of a model's config, or of a package that is not installed
        return None


SETTINGS = {
    "as it comes": {},
    "not normalised": {"do_normalize": False},
    "other values": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 0.2]},
    "to -1 and 1": {"rescale_factor": 1 / 127.5, "do_normalize": False},
    "with an offset": {"rescale_factor": 1 / 127.5, "rescale_offset": True},
    "one normalisation": {"include_top": False},
    "not rescaled": {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [50.0, 60.0, 70.0]},
    "other channels": {"do_flip_channel_order": True},
    "no flip": {"do_flip_channel_order": False},
    "padded": {"do_pad": True, "pad_size": {"height": 300, "width": 300}},
}


def outcome(name, settings):
    """What becomes of a processor: "different" if its pixels of an image of its own size are not (x - mean) / std."""
    if (processor := made(name, settings)) is None:
        return "not constructible"
    try:
        mean, std = processor_pixels(processor, "some/model")
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)
        return "refused"
    noise = np.random.default_rng(5).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    seen = processor(Image.fromarray(noise), do_resize=False, do_center_crop=False, return_tensors="pt")
    ours = normalised(torch.tensor(noise).permute(2, 0, 1)[None] / 255, mean, std)
    seen = torch.as_tensor(seen["pixel_values"])
    return "equal" if seen.shape == ours.shape and torch.allclose(seen, ours, atol=1e-3, rtol=1e-3) else "different"


def reported(what, outcomes, capsys):
    counts = Counter({"equal": 0, "refused": 0, "not constructible": 0, "different": 0})
    counts.update(outcomes.values())
    with capsys.disabled():
        print(f"\nimage processors, {what}: {dict(counts)}")
    assert not counts["different"], [name for name, found in outcomes.items() if found == "different"]
    return counts


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_image_processor_is_reduced_to_mean_and_std_or_refused_by_name(settings, capsys):
    """What the processor itself makes of an image of its own size, against (x - mean) / std."""
    counts = reported(settings, {name: outcome(name, SETTINGS[settings]) for name in processor_classes()}, capsys)
    assert counts["equal"] > 20 or settings in ("other channels", "padded")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_so_is_every_image_processor_of_transformers(capsys):
    """Also those of detectors, of pairs of images, of language models, ..., which a teacher's directory may name."""
    names = processor_classes(whatever_the_model=True)
    in_transformers = {name for name in dir(transformers) if name.endswith(("ImageProcessor", "ImageProcessorPil"))}
    bases = {"AutoImageProcessor", "BaseImageProcessor"}
    names = sorted({*names, *in_transformers} - bases)
    # GLM's is a processor of texts and images, in spite of its name.
    names = [name for name in names if not issubclass(getattr(transformers, name), transformers.ProcessorMixin)]
    assert len(names) > 100
    assert reported("of all models", {name: outcome(name, {}) for name in names}, capsys)["equal"] > 60


@pytest.mark.parametrize(
    ("name", "settings", "mean", "std"),
    [
        ("EfficientNetImageProcessorPil", {"image_mean": [0.4] * 3, "image_std": [0.5] * 3}, (0.4,) * 3, (0.25,) * 3),
        (
            "EfficientNetImageProcessorPil",
            {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False, "include_top": False},
            (0.5,) * 3,
            (0.5,) * 3,
        ),
        ("ViTImageProcessorPil", {"do_rescale": False, "do_normalize": False}, (0.0,) * 3, (1 / 255,) * 3),
    ],
)
def test_the_arithmetic_of_a_processor_by_hand(name, settings, mean, std):
    found = processor_pixels(getattr(transformers, name)(**settings), "m")
    assert found[0] == pytest.approx(mean, abs=1e-6) and found[1] == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("MobileViTImageProcessorPil", {}, "shift and scale red, green and blue .BGR."),
        ("ImageGPTImageProcessorPil", {"clusters": [[0.0] * 3] * 4}, "cannot read one image|pixels of shape"),
        ("Siglip2ImageProcessorPil", {}, "pixels of shape .* of a 64x64 image"),
        ("ViTImageProcessorPil", {"image_std": [0.5, 0.5, -0.5]}, "more than shift and scale"),
        (
            "BitImageProcessorPil",
            {"size": {"shortest_edge": 24}, "crop_size": {"height": 32, "width": 32}},
            "it pads images",
        ),
    ],
)
def test_what_is_no_mean_and_std_is_refused(tmp_path, name, settings, why):
    save_vit(tmp_path, image_size=24)
    getattr(transformers, name)(**settings).save_pretrained(tmp_path)
    class_name = name.removesuffix("Pil")
    with pytest.raises(UserError, match=f"image processor of model .*{class_name}.*: .*({why}).*python:<module>"):
        find_classifier(tmp_path)


def test_the_processor_of_a_wrapped_timm_model_says_nothing_that_its_config_does_not(tmp_path):
    save_timm_wrapper(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "TimmWrapperImageProcessor"}')
    assert find_classifier(tmp_path).mean == OWN_MEAN


@pytest.mark.parametrize("cfg", [{"mean": (0.5,)}, {"std": (0.2, 0.0, 0.2)}, {"mean": 0.5}, {"mean": ("a",) * 3}])
def test_a_pretrained_cfg_that_is_not_three_numbers_is_refused(cfg):
    model = nn.Flatten()
    model.pretrained_cfg = cfg
    with pytest.raises(UserError, match="'Flatten': (mean|std) in its pretrained_cfg is .*, expected three numbers"):
        find_classifier(model)


def test_a_pretrained_cfg_of_bytes_is_doubtful_and_one_of_another_kind_is_not_timms(caplog):
    model = nn.Flatten()
    model.default_cfg = "resnet.yaml"
    assert find_classifier(model).mean is None and not caplog.records
    model.default_cfg = {"mean": (123.7, 116.3, 103.5)}
    assert find_classifier(model).mean == (123.7, 116.3, 103.5) and "is taken for pixels in [0, 1]" in caplog.text


def test_without_a_processor_the_pixels_of_a_model_are_not_known(tmp_path, caplog):
    save_vit(tmp_path)
    found = find_classifier(tmp_path)
    assert found.mean is None and found.std is None and found.crop_ratio is None
    assert "no preprocessor_config.json" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_checkpoints_of_every_precision_are_read_in_float32(tmp_path, caplog, dtype):
    save_vit(tmp_path).to(dtype).save_pretrained(tmp_path)
    assert find_classifier(tmp_path).model.dtype == torch.float32
    assert "stored in" not in caplog.text  # a frozen classifier's is no warning
    model = load_pretrained(AutoModelForImageClassification, str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    told = [record.message for record in caplog.records if "stored in" in record.message]
    name = str(dtype).removeprefix("torch.")
    assert len(told) == (dtype != torch.float32) and all(f"stored in {name} and" in line for line in told)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).dtype == dtype  # Transformers' own stays


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
        find_classifier(tmp_path)


def test_a_backbone_without_a_head_is_refused(tmp_path):
    save_vit(tmp_path).vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="untrained weights: classifier"):
        find_classifier(tmp_path)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda path: path / "nowhere", "nowhere' does not exist"),
        (lambda path: path, "has no config.json"),
        (
            lambda path: (path / "w.pth").write_bytes(b"x") and path / "w.pth",
            r"is a file, not .*timm:<name>\?checkpoint=",
        ),
    ],
)
def test_an_unreadable_path_is_one_clear_line(tmp_path, make, got):
    with pytest.raises(ValueError, match=got) as caught:
        find_classifier(str(make(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"junk" * 100, None])
def test_corrupt_or_absent_weights_are_one_clear_line(tmp_path, content):
    save_vit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if content:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="cannot load model") as caught:
        find_classifier(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_hub_id_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot load model 'nobody/nothing'") as caught:
        find_classifier("nobody/nothing")
    assert "\n" not in str(caught.value)


# --- timm: -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_timm():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    model.get_classifier().weight.data.normal_()
    return model


@pytest.mark.parametrize("form", ["safetensors", "plain", "authors", "timm", "prefixed"])
def test_a_timm_checkpoint_is_loaded_from_every_form_of_file(tmp_path, image, small_timm, form):
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
    cfg = small_timm.pretrained_cfg
    with torch.no_grad():
        expected = small_timm(normalised(image, cfg["mean"], cfg["std"]))
    assert_answers(f"timm:test_resnet?checkpoint={file}", image, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv1.0.weight") is None, r"1 missing: conv1\.0\.weight$"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 unexpected: extra$"),
        (lambda w: w.update({"fc.bias": torch.zeros(1, 1)}), r"of another shape: fc\.bias \(1, 1\) instead of \(4,\)"),
    ],
)
def test_a_timm_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, small_timm, change, message):
    weights = small_timm.state_dict()
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        find_classifier(f"timm:test_resnet?checkpoint={tmp_path / 'w.pth'}")


def test_a_directory_of_pickled_weights_is_refused_even_when_they_are_good(tmp_path):
    model = save_vit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load model .* no file named model\.safetensors"):
        find_classifier(tmp_path)


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
    ],
)
def test_a_malformed_spec_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        find_classifier(spec)


def test_timm_weights_that_cannot_be_downloaded_name_the_local_forms(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nmore lines")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(ValueError, match=r"no network\. Without a network .* timm:test_resnet\?checkpoint=<file>"):
        find_classifier("timm:test_resnet")


def test_published_timm_weights_bring_imagenet_names(monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *args, **kwargs: None)
    found = find_classifier("timm:test_resnet")
    assert found.names[0] == "tench, Tinca tinca" and len(found.names) == 1000


def test_a_python_factory_is_called(tmp_path, monkeypatch):
    (tmp_path / "a_module_of_my_own.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(3, 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = find_classifier("python:a_module_of_my_own:build")
    assert (
        isinstance(found.model, nn.Linear) and found.name == "python:a_module_of_my_own:build" and found.names is None
    )


# --- names that lead nowhere -------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a teacher in `outputs`."""
    monkeypatch.chdir(tmp_path)
    save_vit(tmp_path / "outputs" / "teacher")
    (tmp_path / "outputs" / "run" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "outputs" / "run" / "checkpoint-10" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./outputs/teachr", r"does not exist: there is no such directory \(did you mean 'outputs/teacher'\?\)$"),
        ("{here}/outputs/teachr", r"does not exist: .*did you mean '.*/outputs/teacher'"),
        ("./output/teacher", r"does not exist: .*did you mean 'outputs/teacher'"),
        ("outputs/run/checkpoint-11", r"does not exist: .*did you mean 'outputs/run/checkpoint-10'"),
        ("./nothing", "does not exist: there is no such directory$"),
        ("outputs/teachr", r"no such directory \(did you mean 'outputs/teacher'\?\), and from the Hub: "),
        ("somebody/some-model", "no such directory, and from the Hub: "),
        ("outputs/run", "has no config.json; outputs/run/checkpoint-10 has one. Give a directory"),
    ],
)
def test_a_mistyped_directory_is_said_to_be_missing_before_the_hub_is_named(here, spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        find_classifier(spec.format(here=here))
    text = str(caught.value)
    assert "\n" not in text and "Accepted:" not in text and text.find("directory") < (text + "Hub").find("Hub")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "torchao", "fp8", "compressed-tensors", None])
def test_quantised_weights_are_said_to_be_quantised(here, method):
    path = here / "outputs" / "teacher" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": method} if method else {"bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=f"are stored quantised .{method or 'method not stated'}.*python:<module>"
    ) as one:
        find_classifier("outputs/teacher")
    assert "\n" not in str(one.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("net.onnx", "an ONNX graph runs in onnxruntime, not in PyTorch; wrap"),
        ("net.pt2", "a program may run code when it is loaded, so only your own code"),
        ("net.pth", "name the network that the weights are for, timm:<name>.checkpoint=net.pth"),
    ],
)
def test_a_file_is_told_what_it_is(here, file, message):
    (here / file).write_bytes(b"content")
    with pytest.raises(ValueError, match=f"^model '{file}' is a file, not a directory: {message}"):
        find_classifier(file)


def test_a_network_that_timm_itself_saved_is_read_and_fine_tuned(tmp_path, image, small_timm):
    """Its config says the number of classes twice, on which Transformers' wrapper fails."""
    timm.models.save_for_hf(small_timm, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["num_classes"] == 4
    found = find_classifier(str(tmp_path))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.model.eval()(pixels).logits, small_timm(pixels))
    new = new_classifier(str(tmp_path), id2label={0: "ant", 1: "bee"}, mean=OWN_MEAN, std=OWN_STD, image_size=64)
    assert new(pixels).logits.shape == (2, 2)
    torch.testing.assert_close(new.timm_model.layer1.state_dict(), small_timm.layer1.state_dict())
