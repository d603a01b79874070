"""The analysis: every number against another way to it, known answers where there are any, the script as a whole."""

import json

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix
from sklearn.metrics.pairwise import cosine_similarity

from hf_deit import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    build_eval_transform,
    build_image_processor,
)
from hf_deit.commands import analyze
from hf_deit.errors import run_script
from hf_deit.evaluation.metrics import Disagreement
from hf_deit.paper import analysis


NAMES = [f"class {number}" for number in range(5)]
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


def predictor(decisions, label="one", head="class"):
    return analysis.Predictor(label, head, label, np.asarray(decisions))


@pytest.fixture
def labels():
    return np.random.default_rng(0).integers(0, 4, 200)  # the fifth class has no image


@pytest.fixture
def predictors(labels):
    rng = np.random.default_rng(1)
    return [
        predictor(np.where(rng.random(200) < 0.7, labels, rng.integers(0, 5, 200)), f"model {i}") for i in range(3)
    ]


def seeded(kind=DeiTForImageClassificationWithTeacher, **fields):
    torch.manual_seed(0)
    distilled = kind is DeiTForImageClassificationWithTeacher
    model = kind(DeiTConfig(**SIZES | {"num_labels": 3, "use_distillation_token": distilled} | fields)).eval()
    with torch.no_grad():  # far from init, where tokens and attention are trivial
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def model():
    return seeded()


@pytest.fixture
def pixel_values():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# --- decisions -----------------------------------------------------------------------------------------------------


def test_the_rate_of_different_decisions_is_counted_one_by_one(predictors, labels):
    predictors = [analysis.ground_truth(labels), *predictors]
    found = analysis.disagreement(predictors)
    rates = np.array(found["rates"])
    for row, one in enumerate(predictors):
        for column, other in enumerate(predictors):
            counted = sum(a != b for a, b in zip(one.decisions, other.decisions)) / 200
            metric = Disagreement().compute(predictions=one.decisions, references=other.decisions)["disagreement"]
            assert rates[row, column] == pytest.approx(counted) == metric
    assert (rates == rates.T).all() and not rates.diagonal().any() and rates[0, 1:].all()
    assert found["names"] == ["ground truth", "model 0", "model 1", "model 2"] and found["images"] == 200


def test_the_table_in_markdown_has_the_numbers_of_the_matrix(predictors):
    found = analysis.disagreement(predictors)
    rows = [line.strip("| ").split(" | ") for line in analysis.disagreement_table(**found).splitlines()]
    assert rows[0] == found["names"]
    assert [row[0] for row in rows[2:5]] == found["names"]
    assert np.array([row[1:] for row in rows[2:5]], dtype=float) == pytest.approx(np.array(found["rates"]), abs=5e-4)


def test_agreement_is_by_true_class(predictors, labels):
    reference = predictors[2]
    found = analysis.agreement_by_class(predictors[:2], reference, NAMES, labels)
    assert found["counts"] == [sum(labels == number) for number in range(5)]
    for one, series in zip(predictors, found["series"]):
        assert series["overall"] == pytest.approx(np.mean(one.decisions == reference.decisions))
        for number in range(4):
            of_class = [a == b for a, b, true in zip(one.decisions, reference.decisions, labels) if true == number]
            assert series["by_class"][number] == pytest.approx(np.mean(of_class), abs=1e-6)
        assert series["by_class"][4] is None


def test_confusion_and_accuracy_are_those_of_scikit_learn(predictors, labels):
    expected = confusion_matrix(labels, predictors[0].decisions, labels=range(5))
    found = analysis.confusion(predictors[0], NAMES, labels)
    matrix = np.zeros((5, 5), dtype=int)
    for true, decision, count in found["cells"]:
        matrix[true, decision] = count
    assert (matrix == expected).all()
    counts = [cell[2] for cell in found["cells"]]
    assert counts == sorted(counts, reverse=True) and min(counts) > 0

    accuracy = analysis.agreement_by_class(predictors[:1], analysis.ground_truth(labels), NAMES, labels)["series"][0]
    assert accuracy["by_class"][:4] == pytest.approx(expected.diagonal()[:4] / expected[:4].sum(axis=1), abs=1e-6)
    assert accuracy["overall"] == pytest.approx(expected.trace() / 200)


