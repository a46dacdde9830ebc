"""Scores against a float64 loop over single sequences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_replay.data.corpus import Document
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import DataError, StoreError
from megatron_replay.evaluation.choices import Choice, option_scores, read_choices, score_choices
from megatron_replay.evaluation.language_model import load_model, score
from megatron_replay.evaluation.measurements import candidate_mass
from tests.evaluation.site import (
    VOCAB_SIZE,
    candidates_of,
    random_candidates,
    random_documents,
    write_rows,
)


@pytest.fixture(scope="module")
def logprobs(site):
    """log p [L, V] of a sequence's next tokens, in float64."""
    model = AutoModelForCausalLM.from_pretrained(site / "base").double().eval()

    def logprobs(tokens):
        with torch.no_grad():
            return model(torch.tensor([[int(i) for i in tokens]])).logits[0].log_softmax(-1)

    return logprobs


@pytest.fixture(scope="module")
def model(site):
    return load_model(site / "base")


def random_choices(count: int) -> list[Choice]:
    """Prompts of few lengths, so that batches hold several; options of 1 to 6 tokens."""
    rng = np.random.default_rng(0)
    choices = []
    for number in range(count):
        lengths = rng.integers(1, 7, rng.integers(2, 5))
        choices.append(
            Choice(
                where=f"question {number}",
                prompt=rng.integers(0, VOCAB_SIZE, rng.integers(1, 4)).tolist(),
                options=[rng.integers(0, VOCAB_SIZE, n).tolist() for n in lengths],
                num_bytes=lengths.tolist(),
                answer=int(rng.integers(len(lengths))),
            )
        )
    return choices


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_equal_plain_loops(model, logprobs, batch_size):
    documents, losses, hits = random_documents(10), [], []
    for document in documents:
        of_document, tokens = logprobs(document.tokens), document.tokens.tolist()
        for t in np.flatnonzero(document.loss_mask[1:]):
            losses.append(-of_document[t, tokens[t + 1]].item())
            hits.append(int(of_document[t].argmax()) == tokens[t + 1])
    result = score(model, documents, batch_size=batch_size)
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert (result["tokens"], result["accuracy"]) == (len(hits), np.mean(hits))
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)

    choices, expected = random_choices(12), []
    for choice in choices:
        start, found = len(choice.prompt) - 1, []
        for option in choice.options:
            of_option = logprobs(choice.prompt + option)
            found.append(sum(of_option[start + i, t].item() for i, t in enumerate(option)))
        expected.append(pytest.approx(found, rel=1e-5))
    assert option_scores(model, choices, batch_size=batch_size) == expected
    raw = [int(np.argmax(row.expected)) for row in expected]
    per_byte = [int(np.argmax(np.array(row.expected) / choice.num_bytes))
                for row, choice in zip(expected, choices, strict=True)]  # fmt: skip
    assert raw != per_byte
    answers = np.array([choice.answer for choice in choices])
    result = score_choices(model, choices, batch_size=batch_size)
    assert (result["questions"], result["accuracy"]) == (12, result["correct"] / 12)
    assert result["correct"] == (answers == raw).sum()
    assert result["hits"] == "".join(str(int(hit)) for hit in answers == raw)
    assert result["correct_per_byte"] == (answers == per_byte).sum()


def test_first_of_equals_wins_and_no_number_is_wrong(site):
    model = load_model(site / "base")
    twins = [
        Choice(where="", prompt=[1], options=[[5, 6]] * 3, num_bytes=[2] * 3, answer=answer)
        for answer in range(3)
    ]
    assert score_choices(model, twins)["correct"] == score_choices(model, twins[:1])["correct"] == 1
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    assert score_choices(model, twins)["correct"] == 0


def test_a_single_option_is_right_if_it_is_the_greedy_continuation(model, logprobs):
    def alone(prompt: list[int], option: list[int]) -> Choice:
        return Choice(where="", prompt=prompt, options=[option], num_bytes=[2], answer=0)

    asked, expected = random_choices(3), ""  # of several options, beside them in a batch
    for prompt in ([1], [2], [3]):
        greedy: list[int] = []
        for _ in range(3):
            greedy.append(int(logprobs(prompt + greedy)[-1].argmax()))
        other = [*greedy[:2], (greedy[2] + 1) % VOCAB_SIZE]
        asked += [alone(prompt, greedy), alone(prompt, other), alone(prompt, greedy[:1])]
        expected += "101"
    assert score_choices(model, asked)["hits"][3:] == expected


def test_pieces_of_a_document_keep_every_label(model):
    pieces = Document(np.arange(50, dtype=np.int32), np.ones(50, np.bool_)).split(8)
    assert max(map(len, pieces)) == 8
    assert sum(int(piece.loss_mask.sum()) for piece in pieces) == 50
    assert score(model, pieces)["tokens"] == 49  # nothing predicts the first


