"""distillation_trainer.py: what the Trainer does with the paper's method, on one process and on two."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.runs import NO_CHANCE, ConvTeacher, streamed, student, trainer
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, default_data_collator

from hf_deit import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DistillationConfig,
    DistillationTrainer,
    UserError,
    load_teacher,
)
from hf_deit.models.classifiers import new_classifier


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


# Gradients


def first_step(images, output_dir, batch, accumulation):
    gradients = KeepGradients()
    run = trainer(
        images,
        output_dir,
        callbacks=[gradients],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        **NO_CHANCE,
    )
    run.train()
    return run.state.log_history[0]["loss"], gradients.steps[0]


def test_accumulation_changes_neither_loss_nor_gradients(tiny_images, tmp_path):
    loss, gradients = first_step(tiny_images(), tmp_path, 8, 1)
    for batch, accumulation in ((4, 2), (2, 4)):
        other_loss, other = first_step(tiny_images(), tmp_path, batch, accumulation)
        assert other_loss == pytest.approx(loss, abs=1e-5)
        assert max((gradients[name] - other[name]).abs().max().item() for name in gradients) < 1e-5


def test_every_parameter_learns(tiny_images, tmp_path):
    _, gradients = first_step(tiny_images(), tmp_path, 8, 1)
    assert gradients.keys() == dict(student().named_parameters()).keys()
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if not name.endswith("key.bias"))


def run_two_ways(images, output_dir, rank_count):
    """One epoch with a global batch of 8 and an evaluation; what both ways must agree on."""
    run = trainer(
        images, output_dir, per_device_train_batch_size=8 // rank_count, per_device_eval_batch_size=3, **NO_CHANCE
    )
    run.train()
    metrics = run.evaluate() | run.evaluate_teacher()
    if run.is_world_process_zero():
        run.model.save_pretrained(output_dir)
        kept = ("eval_loss", "eval_top1", "eval_class_top1", "eval_distillation_top1", "teacher_top1")
        logs = {
            key: [log[key] for log in run.state.log_history if key in log]
            for key in ("class_loss", "distillation_loss")
        }
        (Path(output_dir) / "figures.json").write_text(json.dumps({key: metrics[key] for key in kept} | logs))


TWO_RANKS = """
import sys
sys.path.insert(0, '{tests}')
import torch; torch.set_num_threads(1)
import conftest
sys.path.insert(0, '{here}')
import test_distillation_trainer as t
t.run_two_ways(conftest.tiny_images.__wrapped__()(48, 23), '{output}', 2)
"""


def test_two_processes_equal_one_with_twice_the_batch(tiny_images, tmp_path):
    """Weights after an epoch, logged parts of the loss, and an evaluation of 23 images that no batch size divides."""
    run_two_ways(tiny_images(48, 23), tmp_path / "one", 1)
    here = Path(__file__).parent
    (tmp_path / "script.py").write_text(TWO_RANKS.format(here=here, tests=here.parent, output=tmp_path / "two"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "0",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            str(tmp_path / "script.py"),
        ],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        check=True,
        timeout=300,
        capture_output=True,
    )
    one, two = (json.loads((tmp_path / way / "figures.json").read_text()) for way in ("one", "two"))
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-4), key
    one, two = (load_file(tmp_path / way / "model.safetensors") for way in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


# The loss


def test_parts_of_the_loss_are_logged_by_name(tiny_images, tmp_path):
    run = trainer(tiny_images(), tmp_path, max_steps=3)
    run.train()
    for line in run.state.log_history[:3]:
        assert line["loss"] == pytest.approx((line["class_loss"] + line["distillation_loss"]) / 2, abs=1e-4)


def test_parts_are_means_over_the_steps_between_two_lines(tiny_images, tmp_path):
    each = trainer(tiny_images(), tmp_path, max_steps=4, **NO_CHANCE)
    each.train()
    together = trainer(tiny_images(), tmp_path, max_steps=4, logging_steps=4, **NO_CHANCE)
    together.train()
    expected = np.mean([line["class_loss"] for line in each.state.log_history[:4]])
    assert together.state.log_history[0]["class_loss"] == pytest.approx(expected, abs=1e-5)


def test_mixed_labels_leave_problem_type_alone(tiny_images, tmp_path):
    run = trainer(tiny_images(), tmp_path, max_steps=2)
    run.train()
    assert run.mixing.mix_prob == 1 and run.model.config.problem_type is None


@pytest.mark.parametrize("kind", ["soft", "label", "none"])
def test_every_kind_of_distillation_trains(tiny_images, tmp_path, kind):
    teacher = "convnet" if kind == "soft" else None
    run = trainer(tiny_images(), tmp_path, student(kind != "none"), teacher, distillation_type=kind, max_steps=2)
    run.train()
    assert ("distillation_loss" in run.state.log_history[0]) == (kind != "none")
    assert {"eval_top1", "eval_loss"} <= run.evaluate().keys()


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_without_the_token_is_distilled_on_its_class_head(tiny_images, tmp_path, kind):
    """Table 3, "usual" and "hard" rows."""
    run = trainer(tiny_images(), tmp_path, student(two_heads=False), distillation_type=kind, max_steps=2)
    run.train()
    assert run.state.log_history[0]["distillation_loss"] > 0


# The teacher


def test_the_teacher_does_not_move_and_is_not_saved(tiny_images, tmp_path):
    run = trainer(tiny_images(), tmp_path, save_strategy="steps", save_steps=3)
    convnet = run.teacher.models[0]
    before = {name: value.clone() for name, value in convnet.state_dict().items()}
    run.train()
    after = convnet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and not convnet.training
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == student().state_dict().keys()
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in convnet.parameters()}


def test_the_teacher_sees_the_mixed_pixels_of_the_student(tiny_images, tmp_path):
    seen = []
    run = trainer(tiny_images(), tmp_path, max_steps=1)
    run.teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    run.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["pixel_values"].clone()), with_kwargs=True
    )
    run.train()
    assert len(seen) == 2 and torch.equal(*seen)


# The optimizer


def test_what_is_decayed_is_the_papers(tiny_images, tmp_path):
    run = trainer(tiny_images(), tmp_path)
    decayed = set(run.get_decay_parameter_names(run.model))
    for name, parameter in run.model.named_parameters():
        free = parameter.ndim == 1 or name.endswith(("cls_token", "position_embeddings"))
        assert (name not in decayed) == free, name


def test_nothing_is_clipped(tiny_images, tmp_path):
    gradients = KeepGradients()
    run = trainer(tiny_images(), tmp_path, callbacks=[gradients], max_steps=1, **NO_CHANCE)
    with torch.no_grad():
        run.model.cls_classifier.weight.mul_(1000)
    run.train()
    norm = torch.cat([g.flatten() for g in gradients.steps[0].values()]).norm().item()
    assert norm > 1 and run.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_total_flos_are_of_the_forward_and_backward_pass(tiny_images, tmp_path):
    model = DeiTForImageClassificationWithTeacher(DeiTConfig.from_size("tiny", num_labels=3))
    run = trainer(tiny_images(), tmp_path, model, max_steps=1, **NO_CHANCE)
    pixels = torch.zeros(2, 3, 224, 224)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(pixel_values=pixels).cls_logits.sum().backward()
    assert run.floating_point_ops({"pixel_values": pixels}) == pytest.approx(counter.get_total_flops(), rel=0.1)


# Functions and overrides of the user


class Plain(DistillationTrainer):
    """The override of every Transformers tutorial."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = 3 * F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class WithPenalty(DistillationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return loss + outputs.logits.square().mean()


