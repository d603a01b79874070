import inspect
import math
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers.utils.generic import find_labels

from hf_deit.configuration_deit import DeiTConfig
from hf_deit.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    add_branch,
    fuse_heads,
    register_auto_classes,
    resample_positions,
)


CLASSES = (DeiTModel, DeiTForImageClassification, DeiTForImageClassificationWithTeacher)
CLASSIFIERS = CLASSES[1:]


def small_config(**overrides) -> DeiTConfig:
    fields = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    return DeiTConfig(**(fields | {"image_size": 32, "patch_size": 8, "num_labels": 5} | overrides))


def small_model(kind=DeiTForImageClassificationWithTeacher, **overrides):
    torch.manual_seed(0)
    return scatter(kind(small_config(**overrides)))


def scatter(model):
    """Weights far from their init, so that no parameter can be ignored, swapped or left at zero unseen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if "token" in name or "position" in name else parameter.std().nan_to_num(0.0) + 0.02
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def small_batch(size=4):
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(size, 3, 32, 32, generator=generator)
    return pixel_values, torch.arange(size) % 5, torch.randn(size, 5, generator=generator)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- The same function as stock's and timm's ---------------------------------------------------------------------


def to_timm(name: str) -> str:
    """timm's name of one of our tensors; query, key and value, which it stacks, are joined by the caller."""
    renamed = {
        "deit.embeddings.cls_token": "cls_token",
        "deit.embeddings.distillation_token": "dist_token",
        "deit.embeddings.position_embeddings": "pos_embed",
    }
    if name in renamed:
        return renamed[name]
    for ours, theirs in (
        ("deit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("deit.encoder.layer", "blocks"),
        ("deit.layernorm", "norm"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.output.dense", "attn.proj"),
        ("attention.attention.query", "attn.qkv"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("cls_classifier", "head"),
        ("distillation_classifier", "head_dist"),
        ("classifier", "head"),
    ):
        name = name.replace(ours, theirs)
    return name


def timm_twin(model, name: str, **options):
    state = model.state_dict()
    converted = {}
    for key, tensor in state.items():
        if ".key." in key or ".value." in key:
            continue
        if ".query." in key:
            tensor = torch.cat([state[key.replace("query", part)] for part in ("query", "key", "value")])
        converted[to_timm(key)] = tensor
    twin = timm.create_model(name, num_classes=model.config.num_labels, img_size=model.config.image_size, **options)
    twin.load_state_dict(converted, strict=True)
    return twin.eval()


@pytest.mark.parametrize(
    ("size", "image_size"),
    [("tiny", 224), ("small", 224), pytest.param("tiny", 384, marks=pytest.mark.slow)]
    + [pytest.param("small", 384, marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_both_heads_equal_stock_and_timm(tmp_path, size, image_size):
    torch.manual_seed(0)
    config = DeiTConfig.from_size(size, image_size=image_size, num_labels=1000, head_fusion="logits")
    ours = scatter(DeiTForImageClassificationWithTeacher(config))
    ours.save_pretrained(tmp_path)
    stock, report = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    pixel_values = torch.randn(1, 3, image_size, image_size)
    got, expected = ours(pixel_values), stock(pixel_values)
    assert expected.cls_logits.std() > 0.1
    for name in ("logits", "cls_logits", "distillation_logits"):
        assert (got[name] - expected[name]).abs().max() < 1e-5, name
    twin = timm_twin(ours, f"deit_{size}_distilled_patch16_224")
    features = twin.forward_features(pixel_values)
    assert (got.cls_logits - twin.head(features[:, 0])).abs().max() < 1e-5
    assert (got.distillation_logits - twin.head_dist(features[:, 1])).abs().max() < 1e-5
    assert (got.logits - twin(pixel_values)).abs().max() < 1e-5


@torch.no_grad()
def test_the_plain_model_equals_timms():
    torch.manual_seed(0)
    config = DeiTConfig.from_size("tiny", num_labels=10, use_distillation_token=False)
    ours = scatter(DeiTForImageClassification(config))
    twin = timm_twin(ours, "deit_tiny_patch16_224")
    pixel_values = torch.randn(1, 3, 224, 224)
    assert (ours(pixel_values).logits - twin(pixel_values)).abs().max() < 1e-5


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_parameter_counts_are_those_of_table_1(size):
    with torch.device("meta"):
        plain = DeiTForImageClassification(DeiTConfig.from_size(size, num_labels=1000, use_distillation_token=False))
        distilled = DeiTForImageClassificationWithTeacher(DeiTConfig.from_size(size, num_labels=1000))
        plain_twin = timm.create_model(f"deit_{size}_patch16_224")
        distilled_twin = timm.create_model(f"deit_{size}_distilled_patch16_224")
    counts = {}
    for model in (plain, plain_twin, distilled, distilled_twin):
        counts[model] = sum(parameter.numel() for parameter in model.parameters())
    assert counts[plain] == counts[plain_twin]
    assert counts[distilled] == counts[distilled_twin]
    # Section 5.1 and Table 5 count in whole millions, rounded down: 5M, 22M, 86M; 6M and 87M are rounded.
    assert counts[plain] // 10**6 == {"tiny": 5, "small": 22, "base": 86}[size]
    assert round(counts[distilled] / 1e6) == {"tiny": 6, "small": 22, "base": 87}[size]


# --- On disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_weights_travel_to_stock_and_back_bit_for_bit(tmp_path, kind):
    ours = small_model(kind)
    ours.save_pretrained(tmp_path / "ours")
    stock, report = getattr(transformers, kind.__name__).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    stock.save_pretrained(tmp_path / "stock")
    mine, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "stock"))
    assert mine.keys() == theirs.keys() == ours.state_dict().keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    back, report = kind.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())
    pixel_values, *_ = small_batch()
    assert torch.equal(stock(pixel_values)[0], back(pixel_values)[0])


@torch.no_grad()
def test_a_stock_checkpoint_gives_stocks_fused_logits(tmp_path):
    fields = small_config().to_dict()
    known = transformers.DeiTConfig().to_dict().keys()
    stock = transformers.DeiTForImageClassificationWithTeacher(
        transformers.DeiTConfig(**{name: fields[name] for name in fields.keys() & known})
    )
    scatter(stock).save_pretrained(tmp_path)
    ours = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path)
    pixel_values, *_ = small_batch()
    assert torch.equal(ours(pixel_values).logits, stock(pixel_values).logits)
    assert {layer.drop_path_rate for layer in ours.deit.encoder.layer} == {0.0}


@torch.no_grad()
def test_a_plain_model_is_a_vit_to_stock(tmp_path):
    ours = small_model(DeiTForImageClassification, use_distillation_token=False)
    ours.save_pretrained(tmp_path / "ours")
    vit, report = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "ours", key_mapping={r"^deit\.": "vit."}, output_loading_info=True
    )
    assert not any(report.values())
    vit.save_pretrained(tmp_path / "vit")
    back, report = DeiTForImageClassification.from_pretrained(
        tmp_path / "vit", use_distillation_token=False, key_mapping={r"^vit\.": "deit."}, output_loading_info=True
    )
    assert not any(report.values())
    pixel_values, *_ = small_batch()
    assert torch.equal(vit(pixel_values).logits, ours(pixel_values).logits)
    assert torch.equal(back(pixel_values).logits, ours(pixel_values).logits)


def test_missing_and_unexpected_weights_are_reported(tmp_path, caplog):
    small_model(DeiTForImageClassification).save_pretrained(tmp_path)
    _, report = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path, output_loading_info=True)
    heads = {f"{head}.{part}" for head in ("cls_classifier", "distillation_classifier") for part in ("weight", "bias")}
    assert report["missing_keys"] == heads
    assert report["unexpected_keys"] == {"classifier.weight", "classifier.bias"}


