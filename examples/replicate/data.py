"""The study's data: published sets, brought into the formats of this framework's programs.

``DATA`` is a directory with a folder for each set (`SETS`); nothing of it is part of this project.
A file is found by its name, wherever it is below its folder. The same files give the same rows.

    spider/                        train.json, dev.json (held out: other queries), database/
    {oran,causes}.jsonl            {"prompt", "completion"}: what is trained
    choices/{oran,causes}.jsonl    {"prompt", "options", "answer"}: held out
    general/NAME.jsonl             the same, of general abilities, which fine-tuning may cost
    general_text.jsonl             {"text"}: perplexity
    heal_{text,chat}.jsonl         what the base is healed with, none of which is measured
"""

from __future__ import annotations

import bz2
import json
import random
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.quickstart.make_data import write_rows
from megatron_replay.errors import DataError
from megatron_replay.files import atomic_file, make_directory

#: Each set's folder, its files, and where they are published.
SETS = {
    "spider": (("dev.json",), "https://yale-lily.github.io/spider"),
    "oran-bench-13k": (("fin_E.json", "fin_M.json", "fin_H.json"),
                       "https://github.com/prnshv/ORAN-Bench-13K"),
    "wireshark-telecom": (("tshark_G_values.telecom.tsv",), "the output of `tshark -G values`"),
    "wikitext2": (("wikitext-test.txt", "valid.txt"), "WikiText-2: the raw test and validation"),
    "lambada": (("lambada_test.jsonl",), "https://huggingface.co/datasets/EleutherAI/lambada_openai"),
    "hellaswag": (("hellaswag_val_full.txt.bz2",),
                  "https://github.com/klosax/hellaswag_text_data"),
    "arc_easy": (("arc_easy.jsonl",), "https://github.com/mosaicml/llm-foundry"),
    "piqa": (("valid.jsonl", "valid-labels.lst"), "https://github.com/ybisk/ybisk.github.io"),
    "bbh": (("hyperbaton.json",), "https://github.com/suzgunmirac/BIG-Bench-Hard"),
    "dolly": (("*.jsonl",), "https://huggingface.co/datasets/databricks/databricks-dolly-15k"),
}  # fmt: skip
#: Of Spider's development set, those with many questions for the length of their schemas; the
#: first are the quick plan's.
DATABASES = (
    "tvshow", "network_1", "concert_singer", "pets_1", "poker_player", "orchestra",
    "employee_hire_evaluation", "course_teach", "singer", "museum_visit", "battle_death", "voter_1",
    "cre_Doc_Template_Mgt", "car_1",
)  # fmt: skip
#: Share of the queries of each database that is held out, with all their questions.
HELD_OUT = 0.35
#: O-RAN questions to train and to test, none longer than this many characters.
ORAN_TRAIN, ORAN_TEST, ORAN_LENGTH = 1500, 400, 250
#: Tables of causes, and how a question names them.
CAUSES = {
    "nas_5gs.mm.5gmm_cause": "5GMM", "nas_eps.emm.cause": "EMM", "nas_5gs.sm.5gsm_cause": "5GSM",
    "nas_eps.esm.cause": "ESM", "pfcp.cause": "PFCP",
}  # fmt: skip
NUM_FACTS = 120
#: How a fact is asked in training and, in other words, in the test.
ASKED = (
    "What does {table} cause {value} mean?",
    "Name the {table} cause with the value {value}.",
    "{table} cause #{value}: what is it?",
    "A trace shows {table} cause {value}. What happened?",
    "Decode this: {table} cause = {value}",
    "Which {table} cause has the number {value}?",
)
ASKED_IN_TEST = (
    "The network rejects a message with {table} cause value {value}. What is the reason?",
    "Translate the code {value} of the {table} cause field into words.",
)
#: Most characters of a general question with its options: time goes to the long ones.
GENERAL_LENGTH = 300
#: Characters of each kind of text that heals the base, about 20,000 tokens.
HEALING = 80_000
Row = dict[str, Any]