def gradients_of(images, output_dir, kind, **fields):
    kept = KeepGradients()
    run = trainer(images, output_dir, callbacks=[kept], kind=kind, max_steps=1, **fields)
    run.train()
    return run, kept.steps[0]


def first_views(run):
    """Pixels as the student sees them, computed with NumPy, and the labels."""
    batch = next(iter(run.get_train_dataloader()))
    mean, std = (np.array(run._pixels[index]).reshape(3, 1, 1) for index in (0, 1))
    pixels = (batch["pixel_values"].numpy() / 255 - mean) / std
    return torch.from_numpy(pixels).float(), batch["labels"]


def test_an_override_of_compute_loss_is_the_loss(tiny_images, tmp_path):
    images = tiny_images()
    run, gradients = gradients_of(images, tmp_path / "plain", Plain, **NO_CHANCE)
    pixels, labels = first_views(run)
    model = student().train()
    (3 * F.cross_entropy(model(pixel_values=pixels).logits, labels)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)

    _, without = gradients_of(images, tmp_path / "without", DistillationTrainer, **NO_CHANCE)
    _, gradients = gradients_of(images, tmp_path / "with", WithPenalty, **NO_CHANCE)
    model.zero_grad()
    model(pixel_values=pixels).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], without[name] + parameter.grad, rtol=1e-4, atol=1e-6)


