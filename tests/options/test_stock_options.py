"""stock_options.py: each option of TrainingArguments, set to another value, does what its class says.

`SEEN` has for each honoured option a function that sets it, in a tiny run or in the object that it configures, and
asserts its effect. Options whose effect needs a run share one: `run_of` keeps what each set of options left behind.
"""

import logging
import math
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.runs import NO_CHANCE, trainer
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_deit import DistillationConfig, DistillationTrainer
from hf_deit.options.own_options import OwnOptions
from hf_deit.options.recipe import parse_recipe
from hf_deit.options.stock_options import FORMER_OPTIONS, STOCK_OPTIONS, FirstOptions, names_in_transformers


# A value of each option without effect, and of each refused one, that is not its default.
OTHER_VALUES = {
    **{"liger_kernel_config": {"rope": True}, "neftune_noise_alpha": 5.0, "parallelism_config": object()},
    **{"accelerator_config": {"split_batches": True}, "label_names": ["label"], "deepspeed": {}},
    **{"train_sampling_strategy": "sequential", "length_column_name": "size", "include_num_input_tokens_seen": "all"},
    **{"include_for_metrics": ["inputs"], "local_rank": 0},
}
FIELDS = {item.name: item.default for item in fields(TrainingArguments) if item.init}
OURS = set(OwnOptions.__annotations__)


def other_value(name):
    return OTHER_VALUES[name] if name in OTHER_VALUES else not FIELDS[name]


def names(status):
    return [name for name, option in STOCK_OPTIONS.items() if option.status == status]


# --- honoured: what is seen of each -------------------------------------------------------------------------------


class Setting:
    """What the functions in `SEEN` use: a trainer that is built, a run that is shared, and things replaced."""

    def __init__(self, images, folder, runs, patch):
        self.images, self.folder, self.runs, self.patch = images, folder, runs, patch

    def config(self, **options):
        return DistillationConfig(**{"output_dir": str(self.folder / "config"), "use_cpu": True} | options)

    def build(self, **options):
        """A trainer with its optimizer and schedule for 100 steps."""
        built = trainer(self.images, self.folder / "built", **NO_CHANCE | options)
        built.create_optimizer_and_scheduler(100)
        return built

    def loader(self, **options):
        return self.build(**options).get_train_dataloader()

    def schedule(self, **options):
        return self.build(**options).lr_scheduler.lr_lambdas[0].keywords

    def run_of(self, kind):
        """The trainer after one of `RUNS`, with `metrics`, and `written`: the names in its output_dir."""
        if kind not in self.runs:
            folder = self.folder / kind
            ran = trainer(self.images, folder, **NO_CHANCE | RUNS[kind])
            ran.emptied = self.spy(sys.modules["transformers.trainer"], "clear_device_cache")
            ran.metrics = ran.train().metrics
            ran.written = sorted(path.name for path in folder.iterdir())
            self.runs[kind] = ran
        return self.runs[kind]

    def spy(self, place, name):
        """Replace a function by one that keeps the arguments of its calls; return them as (args, kwargs)."""
        calls, original = [], getattr(place, name)

        def keep(*args, **kwargs):
            calls.append((args, kwargs))
            return original(*args, **kwargs)

        self.patch.setattr(place, name, keep)
        return calls


