"""The network: equal to stock's and timm's as a function, and better where training needs it."""

import inspect
import math

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from support.models import CLASSES, CLASSIFIERS, scatter, small_batch, small_config, small_model
from transformers.utils.generic import find_labels

from hf_deit.models import modeling_deit
from hf_deit.models.configuration_deit import DeiTConfig
from hf_deit.models.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    add_branch,
    fuse_heads,
)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- The same function as stock's and timm's ---------------------------------------------------------------------


def to_timm(name: str) -> str:
    """timm's name of one of our tensors; query, key and value, which it stacks, are joined by the caller."""
    name = name.replace("vit.", "deit.", 1) if name.startswith("vit.") else name
    renamed = {
        "deit.embeddings.cls_token": "cls_token",
        "deit.embeddings.distillation_token": "dist_token",
        "deit.embeddings.position_embeddings": "pos_embed",
    }
    if name in renamed:
        return renamed[name]
    for ours, theirs in (
        ("deit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("deit.encoder.layer", "blocks"),
        ("deit.layernorm", "norm"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.output.dense", "attn.proj"),
        ("attention.attention.query", "attn.qkv"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("cls_classifier", "head"),
        ("distillation_classifier", "head_dist"),
        ("classifier", "head"),
    ):
        name = name.replace(ours, theirs)
    return name


def timm_twin(model, name: str, **options):
    state = model.state_dict()
    converted = {}
    for key, tensor in state.items():
        if ".key." in key or ".value." in key:
            continue
        if ".query." in key:
            tensor = torch.cat([state[key.replace("query", part)] for part in ("query", "key", "value")])
        converted[to_timm(key)] = tensor
    twin = timm.create_model(name, num_classes=model.config.num_labels, img_size=model.config.image_size, **options)
    twin.load_state_dict(converted, strict=True)
    return twin.eval()


@pytest.mark.parametrize(
    ("size", "image_size"),
    [("tiny", 224), ("tiny", 384), ("small", 224), ("small", 384)],
)
@torch.no_grad()
def test_both_heads_equal_stock_and_timm(tmp_path, size, image_size):
    torch.manual_seed(0)
    config = DeiTConfig.from_size(size, image_size=image_size, num_labels=1000, head_fusion="logits")
    ours = scatter(DeiTForImageClassificationWithTeacher(config))
    ours.save_pretrained(tmp_path)
    stock, report = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    pixel_values = torch.randn(1, 3, image_size, image_size)
    got, expected = ours(pixel_values), stock(pixel_values)
    assert expected.cls_logits.std() > 0.1
    for name in ("logits", "cls_logits", "distillation_logits"):
        assert (got[name] - expected[name]).abs().max() < 1e-5, name
    twin = timm_twin(ours, f"deit_{size}_distilled_patch16_224")
    features = twin.forward_features(pixel_values)
    assert (got.cls_logits - twin.head(features[:, 0])).abs().max() < 1e-5
    assert (got.distillation_logits - twin.head_dist(features[:, 1])).abs().max() < 1e-5
    assert (got.logits - twin(pixel_values)).abs().max() < 1e-5


@torch.no_grad()
def test_the_plain_model_equals_timms():
    torch.manual_seed(0)
    config = DeiTConfig.from_size("tiny", num_labels=10, use_distillation_token=False)
    ours = scatter(DeiTForImageClassification(config))
    twin = timm_twin(ours, "deit_tiny_patch16_224")
    pixel_values = torch.randn(1, 3, 224, 224)
    assert (ours(pixel_values).logits - twin(pixel_values)).abs().max() < 1e-5


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_parameter_counts_are_those_of_table_1(size):
    with torch.device("meta"):
        plain = DeiTForImageClassification(DeiTConfig.from_size(size, num_labels=1000, use_distillation_token=False))
        distilled = DeiTForImageClassificationWithTeacher(DeiTConfig.from_size(size, num_labels=1000))
        plain_twin = timm.create_model(f"deit_{size}_patch16_224")
        distilled_twin = timm.create_model(f"deit_{size}_distilled_patch16_224")
    counts = {}
    for model in (plain, plain_twin, distilled, distilled_twin):
        counts[model] = sum(parameter.numel() for parameter in model.parameters())
    assert counts[plain] == counts[plain_twin]
    assert counts[distilled] == counts[distilled_twin]
    # Section 5.1 and Table 5 count in whole millions, rounded down: 5M, 22M, 86M; 6M and 87M are rounded.
    assert counts[plain] // 10**6 == {"tiny": 5, "small": 22, "base": 86}[size]
    assert round(counts[distilled] / 1e6) == {"tiny": 6, "small": 22, "base": 87}[size]


# --- On disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_weights_travel_to_stock_and_back_bit_for_bit(tmp_path, kind):
    ours = small_model(kind)
    ours.save_pretrained(tmp_path / "ours")
    stock, report = getattr(transformers, kind.__name__).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    stock.save_pretrained(tmp_path / "stock")
    mine, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "stock"))
    assert mine.keys() == theirs.keys() == ours.state_dict().keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    back, report = kind.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())
    pixel_values, *_ = small_batch()
    outputs, expected = back(pixel_values), stock(pixel_values)
    for name in expected:
        if name != "logits" or kind is DeiTForImageClassification:  # the fused logits are fused differently
            torch.testing.assert_close(outputs[name], expected[name], msg=name)


