"""own_options.py: our own options stand for the whole config, without PyTorch."""

from dataclasses import fields

import pytest
import torch

from hf_deit import DataArguments, DistillationConfig, ModelArguments, parse_recipe
from hf_deit.options import recipe as reading
from hf_deit.options.own_options import OwnOptions


KINDS = (ModelArguments, DataArguments, OwnOptions)


def test_they_become_the_config_with_the_options_of_transformers(recipe):
    text = "num_train_epochs: 17\nsave_steps: 3\nlogging_first_step: true"
    _, _, training = parse_recipe(KINDS, [recipe(text), "--adam_beta2", "0.9", "--no_dataloader_persistent_workers"])
    assert isinstance(training, DistillationConfig)
    assert (training.num_train_epochs, training.save_steps, training.adam_beta2) == (17, 3, 0.9)
    assert training.logging_first_step and not training.dataloader_persistent_workers
    assert training.dataloader_pin_memory == torch.cuda.is_available()


def test_the_config_has_their_defaults():
    of_config = {item.name: item for item in fields(DistillationConfig)}
    for item in fields(OwnOptions):
        same = of_config[item.name]
        assert (item.default, item.default_factory) == (same.default, same.default_factory), item.name


@pytest.mark.parametrize(
    "words, message",
    [
        (["--epochs", "3"], "the command line has '--epochs', which is no key; did you mean 'num_train_epochs'"),
        (["--save_steps", "3", "--no_such_key=3"], "the command line has '--no_such_key=3', which is no key"),
        (["--evaluation-strategy", "no"], "'--evaluation-strategy', which is no key; did you mean 'eval_strategy'"),
    ],
)
def test_a_wrong_key_is_refused_before_the_config_is_imported(words, message, recipe, monkeypatch):
    monkeypatch.setattr(reading, "_complete", lambda kinds: pytest.fail("was imported"))
    with pytest.raises(ValueError, match=message):
        parse_recipe(KINDS, [recipe("num_train_epochs: 17"), *words])
    with pytest.raises(ValueError, match="has the key 'save_step'.*did you mean 'save_steps'"):
        parse_recipe(KINDS, [recipe("save_step: 17")])


def test_values_are_looked_over_before_the_config_is_imported(recipe, monkeypatch):
    monkeypatch.setattr(reading, "_complete", lambda kinds: pytest.fail("was imported"))

    def look_over(values):
        raise ValueError(f"{values.dataset_name} {values.image_size}")

    with pytest.raises(ValueError, match="^here 32$"):
        parse_recipe(KINDS, [recipe("dataset_name: here"), "--image_size", "32"], look_over=look_over)


def test_a_word_too_many_is_refused(recipe):
    with pytest.raises(ValueError, match="the command line has 'more'"):
        parse_recipe(KINDS, [recipe("image_size: 32"), "more"])