RUNS = {  # 6 steps of 8 views an epoch
    "steps": {
        **{"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3, "eval_on_start": True, "logging_steps": 4},
        **{"logging_first_step": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2},
        **{"max_steps": 6, "skip_memory_metrics": False, "torch_empty_cache_steps": 3},
    },
    "epochs": {
        **{"num_train_epochs": 2, "logging_strategy": "epoch", "save_strategy": "epoch", "eval_strategy": "epoch"},
        **{"report_to": "tensorboard", "load_best_model_at_end": True, "metric_for_best_model": "top1"},
        **{"greater_is_better": False, "gradient_accumulation_steps": 2, "save_total_limit": None},
    },
}


def logged(ran, key):
    return [entry["step"] for entry in ran.state.log_history if key in entry]


def seen_steps(key, steps, kind="steps"):
    def see(setting):
        assert logged(setting.run_of(kind), key) == steps

    return see


def seen_checkpoints(kind, numbers):
    def see(setting):
        assert [name for name in setting.run_of(kind).written if name.startswith("checkpoint")] == [
            f"checkpoint-{number}" for number in numbers
        ]

    return see


def seen_optimizer(expected, **options):
    def see(setting):
        defaults = setting.build(**options).optimizer.defaults
        assert {name: defaults[name] for name in expected} == expected

    return see


def seen_schedule(expected, **options):
    def see(setting):
        keywords = setting.schedule(**options)
        assert {name: keywords[name] for name in expected} == pytest.approx(expected)

    return see


def seen_loader(expected, **options):
    def see(setting):
        loader = setting.loader(**options)
        assert {name: getattr(loader, name) for name in expected} == expected

    return see


def seen_ddp(name, value):  # without its prefix
    def see(setting):
        assert getattr(setting.build(**{f"ddp_{name}": value}).accelerator.ddp_handler, name) == value

    return see


def seen_order(name):
    def see(setting):
        orders = [[int(view) for view in setting.build(**{name: seed})._get_train_sampler()] for seed in (1, 1, 2)]
        assert orders[0] == orders[1] != orders[2]

    return see


def seen_state(expected, **options):
    """What a config asks accelerate's PartialState for."""

    def see(setting):
        calls = []

        def partial_state(**kwargs):
            calls.append(kwargs)
            return original(**{"cpu": True} if kwargs.get("cpu") else {})

        original = transformers.training_args.PartialState
        setting.patch.setattr("transformers.training_args.PartialState", partial_state)
        setting.config(**options)
        assert {name: str(calls[0][name]) for name in expected} == expected

    return see


class FakeConfig(dict):
    def update(self, values, allow_val_change):
        super().update(values)


def seen_trackio(name, value, argument):
    """What trackio, which is not installed, would be called with."""

    def see(setting):
        fake = types.ModuleType("trackio")
        fake.calls = {}
        for function in ("init", "freeze", "sync", "log", "finish"):
            setattr(fake, function, lambda _name=function, **kwargs: fake.calls.setdefault(_name, kwargs))
        fake.__version__ = "99"
        fake.config = FakeConfig()
        fake.context_vars = types.SimpleNamespace(
            current_space_id=types.SimpleNamespace(get=lambda: "space"),
            current_project=types.SimpleNamespace(get=lambda: "project"),
        )
        setting.patch.setitem(sys.modules, "trackio", fake)
        setting.patch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: True)
        callback = transformers.integrations.TrackioCallback()
        built = setting.build(**{name: value})
        callback.setup(built.args, built.state, built.model)
        if argument == "space_id of freeze":
            callback.on_train_end(built.args, built.state, built.control, model=built.model)
            assert "freeze" not in fake.calls and "finish" in fake.calls  # False: no copy of the Space is made
        else:
            assert fake.calls["init"][argument] == value

    return see