@torch.no_grad()
def test_a_stock_checkpoint_gives_stocks_fused_logits(tmp_path):
    fields = small_config().to_dict()
    known = transformers.DeiTConfig().to_dict().keys()
    stock = transformers.DeiTForImageClassificationWithTeacher(
        transformers.DeiTConfig(**{name: fields[name] for name in fields.keys() & known})
    )
    scatter(stock).save_pretrained(tmp_path)
    ours = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path)
    pixel_values, *_ = small_batch()
    torch.testing.assert_close(ours(pixel_values).logits, stock(pixel_values).logits)
    assert {layer.drop_path_rate for layer in ours.deit.encoder.layer} == {0.0}


@torch.no_grad()
def test_a_plain_model_is_a_vit_on_disk(tmp_path, caplog):
    ours = small_model(DeiTForImageClassification, use_distillation_token=False)
    ours.save_pretrained(tmp_path / "ours")
    vit, report = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    fields = transformers.ViTConfig().to_dict().keys() & vit.config.to_dict().keys()
    vit.config = transformers.ViTConfig(**{name: getattr(vit.config, name) for name in fields})
    vit.save_pretrained(tmp_path / "vit")  # what stock writes: nothing in it says DeiT
    pixel_values, *_ = small_batch()
    expected = vit(pixel_values).logits
    torch.testing.assert_close(ours(pixel_values).logits, expected)
    for folder in ("ours", "vit"):
        back, report = DeiTForImageClassification.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values()) and not back.config.use_distillation_token
        torch.testing.assert_close(back(pixel_values).logits, expected)
        back.save_pretrained(tmp_path / "again")
        mine, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("again", "vit"))
        assert mine.keys() == theirs.keys()
    assert not caplog.records


# --- Init --------------------------------------------------------------------------------------------------------


def test_init_is_the_authors():
    torch.manual_seed(0)
    model = DeiTForImageClassificationWithTeacher(DeiTConfig.from_size("tiny", num_labels=1000))
    for name, parameter in model.named_parameters():
        if "projection" in name:
            # PyTorch's convolution: uniform within 1/sqrt(fan in), whose standard deviation is that over sqrt(3).
            assert parameter.abs().max() <= 768**-0.5
            assert parameter.std().item() == pytest.approx((3 * 768) ** -0.5, rel=0.1)
        elif "layernorm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
            assert abs(parameter.mean()) < 0.004, name
    assert model.deit.layernorm.eps == model.deit.encoder.layer[5].layernorm_after.eps == 1e-6


@torch.no_grad()
def test_class_and_distillation_token_differ_at_init():
    torch.manual_seed(0)
    model = DeiTModel(small_config())
    embeddings = model.embeddings
    assert not torch.equal(embeddings.cls_token, embeddings.distillation_token)
    hidden_states = model.eval()(small_batch()[0]).last_hidden_state
    assert (hidden_states[:, 0] - hidden_states[:, 1]).abs().max() > 0.1


