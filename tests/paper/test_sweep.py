"""Tables as runs: what a scale changes, what a run needs, what counts as done, and the numbers of the table."""

import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from scipy import stats
from support.sweeps import FILES, made_up_sweep, write_recipes

from hf_deit import DataArguments, DistillationConfig, ModelArguments, parse_recipe
from hf_deit.arguments import ClassifierArguments
from hf_deit.paper.claims import claims_of
from hf_deit.paper.sweep import Sweep, mean_and_deviation, mean_and_interval


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    write_recipes(tmp_path)
    monkeypatch.chdir(tmp_path)
    return made_up_sweep


def finish(sweep, run, **metrics):
    output = Path(run.keys["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    (output / "trainer_state.json").write_text("{}")
    sweep.record(run, {"train_samples_per_second": 1000.0, **metrics}, versions={})


def test_at_the_papers_scale_a_run_is_its_recipe(sweep):
    runs = {run.stem: run for run in sweep("paper").runs}
    plain = runs["ablations/no_erasing-seed1"]
    assert plain.keys == FILES["ablations/no_erasing"] | {
        "seed": 1,
        "output_dir": "outputs/paper/ablations/no_erasing-seed1",
    }
    assert runs["imagenet/deit_base_distilled-seed0"].keys["teacher"] == "timm:big"
    assert plain.views == 300 * 1_281_167


def test_a_scale_changes_what_it_says_and_leaves_the_row_its_own(sweep):
    runs = {run.stem: run.keys for run in sweep("little").runs}
    plain, without = runs["imagenet/deit_base-distillation_type=none-seed0"], runs["ablations/no_erasing-seed0"]
    assert plain["random_erasing_prob"] == 0.1 and without["random_erasing_prob"] == 0
    assert {key: value for key, value in plain.items() if without[key] != value}.keys() == {
        "random_erasing_prob",
        "output_dir",
    }
    assert plain["num_train_epochs"] == 30 and plain["image_size"] == 32 and plain["hidden_size"] == 96
    tuned = runs["imagenet/deit_base_384-model_name_or_path=no_erasing-seed0"]
    assert tuned["num_train_epochs"] == 3 and tuned["image_size"] == 48


def test_a_run_comes_after_its_teacher_and_the_student_it_starts_from(sweep):
    little = sweep("little")
    stems = [run.stem for run in little.runs]
    assert len(stems) == len(set(stems)) == 9  # four a seed, and the one teacher of both seeds
    for run in little.runs:
        for needed in run.needs:
            assert stems.index(needed.stem) < stems.index(run.stem)
    distilled = little.runs[stems.index("imagenet/deit_base_distilled-seed1")]
    assert [needed.stem for needed in distilled.needs] == ["little/convnet_teacher-seed0"]
    assert distilled.keys["teacher"] == "outputs/little/little/convnet_teacher-seed0"
    teacher = distilled.needs[0]
    assert teacher.script == "run_teacher.py" and distilled.script == "run_distill.py"
    assert teacher.keys["num_train_epochs"] == 8 and "hidden_size" not in teacher.keys
    tuned = little.runs[stems.index("imagenet/deit_base_384-model_name_or_path=no_erasing-seed1")]
    assert tuned.keys["model_name_or_path"] == "outputs/little/ablations/no_erasing-seed1"


def test_a_subset_is_drawn_by_the_seed_so_each_seed_has_its_teacher(sweep, tmp_path):
    """Of the same images; of the student's length where the table says so."""
    path = tmp_path / "recipes/scales/little.yaml"
    path.write_text(yaml.safe_dump(FILES["scales/little"] | {"unless_said": {"max_train_samples": 2500}}))
    keys = {"max_train_samples": 5000, "num_train_epochs": 150}
    for teacher_too, length in ((False, 8), (True, 15)):
        columns = {
            "2,500": {"recipe": "{}"},
            "5,000": {"recipe": "{}", "keys": keys, "teacher_too": teacher_too},
        }
        table = FILES["tables/a"] | {
            "columns": columns,
            "rows": [{"name": "token", "recipe": "imagenet/deit_base_distilled"}],
        }
        (tmp_path / "recipes/tables/a.yaml").write_text(yaml.safe_dump(table))
        little = sweep("little")
        found = {(cell.column, seed): little.run_of(cell, seed) for cell in little.cells for seed in (0, 1)}
        for (column, seed), run in found.items():
            (teacher,) = run.needs
            assert run.keys["teacher"] == teacher.keys["output_dir"] and teacher.seed == run.seed == seed
            if column == "2,500" or teacher_too:
                assert (
                    run.keys["max_train_samples"] == teacher.keys["max_train_samples"] == int(column.replace(",", ""))
                )
        assert found["5,000", 0].epochs == 15 and found["2,500", 0].epochs == 30
        assert found["5,000", 0].needs[0].epochs == length and found["2,500", 0].needs[0].epochs == 8
        assert len({run.teacher_record for run in found.values()}) == 4


def test_a_scale_like_another_has_its_fields_rows_and_seeds(sweep, tmp_path):
    scales = tmp_path / "recipes/scales"
    (scales / "little.yaml").write_text(yaml.safe_dump(FILES["scales/little"] | {"seeds": {"default": 2, "a": 4}}))
    (scales / "twin.yaml").write_text(yaml.safe_dump({"like": "little", "data": {"dataset_name": "digits"}}))
    little, twin = sweep("little", None), sweep("twin", None)
    assert little.seeds == twin.seeds == (0, 1, 2, 3)
    assert sweep("paper", None).seeds == (0, 1, 2)
    assert [cell.row for cell in little.cells] == [cell.row for cell in twin.cells]
    for one, other in zip(little.runs, twin.runs, strict=True):
        differs = {key for key in one.keys if one.keys[key] != other.keys[key]}
        assert differs - {"teacher", "model_name_or_path"} == {"dataset_name", "output_dir"}


def test_the_caption_says_what_the_runs_have_in_common(sweep):
    # Lengths and sizes of images differ by column. A block of width w has 12 w² + 13 w parameters: twelve are 1.34M,
    # and the patches of 16 pixels 0.07M.
    assert sweep("little", [0, 1, 2]).caption == "cifar10, 1.4M parameters, 0 of 3 seeds finished"
    paper = sweep("paper", [0])
    assert paper.caption == "imagenet-1k, 0 of 1 seed finished"
    for run in paper.runs:
        finish(paper, run, **{cell.metric: 0.5 for cell in paper.cells})
    assert paper.caption == "imagenet-1k, 1 seed"


def test_labels_say_what_ran_where_a_name_says_the_papers(sweep, tmp_path):
    assert sweep("paper").labels == {}
    assert sweep("little").labels == {
        "224": "32 pixels, 30 epochs\nfor the paper's 224",
        "384": "48 pixels, 3 epochs\nfor the paper's 384",
    }
    columns = {"150 epochs": {"recipe": "{}", "keys": {"num_train_epochs": 150}}, "all": {"recipe": "{}"}}
    rows = [
        {"name": "strong", "recipe": "imagenet/deit_base_distilled"},
        {"name": "weak", "recipe": "ablations/taught_by_deit"},
    ]
    table = {"title": "Figure", "columns": columns, "rows": rows}
    (tmp_path / "recipes/tables/a.yaml").write_text(yaml.safe_dump(table))
    labels = sweep("little").labels
    assert labels == {
        "150 epochs": "15 epochs\nfor the paper's 150 epochs",
        "strong": "convnet teacher\nfor the paper's strong",
        "weak": "other teacher\nfor the paper's weak",
    }


def test_a_finished_run_is_not_done_again_unless_its_settings_changed(sweep, tmp_path):
    little = sweep("little")
    run = next(run for run in little.runs if run.name == "ablations/no_erasing")
    finish(little, run, eval_top1=0.5)
    assert run.stem not in [other.stem for other in sweep("little").to_do()]
    (tmp_path / "recipes/ablations/no_erasing.yaml").write_text("{random_erasing_prob: 0, weight_decay: 0.1}")
    assert run.stem in [other.stem for other in sweep("little").to_do()]


def test_what_a_run_needs_is_done_again_where_its_files_are_gone(sweep):
    little = sweep("little", [0])
    for run in little.runs:
        finish(little, run, eval_top1=0.5)
    assert little.to_do() == []
    distilled = next(run for run in little.runs if run.name == "imagenet/deit_base_distilled")
    little.path(distilled).unlink()
    assert [run.stem for run in little.to_do()] == [distilled.stem]
    shutil.rmtree(distilled.needs[0].keys["output_dir"])
    assert [run.stem for run in little.to_do()] == [distilled.needs[0].stem, distilled.stem]


def test_runs_that_differ_in_the_student_share_a_teacher_record(sweep, tmp_path):
    recipe = tmp_path / "recipes/ablations/no_erasing.yaml"

    def records(**keys):
        recipe.write_text(yaml.safe_dump(FILES["imagenet/deit_base_distilled"] | keys))
        runs = {run.name: run for run in sweep("paper", [3]).runs}
        return runs["imagenet/deit_base_distilled"].teacher_record, runs["ablations/no_erasing"].teacher_record

    for same in (
        {"model_size": "tiny", "use_distillation_token": False},
        {"num_train_epochs": 100, "drop_path_rate": 0},
    ):
        first, second = records(**same)
        assert first == second and first.startswith("outputs/paper/answers/")
        own = {run.name: run.teacher_record for run in sweep("little", [3]).runs}["imagenet/deit_base_distilled"]
        assert own.startswith("outputs/little/little/convnet_teacher-seed3/answers/")
    for other in ({"teacher": "timm:other"}, {"random_erasing_prob": 0}, {"per_device_train_batch_size": 64}):
        first, second = records(**other)
        assert second is not None and first != second
    for without in ({"distillation_type": "soft"}, {"distillation_type": "none"}):
        assert records(**without)[1] is None
    one, other = ({run.teacher_record for run in sweep("paper", [seed]).runs} - {None} for seed in (0, 1))
    assert one and not one & other


def test_the_estimate_is_views_by_speed(sweep):
    little = sweep("little", [0])
    views = 50_000 * (8 + 30 + 30 + 30 + 3)
    assert sum(run.views for run in little.runs) == pytest.approx(views)
    assert little.seconds_left(jobs=2) == pytest.approx(views / 500 / 2)
    finish(little, little.runs[0])
    assert little.seconds_left() == pytest.approx((views - little.runs[0].views) / 1000)
    assert "about" in little.plan() and "4 to do" in little.plan()


def test_the_table_holds_mean_deviation_and_the_paired_difference(sweep):
    little = sweep("little", [0, 1, 2])
    plain, without = [0.50, 0.52, 0.54], [0.49, 0.53, 0.51]
    for run in little.runs:
        if run.name.startswith("imagenet/deit_base-"):
            finish(little, run, eval_top1=plain[run.seed])
        if run.name == "ablations/no_erasing":
            finish(little, run, eval_top1=without[run.seed])
    rows = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in little.markdown().splitlines()}
    none, erasing, token = rows["| none", "224"], rows["| erasing", "224"], rows["| token", "224"]
    assert none[2] == "52.00 ± 2.00" and none[4] == "" and none[5] == "81.8 |"
    difference = [100 * (one - other) for one, other in zip(without, plain, strict=True)]
    half = stats.t.interval(0.95, 2, scale=statistics.stdev(difference) / 3**0.5)[1]
    assert erasing[3] == "3" and erasing[4] == f"{statistics.mean(difference):+.2f} ± {half:.2f}"
    assert token[2] == "not run" and token[3] == "0"
    assert ("| none", "384") not in rows


def test_one_seed_has_no_deviation():
    assert mean_and_deviation([3.0])[0] == 3.0 and str(mean_and_deviation([3.0])[1]) == "nan"
    assert str(mean_and_interval([3.0])[1]) == "nan"


def test_an_unknown_table_is_refused_with_the_known_ones(sweep, tmp_path):
    with pytest.raises(ValueError, match="no 'b' in recipes/tables; there are a"):
        Sweep("b", "little", [0], recipes="recipes", results="results")
    (tmp_path / "recipes/ablations/no_erasing.yaml").unlink()
    with pytest.raises(ValueError, match="'Table A' names recipes/ablations/no_erasing.yaml, which does not exist"):
        print(sweep("little").runs)


RECIPES = ROOT / "recipes"
NOT_AT_A_SCALE = {
    "gpu": {"2", "7", "8", "10", "data", "added", "figure3", "fine_tuning", "from_scratch", "tokens"},
    "paper": {"data", "added"},
    "small": {"7", "from_scratch", "data", "added"},
    "starved": {"7", "8", "10", "from_scratch"},
    "starved_fashion": {"7", "8", "10", "from_scratch"},
    "starved_table9": {"7", "10", "from_scratch"},
}


@pytest.mark.parametrize("scale", sorted(NOT_AT_A_SCALE))
@pytest.mark.parametrize("table", sorted(path.stem for path in (RECIPES / "tables").glob("*.yaml")))
def test_every_table_has_its_recipes(table, scale, tmp_path):
    each = Sweep(table, scale, [0], recipes=RECIPES, results=tmp_path)
    if table in NOT_AT_A_SCALE[scale]:
        with pytest.raises(ValueError, match=f"has no rows at the scale '{scale}'"):
            print(each.runs)
        return
    claims_of(each)
    for run in each.runs:
        assert (RECIPES / f"{run.name.split('-')[0]}.yaml").exists()
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(run.keys))
        kind = ClassifierArguments if run.script == "run_teacher.py" else ModelArguments
        parse_recipe((kind, DataArguments, DistillationConfig), [str(recipe), "--use_cpu", "true"])


