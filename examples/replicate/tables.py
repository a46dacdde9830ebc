"""The study's tables: one line for each method, mean and spread over its seeds.

Bases and sizes are never mixed. ± is the sample's standard deviation over seeds; an interval is the
95 % confidence interval of a mean over n seeds, mean ± t₀.₉₇₅(n − 1) · s / √n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from examples.replicate import plan
from examples.replicate.results import LOGGED, MEASURED, read_rows
from megatron_replay.errors import DataError

#: The order of a table's lines; other methods follow in the order of their rows.
METHODS = ("Base", *plan.METHODS, *plan.REMEDIES)
#: What remedies and learning-rate sweeps are compared with: the first of these that is there.
REFERENCES = ("AdamW (SFT)", "full softmax")
#: The ablations, and the variant of the runs in the middle of each: the project's defaults.
ABLATIONS = {"positions": "bucket", "angles": "45", "coverage": "0.95"}
GROUP = ["base", "size"]
#: Student's t₀.₉₇₅ by degrees of freedom; beyond nine, the value of nine, which is wider.
_T = (
    np.nan, 12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216,
)  # fmt: skip
#: Columns by title, with the digits they are shown with.
_SHOWN = {
    "domain_mean": ("domain mean, %", ".1f"),
    "retention": ("retention, %", ".1f"),
    "perplexity": ("general perplexity", ".2f"),
    "forgetting": ("ΔPPL", "+.2f"),
    "relative_l2_percent": ("relative L2, %", ".2f"),
    "outside_percent": ("outside mass, %", ".2f"),
    "loss_std": ("loss std", ".4f"),
    "gradient_norm_cv": ("gradient-norm CV", ".3f"),
    "loss_spikes": ("loss spikes", ".1f"),
    "gradient_spikes": ("gradient spikes", ".1f"),
    "step_seconds": ("s/step", ".3f"),
    "stage0_seconds": ("Stage 0, s", ".1f"),
    "seconds": ("Stage 1, s", ".1f"),
    "all_seconds": ("both, s", ".1f"),
}


def load_rows(paths: Iterable[Path]) -> pd.DataFrame:
    """All rows, with derived columns: domain mean, retention, forgetting and times.

    ``domain_mean`` is over every domain task of a base and size: a row that lacks one has none, as
    means over different tasks do not compare. ``retention`` is the mean over general benchmarks of
    100 · score / base's score, ``forgetting`` the perplexity less the base's.

    Raises:
        DataError: a file cannot be read, a cell is no number, or a base and size have no base row.
    """
    rows = pd.DataFrame([row for path in paths for row in read_rows(path)])
    if rows.empty:
        raise DataError("no rows", where=", ".join(map(str, paths)))
    scores = [name for name in rows if "/" in name]
    for column in ("seed", "lr", *scores, *MEASURED, *(c for c in LOGGED if c in rows)):
        try:
            rows[column] = pd.to_numeric(rows[column])
        except ValueError as error:
            raise DataError(f"not a number: {error}", where=f"column {column}") from error
    rows = rows.drop_duplicates(["name", "tables"], keep="last")
    rows[["domain_mean", "retention", "forgetting"]] = np.nan
    for group, own in rows.groupby(GROUP, sort=False):
        base = own[own.method == "Base"]
        if base.empty:
            raise DataError("no row of the base model", where=", ".join(group))
        base = base.iloc[-1]
        tasks, general = (
            [name for name in scores if name.startswith(kind) and own[name].notna().any()]
            for kind in ("domain/", "general/")
        )
        rows.loc[own.index, "domain_mean"] = own[tasks].mean(axis=1, skipna=False)
        kept = 100 * own[general] / base[general].astype(float)
        rows.loc[own.index, "retention"] = kept.mean(axis=1, skipna=False)
        rows.loc[own.index, "forgetting"] = own.perplexity - base.perplexity
    rows["step_seconds"] = rows.seconds / rows.steps
    rows["all_seconds"] = rows.seconds + rows.stage0_seconds.fillna(0.0)
    known = [m for m in METHODS if m in set(rows.method)]
    order = [*known, *(m for m in rows.method.unique() if m not in METHODS)]
    rows["method"] = pd.Categorical(rows.method, order, ordered=True)
    return rows


def in_table(rows: pd.DataFrame, table: str) -> pd.DataFrame:
    """The rows listed in ``table``, in the methods' order; ablations with their default variant."""
    own = rows[[table in listed.split() for listed in rows.tables]].copy()
    if table in ABLATIONS:
        own = own[own.method != "Base"]
        own["variant"] = own.variant.replace("", ABLATIONS[table])
    return own.sort_values("method", kind="stable")