def first_gradient_norm(model) -> float:
    """Norm of the whole gradient of the first step: DeiT-Ti, 224 pixels, 8 images, both heads learn the label."""
    torch.manual_seed(0)
    pixel_values, labels = torch.randn(8, 3, 224, 224), torch.randint(1000, (8,))
    outputs = model.train()(pixel_values)
    loss = (F.cross_entropy(outputs.cls_logits, labels) + F.cross_entropy(outputs.distillation_logits, labels)) / 2
    loss.backward()
    return math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))


def print_first_gradient_norms() -> None:
    """For docs/results.md: `PYTHONPATH=tests python tests/models/test_modeling_deit.py`."""
    torch.manual_seed(0)
    ours = DeiTForImageClassificationWithTeacher(DeiTConfig.from_size("tiny", num_labels=1000))
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 1000}
    torch.manual_seed(0)
    stock = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**sizes))
    norms = {"ours": first_gradient_norm(ours), "stock": first_gradient_norm(stock)}
    print("first gradient norm of DeiT-Ti:", ", ".join(f"{side} {norm:,.1f}" for side, norm in norms.items()))


def test_the_first_gradient_of_deit_ti_is_below_100():
    torch.manual_seed(0)
    model = DeiTForImageClassificationWithTeacher(DeiTConfig.from_size("tiny", num_labels=1000))
    assert 0.1 < first_gradient_norm(model) < 100


# --- Stochastic depth --------------------------------------------------------------------------------------------


def test_drop_path_grows_linearly_over_depth():
    rates = [layer.drop_path_rate for layer in DeiTModel(small_config(drop_path_rate=0.3)).encoder.layer]
    assert rates == pytest.approx([0.0, 0.15, 0.3])
    assert [layer.drop_path_rate for layer in DeiTModel(small_config(num_hidden_layers=1)).encoder.layer] == [0.0]


def test_drop_path_is_per_sample_and_keeps_the_expectation():
    torch.manual_seed(0)
    residual = torch.randn(20_000, 3, 2)
    added = add_branch(residual, torch.ones_like, 0.25) - residual
    dropped = added[:, 0, 0] < 0.5
    # A sample keeps all of its branch, scaled by 1 / (1 - rate), or nothing.
    expected = torch.where(dropped, 0.0, 4 / 3)[:, None, None].expand_as(added)
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-5)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.015)
    assert added.mean() == pytest.approx(1.0, abs=0.02)


def test_drop_path_is_off_in_evaluation():
    model = small_model(drop_path_rate=0.9)
    pixel_values, *_ = small_batch()
    first = model(pixel_values).cls_logits
    assert torch.equal(first, model(pixel_values).cls_logits)
    assert not torch.equal(first, model.train()(pixel_values).cls_logits)


def test_drop_path_drops_attention_and_feed_forward_apart():
    layer = DeiTModel(small_config(num_hidden_layers=2, drop_path_rate=0.5)).train().encoder.layer[1]
    with torch.no_grad():
        # Branches that add 1 and 10 to everything, 2 and 20 when they are kept.
        for linear, value in ((layer.attention.output.dense, 1.0), (layer.output.dense, 10.0)):
            linear.weight.zero_()
            linear.bias.fill_(value)
        torch.manual_seed(0)
        added = layer(torch.zeros(2000, 3, 32))
    values, counts = added[:, 0, 0].unique(return_counts=True)
    assert values.tolist() == [0, 2, 20, 22]
    assert (counts / 2000).tolist() == pytest.approx([0.25] * 4, abs=0.04)