def test_the_heads_of_a_model_decide_by_their_best_class():
    best = {head: np.array([[number, 9], [number + 1, 9]]) for number, head in enumerate(("logits", "class"))}
    best |= {"softmax": np.array([[5, 9], [6, 9]]), "distillation": np.array([[7, 9], [8, 9]])}
    found = analysis.predictors_of("m", best)
    assert [one.label for one in found] == ["m: class", "m: distillation", "m: class+distillation"]
    assert [one.decisions.tolist() for one in found] == [[1, 2], [7, 8], [5, 6]]
    (teacher,) = analysis.predictors_of("m", best, is_teacher=True)
    assert teacher.head == "teacher" and teacher.decisions.tolist() == [5, 6]
    (plain,) = analysis.predictors_of("p", {"class": best["class"]})
    assert plain.label == "p" and plain.decisions.tolist() == [1, 2]


def test_several_labels_an_image_are_no_ground_truth():
    with pytest.raises(ValueError, match="several labels an image.*run_eval.py"):
        analysis.ground_truth([[1], [2, 3], []])


@pytest.mark.parametrize(
    "specs, names",
    [
        (["outputs/a", "/other/b/"], ["a", "b"]),
        (["seed0/a", "seed1/a"], ["seed0/a", "seed1/a"]),
        (["timm:deit_tiny?checkpoint=x/y.pth", "a"], ["deit_tiny", "a"]),
        (["timm:a?checkpoint=x", "timm:a?checkpoint=y"], ["timm:a?checkpoint=x", "timm:a?checkpoint=y"]),
    ],
)
def test_names_are_as_short_as_they_can_be(specs, names):
    assert analysis.short_names(specs) == names


def test_a_model_named_twice_is_refused():
    with pytest.raises(ValueError, match="names a model twice"):
        analysis.short_names(["a", "b", "a"])


# --- inside a DeiT -------------------------------------------------------------------------------------------------


def test_token_similarity_is_the_cosine_of_what_the_layers_return(model, pixel_values):
    states = []
    for module in (model.deit.embeddings, *model.deit.encoder.layer, model.deit.layernorm):
        module.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        model(pixel_values)
    expected = [
        [cosine_similarity(image[:1].numpy(), image[1:2].numpy())[0, 0] for image in state] for state in states
    ]
    found = analysis.token_similarity(model, pixel_values.split(2))
    assert found["images"] == 5 and len(found["mean"]) == 4
    assert [*found["mean"], found["output_mean"]] == pytest.approx(np.mean(expected, axis=1), abs=1e-5)
    assert [*found["std"], found["output_std"]] == pytest.approx(np.std(expected, axis=1), abs=1e-5)
    assert found["std"][0] == pytest.approx(0, abs=1e-6) and found["std"][-1] > 1e-3
    tokens = [token.detach().numpy().reshape(1, -1) for token in model.deit.embeddings.prefix_tokens()]
    assert found["parameters"] == pytest.approx(cosine_similarity(*tokens)[0, 0], abs=1e-5)


def test_two_identical_tokens_have_cosine_one(model, pixel_values):
    with torch.no_grad():
        embeddings = model.deit.embeddings
        embeddings.distillation_token.copy_(embeddings.cls_token)
        embeddings.position_embeddings[:, 1] = embeddings.position_embeddings[:, 0]
    found = analysis.token_similarity(model, [pixel_values])
    values = [found["parameters"], found["output_mean"], *found["mean"]]
    assert values == pytest.approx([1] * len(values), abs=1e-5)


def test_one_token_has_no_similarity(pixel_values):
    with pytest.raises(ValueError, match="no distillation token"):
        analysis.token_similarity(seeded(DeiTForImageClassification), [pixel_values])


def test_without_queries_attention_is_uniform(model, pixel_values):
    with torch.no_grad():
        for layer in model.deit.encoder.layer:
            for parameter in layer.attention.attention.query.parameters():
                parameter.zero_()
    found = analysis.attention_maps(model, pixel_values)
    assert (found["layer"], found["layers"], len(found["maps"])) == (3, 3, 5)
    for tokens in found["maps"]:
        assert list(tokens) == ["class", "distillation"]
        for maps in tokens.values():
            assert np.shape(maps["heads"]) == (2, 4, 4)
            assert np.array(maps["heads"]) == pytest.approx(1 / 18, abs=1e-6)
            assert np.array(maps["mean"]) == pytest.approx(1 / 18, abs=1e-6)
            # Uniform attention U is its own square, so three layers of (U + 1) / 2 are 1/8 + 7/8 U.
            assert np.array(maps["rollout"]) == pytest.approx(7 / 8 / 18, abs=1e-6)


