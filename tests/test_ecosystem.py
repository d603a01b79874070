"""What a run leaves behind, seen by Transformers: stock in a process without hf_deit, the Auto classes, pipelines."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    DeiTImageProcessor,
    pipeline,
)

from hf_deit import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    DistillationConfig,
    DistillationTrainer,
    EvalViews,
    TrainViews,
    build_eval_transform,
    build_image_processor,
    build_train_transform,
    load_teacher,
)


KINDS = {"two_heads": DeiTForImageClassificationWithTeacher, "plain": DeiTForImageClassification}
NAMES = {0: "red", 1: "green", 2: "blue"}


def train(kind, images, folder) -> None:
    """Two steps with [`DistillationTrainer`]; the two heads with a teacher."""
    torch.manual_seed(0)
    two_heads = kind is DeiTForImageClassificationWithTeacher
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    model = kind(DeiTConfig(**sizes, id2label=NAMES, use_distillation_token=two_heads))
    args = DistillationConfig(
        output_dir=str(folder),
        distillation_type="hard" if two_heads else "none",
        max_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        dataloader_num_workers=0,
        eval_strategy="no",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    transform = build_eval_transform(16)
    processor = build_image_processor(transform)
    teacher = None
    if two_heads:
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
        teacher = load_teacher(net, id2label=None, mean=processor.image_mean, std=processor.image_std, image_size=16)
    DistillationTrainer(
        model,
        args,
        teacher,
        train_dataset=TrainViews(images["train"], build_train_transform(16, **args.transform_options())),
        eval_dataset=EvalViews(images["eval"], transform),
        processing_class=processor,
    ).train_and_save()


@pytest.fixture(scope="module")
def runs(tiny_images, tmp_path_factory):
    """Output directories of a distilled and of a plain run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, kind in KINDS.items():
        train(kind, tiny_images(), folder / name)
    return folder


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg"))


STOCK = """
import sys
sys.modules["hf_deit"] = None  # an import of it fails
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
folder = sys.argv[1]
pixel_values = load_file(folder + "/pixels.safetensors")["pixel_values"]
outputs = {}
for run, kind in (("two_heads", transformers.DeiTForImageClassificationWithTeacher),
                  ("plain", transformers.ViTForImageClassification)):
    for loader in (AutoModelForImageClassification, kind):
        model, report = loader.from_pretrained(f"{folder}/{run}", output_loading_info=True)
        assert type(model) is kind and not any(report.values()), (type(model), report)
        with torch.no_grad():
            found = model(pixel_values)
        outputs |= {f"{run}.{loader.__name__}.{name}": tensor for name, tensor in found.items()}
    processor = AutoImageProcessor.from_pretrained(f"{folder}/{run}")
    assert type(processor) is transformers.DeiTImageProcessor
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
save_file(outputs, folder + "/outputs.safetensors")
"""


@torch.no_grad()
def test_stock_gives_the_same_logits_without_hf_deit(runs, photograph):
    processor = AutoImageProcessor.from_pretrained(runs / "two_heads")
    pixel_values = processor(photograph, return_tensors="pt")["pixel_values"]
    save_file({"pixel_values": pixel_values}, runs / "pixels.safetensors")
    command = [sys.executable, "-c", STOCK, str(runs)]
    # Outside the repository, whose src may be the working directory of the tests.
    run = subprocess.run(command, cwd=runs, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=""))
    assert run.returncode == 0, run.stderr
    stock = load_file(runs / "outputs.safetensors")
    assert len(stock) == 2 * 3 + 2
    for name, kind in KINDS.items():
        ours = kind.from_pretrained(runs / name)(pixel_values)
        stocks = "ViTForImageClassification" if name == "plain" else kind.__name__
        for loader in ("AutoModelForImageClassification", stocks):
            for head in ("logits",) if name == "plain" else ("cls_logits", "distillation_logits"):
                expected = stock[f"{name}.{loader}.{head}"]
                torch.testing.assert_close(ours[head], expected, rtol=0, atol=1e-5, msg=f"{name} {loader} {head}")


@pytest.mark.parametrize("name", KINDS)
def test_auto_classes_give_ours(runs, name):
    assert type(AutoModelForImageClassification.from_pretrained(runs / name)) is KINDS[name]
    assert type(AutoModel.from_pretrained(runs / name)) is DeiTModel
    assert type(AutoConfig.from_pretrained(runs / name)) is DeiTConfig
    larger = AutoModelForImageClassification.from_pretrained(runs / name, image_size=24, num_labels=5)
    assert type(larger) is KINDS[name]
    assert larger(torch.zeros(1, 3, 24, 24)).logits.shape == (1, 5)


@pytest.mark.parametrize("name", KINDS)
def test_pipelines_name_the_data_sets_classes(runs, photograph, name):
    answers = pipeline("image-classification", model=str(runs / name))(photograph)
    assert {answer["label"] for answer in answers} == set(NAMES.values())
    pixel_values = AutoImageProcessor.from_pretrained(runs / name)(photograph, return_tensors="pt")["pixel_values"]
    logits = KINDS[name].from_pretrained(runs / name)(pixel_values).logits[0]
    assert answers[0]["label"] == NAMES[logits.argmax().item()]
    assert answers[0]["score"] == pytest.approx(logits.softmax(0).max().item(), abs=1e-6)
    features = pipeline("image-feature-extraction", model=str(runs / name))(photograph)
    assert (len(features[0]), len(features[0][0])) == (16 + (2 if name == "two_heads" else 1), 32)


@pytest.mark.parametrize(("size", "shorter"), [(32, 32), (224, 256), (384, 384)])
def test_the_processor_is_the_papers(tmp_path, photograph, size, shorter):
    build_image_processor(build_eval_transform(size)).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is DeiTImageProcessor
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (shorter, size)
    assert processor.resample == Image.Resampling.BICUBIC
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)
    assert tuple(processor.image_std) == (0.229, 0.224, 0.225)
    assert processor(photograph, return_tensors="pt")["pixel_values"].shape == (1, 3, size, size)


def test_stock_vit_is_imported_after_us_without_a_word():
    """Its documentation is written on import, from the configuration that is registered for its type: ours."""
    program = "import hf_deit\nfrom transformers import DeiTForImageClassification, ViTForImageClassification"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "ERROR" not in done.stdout + done.stderr