def test_an_override_of_compute_loss_gets_mixed_views(tiny_images, tmp_path):
    seen = []

    class Watching(Plain):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(dict(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    gradients_of(tiny_images(), tmp_path, Watching)
    assert seen[0].keys() == {"pixel_values", "labels"} and seen[0]["pixel_values"].dtype == torch.float32
    assert seen[0]["labels"].shape == (8, 3) and (seen[0]["labels"].max(dim=1).values < 1).any()


def test_a_loss_without_the_teacher_is_not_recorded(tiny_images, tmp_path):
    with pytest.raises(UserError, match="teacher_record.*compute_loss of Plain does not ask the teacher"):
        gradients_of(tiny_images(), tmp_path, Plain, teacher_record=str(tmp_path / "record"))


def test_a_non_finite_loss_of_an_override_stops_the_run(tiny_images, tmp_path):
    class Broken(Plain):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * float("nan")

    with pytest.raises(FloatingPointError, match="step 1: gradient norm nan"):
        gradients_of(tiny_images(), tmp_path, Broken)


def test_logits_are_preprocessed_for_the_metrics(tiny_images, tmp_path):
    """As in the tutorials that keep the decisions alone: `logits.argmax(-1)`."""
    seen = {}

    def compute_metrics(prediction):
        seen["decisions"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

    options = {
        "compute_metrics": compute_metrics,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(dim=-1),
    }
    run = trainer(tiny_images(), tmp_path, options=options)
    accuracy = run.evaluate()["eval_accuracy"]
    with torch.no_grad():
        batches = [run.model.eval()(normalized(run, batch)).logits.argmax(1) for batch in run.get_eval_dataloader()]
    decisions = torch.cat(batches).numpy()
    assert (seen["decisions"] == decisions).all() and seen["decisions"].shape == (20,)
    assert accuracy == (decisions == np.arange(20) % 3).mean()


def normalized(run, batch):
    mean, std = (torch.tensor(run._pixels[index]).view(3, 1, 1) for index in (0, 1))
    return (batch["pixel_values"] / 255 - mean) / std


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compute_loss_func": F.cross_entropy}, "compute_loss_func is not supported.*Override compute_loss"),
        ({"preprocess_logits_for_metrics": lambda logits, labels: logits}, "Pass compute_metrics too"),
    ],
)
def test_functions_that_would_be_ignored_are_refused(tiny_images, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        trainer(tiny_images(), tmp_path, options=options)


# Evaluation


def test_every_image_counts_once(tiny_images, tmp_path):
    run = trainer(tiny_images(48, 23), tmp_path, per_device_eval_batch_size=4)
    metrics = run.evaluate()
    model = run.model.eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (run.mixing.mean, run.mixing.std))
    pixels = torch.stack([torch.tensor(run.eval_dataset[i]["pixel_values"]).permute(2, 0, 1) for i in range(23)])
    labels = torch.tensor([run.eval_dataset[i]["labels"] for i in range(23)])
    with torch.no_grad():
        outputs = model(pixel_values=(pixels / 255 - mean) / std)
    for key, logits in (
        ("", outputs.logits),
        ("class_", outputs.cls_logits),
        ("distillation_", outputs.distillation_logits),
    ):
        assert metrics[f"eval_{key}top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["eval_loss"] == pytest.approx(nn.functional.cross_entropy(outputs.logits, labels).item(), abs=1e-5)


def test_the_averaged_weights_are_evaluated_beside_the_others(tiny_images, tmp_path):
    run = trainer(tiny_images(), tmp_path, ema_decay=0.9, max_steps=3)
    run.train()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    metrics = run.evaluate()
    assert metrics["eval_ema_loss"] != metrics["eval_loss"]
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())


# A whole run


def test_a_run_leaves_what_it_promises_and_learns(tiny_images, tmp_path, capsys):
    run = trainer(
        tiny_images(192, 30), tmp_path, num_train_epochs=8, learning_rate=3e-3, mix_prob=0.2, eval_strategy="epoch"
    )
    run.train_and_save()
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "README.md", "report.png"):
        assert (tmp_path / name).stat().st_size > 0, name
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"eval_top1", "eval_class_top1", "eval_distillation_top1", "eval_loss", "teacher_top1"} <= results.keys()
    assert results["train_samples_per_second"] > 0 and results["eval_class_top1"] > 0.9
    lines = capsys.readouterr().out
    assert "8 views = 8 x 1 processes x 1 accumulation" in lines and "distillation head" in lines