@pytest.mark.parametrize("layer", [1, 2, -1])
def test_attention_is_that_of_stock(model, pixel_values, tmp_path, layer):
    model.save_pretrained(tmp_path)
    stock = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        attentions = [each.double().numpy() for each in stock(pixel_values, output_attentions=True).attentions]
    chosen = attentions[layer - 1 if layer > 0 else layer]
    found = analysis.attention_maps(model, pixel_values, layer)["maps"]
    for image, tokens in enumerate(found):
        rollout = np.eye(18)
        for weights in attentions:
            mixed = weights[image].mean(axis=0) + np.eye(18)
            rollout = (mixed / mixed.sum(axis=1, keepdims=True)) @ rollout
        for row, maps in enumerate(tokens.values()):
            expected = chosen[image, :, row, 2:].reshape(2, 4, 4)
            assert np.array(maps["heads"]) == pytest.approx(expected, abs=1e-5)
            assert np.array(maps["mean"]) == pytest.approx(expected.mean(axis=0), abs=1e-5)
            assert np.array(maps["first"]) == pytest.approx(
                attentions[0][image, :, row, 2:].mean(0).reshape(4, 4), abs=1e-5
            )
            assert np.array(maps["rollout"]) == pytest.approx(rollout[row, 2:].reshape(4, 4), abs=1e-5)


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_layer_that_is_not_there_is_refused(model, pixel_values, layer):
    with pytest.raises(ValueError, match=f"attention_layer is {layer}; the model has layers 1 to 3"):
        analysis.attention_maps(model, pixel_values, layer)


def test_filters_are_the_principal_components(model):
    kernels = model.deit.embeddings.patch_embeddings.projection.weight.detach().permute(0, 2, 3, 1).flatten(1)
    reference = PCA(n_components=10, svd_solver="full").fit(kernels.double().numpy())
    found = analysis.patch_filters(model, count=10)
    filters = np.array(found["filters"])
    assert filters.shape == (10, 4, 4, 3)
    assert found["explained"] == pytest.approx(reference.explained_variance_ratio_, abs=1e-6)
    cosines = (filters.reshape(10, -1) * reference.components_).sum(axis=1)
    assert abs(cosines) == pytest.approx(1, abs=1e-4)
    assert all(one.max() == abs(one).max() for one in filters)


@pytest.mark.parametrize("kind", [DeiTForImageClassification, DeiTForImageClassificationWithTeacher])
def test_positions_are_compared_patch_by_patch(kind):
    model = seeded(kind, image_size=[8, 16])
    positions = model.base_model.embeddings.position_embeddings.detach()[0].numpy()
    prefix = len(positions) - 8
    expected = cosine_similarity(positions, positions)[:, prefix:].reshape(-1, 2, 4)
    found = analysis.position_similarity(model)
    assert list(found["tokens"]) == ["class", "distillation"][:prefix]
    for number, values in enumerate(found["tokens"].values()):
        assert np.array(values) == pytest.approx(expected[number], abs=1e-5)
    patches = np.array(found["patches"])
    assert patches == pytest.approx(expected[prefix:].reshape(2, 4, 2, 4), abs=1e-5)
    assert all(patches[row, column, row, column] == 1 for row in range(2) for column in range(4))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"])
def test_timms_models_are_looked_into_as_ours(name, pixel_values):
    torch.manual_seed(0)
    # Two heads of width 96, which no tensor tells.
    theirs = timm.create_model(name, num_classes=3, img_size=16, patch_size=4, depth=2, num_heads=2).eval()
    ours = analysis.as_deit(theirs)
    with torch.no_grad():
        assert ours(pixel_values).logits.numpy() == pytest.approx(theirs(pixel_values).numpy(), abs=1e-5)
    assert analysis.prefix_names(ours) == ["class", "distillation"][: 1 + ("distilled" in name)]


@pytest.mark.parametrize("image_size", [16, 24])
def test_stocks_vit_is_looked_into_as_ours(pixel_values, image_size):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, intermediate_size=48, num_labels=3)
    theirs = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        ours = analysis.as_deit(theirs, image_size)
        pixel_values = torch.nn.functional.interpolate(pixel_values, image_size)
        expected = theirs(pixel_values, interpolate_pos_encoding=True).logits
        assert ours(pixel_values).logits.numpy() == pytest.approx(expected.numpy(), abs=1e-4)
    assert not ours.training


def test_our_own_model_is_taken_as_it_is(model):
    assert analysis.as_deit(model) is model


@pytest.mark.parametrize("network", [torch.nn.Linear(2, 2), timm.create_model("resnet10t", num_classes=3)])
def test_another_network_is_refused(network):
    with pytest.raises(ValueError, match=f"a {type(network).__name__} is not a DeiT or ViT"):
        analysis.as_deit(network)


@pytest.mark.parametrize("count, total", [(4, 100), (1, 9), (5, 3), (3, 3)])
def test_examples_are_spread_over_the_whole_set(count, total):
    found = analysis.spread_evenly(count, total)
    assert len(set(found)) == len(found) == min(count, total) and 0 <= min(found) <= max(found) < total
    if count > 1:
        assert (found[0], found[-1]) == (0, total - 1)


