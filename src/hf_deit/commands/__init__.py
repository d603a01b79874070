"""Commands behind the scripts in `recipes/`, one module per script: each takes the command line and runs it."""
