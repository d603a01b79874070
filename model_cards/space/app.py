"""The page of a Space: a visitor's image, what each head of the model says, and where both tokens look.

The settings of the Space say what is shown: the variable MODEL, a Hub id of a model that hf_deit trained (or any other
image classifier there), and TEACHER, if its teacher is on the Hub too.
"""

import os

from hf_deit import UserError
from hf_deit.commands.demo import Demo, build_page, serve
from hf_deit.errors import run_script


def main() -> None:
    """Build the page from the Space's variables and serve it where a Space is looked for."""
    model = os.environ.get("MODEL")
    if not model:
        raise UserError("the variable MODEL is not set: in the Space's settings, give it the Hub id of your model")
    page = build_page(Demo(model, os.environ.get("TEACHER") or None), title=model.rsplit("/", 1)[-1])
    serve(page, "0.0.0.0", 7860)


if __name__ == "__main__":
    run_script(main)
