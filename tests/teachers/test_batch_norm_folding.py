"""batch_norm_folding.py: the same answers with fewer modules, or the model as it was."""

import copy

import pytest
import timm
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_deit import load_teacher
from hf_deit.teachers.batch_norm_folding import fold_batch_norms


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def with_moved_statistics(model):
    """As after training: a norm that is folded wrongly must show."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            for tensor, low, high in ((module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0)):
                tensor.uniform_(low, high, generator=generator)
            if module.affine:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.3, 0.3, generator=generator)
    return model.eval().requires_grad_(False)


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["regnety_002", "resnet10t", "mobilenetv3_small_050", "convnext_atto"])
def test_timms_networks_answer_the_same_without_their_norms(name):
    model = with_moved_statistics(timm.create_model(name, num_classes=7))
    expected, count = model(PIXELS), norms(model)
    assert fold_batch_norms(model, lambda: model(PIXELS)) == count
    assert norms(model) == 0
    torch.testing.assert_close(model(PIXELS), expected, rtol=1e-4, atol=1e-4)


def test_transformers_resnet_answers_the_same_without_its_norms():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_labels=5)
    model = with_moved_statistics(ResNetForImageClassification(config))
    expected = model(PIXELS).logits
    assert fold_batch_norms(model, lambda: model(PIXELS).logits) > 5 and norms(model) == 0
    torch.testing.assert_close(model(PIXELS).logits, expected, rtol=1e-4, atol=1e-4)


class Odd(nn.Module):
    """Each of the cases in which a norm must stay."""

    def __init__(self, case):
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.norm = nn.BatchNorm2d(8, track_running_stats=case != "no statistics")
        if case == "of another kind":
            self.norm.__class__ = type("Kind", (nn.BatchNorm2d,), {})

    def forward(self, pixels):
        features = self.first(pixels)
        if self.case == "called twice":
            features = self.norm(features) + self.norm(self.second(pixels))
        elif self.case == "read by others":
            features = self.norm(features) + features
        elif self.case == "after an activation":
            features = self.norm(features.relu())
        else:
            features = self.norm(features)
        return self.head(features.relu().mean((2, 3)))


CASES = ["called twice", "read by others", "after an activation", "no statistics", "of another kind"]


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_folded_stays_as_it_was(case):
    model = with_moved_statistics(Odd(case))
    expected, before = model(PIXELS), copy.deepcopy(model.state_dict())
    assert fold_batch_norms(model, lambda: model(PIXELS)) == 0
    assert torch.equal(model(PIXELS), expected) and norms(model) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_that_is_not_float32_is_left_and_not_asked():
    model = with_moved_statistics(Odd("plain")).to(torch.bfloat16)
    assert fold_batch_norms(model, lambda: pytest.fail("asked with pixels that it may not take")) == 0


def test_watched_modules_are_left_alone():
    model = with_moved_statistics(Odd("plain"))
    seen = []
    model.first.register_forward_hook(lambda *call: seen.append(call))
    assert fold_batch_norms(model, lambda: model(PIXELS)) == 0
    assert len(seen) == 1


def test_a_loaded_teacher_is_folded_and_one_that_is_given_is_not(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_labels=5)
    model = with_moved_statistics(ResNetForImageClassification(config))
    model.save_pretrained(tmp_path)
    student = {"id2label": None, "mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 32}
    loaded, given = load_teacher(str(tmp_path), **student), load_teacher(model, **student)
    assert norms(loaded.models[0]) == 0 and norms(given.models[0]) == norms(model) > 5
    torch.testing.assert_close(loaded(PIXELS), given(PIXELS), rtol=1e-4, atol=1e-4)
    assert (loaded.sha256, loaded.num_parameters) == (given.sha256, given.num_parameters)