@pytest.mark.parametrize("stream", [False, True], ids=["on disk", "streamed"])
@pytest.mark.parametrize("augmented", [{}, NO_CHANCE], ids=["with chance", "without"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny_images, tmp_path, augmented, stream):
    images = streamed(tiny_images(), tmp_path) if stream else tiny_images()
    augmented = augmented | {"shuffle_buffer_size": 16}
    whole = trainer(images, tmp_path / "whole", student(drop_path_rate=0.2), num_train_epochs=2, **augmented)
    whole.train()
    fields = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4, "ema_decay": 0.9} | augmented
    trainer(images, tmp_path / "cut", student(drop_path_rate=0.2), **fields).train()
    resumed = trainer(images, tmp_path / "cut", student(drop_path_rate=0.2), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_any_classifier_can_be_trained_as_a_teacher(tiny_images, tmp_path):
    images = tiny_images()
    names = dict(enumerate(images["train"].features["label"].names))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = new_classifier(
        "timm:resnet10t", id2label=names, mean=mean, std=std, image_size=16, model_args={"channels": [8, 8, 8, 8]}
    )
    run = trainer(images, tmp_path, model, None, distillation_type="none", max_steps=2)
    run.train_and_save()
    teacher = load_teacher(str(tmp_path), id2label=names, mean=mean, std=std)
    assert teacher.num_labels == 3


def test_a_set_that_is_not_ours_trains_with_its_own_collator(tmp_path):
    generator = torch.Generator().manual_seed(0)
    examples = [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 3} for i in range(24)]
    args = DistillationConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        distillation_type="label",
        max_steps=2,
        warmup_epochs=0,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        dataloader_num_workers=0,
        save_strategy="no",
    )
    pieces = {"train_dataset": examples, "eval_dataset": examples, "data_collator": default_data_collator}
    with pytest.raises(ValueError, match="mean and std of the pixels are unknown"):
        DistillationTrainer(student(), args, **pieces)
    run = DistillationTrainer(student(), args, mean=(0, 0, 0), std=(1, 1, 1), **pieces)
    run.train()
    assert run.state.global_step == 2 and run.evaluate()["eval_loss"] > 0


# What is refused


def test_distillation_without_a_teacher_is_refused(tiny_images, tmp_path):
    with pytest.raises(ValueError, match="'hard' and there is no teacher"):
        trainer(tiny_images(), tmp_path, teacher=None)


def test_a_head_that_would_learn_nothing_is_refused(tiny_images, tmp_path):
    with pytest.raises(ValueError, match="distillation head, which would stay untrained"):
        trainer(tiny_images(), tmp_path, teacher=None, distillation_type="none")


def test_a_batch_larger_than_the_set_is_refused(tiny_images, tmp_path):
    run = trainer(tiny_images(), tmp_path, per_device_train_batch_size=32, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="takes 64 views and the training set has 48 images: lower per_device"):
        run.train()


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tiny_images, tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.cls_classifier.bias[0] = float("nan")

    run = trainer(
        tiny_images(), tmp_path, callbacks=[Poison()], save_strategy="steps", save_steps=2, num_train_epochs=5
    )
    with pytest.raises(FloatingPointError, match="step 5: gradient norm nan, learning rate 0.00.*class_loss': nan"):
        run.train()
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


# Damaged images


def odd_files(folder):
    """Twelve and more kinds of files; the damaged ones with the reason that must be given, the others with None."""
    folder.mkdir()
    y, x = np.mgrid[:40, :56]
    colour = Image.fromarray(np.stack([x * 4, y * 6, 200 - x - y], axis=-1).astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = colour.quantize(32)
    deep = Image.fromarray((x * 1000).astype(np.uint16))
    pictures = {
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "grey.jpg": (colour.convert("L"), {}),
        "progressive.jpg": (colour, {"progressive": True}),
        "broken_exif.jpg": (colour, {"exif": b"Exif\0\0no TIFF header"}),
        "turned.jpg": (colour, {"exif": turned}),
        "palette_with_transparency.png": (palette, {"transparency": 3}),
        "sixteen_bits.png": (deep, {}),
        "animated.gif": (colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
        "one_pixel.png": (colour.crop((0, 0, 1, 1)), {}),
        "ribbon.jpg": (colour.resize((900, 1)), {}),
        "picture.webp": (colour, {}),
    }
    for name, (image, options) in pictures.items():
        image.save(folder / name, **options)
    jpeg = (folder / "progressive.jpg").read_bytes()
    png = bytearray((folder / "sixteen_bits.png").read_bytes())
    png[png.index(b"IDAT") + 30] ^= 0xFF
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(bytes(99)), b"IEND"]
    damaged = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "zero_bytes.jpg": (b"", "empty: 0 bytes"),
        "text.jpg": (b"<html>Not Found</html>", "no image that Pillow can identify"),
        "bomb.png": (
            b"\x89PNG\r\n\x1a\n"
            + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks),
            "900000000 pixels",
        ),
        "corrupt_chunk.png": (bytes(png), "broken data stream"),
    }
    for name, (data, _) in damaged.items():
        (folder / name).write_bytes(data)
    reasons = dict.fromkeys(pictures) | {name: reason for name, (_, reason) in damaged.items()}
    return reasons | {"missing.jpg": "No such file"}


