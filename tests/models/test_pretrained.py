"""Loading: checkpoints of another class, size or number of classes, and positions of another image size."""

import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.models import CLASSES, CLASSIFIERS, small_batch, small_model

from hf_deit.models.configuration_deit import DeiTConfig
from hf_deit.models.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
)
from hf_deit.models.pretrained import resample_positions


# --- A checkpoint of another class, size or number of classes ----------------------------------------------------


def load_with_line(kind, folder, caplog, **fields):
    """The loaded model, and the one line that says what is new and what is not used."""
    caplog.clear()
    loaded = kind.from_pretrained(folder, **fields)
    [record] = caplog.records
    assert "\n" not in record.getMessage()
    return loaded, record.getMessage()


def copied(loaded, model) -> set[str]:
    """Names of the parameters that are the same in both."""
    old, new = model.state_dict(), loaded.state_dict()
    return {name for name in old.keys() & new.keys() if torch.equal(old[name], new[name])}


def parameters_of(*modules: str) -> set[str]:
    return {f"{module}.{part}" for module in modules for part in ("weight", "bias")}


HEADS_OF = {
    DeiTForImageClassification: parameters_of("classifier"),
    DeiTForImageClassificationWithTeacher: parameters_of("cls_classifier", "distillation_classifier"),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": 9},
        {"num_labels": 9, "ignore_mismatched_sizes": True},
        {"id2label": {number: f"class {number}" for number in range(9)}},
    ],
)
def test_another_number_of_classes_means_new_heads(tmp_path, caplog, kind, auto, fields):
    model = small_model(kind)
    model.save_pretrained(tmp_path)
    loader = transformers.AutoModelForImageClassification if auto else kind
    loaded, line = load_with_line(loader, tmp_path, caplog, **fields)
    assert line == f"{kind.__name__} from {tmp_path}: new, not trained: {', '.join(sorted(HEADS_OF[kind]))}"
    assert copied(loaded, model) == model.state_dict().keys() - HEADS_OF[kind]
    for name in HEADS_OF[kind]:
        head = loaded.get_parameter(name)
        assert len(head) == 9
        assert head.std().item() == pytest.approx(0.02, rel=0.2) if name.endswith("weight") else not head.any()
    assert loaded.config.num_labels == len(loaded.config.label2id) == 9
    assert loaded.config.id2label == fields.get("id2label", loaded.config.id2label)


def test_new_classes_and_another_image_size_together(tmp_path, caplog):
    model = small_model()
    model.save_pretrained(tmp_path)
    expected = resample_positions(model.deit.embeddings.position_embeddings, (4, 4), (6, 6))
    loader = transformers.AutoModelForImageClassification
    loaded, _ = load_with_line(loader, tmp_path, caplog, image_size=48, num_labels=3)
    assert type(loaded) is DeiTForImageClassificationWithTeacher
    assert torch.equal(loaded.deit.embeddings.position_embeddings, expected)
    assert loaded(torch.randn(1, 3, 48, 48)).cls_logits.shape == (1, 3)


@torch.no_grad()
def test_one_head_becomes_two_and_two_become_one(tmp_path, caplog):
    pixel_values, *_ = small_batch()
    one, two = (small_model(kind) for kind in CLASSIFIERS)
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    loaded, line = load_with_line(DeiTForImageClassificationWithTeacher, tmp_path / "one", caplog)
    torch.testing.assert_close(loaded(pixel_values).cls_logits, one(pixel_values).logits)
    assert line.endswith("one: new, not trained: distillation_classifier.bias, distillation_classifier.weight")
    loaded.save_pretrained(tmp_path / "again")  # under the names of its class, not of the checkpoint's
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == two.state_dict().keys()
    loaded, line = load_with_line(DeiTForImageClassification, tmp_path / "two", caplog)
    torch.testing.assert_close(loaded(pixel_values).logits, two(pixel_values).cls_logits)
    assert line.endswith("two: not used: distillation_classifier.bias, distillation_classifier.weight")