def test_the_plan_names_the_runs(tmp_path):
    command = [sys.executable, str(RECIPES / "run_table.py"), "3", "--scale", "small", "--plan", "--seeds", "7"]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert "imagenet/deit_base_distilled-seed7" in done.stdout, done.stderr


def test_rebuild_runs_nothing_and_writes_what_there_is(tmp_path):
    """Pages and pictures of finished runs; "not run" for the rest."""
    sweep = Sweep("tokens", "starved", None, recipes=RECIPES, results=tmp_path)
    for cell, top1 in zip(sweep.cells, (0.4, 0.41), strict=False):
        for seed in (0, 1):
            sweep.record(sweep.run_of(cell, seed), {"eval_top1": top1, "train_samples_per_second": 1.0})
    command = [sys.executable, str(RECIPES / "run_table.py"), "tokens", "3", "--scale", "starved", "--rebuild"]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "starved/table_tokens.md").read_text()
    assert "cifar10, 2,500 training images, 100 epochs, 32 pixels, 0.5M parameters, 0 of 5 seeds finished" in page
    assert "| two class tokens | B 224 | 41.00 ± 0.00 | 2 | +1.00 ± 0.00 |  |" in page
    assert "| distillation token | B 224 | not run | 0 |" in page
    assert (tmp_path / "starved/table_tokens.png").exists()
    assert "| hard distillation | B 224 | not run | 0 |" in (tmp_path / "starved/table_3.md").read_text()
    assert not list(Path.cwd().glob("outputs/starved"))
