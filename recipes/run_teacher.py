"""Train a teacher: `accelerate launch recipes/run_teacher.py <recipe.yaml> [--key value ...]`, or `hf-deit teacher`.

Any timm or Transformers classifier, from scratch or fine-tuned, on the same data with the same augmentation as the
student. What it leaves in `output_dir` is what `teacher:` of run_distill.py takes. `--help` lists the keys.
"""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("teacher")