@pytest.mark.parametrize("rate", [0.5, 0.99])
def test_dropped_samples_need_not_be_computed(rate):
    """Bit for bit of what they compute, the same branches are dropped; at 0.99 those of all samples, mostly."""
    model = small_model(drop_path_rate=rate).double().train()
    pixel_values, labels, teacher_logits = small_batch()
    seen, runs = [], []
    for looked_at in (False, True):
        if looked_at:  # a hook on any part of a layer sees every sample
            for layer in model.deit.encoder.layer:
                layer.output.dense.register_forward_hook(lambda layer, inputs, output: seen.append(len(output)))
        model.zero_grad()
        torch.manual_seed(3)
        outputs = model(pixel_values.double(), labels=labels, teacher_logits=teacher_logits.double())
        outputs.loss.backward()
        runs.append(gradients(model) | {"logits": outputs.logits})
    skipped, computed = runs
    assert seen == [4] * 3 and skipped.keys() == computed.keys() and len(skipped) > 50
    for name in skipped:
        torch.testing.assert_close(skipped[name], computed[name], msg=name)


def test_the_last_layer_computes_what_the_heads_read():
    model = small_model().double()
    pixel_values, labels, teacher_logits = small_batch()
    last, runs, sizes = model.deit.encoder.layer[-1], [], []
    inner = last.forward
    for record in (False, True):
        last.forward = lambda *args, **kwargs: sizes.append((output := inner(*args, **kwargs)).shape[1]) or output
        model.zero_grad()
        outputs = model(
            pixel_values.double(),
            labels=labels,
            teacher_logits=teacher_logits.double(),
            output_hidden_states=record,
        )
        outputs.loss.backward()
        runs.append(gradients(model) | {"logits": outputs.logits})
    assert sizes == [2, 18] and outputs.hidden_states[-1].shape[1] == 18
    assert runs[0].keys() == runs[1].keys() and len(runs[0]) > 50
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], msg=name)
    model(pixel_values.double())
    assert sizes[-1] == 2, "having recorded once must not make the model slower"
    assert model.deit(pixel_values.double()).last_hidden_state.shape[1] == 18
    seen = []
    last.layernorm_after.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape[1]))
    model(pixel_values.double())
    assert seen == [18], "who looks into the layer sees all of it"


def test_patches_are_multiplied_as_the_convolution_would():
    torch.manual_seed(0)
    config = small_config(image_size=(24, 32), patch_size=(4, 8))
    embed = DeiTModel(config).embeddings.patch_embeddings.double()
    for pixel_values in (
        image := torch.randn(2, 3, 24, 32).double(),
        image.contiguous(memory_format=torch.channels_last),
    ):
        expected = embed.projection(pixel_values).flatten(2).transpose(1, 2)
        torch.testing.assert_close(embed(pixel_values), expected)
    seen = []
    embed.projection.register_forward_hook(lambda *call: seen.append(call))
    torch.testing.assert_close(embed(pixel_values), expected)
    assert len(seen) == 1


# --- Gradients, precision, backends, compilation -----------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(kind, use_reentrant):
    pixel_values, labels, teacher_logits = small_batch()
    model = small_model(kind, drop_path_rate=0.5, hidden_dropout_prob=0.1).train()
    runs = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            assert all(layer.gradient_checkpointing for layer in model.deit.encoder.layer)
        model.zero_grad()
        torch.manual_seed(3)  # the same dropped branches
        model(pixel_values, labels=labels, teacher_logits=teacher_logits).loss.backward()
        runs.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    plain, checkpointed = runs
    assert plain.keys() == checkpointed.keys() and len(plain) > 30
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], msg=name)


@pytest.fixture
def one_product(monkeypatch):
    """Query, key and value joined, as on a GPU and in a compiled graph."""
    monkeypatch.setattr(modeling_deit, "runs_eagerly_on_cpu", lambda states: False)


def test_one_qkv_product_equals_three(monkeypatch):
    model = small_model()
    pixel_values, labels, teacher_logits = small_batch()
    runs, products, linear = [], [], F.linear
    monkeypatch.setattr(F, "linear", lambda *operands: products.append(operands[1].shape[0]) or linear(*operands))
    for eagerly_on_cpu in (True, False):
        monkeypatch.setattr(modeling_deit, "runs_eagerly_on_cpu", lambda states, value=eagerly_on_cpu: value)
        products.clear()
        model.zero_grad()
        outputs = model(pixel_values, labels=labels, teacher_logits=teacher_logits)
        outputs.loss.backward()
        runs.append(gradients(model) | {"logits": outputs.cls_logits})
        assert (3 * model.config.hidden_size in products) != eagerly_on_cpu
    three, one = runs
    assert three.keys() == one.keys()
    for name in three:
        torch.testing.assert_close(three[name], one[name], msg=name)


