"""labels.py: a label that is no class is named, before training or in its batch."""

import datasets
import numpy as np
import pytest
import torch
from support.runs import trainer

from hf_deit.data.labels import CheckedLabels, check_labels
from hf_deit.data.views import collate_views


CLASSES = 10


def collated(labels):
    return {"pixel_values": torch.zeros(len(labels), 3, 2, 2), "labels": labels}


def test_labels_in_range_pass_the_collator_untouched():
    batch = collated(torch.tensor([0, 9, 5]))
    assert CheckedLabels(lambda examples: batch, CLASSES)([{}] * 3) is batch
    assert CheckedLabels(lambda examples: {"pixel_values": 1}, CLASSES)([{}]) == {"pixel_values": 1}


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 10, 3]), r"number 1 of a batch has the label 10, but the 10 classes are 0 to 9 \(1 of 3"),
        (torch.tensor([0, 1, -1]), "number 2 of a batch has the label -1, .*Check that the split has labels"),
        (torch.tensor([-100, 1, 1]), "number 0 of a batch has the label -100"),  # which PyTorch would leave out
        (torch.tensor([0.0, 1, 2]), r"are torch.float32 \(3,\); expected whole numbers"),
        (torch.eye(3), r"are torch.float32 \(3, 3\); expected"),
        ([[1], [2, 3], []], "are a list; expected"),
    ],
)
def test_labels_that_are_no_class_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        CheckedLabels(lambda examples: collated(labels), CLASSES)([{}] * 3)


def labelled(labels, feature):
    return datasets.Dataset.from_dict({"label": labels}, datasets.Features({"label": feature}))


@pytest.mark.parametrize(
    "labels, feature, message",
    [
        ([0, 2, -1, -1], datasets.ClassLabel(num_classes=3), r"number 2 of the training images .*label -1.*\(2 of 4"),
        (
            [0, 3, 1, 1],
            datasets.Value("int64"),
            "number 1 of the training images has the label 3, .* 3 classes are 0 to 2",
        ),
        ([0.0, 1.0], datasets.Value("float32"), "the labels of the training images are float32; .*label_column"),
        ([[0], [1, 2]], datasets.List(datasets.Value("int64")), "images are object; expected"),
    ],
)
def test_all_labels_are_checked_before_training(labels, feature, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labelled(labels, feature), 3, "training")


def test_only_the_labels_of_a_subset_are_checked():
    whole = labelled([0, 1, -1, 2, -1, 7], datasets.Value("int64"))
    check_labels(whole.select([3, 1, 0]), 3, "training")
    with pytest.raises(ValueError, match=r"number 2 of the evaluation images has the label 7, .*\(1 of 3"):
        check_labels(whole.select([3, 1, 5]), 3, "evaluation")
    check_labels([{"label": 7}], 3, "training")  # the labels of a plain list are checked batch by batch


@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_label_out_of_range_is_refused_before_the_first_step(tiny_images, tmp_path, part):
    images = tiny_images()
    rows = images[part].remove_columns("label")
    labels = list(images[part]["label"][:])
    labels[7] = -1
    images[part] = rows.add_column("label", np.array(labels))
    with pytest.raises(ValueError, match="number 7 of the (training|evaluation) images has the label -1"):
        trainer(images, tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_list_with_a_label_out_of_range_is_refused_in_its_batch(tiny_images, tmp_path, num_workers):
    images = tiny_images()
    rows = list(images["train"])
    rows[5] = rows[5] | {"label": 3}
    run = trainer({"train": rows, "eval": images["eval"]}, tmp_path, dataloader_num_workers=num_workers)
    with pytest.raises(ValueError, match="of a batch has the label 3, but the 3 classes are 0 to 2"):
        run.train()


def test_views_of_floats_are_refused_by_the_collator():
    examples = [{"pixel_values": np.zeros((2, 2, 3), np.uint8), "labels": 1.5}]
    with pytest.raises(ValueError, match="expected whole numbers, one per image"):
        CheckedLabels(collate_views, 3)(examples)