class Sources:
    """The published sets below one directory; remembers which files were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str, pattern: str) -> Path:
        """The first file of the set ``name`` that has this name, wherever it is in its folder.

        Raises:
            DataError: there is none.
        """
        found = min((self.folder / name).rglob(pattern), default=None)
        if found is None:
            raise DataError(
                f"no {pattern} of the set {name}",
                where=self.folder / name,
                fix=f"It is published here: {SETS[name][1]}",
            )
        return found

    def lines(self, name: str, pattern: str) -> list[str]:
        """Its lines, without their ends."""
        return self.find(name, pattern).read_text(encoding="utf-8").rstrip("\n").split("\n")

    def files(self, names: Iterable[str], databases: int) -> list[Path]:
        """Every file that these sets are made of; raises DataError where one is missing."""
        used = [f"{database}.sqlite" for database in DATABASES[:databases]]
        patterns = {name: (*SETS[name][0], *(used if name == "spider" else ())) for name in names}
        return [self.find(name, pattern) for name, of in patterns.items() for pattern in of]


def write_data(folder: Path, sources: Sources, *, domains: Sequence[str], databases: int,
               items: int) -> None:  # fmt: skip
    """Write the data of ``domains``, and ``items`` questions of each general benchmark.

    Args:
        databases: of Spider's, how many of `DATABASES`.

    Raises:
        DataError: a set is missing, or a line of it does not fit.
        OutputError: the data cannot be written.
    """
    for domain in domains:
        DOMAINS[domain](folder, sources, databases)
    for name, make in GENERAL.items():
        rows = [
            row for row in make(sources)
            if len(row["prompt"]) + sum(map(len, row["options"])) <= GENERAL_LENGTH
        ]  # fmt: skip
        chosen = random.Random(0).sample(rows, min(items, len(rows)))
        write_jsonl(folder / "general" / f"{name}.jsonl", chosen)
    measured = _paragraphs(sources.lines("wikitext2", "wikitext-test.txt"))
    every = max(1, 3 * len(measured) // items)
    write_jsonl(folder / "general_text.jsonl", measured[::every])
    write_jsonl(
        folder / "heal_text.jsonl", _some(_paragraphs(sources.lines("wikitext2", "valid.txt")))
    )
    asked = (json.loads(line) for line in sources.lines("dolly", "*.jsonl"))
    chat = [
        {"prompt": f"{row['instruction']}\n{row['context']}".strip(), "completion": row["response"]}
        for row in asked
    ]
    write_jsonl(folder / "heal_chat.jsonl", _some(chat))


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line; makes the directory."""
    make_directory(path.parent)
    write_rows(path, rows)


def _some(rows: list[Row]) -> list[Row]:
    """Rows of up to 2,000 characters, in a random order, until there are `HEALING`."""
    random.Random(0).shuffle(rows)
    found, total = [], 0
    for row in rows:
        size = sum(map(len, row.values()))
        if size <= 2000 and total < HEALING:
            found.append(row)
            total += size
    return found


def _paragraphs(lines: Iterable[str]) -> list[Row]:
    """Rows of WikiText's long lines, without headings and sentences that lack a word."""
    found = []
    for line in lines:
        whole = [s for s in line.strip().split(" . ") if "<unk>" not in s]
        if len(text := " . ".join(whole)) > 300 and not text.startswith("="):
            found.append({"text": text})
    return found


def spider(folder: Path, sources: Sources, databases: int) -> None:
    """Questions about the same databases, split by their query: paraphrases stay together."""
    file = sources.find("spider", "dev.json")
    rows = json.loads(file.read_text(encoding="utf-8"))
    rng, train, test = random.Random(0), list[Row](), list[Row]()
    for name in DATABASES[:databases]:
        own = [row for row in rows if row["db_id"] == name]
        queries = sorted({row["query"] for row in own})
        held_out = set(rng.sample(queries, round(HELD_OUT * len(queries))))
        test += [row for row in own if row["query"] in held_out]
        train += [row for row in own if row["query"] not in held_out]
        database = sources.find("spider", f"{name}.sqlite")
        shutil.copy(database, make_directory(folder / "spider" / "database" / name))
    for name, some in (("train.json", train), ("dev.json", test)):
        with atomic_file(folder / "spider" / name, "w") as handle:
            json.dump(some, handle)


def oran(folder: Path, sources: Sources, databases: int) -> None:
    """Multiple choice, each question once; its options in a random order in the prompt."""
    rng, rows = random.Random(0), dict[str, Row]()
    for name in SETS["oran-bench-13k"][0]:
        for line in sources.lines("oran-bench-13k", name):
            question, options, answer = json.loads(line)
            options = [re.sub(r"^\d\. *", "", option).strip() for option in options]
            is_whole = len(set(options)) == 4 and all(options) and answer in ("1", "2", "3", "4")
            if is_whole and len(question) + sum(map(len, options)) <= ORAN_LENGTH:
                right = options[int(answer) - 1]
                rng.shuffle(options)
                listed = "".join(f"\n- {option}" for option in options)
                rows.setdefault(question, _choice(f"{question}{listed}", options, right))
    chosen = rng.sample(list(rows.values()), ORAN_TRAIN + ORAN_TEST)
    write_jsonl(folder / "oran.jsonl", map(_training_row, chosen[:ORAN_TRAIN]))
    write_jsonl(folder / "choices" / "oran.jsonl", chosen[ORAN_TRAIN:])


