"""Conversion: timm's network is the judge, and what is no DeiT is refused by name."""

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

from hf_deit.commands.convert import main
from hf_deit.models.checkpoint_conversion import HEAD_WIDTH, WIDTHS, read_checkpoint, read_class_names, write_original
from hf_deit.models.modeling_deit import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, DeiTModel


SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "convert_checkpoint.py"
CLASSES = {False: DeiTForImageClassification, True: DeiTForImageClassificationWithTeacher}
NARROW = {"embed_dim": 32, "num_heads": 2, "depth": 3, "patch_size": 8, "img_size": 32, "num_classes": 5}
OFFICIAL = [
    (size, distilled, image_size)
    for size in ("tiny", "small", "base")
    for distilled in (False, True)
    for image_size in (224, 384)
]


def random_timm(distilled: bool, size: str = "tiny", **options) -> torch.nn.Module:
    """timm's network, every weight away from its init, so that none can be swapped or left at zero unseen."""
    torch.manual_seed(0)
    model = timm.create_model(f"deit_{size}{'_distilled' if distilled else ''}_patch16_224", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@torch.no_grad()
def check_round_trip(folder: Path, theirs: torch.nn.Module, distilled: bool, **config) -> float:
    """original -> hub -> timm -> hub. Returns the largest difference of a logit from timm's."""
    model_class = CLASSES[distilled]
    size = theirs.patch_embed.img_size
    pixel_values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = theirs(pixel_values)
    assert expected.std() > 0.01
    differences = []

    def check(model):
        differences.append((model(pixel_values).logits - expected).abs().max().item())
        return model

    torch.save({"model": theirs.state_dict()}, folder / "original.pth")
    check(model_class.from_original(folder / "original.pth", **config)).save_pretrained(folder / "hub")
    hub = check(model_class.from_pretrained(folder / "hub"))
    assert hub.config.image_size == size[0]
    write_original(hub.to_original(), folder / "timm.safetensors")
    assert_equal(load_file(folder / "timm.safetensors"), theirs.state_dict())
    for parameter in theirs.parameters():
        parameter.zero_()
    timm.models.load_checkpoint(theirs, str(folder / "timm.safetensors"), strict=True)
    differences.append((theirs(pixel_values) - expected).abs().max().item())
    again = check(model_class.from_original(folder / "timm.safetensors", **config))
    again.save_pretrained(folder / "again")
    assert_equal(load_file(folder / "hub" / "model.safetensors"), load_file(folder / "again" / "model.safetensors"))
    assert (folder / "hub" / "config.json").read_text() == (folder / "again" / "config.json").read_text()
    assert max(differences) < 1e-5
    return max(differences)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("options", [{}, {"img_size": 64}, {"patch_size": 4}, {"num_classes": 2}, {"mlp_ratio": 3}])
def test_a_narrow_model_comes_back_bit_for_bit_and_equals_timm(tmp_path, distilled, options):
    check_round_trip(tmp_path, random_timm(distilled, **(NARROW | options)), distilled, num_attention_heads=2)


def test_a_network_without_biases_of_the_query_must_be_asked_for(tmp_path):
    theirs = random_timm(False, qkv_bias=False, **NARROW)
    check_round_trip(tmp_path, theirs, False, num_attention_heads=2, qkv_bias=False)


@pytest.mark.parametrize("distilled", [False, True])
def test_deit_ti_comes_back_bit_for_bit_and_equals_timm(tmp_path, distilled):
    check_round_trip(tmp_path, random_timm(distilled), distilled)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "distilled", "image_size"), OFFICIAL)
