"""Find how much of a tuned model to keep within a budget of forgetting, and write that model.

    python tools/blend.py --base Qwen3-4B --tuned tuned --save blend --general-text heldout.jsonl \\
        --max-delta-perplexity 0.3 --data questions.jsonl

The model written is ``(1 - W)*base + W*tuned``, with the largest weight W found for which the
perplexity of general text is at most the base's plus --max-delta-perplexity. Perplexity is that of
tools/evaluate.py. Prints every weight that was measured and writes them to SAVE.curve.json.
docs/evaluation.md says when this fails.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from megatron_replay.checkpoint.blend import Blend
from megatron_replay.checkpoint.staging import require_replaceable
from megatron_replay.cli import exit_code_of
from megatron_replay.config import flag_name
from megatron_replay.data.prompts import PromptStyle
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import ConfigError
from megatron_replay.evaluation.inputs import FLAGS, Inputs, Settings
from megatron_replay.evaluation.language_model import load_model, require_model
from megatron_replay.evaluation.measurements import read_measurements
from megatron_replay.evaluation.results import Result, add_differences, printable, strict, value_at
from megatron_replay.evaluation.suite import require_one_tokenizer
from megatron_replay.files import make_directory, require_apart, write_json
from megatron_replay.flags import Parser, add_flags, from_flags

#: Where the first crossing is looked for: the base is 0, the tuned model 1.
_GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
#: The weight is found to this; each halving costs a measurement.
_RESOLUTION = 1 / 64
_COLUMNS = (
    ("weight", "weight", ".4f", 1),
    ("general perplexity", "general.perplexity", ".3f", 1),
    ("ΔPPL", "general.delta_perplexity", "+.3f", 1),
    ("data perplexity", "data.perplexity", ".3f", 1),
    ("data next token %", "data.accuracy", ".1f", 100),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = flags.add_argument
    add("--base", type=Path, required=True, help="the base model's Hugging Face directory")
    add("--tuned", type=Path, required=True, help="that of the model tuned from it")
    add("--save", type=Path, required=True, help="directory to write")
    add("--general-text", type=Path, required=True, help=FLAGS["general_text"][1])
    add("--max-delta-perplexity", type=float, required=True, metavar="BUDGET",
        help="how much the perplexity of general text may rise")  # fmt: skip
    add("--data", type=Path, help=f"{FLAGS['data'][1]}: measured too, for the curve")
    add("--overwrite", action="store_true", help="replace an earlier blend")
    for one in fields(Settings):
        if one.name in ("device", "dtype", "batch_size"):
            text = f"{one.metadata['help']} (default: {one.default})"
            add(flag_name(one.name), type=type(one.default), default=one.default, help=text)
    add_flags(flags, PromptStyle)
    return flags


def largest_within(measure: Callable[[float], float], budget: float) -> tuple[float, bool]:
    """The largest weight, to 1/64, below the first at which ``measure`` exceeds ``budget``.

    Weight 1 is taken if it is within the budget. Otherwise a grid of quarters finds the first
    crossing, and bisection its place. Each weight is measured at most once.

    Args:
        measure: ΔPPL of a weight in (0, 1]; not a number counts as beyond the budget.

    Returns:
        The weight, 0 if there is none; and whether ΔPPL falls back within the budget beyond it.
    """
    if measure(1.0) <= budget:
        return 1.0, False
    fits = [True, *(measure(weight) <= budget for weight in _GRID[1:-1]), False]
    first = fits.index(False)
    low, high = _GRID[first - 1], _GRID[first]
    while high - low > _RESOLUTION:
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) <= budget else (low, middle)
    return low, any(fits[first:])


def _check(given: argparse.Namespace) -> tuple[Inputs, Path]:
    """What is measured, and where the curve is written, once nothing stands against it."""
    if not 0 <= given.max_delta_perplexity < math.inf:
        raise ConfigError(
            "no budget",
            where="--max-delta-perplexity",
            expected="a number of at least 0",
            found=given.max_delta_perplexity,
        )
    for name in ("chat_template", "system_prompt"):
        if getattr(given, name, None) is not None and given.data is None:
            raise ConfigError(
                "has no effect on general text, which is plain",
                where=flag_name(name),
                fix="Add --data, or leave it out",
            )
    inputs = Inputs(general_text=given.general_text, data=given.data)
    save = given.save.resolve()
    curve = save.with_name(f"{save.name}.curve.json")
    models = {"--base": given.base, "--tuned": given.tuned}
    require_apart(given.save, models.items(), flag="--save")
    read = [(flag_name(name), file) for name, files in inputs.files().items() for file in files]
    require_apart(curve, read, flag="--save")
    require_replaceable(given.save, overwrite=given.overwrite)
    make_directory(given.save.absolute().parent)
    for model in models.values():
        require_model(model)
    require_one_tokenizer(given.base, given.tuned, flag="--tuned")
    return inputs, curve


def measure_blends(
    blend: Blend, given: argparse.Namespace, inputs: Inputs
) -> tuple[float, bool, list[Result]]:
    """As `largest_within`; and the results of all weights that were measured, ascending.

    Raises:
        DataError: an input does not fit the models.
        CheckpointError: a model cannot be loaded.
    """
    settings = from_flags(Settings, vars(given)).resolved()
    read = read_measurements(inputs, given.base, load_tokenizer(given.base), settings, {})
    load = partial(load_model, device=settings.device, dtype=settings.dtype)
    model, curve = load(given.base), dict[float, Result]()

    def measure(weight: float) -> float:
        """ΔPPL of ``model``, which holds the blend of this weight."""
        curve[weight] = {one.kind: one.run(model, show=f"weight {weight:.4f}") for one in read}
        add_differences(curve[weight], curve[0.0])
        return float(curve[weight]["general"]["delta_perplexity"])

    @torch.no_grad()
    def fill_and_measure(weight: float) -> float:
        for name, tensor in blend.tensors(weight):
            parameters[name].copy_(tensor)
        return measure(weight)

    measure(0.0)
    del model  # before the next is loaded
    model = load(given.tuned)
    parameters = dict(model.named_parameters())
    weight, falls_back = largest_within(fill_and_measure, given.max_delta_perplexity)
    return weight, falls_back, [{"weight": at, **curve[at]} for at in sorted(curve)]


def _table(points: Sequence[Result]) -> Iterator[str]:
    columns = [column for column in _COLUMNS if value_at(points[0], column[1]) is not None]
    yield "  ".join(title for title, *_ in columns)
    for point in points:
        cells = (
            format(factor * value_at(point, path), form).rjust(len(title))
            for title, path, form, factor in columns
        )
        yield "  ".join(cells)


def find_blend(given: argparse.Namespace) -> str:
    """Measure blends, print the curve, write the best, and return a line about it.

    Raises:
        ReplayError: no weight is within the budget, or something given cannot be used.
    """
    inputs, file = _check(given)
    blend, budget = Blend(given.base, given.tuned), given.max_delta_perplexity
    weight, falls_back, points = measure_blends(blend, given, inputs)
    print("\n".join(_table(points)))
    about = {"base": str(given.base), "tuned": str(given.tuned), "max_delta_perplexity": budget}
    write_json(file, strict({**about, "weight": weight, "falls_back": falls_back, "curve": points}))
    if falls_back:
        print(
            "The curve is not monotonic: beyond the first weight that exceeds the budget, another "
            "is within it. The weight below the first is taken."
        )
    if weight == 0:
        raise ConfigError(
            f"no blend is within the budget, down to weight {_RESOLUTION:.4f}",
            where="--max-delta-perplexity",
            found=budget,
            fix=f"Give a larger budget, or train at a lower rate; {file} has the curve",
        )
    blend.write(given.save, weight, overwrite=given.overwrite)
    return f"wrote {given.save}: weight {weight:.4f}; the curve is in {file}"


def main(argv: list[str] | None = None) -> int:
    """Find the blend and write it."""
    return exit_code_of(
        lambda: printable(find_blend(parser().parse_args(argv))), interrupted="no model was written"
    )


if __name__ == "__main__":
    sys.exit(main())