# --- the script ----------------------------------------------------------------------------------------------------


@pytest.fixture
def script():
    return analyze


@pytest.fixture
def place(tmp_path, tiny_images):
    """A set of images, two students and a teacher that is a convnet, all untrained."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    (tmp_path / "data").mkdir()
    for split, rows in tiny_images(eval=20).items():
        rows.to_parquet(str(tmp_path / "data" / f"{'test' if split == 'eval' else split}.parquet"))
    names = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
    processor = build_image_processor(build_eval_transform(16))
    for name, kind in (("student", DeiTForImageClassificationWithTeacher), ("plain", DeiTForImageClassification)):
        seeded(kind, **names).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    config = TimmWrapperConfig(architecture="resnet10t", initializer_range=0.02, **names)
    config.pretrained_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32]}
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "teacher")
    return tmp_path


def options(place, *more):
    names = {"models": f"{place}/student,{place}/plain", "dataset_name": f"{place}/data", "num_workers": "0"}
    names |= {"output_dir": f"{place}/out", "attention_images": "1", "batch_size": "8"}
    return [word for name, value in names.items() for word in (f"--{name}", value)] + list(more)


def test_the_script_writes_a_picture_and_its_numbers_for_every_subject(script, place, capsys):
    script.main(options(place, "--teacher", f"{place}/teacher"))
    printed = capsys.readouterr().out
    assert "teacher: no attention, tokens, filters or positions to show: a ResNet is not a DeiT" in printed
    assert "plain: one token, so no similarity of two" in printed
    inside = [
        f"{subject}_{name}" for subject in ("attention", "filters", "positions") for name in ("student", "plain")
    ]
    subjects = ["disagreement", "accuracy_by_class", "teacher_agreement_by_class", "token_similarity", *inside]
    subjects += [f"confusion_{name}" for name in ("student", "plain", "teacher")]
    pictures = [*subjects, "attention_student_heads", "attention_plain_heads"]
    expected = {f"{name}.json" for name in subjects} | {f"{name}.png" for name in pictures} | {"disagreement.md"}
    assert {path.name for path in (place / "out").iterdir()} == expected
    for name in pictures:
        with Image.open(place / "out" / f"{name}.png") as picture:
            assert len(np.unique(np.array(picture.convert("L")))) > 20, f"{name} is blank"

    numbers = {name: json.loads((place / "out" / f"{name}.json").read_text("utf-8")) for name in subjects}
    table = numbers["disagreement"]
    students = ["student: class", "student: distillation", "student: class+distillation", "plain"]
    assert table["names"] == ["ground truth", *students, "teacher (teacher)"] and table["images"] == 20
    accuracy = {one["label"]: one["overall"] for one in numbers["accuracy_by_class"]["series"]}
    assert [accuracy[name] for name in table["names"][1:]] == pytest.approx(1 - np.array(table["rates"])[0, 1:])
    agreement = {one["label"]: one["overall"] for one in numbers["teacher_agreement_by_class"]["series"]}
    assert [agreement[name] for name in students] == pytest.approx(1 - np.array(table["rates"])[-1, 1:-1])
    assert [one["model"] for one in numbers["token_similarity"]["series"]] == ["student"]
    assert numbers["attention_student"]["captions"] == ["red  (no. 0)"]
    assert "| ground truth |" in (place / "out" / "disagreement.md").read_text("utf-8")


def test_a_picture_is_drawn_from_its_json(tmp_path):
    numbers = {"mean": (0.1, np.float64(0.25)), "name": "é"}
    drawn = {}
    result = analysis.Result("subject", "a/b c", numbers)
    analysis.write_result(tmp_path, result, {"": lambda path, **given: drawn.update({path.name: given})})
    assert drawn == {"a-b-c.png": {"mean": [0.1, 0.25], "name": "é"}}
    assert json.loads((tmp_path / "a-b-c.json").read_text("utf-8")) == drawn["a-b-c.png"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--models", ""], "models is not set"),
        (["--attention_images", "0"], "attention_images is 0"),
        (["--attention_layer", "7"], "attention_layer is 7"),
        (["--models", "{place}/teacher", "--teacher", "{place}/teacher"], "models names the teacher alone"),
        (["--models", "{place}/nothing"], "nothing"),
    ],
)
def test_bad_input_ends_in_one_line(script, place, words, message, monkeypatch):
    monkeypatch.setattr(script, "PLOTS", {name: {} for name in script.PLOTS})  # no pictures: they are slow
    words = [word.format(place=place) for word in words]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run_script(lambda: script.main(options(place, *words)))
