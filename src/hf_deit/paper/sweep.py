"""A table of the paper as runs: which recipe with which keys, at which scale and seed, and the results of the runs.

A table (`recipes/tables/*.yaml`) names recipes and the paper's numbers; a scale (`recipes/scales/*.yaml`) names the
changes for machines without eight GPUs and ImageNet. Both are data. A finished run is one small JSON file.

Not here: starting the runs (`scheduler.py`), what the numbers say of the paper's claims (`claims.py`) and drawing
(`plots/tables.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml
from scipy import stats

from ..arguments import ModelArguments, names_affecting
from ..data.registry import REGISTRY
from ..errors import UserError
from ..options.distillation_config import DistillationConfig
from ..training.checkpoints import is_finished


# Where a recipe leaves its model: outputs/<folder>/<stem>; in a sweep outputs/<scale>/<folder>/<stem>-seed<n>.
OUTPUTS = PurePosixPath("outputs")
# Keys that change neither a view nor the teacher. One that is missing here costs a record that could have been shared,
# no more: a run refuses to replay a record that does not fit it.
OF_THE_STUDENT = (
    {*names_affecting(ModelArguments, "weights", "machine"), *names_affecting(DistillationConfig, "weights")}
    | {"output_dir", "optim", "optim_args"}
) - {"teacher", "teacher_recipe"}


@dataclass(frozen=True)
class Scale:
    """The changes that a scale makes to every recipe. The fields are the keys of `recipes/scales/<name>.yaml`.

    Attributes:
        like: a scale whose fields hold where this one does not set them.
        epochs: factor of the recipe's `num_train_epochs` (300 if the recipe has none).
        image_sizes: from the recipe's image size to this scale's, pixels.
        student: keys that replace those of a student's recipe.
        fine_tuning: keys that replace those of the recipe of a student that starts from another student.
        data: keys that replace those of every recipe, teachers' recipes included.
        unless_said: keys added to every recipe that does not set them.
        teachers: from the value of a recipe's `teacher` or `teacher_recipe` to the recipe of the teacher that stands
            in for it.
        seeds: number of seeds by table, and of the tables that are not named: `{default: 3, figure3: 5}`.
        views_per_second: speed of one run at a time, for the estimate before any run is finished.
    """

    name: str
    like: str | None = None
    epochs: float = 1.0
    image_sizes: dict[int, int] = field(default_factory=dict)
    student: dict = field(default_factory=dict)
    fine_tuning: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    unless_said: dict = field(default_factory=dict)
    teachers: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    views_per_second: float | None = None

    def keys_of(self, name: str, recipe: dict, added: Mapping = MappingProxyType({})) -> dict:
        """The keys of a recipe, and of a table that adds some, at this scale.

        Recipes in the folder of the scale's name (or that of the scale it is like) already have its epochs; the epochs
        of a table are the paper's.
        """
        own_epochs = name.split("/")[0] in (self.name, self.like) and "num_train_epochs" not in added
        recipe = recipe | dict(added)
        keys = self.unless_said | recipe | self.data
        if self.epochs != 1 and not own_epochs:
            keys["num_train_epochs"] = float(recipe.get("num_train_epochs", 300)) * self.epochs
        if not name.endswith("_teacher"):
            keys |= self.student | (self.fine_tuning if "model_name_or_path" in recipe else {})
        size = int(recipe.get("image_size", 224))
        if size in self.image_sizes:
            keys["image_size"] = self.image_sizes[size]
        return keys


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: folder and stem of the recipe, and the keys that a table adds: `ablations/no_erasing`.
        seed: seed of weights and views.
        keys: the whole recipe of this run.
        needs: the runs whose output directories this run reads: its teacher, and the student that it starts from.
    """

    name: str
    seed: int
    keys: dict
    needs: tuple[Run, ...] = ()

    @property
    def stem(self) -> str:
        return f"{self.name}-seed{self.seed}"

    @property
    def script(self) -> str:
        return "run_teacher.py" if self.name.split("-")[0].endswith("_teacher") else "run_distill.py"

    @property
    def epochs(self) -> float:
        return float(self.keys.get("num_train_epochs", 300))

    @property
    def views(self) -> float | None:
        """Number of views in the run's training; None where the size of the dataset is unknown."""
        known = REGISTRY.get(self.keys.get("dataset_name", "imagenet-1k"))
        images = self.keys.get("max_train_samples") or (known and known.train_size)
        return images and int(images) * self.epochs

    @property
    def teacher_record(self) -> str | None:
        """Directory of the recorded teacher outputs; runs that show one teacher the same views share it.

        If this sweep trains the teacher, the directory is inside the teacher's `output_dir`, so that deleting the
        teacher deletes its outputs. None without a teacher, and for soft distillation, whose outputs are larger than a
        disk at the paper's scale.
        """
        teacher = self.keys.get("teacher")
        if teacher is None or self.keys.get("distillation_type", "hard") != "hard":
            return None
        seen = {key: value for key, value in self.keys.items() if key not in OF_THE_STUDENT}
        digest = hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]
        made_here = teacher in [needed.keys["output_dir"] for needed in self.needs]
        scale = PurePosixPath(*PurePosixPath(self.keys["output_dir"]).parts[:2])
        return str(PurePosixPath(teacher if made_here else scale, "answers", digest))