def causes(folder: Path, sources: Sources, databases: int) -> None:
    """Facts that are new to the base, each in every wording of training and of the test."""
    tables: dict[str, dict[str, str]] = {table: {} for table in CAUSES}
    for line in sources.lines("wireshark-telecom", "tshark_G_values.telecom.tsv"):
        _, field, value, *text = line.split("\t")
        if field in tables and not re.search("(?i)unused|reserved|spare|unknown", text[0]):
            tables[field].setdefault(text[0], value)
    rng = random.Random(0)
    facts = rng.sample([(t, v, m) for t, of in tables.items() for m, v in of.items()], NUM_FACTS)
    train, test = list[Row](), list[Row]()
    for table, value, meaning in facts:
        wrong = rng.sample([other for other in tables[table] if other != meaning], 3)
        for wordings, rows in ((ASKED, train), (ASKED_IN_TEST, test)):
            for wording in wordings:
                options = rng.sample([meaning, *wrong], 4)
                prompt = wording.format(table=CAUSES[table], value=value)
                rows.append(_choice(prompt, options, meaning))
    write_jsonl(folder / "causes.jsonl", map(_training_row, train))
    write_jsonl(folder / "choices" / "causes.jsonl", test)


def _choice(prompt: str, options: Sequence[str], right: str) -> Row:
    return {"prompt": prompt, "options": list(options), "answer": options.index(right)}


def _training_row(row: Row) -> Row:
    return {"prompt": row["prompt"], "completion": row["options"][row["answer"]]}


def lambada(sources: Sources) -> list[Row]:
    """The last word of a passage, which is right if it is the greedy continuation."""
    rows = []
    for line in sources.lines("lambada", "lambada_test.jsonl"):
        before, _, word = json.loads(line)["text"].rpartition(" ")
        rows.append(_choice(before, [f" {word}"], f" {word}"))
    return rows


def hellaswag(sources: Sources) -> list[Row]:
    """How a scene goes on: six lines a question (scene, number of the right ending, endings)."""
    with bz2.open(sources.find("hellaswag", "hellaswag_val_full.txt.bz2"), "rt",
                  encoding="utf-8") as handle:  # fmt: skip
        lines = handle.read().rstrip("\n").split("\n")
    return [
        _choice(scene, [f" {ending}" for ending in endings], f" {endings[int(right)]}")
        for scene, right, *endings in (lines[i : i + 6] for i in range(0, len(lines), 6))
    ]


def arc_easy(sources: Sources) -> list[Row]:
    """School science; the questions begin with "Question:"."""
    rows = [json.loads(line) for line in sources.lines("arc_easy", "arc_easy.jsonl")]
    return [_answered(row["query"], row["choices"], row["gold"]) for row in rows]


def piqa(sources: Sources) -> list[Row]:
    """Which of two ways reaches a goal."""
    rows = [json.loads(line) for line in sources.lines("piqa", "valid.jsonl")]
    labels = sources.lines("piqa", "valid-labels.lst")
    return [
        _answered(f"Question: {row['goal']}", [row["sol1"], row["sol2"]], int(label))
        for row, label in zip(rows, labels, strict=True)
    ]


def bbh(sources: Sources) -> list[Row]:
    """BIG-Bench Hard's easiest task for a small model: the right order of adjectives."""
    rows = []
    for row in json.loads(sources.find("bbh", "hyperbaton.json").read_text())["examples"]:
        question, _, listed = row["input"].partition("\nOptions:")
        options = re.findall(r"\([A-Z]\) (.+)", listed)
        rows.append(_answered(f"Question: {question}", options, ord(row["target"][1]) - ord("A")))
    return rows


def _answered(question: str, options: Sequence[str], answer: int) -> Row:
    texts = [f" {option}" for option in options]
    return {"prompt": f"{question}\nAnswer:", "options": texts, "answer": answer}


DOMAINS: dict[str, Callable[[Path, Sources, int], None]] = {
    "spider": spider, "oran": oran, "causes": causes,
}  # fmt: skip
#: The set that each domain is made of, and those of everything else.
SETS_OF = {"spider": "spider", "oran": "oran-bench-13k", "causes": "wireshark-telecom"}
GENERAL_SETS = tuple(name for name in SETS if name not in SETS_OF.values())
GENERAL: dict[str, Callable[[Sources], list[Row]]] = {
    "lambada": lambada, "hellaswag": hellaswag, "arc_easy": arc_easy, "piqa": piqa, "bbh": bbh,
}  # fmt: skip