def test_the_papers_models_come_back_bit_for_bit_and_equal_timm(tmp_path, size, distilled, image_size):
    largest = check_round_trip(tmp_path, random_timm(distilled, size, img_size=image_size), distilled)
    print(f"{size} {'distilled' if distilled else 'plain'} {image_size}: max |difference of logits| {largest:.1e}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_small_patch32_224", {"patch_size": 32, "hidden_size": 384, "num_attention_heads": 6}),
        ("vit_tiny_patch16_384", {"patch_size": 16, "image_size": 384, "num_attention_heads": 3}),
        ("vit_base_patch8_224", {"patch_size": 8, "hidden_size": 768, "num_attention_heads": 12}),
        ("vit_large_patch14_224", {"patch_size": 14, "num_hidden_layers": 24, "intermediate_size": 4096}),
    ],
)
def test_sizes_of_a_deit_shaped_vit_are_inferred(name, expected):
    with torch.device("meta"):
        weights = timm.create_model(name, num_classes=7).state_dict()
    config = read_checkpoint(weights).config.to_dict()
    assert config | expected == config
    assert config["model_type"] == "vit" and len(config["id2label"]) == 7


@pytest.mark.slow
def test_heads_are_guessed_only_where_every_vit_of_timm_agrees():
    seen = {True: 0, False: 0}
    for name in timm.list_models(["vit_*", "deit_*", "flexivit_*", "test_vit*"]):
        with torch.device("meta"):
            model = timm.create_model(name)
        width = getattr(model, "embed_dim", 0)
        try:
            config = read_checkpoint(model.state_dict(), num_attention_heads=1).config
        except ValueError:
            continue
        guessed = width in WIDTHS and width % HEAD_WIDTH == 0
        seen[guessed] += 1
        if guessed:
            heads, activation = model.blocks[0].attn.num_heads, model.blocks[0].mlp.act
            assert read_checkpoint(model.state_dict()).config.num_attention_heads == heads, name
            assert config.layer_norm_eps == model.norm.eps and isinstance(activation, torch.nn.GELU), name
    assert seen[True] > 20 and seen[False] > 1


# --- The Hub's directories ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_a_directory_of_stock_transformers_goes_to_timm(tmp_path, caplog, distilled):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
    sizes |= {"image_size": 32, "patch_size": 8, "id2label": dict(enumerate("abcde"))}
    torch.manual_seed(0)
    if distilled:
        stock = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**sizes))
    else:
        stock = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    for parameter in stock.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    stock.eval().save_pretrained(tmp_path)
    transformers.ViTImageProcessor(image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(tmp_path)
    found = read_checkpoint(tmp_path)
    assert found.config.id2label == dict(enumerate("abcde")) and found.config.layer_norm_eps == 1e-12
    assert found.image_mean == [0.4] * 3 and found.image_std == [0.3] * 3
    ours = CLASSES[distilled].from_original(tmp_path)
    assert ours.config.head_fusion == "logits" and ours.config.drop_path_rate == 0.0
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(pixel_values).logits, stock(pixel_values).logits)
    theirs = random_timm(distilled, **NARROW)
    with caplog.at_level(logging.WARNING):
        theirs.load_state_dict(ours.to_original())
    assert "layer_norm_eps 1e-12 (there 1e-6), num_attention_heads 2" in caplog.text
    assert (theirs(pixel_values) - stock(pixel_values).logits).abs().max() < 1e-4  # the epsilons differ


def test_a_directory_of_timm_tells_its_pixels(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)  # normalised by 0.5, unlike DeiT
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    found = read_checkpoint(tmp_path)
    assert list(found.image_mean) == list(found.image_std) == [0.5] * 3
    assert torch.equal(found.weights["vit.embeddings.cls_token"], theirs.cls_token)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_sharded_directory_is_read_whole_or_not_at_all(tmp_path, distilled):
    model = CLASSES[distilled].from_original(random_timm(distilled, **NARROW).state_dict(), num_attention_heads=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_equal(read_checkpoint(tmp_path).weights, model.state_dict())
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"cannot read .*{shards[0].name}"):
        read_checkpoint(tmp_path)
    index = {"weight_map": {"one": shards[1].name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not fit.* missing: .*layernorm.weight"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it has no config.json"),
        ({"config.json": '{"model_type": "deit"}'}, "does not appear to have a file named model.safetensors"),
        ({"config.json": '{"model_type": "swin"}', "model.safetensors": ""}, "type 'swin'; expected 'deit' or 'vit'"),
        ({"config.json": "{", "model.safetensors": ""}, "config.json of .* cannot be read"),
    ],
)
def test_a_directory_of_something_else_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path)