def test_a_hook_on_the_query_sees_its_call(one_product):
    model, seen = small_model(), []
    pixel_values, *_ = small_batch()
    before = model(pixel_values).cls_logits
    query = model.deit.encoder.layer[0].attention.attention.query
    query.register_forward_hook(lambda *call: seen.append(call))
    torch.testing.assert_close(model(pixel_values).cls_logits, before)
    assert len(seen) == 1


def test_an_adapter_on_the_query_is_not_bypassed(one_product):
    model = small_model()
    pixel_values, *_ = small_batch()
    before = model(pixel_values).cls_logits

    class Doubled(torch.nn.Linear):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    for layer in model.deit.encoder.layer:
        layer.attention.attention.query.__class__ = Doubled
    assert not torch.allclose(before, model(pixel_values).cls_logits, atol=1e-3)


def test_the_activation_works_in_place_only_where_nobody_looks():
    model = small_model().eval()
    pixel_values, *_ = small_batch()
    layer, seen = model.deit.encoder.layer[0], {}
    with_gradients = model(pixel_values).cls_logits
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).cls_logits, with_gradients)
        handle = layer.intermediate.dense.register_forward_hook(lambda *call: seen.update(dense=call[2]))
        torch.testing.assert_close(model(pixel_values).cls_logits, with_gradients)
        handle.remove()
        layer.activation.register_forward_pre_hook(lambda module, inputs: seen.update(activation=inputs[0]))
        torch.testing.assert_close(model(pixel_values).cls_logits, with_gradients)
    assert seen["dense"].min() < -0.5, "an activated value is never below -0.17"
    torch.testing.assert_close(seen["activation"], seen["dense"])


def test_no_bias_in_qkv():
    model = small_model(qkv_bias=False)
    assert not [name for name in model.state_dict() if "query.bias" in name or "value.bias" in name]
    pixel_values, labels, _ = small_batch()
    model(pixel_values, labels=labels).loss.backward()
    assert model.deit.encoder.layer[0].attention.attention.key.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