def test_auto_classes_return_ours_after_registration(tmp_path):
    # In a process of its own: registration is for good.
    for kind in CLASSES:
        small_model(kind).save_pretrained(tmp_path / kind.__name__)
    script = f"""
import transformers
from hf_deit.modeling_deit import register_auto_classes
register_auto_classes()
register_auto_classes()
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
folder = {str(tmp_path)!r}
print(type(AutoConfig.from_pretrained(folder + "/DeiTModel")).__module__)
for auto, name in ((AutoModel, "DeiTModel"), (AutoModelForImageClassification, "DeiTForImageClassification"),
                   (AutoModelForImageClassification, "DeiTForImageClassificationWithTeacher")):
    model = auto.from_pretrained(folder + "/" + name, image_size=64)
    assert model.config.image_size == 64
    print(type(model).__module__, type(model).__name__)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=subprocess_environment())
    assert run.returncode == 0, run.stderr
    module = DeiTModel.__module__
    expected = ["hf_deit.configuration_deit", *(f"{module} {kind.__name__}" for kind in CLASSES)]
    assert run.stdout.splitlines() == expected


def subprocess_environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_registration_that_does_not_take_is_an_error(monkeypatch):
    for auto in (transformers.AutoConfig, transformers.AutoModel, transformers.AutoModelForImageClassification):
        monkeypatch.setattr(auto, "register", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="did not register"):
        register_auto_classes()


# --- Init --------------------------------------------------------------------------------------------------------


def test_init_is_the_authors():
    torch.manual_seed(0)
    model = DeiTForImageClassificationWithTeacher(DeiTConfig.from_size("tiny", num_labels=1000))
    for name, parameter in model.named_parameters():
        if "projection" in name:
            # PyTorch's convolution: uniform within 1/sqrt(fan in), whose standard deviation is that over sqrt(3).
            assert parameter.abs().max() <= 768**-0.5
            assert parameter.std() == pytest.approx((3 * 768) ** -0.5, rel=0.1)
        elif "layernorm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std() == pytest.approx(0.02, rel=0.2), name
            assert abs(parameter.mean()) < 0.004, name
    assert model.deit.layernorm.eps == model.deit.encoder.layer[5].layernorm_after.eps == 1e-6


@torch.no_grad()
def test_class_and_distillation_token_differ_at_init():
    torch.manual_seed(0)
    model = DeiTModel(small_config())
    embeddings = model.embeddings
    assert not torch.equal(embeddings.cls_token, embeddings.distillation_token)
    hidden_states = model.eval()(small_batch()[0]).last_hidden_state
    assert (hidden_states[:, 0] - hidden_states[:, 1]).abs().max() > 0.1


def first_gradient_norm(model) -> float:
    """Norm of the whole gradient of the first step: DeiT-Ti, 224 pixels, 8 images, both heads learn the label."""
    torch.manual_seed(0)
    pixel_values, labels = torch.randn(8, 3, 224, 224), torch.randint(1000, (8,))
    outputs = model.train()(pixel_values)
    loss = (F.cross_entropy(outputs.cls_logits, labels) + F.cross_entropy(outputs.distillation_logits, labels)) / 2
    loss.backward()
    return math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))


def print_first_gradient_norms() -> None:
    """For docs/results.md: `python tests/test_modeling_deit.py`."""
    torch.manual_seed(0)
    ours = DeiTForImageClassificationWithTeacher(DeiTConfig.from_size("tiny", num_labels=1000))
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 1000}
    torch.manual_seed(0)
    stock = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**sizes))
    print(f"first gradient norm of DeiT-Ti: ours {first_gradient_norm(ours):.1f}, stock {first_gradient_norm(stock):.1f}")


def test_the_first_gradient_of_deit_ti_is_below_100():
    torch.manual_seed(0)
    model = DeiTForImageClassificationWithTeacher(DeiTConfig.from_size("tiny", num_labels=1000))
    assert 0.1 < first_gradient_norm(model) < 100


# --- Stochastic depth --------------------------------------------------------------------------------------------


def test_drop_path_grows_linearly_over_depth():
    rates = [layer.drop_path_rate for layer in DeiTModel(small_config(drop_path_rate=0.3)).encoder.layer]
    assert rates == pytest.approx([0.0, 0.15, 0.3])
    assert [layer.drop_path_rate for layer in DeiTModel(small_config(num_hidden_layers=1)).encoder.layer] == [0.0]


def test_drop_path_is_per_sample_and_keeps_the_expectation():
    torch.manual_seed(0)
    residual, branch = torch.randn(20_000, 3, 2), torch.ones(20_000, 3, 2)
    added = add_branch(residual, branch, 0.25, training=True) - residual
    dropped = added[:, 0, 0] < 0.5
    # A sample keeps all of its branch, scaled by 1 / (1 - rate), or nothing.
    expected = torch.where(dropped, 0.0, 4 / 3)[:, None, None].expand_as(added)
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-5)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.015)
    assert added.mean() == pytest.approx(1.0, abs=0.02)


def test_drop_path_is_off_in_evaluation():
    residual, branch = torch.randn(2, 4, 3, 2)
    assert torch.equal(add_branch(residual, branch, 0.9, training=False), residual + branch)
    model = small_model(drop_path_rate=0.9)
    pixel_values, *_ = small_batch()
    first = model(pixel_values).cls_logits
    assert torch.equal(first, model(pixel_values).cls_logits)
    assert not torch.equal(first, model.train()(pixel_values).cls_logits)


def test_drop_path_drops_attention_and_feed_forward_apart():
    model = small_model(num_hidden_layers=2, drop_path_rate=0.5)
    layer = model.deit.encoder.layer[1].train()
    hidden_states = torch.randn(200, 3, 32)
    attended = layer.attention(layer.layernorm_before(hidden_states))[0]
    outcomes = set()
    for before, after in zip(hidden_states, layer(hidden_states)):
        found = []
        for kept_attention in (0, 2):
            middle = before + kept_attention * attended[len(outcomes) * 0 :][0] * 0 if kept_attention == 0 else None
            found.append(middle is not None and torch.allclose(after, before))
        outcomes.add(tuple(found))
    assert len(outcomes) > 1


if __name__ == "__main__":
    print_first_gradient_norms()