def seen_hub(check, **options):
    """What the Hub's client is called with, `check(calls)`; the strategy is that of two checkpoints."""

    def see(setting):
        calls = []

        class Client:
            def create_repo(self, name, **kwargs):
                calls.append(("create_repo", {"name": name} | kwargs))
                return types.SimpleNamespace(repo_id=name)

            def upload_folder(self, **kwargs):
                calls.append(("upload_folder", kwargs))
                return types.SimpleNamespace(is_done=lambda: False, done=lambda: False, exception=lambda: None)

        setting.patch.setattr("transformers.trainer.hf_api", Client)
        setting.patch.setattr("hf_deit.training.publishing.auth_check", lambda *args, **kwargs: None)
        pushes = {"push_to_hub": True, "hub_token": "token", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        ran = trainer(setting.images, setting.folder / "hub", **NO_CHANCE | pushes | options)
        setting.patch.setattr(type(ran), "_finish_current_push", lambda self: None)
        ran.train()
        assert check(
            [kwargs for call, kwargs in calls if call == "create_repo"],
            [kwargs for call, kwargs in calls if call == "upload_folder"],
        ), calls

    return see


def see_max_grad_norm(setting):
    """A step of SGD with a learning rate of 1 is as long as the clipped gradient."""
    ran = trainer(
        setting.images,
        setting.folder / "clipped",
        **NO_CHANCE | {"max_grad_norm": 0.01, "optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0},
        **{"max_steps": 1, "lr_scheduler_type": "constant"},
    )
    before = [parameter.detach().clone() for parameter in ran.model.parameters()]
    ran.train()
    moved = math.hypot(*(float((new - old).norm()) for new, old in zip(ran.model.parameters(), before, strict=True)))
    assert moved == pytest.approx(0.01, rel=1e-3)


def see_label_smoothing(setting):
    built = setting.build(label_smoothing_factor=0.3, distillation_type="label")
    batch = next(iter(built.get_train_dataloader()))
    labels = batch["labels"]
    pixels = built.mixing(batch["pixel_values"], labels, batch["view_seeds"])[0]
    with torch.no_grad():
        loss = built.compute_loss(built.model.eval(), batch)
        outputs = built.model(pixel_values=pixels)
    by_hand = [
        F.cross_entropy(outputs[head], labels, label_smoothing=0.3) for head in ("cls_logits", "distillation_logits")
    ]
    torch.testing.assert_close(loss, sum(by_hand) / 2)


def see_nan_filter(setting):
    def losses(hidden):
        ran = trainer(
            setting.images, setting.folder / f"nan{hidden}", **NO_CHANCE, max_steps=2, logging_nan_inf_filter=hidden
        )
        step = ran.training_step
        ran.training_step = lambda *args, **kwargs: step(*args, **kwargs) * math.nan
        ran.train()
        return [entry["loss"] for entry in ran.state.log_history if "loss" in entry]

    assert all(map(math.isnan, losses(False))) and not any(map(math.isnan, losses(True)))


def see_checkpointing(old):
    """gradient_checkpointing is the former name of activation_checkpointing."""
    name = "gradient_checkpointing" if old else "activation_checkpointing"

    def see(setting):
        options = {name: True, f"{name}_kwargs": {"use_reentrant": False, "every_n_layers": 2}, "max_steps": 1}
        ran = trainer(setting.images, setting.folder / "checkpointing", **NO_CHANCE | options)
        calls = setting.spy(ran.model, "activation_checkpointing_enable")
        ran.train()
        assert ran.model.is_activation_checkpointing
        ((_, kwargs),) = calls
        assert (kwargs["every_n_layers"], kwargs["activation_checkpointing_kwargs"]) == (2, {"use_reentrant": False})

    return see


def see_target_modules(setting):
    made = types.ModuleType("galore_torch")
    for kind in ("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit"):
        setattr(made, kind, torch.optim.AdamW)
    setting.patch.setitem(sys.modules, "galore_torch", made)
    setting.patch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)
    ran = trainer(
        setting.images,
        setting.folder / "galore",
        optim="galore_adamw",
        optim_target_modules=["classifier"],
        **NO_CHANCE,
    )
    groups = ran.get_optimizer_cls_and_kwargs(ran.args, ran.model)[1]["params"]
    assert [("rank" in group, len(group["params"])) for group in groups][1] == (True, 2)  # the two heads' weights


def see_log_level(setting):
    before = transformers.logging.get_verbosity()
    try:
        setting.build(log_level="error")
        assert transformers.logging.get_verbosity() == logging.ERROR
    finally:
        transformers.logging.set_verbosity(before)


def see_on_other_ranks(name, value, of, expected):
    def see(setting):
        config, default = setting.config(**{name: value}), setting.config()
        for rank, local in ((1, 0), (1, 1)):  # the first process of the second machine, and the second of the first
            setting.patch.setattr(TrainingArguments, "process_index", rank)
            setting.patch.setattr(TrainingArguments, "local_process_index", local)
            now = [
                getattr(args, of)() if callable(getattr(args, of)) else getattr(args, of) for args in (config, default)
            ]
            if now == expected:
                return
        raise AssertionError(now)

    return see


def see_tf32(setting):
    calls = []
    setting.patch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    setting.patch.setattr("transformers.training_args.enable_tf32", calls.append)
    for value in (True, False, None):
        setting.config(tf32=value)
    assert calls == [True, False]


def see_half(name):
    def see(setting):
        assert setting.config(**{name: True}).mixed_precision == name
        if name == "bf16":
            built = setting.build(bf16=True)
            with built.compute_loss_context_manager(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                assert built.accelerator.mixed_precision == "bf16"

    return see


def see_compile(setting):
    plugin = setting.build(torch_compile_backend="eager", torch_compile_mode="default").accelerator.state.dynamo_plugin
    assert (plugin.backend.value, plugin.mode) == ("EAGER", "default")
    assert setting.build(torch_compile=True).accelerator.state.dynamo_plugin.backend.value == "INDUCTOR"


def see_resume(setting):
    class Caught(Exception):
        pass

    def train(self, resume_from_checkpoint):
        raise Caught(resume_from_checkpoint)

    setting.patch.setattr(DistillationTrainer, "train", train)
    with pytest.raises(Caught, match="^some/checkpoint$"):
        trainer(setting.images, setting.folder, **NO_CHANCE, resume_from_checkpoint="some/checkpoint").train_and_save()


def see_callback_states(setting):
    for restored in (False, True):
        ran = trainer(
            setting.images,
            setting.folder / "callbacks",
            callbacks=[EarlyStoppingCallback(5)],
            **NO_CHANCE | {"restore_callback_states_from_checkpoint": restored},
        )
        state = {"args": {"early_stopping_patience": 7, "early_stopping_threshold": 0.0}, "attributes": {}}
        ran.state.stateful_callbacks = {"EarlyStoppingCallback": state}
        ran._load_callback_state()
        (callback,) = (each for each in ran.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback))
        assert callback.early_stopping_patience == (7 if restored else 5)


def see_determinism(setting):
    try:
        setting.patch.setenv("CUDA_LAUNCH_BLOCKING", "0")
        setting.build(full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def see_debug(setting):
    made = []
    setting.patch.setattr("transformers.trainer.DebugUnderflowOverflow", made.append)
    ran = trainer(setting.images, setting.folder / "debug", **NO_CHANCE, debug="underflow_overflow", max_steps=1)
    ran.train()
    assert made == [ran.model]


def see_progress_bar(setting):
    callbacks = [
        {type(each).__name__ for each in setting.build(disable_tqdm=off).callback_handler.callbacks}
        for off in (False, True)
    ]
    assert callbacks[0] - callbacks[1] == {"ProgressOfTheRest"} and callbacks[1] - callbacks[0] == {"PrinterCallback"}


def see_best_model(setting):
    """With greater_is_better: false, the best checkpoint is that of the lowest accuracy."""
    ran = setting.run_of("epochs")
    top1 = {entry["step"]: entry["eval_top1"] for entry in ran.state.log_history if "eval_top1" in entry}
    assert ran.state.best_metric == min(top1.values()) and len(top1) == 2
    assert ran.state.best_model_checkpoint.endswith(f"checkpoint-{ran.state.best_global_step}")
    assert top1[ran.state.best_global_step] == min(top1.values())


def see_ddp_timeout(setting):
    seen_state({"timeout": "0:00:07"}, use_cpu=False, ddp_timeout=7)(setting)


def see_eval_accumulation(setting):
    built = setting.build(eval_accumulation_steps=1)
    calls = setting.spy(sys.modules["transformers.trainer_pt_utils"].EvalLoopContainer, "to_cpu_and_numpy")
    built.evaluate()
    default = len(calls)
    calls.clear()
    setting.build().evaluate()
    assert default > len(calls)


SEEN = {
    "output_dir": lambda setting: setting.run_of("steps").written,
    "per_device_train_batch_size": seen_loader({"total_batch_size": 4}, per_device_train_batch_size=4),
    "per_device_eval_batch_size": lambda setting: (
        len(setting.build(per_device_eval_batch_size=5).get_eval_dataloader()) == 4
    ),
    "num_train_epochs": lambda setting: setting.run_of("epochs").state.epoch == 2,
    "max_steps": lambda setting: setting.run_of("steps").state.global_step == 6,
    "learning_rate": seen_optimizer({"lr": 2e-3}, learning_rate=2e-3),
    "lr_scheduler_type": lambda setting: (
        setting.build(lr_scheduler_type="linear").lr_scheduler.lr_lambdas[0].func.__name__.startswith("_get_linear")
    ),
    "lr_scheduler_kwargs": seen_schedule(
        {"num_cycles": 2, "min_lr_rate": 1e-2, "warmup_lr_rate": 1e-3}, lr_scheduler_kwargs={"num_cycles": 2}
    ),
    "warmup_steps": seen_schedule({"num_warmup_steps": 30}, warmup_steps=0.3),
    "optim": lambda setting: isinstance(setting.build(optim="sgd").optimizer, torch.optim.SGD),
    "optim_args": seen_optimizer({"momentum": 0.7}, optim="sgd", optim_args="momentum=0.7"),
    "optim_target_modules": see_target_modules,
    "weight_decay": lambda setting: (
        [group["weight_decay"] for group in setting.build(weight_decay=0.3).optimizer.param_groups] == [0.3, 0]
    ),
    "adam_beta1": seen_optimizer({"betas": (0.8, 0.999)}, adam_beta1=0.8),
    "adam_beta2": seen_optimizer({"betas": (0.9, 0.9)}, adam_beta2=0.9),
    "adam_epsilon": seen_optimizer({"eps": 1e-6}, adam_epsilon=1e-6),
    "gradient_accumulation_steps": lambda setting: setting.run_of("epochs").state.global_step == 6,
    "max_grad_norm": see_max_grad_norm,
    "label_smoothing_factor": see_label_smoothing,
    "bf16": see_half("bf16"),
    "fp16": see_half("fp16"),
    "tf32": see_tf32,
    "activation_checkpointing": see_checkpointing(old=False),
    "activation_checkpointing_kwargs": see_checkpointing(old=False),
    "gradient_checkpointing": see_checkpointing(old=True),
    "gradient_checkpointing_kwargs": see_checkpointing(old=True),
    "torch_compile": see_compile,
    "torch_compile_backend": see_compile,
    "torch_compile_mode": see_compile,
    "torch_empty_cache_steps": lambda setting: len(setting.run_of("steps").emptied) == 2,
    "logging_strategy": seen_steps("loss", [3, 6], "epochs"),
    "logging_steps": seen_steps("loss", [1, 4]),
    "logging_first_step": seen_steps("loss", [1, 4]),
    "log_on_each_node": see_on_other_ranks("log_on_each_node", False, "should_log", [False, True]),
    "logging_nan_inf_filter": see_nan_filter,
    "log_level": see_log_level,
    "log_level_replica": see_on_other_ranks("log_level_replica", "error", "get_process_log_level", [40, 30]),
    "disable_tqdm": see_progress_bar,
    "report_to": lambda setting: any(
        "tfevents" in path.name for path in Path(setting.run_of("epochs").args.output_dir).rglob("*")
    ),
    "run_name": seen_trackio("run_name", "mine", "name"),
    "project": seen_trackio("project", "mine", "project"),
    "trackio_space_id": seen_trackio("trackio_space_id", "me/space", "space_id"),
    "trackio_bucket_id": seen_trackio("trackio_bucket_id", "me/bucket", "bucket_id"),
    "trackio_static_space_id": seen_trackio("trackio_static_space_id", False, "space_id of freeze"),
    "eval_strategy": seen_steps("eval_top1", [3, 6], "epochs"),
    "eval_steps": seen_steps("eval_top1", [0, 4, 6]),
    "eval_delay": seen_steps("eval_top1", [0, 4, 6]),
    "eval_on_start": seen_steps("eval_top1", [0, 4, 6]),
    "eval_accumulation_steps": see_eval_accumulation,
    "save_strategy": seen_checkpoints("epochs", [3, 6]),
    "save_steps": seen_checkpoints("steps", [4, 6]),
    "save_total_limit": seen_checkpoints("steps", [4, 6]),
    "save_on_each_node": see_on_other_ranks("save_on_each_node", True, "should_save", [True, False]),
    "push_to_hub": seen_hub(lambda made, sent: len(made) == 1 and len(sent) >= 1),
    "hub_token": seen_hub(lambda made, sent: made[0]["token"] == sent[0]["token"] == "other", hub_token="other"),
    "hub_private_repo": seen_hub(lambda made, sent: made[0]["private"] is True, hub_private_repo=True),
    "hub_model_id": seen_hub(lambda made, sent: made[0]["name"] == sent[0]["repo_id"] == "me/m", hub_model_id="me/m"),
    "hub_strategy": seen_hub(lambda made, sent: not sent, hub_strategy="end"),
    "hub_always_push": seen_hub(lambda made, sent: len(sent) == 2, hub_always_push=True),
    "hub_revision": seen_hub(lambda made, sent: sent[0]["revision"] == "side", hub_revision="side"),
    "load_best_model_at_end": see_best_model,
    "metric_for_best_model": see_best_model,
    "greater_is_better": see_best_model,
    "resume_from_checkpoint": see_resume,
    "restore_callback_states_from_checkpoint": see_callback_states,
    "full_determinism": see_determinism,
    "seed": seen_order("seed"),
    "data_seed": seen_order("data_seed"),
    "use_cpu": seen_state({"cpu": "True"}, use_cpu=True),
    "dataloader_num_workers": seen_loader({"num_workers": 1}, dataloader_num_workers=1),
    "dataloader_pin_memory": seen_loader({"pin_memory": True}, dataloader_pin_memory=True, use_cpu=False),
    "dataloader_persistent_workers": seen_loader(
        {"persistent_workers": False}, dataloader_num_workers=1, dataloader_persistent_workers=False
    ),
    "dataloader_prefetch_factor": seen_loader(
        {"prefetch_factor": 5}, dataloader_num_workers=1, dataloader_prefetch_factor=5
    ),
    "dataloader_multiprocessing_context": lambda setting: (
        setting.loader(
            dataloader_num_workers=1, dataloader_multiprocessing_context="spawn"
        ).multiprocessing_context.get_start_method()
        == "spawn"
    ),
    "ddp_find_unused_parameters": seen_ddp("find_unused_parameters", True),
    "ddp_bucket_cap_mb": seen_ddp("bucket_cap_mb", 7),
    "ddp_broadcast_buffers": seen_ddp("broadcast_buffers", False),
    "ddp_static_graph": seen_ddp("static_graph", True),
    "ddp_backend": seen_state({"backend": "gloo"}, ddp_backend="gloo"),
    "ddp_timeout": see_ddp_timeout,
    "fsdp": lambda setting: setting.config(fsdp=True).fsdp_plugin_args["fsdp_version"] == 2,
    "fsdp_config": lambda setting: (
        setting.config(fsdp=True, fsdp_config={"version": 1}).fsdp_plugin_args["fsdp_version"] == 1
    ),
    "debug": see_debug,
    "skip_memory_metrics": lambda setting: any("mem_cpu" in name for name in setting.run_of("steps").metrics),
}


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FIELDS)
def test_every_option_of_transformers_is_honoured_or_known(name, tiny_images, folder, runs, monkeypatch):
    """A new option of Transformers fails here by its name, until it is classified and its effect is seen."""
    status = "honoured" if name in OURS else STOCK_OPTIONS[name].status
    assert (name in SEEN) == (status == "honoured" and name != "remove_unused_columns"), f"{name} is {status}"
    if name in SEEN:
        seen = SEEN[name](Setting(tiny_images(), folder, runs, monkeypatch))  # a function asserts, a lambda answers
        assert seen is None or seen


def test_every_inherited_option_is_classified():
    assert STOCK_OPTIONS.keys() == FIELDS.keys() - OwnOptions.__annotations__.keys()
    assert all(bool(option.why) == (option.status != "honoured") for option in STOCK_OPTIONS.values())


def test_the_names_read_from_the_source_are_those_of_the_class():
    assert names_in_transformers() == {item.name for item in fields(TrainingArguments)}


def test_what_help_says_of_the_first_inherited_options_is_transformers_own():
    stock = {item.name: item for item in fields(TrainingArguments)}
    for item in fields(FirstOptions):
        assert item.metadata["help"].rstrip(".") == stock[item.name].metadata["help"].partition(". ")[0].rstrip(".")
        assert item.default == stock[item.name].default and item.name in STOCK_OPTIONS


@pytest.mark.parametrize("name", names("refused"))
def test_what_is_refused_is_refused_by_name(tmp_path, name):
    assert other_value(name) != FIELDS[name]
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


def test_a_warm_up_of_no_steps_is_none(tmp_path):
    assert DistillationConfig(output_dir=str(tmp_path), use_cpu=True).get_warmup_steps(3000) == 50
    for value, steps in ((0, 0), (0.0, 0), (0.1, 300), (7, 7), (7.0, 7)):
        args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, warmup_steps=value)
        assert args.get_warmup_steps(3000) == steps
    constant = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, lr_scheduler_type="constant")
    assert constant.get_warmup_steps(3000) == 0
    with pytest.raises(ValueError, match="^warmup_steps is 2.5; it must be a whole number of steps"):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, warmup_steps=2.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eval_steps": 100}, "eval_steps has no effect: eval_strategy is 'epoch'; set eval_strategy: steps"),
        ({"save_steps": 100}, "save_steps has no effect: save_strategy is 'epoch'; set save_strategy: steps"),
        (
            {"logging_strategy": "epoch", "logging_steps": 5},
            "logging_steps has no effect: logging_strategy is 'epoch'; set logging_strategy: steps",
        ),
        ({"warmup_steps": 3, "warmup_epochs": 9}, "warmup_epochs has no effect: warmup_steps is set"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 3},
            "warmup_steps has no effect: the schedule 'constant' has no warm-up",
        ),
        ({"lr_scheduler_type": "linear", "min_lr": 2e-5}, "min_lr has no effect: lr_scheduler_type is 'linear'"),
        ({"optim": "sgd", "adam_beta2": 0.9}, "adam_beta2 has no effect: the optimizer 'sgd' does not read it"),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9,betas=1"},
            "'betas=1' of optim_args has no effect: the optimizer 'sgd' does not read it",
        ),
        (
            {"optim_target_modules": ["classifier"]},
            "optim_target_modules has no effect: the optimizer 'adamw_torch_fused' does not read it",
        ),
        ({"fsdp_config": {"version": 1}}, "fsdp_config has no effect: fsdp is not set"),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": False}},
            "activation_checkpointing_kwargs has no effect: activation_checkpointing is not set",
        ),
        ({"ddp_timeout": 7}, "ddp_timeout has no effect: Transformers sets it for processes on accelerators only"),
        ({"eval_strategy": "steps", "eval_steps": 100, "warmup_steps": 3, "optim": "sgd"}, None),
        ({"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "linear"}, None),
    ],
)
def test_an_option_that_another_makes_idle_is_one_warning(tmp_path, caplog, options, said):
    with caplog.at_level(logging.WARNING, "hf_deit"):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    assert [record.getMessage() for record in caplog.records] == ([said] if said else [])


@pytest.mark.parametrize("name", FORMER_OPTIONS)
def test_an_option_of_earlier_transformers_is_refused_with_its_successor(recipe, name):
    assert name not in FIELDS
    with pytest.raises(ValueError, match=f"key '{name}', which Transformers no longer has: (set|leave)"):
        parse_recipe([DistillationConfig], [recipe(f"{name}: 1")])
    for successor in FORMER_OPTIONS[name].split()[1:2]:
        assert successor.rstrip(":") in FIELDS or successor in ("it", "it:", "the")