@pytest.mark.parametrize("image_size", [None, 48])
def test_a_plain_checkpoint_gets_a_distillation_token(tmp_path, caplog, image_size):
    plain = small_model(DeiTForImageClassification, use_distillation_token=False)
    plain.save_pretrained(tmp_path)
    loaded, line = load_with_line(
        DeiTForImageClassificationWithTeacher, tmp_path, caplog, **({"image_size": image_size} if image_size else {})
    )
    assert line.endswith(
        "new, not trained: deit.embeddings.distillation_token, distillation_classifier.bias, "
        "distillation_classifier.weight, the distillation token's position"
    )
    plain.resize_position_embeddings(image_size or 32)
    old, new = (model.base_model.embeddings.position_embeddings for model in (plain, loaded))
    assert torch.equal(old, torch.cat([new[:, :1], new[:, 2:]], dim=1))
    assert 0 < new[:, 1].std() < 0.05  # as at init
    assert torch.equal(loaded.cls_classifier.weight, plain.classifier.weight)
    theirs = plain.vit.state_dict()
    for name, tensor in loaded.deit.state_dict().items():
        assert "position" in name or "distillation" in name or torch.equal(tensor, theirs[name]), name


@torch.no_grad()
def test_a_distilled_checkpoint_becomes_plain(tmp_path, caplog):
    two = small_model()
    two.save_pretrained(tmp_path)
    loaded, line = load_with_line(DeiTForImageClassification, tmp_path, caplog, use_distillation_token=False)
    assert line.endswith("embeddings.distillation_token, the distillation token's position")
    assert "new" not in line
    old, new = (model.base_model.embeddings.position_embeddings for model in (two, loaded))
    assert torch.equal(new, torch.cat([old[:, :1], old[:, 2:]], dim=1))
    assert torch.equal(loaded.classifier.weight, two.cls_classifier.weight)


def test_the_headless_model_says_that_its_pooler_is_new(tmp_path, caplog):
    small_model().save_pretrained(tmp_path)
    _, line = load_with_line(transformers.AutoModel, tmp_path, caplog)
    assert "new, not trained: pooler.dense.bias, pooler.dense.weight; not used: cls_classifier.bias" in line


@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64}, r"cls_classifier.weight \(5, 32\) instead of \(5, 64\), deit.embeddings.cls_token"),
        ({"patch_size": 16}, r"of another shape: deit.embeddings.patch_embeddings.projection.weight \(32, 3, 8, 8\)"),
        ({"num_hidden_layers": 4}, r"missing: deit.encoder.layer.\*.attention.attention.key.bias"),
        ({"num_hidden_layers": 2}, r"not in the network: encoder.layer.\*.attention.attention.key.bias"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, but .* was trained with 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, caplog, fields, message, ignore_mismatched_sizes):
    small_model().save_pretrained(tmp_path)
    for loader in (DeiTForImageClassificationWithTeacher, transformers.AutoModelForImageClassification):
        with pytest.raises(ValueError, match=message):
            loader.from_pretrained(tmp_path, **fields, ignore_mismatched_sizes=ignore_mismatched_sizes)


def test_a_checkpoint_without_some_weight_is_refused(tmp_path):
    model = small_model()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "deit.layernorm.bias"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="missing: deit.layernorm.bias. Only num_labels"):
        DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path)
    _, report = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"deit.layernorm.bias"}
    with pytest.raises(ValueError, match="of another shape: deit.encoder.layer"):
        DeiTForImageClassificationWithTeacher.from_pretrained(
            tmp_path, intermediate_size=128, output_loading_info=True
        )


# --- Positions of another image size -----------------------------------------------------------------------------


def test_positions_of_the_same_grid_are_the_same_tensor():
    positions = torch.randn(1, 18, 4)
    assert resample_positions(positions, (4, 4), (4, 4)) is positions
    model = small_model()
    before = model.deit.embeddings.position_embeddings
    model.resize_position_embeddings((32, 32))
    assert model.deit.embeddings.position_embeddings is before


