"""What a stranger could have written cannot run code or write outside output_dir: checkpoints, recipes, images, data,
names. Each attack is refused with a message or comes to nothing.

Where code would run, the payload creates a file, so a test that finds none has seen the attack fail. That a pickle in
a `.pth` file is refused is in test_classifiers.py, what a card may say of this machine in test_model_card.py.
"""

import hashlib
import importlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import EpsImagePlugin, Image
from support.cards import DISTILLED
from support.hub_server import card_errors
from support.recipes import SHORT, TINY

from hf_deit import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    load_image_dataset,
    load_teacher,
)
from hf_deit.data.decoding import DamagedImage, decode_image
from hf_deit.errors import UserError, run_script
from hf_deit.models.classifiers import new_classifier
from hf_deit.plots.analysis import plot_confusion
from hf_deit.training.checkpoints import (
    MANIFEST,
    checkpoint_to_resume,
    committed,
    facts_of,
    remove_unfinished,
    verify_checkpoint,
)
from hf_deit.training.model_card import as_text, build_model_card


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NAMES = {number: str(number) for number in range(10)}


@pytest.fixture
def mark(tmp_path):
    """The file that a payload creates when it runs."""
    path = tmp_path / "code-ran"
    yield path
    assert not path.exists()


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("hf_deit.commands.distill")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder: `teacher` and `student` (directories), and `run` with a checkpoint after each of two steps."""
    folder = tmp_path_factory.mktemp("good")
    convnet = new_classifier(
        "timm:resnet10t", id2label=NAMES, image_size=32, model_args={"channels": [8, 8, 8, 8]}, **PIXELS
    )
    convnet.save_pretrained(folder / "teacher")
    fields = TINY | {"image_size": 32, "patch_size": 4, "id2label": NAMES}
    DeiTForImageClassificationWithTeacher(DeiTConfig(**fields)).save_pretrained(folder / "student")
    plain = DeiTConfig(use_distillation_token=False, **fields)
    DeiTForImageClassification(plain).save_pretrained(folder / "plain")
    return folder


@pytest.fixture
def run(script, good, tmp_path, monkeypatch):
    """Runs run_distill.py in `tmp_path / "run"`; returns the message it ends with, or None where it finishes."""
    monkeypatch.setattr("hf_deit.plots.run.plot_run", lambda *args, **kwargs: None)

    def start(*arguments, first=()):
        options = SHORT | {"teacher": good / "teacher", "output_dir": tmp_path / "run"}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        try:
            run_script(lambda: script.main([*map(str, first), *words, *map(str, arguments)]))
        except SystemExit as end:
            return str(end.code)

    return start


# --- directories of weights ----------------------------------------------------------------------------------------


@pytest.fixture
def changed(good, tmp_path):
    """A copy of a directory of weights with other fields in its config.json."""

    def change(name, **fields):
        shutil.copytree(good / name, tmp_path / "weights")
        file = tmp_path / "weights" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return tmp_path / "weights"

    return change


CODE = dict.fromkeys(("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor"), "evil.C")


def foreign_code(folder, mark):
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")


def test_code_beside_a_known_model_is_not_looked_at(changed, mark):
    folder = changed("teacher", auto_map=CODE)
    foreign_code(folder, mark)
    assert load_teacher(str(folder), id2label=NAMES, **PIXELS).num_labels == 10


def test_an_unknown_model_with_code_is_refused(changed, mark):
    folder = changed("teacher", model_type="evil", auto_map=CODE)
    foreign_code(folder, mark)
    with pytest.raises(ValueError, match="cannot load model .* contains custom code which must be executed"):
        load_teacher(str(folder), id2label=NAMES, **PIXELS)


def test_an_image_processor_with_code_is_refused_without_asking(changed, mark, monkeypatch):
    folder = changed("plain")
    foreign_code(folder, mark)
    processor = {"image_processor_type": "Evil", "auto_map": CODE}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    with pytest.raises(ValueError, match="cannot (load|read)"):
        load_teacher(str(folder), id2label=NAMES, **PIXELS)
    assert not asked


@pytest.mark.parametrize(
    "kernel", ["evil/kernel", "paged|evil/kernel", {"": "evil/kernel"}, {"vision_config": "e/k:f"}, 1]
)
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_config_cannot_have_a_kernel_downloaded(changed, name, kernel):
    with pytest.raises(UserError, match=f"{name} in .*config.json' is .*; expected one of eager, sdpa, "):
        load_teacher(str(changed("plain", **{name: kernel})), id2label=NAMES, **PIXELS)


def test_a_nested_config_cannot_have_a_kernel_downloaded(changed):
    folder = changed("plain", vision_config={"text": [{"attn_implementation": "evil/kernel"}]})
    with pytest.raises(UserError, match="'evil/kernel'; expected one of eager"):
        load_teacher(str(folder), id2label=NAMES, **PIXELS)


@pytest.mark.parametrize("name", ["kernels-community/flash-attn", "evil/kernel:f", "nope"])
def test_no_kernel_is_downloaded_for_a_student(run, good, name):
    for first in ([], ["--model_name_or_path", good / "student"]):
        end = run("--attn_implementation", name, *first)
        assert end.startswith(f"error: attn_implementation is {name!r}; expected one of eager, sdpa, ")
    student = DeiTForImageClassification.from_pretrained(good / "plain")
    with pytest.raises(UserError, match="expected one of eager"):
        student.set_attn_implementation(name)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", b"[" * 100_000, "is no valid JSON"),
        ("config.json", b"[1]", "is a list; expected keys and values"),
        ("config.json", b" " * (17 << 20), "is larger than 16,777,216 bytes"),
        ("preprocessor_config.json", b"{" * 100_000, "is no valid JSON"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "../../x.safetensors"}}',
            "is no name of a file beside",
        ),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "/dev/zero"}}', "is no name of a file beside"),
        ("model.safetensors.index.json", b'{"weight_map": [1]}', "is damaged"),
    ],
)
def test_json_of_a_model_has_limits(changed, file, content, message):
    folder = changed("plain")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file}' .*{message}"):
        load_teacher(str(folder), id2label=NAMES, **PIXELS)


@pytest.mark.parametrize(
    "fields, message",
    [
        (lambda evil: {"model_args": {"checkpoint_path": evil}}, "weights_only=True blocked loading this checkpoint"),
        (lambda evil: {"architecture": f"local-dir:{Path(evil).parent}"}, "Config file not found"),
    ],
    ids=["checkpoint_path", "local-dir"],
)
def test_a_config_that_points_to_a_pickle_elsewhere_is_refused(changed, tmp_path, mark, fields, message):
    torch.save(Payload(mark), tmp_path / "evil.pth")
    folder = changed("teacher", **fields(str(tmp_path / "evil.pth")))
    with pytest.raises(ValueError, match=f"cannot load model .*{message}"):
        load_teacher(str(folder), id2label=NAMES, **PIXELS)


def test_a_pickle_in_place_of_the_teachers_weights_is_refused(changed, mark):
    folder = changed("plain")
    (folder / "model.safetensors").unlink()
    torch.save(Payload(mark), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load model .*no file named model.safetensors"):
        load_teacher(str(folder), id2label=NAMES, **PIXELS)


def test_a_pickle_in_place_of_the_students_weights_is_refused(changed, run, mark):
    folder = changed("student")
    (folder / "model.safetensors").unlink()
    torch.save(Payload(mark), folder / "pytorch_model.bin")
    assert f"cannot load model '{folder}'" in run("--model_name_or_path", folder)


# --- checkpoints of a run ------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(run, tmp_path):
    """A checkpoint that a run has written, in a run that can go on."""
    assert run("--save_strategy", "steps", "--save_steps", "1", "--output_dir", tmp_path / "before") is None
    return tmp_path / "before" / "checkpoint-1"


def list_in_manifest(checkpoint, *files):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for file in files:
        content = (checkpoint / file).read_bytes()
        manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_refused(run, checkpoint, mark, file):
    torch.save(Payload(mark), checkpoint / file)
    list_in_manifest(checkpoint, file)
    end = run("--resume_from_checkpoint", checkpoint)
    assert end.startswith(f"error: checkpoint {str(checkpoint)!r} holds a pickle") and "\n" not in end


@pytest.mark.parametrize("file", ["training_args.bin", "pytorch_model.bin"])
def test_a_pickle_that_nobody_needs_is_not_opened(run, checkpoint, mark, file):
    torch.save(Payload(mark), checkpoint / file)
    list_in_manifest(checkpoint, file)
    assert run("--resume_from_checkpoint", checkpoint) is None


def test_a_history_with_foreign_objects_changes_nothing(run, checkpoint, tmp_path, mark):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = "/etc"
    state["stateful_callbacks"] = {
        name: {"args": {"x": 1}, "attributes": {"__class__": 1, "on_step_end": "x"}} for name in ("Preemption", "os")
    }
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    list_in_manifest(checkpoint, "trainer_state.json")
    assert run("--resume_from_checkpoint", checkpoint) is None
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2


CONTENT = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}


@pytest.mark.parametrize(
    "manifest, problem",
    [
        ("[]", "cannot be read"),
        ("null", "cannot be read"),
        ('{"files": [1]}', "cannot be read"),
        ('{"files": {"model.safetensors": "x"}}', "cannot be read"),
        ({"a\0b": CONTENT}, "is missing|null byte"),
        ({".": CONTENT}, "is missing"),
        ({"pipe": CONTENT}, "is missing"),
        ({"zeros": CONTENT}, "is missing|leads out"),
        ("[" * 100_000, "cannot be read"),
        ({"{outside}": CONTENT}, "leads out"),
        ({"../../outside": CONTENT}, "leads out"),
        ({"link": CONTENT}, "leads out"),
        ({}, "model.safetensors"),
    ],
    ids=lambda value: str(value)[:20].replace("\0", "0"),
)
def test_a_hostile_manifest_is_a_damaged_one(tmp_path, manifest, problem):
    (tmp_path / "outside").write_text("secret")
    folder = tmp_path / "run" / "checkpoint-4"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("secret")
    if isinstance(manifest, dict):
        files = {name.format(outside=tmp_path / "outside"): entry for name, entry in manifest.items()}
        if "pipe" in files:
            os.mkfifo(folder / "pipe")
        for name, target in {"zeros": "/dev/zero", "link": "../../outside"}.items():
            if name in files:
                os.symlink(target, folder / name)
        manifest = json.dumps({"run": {}, "files": files})
    (folder / MANIFEST).write_text(manifest)
    assert re.search(problem, verify_checkpoint(folder))
    with pytest.raises(ValueError, match="are damaged|holds the link"):
        checkpoint_to_resume(tmp_path / "run", "auto")


@pytest.mark.parametrize("manifest", ["[]", "null", "[" * 100_000, '{"run": "x"}'], ids=lambda text: text[:12])
def test_the_facts_of_a_hostile_manifest_are_none(tmp_path, manifest):
    (tmp_path / MANIFEST).write_text(manifest)
    assert facts_of(tmp_path) == {}


@pytest.mark.parametrize("name", ["checkpoint-2", "README.md", "all_results.json", "_bad_images.txt"])
def test_a_link_in_output_dir_is_refused_and_not_followed(run, tmp_path, name):
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "run" / name
    elsewhere.mkdir()
    target.parent.mkdir()
    (elsewhere / "file").write_text("{}")
    target.symlink_to(elsewhere if "." not in name else elsewhere / "file")
    end = run("--save_strategy", "steps", "--save_steps", "1")
    assert [path.name for path in elsewhere.iterdir()] == ["file"] and (elsewhere / "file").read_text() == "{}"
    assert end.startswith("error: output_dir ") and repr(name) in end


def test_a_checkpoint_is_not_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    aside = tmp_path / "run" / "_unfinished"
    aside.symlink_to(tmp_path / "elsewhere")
    remove_unfinished(tmp_path / "run")  # as a run does before it begins
    seen = []
    with committed(tmp_path / "run", "checkpoint-1", {}):
        (aside / "checkpoint-1").mkdir(parents=True)
        seen = list((tmp_path / "elsewhere").iterdir())
    assert not seen


# --- recipes and names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "dataset_name: !!python/object/apply:pathlib.Path.touch ['{mark}']",
        "dataset_name: !!python/object/new:os.system ['touch {mark}']",
        "? !!python/name:os.system\n: 1",
        "a: &a [*a]",
    ],
)
def test_a_recipe_with_objects_is_refused(run, tmp_path, mark, line):
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(line.format(mark=mark))
    assert run(first=[recipe]).startswith(f"error: recipe {str(recipe)!r} ")


@pytest.mark.parametrize(
    "key", ["../output_dir", "output_dir/../x", "__class__", "output_dir\nseed", "args.output_dir"]
)
def test_a_recipe_with_a_strange_key_is_refused(run, tmp_path, key):
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(json.dumps({key: "x"}))
    end = run(first=[recipe])
    assert "which is no key" in end and "\n" not in end


def test_a_recipe_cannot_call_a_function(script, tmp_path, monkeypatch):
    (tmp_path / "evil_factory.py").write_text(f"def make():\n    open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = tmp_path / "evil.yaml"
    keys = SHORT | {"teacher": "python:evil_factory:make", "dataset_name": "digits", "learning_rate": 1e-3}
    recipe.write_text(json.dumps(keys | {"image_size": 32, "output_dir": str(tmp_path / "run")}))
    with pytest.raises(SystemExit, match="error: recipe .*python:evil_factory:make.*command line"):
        run_script(lambda: script.main([str(recipe)]))
    assert not (tmp_path / "ran").exists()


HOSTILE_NAMES = ["../x", "https://evil.example/x", "a; touch code-ran", "$(touch code-ran)", "`id`", "x/../../y"]
HOSTILE_NAMES += ["a/b\nc"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("key, message", [("teacher", "model"), ("dataset_name", "dataset")])
def test_a_hostile_name_is_only_a_name_nobody_knows(run, tmp_path, mark, monkeypatch, key, message, name):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    end = run(f"--{key}", name)
    assert end.startswith("error: ") and message in end and "\n" not in end
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_repository_is_refused_before_training(run, name):
    end = run("--push_to_hub", "true", "--hub_model_id", name)
    assert end.startswith(f"error: cannot push to {name!r} on the Hub: Repo id must ")
    assert end.endswith("Training has not begun: fix this first")


# --- images --------------------------------------------------------------------------------------------------------


def png(width, height, *chunks):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, *chunks, b"IDAT" + zlib.compress(bytes(99)), b"IEND"]
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg(width, height):
    """8 x 8 pixels whose header claims more."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def gif(width, height):
    buffer = io.BytesIO()
    Image.new("P", (8, 8)).save(buffer, "GIF")
    return b"GIF89a" + struct.pack("<HH", width, height) + buffer.getvalue()[10:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
HOSTILE_IMAGES = {
    "PNG of 900 megapixels": (png(30_000, 30_000), "900000000 pixels"),
    "PNG of 2**62 pixels": (png(2**31 - 1, 2**31 - 1), "pixels"),
    "PNG without width": (png(0, 5), ""),
    "PNG with text that unpacks": (png(4, 4, b"zTXtk\0\0" + zlib.compress(bytes(2**24), 9)), "Decompressed data"),
    "JPEG of 4 gigapixels": (jpeg(65_000, 65_000), "4225000000 pixels"),
    "JPEG without height": (jpeg(8, 0), ""),
    "GIF of 4 gigapixels": (gif(65_000, 65_000), "4225000000 pixels"),
    "EPS": (EPS, "no image that Pillow can identify"),
    "SVG": (
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>x</script></svg>",
        "no image that Pillow can identify",
    ),
    "WMF": (b"\xd7\xcd\xc6\x9a\0\0" + bytes(100), "no image that Pillow can identify"),
    "pickle": (pickle.dumps([1, 2, 3]), "no image that Pillow can identify"),
}


@pytest.mark.parametrize("data, reason", HOSTILE_IMAGES.values(), ids=HOSTILE_IMAGES)
def test_a_hostile_image_is_a_damaged_one_whatever_it_is_called(tmp_path, monkeypatch, data, reason):
    (tmp_path / "image.jpg").write_bytes(data)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript runs"))
    with pytest.raises(DamagedImage, match=reason):
        decode_image({"bytes": None, "path": str(tmp_path / "image.jpg")})
    with pytest.raises(DamagedImage, match=reason):
        decode_image({"bytes": data, "path": None})


def test_a_picture_under_another_name_is_the_picture(tmp_path):
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    for format in ("PNG", "GIF", "BMP", "WEBP", "TIFF"):
        red.save(tmp_path / "image.jpg", format)
        assert decode_image({"bytes": None, "path": str(tmp_path / "image.jpg")}).shape == (3, 4, 3)


# --- data sets -----------------------------------------------------------------------------------------------------


def parquet_set(folder, metadata=None, label=None):
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    images = [{"bytes": buffer.getvalue(), "path": "../../../etc/passwd"}] * 4
    table = pa.table({"image": images, "label": pa.array([0, 1, 0, 1])})
    if label is not None:
        table = table.cast(pa.schema([table.schema.field("image"), label]))
    table = table.replace_schema_metadata(metadata)
    for split in ("train", "test"):
        parquet.write_table(table, folder / f"{split}.parquet")
    return str(folder)


def features(label):
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}


