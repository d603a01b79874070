"""The configuration: the paper's defaults, stock's where stock wrote the file, and no impossible network."""

import json

import pytest
import transformers

from hf_deit.models.configuration_deit import HEAD_FUSIONS, DeiTConfig


def test_sizes_are_those_of_table_1():
    for size, width, heads in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)):
        config = DeiTConfig.from_size(size)
        assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (width, heads, 4 * width)
        assert config.num_hidden_layers == 12
        assert config.hidden_size // config.num_attention_heads == 64


def test_defaults_are_the_papers():
    config = DeiTConfig()
    assert config.to_dict().items() >= DeiTConfig.from_size("base").to_dict().items()
    assert (config.image_size, config.patch_size, config.layer_norm_eps) == (224, 16, 1e-6)
    assert (config.drop_path_rate, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0, 0)
    assert (config.head_fusion, config.use_distillation_token) == ("softmax", True)


def test_overrides_win_over_the_size():
    assert DeiTConfig.from_size("tiny", num_hidden_layers=2, num_labels=10).num_hidden_layers == 2


def test_every_field_survives_a_round_trip(tmp_path):
    config = DeiTConfig.from_size(
        "tiny",
        image_size=(64, 32),
        head_fusion="class",
        drop_path_rate=0.25,
        use_distillation_token=False,
        id2label={0: "cat", 1: "dog", 2: "eel"},
        label2id={"cat": 0, "dog": 1, "eel": 2},
    )
    config.save_pretrained(tmp_path)
    loaded = DeiTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.grid_size == config.grid_size == (4, 2)


def test_what_stock_wrote_keeps_stocks_behaviour(tmp_path):
    transformers.DeiTConfig().save_pretrained(tmp_path)
    config = DeiTConfig.from_pretrained(tmp_path)
    assert (config.head_fusion, config.drop_path_rate, config.layer_norm_eps) == ("logits", 0.0, 1e-12)
    assert config.use_distillation_token
    assert DeiTConfig.from_pretrained(tmp_path, drop_path_rate=0.2).drop_path_rate == 0.2


def test_stock_reads_what_we_write(tmp_path):
    DeiTConfig.from_size("small", num_labels=7).save_pretrained(tmp_path)
    stock = transformers.DeiTConfig.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "deit"
    assert (stock.hidden_size, stock.num_labels, stock.layer_norm_eps) == (384, 7, 1e-6)


def test_a_plain_deit_is_of_type_vit_on_disk(tmp_path):
    config = DeiTConfig.from_size("tiny", use_distillation_token=False, num_labels=7)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit"
    stock = transformers.ViTConfig.from_pretrained(tmp_path)
    assert (stock.hidden_size, stock.intermediate_size, stock.num_labels) == (192, 768, 7)
    stock.name_or_path = ""  # where it came from
    for loaded in (DeiTConfig.from_pretrained(tmp_path), DeiTConfig.from_stock(stock)):
        assert loaded.to_dict() == config.to_dict()
    transformers.ViTConfig().save_pretrained(tmp_path)
    vit = DeiTConfig.from_pretrained(tmp_path)
    assert (vit.use_distillation_token, vit.layer_norm_eps, vit.drop_path_rate) == (False, 1e-12, 0.0)


def test_new_class_names_replace_the_files(tmp_path, caplog):
    DeiTConfig(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}).save_pretrained(tmp_path)
    assert DeiTConfig.from_pretrained(tmp_path, id2label={0: "eel"}).label2id == {"eel": 0}
    assert DeiTConfig.from_pretrained(tmp_path, num_labels=2).id2label == {0: "cat", 1: "dog"}
    assert DeiTConfig.from_pretrained(tmp_path, num_labels=3).id2label[2] == "LABEL_2"
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 225}, "image_size 225 is not a multiple of patch_size 16; the nearest valid size is 224"),
        ({"image_size": (224, 100)}, r"nearest valid size is \(224, 96\)"),
        ({"image_size": 0}, "image_size 0"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of num_attention_heads 12"),
        ({"head_fusion": "mean"}, f"'mean'; choose one of {', '.join(HEAD_FUSIONS)}"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is 1.0; it must be in \[0, 1\)"),
        ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
    ],
)
def test_fields_that_make_no_network_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DeiTConfig(**fields)


def test_an_override_at_loading_is_checked_too(tmp_path):
    DeiTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="385 is not a multiple"):
        DeiTConfig.from_pretrained(tmp_path, image_size=385)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="'huge'; choose one of tiny, small, base"):
        DeiTConfig.from_size("huge")


def test_class_names_are_numbered_both_ways_on_disk(tmp_path):
    DeiTConfig(id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label2id"] == {"cat": 0, "dog": 1}
