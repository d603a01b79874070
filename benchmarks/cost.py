"""What Table 3 costs, in GPU-hours: `python benchmarks/cost.py [--share 0.4]`. The table of docs/cost.md.

Nothing is run. A run is so many views, each the student's forward and backward pass (three times the forward pass)
and, where there is a teacher, the teacher's forward pass. Their time on a GPU is computed in one of two ways:

- from images a second that timm's authors measured and publish, of training and of inference apart (RTX 3090);
- from the operations, at a share of the peak that NVIDIA's data sheets name (A100, H100, H200). The share is an
  assumption; hours are as its inverse.

Beside them the paper's own hours on V100s. The last row asks the teacher for its decisions once a resolution and
replays them in the other runs of hard distillation and of the token (`teacher_record`). Evaluation, about a hundredth,
is left out; so is what a loader that is too slow adds. Source of the operations and rates: results/benchmark-*.csv of
huggingface/pytorch-image-models.
"""

import argparse


VIEWS = 1_281_167  # of an epoch; with three repeats of a third of the images
EPOCHS = {224: 300, 384: 30}  # the recipes'; the paper fine-tuned for 25
# Thousand millions of multiplications and additions of a forward pass.
GMACS = {("Ti", 224): 1.26, ("S", 224): 4.61, ("B", 224): 17.58, ("B", 384): 55.54}
TEACHER_GMACS = {224: 15.96, 384: 46.87}  # RegNetY-16GF
# Images a second on an RTX 3090, mixed precision: of training (PyTorch 1.12), and of the teacher (2.4, channels last).
RTX_3090 = {("Ti", 224): 2290.33, ("S", 224): 1050.70, ("B", 224): 390.04, ("B", 384): 97.30}
RTX_3090_TEACHER = {224: 1136.53, 384: 386.34}
PEAKS = {"A100": 312e12, "H100, H200": 989e12}  # dense bfloat16
PAPER_HOURS = {("B", 224): 53 * 8, ("B", 384): 20 * 8 * EPOCHS[384] / 25}  # GPU-hours of V100s, without a teacher
METHODS = {"none": False, "soft": True, "hard": True, "token": True}  # is there a teacher?
REPLAYED = ("hard", "token")  # a record of decisions serves both, and students of every size


def views(size: int) -> int:
    return VIEWS * EPOCHS[size]


def from_rates(model: tuple[str, int], asked: int) -> float:
    """GPU-hours of an RTX 3090."""
    seconds = 1 / RTX_3090[model] + asked / RTX_3090_TEACHER[model[1]]
    return views(model[1]) * seconds / 3600


def from_operations(model: tuple[str, int], asked: int, peak: float, share: float) -> float:
    """GPU-hours where `share` of the peak is reached."""
    operations = 2e9 * (3 * GMACS[model] + asked * TEACHER_GMACS[model[1]])
    return views(model[1]) * operations / (peak * share) / 3600


def gpu_hours(model: tuple[str, int], asked: int, share: float) -> list[float]:
    """GPU-hours in the columns that are computed."""
    return [from_rates(model, asked), *(from_operations(model, asked, peak, share) for peak in PEAKS.values())]


def total(share: float, replayed: bool) -> list[float]:
    """Of all runs; `replayed`: a record takes the place of the teacher in all but the first run of a resolution."""
    sums, recorded = [0.0] * (1 + len(PEAKS)), set()
    for model in GMACS:
        for method, taught in METHODS.items():
            has_record = replayed and method in REPLAYED and model[1] in recorded
            if taught and method in REPLAYED:
                recorded.add(model[1])
            hours = gpu_hours(model, taught and not has_record, share)
            sums = [before + each for before, each in zip(sums, hours)]
    return sums


def table(share: float) -> str:
    columns = ["a run of Table 3", "epochs", "V100 (the paper's)", "RTX 3090 (computed from timm's rates)"]
    columns += [f"{name} (computed at {share:.0%})" for name in PEAKS]
    lines = [f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    for model in GMACS:
        name = f"DeiT-{model[0]}" + ("" if model[1] == 224 else f", 224 to {model[1]}")
        for asked, said in ((0, "no distillation"), (1, "soft, hard or token")):
            paper = f"{PAPER_HOURS[model]:,.0f}" if model in PAPER_HOURS and not asked else ""
            cells = [f"{name}, {said}", EPOCHS[model[1]], paper]
            cells += [f"{each:,.0f}" for each in gpu_hours(model, asked, share)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    for replayed, said in ((False, f"all {len(METHODS) * len(GMACS)} runs"), (True, "with decisions replayed")):
        sums = " | ".join(f"**{each:,.0f}**" for each in total(share, replayed))
        lines.append(f"| **{said}** | | | {sums} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that a GPU reaches; 0.4")
    args = parser.parse_args()
    if not 0 < args.share <= 1:
        parser.error(f"--share is {args.share}; it is a part of the peak, above 0 and at most 1")
    print(table(args.share))


if __name__ == "__main__":
    main()