def test_a_path_inside_a_parquet_file_is_not_opened(tmp_path):
    images = load_image_dataset(parquet_set(tmp_path / "set", features({"_type": "ClassLabel", "names": ["a", "b"]})))
    assert decode_image(images["train"][0]["image"]).shape == (8, 8, 3)  # from the bytes beside it


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "path", ["/dev/zero", "../outside.png", "{folder}/../outside.png", "file:///etc/passwd", "{folder}x/1.png"]
)
def test_a_path_in_place_of_an_image_does_not_lead_out_of_the_folder(tmp_path, path, streaming):
    folder = Path(parquet_set(tmp_path / "set"))
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "inside.png")
    (tmp_path / "outside.png").write_bytes((folder / "inside.png").read_bytes())

    def rows_with(name):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        image = pa.array([{"bytes": None, "path": name.format(folder=folder)}] * 4, kind)
        metadata = features({"_type": "ClassLabel", "names": ["a", "b"]})
        table = pa.table({"image": image, "label": [0, 1, 0, 1]}).replace_schema_metadata(metadata)
        for split in ("train", "test"):
            parquet.write_table(table, folder / f"{split}.parquet")
        return load_image_dataset(str(folder), streaming=streaming)["train"][0]

    assert decode_image(rows_with("{folder}/inside.png")["image"])[0, 0].tolist() == [9, 9, 9]
    with pytest.raises(UserError, match="which is not inside .* and is not opened"):
        rows_with(path)


