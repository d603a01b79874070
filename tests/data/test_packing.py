"""packing.py: what is packed is the source, byte for byte or within a bound, however often it was interrupted."""

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_deit import TrainViews, build_train_transform, load_image_dataset
from hf_deit.augmentation.repeated_augmentation import View
from hf_deit.data import packing, streaming
from hf_deit.data.decoding import decode_image
from hf_deit.data.packing import PackSettings, pack_dataset, reduce_image
from hf_deit.data.views import difference_of_views
from hf_deit.teachers.fingerprint import fingerprint_of_images


CLASSES = ["10", 'Zoë\'s "cat", wild', "a.b", "train car"]
SPLITS = {"train": "train", "eval": "validation"}


def encoded(number, kind="JPEG", mode="RGB", size=(20, 14), **options):
    """An image file of noise, whose pixels are told by `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16)[..., 0] * 257)
    elif mode == "RGBA":
        image = Image.fromarray(np.dstack([pixels, pixels[..., :1]]))
    else:
        image = Image.fromarray(pixels).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def files(count):
    """Image files in every mode that a reader may trip over, with their suffixes."""
    kinds = [
        ("jpg", {}),
        ("png", {"kind": "PNG", "mode": "L"}),
        ("jpeg", {"mode": "CMYK"}),
        ("png", {"kind": "PNG", "mode": "I;16"}),
        ("gif", {"kind": "GIF", "mode": "P"}),
        ("png", {"kind": "PNG", "mode": "RGBA"}),
        ("JPG", {"exif": exif(6)}),
        ("bmp", {"kind": "BMP"}),
    ]
    return [(kinds[number % 8][0], encoded(number, **kinds[number % 8][1])) for number in range(count)]


def write_folders(root, split, count):
    for number, (suffix, data) in enumerate(files(count)):
        path = root / split / CLASSES[number % len(CLASSES)] / f"{number:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def make_folders(root):
    write_folders(root, "train", 40)
    write_folders(root, "val", 16)


def make_one_folder(root):
    write_folders(root, ".", 40)


def make_parquet(root):
    root.mkdir()
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=CLASSES)})
    for split, count in (("train", 40), ("test", 16)):
        images = [{"bytes": data, "path": f"{i}.{suffix}"} for i, (suffix, data) in enumerate(files(count))]
        rows = {"image": images, "label": [3 - i % 4 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features).to_parquet(root / f"{split}-00000-of-00001.parquet")


def make_tar(root):
    root.mkdir()
    for split, count in (("train", 40), ("val", 16)):
        with tarfile.open(root / f"{split}-0000.tar", "w") as tar:
            for i, (_, data) in enumerate(files(count)):
                label = json.dumps({"label": CLASSES[i % 4]}).encode()
                for name, written in ((f"{i:03d}.jpg", data), (f"{i:03d}.json", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(written)
                    tar.addfile(member, io.BytesIO(written))


def bytes_of(image):
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def content(rows):
    return [(hashlib.sha256(bytes_of(row["image"])).hexdigest(), row["label"]) for row in rows]


def rows_of(loaded):
    return [loaded[number] for number in range(len(loaded))]


def pack(source, folder, settings=None, **options):
    images = load_image_dataset(str(source))
    splits = {SPLITS[part]: rows for part, rows in images.items()}
    return pack_dataset(splits, folder, settings, place=images.place, **options)


@pytest.fixture
def small_files(monkeypatch):
    """So small that a set of a few images has several files and row groups."""
    monkeypatch.setattr(packing, "FILE_BYTES", 12_000)
    monkeypatch.setattr(streaming, "ROW_GROUP_BYTES", 3_000)


@pytest.mark.parametrize("make", [make_folders, make_one_folder, make_parquet, make_tar])
def test_a_packed_set_is_its_source(tmp_path, make, small_files):
    make(tmp_path / "source")
    source = load_image_dataset(str(tmp_path / "source"))
    packed = pack(tmp_path / "source", tmp_path / "packed")
    assert {split: each.num_images for split, each in packed.items()} == {
        "train": len(source["train"]),
        "validation": len(source["eval"]),
    }
    assert len(packed["train"].files) > 1 and packed["train"].num_reduced == 0
    for streams in (False, True):
        loaded = load_image_dataset(str(tmp_path / "packed"), streaming=streams)
        for part in ("train", "eval"):
            assert loaded[part].features["label"].names == source[part].features["label"].names
            assert content(rows_of(loaded[part])) == content(rows_of(source[part]))
        transform = build_train_transform(16, crop="random_resized")
        one, other = (TrainViews(images["train"], transform, seed=3) for images in (source, loaded))
        views = [View(index % len(one), 2, index) for index in range(20)]
        assert np.array_equal(one.__getitems__(views).pixels, other.__getitems__(views).pixels)
        if not streams:  # so that a record of a teacher's answers fits both
            assert fingerprint_of_images(loaded["train"]) == fingerprint_of_images(source["train"])


def test_digests_and_paths_are_kept_without_directories(tmp_path):
    make_folders(tmp_path / "source")
    named = os.path.join(os.fsencode(tmp_path / "source" / "train" / "10"), b"\xff%.jpg")
    with open(named, "wb") as file:
        file.write(encoded(99))
    pack(tmp_path / "source", tmp_path / "packed")
    table = pq.read_table(tmp_path / "packed" / "train-00000-of-00001.parquet")
    assert table.column_names == ["image", "label", "sha256"]
    rows = table.to_pylist()
    for row in rows:
        assert row["sha256"] == hashlib.sha256(row["image"]["bytes"]).hexdigest()
    assert rows[0]["image"]["path"] == "train/10/000.jpg"
    assert "train/10/%FF%25.jpg" in [row["image"]["path"] for row in rows]
    features = datasets.Features.from_arrow_schema(table.schema)
    assert features["image"] == datasets.Image() and features["label"] == datasets.ClassLabel(names=CLASSES)
    assert not [name for name in os.listdir(tmp_path / "packed") if not name.endswith(".parquet")]


def test_row_groups_and_files_are_of_the_size_that_is_said(tmp_path, monkeypatch):
    sizes = [30, 5_000, 400, 400, 400, 2_800, 300, *[10] * 40]
    names = ["a", "b"]
    monkeypatch.setattr(streaming, "ROW_GROUP_BYTES", 3_000)
    monkeypatch.setattr(streaming, "ROW_GROUP_IMAGES", 16)
    with (tmp_path / "a.parquet").open("wb") as file:
        writer = streaming.ParquetWriter(file, names)
        for number, size in enumerate(sizes):
            writer.add(bytes(size), None, number % 2, "")
        writer.finish({"key": "value"})
    footer = pq.read_metadata(tmp_path / "a.parquet")
    groups = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    assert groups == [1, 1, 3, 1, 16, 16, 9]  # 30 | 5,000 | 3 x 400 | 2,800 | 300 and 15 x 10 | ...
    assert footer.metadata[b"key"] == b"value"
    assert not footer.row_group(0).column(0).is_stats_set


def test_a_damaged_page_of_a_packed_file_is_noticed(tmp_path):
    make_folders(tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed")
    path = tmp_path / "packed" / "train-00000-of-00001.parquet"
    data = bytearray(path.read_bytes())
    data[2_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="CRC checksum"):
        load_image_dataset(str(tmp_path / "packed"), streaming=True)["train"][0]


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SLOW_PACK = """
import sys, time
from hf_deit import load_image_dataset
from hf_deit.data import packing, streaming
packing.FILE_BYTES, streaming.ROW_GROUP_BYTES = 12_000, 3_000
reduce_image = packing.reduce_image
def slowly(*args):
    time.sleep(0.05)
    return reduce_image(*args)
