"""A stock model on disk, images for it, and run_eval.py."""

import importlib

import pytest
from support.evaluation import ID2LABEL, SHAPE, drawn, save
from transformers.models.deit.configuration_deit import DeiTConfig as StockConfig
from transformers.models.deit.modeling_deit import DeiTForImageClassificationWithTeacher as StockDeiT


@pytest.fixture
def stock(tmp_path):
    """Stock's two-head model, and the directory where it is saved."""
    model = drawn(StockDeiT(StockConfig(**SHAPE, id2label=ID2LABEL)))
    return model, save(model, tmp_path / "stock")


@pytest.fixture
def images(tiny_images):
    return tiny_images()["eval"]


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("hf_deit.commands.eval")


@pytest.fixture
def dataset(tmp_path, tiny_images):
    """A directory as `dataset_name`, with 19 images to evaluate on."""
    (tmp_path / "set").mkdir()
    for split, rows in tiny_images(6, 19).items():
        rows.to_parquet(str(tmp_path / "set" / f"{'test' if split == 'eval' else split}.parquet"))
    return str(tmp_path / "set")