@dataclass(frozen=True)
class Cell:
    """One number of a table: a metric of a run, and the paper's value in percent."""

    row: str
    column: str
    recipe: str
    keys: dict
    metric: str
    paper: float | None
    teacher_keys: dict = field(default_factory=dict)


class Sweep:
    """The runs of a table at a scale: those to do, the results of those done, and the table made of these.

    Args:
        table: `recipes/tables/<table>.yaml`: `title`, `columns` (name to `recipe`, a path beneath `recipes` with "{}"
            where the row's goes, `keys`, `metric`), `rows` (`name`, `recipe`, `keys`, `metric`; `paper`: top-1 in
            percent, one per column, "-" for a cell that does not exist; `columns`: columns of this row that replace
            the table's), and `leave_out`: names of the rows and columns that a scale does not run. `plot: lines`: the
            picture has the columns as an axis. `teacher_too: true` in a column: its keys are also the teacher's.
            `claims`: what the paper says about differences; see `claims.py`.
        scale: `recipes/scales/<scale>.yaml`, see [`Scale`].
        seeds: each row is run once for each seed; None: the scale's number of seeds, from 0.
        recipes: the folder of recipes.
        results: the folder of finished runs; a run's file is `<scale>/<name>-seed<seed>.json`.

    Raises:
        ValueError: the table, the scale or a recipe does not exist, or the table has no row at that scale.
    """

    def __init__(
        self,
        table: str,
        scale: str,
        seeds: Sequence[int] | None = None,
        *,
        recipes: str | os.PathLike,
        results: str | os.PathLike,
    ):
        self.recipes, self.results = Path(recipes), Path(results) / scale
        self.table = table
        self.scale = Scale(name=scale, **self._fields_of_scale(scale))
        number = self.scale.seeds.get(table, self.scale.seeds.get("default", 3))
        self.seeds = tuple(range(number) if seeds is None else seeds)
        self._content = self._read("tables", table)
        self.title: str = self._content["title"]
        self.is_a_line: bool = self._content.get("plot") == "lines"
        self.said: list[dict] = self._content.get("claims", [])

    def _read(self, folder: str, name: str) -> dict:
        known = sorted(path.stem for path in (self.recipes / folder).glob("*.yaml"))
        if name not in known:
            raise UserError(f"there is no {name!r} in recipes/{folder}; there are {', '.join(known)}")
        return _read(self.recipes / folder / f"{name}.yaml")

    def _fields_of_scale(self, name: str) -> dict:
        fields = self._read("scales", name)
        return self._fields_of_scale(fields["like"]) | fields if "like" in fields else fields

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells of the table at this scale, row by row."""
        leave_out = self._content.get("leave_out", {})
        left_out = leave_out.get(self.scale.name, leave_out.get(self.scale.like, []))
        cells = []
        for row in self._content["rows"]:
            for number, (name, column) in enumerate(self._content["columns"].items()):
                column = row.get("columns", {}).get(name, column)
                paper = row.get("paper", [])
                if name in left_out or row["name"] in left_out or (paper and paper[number] == "-"):
                    continue
                cells.append(
                    Cell(
                        row["name"],
                        name,
                        column["recipe"].format(row.get("recipe", "")),
                        {
                            key: value.format(row.get("recipe", "")) if isinstance(value, str) else value
                            for key, value in (column.get("keys", {}) | row.get("keys", {})).items()
                        },
                        row.get("metric", column.get("metric", "eval_top1")),
                        paper[number] if paper else None,
                        column.get("keys", {}) if column.get("teacher_too") else {},
                    )
                )
        if not cells:
            raise UserError(
                f"{self.title!r} has no rows at the scale {self.scale.name!r}: choose another with --scale"
            )
        return cells

    def check_places(self, terms: Sequence[str | Sequence[str]]) -> None:
        """Refuse a term that is no row of the table, or no pair of a row and a column, at any scale."""
        rows, columns = {row["name"] for row in self._content["rows"]}, self._content["columns"]
        for term in terms:
            row, *column = [term] if isinstance(term, str) else term
            if row not in rows or not set(column) <= set(columns):
                raise UserError(
                    f"a claim of {self.title!r} names {term!r}; expected a row, or a row and a column, of the table"
                )

    def run_of(self, cell: Cell, seed: int) -> Run:
        """The run whose metric is the cell's number."""
        return self._run(cell.recipe, cell.keys, seed, cell.teacher_keys)

    def _run(self, recipe: str, added: dict, seed: int, teacher_added: Mapping = MappingProxyType({})) -> Run:
        path = self.recipes / f"{recipe}.yaml"
        if not path.exists():
            raise UserError(f"{self.title!r} names recipes/{recipe}.yaml, which does not exist")
        keys = self.scale.keys_of(recipe, _read(path), added)
        needs = []

        def output_of(needed: Run) -> str:
            needs.append(needed)
            return needed.keys["output_dir"]

        named = keys.pop("teacher", None) or str(keys.pop("teacher_recipe", "")).removesuffix(".yaml")
        keys.pop("teacher_recipe", None)
        if named and keys.get("distillation_type", "hard") in ("hard", "soft"):
            stand_in = str(self.scale.teachers.get(named, named))
            teacher = _recipe_of(stand_in) or stand_in
            # One teacher for all seeds of the student, as in the paper. A subset of the images is drawn by the seed:
            # then each seed has a teacher, which knows the student's images and no others.
            of_seed = seed if "max_train_samples" in keys else self.seeds[0]
            is_recipe = (self.recipes / f"{teacher}.yaml").exists()
            keys["teacher"] = output_of(self._run(teacher, dict(teacher_added), of_seed)) if is_recipe else stand_in
        if start := _recipe_of(keys.get("model_name_or_path", "")):
            keys["model_name_or_path"] = output_of(self._run(start, {}, seed))
        name = "-".join([recipe, *(f"{key}={PurePosixPath(str(value)).name}" for key, value in added.items())])
        place = {"seed": seed, "output_dir": str(OUTPUTS / self.scale.name / f"{name}-seed{seed}")}
        return Run(name, seed, keys | place, tuple(needs))

    @cached_property
    def runs(self) -> list[Run]:
        """Every run once, one seed after the other, each after the runs that it needs."""
        found: dict[str, Run] = {}

        def add(run: Run) -> None:
            for needed in run.needs:
                add(needed)
            found.setdefault(run.stem, run)

        for seed in self.seeds:
            for cell in self.cells:
                add(self.run_of(cell, seed))
        return list(found.values())

    # Results

    def path(self, run: Run) -> Path:
        """The JSON file of the run's result."""
        return self.results / f"{run.stem}.json"

    def result(self, run: Run) -> dict | None:
        """The result of the run; None if the run is not done, or was done with other settings."""
        if not self.path(run).exists():
            return None
        result = json.loads(self.path(run).read_text("utf-8"))
        return result if result["recipe"] == run.keys else None

    def record(self, run: Run, metrics: dict, **facts) -> None:
        """Write the run's file: its settings, its metrics and `facts` such as the versions of libraries."""
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({"recipe": run.keys, "metrics": metrics} | facts, indent=1) + "\n")
        unfinished.replace(path)

    def to_do(self) -> list[Run]:
        """The runs without a result, and the runs that they need and whose files are not on this machine."""
        wanted = {run.stem for run in self.runs if self.result(run) is None}
        for run in reversed(self.runs):  # a needed run comes before the runs that need it
            if run.stem in wanted:
                wanted |= {needed.stem for needed in run.needs if not is_finished(needed.keys["output_dir"])}
        return [run for run in self.runs if run.stem in wanted]

    def seconds_left(self, jobs: int = 1) -> float | None:
        """Estimated seconds of the runs to do, from the speed of the finished runs or, without any, the scale's."""
        speeds = [result["metrics"]["train_samples_per_second"] for run in self.runs if (result := self.result(run))]
        speed = float(np.median(speeds)) if speeds else self.scale.views_per_second
        views = [run.views for run in self.to_do()]
        known = [count for count in views if count is not None]
        if speed is None or len(known) < len(views):
            return None
        return sum(known) / speed / jobs

    def plan(self, jobs: int = 1) -> str:
        """The runs to do and the estimated time, in a few lines."""
        to_do = self.to_do()
        lines = [f"{self.title}: {len(self.runs)} runs, {len(self.runs) - len(to_do)} done, {len(to_do)} to do"]
        lines += [f"  {run.stem}" for run in to_do]
        seconds = self.seconds_left(jobs)
        if seconds:
            lines.append(f"  about {seconds / 3600:.1f} hours with {jobs} at a time")
        return "\n".join(lines)

    # The table

    def values(self, cell: Cell) -> dict[int, float]:
        """The cell's number by seed, in percent, for the seeds that are done."""
        results = {seed: self.result(self.run_of(cell, seed)) for seed in self.seeds}
        return {
            seed: 100 * result["metrics"][cell.metric]
            for seed, result in results.items()
            if result is not None and cell.metric in result["metrics"]
        }

    @property
    def caption(self) -> str:
        """What the table's runs have in common: dataset, number of images, epochs, sizes of image and model, seeds."""
        students = [self.run_of(cell, self.seeds[0]).keys for cell in self.cells]

        def common(values: Iterable[object], text: str) -> list[str]:
            value, *others = set(values)
            return [text.format(value)] if not others and value is not None else []

        facts = [
            *common((keys.get("dataset_name", "imagenet-1k") for keys in students), "{}"),
            *common((keys.get("max_train_samples") for keys in students), "{:,} training images"),
            *common((keys.get("num_train_epochs", 300) for keys in students), "{:g} epochs"),
            *common((keys.get("image_size", 224) for keys in students), "{} pixels"),
            *common(map(_size_of_student, students), "{} parameters"),
        ]
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) != 1)}"
        finished = min(len(self.values(cell)) for cell in self.cells)
        if finished < len(self.seeds):
            seeds = f"{finished} of {seeds} finished"
        return ", ".join([*facts, seeds])

    @cached_property
    def labels(self) -> dict[str, str]:
        """What a picture writes for a row or a column whose name says what the paper ran, and not what ran here.

        A column that names a number of pixels or epochs gets those of its runs (of these two, the one that varies
        between the columns, if only one does), a row its teacher, where the rows differ in it.
        """
        texts = {"image_size": "{} pixels", "num_train_epochs": "{:g} epochs"}
        defaults = {"image_size": 224, "num_train_epochs": 300}
        columns, papers = {}, {}
        teachers: dict[str, dict[str, str]] = {}
        for cell in self.cells:
            run = self.run_of(cell, self.seeds[0])
            columns.setdefault(cell.column, defaults | run.keys)
            papers.setdefault(cell.column, defaults | _read(self.recipes / f"{cell.recipe}.yaml") | cell.keys)
            made_here = {needed.keys["output_dir"]: needed.name for needed in run.needs}
            if (teacher := run.keys.get("teacher")) in made_here:
                name = PurePosixPath(made_here[teacher]).name.replace("_", " ")
                teachers.setdefault(cell.column, {})[cell.row] = name
        varying = [key for key in texts if len({keys[key] for keys in columns.values()}) > 1] or list(texts)
        labels = {
            column: f"{', '.join(texts[key].format(keys[key]) for key in varying)}\nfor the paper's {column}"
            for column, keys in columns.items()
            if any(keys[key] != papers[column][key] and f"{papers[column][key]:g}" in column.split() for key in texts)
        }
        for rows in teachers.values():
            if len(set(rows.values())) > 1:
                labels |= {row: f"{teacher}\nfor the paper's {row}" for row, teacher in rows.items()}
        return labels

    def points(self) -> list[tuple[str, str, list[float], float | None]]:
        """Row, column, measured values (percent, one per seed) and the paper's number of each cell."""
        return [(cell.row, cell.column, list(self.values(cell).values()), cell.paper) for cell in self.cells]

    def markdown(self) -> str:
        """The table: mean ± standard deviation over seeds, number of seeds, difference from the first row, paper."""
        lines = [
            "| | | measured here | seeds | difference from the first row (95 %) | the paper's |",
            "|---|---|---|---|---|---|",
        ]
        table = [(cell, self.values(cell)) for cell in self.cells]
        first = {cell.column: values for cell, values in reversed(table)}
        for cell, values in table:
            mean, deviation = mean_and_deviation(list(values.values()))
            difference = ""
            if values != first[cell.column]:
                pairs = [values[seed] - first[cell.column][seed] for seed in values.keys() & first[cell.column].keys()]
                difference = _with_error(*mean_and_interval(pairs), sign="+") if pairs else ""
            measured = _with_error(mean, deviation) if values else "not run"
            paper = "" if cell.paper is None else f"{cell.paper}"
            lines.append(f"| {cell.row} | {cell.column} | {measured} | {len(values)} | {difference} | {paper} |")
        return "\n".join(lines) + "\n"


