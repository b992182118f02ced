"""The command ``vllm-scalesearch``."""

import argparse

from vllm_scalesearch.commands import calibrate_attention

# One module a command, light to import: `add_parser(commands)` names the function that runs it.
COMMANDS = (calibrate_attention,)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to the process's own."""
    parser = argparse.ArgumentParser(prog="vllm-scalesearch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except ValueError as error:
        raise SystemExit(f"vllm-scalesearch {chosen.command}: {error}") from None
