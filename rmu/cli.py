"""The ``rmu`` command."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

COMMANDS = {
    "unlearn": "make a model forget, and save it",
    "calibrate": "measure a model's natural norms on the text to forget, and propose layer, c and beta",
    "eval": "measure a model: accuracy on lm-evaluation-harness tasks, perplexity",
    "demo": "unlearn a small real model and report what happened",
    "presets": "list the settings that ship with the package, or show one",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 after a one-line error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: rmu COMMAND [--help] ...\n\nMake a language model forget, with RMU and Adaptive RMU.\n")
        print("\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items()))
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        return _fail(f"no command {command!r}{_nearest(command, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    run: Callable[[list[str]], None] = globals()[f"_{command}"]
    try:
        run(rest)
    except (ValueError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)
    return 0


def _fail(message: str, code: int = 2) -> int:
    print(f"rmu: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in files("rmu.presets").iterdir() if p.name.endswith(".yaml")
    )


def read_settings(source: str, known: Sequence[str]) -> dict[str, Any]:
    """Flat settings from a YAML file or a preset's name.

    Raises:
        ValueError: no such file or preset, not a mapping, or an unknown key (the nearest known one is named).
    """
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"config: {source} is not UTF-8 text: {error}") from error
    elif source in preset_names():
        text = (files("rmu.presets") / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        names = preset_names()
        raise ValueError(
            f"config: {source!r} is no file and no preset{_nearest(source, names)}; presets: {', '.join(names)}"
        )
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config: {source} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config: {source} holds a {type(settings).__name__}, expected 'name: value' lines")
    for key in settings:
        if key not in known:
            raise ValueError(f"config: {source} sets {key!r}, which is no setting{_nearest(str(key), known)}")
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (rmu {self.prog.split()[-1]} --help lists the arguments)")


def parse_unlearn(argv: Sequence[str]) -> tuple[Any, Any]:
    """``(UnlearningArguments, RMUConfig)`` from flags and ``--config``; flags win.

    Raises:
        ValueError: an unknown or malformed argument, or a required one missing.
    """
    from rmu.arguments import unlearn_parser

    parser = unlearn_parser(full_help="--help_all" in argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config, rest = first.parse_known_args(list(argv))
    if config.config:
        known = [
            action.dest for action in parser._actions if action.dest not in ("help", "help_all", "config")
        ]
        settings = read_settings(config.config, known)
        for action in parser._actions:
            if action.dest in settings:
                action.required = False
                action.default = _convert(action, settings[action.dest])
    # The third is the namespace of --config, read above.
    arguments, settings, _, unknown = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ValueError(f"unknown argument {unknown[0]}{_nearest(unknown[0], flags)}")
    return arguments, settings


def _convert(action: argparse.Action, value: Any) -> Any:
    """A YAML value as the flag would give it; argparse itself converts no default but a string."""
    if value is None:
        raise ValueError(f"config: {action.dest}: has no value")
    if isinstance(value, dict):
        if action.type is not dict and action.dest not in (
            "lr_scheduler_kwargs",
            "accelerator_config",
            "fsdp_config",
        ):
            raise ValueError(f"config: {action.dest}: got {value!r}, expected one value")
        return value
    if action.nargs == "+":
        return [_convert_one(action, v) for v in (value if isinstance(value, list) else [value])]
    return _convert_one(action, value)


def _convert_one(action: argparse.Action, value: Any) -> Any:
    convert = action.type or str
    try:
        if isinstance(value, (list, dict)):
            raise TypeError("expected one value")
        return convert(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"config: {action.dest}: got {value!r}: {error}") from error


def _unlearn(argv: list[str]) -> None:
    arguments, config = parse_unlearn(argv)
    from rmu.unlearn import unlearn

    print(f"saved: {unlearn(arguments, config)}")


def _calibrate(argv: list[str]) -> None:
    from rmu.config import DTYPES

    parser = _Parser(
        "rmu calibrate",
        description="Measure the norms of hidden states in every layer on the text to forget, in one pass, and propose the "
        "hooked layer, c of RMU and beta of Adaptive RMU.",
    )
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--forget", required=True, nargs="+", help="one corpus for each topic to forget")
    parser.add_argument("--text_field", default="text", help="field of the corpora that holds the text")
    parser.add_argument("--min_length", type=int, default=0, help="leave out texts of fewer characters")
    parser.add_argument("--samples", type=int, default=64, help="texts read of each corpus (default 64)")
    parser.add_argument("--max_length", type=int, default=512, help="maximum tokens of a text (default 512)")
    parser.add_argument("--batch_size", type=int, default=8, help="texts of a forward pass (default 8)")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="dtype of the weights (default: auto)"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code of the checkpoint")
    parser.add_argument("--output", help="write the numbers as JSON and a figure a topic into this folder")
    arguments = parser.parse_args(argv)
    from rmu.calibrate import calibrate, table, write_calibration
    from rmu.data import load_corpus

    forget = [
        load_corpus(
            source, field=arguments.text_field, min_length=arguments.min_length, argument=f"forget[{i}]"
        )
        for i, source in enumerate(arguments.forget)
    ]
    found = calibrate(
        arguments.model,
        forget,
        samples=arguments.samples,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    for i, source in enumerate(arguments.forget):
        print(f"\nforget[{i}]: {source}, {found.texts[i]} texts, {found.tokens[i]} counted tokens")
        print(table(found, i))
    print("", *found.reasons, sep="\n")
    c = " ".join(f"{value:g}" for value in found.coefficient)
    print(f"\nRMU:          --method rmu --layer {found.layer} --coefficient {c}")
    print(f"Adaptive RMU: --method adaptive --layer {found.layer} --scale {found.scale:g}")
    if arguments.output:
        print("\nwrote", *write_calibration(found, arguments.output))


def _eval(argv: list[str]) -> None:
    parser = _Parser("rmu eval", description="Measure a model: task accuracy and, of a corpus, perplexity.")
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--tasks", nargs="+", help="tasks of lm-evaluation-harness (default: the demo's)")
    parser.add_argument("--include_path", help="folder of further task files (YAML)")
    parser.add_argument("--limit", type=int, help="at most this many questions a task")
    parser.add_argument(
        "--batch_size", type=int, default=32, help="questions' answers a forward pass (default 32)"
    )
    parser.add_argument(
        "--corpus", help="measure perplexity on this corpus (default: the demo's held-out prose)"
    )
    parser.add_argument("--text_field", default="text", help="field of the corpus that holds the text")
    parser.add_argument(
        "--max_length", type=int, default=512, help="cut a text of the corpus at so many tokens"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code of the checkpoint")
    parser.add_argument("--output", help="also write the numbers to this JSON file")
    arguments = parser.parse_args(argv)
    if arguments.output and Path(arguments.output).exists():
        raise ValueError(f"output: {arguments.output} exists; name a new file")

    from rmu.data import load_corpus
    from rmu.demo import evaluation_inputs
    from rmu.evaluation import evaluate_tasks, load_model, perplexity
    from rmu.verdict import pool

    inputs = evaluation_inputs()
    texts = inputs["prose"]
    if arguments.corpus:
        texts = load_corpus(arguments.corpus, field=arguments.text_field, argument="corpus")[:]["text"]
    model, tokenizer = load_model(arguments.model, arguments.dtype, arguments.trust_remote_code)
    rows = evaluate_tasks(
        model,
        tokenizer,
        arguments.tasks or inputs["tasks"],
        arguments.include_path if arguments.tasks else inputs["include_path"],
        batch_size=arguments.batch_size,
        limit=arguments.limit,
    )
    prose = perplexity(model, tokenizer, texts, max_length=arguments.max_length)
    print(f"\n{'task':24} {'side':8} {'domain':12} {'n':>6} {'accuracy':>9} {'stderr':>7}")
    for row in rows:
        side, domain = row["side"] or "", row["domain"] or ""
        print(
            f"{row['task']:24} {side:8} {domain:12} {row['n']:6} {row['accuracy']:9.3f} {row['stderr']:7.3f}"
        )
    for side in sorted({row["side"] for row in rows} - {None}):
        score = pool([row for row in rows if row["side"] == side])
        print(f"{'all':24} {side:8} {'all':12} {'':6} {score.accuracy:9.3f}")
    print(f"\nperplexity {prose['perplexity']:.2f} over {prose['tokens']} tokens")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({"accuracy": rows, "perplexity": prose}, indent=1))


def _demo(argv: list[str]) -> None:
    from rmu.demo.run import main as demo

    demo(argv)


def _presets(argv: list[str]) -> None:
    parser = _Parser("rmu presets", description="List the presets, or show one as YAML.")
    parser.add_argument("name", nargs="?", help="the preset to show")
    name = parser.parse_args(argv).name
    if name is None:
        for preset in preset_names():
            text = (files("rmu.presets") / f"{preset}.yaml").read_text(encoding="utf-8")
            print(f"{preset:28} {text.splitlines()[0].lstrip('# ')}")
    elif name in preset_names():
        print((files("rmu.presets") / f"{name}.yaml").read_text(encoding="utf-8"), end="")
    else:
        raise ValueError(
            f"name: no preset {name!r}{_nearest(name, preset_names())}; presets: {', '.join(preset_names())}"
        )
