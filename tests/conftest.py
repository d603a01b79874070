"""What all tests share: no network, a cache of their own, one thread each, and the optional real images."""

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path


# Before anything imports torch, transformers or datasets: they read these once. Subprocesses inherit them.
CACHE = tempfile.mkdtemp(prefix="hf_deit-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.update(
    HF_HOME=CACHE,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    NO_ALBUMENTATIONS_UPDATE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

import pytest  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
LOOPBACK = ("127.", "localhost", "::1", "0.0.0.0")


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` where there is none."""
    gpu_tests = [item for item in items if "gpu" in item.keywords]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """A connection that leaves this machine is an error, not a slow pass."""
    connect = socket.socket.connect

    def connect_here(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            raise ConnectionRefusedError(f"tests are offline, but something connects to {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images (`cifar10/`, `imagenet_sample/`), which the repository does not hold."""
    folder = Path(os.environ.get("HF_DEIT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real images: set HF_DEIT_DATA to a folder with cifar10/ and imagenet_sample/")
    return folder


@pytest.fixture(scope="session")
def tiny_images():
    """`tiny_images(train=48, eval=20)`: noisy 16 x 16 pictures of three classes that differ in colour."""
    import datasets
    import numpy as np
    from PIL import Image

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"])}
    )

    def split(count: int, seed: int) -> datasets.Dataset:
        rng = np.random.default_rng(seed)
        labels = np.arange(count) % 3
        pixels = rng.integers(0, 120, (count, 16, 16, 3), dtype=np.uint8)
        pixels[np.arange(count), :, :, labels] += 100
        rows = {"image": [Image.fromarray(image) for image in pixels], "label": labels}
        return datasets.Dataset.from_dict(rows, features).cast_column("image", datasets.Image(decode=False))

    def make(train: int = 48, eval: int = 20) -> datasets.DatasetDict:
        return datasets.DatasetDict({"train": split(train, 0), "eval": split(eval, 1)})

    return make


@pytest.fixture
def hub():
    """A started `HubServer`: the Hub's API on this machine, for clients in processes with `env=hub.environment`."""
    from support.hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text + f"\nuse_cpu: true\noutput_dir: {tmp_path}\n")
        return str(path)

    return write