@pytest.mark.parametrize("use_distillation_token", [True, False])
@torch.no_grad()
def test_resizing_keeps_the_tokens_and_resamples_the_patches_bicubically(use_distillation_token):
    model = small_model(DeiTForImageClassification, use_distillation_token=use_distillation_token)
    prefix = 1 + use_distillation_token
    old = model.base_model.embeddings.position_embeddings.clone()
    model.resize_position_embeddings((48, 24))  # 6 rows, 3 columns
    new = model.base_model.embeddings.position_embeddings
    assert model.config.image_size == (48, 24) and new.requires_grad
    assert torch.equal(new[:, :prefix], old[:, :prefix])
    # Bicubic resampling (Keys, a = -0.75) as a matrix product, written out.
    expected = torch.einsum(
        "ri,cj,ijd->rcd", cubic_matrix(4, 6), cubic_matrix(4, 3), old[0, prefix:].reshape(4, 4, -1).double()
    )
    torch.testing.assert_close(new[0, prefix:].double(), expected.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert model(torch.randn(2, 3, 48, 24)).logits.shape == (2, 5)


def cubic_matrix(old: int, new: int) -> torch.Tensor:
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for target in range(new):
        source = (target + 0.5) * old / new - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            distance, a = abs(source - tap), -0.75
            near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
            far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            matrix[target, min(max(tap, 0), old - 1)] += near if distance <= 1 else far
    return matrix


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_from_pretrained_resizes_the_positions_in_the_weights(tmp_path, kind):
    model = small_model(kind, image_size=(32, 64))
    model.save_pretrained(tmp_path)
    expected = resample_positions(model.base_model.embeddings.position_embeddings, (4, 8), (6, 4))
    loaded, report = kind.from_pretrained(tmp_path, image_size=(48, 32), output_loading_info=True)
    assert not any(report.values())
    from_config = kind.from_pretrained(tmp_path, config=DeiTConfig.from_pretrained(tmp_path, image_size=(48, 32)))
    for resized in (loaded, from_config):
        assert resized.config.image_size == (48, 32)
        assert torch.equal(resized.base_model.embeddings.position_embeddings, expected)
    loaded.save_pretrained(tmp_path / "resized")
    again = kind.from_pretrained(tmp_path / "resized")
    assert torch.equal(again.base_model.embeddings.position_embeddings, expected)
    same = kind.from_pretrained(tmp_path, image_size=(32, 64))
    assert torch.equal(same.base_model.embeddings.position_embeddings, model.base_model.embeddings.position_embeddings)


def test_weights_without_a_config_file_load_with_a_config_object(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    loaded = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path, config=model.config)
    assert torch.equal(loaded.cls_classifier.weight, model.cls_classifier.weight)


@torch.no_grad()
def test_positions_at_run_time_equal_positions_in_the_weights_and_stocks(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    stock = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 48, 48)
    at_run_time = model(pixel_values, interpolate_pos_encoding=True).cls_logits
    assert model.config.image_size == 32
    model.resize_position_embeddings(48)
    assert torch.equal(model(pixel_values).cls_logits, at_run_time)
    torch.testing.assert_close(stock(pixel_values, interpolate_pos_encoding=True).cls_logits, at_run_time)


def test_half_precision_positions_keep_their_dtype():
    model = small_model().to(torch.bfloat16)
    model.resize_position_embeddings(48)
    assert model.deit.embeddings.position_embeddings.dtype == torch.bfloat16


def test_a_size_that_is_no_multiple_of_the_patch_is_refused_and_changes_nothing(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match="image_size 33 is not a multiple of patch_size 8"):
        model.resize_position_embeddings(33)
    assert model.config.image_size == 32
    with pytest.raises(ValueError, match="33x40 pixels: not a multiple of the patch, 8x8"):
        model(torch.zeros(1, 3, 33, 40), interpolate_pos_encoding=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_size 33"):
        DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path, image_size=33)