def test_what_does_not_exist_is_refused():
    for source, message in (
        ("nowhere.pth", "'nowhere.pth' does not exist"),
        ("no/such", "cannot read 'no/such' as a file, directory or Hub id: .*connect"),
    ):
        with pytest.raises(ValueError, match=message):
            read_checkpoint(source)


# --- What a conversion decides -----------------------------------------------------------------------------------


@pytest.mark.parametrize("distilled", [False, True])
def test_positions_are_resized_on_the_way_and_the_tokens_stay(distilled):
    theirs = random_timm(distilled, **NARROW)
    ours = CLASSES[distilled].from_original(theirs.state_dict(), image_size=48, num_attention_heads=2)
    expected = resample_abs_pos_embed(
        theirs.pos_embed.detach(), [6, 6], num_prefix_tokens=1 + distilled, antialias=False
    )
    assert ours.config.image_size == 48
    torch.testing.assert_close(ours.to_original()["pos_embed"], expected, rtol=0, atol=1e-6)


def test_a_grid_that_is_not_square_must_be_given():
    weights = random_timm(False, **(NARROW | {"img_size": (16, 40)})).state_dict()
    with pytest.raises(ValueError, match=r"10 patches, not a square number: pass image_size"):
        read_checkpoint(weights, num_attention_heads=2)
    model = DeiTForImageClassification.from_original(weights, image_size=(16, 40), num_attention_heads=2)
    assert tuple(model.config.image_size) == (16, 40)
    assert_equal(model.to_original(), weights)


