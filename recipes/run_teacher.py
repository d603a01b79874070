"""Train a teacher: `accelerate launch recipes/run_teacher.py <recipe.yaml> [--key value ...]`.

Any timm or Transformers classifier, from scratch or fine-tuned, on the same data with the same augmentation as the
student. What it leaves in `output_dir` is what `teacher:` of run_distill.py takes. `--help` lists the keys.
"""

import sys

from hf_deit.commands import teacher
from hf_deit.errors import run_script


def main(argv: list[str] | None = None) -> dict[str, float]:
    command = sys.argv if argv is None else [__file__, *argv]
    return teacher.main(command[1:], command=command)


if __name__ == "__main__":
    run_script(main)