class Documents(list[Document]):
    """Stands in for a corpus."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(document) for document in self], dtype=np.int32)


def test_candidate_mass_equals_a_plain_loop(model, logprobs):
    documents = Documents([*random_documents(4), random_documents(1, seed=9)[0]])
    rng = np.random.default_rng(1)
    store = [*(random_candidates(d, rng) for d in documents[:4]), candidates_of([], [])]
    outside, restricted, full = [], [], []
    for number in (0, 2, 4):  # three of five, evenly spaced
        document, candidates = documents[number], store[number]
        probabilities = logprobs(document.tokens).exp().numpy()
        for i, t in enumerate(candidates.positions):
            inside = candidates.ids[candidates.offsets[i] : candidates.offsets[i + 1]]
            label, mass = probabilities[t, document.tokens[t + 1]], probabilities[t, inside].sum()
            outside.append(1 - mass)
            restricted.append(-np.log(label / mass))
            full.append(-np.log(label))
    result = candidate_mass(model, documents, store, num_documents=3)
    means = {"outside_mass": outside, "restricted_loss": restricted, "full_loss": full}
    for name, values in means.items():
        assert result[name] == pytest.approx(np.mean(values), rel=1e-5)
    assert (result["positions"], result["documents"]) == (len(full), 3)
    positions = documents[0].eligible_positions().tolist()
    everything = candidates_of(positions, [list(range(VOCAB_SIZE))] * len(positions))
    result = candidate_mass(model, Documents(documents[:1]), [everything], num_documents=9)
    assert result["outside_mass"] == pytest.approx(0.0, abs=1e-6)
    assert result["restricted_loss"] == pytest.approx(result["full_loss"])


def document(*tokens: int, loss: bool = True) -> Document:
    return Document(np.array(tokens, np.int32), np.full(len(tokens), loss))


def choice(*options: list[int]) -> Choice:
    return Choice(where="q", prompt=[1, 2], options=list(options), num_bytes=[1, 1], answer=0)


NOTHING, FOREIGN = candidates_of([], []), candidates_of([0], [[0, VOCAB_SIZE]])
CONTEXT = r"longer than the model's context .*at most 512 tokens; found 513"
IDS = f"expected ids below {VOCAB_SIZE}; found {VOCAB_SIZE}"


@pytest.mark.parametrize(
    ("measure", "given", "message"),
    [
        (score, [document(*[0] * 514)], f"document 0: {CONTEXT}"),
        (score, [document(0, VOCAB_SIZE)], f"document 0: .*{IDS}"),
        (score, [document(0, 0, 0, loss=False)], "no token carries loss"),
        (option_scores, [choice([1], [2] * 512)], f"q: {CONTEXT}"),
        (option_scores, [choice([1], [VOCAB_SIZE])], f"q: .*{IDS}"),
        (candidate_mass, [NOTHING], r"another corpus \(expected 2; found 1\)"),
        (candidate_mass, [NOTHING] * 2, "no position is recorded in 2 documents"),
        (candidate_mass, [FOREIGN] * 2, IDS),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model, measure, given, message):
    corpus = [Documents(random_documents(2))] if measure is candidate_mass else []
    more = {"num_documents": 2} if corpus else {}
    with pytest.raises((DataError, StoreError), match=message):
        measure(model, *corpus, given, **more)


GOOD = {"prompt": "a?", "options": [" é", "bc"], "answer": 1}


def test_rows_are_tokenized_as_training_rows_are(site, tmp_path):
    tokenizer = load_tokenizer(site / "base")
    [choice] = read_choices(write_rows(tmp_path / "rows.jsonl", GOOD), tokenizer)
    assert tokenizer.decode(choice.prompt) == "a?"
    assert [tokenizer.decode(option) for option in choice.options] == [" é", "bc"]
    assert (choice.num_bytes, choice.answer) == ([3, 2], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": []}, "no options"),
        ({"options": "bc"}, "'options' has the wrong type"),
        ({"options": ["b", 1]}, "'options' has the wrong type (expected a string"),
        ({"options": ["b", ""]}, "option 1 is empty"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"answer": 2}, "'answer' names no option (expected a number from 0 to 1; found 2"),
        ({"answer": -1}, "found -1"),
        ({"answer": True}, "found True"),
        ({"answer": "1"}, "found '1'"),
        ({"answer": None}, "found none"),
    ],
)
def test_bad_rows(site, tmp_path, change, message):
    path, tokenizer = (
        write_rows(tmp_path / "rows", GOOD, GOOD | change),
        load_tokenizer(site / "base"),
    )
    with pytest.raises(DataError) as caught:
        read_choices(path, tokenizer)
    assert "rows:2: " in str(caught.value)
    assert message in str(caught.value)
    with pytest.raises(DataError, match="no questions"):
        read_choices(write_rows(path), tokenizer)
