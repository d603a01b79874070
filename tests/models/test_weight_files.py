"""Weight files: every form that is read, what is refused without running code, and the fingerprint."""

import argparse
import copy
import gzip
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_deit.errors import first_line
from hf_deit.models.classifiers import find_classifier
from hf_deit.models.weight_files import fingerprint, read_weights


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, save):
    file, trace = tmp_path / "w.pth", tmp_path / "it_ran"
    save({"state_dict": Bomb(trace)}, file)
    with pytest.raises(ValueError, match="holds more than weights. Only .* plain values, are read") as caught:
        find_classifier(f"timm:resnet18?checkpoint={file}")
    assert not trace.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"model": w},
        lambda w: {"args": argparse.Namespace(lr=1), "state_dict": {"bias": torch.zeros(2)}, "state_dict_ema": w},
        lambda w: {f"module._orig_mod.{name}": tensor for name, tensor in w.items()},
        lambda w: {"epoch": 3, "model_state_dict": w, "optimizer_state_dict": {"state": {}, "param_groups": []}},
        lambda w: {"net": {f"module.{name}": tensor for name, tensor in w.items()}, "acc": 93.1, "epoch": 7},
        lambda w: {"model_ema": None, "model": {"state_dict": w}},
        lambda w: {"my_weights": w, "optimizer": {"state": {}}},
        lambda w: {
            "pytorch-lightning_version": "2.0",
            "state_dict": {f"model.{name}": tensor for name, tensor in w.items()} | {"loss.weight": torch.ones(2)},
        },
    ],
)
def test_every_form_of_file_holds_the_same_weights(tmp_path, wrap):
    weights = nn.Linear(3, 2).state_dict()
    torch.save(wrap(weights), tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    prefixed = {f"module.model.{name}": tensor for name, tensor in weights.items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    save_file(weights, tmp_path / "named.pth")  # the content counts, not the name
    torch.save(weights, tmp_path / "named.safetensors")
    for file in ("w.pth", "w.safetensors", "prefixed.safetensors", "named.pth", "named.safetensors"):
        read = read_weights(tmp_path / file)
        assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: None, "checkpoint '.*w.pth' does not exist"),
        (lambda file: file.write_bytes(b"junk"), "cannot read checkpoint '.*w.pth': .*Only .safetensors, and .pth"),
        (lambda file: torch.save({"epoch": 3}, file), "w.pth' holds no state dict: its keys are epoch; expected"),
        (lambda file: torch.save([1], file), "w.pth' holds no state dict: it is a list"),
        (
            lambda file: torch.save({"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}, file),
            "w.pth' holds no state dict: its keys are a, b",
        ),
        (lambda file: file.write_bytes(b""), "w.pth': it is empty"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid x"), "it is a Git LFS pointer"),
        (lambda file: file.write_text("\n<!doctype html><title>Quota"), "it is a web page"),
        (lambda file: file.write_text('{"error": {"code": 404}}'), "it is JSON text"),
        (lambda file: file.write_bytes(gzip.compress(b"weights")), "it is compressed by gzip; unpack it"),
        (lambda file: torch.jit.script(nn.Linear(3, 2)).save(str(file)), "it is a TorchScript program"),
    ],
)
def test_what_is_no_weight_file_is_refused_in_one_line(tmp_path, write, message):
    write(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(tmp_path / "w.pth")
    assert "more than weights" not in str(caught.value)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_what_lightning_keeps_beside_the_network_is_named(tmp_path, caplog):
    content = {"pytorch-lightning_version": "2", "state_dict": {"net.bias": torch.ones(2), "loss.w": torch.ones(1)}}
    torch.save(content, tmp_path / "w.ckpt")
    assert list(read_weights(tmp_path / "w.ckpt")) == ["bias"]
    assert "1 tensors beside the network are left out: loss.w" in caplog.text


def test_the_fingerprint_is_that_of_names_types_shapes_and_values():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    before = fingerprint(model)
    assert len(before) == 16 and before == fingerprint(copy.deepcopy(model).to(memory_format=torch.channels_last))
    changed = [copy.deepcopy(model) for _ in range(3)]
    changed[0][0].weight.data[0, 0] += 1e-6
    changed[1].bfloat16()
    changed[2] = nn.Sequential(nn.Identity(), changed[2][0])
    assert len({before, *map(fingerprint, changed)}) == 4


def test_an_error_is_reported_by_its_first_line():
    assert first_line(ValueError(" what.\nwhere")) == "what" and first_line(KeyError()) == "KeyError"