packing.reduce_image = slowly
images = load_image_dataset(sys.argv[1])
splits = {"train": images["train"], "validation": images["eval"]}
print("ready", flush=True)
packing.pack_dataset(splits, sys.argv[2], packing.PackSettings(10), place=images.place, num_workers=2)
"""


def test_a_pack_that_was_killed_goes_on_and_ends_the_same(tmp_path, small_files):
    make_one_folder(tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "undisturbed", PackSettings(10), num_workers=3)
    folder = tmp_path / "packed"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_PACK, str(tmp_path / "source"), str(folder)], stdout=subprocess.PIPE
    )
    while len(list(folder.glob("*.packed"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (folder / packing.UNFINISHED).exists() and not list(folder.glob("*.parquet"))
    with pytest.raises(ValueError, match="no images found"):  # nobody trains on half a set
        load_image_dataset(str(folder))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.packed")}
    pack(tmp_path / "source", folder, PackSettings(10))
    assert tree(folder) == tree(tmp_path / "undisturbed")
    for name, changed in before.items():  # they were not written again
        assert (folder / name.removesuffix(".packed")).stat().st_mtime_ns == changed


@pytest.fixture
def interrupted(tmp_path, small_files, monkeypatch):
    """A pack of `source` in `packed` of which only the first file is whole."""
    make_one_folder(tmp_path / "source")
    write = packing._write_file

    def once(path, *args):
        if "00001" in path.name:
            raise KeyboardInterrupt
        return write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write_file", once)
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path / "source", tmp_path / "packed")
    assert [path.name[:11] for path in (tmp_path / "packed").glob("*.packed")] == ["train-00000"]
    return tmp_path / "source", tmp_path / "packed"


def change_size(source):
    with (source / "10" / "000.jpg").open("ab") as file:
        file.write(b"\0")


def change_bytes(source):
    path = source / "10" / "000.jpg"
    path.write_bytes(encoded(1234).ljust(path.stat().st_size, b"\0")[: path.stat().st_size])


def add_image(source):
    (source / "10" / "9.jpg").write_bytes(encoded(9))


def rename_class(source):
    (source / "10").rename(source / "11")


@pytest.mark.parametrize(
    "change, message",
    [
        (change_size, "the source has changed .* images of 'train' from number 0 to "),
        (change_bytes, "the source has changed .* images of 'train' from number 0 to "),
        (add_image, "an unfinished pack of other images: the splits of the source differ"),
        (rename_class, "an unfinished pack of other images: the classes and the splits of the source differ"),
    ],
)
def test_a_source_that_has_changed_is_refused(interrupted, change, message):
    source, folder = interrupted
    change(source)
    with pytest.raises(ValueError, match=message) as error:
        pack(source, folder)
    assert "\n" not in str(error.value)


def test_a_change_where_nothing_is_packed_yet_is_none(interrupted):
    source, folder = interrupted
    (source / "train car" / "039.bmp").write_bytes(encoded(7, "BMP"))
    pack(source, folder)
    assert content(load_image_dataset(str(folder))["train"]) == content(load_image_dataset(str(source))["train"])


def test_other_settings_and_other_directories_are_refused(interrupted, tmp_path):
    source, folder = interrupted
    with pytest.raises(ValueError, match="an unfinished pack with other settings, .*null.*now they are .*10"):
        pack(source, folder, PackSettings(10))
    with pytest.raises(ValueError, match="is inside the source"):
        pack(source, source / "packed")
    with pytest.raises(ValueError, match="holds other files, such as 'x': name a new directory"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "x").write_text("")
        pack(source, tmp_path / "other")
    with pytest.raises(ValueError, match="is a file"):
        pack(source, tmp_path / "other" / "x")
    pack(source, folder)
    with pytest.raises(ValueError, match="holds other files, such as 'train-00000"):
        pack(source, folder)
    for wrong in ({"max_side": 0}, {"quality": 101}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            PackSettings(**wrong)


def test_a_full_disk_is_one_line_and_the_pack_goes_on(interrupted):
    source, folder = interrupted
    (folder / "_packing.json").read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))  # a file that grows no more, as on a full disk
    try:
        with pytest.raises(ValueError, match="cannot be written: .*free some space and start the same command again"):
            pack(source, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(folder.glob("*.writing"))
    pack(source, folder)
    assert content(load_image_dataset(str(folder))["train"]) == content(load_image_dataset(str(source))["train"])


def test_damaged_images_are_all_listed_and_refused_or_left_out(tmp_path, small_files):
    make_one_folder(tmp_path / "source")
    whole = (tmp_path / "source" / "10" / "008.jpg").read_bytes()
    (tmp_path / "source" / "10" / "008.jpg").write_bytes(whole[:300])
    (tmp_path / "source" / "a.b" / "038.JPG").write_bytes(b"")
    source, folder = tmp_path / "source", tmp_path / "packed"
    images = load_image_dataset(str(source), eval_fraction=0)
    place = {Path(row["image"]["path"]).name: index for index, row in enumerate(images["train"])}
    splits = {"train": images["train"]}
    with pytest.raises(ValueError, match=r"2 of 40 images are damaged, such as number .*008.*leave_out_damaged"):
        pack_dataset(splits, folder, place=images.place)
    listed = (folder / "_bad_images.txt").read_text().splitlines()
    assert listed[0] == "split\tindex\tpath\treason"
    assert [line.split("\t")[:3] for line in listed[1:]] == [
        ["train", str(place["008.jpg"]), "10/008.jpg"],
        ["train", str(place["038.JPG"]), "a.b/038.JPG"],
    ]
    assert list(folder.glob("*.packed")) and not list(folder.glob("*.parquet"))

    packed = pack_dataset(splits, folder, PackSettings(leave_out_damaged=True), place=images.place)["train"]
    assert (packed.num_images, packed.num_left_out, sum(packed.counts)) == (38, 2, 38)
    kept = [row for row in images["train"] if Path(row["image"]["path"]).name not in ("008.jpg", "038.JPG")]
    assert content(load_image_dataset(str(folder), eval_fraction=0)["train"]) == content(kept)
    assert (folder / "_bad_images.txt").read_text().splitlines() == listed

    other = tmp_path / "other"
    with pytest.raises(ValueError, match="damaged"):
        pack_dataset(splits, other, place=images.place)
    (source / "10" / "008.jpg").write_bytes(whole)  # repaired, and the pack goes on
    (source / "a.b" / "038.JPG").write_bytes(whole)
    assert pack_dataset(splits, other, place=images.place)["train"].num_images == 40
    assert not (other / "_bad_images.txt").exists()


def test_a_set_of_damaged_images_alone_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "1.jpg").write_bytes(b"\xff\xd8\xff")
    rows = load_image_dataset(str(tmp_path / "source"), eval_fraction=0)["train"]
    with pytest.raises(ValueError, match="every image of 'train' is damaged"):
        pack_dataset({"train": rows}, tmp_path / "packed", PackSettings(leave_out_damaged=True))


def test_a_stream_is_packed_like_its_files(tmp_path, small_files):
    make_parquet(tmp_path / "source")
    for streams in (False, True):
        images = load_image_dataset(str(tmp_path / "source"), streaming=streams)
        splits = {"train": images["train"], "test": images["eval"]}
        pack_dataset(splits, tmp_path / f"packed {streams}", num_workers=2)
    one, other = (tree(tmp_path / f"packed {streams}") for streams in (False, True))
    assert one.keys() == other.keys() and len(one) > 2
    assert [content(load_image_dataset(str(tmp_path / f"packed {x}"))["train"]) for x in (0 == 1, 0 == 0)] == [
        content(load_image_dataset(str(tmp_path / "source"))["train"])
    ] * 2


def test_what_has_no_one_label_an_image_is_refused(tmp_path, tiny_images):
    rows = tiny_images()["train"]
    several = rows.remove_columns("label").add_column("label", [[0]] * len(rows))
    several = several.cast_column("label", datasets.List(datasets.ClassLabel(names=["a", "b"])))
    with pytest.raises(ValueError, match="lists of labels"):
        pack_dataset({"train": several}, tmp_path / "packed")
    negative = rows.remove_columns("label").add_column("label", [-1] * len(rows))
    negative = negative.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match="has the label -1"):
        pack_dataset({"train": negative}, tmp_path / "packed")
    other = tiny_images()["eval"].cast_column("label", datasets.ClassLabel(names=["red", "blue", "green"]))
    with pytest.raises(ValueError, match="different classes"):
        pack_dataset({"train": rows, "test": other}, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_memory_does_not_grow_with_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "ROW_GROUP_BYTES", 1 << 20)
    monkeypatch.setattr(packing, "decode_image", lambda encoded, choose_part: choose_part(8, 8))
    noise = np.random.default_rng(0).bytes(200_000)
    for number in range(160):
        path = tmp_path / "source" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise)
    rows = load_image_dataset(str(tmp_path / "source"), eval_fraction=0)["train"]
    tracemalloc.start()
    pack_dataset({"train": rows}, tmp_path / "packed", num_workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pq.read_metadata(tmp_path / "packed" / "train-00000-of-00001.parquet").num_rows == 160
    assert peak < 8e6  # of 32 MB


# --- smaller images ------------------------------------------------------------------------------------------------


def smooth(width, height):
    """A picture whose colours change slowly, as a photo's."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), np.sin(11 * x * y)]
    return Image.fromarray(np.uint8(127 + 120 * np.stack(waves, -1)))