def _recipe_of(output: str) -> str | None:
    """The recipe whose output directory is `output`; None for any other path."""
    path = PurePosixPath(output)
    return str(path.relative_to(OUTPUTS)) if path.is_relative_to(OUTPUTS) else None


def _size_of_student(keys: Mapping) -> str | None:
    """Number of parameters of a run's student, such as "0.5M"; None where the keys do not tell it."""
    known = REGISTRY.get(keys.get("dataset_name", "imagenet-1k"))
    if known is None or ("model_name_or_path" in keys and "hidden_size" not in keys):
        return None
    names = {item.name for item in fields(ModelArguments)} - {"model_name_or_path", "teacher", "teacher_recipe"}
    own = tuple(sorted((name, keys[name]) for name in names & keys.keys()))
    return _size_of(own, int(keys.get("image_size", 224)), known.num_classes)


@cache
def _size_of(own: tuple[tuple[str, object], ...], image_size: int, classes: int) -> str:
    import torch  # slow, and only a finished table needs it

    from ..training.run import build_student

    arguments: dict[str, Any] = dict(own)
    with torch.device("meta"):  # no memory, no time
        model = build_student(ModelArguments(**arguments), image_size, {label: str(label) for label in range(classes)})
    millions = model.num_parameters() / 1e6
    return f"{millions:.1f}M" if millions < 10 else f"{millions:.0f}M"


def _read(path: Path) -> dict:
    return yaml.safe_load(path.read_text("utf-8")) or {}


def _with_error(mean: float, error: float, sign: str = "") -> str:
    """The mean with its error; without one where a single seed gives none."""
    return f"{mean:{sign}.2f}" if math.isnan(error) else f"{mean:{sign}.2f} ± {error:.2f}"


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is nan for fewer than two values."""
    if not values:
        return math.nan, math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean, and half the width of its confidence interval by Student's t (nan for fewer than two values)."""
    mean, deviation = mean_and_deviation(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * deviation / math.sqrt(len(values)))
