"""command_line.py: `--help` in groups, and which key a wrong one was meant to be."""

from dataclasses import fields

import pytest
from support.recipes import KINDS

from hf_deit import DataArguments, ModelArguments, parse_recipe
from hf_deit.arguments import ClassifierArguments
from hf_deit.evaluation.report import EvaluationArguments
from hf_deit.options.command_line import SYNONYMS, did_you_mean
from hf_deit.options.own_options import OwnOptions


KNOWN = {item.name for kind in (*KINDS, ClassifierArguments) for item in fields(kind)}


def help_of(kinds, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse_recipe(kinds, words)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_first_what_people_set_first(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(KINDS, ["--help"], capsys)
    lines = text.splitlines()
    assert len(lines) < 80 and max(map(len, lines)) <= 80
    order = ["dataset_name", "model_name_or_path", "teacher", "num_train_epochs", "output_dir"]
    places = [next(n for n, line in enumerate(lines) if line.startswith(f"  --{name} ")) for name in order]
    assert places == sorted(places)
    assert [line for line in lines if line.endswith(":") and " " not in line] == [
        "data:",
        "model:",
        "teacher:",
        "training:",
        "output:",
    ]
    assert "adam_beta1" not in text


def test_help_is_the_same_before_transformers_is_imported(monkeypatch, capsys, recipe):
    monkeypatch.setenv("COLUMNS", "80")
    words = [recipe("num_train_epochs: 17\nseed: 3\nsave_steps: 9"), "--help"]
    early = help_of((ModelArguments, DataArguments, OwnOptions), words, capsys)
    assert sorted(early.splitlines()) == sorted(help_of(KINDS, words, capsys).splitlines())
    assert "[17]" in early and "[3]" in early


def test_help_all_shows_every_key(capsys):
    text = help_of(KINDS, ["--help-all"], capsys)
    listed = {word.removeprefix("--") for word in text.replace(",", " ").split() if word.startswith("--")}
    assert {item.name for kind in KINDS for item in fields(kind) if item.init} <= listed


def test_help_shows_the_values_of_a_recipe_that_is_named(recipe, capsys):
    assert "[300]" in help_of(KINDS, ["--help"], capsys)
    assert "[17]" in help_of(KINDS, [recipe("num_train_epochs: 17"), "--help"], capsys)


def test_a_command_of_few_keys_shows_all(capsys):
    assert "--trust_class_order" in help_of((EvaluationArguments,), ["--help"], capsys)


def test_every_synonym_means_a_key_and_is_none():
    assert set(SYNONYMS.values()) <= KNOWN and not SYNONYMS.keys() & KNOWN


@pytest.mark.parametrize(
    "word, meant",
    [
        ("epochs", "num_train_epochs"),
        ("lr", "learning_rate"),
        ("batch_size=3", "per_device_train_batch_size"),
        ("batch-size", "per_device_train_batch_size"),
        ("Epochs", "num_train_epochs"),
        ("warmup", "warmup_epochs"),
        ("lerning_rate", "learning_rate"),
    ],
)
def test_a_wrong_key_says_what_was_meant(word, meant):
    assert did_you_mean(word, KNOWN) == f", which is no key; did you mean {meant!r}?"


def test_what_a_command_does_not_have_is_not_suggested():
    assert "num_train_epochs" not in did_you_mean("epochs", {"models", "output_dir"})