@torch.no_grad()
def test_the_fusion_is_the_authors_unless_the_papers_is_asked_for(tmp_path, caplog):
    weights = random_timm(True, **NARROW).state_dict()
    model_class = DeiTForImageClassificationWithTeacher
    model_class.from_original(weights, num_attention_heads=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head_fusion"] == "logits" and config["layer_norm_eps"] == 1e-6
    papers = model_class.from_original(weights, num_attention_heads=2, head_fusion="softmax")
    outputs = papers(torch.randn(2, 3, 32, 32))
    probabilities = (outputs.cls_logits.softmax(-1) + outputs.distillation_logits.softmax(-1)) / 2
    torch.testing.assert_close(outputs.logits.softmax(-1), probabilities)
    papers.to_original()
    assert "head_fusion 'softmax' (there the mean of both heads' logits)" in caplog.text


def test_a_converted_model_is_the_callers_weights_in_their_precision_but_not_in_their_memory():
    weights = {name: tensor.half() for name, tensor in random_timm(True, **NARROW).state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    model = DeiTForImageClassificationWithTeacher.from_original(weights, num_attention_heads=2)
    assert model.dtype == torch.float16 and not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_equal(model.to_original(), weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_equal(weights, kept)


# --- What is refused ---------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, save):
    file, trace = tmp_path / "deit.pth", tmp_path / "it_ran"
    save({"model": random_timm(False, **NARROW).state_dict(), "args": Bomb(trace)}, file)
    with pytest.raises(ValueError, match="more than weights.* If you trust the code .* save its tensors") as caught:
        DeiTForImageClassification.from_original(file)
    assert not trace.exists() and "weights_only" not in str(caught.value)
    with open(file, "rb") as content:  # the bomb is real
        torch.load(content, weights_only=False) if save is torch.save else pickle.load(content)
    assert trace.exists()


@pytest.mark.parametrize("hub_names", [False, True])
@pytest.mark.parametrize("distilled", [False, True])
def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named(hub_names, distilled):
    def read(weights):
        return read_checkpoint(weights, num_attention_heads=2)

    whole = random_timm(distilled, **NARROW).state_dict()
    if hub_names:
        whole = read(whole).weights
    assert_equal(read(whole).weights, read(read(whole).weights).weights)
    for name in whole:
        rest = {key: tensor for key, tensor in whole.items() if key != name}
        with pytest.raises(ValueError, match=rf"missing: [^;]*{name}"):
            read(rest)
        with pytest.raises(ValueError, match=rf"of another shape: {name} "):
            read(rest | {name: whole[name][None]})
    with pytest.raises(ValueError, match=r"unexpected: extra.weight, optimizer$"):
        read(whole | {"extra.weight": torch.ones(1), "optimizer": torch.ones(1)})
    attention = "attention.attention.query.weight" if hub_names else "attn.proj.weight"
    name = next(name for name in whole if name.endswith(attention))
    with pytest.raises(ValueError, match=rf"of another shape: {name} \(32, 31\) instead of \(32, 32\)"):
        read(whole | {name: whole[name][:, 1:]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qkv_bias": False}, r"missing: blocks\.\*\.attn\.qkv\.bias \(0, 1, 2\)$"),
        (
            {"init_values": 1e-5},
            r"unexpected: blocks\.\*\.ls1\.gamma \(0, 1, 2\), blocks\.\*\.ls2\.gamma \(0, 1, 2\)$",
        ),
        ({"reg_tokens": 4}, "unexpected: reg_token$"),
        ({"global_pool": "avg"}, "missing: norm.bias, norm.weight; unexpected: fc_norm.bias, fc_norm.weight$"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "missing: cls_token$"),
        ({"no_embed_class": True}, "positions for 15 patches, not a square number"),
        ({"qk_norm": True}, r"unexpected: blocks\.\*\.attn\.k_norm"),
        ({"num_classes": 0}, "missing: head.bias, head.weight$"),
        ({}, "is 32 wide, and no tensor shows its number of attention heads: pass num_attention_heads"),
    ],
)
def test_a_vit_of_another_structure_is_refused_by_name(options, message):
    weights = timm.create_model("vit_tiny_patch16_224", **(NARROW | options)).state_dict()
    with pytest.raises(ValueError, match=message):
        DeiTForImageClassification.from_original(weights)


def test_another_network_is_refused_in_a_readable_message():
    with pytest.raises(ValueError, match="missing: .*cls_token.*unexpected: .*, and [0-9]+ more") as caught:
        read_checkpoint(timm.create_model("resnet18").state_dict())
    assert len(str(caught.value)) < 3000


def test_the_wrong_class_names_the_right_one():
    for distilled in (False, True):
        weights = random_timm(distilled, **NARROW).state_dict()
        for wrong in (CLASSES[not distilled], DeiTModel):
            with pytest.raises(ValueError, match=rf"use {CLASSES[distilled].__name__}\.from_original"):
                wrong.from_original(weights, num_attention_heads=2)


def test_what_the_original_format_does_not_have_is_refused(tmp_path):
    distilled = read_checkpoint(random_timm(True, **NARROW).state_dict(), num_attention_heads=2).config
    with pytest.raises(ValueError, match="missing: cls_classifier.bias, .*; unexpected: classifier.bias"):
        DeiTForImageClassification(distilled).to_original()
    distilled.hidden_act = "relu"
    with pytest.raises(ValueError, match="hidden_act is 'relu'; .* have 'gelu'"):
        DeiTForImageClassificationWithTeacher(distilled).to_original()
    with pytest.raises(ValueError, match="must end in .safetensors, or in .pth"):
        write_original({}, tmp_path / "weights.bin")


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, {"cls_token": [1.0]}])
def test_a_dictionary_that_is_no_state_dict_is_refused(content):
    with pytest.raises(ValueError, match="the dictionary holds no state dict: .*expected tensors by name"):
        read_checkpoint(content)


# --- Class names and the command line ----------------------------------------------------------------------------


def test_class_names_are_lines_and_must_be_as_many_as_the_classes(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("tench, Tinca tinca\ngoldfish\nkäse\n\n", encoding="utf-8")
    id2label = read_class_names(file)
    assert id2label == {0: "tench, Tinca tinca", 1: "goldfish", 2: "käse"}
    weights = random_timm(False, **(NARROW | {"num_classes": 3})).state_dict()
    config = read_checkpoint(weights, num_attention_heads=2, id2label=id2label).config
    assert config.label2id["käse"] == 2
    with pytest.raises(ValueError, match="has 5 classes, but 3 class names"):
        read_checkpoint(random_timm(False, **NARROW).state_dict(), num_attention_heads=2, id2label=id2label)
    for content, message in (("", "are empty"), (None, "cannot be read")):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_class_names(file)


@pytest.fixture
def convert():
    return lambda *words: main([str(word) for word in words])


def test_the_command_line_converts_and_ends_in_one_line_where_it_cannot(tmp_path):
    theirs = random_timm(True, depth=1, num_classes=3)
    torch.save({"model": theirs.state_dict()}, tmp_path / "original.pth")
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")

    def run(*words):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, SCRIPT, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run("original.pth", "hub", "--image_size", "384", "--class_names", "names.txt")
    assert done.returncode == 0, done.stderr
    assert "hub: distilled DeiT" in done.stdout and "3 classes, 384 pixels" in done.stdout
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        *("config.json", "model.safetensors", "preprocessor_config.json")
    ]
    processor = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 384} and processor["crop_size"] == {"height": 384, "width": 384}
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
    model = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / "hub")
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"} and model.config.image_size == 384
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickle.pth")
    failed = run("pickle.pth", "nothing")
    assert failed.returncode == 1 and failed.stderr.startswith("error: cannot read checkpoint 'pickle.pth'")
    assert failed.stderr.count("\n") == 1 and not (tmp_path / "nothing").exists()


