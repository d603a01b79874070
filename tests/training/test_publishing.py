"""From a run to the Hub and back, over HTTP: what goes up, what stays, and what a failure says."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image
from support.hub_client import RECIPE, TEACHER, Client, run
from support.runs import student, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_deit import DeiTForImageClassificationWithTeacher, UserError
from hf_deit.data.decoding import BAD_IMAGES_FILE


ROOT = Path(__file__).resolve().parents[2]
UPLOADED = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
# The trainer of run_distill.py, held in the hand: `new(**overrides)`.
PIECES = """
    import time
    from hf_deit.commands import distill as run_distill
    from hf_deit import DistillationTrainer
    time.sleep = lambda seconds: None  # the client's patience between two attempts

    class Caught(Exception): pass

    def new(**overrides):
        def keep(trainer):
            raise Caught(trainer)
        DistillationTrainer.train_and_save = keep
        words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
        try:
            run_distill.main([RECIPE, "--teacher", "python:small_teacher:make", *words])
        except Caught as caught:
            return caught.args[0]

    def failure(action):
        try:
            action()
        except ValueError as error:
            return str(error)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where a client works: the recipe, its teacher's code and an image."""
    (tmp_path / "small_teacher.py").write_text(textwrap.dedent(TEACHER))
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    return tmp_path


