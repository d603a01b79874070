"""What the scripts in `recipes/` do, one module a script: from the words of the command line to the end."""
