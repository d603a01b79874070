"""arguments.py: what an option affects is said once, and the arguments reach the functions they are for."""

import inspect
import re
from dataclasses import dataclass, fields

import pytest
from transformers import HfArgumentParser

from hf_deit import DataArguments, DeiTConfig, DistillationConfig, ModelArguments, load_image_dataset
from hf_deit.arguments import check_places, names_affecting, option
from hf_deit.options.own_options import OwnOptions


@dataclass
class Options:
    pixels: int = option(1, "What is seen.", affects="views")
    rate: float = option(0.5, "How fast.")
    made: list[str] = option(list, "Made anew for each instance.", affects="machine")


def test_an_option_knows_its_help_and_what_it_affects(capsys):
    assert [fields(Options)[number].metadata["help"] for number in range(2)] == ["What is seen.", "How fast."]
    assert names_affecting(Options, "views") == ["pixels"]
    assert names_affecting(Options, "weights", "machine") == ["rate", "made"]
    assert Options().made == [] and Options().made is not Options().made


def test_transformers_own_parser_reads_our_options():
    """It hands a field's metadata to argparse, which refuses entries that it does not know."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(["--rate", "2"])
    assert options == Options(rate=2.0)


def test_every_option_of_a_run_says_what_it_affects():
    named = names_affecting(DistillationConfig, "views", "weights", "machine")
    assert set(named) == set(OwnOptions.__annotations__)
    assert {"auto_augment", "num_repeats", "mixup_alpha"} <= set(names_affecting(DistillationConfig, "views"))
    assert "teacher_record" not in names_affecting(DistillationConfig, "views", "weights")


def test_the_arguments_are_those_of_the_loader_and_of_the_config():
    loading = DataArguments(dataset_name="digits", max_train_samples=3, image_size=32).loading()
    assert loading.keys() == inspect.signature(load_image_dataset).parameters.keys() - {"splits", "seed", "rows"}
    assert (loading["name"], loading["max_train_samples"]) == ("digits", 3)
    assert ModelArguments(hidden_size=8, teacher="x", model_size="tiny").config_overrides() == {"hidden_size": 8}
    everything = ModelArguments(**{item.name: 1 for item in fields(ModelArguments)}).config_overrides()
    assert everything.keys() <= inspect.signature(DeiTConfig).parameters.keys()


def test_a_directory_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("photos", "./photos", "../" + tmp_path.name, "owner/name", "cifar10", "hf://datasets/owner/name"):
        check_places(DataArguments(dataset_name=name))
    check_places(DataArguments(data_dir="photos"))
    for name in (str(tmp_path / "x"), "./x", "../x", "~/no such directory", "a/b/c"):
        with pytest.raises(ValueError, match=f"^dataset '{re.escape(name)}' could not be loaded: it is no local dir"):
            check_places(DataArguments(dataset_name=name))
    with pytest.raises(ValueError, match="^data_dir is 'x', which is not a directory"):
        check_places(DataArguments(data_dir="x"))
