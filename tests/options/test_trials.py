"""A trial of a hyperparameter search is the run that its values make; what could not be one is refused."""

import optuna
import pytest
import torch
from support.runs import ConvTeacher, student, trainer
from transformers import TrainerCallback

from hf_deit import (
    DataArguments,
    DistillationConfig,
    DistillationTrainer,
    ModelArguments,
    TrainViews,
    UserError,
    build_eval_transform,
    build_image_processor,
    build_train_transform,
    load_teacher,
)
from hf_deit.options.trials import check_trial


optuna.logging.set_verbosity(optuna.logging.ERROR)
SHORT = {
    **{"num_train_epochs": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "use_cpu": True},
    **{"dataloader_num_workers": 0, "disable_tqdm": True, "report_to": [], "save_strategy": "no", "logging_steps": 1},
    "min_lr": 1e-6,
}
SMALL = ModelArguments(model_size="tiny", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
# Values of two trials; drop_path_rate is a field of the student.
TRIALS = [
    {"learning_rate": 2e-3, "mixup_alpha": 0.2, "cutmix_alpha": 0.3},
    {
        **{"num_train_epochs": 3, "seed": 7, "ema_decay": 0.9, "base_learning_rate": 4e-2, "drop_path_rate": 0.5},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.3, "num_repeats": 1},
        **{"label_smoothing_factor": 0.3, "class_weighting": "inverse", "distillation_type": "soft"},
        **{"auto_augment": "none", "horizontal_flip": 0.0, "random_erasing_prob": 0.9, "warmup_epochs": 1},
    },
]


class Keep(TrainerCallback):
    """Keeps what each run of a trainer ends with."""

    def __init__(self):
        self.runs = []

    def on_train_end(self, args, state, control, model, **kwargs):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        timed = ("time", "per_second")
        log = [{key: value for key, value in line.items() if not key.endswith(timed)} for line in state.log_history]
        self.runs.append((weights, log))


@pytest.fixture
def make(tiny_images, tmp_path):
    images = tiny_images(24, 9)

    def make(model=SMALL, folder="run", **fields):
        options = {name: fields.pop(name) for name in ("model_init", "compute_metrics") if name in fields}
        args = DistillationConfig(output_dir=str(tmp_path / folder), **SHORT | fields)
        processor = build_image_processor(build_eval_transform(16))
        mean, std = processor.image_mean, processor.image_std
        built = DistillationTrainer(
            None if "model_init" in options else model,
            args,
            load_teacher(ConvTeacher(), id2label=None, mean=mean, std=std, image_size=16),
            train_dataset=images["train"],
            eval_dataset=images["eval"],
            data_args=DataArguments(dataset_name="tiny", image_size=16),
            **options,
        )
        built.keep = Keep()
        built.add_callback(built.keep)
        return built

    return make


def alone(make, values, folder="alone"):
    """What a run of its own ends with."""
    fields = {name: value for name, value in values.items() if name != "drop_path_rate"}
    model = ModelArguments(**vars(SMALL) | {"drop_path_rate": values.get("drop_path_rate")})
    run = make(model, folder, **fields)
    run.train()
    return run.keep.runs[0]


def assert_same(run, other):
    (weights, log), (others, other_log) = run, other
    assert weights.keys() == others.keys()
    assert not [name for name in weights if not torch.equal(weights[name], others[name])]
    assert [line for line in log if "loss" in line or "eval_loss" in line] == [
        line for line in other_log if "loss" in line or "eval_loss" in line
    ]


def test_a_trial_is_the_run_that_its_values_make(make):
    """Bit for bit; also the one that comes after another, and the training with what was found."""
    separate = [alone(make, values, f"alone{number}") for number, values in enumerate(TRIALS)]
    assert separate[0][1] != separate[1][1]
    searching = make()
    settings = searching.args.to_dict()
    best = searching.hyperparameter_search(lambda trial: TRIALS[trial.number % 2], n_trials=3)
    assert len(searching.keep.runs) == 3
    for number, run in enumerate(searching.keep.runs):
        assert_same(run, separate[number % 2])
    losses = [[line["eval_loss"] for line in log if "eval_loss" in line][-1] for _, log in searching.keep.runs]
    assert best.objective == min(losses)
    assert searching.args.to_dict() == settings and searching.accuracy == {}
    assert 0 <= searching.evaluate()["eval_top1"] <= 1
    for name, value in TRIALS[1].items():
        setattr(searching.args, name, value)
    searching.train()
    assert_same(searching.keep.runs[-1], separate[1])


def test_the_objective_is_the_loss_to_minimise_and_the_fused_accuracy_to_maximise(make):
    searching = make()
    for direction, name in (("minimize", "eval_loss"), ("maximize", "eval_top1")):
        best = searching.hyperparameter_search(lambda trial: TRIALS[0], n_trials=1, direction=direction)
        assert best.objective == [line[name] for line in searching.keep.runs[-1][1] if name in line][-1]


def test_model_init_reads_its_field_from_the_trial(make):
    def model_init(trial):
        rate = 0.0 if trial is None else trial.suggest_float("drop_path_rate", 0.25, 0.5)
        return ModelArguments(**vars(SMALL) | {"drop_path_rate": rate})

    searching = make(model_init=model_init, save_strategy="epoch")
    best = searching.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 2e-3)}, n_trials=1
    )
    assert_same(searching.keep.runs[0], alone(make, best.hyperparameters))


