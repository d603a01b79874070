"""What is fuzzed: for each kind of file from outside, a whole one, and what the package does with a changed one.

A target is a function of a folder that holds the changed file. It may end well or with a UserError of one line;
anything else, more than `MAX_SECONDS` or `MAX_BYTES` is a crash. `make fuzz` runs the targets (fuzz.py).
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hf_deit.errors import UserError


MAX_SECONDS, MAX_BYTES = 10, 2 << 30


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        name: of the changed file.
        seeds: whole files, to change; each is read without an error.
        read: reads the file of this name in a folder.
        words: pieces of the format, which a change may insert.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    words: tuple[bytes, ...] = ()


def _photo() -> Image.Image:
    y, x = np.mgrid[:24, :32]
    return Image.fromarray(np.stack([x * 8, y * 10, (x + y) * 4], axis=-1).astype(np.uint8))


def _encoded(*formats: tuple) -> list[bytes]:
    files = []
    for format, mode, options in formats:
        buffer = io.BytesIO()
        _photo().convert(mode).save(buffer, format, **options)
        files.append(buffer.getvalue())
    return files


def _decode(path: Path) -> None:
    from hf_deit.data.decoding import Part, decode_image

    image = {"bytes": path.read_bytes(), "path": None}
    for part in (None, lambda height, width: Part(2, max(1, height // 4))):
        pixels = decode_image(image, part)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def _images(*formats: tuple) -> Target:
    return Target("image", functools.partial(_encoded, *formats), _decode)


def _recipe(path: Path) -> None:
    from hf_deit import DataArguments, ModelArguments
    from hf_deit.options.recipe import parse_recipe

    parse_recipe((ModelArguments, DataArguments), [str(path)])


def _header() -> list[bytes]:
    teacher = {"name": "t", "sha256": "0" * 16, "num_parameters": 1, "device": "cpu"}
    counts = {"images": 8, "classes": 3, "views of a step": 4, "views of a device's batch": 4}
    return [
        json.dumps(
            {
                "kind": kind,
                "top_k": k,
                "steps": 2,
                "teacher": teacher,
                "fingerprint": counts,
                "versions": {},
                "format": 2,
            }
        ).encode()
        for kind, k in (("hard", None), ("soft", 3))
    ]


def _read_header(path: Path) -> None:
    from hf_deit.teachers.record import Header

    header = Header.read(path.parent)
    assert header.bytes_per_epoch >= 0 and header.place_of_checksum(0) >= 0 and header.what and header.answers_of


def _config() -> list[bytes]:
    from hf_deit import DeiTConfig

    return [
        json.dumps(DeiTConfig(id2label={0: "a", 1: "b"}, use_distillation_token=two).to_dict()).encode()
        for two in (0, 1)
    ]


def _read_config(path: Path) -> None:
    from hf_deit import DeiTConfig
    from hf_deit.models.weight_files import check_json_of

    check_json_of(str(path.parent))
    _allow_libraries(lambda: DeiTConfig.from_pretrained(path.parent))


def _allow_libraries(call: Callable) -> None:
    """`load_pretrained` turns every error of the library that reads the file into a UserError."""
    try:
        call()
    except MemoryError:
        raise
    except Exception as error:
        raise UserError("refused") from error


def _checkpoint(name: str) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        import hashlib

        files = _checkpoint_files()
        if name != "checkpoint.json":
            return [files[name]]
        listed = {
            file: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for file, data in files.items()
        }
        return [json.dumps({"run": {"settings": {"seed": 1}, "processes": 1}, "files": listed}).encode()]

    return seeds


@functools.cache
def _checkpoint_files() -> dict[str, bytes]:
    import torch
    from safetensors.torch import save
    from transformers import TrainerState

    state = TrainerState(global_step=3, max_steps=9, epoch=0.5, log_history=[{"loss": 1.0, "step": 1}])
    return {
        "model.safetensors": save({"a": torch.zeros(3)}),
        "trainer_state.json": json.dumps(state.__dict__, default=str).encode(),
    }


def _read_checkpoint(path: Path) -> None:
    from hf_deit.training import checkpoints

    folder = path.parent
    for name, data in _checkpoint_files().items():
        if name != path.name:
            (folder / name).write_bytes(data)
    checkpoints.facts_of(folder)
    problem = checkpoints.verify_checkpoint(folder)
    assert problem is None or "\n" not in problem


def _weights(suffix: str) -> list[bytes]:
    import torch
    from safetensors.torch import save

    if suffix == "safetensors":
        return [save({"a": torch.zeros(3), "b": torch.ones(2, 2)})]
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(3)}, "epoch": 1}, buffer)
    return [buffer.getvalue()]


def _read_weights(path: Path) -> None:
    from hf_deit.models.weight_files import read_weights

    read_weights(path)


def _tar() -> list[bytes]:
    files = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
            for number in range(2):
                for suffix, data in (("jpg", _encoded(("JPEG", "RGB", {}))[0]), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        files.append(buffer.getvalue())
    return files


def _read_tar(path: Path) -> None:
    from hf_deit.files import check_tar

    check_tar(path)


def _parquet() -> list[bytes]:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": data, "path": None} for data in _encoded(("JPEG", "RGB", {}), ("PNG", "RGB", {}))]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features)
    buffer = io.BytesIO()
    rows.to_parquet(buffer)
    return [buffer.getvalue()]


def _read_parquet(path: Path) -> None:
    import datasets

    from hf_deit.data.streaming import StreamedImages

    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    stream = StreamedImages([str(path)], features, image_column="image", label_column="label")
    if 0 < len(stream) < 100:
        stream.__getitems__(list(range(len(stream))))


def _official(layout: str, name: str) -> Target:
    def seeds() -> list[bytes]:
        if name.endswith(".gz"):
            return [gzip.compress(b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in (1, 2, 2)) + bytes(4))]
        if name.endswith(".mat"):
            from scipy.io import savemat

            buffer = io.BytesIO()
            savemat(buffer, {"tstid": np.array([[1, 2]]), "labels": np.array([[1, 2]])})
            return [buffer.getvalue()]
        if name.endswith(".csv"):
            return [b"ImageId,PredictionString\nILSVRC2012_val_00000001,n01 1 2 3 4\n"]
        if name == "real.json":
            return [b"[[1], [2, 3], []]"]
        return [
            json.dumps(
                {
                    "annotations": [{"image_id": 5, "category_id": 7}],
                    "images": [{"id": 5, "file_name": "train_val2018/a/b/1.jpg"}],
                }
            ).encode()
        ]

    def read(path: Path) -> None:
        from scipy.io import savemat

        from hf_deit.data import official_layouts

        root = path.parent
        if layout == "FLOWERS102":
            savemat(root / "imagelabels.mat", {"labels": np.array([[1, 2]])})
            image = root / "jpg" / "image_00001.jpg"
        elif layout == "FASHION_MNIST":
            labels = b"\0\0\x08\1" + (1).to_bytes(4, "big") + b"\3"
            (root / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
            image = root / "x"
        elif layout == "INATURALIST_2018":
            (root / "categories.json").write_text('[{"id": 7, "name": "moth"}]')
            (root / "train2018.json").write_bytes(seeds()[0])
            image = root / "train_val2018" / "a" / "b" / "1.jpg"
        else:
            image = root / "val" / "ILSVRC2012_val_00000001.JPEG"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"")
        found = getattr(official_layouts, layout)
        found.read(root, found.splits[-1])

    return Target(name, seeds, read, (b"0", b"-1", b"null", b"[]", b"../"))


JSON = (
    b"[" * 3000,
    b'{"a":' * 2000,
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 400,
    b'"\\u001b[2J"',
    b"[]",
    b"{}",
    b"true",
)
YAML = (
    b"&a ",
    b"*a",
    b"<<: ",
    b"\t",
    b"---\n",
    b"? ",
    b"!!python/name:os.system ",
    b"[",
    b"{",
    b"- ",
    b"|",
    b"\x1b",
    b": ",
)

TARGETS = {
    "recipe": Target(
        "recipe.yaml",
        lambda: [b"image_size: 32\ndataset_name: digits\nstreaming: false\n", b"model_size: tiny\npatch_size: 4\n"],
        _recipe,
        YAML,
    ),
    "manifest": Target("checkpoint.json", _checkpoint("checkpoint.json"), _read_checkpoint, JSON),
    "record header": Target("record.json", _header, _read_header, JSON),
    "trainer_state": Target("trainer_state.json", _checkpoint("trainer_state.json"), _read_checkpoint, JSON),
    "config": Target("config.json", _config, _read_config, JSON),
    "safetensors": Target("a.safetensors", lambda: _weights("safetensors"), _read_weights, JSON),
    "pth": Target("a.pth", lambda: _weights("pth"), _read_weights),
    "jpeg": _images(
        ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {})
    ),
    "png": _images(("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "RGBA", {}), ("PNG", "1", {}), ("PNG", "I;16", {})),
    "tiff": _images(
        ("TIFF", "RGB", {}),
        ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "CMYK", {"compression": "tiff_adobe_deflate"}),
    ),
    "webp": _images(("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True})),
    "gif": _images(("GIF", "P", {}), ("GIF", "L", {"interlace": 0})),
    "bmp": _images(("BMP", "RGB", {}), ("BMP", "P", {}), ("BMP", "1", {})),
    "jpeg2000": _images(("JPEG2000", "RGB", {}), ("JPEG2000", "L", {})),
    "ppm": _images(("PPM", "RGB", {}), ("PPM", "L", {}), ("PPM", "1", {})),
    "tar": Target("train-0.tar", _tar, _read_tar),
    "parquet": Target("train.parquet", _parquet, _read_parquet),
    "flowers .mat": _official("FLOWERS102", "setid.mat"),
    "fashion .gz": _official("FASHION_MNIST", "t10k-images-idx3-ubyte.gz"),
    "imagenet .csv": _official("IMAGENET", "LOC_val_solution.csv"),
    "imagenet real.json": _official("IMAGENET_REAL", "real.json"),
    "inaturalist .json": _official("INATURALIST_2018", "val2018.json"),
}