def spread(values: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean, sample standard deviation, half the 95 % interval, and number of known ``values``."""
    known = pd.Series(values, dtype=float).dropna()
    n = len(known)
    std = known.std() if n > 1 else np.nan
    return known.mean(), std, _T[min(n, len(_T)) - 1] * std / np.sqrt(max(n, 1)), n


def lines(own: pd.DataFrame, by: list[str], columns: Sequence[str]) -> pd.DataFrame:
    """``mean ± std`` of ``columns`` for each line, a line being the seeds that share ``by``.

    Raises:
        DataError: a line would hold two runs of one seed.
    """
    twice = own[own.duplicated([*by, "seed"], keep=False)]
    if not twice.empty:
        raise DataError(
            "two runs in one line of a table",
            where=" and ".join(twice.name.head(2)),
            expected=f"runs that differ in seed, {', '.join(by)}",
        )
    columns = [column for column in columns if column in own and own[column].notna().any()]
    table = []
    for label, seeds in own.groupby(by, sort=False, observed=True):
        cells = {column: _mean_and_std(seeds[column], column, len(seeds)) for column in columns}
        table.append(dict(zip(by, label, strict=True)) | cells | {"n": str(len(seeds))})
    return pd.DataFrame(table).rename(columns={column: _shown(column)[0] for column in columns})


def _shown(column: str) -> tuple[str, str]:
    return _SHOWN.get(column) or (f"{column.partition('/')[2]}, %", ".1f")


def _mean_and_std(values: pd.Series, column: str, seeds: int) -> str:
    mean, std, _, n = spread(values)
    form = _shown(column)[1]
    text = "–" if n == 0 or np.isnan(mean) else format(mean, form)
    text += "" if np.isnan(std) else f" ± {format(std, form.lstrip('+'))}"
    return text if n in (0, seeds) else f"{text} [n = {n}]"


def interval(values: Sequence[float], form: str) -> str:
    """``+1.20 [+0.80, +1.60]``: the mean and its 95 % interval."""
    mean, _, half, n = spread(values)
    if n == 0:
        return "–"
    ends = f" [{format(mean - half, form)}, {format(mean + half, form)}]"
    return format(mean, form) + ("" if np.isnan(half) else ends)


def paired(own: pd.DataFrame, reference: pd.DataFrame, column: str) -> pd.Series:
    """``column`` less the reference's, over the seeds that both have.

    What all methods share with a seed (its order of the data) drops out of the difference.
    """
    return (own.set_index("seed")[column] - reference.set_index("seed")[column]).dropna()


def reference_of(rows: pd.DataFrame) -> str | None:
    """The method that the others are compared with; None where it is not among them."""
    return next((name for name in REFERENCES if name in set(rows.method)), None)


def paper_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The paper's tables by title, for each base and size that has their rows."""
    tables: dict[str, pd.DataFrame] = {}
    for group, of_group in rows.groupby(GROUP, sort=False):
        where = ", ".join(group)
        tasks = [name for name in rows if name.startswith("domain/")]
        general = [name for name in rows if name.startswith("general/")]
        methods = in_table(of_group, "methods")
        trained = methods[methods.method != "Base"]
        for title, own, columns in (
            ("Table 1: domain scores", methods, [*tasks, "domain_mean"]),
            ("Table 2: general benchmarks", methods, [*general, "retention", "perplexity"]),
            ("Table 3: distance and forgetting", trained, ["relative_l2_percent", "forgetting"]),
            ("Stability", trained, ["loss_std", *LOGGED[2:5]]),
            ("Cost", trained, ["step_seconds", "stage0_seconds", "seconds", "all_seconds"]),
        ):
            if not trained.empty:
                tables[f"{title} ({where})"] = lines(own, ["method"], columns)
        for table, (title, more) in {
            "positions": ("Table 4: positions", ["forgetting", "outside_percent"]),
            "angles": ("Table 5: largest angle", ["retention", "loss_std"]),
            "coverage": ("Coverage", ["forgetting", "outside_percent"]),
        }.items():
            own = in_table(of_group, table)
            if own.variant.nunique() > 1:
                own = own.sort_values("variant", key=_numbers_first, kind="stable")
                columns = [*tasks, "domain_mean", *more]
                tables[f"{title} ({where})"] = lines(own, ["variant"], columns)
    return tables


def _numbers_first(variants: pd.Series) -> pd.Series:
    return pd.to_numeric(variants, errors="coerce")


def remedies(rows: pd.DataFrame) -> pd.DataFrame:
    """Means with 95 % intervals, and differences from the reference, paired by seed."""
    found = []
    for group, own in in_table(rows, "remedies").groupby(GROUP, sort=False):
        name = reference_of(own)
        for method, seeds in own.groupby("method", observed=True):
            line = {**dict(zip(GROUP, group, strict=True)), "method": method}
            columns = ("domain_mean", "forgetting", "relative_l2_percent", "outside_percent")
            for column in columns:
                title, form = _shown(column)
                line[title] = interval(seeds[column], form)
            for column in ("domain_mean", "forgetting") if name else ():
                differences = paired(seeds, own[own.method == name], column)
                is_compared = method not in ("Base", name)
                line[f"{_shown(column)[0]}, paired"] = (
                    interval(differences, _shown(column)[1].replace(".1f", "+.1f"))
                    if is_compared
                    else "–"
                )
            found.append(line | {"n": str(len(seeds))})
    return pd.DataFrame(found)


def at_one_rate(rows: pd.DataFrame) -> pd.DataFrame:
    """Sweeps of one domain against full softmax at the same learning rate, paired by seed."""
    found = []
    own = in_table(rows, "sweep")
    for group, of_group in own[own.method != "Base"].groupby(GROUP, sort=False):
        reference = of_group[of_group.method == "full softmax"]
        for (method, lr), seeds in of_group.groupby(["method", "lr"], observed=True):
            full = reference[reference.lr == lr]
            if method == "full softmax" or full.empty:
                continue
            change = 100 * paired(seeds, full, "forgetting") / full.forgetting.mean()
            found.append({
                **dict(zip(GROUP, group, strict=True)), "method": method, "lr": f"{lr:g}",
                "ΔPPL, change in %": interval(change, "+.0f"),
                "domain mean, points": interval(paired(seeds, full, "domain_mean"), "+.1f"),
                "outside mass, %": interval(seeds.outside_percent, ".0f"), "n": str(len(change)),
            })  # fmt: skip
    return pd.DataFrame(found)


def sweeps(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Every method at every learning rate, by title."""
    own = in_table(rows, "sweep")
    own = own[own.method != "Base"].sort_values(["method", "lr"], kind="stable")
    own["learning rate"] = own.lr.map("{:g}".format)
    columns = ["domain_mean", "forgetting", "relative_l2_percent"]
    return {
        f"Sweep of learning rates ({', '.join(group)})": lines(
            of_group, ["method", "learning rate"], columns
        )
        for group, of_group in own.groupby(GROUP, sort=False)
    }


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table of texts."""
    rows = [list(table), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