def test_the_script_writes_every_format(tmp_path, convert):
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    convert(
        tmp_path / "vit.safetensors", tmp_path / "hub", "--image_mean", 0.5, 0.5, 0.5, "--image_std", 0.5, 0.5, 0.5
    )
    processor = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 256} and processor["crop_size"] == {"height": 224, "width": 224}
    convert(tmp_path / "hub", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()
    assert processor["image_mean"] == processor["image_std"] == [0.5] * 3
    convert(tmp_path / "hub", tmp_path / "timm.safetensors", "--to", "timm")
    convert(tmp_path / "hub", tmp_path / "original.safetensors", "--to", "original")
    convert(tmp_path / "hub", tmp_path / "original.pth", "--to", "original")
    for written in (
        load_file(tmp_path / "timm.safetensors"),
        load_file(tmp_path / "original.safetensors"),
        torch.load(tmp_path / "original.pth", weights_only=True)["model"],
    ):
        assert_equal(written, theirs.state_dict())


def test_the_script_overwrites_nothing(tmp_path, convert, capsys):
    for words, message in (
        ((tmp_path / "vit.pth", tmp_path), "exists already"),
        ((tmp_path / "vit.pth", tmp_path / "x.pth", "--to", "timm"), "must end in .safetensors"),
    ):
        with pytest.raises(SystemExit, match="2"):
            convert(*words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_precision_of_a_converted_checkpoint_stays_and_is_said(caplog, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in random_timm(False, **NARROW).state_dict().items()}
    wrapped = {"model_state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}
    converted = read_checkpoint(wrapped, num_attention_heads=2).weights
    assert {tensor.dtype for tensor in converted.values()} == {dtype}
    told = [record.message for record in caplog.records]
    name = str(dtype).removeprefix("torch.")
    assert told == [f"the state dict is stored in {name}, and stays so; train it in float32"][: dtype != torch.float32]