def file_rows(paths):
    return [{"image": {"bytes": None, "path": str(path)}, "label": number % 3} for number, path in enumerate(paths)]


def test_damaged_and_odd_files_train_to_the_end_and_are_accounted_for(tiny_images, tmp_path):
    reasons = odd_files(tmp_path / "images")
    images = {"train": file_rows(tmp_path / "images" / name for name in reasons), "eval": tiny_images()["eval"]}
    assert len(reasons) == 17
    images["train"] += images["train"][:7]  # whole ones, for three batches of eight
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "_bad_images.txt").write_text("index\tpath\treason\n3\tof another run\tx\n")
    run = trainer(
        images,
        tmp_path / "run",
        num_repeats=1,
        random_crop="random_resized",
        max_bad_images=0.3,
        dataloader_num_workers=2,
        num_train_epochs=2,
    )
    run.train_and_save()
    assert run.state.global_step == 6
    listed = [line.split("\t") for line in (tmp_path / "run" / "_bad_images.txt").read_text().splitlines()[1:]]
    expected = {str(tmp_path / "images" / name): reason for name, reason in reasons.items() if reason is not None}
    assert len(listed) == len(expected) == 6  # in two epochs every image was met twice, so the others were used
    for index, path, reason in listed:
        assert images["train"][int(index)]["image"]["path"] == path and expected[path] in reason
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["bad_images"] == 6


def test_too_many_damaged_images_stop_the_run(tiny_images, tmp_path):
    images = {"train": list(tiny_images()["train"]), "eval": tiny_images()["eval"]}
    images["train"][5] = file_rows(["/nowhere/5.jpg"])[0]
    run = trainer(images, tmp_path, num_repeats=1)
    with pytest.raises(
        ValueError, match=r"1 of 48 training images are damaged .*max_bad_images = 0.001.*bad_images.txt"
    ):
        run.train()
    assert "5\t/nowhere/5.jpg\tcannot be read" in (tmp_path / "_bad_images.txt").read_text()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_set_of_damaged_files_stops_with_the_error(tiny_images, tmp_path, num_workers):
    names = [name for name, reason in odd_files(tmp_path / "images").items() if reason is not None]
    images = {"train": file_rows(tmp_path / "images" / name for name in 2 * names), "eval": tiny_images()["eval"]}
    run = trainer(images, tmp_path, dataloader_num_workers=num_workers, max_bad_images=1)
    with pytest.raises(ValueError, match="12 training images in a row are damaged"):
        run.train()


def test_evaluation_with_a_damaged_image_stops_and_names_it(tiny_images, tmp_path):
    images = {"train": tiny_images()["train"], "eval": list(tiny_images()["eval"])}
    images["eval"][11] = file_rows(["/nowhere/11.jpg"])[0]
    with pytest.raises(ValueError, match=r"evaluation image number 11 \(path /nowhere/11.jpg\) is damaged: cannot be"):
        trainer(images, tmp_path, max_bad_images=1).evaluate()


# --- classes of unequal size ---------------------------------------------------------------------------------------


def uneven(images):
    """40 red, 6 green and 2 blue images."""
    labels = np.array(images["train"]["label"])
    wanted = np.concatenate([np.flatnonzero(labels == 0).repeat(3)[:40], np.flatnonzero(labels == 1)[:6]])
    return images | {"train": images["train"].select(np.append(wanted, np.flatnonzero(labels == 2)[:2]))}


