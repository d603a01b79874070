"""Small classifiers of three colours, their pixels without our code, and what predictions must be."""

import numpy as np
import pytest
import torch
from datasets import Image
from PIL import Image as PillowImage

from hf_deit import build_eval_transform, build_image_processor


COLOURS = ["red", "green", "blue"]
ID2LABEL = dict(enumerate(COLOURS))
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.2)
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"image_size": 16, "patch_size": 4}


def drawn(model, seed=0):
    """The model with weights whose decisions differ from image to image."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 2 * parameter.shape[1] ** -0.5, generator=generator)
        elif "patch" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    return model.eval()


def save(model, path, crop_ratio=1.0, image_size=16):
    processor = build_image_processor(build_eval_transform(image_size, crop_ratio=crop_ratio))
    processor.image_mean, processor.image_std = list(MEAN), list(STD)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def pixels_of(images, size=16, crop_ratio=1.0):
    """Shorter side to size / crop_ratio, central square, normalised: with Pillow and NumPy alone."""
    batch = []
    for image in images.cast_column("image", Image())["image"]:
        shorter = int(size / crop_ratio)
        image = image.convert("RGB").resize((shorter, shorter), PillowImage.Resampling.BICUBIC)
        start = (shorter - size) // 2
        batch.append(np.asarray(image.crop((start, start, start + size, start + size))) / 255)
    return torch.tensor((np.stack(batch) - MEAN) / STD).permute(0, 3, 1, 2).float()


def log_softmax(logits):
    logits = logits.double().numpy()
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def assert_predicts(predictions, head, log_probabilities, labels):
    """Best classes and losses of one head are those of the log-probabilities (samples, classes)."""
    best = np.argsort(-log_probabilities, axis=1)[:, : 5 if log_probabilities.shape[1] > 5 else 1]
    assert (predictions.best_classes[head] == best).all()
    assert len(set(best[:, 0])) > 1, "one class for all images shows nothing"
    losses = -log_probabilities[np.arange(len(labels)), labels]
    np.testing.assert_allclose(predictions.losses[head], losses, rtol=1e-4, atol=1e-5)
    measured = predictions.accuracy()[head]
    assert measured["top1"] == np.mean(best[:, 0] == labels)
    assert measured["loss"] == pytest.approx(losses.mean(), rel=1e-4)


def assert_predicts_heads(predictions, class_logits, distillation_logits, labels):
    one, other = log_softmax(class_logits), log_softmax(distillation_logits)
    expected = {"class": one, "distillation": other, "softmax": np.log((np.exp(one) + np.exp(other)) / 2)}
    expected["logits"] = log_softmax((class_logits + distillation_logits) / 2)
    assert list(predictions.best_classes) == list(expected)
    for head, log_probabilities in expected.items():
        assert_predicts(predictions, head, log_probabilities, labels)
