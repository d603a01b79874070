"""Random folder trees: every file is used or listed as not used, or the tree is refused by name.

100 trees; `FOLDER_TREES=2000 pytest tests/test_folder_trees.py` makes others, and more of them.
"""

import io
import os
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_deit import load_image_dataset
from hf_deit.data.decoding import path_of
from hf_deit.errors import UserError


EXAMPLES = int(os.environ.get("FOLDER_TREES", 0))


def encoded(format, color=(200, 30, 60)):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, format)
    return buffer.getvalue()


def archive(kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("1.png", encoded("PNG"))
    else:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.addfile(tarfile.TarInfo("1.png"))
    return buffer.getvalue()


# Each file: its name, its content (bytes, or what kind of entry it is) and whether it is an image that is used.
FILES = (
    (b"1.png", encoded("PNG"), True),
    (b"2.JPG", encoded("JPEG"), True),
    (b"3", encoded("PNG", (1, 2, 3)), True),
    (b"4.dat", encoded("JPEG"), True),
    (b"5.Tiff", encoded("TIFF"), True),
    (b"same.png", encoded("PNG"), True),  # the same bytes as 1.png
    (b"cut.png", encoded("PNG")[:20], True),  # damaged: found out when it is decoded
    (b"empty.webp", b"", True),  # so is this
    (b"caf\xe9.png", encoded("PNG"), True),
    (b"a [1]*?.png", encoded("PNG"), True),
    (b"new\nline.png", encoded("PNG"), True),
    (b"deep/er/1.png", encoded("PNG"), True),
    (b"linked.png", "link", True),
    (b"gone.jpg", "broken link", True),
    (b"empty", b"", False),
    (b"notes.txt", b"some text", False),
    (b"photo.heic", b"\0\0\0\x18ftypheic", False),
    (b"photo.CR2", encoded("TIFF"), False),
    (b"1.json", b"{}", False),
    (b"all.zip", archive("zip"), False),
    (b"all.tar", archive("tar"), False),
    (b"caf\xe9.txt", b"text", False),
    (b"pipe.png", "pipe", False),
    (b".hidden.png", encoded("PNG"), False),
    (b".thumbs/1.png", encoded("PNG"), False),
    (b"deep/.DS_Store", b"", False),
)
CLASSES = (
    *(b"cat", b"dog", b"a b", b"Cat", b"[x]*?", b"a+b", b"100% #1", "größe".encode(), "日本".encode()),
    *(b"1", b"2", b"10", b"new\nline", b"it's", b"{}", b"-h", b"images"),
)
BAD_CLASSES = (b"caf\xe9", b"test", b"Train")  # not text, or the name of a split
TRAIN = (b"train", b"Train", b"TRAINING", b"training_set", b"train images")
EVAL = (b"val", b"Valid", b"TEST", b"testing", b"validation_set", b"dev", b"Eval")
BESIDE = (
    (b"README.md", b"text"),
    (b"loose.png", encoded("PNG")),
    (b"__MACOSX/._x", b""),
    (b".git/x.png", b""),
    (b"train.tar", archive("tar")),
)


def subsets(values, at_least=0, at_most=None):
    return st.lists(st.sampled_from(values), min_size=at_least, max_size=at_most, unique=True)


@st.composite
def trees(draw):
    """A tree as `{path: (content, used, class)}` by bytes, the paths of whole folders not in use, and its troubles."""
    names = draw(subsets(CLASSES, 2, 5) if draw(st.integers(0, 9)) < 9 else subsets(CLASSES, 1, 1))
    if draw(st.integers(0, 14)) == 14:
        names.append(draw(st.sampled_from(BAD_CLASSES)))
    splits = [b""]
    if draw(st.booleans()):
        splits = [draw(st.sampled_from(TRAIN)), *draw(subsets(EVAL, 0, 1))]
    above = draw(st.sampled_from((b"", b"", b"data/", b"a/b/")))
    below = draw(st.sampled_from((b"", b"", b"/images"))) if splits != [b""] else b""
    tree, troubles, used = {}, set(), Counter()
    for split in splits:
        classes = names if split in (b"", splits[0]) else draw(subsets(names, 1))
        for name in classes:
            files = draw(subsets(FILES, 0, 4))
            if draw(st.integers(0, 19)) < 19:  # most classes have an image
                files.append((b"always.png", encoded("PNG"), True))
            folder = b"/".join(filter(None, (above.rstrip(b"/"), split + below, name)))
            tree[folder + b"/"] = ("folder", False, None)
            for file, content, is_image in files:
                tree[folder + b"/" + file] = (content, is_image, name)
            used[split, name] = sum(is_image for *_, is_image in files)
            visible = [file for file, *_ in files if not any(part.startswith(b".") for part in file.split(b"/"))]
            if visible and not used[split, name]:
                troubles.add("a class without an image")
            if used[split, name] and not used[splits[0], name]:
                troubles.add("a class to evaluate only")
    for path, content in draw(subsets(BESIDE, 0, 2)):
        place = draw(st.sampled_from((b"", above + splits[0] + (b"/" if splits[0] else b""))))
        tree[place + path] = (content, False, None)
        if path == b"loose.png" and above and place == above:
            troubles.add("an image beside folders that could be classes or part of one class")
    with_images = [name for name in names if used[splits[0], name]]
    if len(with_images) < 2:
        troubles.add("fewer than two classes")
    if len(splits) > 1 and not any(used[splits[1], name] for name in names):
        troubles.add("nothing to evaluate on")
    if len(splits) == 1 and not any(used[splits[0], name] > 1 for name in names):
        troubles.add("nothing to hold out")
    if any(name in BAD_CLASSES for name in names):
        troubles.add("a class name that is none")
    return tree, with_images, troubles


def write(root, tree):
    for path, (content, *_) in tree.items():
        place = os.path.join(root, path)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if content == "folder":
            continue
        if content == "pipe":
            os.mkfifo(place)
        elif content in ("link", "broken link"):
            target = os.path.join(os.path.dirname(root), b"target.png")
            os.symlink(target if content == "link" else target + b" that is gone", place)
        else:
            Path(os.fsdecode(place)).write_bytes(content)


@settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(trees())
def test_every_file_is_used_or_listed_or_the_tree_is_refused_by_name(drawn):
    tree, class_names, troubles = drawn
    with tempfile.TemporaryDirectory() as directory:
        root = os.path.join(os.fsencode(directory), b"set")
        Path(directory, "target.png").write_bytes(encoded("PNG"))
        os.mkdir(root)
        write(root, tree)
        try:
            images = load_image_dataset(os.fsdecode(root))
        except UserError as error:
            event(f"refused: {', '.join(sorted(troubles))}")
            assert troubles, error
            assert os.fsdecode(root) in str(error) or "/set" in str(error), error
            assert "\n" not in str(error)
            str(error).encode()
            return
        event("loaded")
        numbers = all(name.decode().isdecimal() for name in class_names)
        expected_names = sorted(os.fsdecode(name) for name in class_names)
        expected_names = sorted(expected_names, key=int) if numbers else expected_names
        assert images["train"].features["label"].names == expected_names
        used = {}
        for rows in images.values():
            for row in rows:
                path = os.path.relpath(os.fsencode(path_of(row["image"]["path"])), root)
                assert path not in used, "used twice"
                used[path] = os.fsencode(expected_names[row["label"]])
        assert used == {path: name for path, (_, is_image, name) in tree.items() if is_image}
        unread = images.unread
        listed = [os.path.relpath(os.fsencode(path), root) for path in (*unread.paths, *unread.beside)]
        assert len(set(listed)) == len(listed) and sum(unread.counts.values()) == len(unread.paths)
        folders = tuple(os.path.relpath(os.fsencode(path), root) + b"/" for path in unread.folders)
        others = {path for path, (content, is_image, _) in tree.items() if content != "folder" and not is_image}
        assert {path for path in others if not path.startswith(folders)} == set(listed)
