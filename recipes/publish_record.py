"""Publish recorded teacher outputs: `python recipes/publish_record.py push DIR owner/name`, or `hf-deit record`."""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("record")
