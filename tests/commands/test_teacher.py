"""teacher.py: a teacher that is there is found, one that is missing is trained; whole runs are in test_recipes.py."""

import pytest

from hf_deit import DataArguments, DistillationConfig
from hf_deit.commands import teacher
from hf_deit.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "teacher.yaml"
    path.write_text(f"model_name_or_path: timm:resnet10t\noutput_dir: {tmp_path / 'run'}\nuse_cpu: true\n")
    return path


def test_a_finished_teacher_is_not_trained_again_and_a_missing_one_is(recipe, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(teacher, "train_teacher", lambda *args, **kwargs: trained.append((args, kwargs)))
    data = DataArguments(dataset_name="digits", image_size=32)
    assert teacher.find_or_train_teacher(recipe, data, command=["x"]) == str(tmp_path / "run")
    ((_, used, training), kwargs), *more = trained
    assert (
        used is data
        and training.output_dir == str(tmp_path / "run")
        and kwargs == {"command": ["x"], "summary": None}
        and not more
    )

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    (tmp_path / "run" / "config.json").write_text("{}")
    assert teacher.find_or_train_teacher(recipe, data, command=[]) == str(tmp_path / "run") and len(trained) == 1


def test_without_images_to_evaluate_on_evaluation_is_off(tmp_path):
    arguments = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, distillation_type="none")
    assert arguments.eval_strategy == "epoch"
    teacher.evaluate_nothing(arguments)
    assert arguments.eval_strategy == "no"
    with pytest.raises(UserError, match="load_best_model_at_end needs images to evaluate on"):
        teacher.evaluate_nothing(
            DistillationConfig(
                output_dir=str(tmp_path), use_cpu=True, distillation_type="none", load_best_model_at_end=True
            )
        )