@torch.no_grad()
def test_attention_backends_agree_with_sdpa(backend):
    model = small_model()
    pixel_values, *_ = small_batch()
    assert model.config._attn_implementation == "sdpa"
    expected = model(pixel_values).cls_logits
    model.set_attn_implementation(backend)
    torch.testing.assert_close(model(pixel_values).cls_logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attentions_and_hidden_states_are_shown_whatever_the_backend():
    pixel_values, *_ = small_batch()
    for kind in CLASSES:
        model = small_model(kind)
        outputs = model(pixel_values, output_attentions=True, output_hidden_states=True)
        assert [tuple(attention.shape) for attention in outputs.attentions] == [(4, 2, 18, 18)] * 3
        torch.testing.assert_close(torch.stack(outputs.attentions).sum(-1), torch.ones(3, 4, 2, 18))
        assert [tuple(hidden.shape) for hidden in outputs.hidden_states] == [(4, 18, 32)] * 4
        torch.testing.assert_close(outputs.hidden_states[0], model.base_model.embeddings(pixel_values))
        plain = model(pixel_values)
        assert plain.attentions is plain.hidden_states is None
        torch.testing.assert_close(plain[0], outputs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_with_a_float32_loss(dtype):
    pixel_values, labels, teacher_logits = small_batch()
    model = small_model()
    expected = model(pixel_values, labels=labels, teacher_logits=teacher_logits)
    outputs = model.to(dtype).train()(pixel_values, labels=labels, teacher_logits=teacher_logits)
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32 and outputs.logits.dtype == dtype
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    torch.testing.assert_close(model.eval()(pixel_values).cls_logits.float(), expected.cls_logits, rtol=0.1, atol=0.1)


def test_autocast_trains():
    pixel_values, labels, teacher_logits = small_batch()
    model = small_model(drop_path_rate=0.5).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(pixel_values, labels=labels, teacher_logits=teacher_logits)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_and_evaluation_compile_without_a_graph_break(backend):
    pixel_values, labels, teacher_logits = small_batch()
    model = small_model(num_hidden_layers=2, drop_path_rate=0.5)
    expected = model(pixel_values).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)
    model.train()
    compiled(pixel_values, labels=labels, teacher_logits=teacher_logits).loss.backward()
    assert len(gradients(model)) == len(list(model.parameters()))


# --- Heads and losses --------------------------------------------------------------------------------------------


def test_head_fusions_equal_an_independent_computation():
    torch.manual_seed(0)
    cls_logits, distillation_logits = 5 * torch.randn(2, 6, 7, dtype=torch.float64)
    mean = [
        [math.log((a / sum(row_a) + b / sum(row_b)) / 2) for a, b in zip(row_a, row_b)]
        for row_a, row_b in zip(cls_logits.exp().tolist(), distillation_logits.exp().tolist())
    ]
    fused = fuse_heads(cls_logits, distillation_logits, "softmax")
    torch.testing.assert_close(fused, torch.tensor(mean, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    logits = fuse_heads(cls_logits, distillation_logits, "logits")
    torch.testing.assert_close(logits, torch.stack([cls_logits, distillation_logits]).mean(0))
    assert torch.equal(fuse_heads(cls_logits, distillation_logits, "class"), cls_logits)
    assert torch.equal(fuse_heads(cls_logits, distillation_logits, "distillation"), distillation_logits)


def test_softmax_fusion_survives_extreme_logits():
    fused = fuse_heads(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]), "softmax")
    torch.testing.assert_close(fused, torch.full((1, 2), math.log(0.5)))


@pytest.mark.parametrize("head_fusion", ["softmax", "logits", "class", "distillation"])
@torch.no_grad()
def test_the_config_chooses_the_fusion(head_fusion):
    outputs = small_model(head_fusion=head_fusion)(small_batch()[0])
    expected = fuse_heads(outputs.cls_logits, outputs.distillation_logits, head_fusion)
    assert torch.equal(outputs.logits, expected)


def test_the_teacher_reaches_the_distillation_head_only_and_the_label_the_class_head():
    pixel_values, labels, teacher_logits = small_batch()
    model = small_model()
    runs = {}
    changes = {"as is": {}, "teacher": {"teacher_logits": -teacher_logits}, "labels": {"labels": 4 - labels}}
    for name, changed in changes.items():
        model.zero_grad()
        inputs = {"labels": labels, "teacher_logits": teacher_logits} | changed
        model(pixel_values, **inputs).loss.backward()
        runs[name] = [head.weight.grad.clone() for head in (model.cls_classifier, model.distillation_classifier)]
    (cls, distillation), teacher, label = runs["as is"], runs["teacher"], runs["labels"]
    assert torch.equal(cls, teacher[0]) and not torch.allclose(distillation, teacher[1])
    assert torch.equal(distillation, label[1]) and not torch.allclose(cls, label[0])


def smoothed(labels, classes, smoothing):
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def cross_entropy(logits, targets):
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_of_forward_is_equation_3_and_smooths_in_training_only(training):
    pixel_values, labels, teacher_logits = small_batch()
    model = small_model(drop_path_rate=0.0).train(training)
    targets = smoothed(labels, 5, 0.1 if training else 0.0)
    taught = F.one_hot(teacher_logits.argmax(-1), 5)
    outputs = model(pixel_values, labels=labels, teacher_logits=teacher_logits)
    expected = cross_entropy(outputs.cls_logits, targets) / 2 + cross_entropy(outputs.distillation_logits, taught) / 2
    torch.testing.assert_close(outputs.loss, expected)
    outputs = model(pixel_values, labels=labels)
    expected = sum(cross_entropy(outputs[name], targets) / 2 for name in ("cls_logits", "distillation_logits"))
    torch.testing.assert_close(outputs.loss, expected)


def test_the_one_head_class_learns_labels_and_the_teachers_decisions():
    pixel_values, labels, teacher_logits = small_batch()
    model = small_model(DeiTForImageClassification, use_distillation_token=False)
    logits = model(pixel_values).logits
    alone = cross_entropy(logits, F.one_hot(labels, 5))
    taught = cross_entropy(logits, F.one_hot(teacher_logits.argmax(-1), 5))
    torch.testing.assert_close(model(pixel_values, labels=labels).loss, alone)
    outputs = model(pixel_values, labels=labels, teacher_logits=teacher_logits)
    torch.testing.assert_close(outputs.loss, alone / 2 + taught / 2)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_soft_labels_are_used_as_they_are_and_leave_the_config_alone(kind):
    pixel_values, _, _ = small_batch()
    model = small_model(kind, drop_path_rate=0.0).train()
    targets = torch.rand(4, 5).softmax(-1)
    outputs = model(pixel_values, labels=targets)
    logits = (
        [outputs.logits] if kind is DeiTForImageClassification else [outputs.cls_logits, outputs.distillation_logits]
    )
    torch.testing.assert_close(outputs.loss, sum(cross_entropy(part, targets) for part in logits) / len(logits))
    assert model.config.problem_type is None


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_stock_trainer_finds_the_labels_the_loss_and_its_scale(kind):
    assert find_labels(kind) == ["labels"]
    assert kind.accepts_loss_kwargs is False
    pixel_values, labels, _ = small_batch()
    model = small_model(kind)
    outputs = model(pixel_values, labels=labels)
    assert next(iter(outputs)) == "loss"
    as_tuple = model(pixel_values, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.loss) and torch.equal(as_tuple[1], outputs.logits)
    assert not [name for name, parameter in inspect.signature(kind.forward).parameters.items() if parameter.kind == 4]


def test_other_problem_types_are_the_one_head_class_without_a_teacher():
    pixel_values, labels, teacher_logits = small_batch()
    several = torch.eye(5)[labels] + torch.eye(5)[4 - labels]
    one_head = small_model(DeiTForImageClassification, problem_type="multi_label_classification")
    outputs = one_head(pixel_values, labels=several)
    torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, several))
    with pytest.raises(ValueError, match="one label each: use DeiTForImageClassification"):
        small_model(problem_type="multi_label_classification")(pixel_values, labels=several)
    with pytest.raises(ValueError, match="without a teacher"):
        one_head(pixel_values, labels=several, teacher_logits=teacher_logits)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 5]), "labels run from 0 to 5, but the model's 5 classes are numbered from 0"),
        (torch.tensor([-100, 1, 2, 3]), "labels run from -100 to 3"),
        (torch.tensor([0, 1, 2]), r"torch.int64 of shape \(3,\) for logits \(4, 5\)"),
        (torch.rand(4), r"torch.float32 of shape \(4,\)"),
        (torch.rand(4, 3), r"torch.float32 of shape \(4, 3\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        small_model()(small_batch()[0], labels=labels)


def test_a_teacher_that_does_not_fit_is_refused():
    pixel_values, labels, teacher_logits = small_batch()
    model = small_model()
    with pytest.raises(ValueError, match="teacher and student must see the same batch and know the same classes"):
        model(pixel_values, labels=labels, teacher_logits=teacher_logits[:, :3])
    with pytest.raises(ValueError, match="teacher_logits were given without labels"):
        model(pixel_values, teacher_logits=teacher_logits)
    with pytest.raises(ValueError, match="needs the distillation token"):
        DeiTForImageClassificationWithTeacher(small_config(use_distillation_token=False))


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (None, "pixel_values is missing"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8: normalise them"),
        (torch.zeros(3, 32, 32), r"shape \(3, 32, 32\); expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 1, 32, 32), r"shape \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 40), "images are 32x40 pixels and the model's are 32x32"),
    ],
)
def test_images_that_do_not_fit_are_refused(pixel_values, message):
    with pytest.raises(ValueError, match=message):
        small_model()(pixel_values)


def test_a_misspelt_argument_is_an_error():
    with pytest.raises(TypeError, match="label"):
        small_model()(small_batch()[0], label=torch.zeros(4))


if __name__ == "__main__":
    print_first_gradient_norms()