def test_a_tar_cut_between_two_samples_is_refused(tmp_path):
    whole = {}
    for split in ("train", "test"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number in range(4):
                for suffix, data in (("png", png_of(number)), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                if number == 1:
                    border = buffer.tell()
        whole[split] = buffer.getvalue()
        (tmp_path / f"{split}-000.tar").write_bytes(whole[split])
    assert len(load_image_dataset(str(tmp_path))["train"]) == 4
    (tmp_path / "train-000.tar").write_bytes(whole["train"][:border])
    with pytest.raises(UserError, match="train-000.tar' was cut: it ends at byte .* so images may be missing"):
        load_image_dataset(str(tmp_path))
    (tmp_path / "train-000.tar").write_bytes(whole["train"] * 2)
    with pytest.raises(UserError, match="train-000.tar' holds more than one archive"):
        load_image_dataset(str(tmp_path))


def png_of(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_pickled_type_in_a_parquet_file_stays_a_pickle(tmp_path, mark):
    extension = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload(mark)),
    }
    folder = parquet_set(tmp_path / "set", label=pa.field("label", pa.int64(), metadata=extension))
    with pytest.raises(ValueError, match="set image_column to one of them"):
        load_image_dataset(folder)


@pytest.mark.parametrize(
    "metadata",
    [features({"_type": "json"}), features({"_type": "Path", "x": 1}), {"huggingface": "{"}],
    ids=["a module", "no feature", "no JSON"],
)
def test_features_that_are_none_are_refused(tmp_path, metadata):
    folder = parquet_set(tmp_path / "set", metadata)
    with pytest.raises(ValueError, match=f"{folder}/.* cannot be read"):
        load_image_dataset(folder)


def test_a_script_in_a_data_set_is_not_run(tmp_path, mark):
    folder = parquet_set(tmp_path / "set", features({"_type": "ClassLabel", "names": ["a", "b"]}))
    for name in ("set.py", "train.py", "__init__.py"):
        (tmp_path / "set" / name).write_text(f"open({str(mark)!r}, 'w')")
    assert len(load_image_dataset(folder)["train"]) == 4


def test_the_name_of_a_reader_of_pickles_reads_none(tmp_path, mark, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.pkl").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match="dataset 'pandas' could not be loaded"):
        load_image_dataset("pandas")


def image_folders(root, classes=("a", "b")):
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(root / split / name / "1.png")
    return str(root)


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    root = image_folders(tmp_path / "set")
    (tmp_path / "set" / "train" / "a" / "again").symlink_to(".")
    assert len(load_image_dataset(root)["train"]) == 2


EVIL = 'x"\n---\nlicense: gpl\n---\n# <script>alert(1)</script> | `a` ![b](http://evil.example/b) {{ 7 * 7 }}'


def test_class_names_are_text_and_no_paths(tmp_path):
    names = ["..", "a\nb: c", "<b>", "{{ 7 * 7 }}", "a/b", "| x |", "`id`", "'; touch x"]
    metadata = features({"_type": "ClassLabel", "names": names})
    images = load_image_dataset(parquet_set(tmp_path / "set", metadata))
    assert images["train"].features["label"].names == names
    config = DeiTConfig(id2label=dict(enumerate(names)), image_size=32, patch_size=8, **TINY)
    DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"set", "model"}
    assert list(DeiTConfig.from_pretrained(tmp_path / "model").id2label.values()) == names
    cells = [[number, number, 1] for number in range(8)]
    plot_confusion(tmp_path / "model" / "x.png", label="..", classes=names, cells=cells)
    assert {path.name for path in tmp_path.iterdir()} == {"set", "model"}


def test_a_class_name_is_no_formula(tmp_path):
    plot_confusion(tmp_path / "x.png", label="x", classes=["$\\frac{$", "$$"], cells=[[0, 0, 3], [1, 0, 1], [1, 1, 1]])


# --- the model card ------------------------------------------------------------------------------------------------


def hostile_card():
    return str(
        build_model_card(
            replace(
                DISTILLED,
                name=EVIL,
                model_id=EVIL,
                architecture=EVIL,
                base_model=EVIL,
                dataset=EVIL,
                dataset_id=None,
                dataset_terms=EVIL,
                eval_split=EVIL,
                data=[EVIL],
                teacher=EVIL,
                settings={EVIL: (EVIL, None)},
                command=["run.py", "--x", EVIL, "```\n# out of the block"],
            )
        )
    )


def test_names_bring_neither_markdown_nor_front_matter_into_a_card():
    card = hostile_card()
    parsed = ModelCard(card)
    assert card_errors(card) == [] and parsed.data.license == "apache-2.0"
    lines = parsed.text.splitlines()
    start, end = lines.index("````bash"), lines.index("````")
    code = ("classify =", "# import hf_deit")
    outside = "\n".join(line for line in lines[:start] + lines[end:] if not line.startswith(code))
    titles = [
        line for line in outside.splitlines() if line.startswith("#") and not line.startswith("# import hf_deit")
    ]
    assert titles[1:] == ["## Accuracy", "## Dataset", "## Training", "## Use", "## Limits"]  # after the card's own
    assert not [line for line in outside.splitlines() if line == "---" or line.startswith("license:")]
    assert "<script>" not in outside and "](http://evil" not in outside.replace("\\](", "")
    assert "{{ 7 * 7 }}" in outside  # and no 49: a name is no template
    row = next(line for line in lines if line.endswith("| unset |"))
    assert row.replace("\\|", "").count("|") == 4


def test_the_code_of_a_card_is_what_it_was(tmp_path):
    lines = hostile_card().splitlines()
    call = next(line for line in lines if line.startswith("classify ="))
    called = []
    exec(call, {"pipeline": lambda task, model: called.append((task, model))})
    assert called == [("image-classification", EVIL)]


@pytest.mark.parametrize(
    "name, text",
    [
        ("user/my_deit-2.0 (new)", "user/my_deit-2.0 (new)"),
        ("a\r\n b\t\u202ec\x1b[2J", "a b c \\[2J"),
        ("<a>|[b]`c`\\", "\\<a\\>\\|\\[b\\]'c'\\\\"),
        ("模型 é", "模型 é"),
        (None, None),
    ],
)
def test_a_name_as_text(name, text):
    assert as_text(name) == text


def test_the_card_of_a_run_in_a_hostile_directory(run, tmp_path):
    """The output directory's name is the model's where no repository is named."""
    folder = tmp_path / "a]`<b>\n# c"
    assert run("--output_dir", folder) is None
    card = ModelCard((folder / "README.md").read_text("utf-8"))
    titles = [line for line in card.text.splitlines() if line.startswith("#")]
    assert titles[0] == "# a\\]'\\<b\\> # c" and "# c" not in titles
