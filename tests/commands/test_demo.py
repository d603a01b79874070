"""demo.py: the page shows the evaluation's predictions and the model's attention, and answers over HTTP."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.evaluation import COLOURS, ID2LABEL, MEAN, SHAPE, STD, drawn, save

from hf_deit import DeiTConfig, DeiTForImageClassification, DeiTForImageClassificationWithTeacher
from hf_deit.commands import demo
from hf_deit.models.classifiers import new_classifier


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def student(tmp_path):
    model = drawn(DeiTForImageClassificationWithTeacher(DeiTConfig(**SHAPE, id2label=ID2LABEL)))
    return model, save(model, tmp_path / "student")


@pytest.fixture
def teacher(tmp_path):
    """A convnet with its classes in another order, and its directory."""
    names = dict(enumerate(["blue", "red", "green"]))
    model = new_classifier("timm:test_resnet", id2label=names, mean=MEAN, std=STD, image_size=16).eval()
    return model, save(model, tmp_path / "teacher")


def pixel_values():
    return torch.tensor((PIXELS / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()


def test_the_columns_are_the_heads_their_fusion_and_the_teacher(student, teacher, photo):
    shown = demo.Demo(student[1], teacher[1])
    assert shown.columns == ["class head", "distillation head", "fused (softmax)", "teacher"]
    with torch.no_grad():
        ours, other = student[0](pixel_values()), teacher[0](pixel_values()).logits.softmax(-1)[0]
    one, two = ours.cls_logits.softmax(-1)[0], ours.distillation_logits.softmax(-1)[0]
    for column, expected in zip(shown.predictions(photo), (one, two, (one + two) / 2, other[[1, 2, 0]])):
        assert list(column) == COLOURS
        np.testing.assert_allclose(list(column.values()), expected, atol=1e-5)


def test_a_model_with_one_head_has_one_column(tmp_path, photo):
    model = drawn(DeiTForImageClassification(DeiTConfig(**SHAPE, id2label=ID2LABEL, use_distillation_token=False)))
    shown = demo.Demo(save(model, tmp_path / "plain"))
    assert (shown.columns, shown.tokens, len(shown.predictions(photo))) == (["model"], ["class"], 1)


def test_attention_is_brightest_where_the_token_looks_in_the_chosen_layer(student, photo):
    shown = demo.Demo(student[1])
    assert (shown.layers, shown.tokens) == (2, ["class", "distillation"])
    with torch.no_grad():
        attentions = student[0](pixel_values(), output_attentions=True).attentions
    grey = np.asarray(Image.fromarray(PIXELS.mean(axis=2).astype(np.uint8)).resize((448, 448)), float)[..., None]
    for layer in (1, 2):
        for number, picture in enumerate(shown.attention(photo, layer)):
            assert picture.shape == (448, 448, 3) and picture.dtype == np.uint8
            colours = (picture - 0.35 * grey) / 0.65  # viridis grows in green with the weight
            green = colours[..., 1].reshape(4, 112, 4, 112).mean(axis=(1, 3))
            weights = attentions[layer - 1][0, :, number, 2:].mean(0).numpy()
            assert green.argmax() == weights.argmax()
            by_colour = weights[np.argsort(green.flatten())] / weights.max()
            assert (np.diff(by_colour) > -1 / 128).all()  # colours have 256 steps


def test_a_convnet_has_predictions_and_no_attention(teacher, photo):
    shown = demo.Demo(teacher[1])
    assert (shown.layers, shown.tokens, shown.attention(photo, 1)) == (0, [], [])
    assert list(shown.predictions(photo)[0]) == ["blue", "red", "green"]


def test_two_classes_of_one_name_keep_their_probabilities(student, photo):
    shown = demo.Demo(student[1])
    shown.names = ["crane", "crane", "gull"]
    assert [list(column) for column in shown.predictions(photo)] == [["crane", "crane (1)", "gull"]] * 3


def test_what_is_no_image_is_refused_in_one_line(student, tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(ValueError) as refused:
        demo.Demo(student[1]).predictions(tmp_path / "note.txt")
    assert "\n" not in str(refused.value)


def test_without_gradio_the_demo_says_how_to_get_it(student, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'hf_deit\[demo\]'"):
        demo.build_page(demo.Demo(student[1]), "a model")


def test_the_page_answers_over_http(student, teacher, photo):
    gradio = pytest.importorskip("gradio")
    client_of = pytest.importorskip("gradio_client")
    shown = demo.Demo(student[1], teacher[1])
    page = demo.build_page(shown, "a model")
    address = demo.serve(page, "127.0.0.1", None, block=False)
    try:
        assert address.startswith("http://127.0.0.1:") and page.share_url is None and not page.analytics_enabled
        client = client_of.Client(address, verbose=False, analytics_enabled=False)
        *labels, one, other = client.predict(client_of.handle_file(str(photo)), 2, api_name="/show")
        for label, expected in zip(labels, shown.predictions(photo), strict=True):
            assert label["label"] == max(expected, key=expected.get)
        assert [Image.open(path).size for path in (one, other)] == [(448, 448)] * 2
    finally:
        page.close()
        gradio.close_all(verbose=False)
