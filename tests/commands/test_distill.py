"""distill.py: the student that the arguments describe; whole runs through the script are in test_recipes.py."""

import pytest
import torch

from hf_deit import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ModelArguments,
)
from hf_deit.training.run import build_student


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
NAMES = {0: "ant", 1: "bee"}


@pytest.mark.parametrize("token", [True, False])
def test_fresh_weights_have_the_fields_that_were_given(token):
    args = ModelArguments(**SIZES, use_distillation_token=token, drop_path_rate=0.3, attn_implementation="eager")
    model = build_student(args, 16, NAMES)
    kind = DeiTForImageClassificationWithTeacher if token else DeiTForImageClassification
    assert type(model) is kind and model.config._attn_implementation == "eager"
    assert {name: getattr(model.config, name) for name in SIZES} == SIZES
    assert (model.config.image_size, model.config.id2label) == ((16, 16), NAMES) or model.config.image_size == 16
    assert model.config.drop_path_rate == 0.3


def test_a_named_size_is_table_1s():
    config = build_student(ModelArguments(model_size="tiny"), 32, NAMES).config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (192, 3, 12)


def test_a_checkpoint_is_gone_on_from_with_new_classes(tmp_path):
    torch.manual_seed(0)
    saved = DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, image_size=16, id2label=NAMES))
    saved.save_pretrained(tmp_path)
    names = {number: f"name {number}" for number in range(5)}
    model = build_student(ModelArguments(model_name_or_path=str(tmp_path)), 24, names)
    assert model.config.id2label == names and model.cls_classifier.out_features == 5
    weight = "deit.encoder.layer.1.output.dense.weight"
    assert torch.equal(model.state_dict()[weight], saved.state_dict()[weight])
