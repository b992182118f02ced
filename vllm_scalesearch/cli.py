"""The command ``vllm-scalesearch``."""

import argparse

from vllm_scalesearch.commands import calibrate_attention, eval, inspect, quantize

# One module a command, light to import: `add_parser(commands)` names the function that runs it.
# A parser with the default `takes_engine_options` is given the options that it does not know as well.
COMMANDS = (calibrate_attention, eval, inspect, quantize)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to the process's own."""
    parser = argparse.ArgumentParser(prog="vllm-scalesearch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    chosen, engine_options = parser.parse_known_args(arguments)
    passes_on = getattr(chosen, "takes_engine_options", False)
    if engine_options and not passes_on:
        parser.error(f"unrecognized arguments: {' '.join(engine_options)}")
    try:
        chosen.run(chosen, engine_options) if passes_on else chosen.run(chosen)
    except ValueError as error:
        raise SystemExit(f"vllm-scalesearch {chosen.command}: {error}") from None