def usage_code(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def test_a_recipe_pushes_its_run_to_a_private_repository_which_loads_everywhere(hub, folder):
    """`push_to_hub: true`, with checkpoints; then its card's code, Auto classes, revisions, and who may read."""
    recipe = RECIPE | {"push_to_hub": True, "hub_private_repo": True, "hub_model_id": "user/tiny"}
    recipe |= {"hub_strategy": "checkpoint", "output_dir": "outputs/run"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    words = [ROOT / "recipes" / "run_distill.py", "recipe.yaml", "--hub_token", hub.token]
    words += ["--teacher", "python:small_teacher:make"]  # code, so not in the recipe
    done = run(words, hub, folder, "")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["model", "user/tiny"]
    files = hub.files("model", "user/tiny")
    local = folder / "outputs" / "run"
    assert repository.private and files.keys() >= UPLOADED | {"report.png", "last-checkpoint/optimizer.pt"}
    assert all(files[name] == (local / name).read_bytes() for name in UPLOADED)
    teacher = np.arange(7680, dtype=np.float32)[:100].tobytes()
    assert [name for name, content in files.items() if teacher in content or "teacher" in name] == []
    assert [name for name, content in files.items() if hub.token.encode() in content] == []
    first = next(commit for commit in repository.branches["main"] if "model.safetensors" in commit.files)
    assert "step 1" in first.title and "in progress**: 1 of 2 steps" in first.files["README.md"].data.decode()

    card = ModelCard(files["README.md"].decode())
    results = json.loads((local / "all_results.json").read_text())
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured["top-1 accuracy, both heads, fused"] == results["eval_top1"]
    assert measured["top-5 accuracy, distillation head"] == results["eval_distillation_top5"]
    assert f"top-1 {100 * results['teacher_top1']:.2f} % on the same images" in card.text
    assert str(folder) not in str(card) and 'model="user/tiny"' in card.text and "20 held-out images" in card.text
    assert "| max_steps | 2 | -1 |" in card.text and "| batch size | 16 | 1024 |" in card.text
    assert "run_distill.py recipe.yaml --teacher python:small_teacher:make\n" in card.text

    with Client(hub, folder, hub.token) as client:
        reads = """
            import contextlib, io, torch
            from huggingface_hub import ModelCard
            from transformers import AutoImageProcessor, AutoModelForImageClassification
            ModelCard(CARD).validate()
            def use(code):
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, {})
                return out.getvalue().strip()
            model = AutoModelForImageClassification.from_pretrained("user/tiny")
            pinned = AutoModelForImageClassification.from_pretrained("user/tiny", revision=REVISION)
            answer = {"module": type(model).__module__, "label": use(CODE), "labels": model.config.id2label,
                      "size": AutoImageProcessor.from_pretrained("user/tiny").crop_size["height"],
                      "moved": float((model.cls_classifier.weight - pinned.cls_classifier.weight).abs().max())}
        """
        client(f"CARD, REVISION, CODE = {str(card)!r}, {first.id!r}, {usage_code(card.text)!r}")
        stock = client(reads)
        assert stock["module"].startswith("transformers.") and stock["size"] == 16
        assert stock["moved"] > 0 and stock["label"] in set(stock["labels"].values()) == set("0123456789")
        ours = client(
            "CODE = CODE.replace('# import hf_deit', 'import hf_deit')\nimport hf_deit\n" + textwrap.dedent(reads)
        )
        assert ours["module"].startswith("hf_deit.") and ours["moved"] == stock["moved"]
        assert ours["label"] in set("0123456789")
        refused = client("""
            answer = []
            for token in (False, "hf_stranger"):
                try:
                    AutoModelForImageClassification.from_pretrained("user/tiny", token=token, force_download=True)
                except OSError as error:
                    answer.append(str(error))
        """)
        assert len(refused) == 2


def test_a_push_fails_in_one_line_loses_nothing_and_succeeds_the_second_time(hub, folder):
    hub.add_repo("model", "stranger/tiny", {"README.md": b"Not yours."})
    with Client(hub, folder, hub.token) as client:
        client(f"RECIPE = 'recipe.yaml'\n{textwrap.dedent(PIECES)}\ntrainer = new(output_dir='tiny')\ntrainer.train()")
        push = "answer = failure(lambda: trainer.push_to_hub({}))"
        safe = (
            "The model is saved in tiny; upload it again: hf upload {} tiny . --exclude 'checkpoint-*' --exclude '_*'"
        )

        def weights():
            return (folder / "tiny" / "model.safetensors").read_bytes()

        # Nothing is there to begin with, so the first failure shows that the model is saved first of all.
        message = client(push.format("token='hf_wrong'"))
        assert "token is missing or not valid" in message and "hf auth login" in message
        assert message.endswith(safe.format("tiny")) and "\n" not in message
        saved = weights()
        hub.down = True
        message = client(push.format(""))
        assert "the connection failed" in message and message.endswith(safe.format("tiny")) and "\n" not in message
        hub.down = False
        assert ("model", "user/tiny") not in hub.repositories

        # The connection breaks in the middle of the weights, more often than the client tries again.
        hub.cut_upload_after(1000, "/store/", count=100)
        message = client(push.format(""))
        hub.cut_requests.clear()
        assert "model.safetensors" not in hub.files("model", "user/tiny")
        assert message.endswith(safe.format("user/tiny")) and "\n" not in message
        command = shlex.split(message.split("again: ")[1])

        # The list of damaged images names places on this machine.
        (folder / "tiny" / BAD_IMAGES_FILE).write_text("index\tpath\treason\n3\t/home/me/3.jpg\tempty\n")

        # Once is no failure. Then once more, as a new commit; the same again is none.
        hub.cut_upload_after(1000, "/store/")
        assert client(push.format("commit_message='First', license='mit'")) is None
        commits = hub.repositories["model", "user/tiny"].branches["main"]
        files = hub.files("model", "user/tiny")
        assert commits[-1].title == "First" and files["model.safetensors"] == saved == weights()
        assert "license: mit" in files["README.md"].decode()
        assert not [name for name, content in files.items() if b"/home/me" in content]
        assert files.keys() >= UPLOADED and not [name for name in files if "optimizer" in name or "check" in name]
        client("trainer.model.cls_classifier.bias.data += 1")
        assert client(push.format("commit_message='Second'")) is None
        assert [commit.title for commit in commits[-2:]] == ["First", "Second"]
        assert hub.files("model", "user/tiny")["model.safetensors"] == weights() != saved

        # Accuracies of weights that have been trained further are not theirs.
        assert "| both heads, fused |" in files["README.md"].decode()
        client("trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))")
        client("trainer.create_model_card()")
        assert "These weights were not evaluated" in (folder / "tiny" / "README.md").read_text()

        # The command that a failed push names does the same without the trainer.
        del hub.repositories["model", "user/tiny"]
        done = run([Path(sys.executable).with_name("hf"), *command[1:]], hub, folder, hub.token)
        assert done.returncode == 0, done.stderr
        assert hub.files("model", "user/tiny").keys() == files.keys()

        message = client(push.format("license='nonsense'"))
        assert '"license" must be one of' in message and "\n" not in message

        # What the Hub would refuse at the end is refused before training.
        message = client("answer = failure(lambda: new(push_to_hub=True, hub_model_id='stranger/tiny'))")
        assert (
            "'stranger/tiny'" in message
            and "belongs to somebody else" in message
            and "Training has not begun" in message
        )
        message = client("answer = failure(lambda: new(push_to_hub=True, hub_model_id='not a name'))")
        assert "'not a name'" in message and "\n" not in message
        assert hub.files("model", "stranger/tiny") == {"README.md": b"Not yours."}

        # Through the script it is one line, too.
        message = client("""
            from hf_deit.errors import run_script
            words = [RECIPE, "--push_to_hub", "true", "--hub_token", "hf_wrong", "--output_dir", "new"]
            words += ["--distillation_type", "label"]
            try:
                run_script(lambda: run_distill.main(words))
            except SystemExit as end:
                answer = end.code
        """)
        assert message.startswith("error: cannot push to 'new' on the Hub: the token is missing or not valid")

        # The model alone, as any of Transformers.
        client("trainer.model.push_to_hub('alone')")
        assert hub.files("model", "user/alone").keys() == {"README.md", "config.json", "model.safetensors"}

        # A background upload of a checkpoint that fails is told, and the training goes on.
        hub.fail_next(100, 403, "user/late/commit")
        client("trainer = new(output_dir='late', push_to_hub=True)\ntrainer.train()")
        hub.failures.clear()
        assert "checkpoint was not uploaded to user/late" in (folder / "stderr.txt").read_text()


# One event file


def event_files(folder):
    return list(folder.rglob("events.out.tfevents.*"))


def scalars(path):
    events = EventAccumulator(str(path)).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_has_one_event_file_with_its_last_evaluation_and_the_teacher(tiny_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trainer(tiny_images(), tmp_path / "run", report_to=["tensorboard"], eval_strategy="epoch")
    before = run.evaluate()
    results = run.train_and_save()
    (file,) = event_files(tmp_path)
    assert tmp_path / "run" in file.parents
    found = scalars(file)
    assert found["train/loss"][-1][0] == 6
    assert [step for step, _ in found["eval/top1"]] == [0, 6, 6]
    assert found["eval/top1"][0][1] == pytest.approx(before["eval_top1"])
    assert found["eval/top1"][-1][1] == pytest.approx(results["eval_top1"])
    assert found["eval/teacher_top1"] == [(6, pytest.approx(results["teacher_top1"]))]
    run.train()
    assert len(event_files(tmp_path)) == 2


def test_the_report_is_a_picture_that_a_notebook_shows(tiny_images, tmp_path):
    run = trainer(tiny_images(), tmp_path / "run")
    with pytest.raises(UserError, match="nothing was logged"):
        run.report()
    run.train()
    report = run.report()
    assert report._repr_png_() == (tmp_path / "run" / "report.png").read_bytes()
    assert report._repr_png_().startswith(b"\x89PNG") and "report.png" in repr(report)


# Adapters


@pytest.fixture
def adapter(tiny_images, tmp_path, monkeypatch):
    """A LoRA adapter of a student with other classes, trained and saved in `adapter/`; the base is in `base/`."""
    monkeypatch.chdir(tmp_path)
    student(id2label={number: str(number) for number in range(7)}).save_pretrained("base")
    base = DeiTForImageClassificationWithTeacher.from_pretrained("base", id2label={0: "red", 1: "green", 2: "blue"})
    heads = ["cls_classifier", "distillation_classifier"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=heads))
    images = tiny_images()
    run = trainer(images, "adapter", model, learning_rate=1e-2)
    run.train_and_save()
    Image.open(io.BytesIO(images["eval"][1]["image"]["bytes"])).save("image.jpg", quality=95)
    return run


def test_the_card_of_an_adapter_loads_it(adapter, tmp_path):
    """The snippet of the card, in a fresh process; its answer is that of the model in memory."""
    assert not Path("adapter", "model.safetensors").exists()
    card = ModelCard.load("adapter/README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "LORA adapter of a DeiTForImageClassificationWithTeacher" in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert "import hf_deit" in code
    code += "\nfor answer in classify('image.jpg'):\n    print(answer['label'], answer['score'])"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    best, *answers = done.stdout.splitlines()
    pixels = adapter.processing_class(Image.open("image.jpg"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = adapter.model.eval()(pixel_values=pixels).logits.softmax(dim=1)[0]
    names = ["red", "green", "blue"]
    found = {name: float(score) for name, score in (line.split() for line in answers)}
    assert best == names[expected.argmax()]
    assert found == {name: pytest.approx(float(value), abs=1e-5) for name, value in zip(names, expected, strict=True)}


def test_an_adapter_merged_into_its_base_loads_into_stock(adapter, tmp_path):
    merged = adapter.model.merge_and_unload().eval()
    merged.save_pretrained("merged")
    code = (
        "import sys, torch; from transformers import AutoModelForImageClassification as Auto\n"
        "torch.manual_seed(0); pixels = torch.randn(2, 3, 16, 16)\n"
        "found = Auto.from_pretrained('merged').eval()(pixel_values=pixels).cls_logits\n"
        "assert 'hf_deit' not in sys.modules; print(found.tolist())"
    )
    environment = dict(os.environ, PYTHONPATH="")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(json.loads(done.stdout)), merged(pixel_values=pixels).cls_logits, rtol=0, atol=1e-5
        )


def test_an_adapter_of_weights_without_a_name_is_warned_of(tiny_images, tmp_path, caplog):
    model = get_peft_model(student(), LoraConfig(r=4, target_modules=["query"]))
    run = trainer(tiny_images(), tmp_path / "adapter", model)
    assert "weights that have no name" in caplog.text
    run.create_model_card()
    assert "has no name" in (tmp_path / "adapter" / "README.md").read_text("utf-8")
