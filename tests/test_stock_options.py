"""stock_options.py: every option of TrainingArguments has a meaning here, and one that cannot be kept is refused."""

import logging
from dataclasses import fields

import pytest
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_deit import DistillationConfig
from hf_deit.stock_options import STOCK_OPTIONS


# A value of each option that is not its default.
OTHER_VALUES = {
    **{"liger_kernel_config": {"rope": True}, "neftune_noise_alpha": 5.0, "parallelism_config": object()},
    **{"accelerator_config": {"split_batches": True}, "label_names": ["label"], "deepspeed": {}},
    **{"train_sampling_strategy": "sequential", "length_column_name": "size", "include_num_input_tokens_seen": "all"},
}
DEFAULTS = {item.name: item.default for item in fields(TrainingArguments) if item.init}


def other_value(name):
    return OTHER_VALUES.get(name, not DEFAULTS[name])


def names(status):
    return [name for name, option in STOCK_OPTIONS.items() if option.status == status]


def test_every_inherited_option_is_classified():
    assert STOCK_OPTIONS.keys() == DEFAULTS.keys() - DistillationConfig.__annotations__.keys()
    assert all(bool(option.why) == (option.status != "honoured") for option in STOCK_OPTIONS.values())


@pytest.mark.parametrize("name", names("refused"))
def test_what_is_refused_is_refused_by_name(tmp_path, name):
    assert other_value(name) != DEFAULTS[name]
    with pytest.raises(ValueError, match=f"^{name} is .*not supported: .*Leave {name} out"):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **{name: other_value(name)})


@pytest.mark.parametrize("name", names("no effect"))
def test_what_has_no_effect_is_one_warning(tmp_path, caplog, name):
    value = {"average_tokens_across_devices": False}.get(name, other_value(name))
    more = {"eval_strategy": "no"} if name == "do_eval" else {}
    with caplog.at_level(logging.WARNING, "hf_deit"):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **more, **{name: value})
    said = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert (len(said) == 1 and said[0].startswith(f"{name} has no effect: ")) or name == "do_eval"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"remove_unused_columns": True}, "remove_unused_columns is True, .*seeds"),
        ({"optim": "schedule_free_adamw"}, "optim is 'schedule_free_adamw', .*schedule-free"),
        ({"optim": "schedule_free_sgd"}, "optim is 'schedule_free_sgd'"),
    ],
)
def test_options_of_our_own_and_values_that_cannot_be_kept(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **fields)


def test_a_config_can_be_copied_in_silence(tmp_path, caplog):
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True)
    assert args.accelerator_config == AcceleratorConfig()
    with caplog.at_level(logging.WARNING, "hf_deit"):
        copy = DistillationConfig(
            **{item.name: getattr(args, item.name) for item in fields(args) if item.init}
            | {"base_learning_rate": None}
        )
    assert copy.learning_rate == args.learning_rate and not caplog.records