def as_file(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "size, packed", [((100, 70), (91, 64)), ((70, 100), (64, 91)), ((640, 512), (80, 64)), ((65, 65), (64, 64))]
)
def test_the_shorter_side_is_reduced(size, packed):
    stored = reduce_image(as_file(smooth(*size), "PNG"), PackSettings(64))
    with Image.open(io.BytesIO(stored)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", packed)
    reference = np.asarray(smooth(*size).resize(packed, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(reference - decode_image({"bytes": stored})).mean() < 1.5


def test_an_image_that_is_small_enough_keeps_its_bytes():
    for data in (as_file(smooth(200, 64)), as_file(smooth(64, 64), "PNG"), as_file(smooth(30, 500), "BMP")):
        assert reduce_image(data, PackSettings(64)) is data
        assert reduce_image(data, PackSettings()) is data


def test_a_turned_photo_is_stored_upright():
    stored = reduce_image(as_file(smooth(300, 200), exif=exif(6)), PackSettings(64))
    with Image.open(io.BytesIO(stored)) as image:
        assert image.size == (64, 96) and not image.getexif()
    upright = smooth(300, 200).transpose(Image.Transpose.ROTATE_270).resize((64, 96), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(upright).astype(int) - decode_image({"bytes": stored})).mean() < 2


def test_quality_is_the_jpegs():
    sizes = [len(reduce_image(as_file(smooth(300, 200)), PackSettings(64, quality))) for quality in (10, 90, 100)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] / 2
    with Image.open(io.BytesIO(reduce_image(as_file(smooth(300, 200)), PackSettings(64)))) as image:
        reference = Image.open(io.BytesIO(as_file(image, quality=90)))
        assert image.quantization == reference.quantization


def test_views_of_an_untouched_set_do_not_differ(tiny_images):
    rows = tiny_images()["train"]
    assert set(difference_of_views(rows, lambda data: data, 16).values()) == {0.0}


def test_the_difference_of_views_is_that_of_the_pixels():
    rows = [{"image": {"bytes": as_file(Image.new("RGB", (300, 300), (level,) * 3), "PNG")}} for level in (10, 90)]
    darker = as_file(Image.new("RGB", (300, 300), (7, 7, 7)), "PNG")
    measured = difference_of_views(rows, lambda data: darker, 224)
    assert measured == {"evaluation": 43, "evaluation, largest": 83, "training": 43, "training, largest": 83}
    half = as_file(smooth(300, 200), "PNG")
    rows = [{"image": {"bytes": as_file(smooth(600, 400), "PNG")}}] * 5  # the same picture, at half the size
    assert max(difference_of_views(rows, lambda data: half, 32).values()) < 8
    assert difference_of_views([{"image": {"bytes": b"x"}}], lambda data: data, 32) == {}


def test_reduced_imagenet_is_within_the_stated_bound(shared_data):
    """docs/data.md, for --max_side 256 at the default quality and views of 224 pixels."""
    images = load_image_dataset(str(shared_data / "imagenet_sample"), splits=("eval",), eval_split="validation")
    measured = difference_of_views(images["eval"], lambda data: reduce_image(data, PackSettings(256)), 224)
    assert measured["evaluation"] < 2.5 and measured["evaluation, largest"] < 6.5
    assert measured["training"] < 5.5 and measured["training, largest"] < 36
    assert measured["evaluation"] > 1  # it does re-encode
