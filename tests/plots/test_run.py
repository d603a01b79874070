"""run.py: report.png shows the log of a run."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.pictures import lines

from hf_deit.plots import run, style


def evaluation(epoch: float, loss: float, fused: float, one: float, other: float) -> dict[str, float]:
    heads = {"eval_top1": fused, "eval_class_top1": one, "eval_distillation_top1": other}
    return {"epoch": epoch, "eval_loss": loss, **heads}


HISTORY = [
    {"epoch": 0.5, "step": 1, "loss": 2.0, "class_loss": 2.2, "distillation_loss": 1.8, "learning_rate": 5e-4},
    {"epoch": 1.0, "step": 2, "loss": 1.5, "class_loss": 1.7, "distillation_loss": 1.3, "learning_rate": 1e-3},
    evaluation(1.0, 1.4, 0.50, 0.40, 0.45),
    evaluation(2.0, 1.0, 0.70, 0.60, 0.65),
    {"epoch": 2.0, "step": 4, "train_runtime": 12.0, "train_loss": 1.75},
    evaluation(2.0, 0.9, 0.72, 0.62, 0.66),  # the final evaluation
]


def test_the_lines_are_the_log(tmp_path, drawn):
    path = tmp_path / "new" / "report.png"
    run.plot_run(HISTORY, path, teacher_top1=0.9, title="a run")

    losses, rates, accuracies = drawn[0].axes
    assert lines(losses) == {
        "training loss": ([0.5, 1.0], [2.0, 1.5]),
        "class head": ([0.5, 1.0], [2.2, 1.7]),
        "distillation head": ([0.5, 1.0], [1.8, 1.3]),
        "evaluation loss": ([1.0, 2.0], [1.4, 0.9]),
    }
    assert list(lines(rates).values()) == [([0.5, 1.0], [5e-4, 1e-3])]
    assert lines(accuracies) == {
        "fused  72.0 %": ([1.0, 2.0], [50.0, 72.0]),
        "class head  62.0 %": ([1.0, 2.0], [40.0, 62.0]),
        "distillation head  66.0 %": ([1.0, 2.0], [45.0, 66.0]),
        "teacher  90.0 %": ([0, 1], [90.0, 90.0]),
    }
    assert drawn[0].get_suptitle() == "a run"
    with Image.open(path) as image:
        assert image.size == (2250, 720)


def test_a_head_has_one_colour_in_all_panels(tmp_path, drawn):
    run.plot_run(HISTORY, tmp_path / "report.png")
    losses, _, accuracies = (
        {line.get_label().split("  ")[0]: line.get_color() for line in axes.lines} for axes in drawn[0].axes
    )
    for head in ("class head", "distillation head"):
        assert losses[head] == accuracies[head]
    assert len(set(accuracies.values())) == 3


def test_all_text_lies_inside_the_picture(tmp_path, drawn):
    run.plot_run(HISTORY, tmp_path / "report.png", teacher_top1=0.9, title="a run")
    figure = drawn[0]
    box, figure_box = figure.get_tightbbox().transformed(figure.dpi_scale_trans), figure.bbox
    assert figure_box.x0 <= box.x0 and figure_box.y0 <= box.y0 and box.x1 <= figure_box.x1 and box.y1 <= figure_box.y1


@pytest.mark.parametrize(
    "history, titles",
    [
        ([], []),
        ([{"train_runtime": 1.0}], []),
        (HISTORY[:1], ["Losses", "Learning rate"]),
        (HISTORY[3:4], ["Losses", "Accuracy"]),
    ],
)
def test_a_panel_without_values_is_left_out(tmp_path, drawn, history, titles):
    run.plot_run(history, tmp_path / "report.png", teacher_top1=0.9)
    assert [axes.get_title() for axes in drawn[0].axes] == titles
    assert [text.get_text() for text in drawn[0].texts] == ([] if titles else ["nothing was logged"])


def test_every_line_of_a_short_run_is_named_and_has_its_marks(tmp_path, drawn):
    """Three epochs, no training loss logged: what is drawn is not taken for it."""
    run.plot_run([evaluation(epoch, 1.0 / epoch, 0.5, 0.4, 0.3) for epoch in (1.0, 2.0, 3.0)], tmp_path / "report.png")
    losses, accuracies = drawn[0].axes
    legend = losses.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["evaluation loss"]
    assert legend.get_title().get_text() == "training loss: not logged"
    assert {line.get_marker() for axes in (losses, accuracies) for line in axes.lines} == {"o"}
    for axes in (losses, accuracies):
        named = {text.get_text() for text in axes.get_legend().get_texts()}
        assert named == {line.get_label() for line in axes.lines}


def test_the_losses_are_marked_while_they_are_few(tmp_path, drawn):
    for count in (1, 12, 13):
        run.plot_run([{"epoch": float(epoch), "loss": 1.0} for epoch in range(count)], tmp_path / "report.png")
    assert [figure.axes[0].lines[0].get_marker() for figure in drawn] == ["o", "o", "None"]


def test_a_run_of_less_than_three_epochs_has_marks_between_them(tmp_path, drawn):
    run.plot_run([{"epoch": epoch / 10, "loss": 1.0} for epoch in range(1, 11)], tmp_path / "report.png")
    assert any(tick % 1 for tick in drawn[0].axes[0].get_xticks())


def test_a_loss_that_is_not_finite_does_not_stop_the_picture(tmp_path):
    run.plot_run([*HISTORY, {"epoch": 3.0, "loss": float("nan")}], tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_percent_for_a_fraction_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"97.2.*fraction in \[0, 1\]"):
        run.plot_run(HISTORY, tmp_path / "report.png", teacher_top1=97.2)


def test_pyplot_and_its_backend_are_left_alone():
    program = (
        "import sys, hf_deit.plots.run as run, tempfile, os\n"
        "run.plot_run([], os.path.join(tempfile.mkdtemp(), 'report.png'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    source = str(Path(style.__file__).parents[2])
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": source, "PATH": ""}, timeout=120)
