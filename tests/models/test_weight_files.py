"""Weight files: every form that is read, what is refused without running code, and the fingerprint."""

import argparse
import copy
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
    ],
)
def test_every_form_of_file_holds_the_same_weights(tmp_path, wrap):
    weights = nn.Linear(3, 2).state_dict()
    torch.save(wrap(weights), tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    for file in ("w.pth", "w.safetensors"):
        read = read_weights(tmp_path / file)
        assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: None, "checkpoint '.*w.pth' does not exist"),
        (lambda file: file.write_bytes(b"junk"), "cannot read checkpoint '.*w.pth': .*Only .safetensors, and .pth"),
        (lambda file: torch.save({"epoch": 3}, file), "w.pth' holds no state dict"),
    ],
)
def test_what_is_no_weight_file_is_refused_in_one_line(tmp_path, write, message):
    write(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(tmp_path / "w.pth")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


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