def test_class_weights_are_those_of_the_training_set_and_reach_the_loss(tiny_images, tmp_path):
    built = trainer(uneven(tiny_images()), tmp_path, class_weighting="inverse", **NO_CHANCE)
    torch.testing.assert_close(built.class_weights, 48 / (3 * torch.tensor([40.0, 6.0, 2.0])))
    batch = next(iter(built.get_train_dataloader()))
    pixels = built.mixing(batch["pixel_values"], batch["labels"], batch["view_seeds"])[0]
    with torch.no_grad():
        loss = built.compute_loss(built.model.eval(), batch)
        outputs, teacher = built.model(pixel_values=pixels), built.teacher(pixels)
    weighted = F.cross_entropy(
        outputs["cls_logits"], batch["labels"], built.class_weights, reduction="sum", label_smoothing=0.1
    )
    taught = F.cross_entropy(outputs["distillation_logits"], teacher.argmax(1))
    torch.testing.assert_close(loss, weighted / 8 / 2 + taught / 2)
    assert built.evaluate()["eval_loss"] == pytest.approx(
        trainer(uneven(tiny_images()), tmp_path, **NO_CHANCE).evaluate()["eval_loss"]
    )


def test_balanced_sampling_shows_every_class_equally_often(tiny_images, tmp_path):
    built = trainer(uneven(tiny_images()), tmp_path, balanced_sampling=True)
    labels = torch.cat([batch["labels"] for batch in built.get_train_dataloader()])
    assert sorted(labels.bincount().tolist()) == [15, 15, 18]  # 16 places of 3 views
    assert built.args.view_settings()["balanced_sampling"] is True
    assert trainer(tiny_images(), tmp_path).args.view_settings()["balanced_sampling"] is None


def test_a_balanced_run_resumes_bit_for_bit(tiny_images, tmp_path):
    images, options = uneven(tiny_images()), {"balanced_sampling": True, "save_strategy": "steps", "save_steps": 4}
    whole = trainer(images, tmp_path / "whole", **options, num_train_epochs=2)
    whole.train()
    resumed = trainer(images, tmp_path / "resumed", **options, num_train_epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("options", [{"balanced_sampling": True}, {"class_weighting": "inverse"}])
def test_a_stream_does_not_know_the_sizes_of_its_classes(tiny_images, tmp_path, options):
    images = streamed(tiny_images(), tmp_path)
    with pytest.raises(ValueError, match=f"^{next(iter(options))} needs the labels of all training images") as caught:
        trainer(images, tmp_path / "out", **options).get_train_dataloader()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balanced_sampling": True, "class_weighting": "inverse"}, "balanced_sampling is True and class_weighting"),
        ({"balanced_sampling": True, "shuffle_buffer_size": 0}, "balanced_sampling is True and shuffle_buffer_size"),
        ({"class_weighting": "some"}, "class_weighting is 'some'; choose one of none, inverse"),
        ({"teacher_image_size": 0}, "teacher_image_size is 0; it must be 1 or more"),
        ({"teacher_image_size": 8}, r"teacher_image_size is 8, but the teacher was loaded for \(16, 16\)"),
    ],
)
def test_options_of_classes_and_teacher_that_do_not_fit(tiny_images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tiny_images(), tmp_path, **options)


def test_balanced_accuracy_chooses_the_best_checkpoint_of_an_uneven_set(tiny_images, tmp_path):
    images = uneven(tiny_images())
    best = {"load_best_model_at_end": True, "metric_for_best_model": "balanced_accuracy", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="metric_for_best_model is 'balanced_accuracy'; it must be one of loss, top1"):
        trainer(images, tmp_path / "even", eval_strategy="epoch", **best)
    ran = trainer(images | {"eval": images["train"]}, tmp_path / "uneven", eval_strategy="epoch", **best)
    ran.train()
    assert ran.state.best_metric == ran.state.log_history[-2]["eval_balanced_accuracy"]


def test_a_teacher_sees_views_of_its_size(tiny_images, tmp_path):
    """`teacher_image_size` is part of the settings that a record is for."""
    network = ConvTeacher()
    sizes = []
    network.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    options = {"id2label": None, "mean": (0.5,) * 3, "std": (0.5,) * 3, "student_size": 16}
    teacher = load_teacher(network, image_size=24, **options)
    sizes.clear()
    ran = trainer(tiny_images(), tmp_path, teacher=teacher, teacher_image_size=24, max_steps=1)
    ran.train()
    assert set(sizes) == {(24, 24)} and ran.args.view_settings()["teacher_image_size"] == 24
