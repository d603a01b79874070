"""Throughput: counts against the paper, timm and a formula written out here; the protocol against models that spy."""

import functools
import json
import time

import pytest
import timm
import torch
from support.evaluation import save
from support.models import small_model
from support.throughput import arguments
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_deit import DeiTConfig, DeiTForImageClassification, DeiTForImageClassificationWithTeacher
from hf_deit.commands import throughput
from hf_deit.models.classifiers import new_classifier
from hf_deit.paper.throughput import (
    ThroughputArguments,
    count_macs,
    largest_batch_size,
    measure_throughput,
    saturating_batch_size,
)


class Spy(nn.Module):
    """Notes every call, and runs out of memory above a batch of `limit`."""

    def __init__(self, name: str = "spy", calls: list | None = None, limit: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.name, self.calls, self.limit = name, [] if calls is None else calls, limit

    def forward(self, pixels):
        self.calls.append((self.name, pixels))
        self.ran_without_gradients = torch.is_inference_mode_enabled()
        if self.limit is not None and len(pixels) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return pixels.mean(dim=(2, 3)) * self.weight


@pytest.fixture
def script():
    return throughput


# --- counts ---


def test_macs_of_a_deit_are_those_of_its_matrix_products():
    width, blocks, pixels, patch, classes = 24, 3, 32, 8, 7
    config = DeiTConfig(
        hidden_size=width, num_attention_heads=2, num_hidden_layers=blocks, image_size=pixels, patch_size=patch
    )
    config.num_labels = classes
    patches = (pixels // patch) ** 2
    tokens = patches + 2

    def block(asking):
        """Keys and values of all tokens; for those that ask: query, what is gathered, output, the two layers."""
        return tokens * 2 * width**2 + asking * (2 + 2 * 4) * width**2 + 2 * asking * tokens * width

    expected = patches * 3 * patch**2 * width + (blocks - 1) * block(tokens) + block(2) + 2 * width * classes
    model = DeiTForImageClassificationWithTeacher(config).eval()
    assert count_macs(model, torch.zeros(1, 3, pixels, pixels)) == expected
    assert count_macs(model, torch.zeros(5, 3, pixels, pixels)) == 5 * expected


def test_macs_of_a_convnet_are_the_published_ones():
    with torch.device("meta"):
        model = timm.create_model("resnet50").eval()
        macs = count_macs(model, torch.zeros(1, 3, 224, 224))
    assert round(macs / 1e9, 1) == 4.1  # Radosavovic et al. 2020, Table 4


# --- the batch size ---


@pytest.mark.parametrize("limit", [1, 2, 3, 37, 63, 64, 65, 100])
def test_the_search_finds_the_limit(limit):
    model = Spy(limit=limit)
    assert largest_batch_size(lambda size: model(torch.zeros(size, 3, 1, 1)), at_most=1000) == limit
    assert len(model.calls) <= 14  # doubling and bisection, not one by one


def test_the_search_stops_where_it_is_told_to():
    asked = []
    assert largest_batch_size(asked.append, at_most=24) == 24
    assert asked == [1, 2, 4, 8, 16, 24]


def test_a_model_that_never_fits_is_refused():
    with pytest.raises(ValueError, match="not even one image fits"):
        largest_batch_size(lambda size: Spy(limit=0)(torch.zeros(size, 3, 1, 1)), at_most=8)


def test_an_error_of_another_kind_is_not_taken_for_missing_memory():
    def run(size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        largest_batch_size(run, at_most=8)


@pytest.mark.parametrize(
    "memory, at_most, expected",
    [
        (None, 1000, 8),  # 16 is no faster
        (70, 1000, 4),  # 8 is expected to take 80
        (None, 6, 4),
    ],
)
def test_a_cpus_batch_grows_while_that_pays_and_fits(memory, at_most, expected):
    rates = {1: 10.0, 2: 15.0, 4: 20.0, 8: 22.0, 16: 22.5, 32: 40.0}
    assert saturating_batch_size(lambda size: (rates[size], 10 * size), memory, at_most) == expected


# --- the protocol ---


def test_models_take_turns():
    calls = []
    models = {name: (Spy(name, calls), 8) for name in "ab"}
    results = measure_throughput(models, arguments(runs=5, turns=2, warm_up=1))
    order = "".join(name for name, _ in calls)
    # each: one image to count, one batch, one for the memory; then warm-up and 3 runs, warm-up and 2 runs
    assert order == "aaa" + "bbb" + "aaaa" + "bbbb" + "aaa" + "bbb"
    assert [len(result.seconds) for result in results] == [5, 5]
    assert [result.name for result in results] == ["a", "b"]
    assert [len(pixels) for _, pixels in calls] == [1, 2, 2, 1, 2, 2] + [2] * 14


def test_the_time_is_that_of_the_forward_pass():
    class Slow(Spy):
        def forward(self, pixels):
            time.sleep(0.02)
            return super().forward(pixels)

    slow, fast = measure_throughput({"slow": (Slow(), 8), "fast": (Spy(), 8)}, arguments(runs=4, turns=2))
    assert min(slow.seconds) >= 0.02
    assert slow.images_per_second <= 2 / 0.02 < fast.images_per_second


def test_precision_and_layout_are_what_was_asked_for():
    model = Spy()
    measure_throughput({"spy": (model.train(), 8)}, arguments(precision="bfloat16", channels_last=True))
    pixels = model.calls[-1][1]
    assert pixels.dtype == model.weight.dtype == torch.bfloat16
    assert pixels.shape == (2, 3, 8, 8) and pixels.is_contiguous(memory_format=torch.channels_last)
    assert model.ran_without_gradients and not model.training


def test_memory_is_that_of_one_run():
    class Large(nn.Linear):
        def forward(self, pixels):
            return torch.ones(60_000_000).sum()  # 240 MB

    (result,) = measure_throughput({"large": (Large(1000, 10_000), 8)}, arguments())
    if result.peak_memory is None:
        pytest.skip("not Linux")
    assert result.peak_memory == pytest.approx(240e6 + 40e6, rel=0.05)  # and its weights


def test_the_ninth_model_of_a_class_is_compiled_too(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    models = {str(width): (nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, width)), 4) for width in range(1, 11)}
    before = graphs["unique_graphs"]
    measure_throughput(models, arguments(torch_compile=True))
    assert graphs["unique_graphs"] - before == 10


@pytest.mark.gpu
def test_on_a_gpu_the_largest_batch_is_found_and_everything_is_put_back():
    allow = torch.backends.cudnn.conv.fp32_precision
    model = DeiTForImageClassification(DeiTConfig.from_size("tiny"))
    args = ThroughputArguments(device="cuda", max_batch_size=40, runs=3, turns=2)
    (result,) = measure_throughput({"tiny": (model, 224)}, args)
    assert result.batch_size == 40
    assert result.peak_memory > 4 * result.parameters + 40 * 3 * 224 * 224 * 4
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.backends.cudnn.conv.fp32_precision == allow


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"precision": "half"}, "choose one of float32"),
        ({"runs": 0}, "runs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"device": "gpu"}, "use 'cpu', 'cuda'"),
        ({"device": "mps"}, "measured on 'cpu' and 'cuda' only"),
        ({"precision": "tf32"}, "on GPUs only"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(**fields)


# --- the script ---


@pytest.mark.parametrize("name", ["tiny", "tiny-distilled", "tiny@32"])
def test_ours_and_stock_are_the_same_network(script, name):
    (ours, size), (stock, stock_size) = script.build(name), script.build(f"stock:{name}")
    assert size == stock_size == (32 if "@" in name else 224)
    assert type(stock).__module__.startswith("transformers.") and type(ours).__module__.startswith("hf_deit.")
    shapes = [sorted(tuple(p.shape) for p in model.parameters()) for model in (ours, stock)]
    assert shapes[0] == shapes[1]


def test_timm_models_take_the_size_they_are_given(script):
    model, size = script.build("timm:deit_tiny_distilled_patch16_224@32")
    assert size == 32 and type(model).__module__ == "timm.models.deit"
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    assert script.build("timm:tf_efficientnet_b1")[1] == 240


def trained_models(folder) -> dict[str, nn.Module]:
    """Ours, stock's and timm's, as saved by a training at 32 pixels."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    stock = ViTConfig(**shape, image_size=32, patch_size=8, num_labels=5)
    pixels = {"id2label": dict(enumerate("abcde")), "mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 32}
    models = {
        "ours": small_model(),
        "stock": ViTForImageClassification(stock),
        "timm": new_classifier("timm:test_resnet", **pixels),
    }
    for name, model in models.items():
        save(model, folder / name, image_size=32)
    return models


@pytest.mark.parametrize("size", [None, 64])
def test_a_trained_directory_is_measured_at_any_size(script, tmp_path, size):
    saved = trained_models(tmp_path)
    specs = [str(tmp_path / name) for name in saved]
    words = ["--models", ",".join(specs), "--device", "cpu", "--batch_size", "2", "--runs", "1", "--turns", "1"]
    rows = script.main([*words, *([] if size is None else ["--image_size", str(size)]), "--output_dir", str(tmp_path)])
    assert [(row["name"], row["image_size"]) for row in rows] == [(spec, size or 32) for spec in specs]
    for row, model in zip(rows, saved.values()):
        added = 48 * 32 if size and row["name"].endswith("ours") else 0  # positions of 64 patches instead of 16
        assert row["parameters"] == sum(p.numel() for p in model.parameters()) + added


def test_the_command_writes_table_json_and_picture(script, tmp_path, capsys):
    words = "--models tiny,tiny-distilled,timm:resnet18@32 --device cpu --batch_size 1 --runs 2 --turns 1 --warm_up 0"
    script.main([*words.split(), "--reference", "tiny-distilled", "--output_dir", str(tmp_path / "new")])
    table = (tmp_path / "new" / "throughput.md").read_text()
    assert table in capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "throughput.json").read_text())
    assert [row["name"] for row in report["models"]] == ["tiny", "tiny-distilled", "timm:resnet18@32"]
    assert report["models"][1]["ratio"] == 1.0 and len(report["models"][0]["seconds"]) == 2
    assert report["settings"]["batch_rule"] == "1, given" and report["machine"]["torch"] == torch.__version__
    assert (tmp_path / "new" / "tradeoff.png").stat().st_size > 10_000


def test_a_wrong_reference_is_refused_before_anything_is_measured(script):
    with pytest.raises(ValueError, match="reference is 'small'; it must be one of tiny, stock:tiny"):
        script.main(["--models", "tiny,stock:tiny", "--reference", "small"])
