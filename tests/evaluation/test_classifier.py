"""Classifiers: sizes, timm's models, crop ratios and classes."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.evaluation import (
    COLOURS,
    ID2LABEL,
    MEAN,
    SHAPE,
    STD,
    assert_predicts,
    assert_predicts_heads,
    drawn,
    log_softmax,
    pixels_of,
    save,
)
from timm.models.vision_transformer import checkpoint_filter_fn
from transformers import ViTConfig, ViTForImageClassification

from hf_deit import EvalViews, build_eval_transform, load_classifier
from hf_deit.evaluation.predict import predict
from hf_deit.models.classifiers import new_classifier


# --- heads, sizes, crops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deit", "vit"])
def test_positions_are_resized_to_another_image_size(tmp_path, stock, images, kind):
    model, path = stock
    if kind == "vit":
        model = drawn(ViTForImageClassification(ViTConfig(**SHAPE, id2label=ID2LABEL)))
        path = save(model, tmp_path / "vit")
    classifier = load_classifier(path, id2label=ID2LABEL, image_size=32)
    predictions = predict(classifier, images)
    with torch.no_grad():
        outputs = model(pixels_of(images, 32), interpolate_pos_encoding=True)
    logits = outputs.cls_logits if kind == "deit" else outputs.logits
    assert_predicts(predictions, "class", log_softmax(logits), np.array(images["label"]))
    assert predictions.image_size == 32
    assert classifier.heads == (("class",) if kind == "vit" else ("class", "distillation", "softmax", "logits"))


def test_a_timm_checkpoint_answers_as_in_timm(tmp_path, images):
    name, size = "deit_tiny_distilled_patch16_224", 32
    model = drawn(timm.create_model(name, num_classes=3))
    weights = model.state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    classifier = load_classifier(
        f"timm:{name}?checkpoint={tmp_path}/w.safetensors", id2label=ID2LABEL, image_size=size
    )
    pretrained = timm.data.resolve_model_data_config(model)
    assert classifier.crop_ratio == pretrained["crop_pct"] and classifier.mean == pretrained["mean"]
    assert classifier.classes_matched == "by position: the model has no class names"

    views = EvalViews(images, build_eval_transform(size, crop_ratio=pretrained["crop_pct"]))
    pixels = np.stack([views[index]["pixel_values"] for index in range(len(views))]) / 255
    pixels = torch.tensor((pixels - pretrained["mean"]) / pretrained["std"]).permute(0, 3, 1, 2).float()
    reference = timm.create_model(name, num_classes=3, img_size=size)
    reference.load_state_dict(checkpoint_filter_fn(dict(weights), reference))
    reference.eval().set_distilled_training(True)
    reference.training = True  # it alone: the answer is then that of both heads
    with torch.no_grad():
        heads = reference(pixels)
    assert_predicts_heads(predict(classifier, images), *heads, np.array(images["label"]))


def test_a_timm_teacher_of_ours_is_evaluated_as_it_was_trained(tmp_path):
    arguments = {"id2label": ID2LABEL, "mean": MEAN, "std": STD, "image_size": 24}
    model = new_classifier("timm:resnet10t", model_args={"channels": (8, 8, 8, 8), "stem_width": 8}, **arguments)
    own = model.timm_model.pretrained_cfg["crop_pct"]
    model.save_pretrained(tmp_path / "bare")
    assert load_classifier(tmp_path / "bare", id2label=ID2LABEL).crop_ratio == own != 0.75
    classifier = load_classifier(save(model, tmp_path / "ours", 0.75, image_size=24), id2label=ID2LABEL)
    assert (classifier.crop_ratio, classifier.image_size, classifier.heads) == (0.75, 24, ("class",))


@pytest.mark.parametrize(("size", "shorter"), [(384, 438), (224, 256), (224, 248), (160, 182), (320, 365)])
def test_a_crop_ratio_read_from_whole_pixels_gives_them_back(size, shorter):
    from hf_deit.evaluation.classifier import survive_rounding

    assert int(size / survive_rounding(size / shorter, size)) == shorter


# --- classes -----------------------------------------------------------------------------------------------------


def test_the_same_classes_in_another_order_are_reordered(tmp_path, stock, images):
    model, path = stock
    labels = np.array(images["label"])
    expected = predict(load_classifier(path, id2label=ID2LABEL), images).accuracy()
    order = [2, 0, 1]
    for head in (model.cls_classifier, model.distillation_classifier):
        head.weight.data, head.bias.data = head.weight[order], head.bias[order]
    model.config.id2label = {new: COLOURS[old] for new, old in enumerate(order)}
    classifier = load_classifier(save(model, tmp_path / "other"), id2label=ID2LABEL)
    assert classifier.classes_matched == "by name, re-ordered"
    predictions = predict(classifier, images)
    for head, measured in predictions.accuracy().items():
        assert measured == pytest.approx(expected[head])
    trusting = load_classifier(str(tmp_path / "other"), id2label=ID2LABEL, trust_class_order=True)
    assert trusting.classes_matched == "by position (trust_class_order)"
    assert (
        np.array(order)[predict(trusting, images).best_classes["class"]] == predictions.best_classes["class"]
    ).all()
    assert (labels == predictions.labels).all()


@pytest.mark.parametrize(
    ("own", "wanted", "how"),
    [
        (["LABEL_0", "LABEL_1", "LABEL_2"], COLOURS, "by position: the model has no class names"),
        (["0", "1", "2"], COLOURS, "by position: the model has no class names"),
        (COLOURS, ["0", "1", "2"], "by position: the dataset has no class names"),  # ImageNet V2 and ReaL
        (["2", "1", "0"], ["0", "1", "2"], "by name, re-ordered"),
        (["0", "1", "2"], ["0", "1", "2"], "by name"),
    ],
)
def test_classes_without_names_are_taken_by_position(tmp_path, stock, own, wanted, how):
    model, _ = stock
    model.config.id2label = dict(enumerate(own))
    classifier = load_classifier(save(model, tmp_path / "named"), id2label=dict(enumerate(wanted)))
    assert classifier.classes_matched == how


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            ["red", "green", "cyan"],
            r"other classes than the dataset: 3, such as blue, against 3, such as cyan\..*trust_class_order",
        ),
        (["red", "green"], r"has 3 classes \(red, green, blue\), the dataset has 2 \(red, green\)"),
    ],
)
def test_other_classes_are_refused(stock, wanted, message):
    with pytest.raises(ValueError, match=message):
        load_classifier(stock[1], id2label=dict(enumerate(wanted)))
