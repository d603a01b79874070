"""export.py: the file answers as PyTorch does at every batch size, and carries what its user needs to know."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from sklearn.datasets import load_sample_image

import hf_deit.models.export
from hf_deit import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    build_eval_transform,
    build_image_processor,
)
from hf_deit.commands import export
from hf_deit.models.export import export_model, load_for_export


ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
NAMES = {0: "red", 1: "green", 2: "blue"}
KINDS = {"two_heads": DeiTForImageClassificationWithTeacher, "plain": DeiTForImageClassification}
PROCESSOR = build_image_processor(build_eval_transform(16, crop_ratio=0.8))
# The plain one in ONNX has nothing that the other three files have not.
FILES = [
    *("two_heads.onnx", "two_heads.pt2", "plain.pt2"),
    pytest.param("plain.onnx", marks=pytest.mark.slow),
]


@torch.no_grad()
def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight away from its init, so that none can be swapped or left at zero unseen."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def run(file: Path, pixel_values: torch.Tensor) -> torch.Tensor:
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(pixel_values)
    session = onnxruntime.InferenceSession(file)
    return torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with two kinds of model as `<kind>`; [`exported_file`] adds `<kind>.onnx` and `<kind>.pt2`."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, model_class in KINDS.items():
        two_heads = kind == "two_heads"
        model = random_weights(model_class(DeiTConfig(**SIZES, id2label=NAMES, use_distillation_token=two_heads)))
        if two_heads:  # both sure that it is not the first class: exp(-200) is 0 in float32
            model.cls_classifier.bias.data[0] = model.distillation_classifier.bias.data[0] = -200
        model.save_pretrained(folder / kind)
        PROCESSOR.save_pretrained(folder / kind)
    return folder


def exported_file(folder: Path, name: str) -> Path:
    """The file of that name, exported when it is first wanted."""
    if not (folder / name).exists():
        export_model(*load_for_export(folder / Path(name).stem), folder / name)
    return folder / name


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_the_file_gives_pytorchs_logits_at_batch_sizes_never_traced(exported, name):
    file, kind = exported_file(exported, name), Path(name).stem
    model = KINDS[kind].from_pretrained(exported / kind)
    for size in (1, 5, 8):
        pixel_values = torch.randn(size, 3, 16, 16)
        outputs = model(pixel_values)
        logits = run(file, pixel_values)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits, outputs.logits, rtol=0, atol=2e-5)
        if kind == "two_heads":  # fused as the paper does it
            probabilities = (outputs.cls_logits.softmax(-1) + outputs.distillation_logits.softmax(-1)) / 2
            torch.testing.assert_close(logits.exp(), probabilities, rtol=0, atol=1e-5)
            assert logits[:, 0].max() < -150


@pytest.mark.parametrize("name", FILES)
def test_the_file_says_how_to_make_pixels_and_what_the_classes_are(exported, name):
    file = exported_file(exported, name)
    if file.suffix == ".onnx":
        facts = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    else:
        facts = {"config.json": "", "preprocessor_config.json": ""}
        torch.export.load(file, extra_files=facts)
    processor = transformers.DeiTImageProcessor(**json.loads(facts["preprocessor_config.json"]))
    assert processor.size["shortest_edge"] == 20 and processor.crop_size["height"] == 16
    image = load_sample_image("flower.jpg")
    assert np.array_equal(processor(image)["pixel_values"], PROCESSOR(image)["pixel_values"])
    config = json.loads(facts["config.json"])
    on_disk = json.loads((exported / file.stem / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in NAMES.items()}
    for key in ("image_size", "head_fusion", "model_type", "architectures"):
        assert config[key] == on_disk[key]


@pytest.mark.parametrize("kind", ["two_heads", pytest.param("plain", marks=pytest.mark.slow)])
def test_the_onnx_graph_names_its_ends_and_holds_its_weights_joined(exported, kind):
    model = onnx.load(exported_file(exported, f"{kind}.onnx"))
    onnx.checker.check_model(model, full_check=True)
    (pixels,), (logits,) = model.graph.input, model.graph.output
    assert (pixels.name, pixels.type.tensor_type.shape.dim[0].dim_param) == ("pixel_values", "batch")
    assert (logits.name, logits.type.tensor_type.shape.dim[1].dim_value) == ("logits", 3)
    weights = {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
    products = [weights.get(node.input[1]) for node in model.graph.node if node.op_type == "MatMul"]
    # Key and value of the only block, whose query the prefix alone asks, are one constant, for quantisers to find.
    assert products.count((32, 64)) == 1


@pytest.mark.parametrize("name", FILES)
def test_no_file_tells_where_it_was_made(exported, name):
    content = exported_file(exported, name).read_bytes()
    assert str(ROOT).encode() not in content and str(exported).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content


@pytest.mark.slow
@torch.no_grad()
def test_the_attention_and_precision_of_the_model_do_not_matter_and_stay(exported, tmp_path):
    model = KINDS["two_heads"].from_pretrained(exported / "two_heads", attn_implementation="flex_attention")
    model.bfloat16().train()
    assert export_model(model, PROCESSOR, tmp_path / "deit.pt2") < 1e-5
    assert model.config._attn_implementation == "flex_attention" and model.dtype == torch.bfloat16 and model.training
    pixel_values = torch.randn(3, 3, 16, 16)
    model.set_attn_implementation("eager")
    expected = model.float().eval()(pixel_values).logits
    torch.testing.assert_close(run(tmp_path / "deit.pt2", pixel_values), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [
        (transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig),
        pytest.param(transformers.ViTForImageClassification, transformers.ViTConfig, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_directory_of_stock_transformers_is_exported_with_stocks_numbers(tmp_path, model_class, config_class):
    stock = random_weights(model_class(config_class(**SIZES, intermediate_size=64, id2label=NAMES)))
    stock.save_pretrained(tmp_path / "stock")
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "stock")
    export_model(*load_for_export(tmp_path / "stock"), tmp_path / "stock.pt2")
    pixel_values = torch.randn(3, 3, 16, 16)
    expected = stock(pixel_values).logits
    torch.testing.assert_close(run(tmp_path / "stock.pt2", pixel_values), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dim", [torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO, torch.export.Dim("batch")], ids=str)
@pytest.mark.parametrize("kind", [DeiTModel, *KINDS.values()])
@torch.no_grad()
def test_torch_export_by_hand_leaves_the_batch_free(kind, dim, strict):
    two_heads = kind is not DeiTForImageClassification
    model = random_weights(kind(DeiTConfig(**SIZES, id2label=NAMES, use_distillation_token=two_heads)))
    traced, other = torch.randn(2, 3, 16, 16), torch.randn(5, 3, 16, 16)
    program = torch.export.export(model, (traced,), dynamic_shapes=({0: dim},), strict=strict)
    got, expected = program.module()(other), model(other)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5)


def test_without_the_extra_onnx_is_refused(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_deit.models.export, "find_spec", lambda name: None)
    model, processor = load_for_export(exported / "plain")
    with pytest.raises(ValueError, match=r"needs onnx, onnxruntime, onnxscript: pip install 'hf_deit\[export\]'"):
        export_model(model, processor, tmp_path / "deit.onnx")
    with pytest.raises(ValueError, match=r"'.*deit.tflite': the name must end in .onnx or .pt2"):
        export_model(model, processor, tmp_path / "deit.tflite")
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_refused_and_removed(exported, tmp_path, monkeypatch):
    model, processor = load_for_export(exported / "plain")
    monkeypatch.setattr(hf_deit.models.export, "_trace", lambda *_: None)
    monkeypatch.setattr(hf_deit.models.export, "_write_pt2", lambda program, path, facts: path.touch())
    for error, shown in ((2e-4, "2.0e-04"), (float("nan"), "nan")):

        def wrong(pixel_values, error=error):  # at one batch size only
            return model(pixel_values).logits + (error if len(pixel_values) == 3 else 0)

        monkeypatch.setattr(hf_deit.models.export, "_load_pt2", lambda path, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=f"deit.pt2 differs from PyTorch by {shown}, more than 0.0001: .*removed"):
            export_model(model, processor, tmp_path / "deit.pt2")
        assert not (tmp_path / "deit.pt2").exists()


def test_what_is_no_trained_classifier_with_its_processor_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="cannot export '.*nothing': .*convert_checkpoint.py makes one"):
        load_for_export(tmp_path / "nothing")
    model = KINDS["two_heads"].from_pretrained(exported / "two_heads")
    model.deit.save_pretrained(tmp_path / "headless")
    PROCESSOR.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="is not trained: .*classifier.bias"):
        load_for_export(tmp_path / "headless")
    model.save_pretrained(tmp_path / "no_processor")
    with pytest.raises(ValueError, match="cannot export '.*no_processor'.* preprocessor_config.json"):
        load_for_export(tmp_path / "no_processor")
    other = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    transformers.ResNetForImageClassification(other).save_pretrained(tmp_path / "resnet")
    PROCESSOR.save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="of type 'resnet'; expected 'deit' or 'vit'"):
        load_for_export(tmp_path / "resnet")


def test_the_script_exports_once_and_pt2_without_the_extra(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hf_deit.models.export, "find_spec", lambda name: None)
    words = [str(exported / "plain"), str(tmp_path / "new" / "deit.pt2")]
    export.main(words)
    printed = capsys.readouterr().out
    assert re.search(r"deit.pt2: 0.\d MB, 3 classes, max .logit - PyTorch's. \d.\de[+-]\d\d\n", printed)
    with pytest.raises(SystemExit, match="2"):
        export.main(words)
    assert "exists already" in capsys.readouterr().err
