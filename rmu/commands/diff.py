"""``rmu diff``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rmu.commands.parser import Parser
from rmu.difference import check_output, compare, summary, write


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "rmu diff",
        description="Which tensors of two checkpoints differ, and by how much. Files are read tensor by tensor; how the "
        "checkpoints are split into files does not matter.",
    )
    parser.add_argument("a", help="model folder or hub id")
    parser.add_argument("b", help="model folder or hub id")
    parser.add_argument("--output", help="also write a row for every tensor to this .csv or .json file")
    arguments = parser.parse_args(argv)
    if arguments.output:
        check_output(Path(arguments.output))
    differences = compare(arguments.a, arguments.b)
    print(summary(differences))
    if arguments.output:
        write(differences, Path(arguments.output))
        print("wrote", arguments.output)