def test_model_init_trains_what_the_same_model_as_an_object_trains(make):
    def model_init():
        torch.manual_seed(3)
        return student(drop_path_rate=0.3)

    run = make(model_init=model_init)
    run.train()
    other = make(model_init(), "object")
    other.train()
    assert_same(run.keep.runs[0], other.keep.runs[0])
    run.train()  # from the beginning again
    assert_same(run.keep.runs[1], run.keep.runs[0])


def test_trials_have_folders_of_their_own_and_an_earlier_search_is_set_aside(make, tmp_path):
    for _ in range(2):
        make(save_strategy="epoch").hyperparameter_search(lambda trial: TRIALS[0], n_trials=2)
    for number in range(2):
        folder = tmp_path / "run" / f"run-{number}"
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
        assert len(list((folder / "_set_aside").iterdir())) == 2
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_what_is_set_on_the_arguments_later_has_its_effect(make):
    run = make()
    run.args.mixup_alpha, run.args.learning_rate = 0.2, 2e-3
    run.args.cutmix_alpha = 0.3
    run.train()
    assert_same(run.keep.runs[0], alone(make, TRIALS[0]))


def test_what_one_trial_asks_for_is_not_asked_of_the_next(make):
    """Without AutoAugment colour jitter has an effect, and back in the settings of the search it has none."""
    searching = make()
    first = {"auto_augment": "none", "color_jitter": 0.1, "max_steps": 1}
    values = [first, {"learning_rate": 1e-3, "max_steps": 1}]
    searching.hyperparameter_search(lambda trial: values[trial.number], n_trials=2)
    assert len(searching.keep.runs) == 2


@pytest.mark.parametrize(
    "values, message",
    [
        ({"output_dir": "other"}, "output_dir.*what is learnt"),
        ({"bf16": True}, "bf16.*number format"),
        ({}, "returned {}; expected a dict"),
        ({"learning_rat": 1e-3}, "learning_rat has no effect"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"color_jitter": 0.1}, "color_jitter has no effect: auto_augment is 'rand"),
        ({"distillation_temperature": 1.0}, "no effect.*'soft'"),
        ({"min_crop_scale": 0.5}, "min_crop_scale has no effect: random_crop is 'padded'"),
        ({"distillation_type": "none"}, "distillation head"),
    ],
)
def test_a_trial_that_could_not_be_honest_is_refused(make, values, message):
    with pytest.raises(UserError, match=message):
        make().hyperparameter_search(lambda trial: values, n_trials=1)


def test_every_searchable_name_is_an_option():
    with pytest.raises(UserError, match="teacher_replay"):
        check_trial({"teacher_replay": "folder"}, DistillationConfig)
    assert check_trial({"optim": "sgd", "mixup_alpha": 1, "patch_size": 8}, DistillationConfig)["patch_size"] == 8


SPACE = {"hp_space": lambda trial: {"learning_rate": 1e-3}}


@pytest.mark.parametrize(
    "fields, options, message",
    [
        ({"push_to_hub": True}, SPACE, "push_to_hub"),
        ({"resume_from_checkpoint": "auto"}, SPACE, "resume_from_checkpoint"),
        ({}, {}, "hp_space is missing"),
        ({}, SPACE | {"backend": "ray"}, "backend is 'ray'"),
        ({}, SPACE | {"n_jobs": 2}, "n_jobs"),
        ({}, SPACE | {"direction": ["minimize", "maximize"]}, "compute_objective"),
        ({"model": "object"}, SPACE, "model_init"),
    ],
)
def test_a_search_that_could_not_be_honest_is_refused(make, fields, options, message):
    if fields.get("model"):
        fields = {"model": student()}
    pushes = fields.pop("push_to_hub", False)
    searching = make(**fields)
    searching.args.push_to_hub = pushes
    with pytest.raises(UserError, match=message):
        searching.hyperparameter_search(**options)


def test_records_of_a_teacher_are_not_searched(tiny_images, tmp_path):
    recording = trainer(tiny_images(24, 9), tmp_path, teacher_record=str(tmp_path / "record"))
    with pytest.raises(UserError, match="teacher_record.*search"):
        recording.hyperparameter_search(**SPACE)
    recording.args.mixup_alpha = 0.1
    with pytest.raises(UserError, match="mixup_alpha was set after"):
        recording.train()


def test_views_of_another_transform_keep_theirs(tiny_images, tmp_path):
    run = trainer(tiny_images(24, 9), tmp_path)
    run.args.horizontal_flip = 0.0
    run.follow_settings()
    assert run.train_dataset.transform == build_train_transform(16, **run.args.transform_options())
    run.train_dataset = TrainViews(run.train_dataset.images, build_train_transform(16, horizontal_flip=0.9), 1)
    run.args.auto_augment = "none"
    with pytest.raises(UserError, match="auto_augment has no effect: train_dataset"):
        run.train()


@pytest.mark.parametrize("given", [{}, {"model": student(), "model_init": student}])
def test_either_a_model_or_a_function_that_makes_one(given, tmp_path):
    with pytest.raises(UserError, match="model and model_init given"):
        DistillationTrainer(args=DistillationConfig(output_dir=str(tmp_path), use_cpu=True), **given)


def test_a_config_with_changes_is_the_one_made_with_them(tmp_path):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "num_train_epochs": 10, "warmup_lr": 1e-5}
    config = DistillationConfig(**given)
    for changes in ({"num_train_epochs": 4}, {"learning_rate": 0.1}, {"base_learning_rate": 1e-3}, {"optim": "sgd"}):
        made = DistillationConfig(**given | changes)
        assert config.with_changes(changes).to_dict() == made.to_dict()
        assert made.with_changes({}).to_dict() == made.to_dict()
    assert DistillationConfig(**given, max_steps=5).with_changes({"num_train_epochs": 4}).max_steps == -1
