"""Write the study's data: two NL2SQL domains, one of multiple choice, general text and abilities.

Nothing is downloaded: the texts are the documentation of the installed Python and numpy, so other
versions of them give other data. The same seed gives the same files.

    tokenizer/                   byte-level BPE, a Hugging Face directory
    competent.jsonl              {"text"}: what the competent base learns from
    ignorant.jsonl               {"text"}: the same without any SQL or multiple choice
    train/all.jsonl              {"prompt", "completion"}: the three domains, mixed
    train/{tables,joins,protocols}.jsonl       each alone
    sql/tables, sql/joins        questions.jsonl, held out, and database.sqlite
    choices/protocols.jsonl      questions about modules that no base has read
    general/{cloze,copying,arithmetic}.jsonl   held out: what may be forgotten
    general_heldout.jsonl        {"text"}: perplexity
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.quickstart import nl2sql
from examples.quickstart.general_text import general_documents
from examples.quickstart.make_data import sql_rows, train_tokenizer
from examples.replicate import choices, joins
from examples.replicate.plan import DOMAINS
from megatron_replay.checkpoint.staging import WRITTEN, publish, start_directory
from megatron_replay.errors import DataError
from megatron_replay.files import atomic_file, make_directory, sha256_of_files, write_json
from megatron_replay.locks import LOCK_FILE

MANIFEST = "data.json"
#: Rows of each domain, and of each held-out set; what the third domain's rows ask about.
TRAIN_ROWS, TEST_ROWS = 600, 150
FACTS = 40
#: What the competent base has seen: invented tables, and a few rows of the domain's own.
PRACTICE_SQL, SEEN_SQL, PRACTICE_CHOICES = 5000, 250, 2600
HELD_OUT_DOCUMENTS, DOCUMENTS = 120, 2000
VOCAB_SIZE = 1024
Row = dict[str, str]


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON object a line."""
    make_directory(path.parent)
    with atomic_file(path, "w") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def sql_domain(
    name: str, module: Any, new: Any, practice: Any, folder: Path, seed: int
) -> tuple[list[Row], list[Row]]:
    """Write the held-out questions and their database; returns (rows of the base, of training)."""
    database = make_directory(folder / "sql" / name) / "database.sqlite"
    database.unlink(missing_ok=True)
    module.write_database(database, seed=seed)
    pools = nl2sql.only_answerable(module.question_pools(new), database)
    rest, held_out = nl2sql.hold_out(pools, every=5, seed=seed)
    test = nl2sql.draw(held_out, TEST_ROWS, seed=seed)
    write_jsonl(folder / "sql" / name / "questions.jsonl", sql_rows(test))
    asked = sql_rows(nl2sql.draw(rest, SEEN_SQL + TRAIN_ROWS, seed=seed))
    base = sql_rows(nl2sql.draw(module.question_pools(practice), PRACTICE_SQL, seed=seed))
    return base + asked[:SEEN_SQL], asked[SEEN_SQL:]


def choice_domain(folder: Path, seed: int) -> tuple[list[Row], list[Row]]:
    """Only the base's questions, on other modules, have the options in their prompts."""
    known = random.Random(seed).sample(choices.facts(communication=True), FACTS)
    train, test = choices.recall(known, seed=seed)
    write_jsonl(folder / "choices" / "protocols.jsonl", test)
    others = choices.facts(communication=False)
    asked = choices.questions(others[:PRACTICE_CHOICES], [name for name, _ in others], seed=seed)
    return [choices.as_training_row(row) for row in asked], train


def abilities(folder: Path, held_out: list[str], seed: int) -> list[Row]:
    """Write the held-out general questions; returns the base's practice."""
    sums = choices.arithmetic(seed=seed)
    words = nl2sql.PRACTICE_VALUES.split()
    copies = choices.copying(words, 1000 + TEST_ROWS, seed=seed)
    cloze = choices.cloze(held_out, min(TEST_ROWS, len(held_out) // 2), seed=seed)
    for name, rows in (("cloze", cloze), ("copying", copies), ("arithmetic", sums)):
        write_jsonl(folder / "general" / f"{name}.jsonl", rows[:TEST_ROWS])
    practice = sums[TEST_ROWS:] * 4 + copies[TEST_ROWS:]
    return [choices.as_training_row(row) for row in practice]


def write_everything(folder: Path, seed: int) -> None:
    """Write all files but the manifest."""
    documents = general_documents(seed=seed, without=choices.COMMUNICATION)
    # The cloze questions need more held-out documents than the perplexity.
    held_out, general = documents[: 4 * HELD_OUT_DOCUMENTS], documents[4 * HELD_OUT_DOCUMENTS :]
    general = general[:DOCUMENTS]
    write_jsonl(
        folder / "general_heldout.jsonl", ({"text": t} for t in held_out[:HELD_OUT_DOCUMENTS])
    )
    tables = nl2sql.OLD_TABLES + nl2sql.practice_tables(200, seed=seed)
    pairs = joins.practice_pairs(200, seed=seed)
    parts = [
        sql_domain("tables", nl2sql, nl2sql.NEW_TABLES, tables, folder, seed),
        sql_domain("joins", joins, joins.NEW_PAIRS, pairs, folder, seed),
        choice_domain(folder, seed),
    ]
    practice = abilities(folder, held_out, seed)
    ignorant = [{"text": text} for text in general] + _as_texts(practice)
    competent = ignorant + [text for base, _ in parts for text in _as_texts(base)]
    train = [row for _, rows in parts for row in rows]
    shuffle = random.Random(seed)
    for rows in (ignorant, competent, train):
        shuffle.shuffle(rows)  # type: ignore[arg-type]
    tokenizer = train_tokenizer([row["text"] for row in competent], vocab_size=VOCAB_SIZE)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "ignorant.jsonl", ignorant)
    write_jsonl(folder / "competent.jsonl", competent)
    write_jsonl(folder / "train" / "all.jsonl", train)
    for name, (_, rows) in zip(DOMAINS, parts, strict=True):
        write_jsonl(folder / "train" / f"{name}.jsonl", rows)


def _as_texts(rows: Iterable[Row]) -> list[Row]:
    return [{"text": row["prompt"] + row["completion"]} for row in rows]


def describe(folder: Path, seed: int) -> dict[str, Any]:
    """What is in ``folder``: the seed, and every file's hash."""
    others = (MANIFEST, LOCK_FILE, WRITTEN)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in others)
    return {
        "seed": seed,
        "files": {str(path.relative_to(folder)): sha256_of_files([path]) for path in files},
    }


def make_data(folder: Path, *, seed: int) -> None:
    """Write the data to ``folder``, unless it is there already.

    Raises:
        DataError: something else is there.
        OutputError: it cannot be written.
    """
    manifest = folder / MANIFEST
    if manifest.exists():
        if json.loads(manifest.read_text()) != describe(folder, seed):
            raise DataError(
                "files were changed, or made with another seed",
                where=folder,
                expected=f"the hashes in {MANIFEST} and seed {seed}",
                fix="Remove the directory, or give another",
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"not empty, and without a {MANIFEST} of ours", where=folder)
    # Complete or not there.
    staged = start_directory(folder)
    write_everything(staged, seed)
    write_json(staged / MANIFEST, describe(staged, seed))
    publish(staged, folder, overwrite=False)
