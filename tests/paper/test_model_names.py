"""model_names.py: the names of networks on the command line."""

import pytest

from hf_deit.paper.model_names import ModelSpec, expand_models


def test_a_table_stands_for_its_rows():
    assert expand_models("table1") == ["tiny", "small", "base"]
    assert expand_models("base, table1") == ["base", "tiny", "small"]
    assert expand_models("table10") == ["base@160", "base", "base@320", "base@384"]
    table5 = expand_models("table5")
    assert {"timm:tf_efficientnet_b1@240", "base-distilled@384", "tiny"} <= set(table5)
    assert len(table5) == len(set(table5)) == 25


@pytest.mark.parametrize("name", ["huge", "tiny@", "stock:resnet50", "table5,tinny", "timm:", ""])
def test_an_unknown_model_is_refused(name):
    with pytest.raises(ValueError, match="expected tiny, small or base|name at least one"):
        expand_models(name)


@pytest.mark.parametrize(
    "spec, architecture",
    [
        ("stock:base-distilled@384", "base-distilled"),
        ("timm:deit_base_distilled_patch16_384", "base-distilled"),
        ("timm:deit_small_patch16_224", "small"),
        ("timm:deit3_small_patch16_224", "timm:deit3_small_patch16_224"),
        ("timm:resnet50@288", "timm:resnet50"),
    ],
)
def test_one_network_has_one_name(spec, architecture):
    assert ModelSpec.parse(spec).architecture == architecture


def test_a_trained_model_is_a_directory_or_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("small", "a run", "at@96"):
        (tmp_path / name).mkdir()
    parsed = {spec: ModelSpec.parse(spec) for spec in ("facebook/deit", "a run", "./small@32", "at@96", "small")}
    assert [(one.source, one.name, one.image_size) for one in parsed.values()] == [
        ("trained", "facebook/deit", None),
        ("trained", "a run", None),
        ("trained", "./small", 32),
        ("trained", "at@96", None),
        ("ours", "small", None),
    ]
