"""Stage 0 as a program: one store, whatever the layout, the batch, or the interruptions."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_replay.collection import collector
from megatron_replay.data.corpus import Corpus
from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateReader, CandidateWriter
from megatron_replay.store.manifest import index_path
from megatron_replay.store.merge import merge_parts
from tests import tiny
from tests.e2e import stages

pytestmark = pytest.mark.distributed
LAYOUTS = [{"tp": 2}, {"tp": 4}, {"tp": 4, "pp": 2}, {"tp": 2, "dp": 2}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage0")
    tiny.save_corpus(folder / "corpus", num_documents=40, stems=3)
    tiny.save_qwen3(folder / "model", tied=False)
    odd = {"vocab_size": 513, "num_hidden_layers": 3}  # neither TP nor PP divides them
    tiny.save_qwen3(folder / "exact", tied=False, rms_norm_eps=1e-30, **odd)
    _make_exact(folder / "exact" / "model.safetensors")
    return folder


def _make_exact(weights) -> None:
    """Weights for which every logit is exact in fp32, in any order of summation.

    Attention and MLP add zero; embeddings are +-1, so RMSNorm (eps ~ 0, weight 1) leaves them; the
    output layer holds small multiples of 1/64. Then all layouts compute bitwise equal logits, with
    many ties, and the stores must be equal to the byte.
    """
    tensors = load_file(weights)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif name == "model.norm.weight":
            tensor.fill_(1)
        elif name == "model.embed_tokens.weight":
            tensor.copy_(torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1)
        elif name == "lm_head.weight":
            tensor.copy_(torch.randint(-40, 41, tensor.shape, generator=generator) / 64)
    save_file(tensors, weights, {"format": "pt"})


def argv(folder, store, *extra, model="exact") -> list[object]:
    """Flags that make 3 shards."""
    return [
        "--load", folder / model, "--data-path", folder / "corpus", "--seq-length", 64,
        "--store", store, "--documents-per-shard", 16, *extra,
    ]  # fmt: skip


def collect(folder, store, *extra, model="exact", **layout) -> str:
    return stages.succeed("stage0", *argv(folder, store, *extra, model=model), **layout)


def _cut_logits_into_small_chunks(rank: int) -> None:
    collector.LOGITS_CHUNK_SIZE = 7


@pytest.mark.parametrize("strategy", ["bucket", "random"])
def test_stores_are_byte_identical_for_equal_logits(folder, tmp_path, strategy):
    reference = tmp_path / "reference"
    flags = ["--position-strategy", strategy]
    collect(folder, reference, *flags)
    for layout in ({}, {"tp": 2}) if strategy == "bucket" else ():
        alone = tmp_path / f"alone{len(layout)}"
        collect(folder, alone, *flags, "--no-share-prefixes", **layout)
        stages.same_tree(alone, reference)
    reader = CandidateReader(reference)
    sizes = np.concatenate([np.diff(reader[i].offsets) for i in range(len(reader))])
    assert len(np.unique(sizes)) > 20  # the sets are worth comparing
    for layout in LAYOUTS if strategy == "bucket" else LAYOUTS[2:3]:
        store = tmp_path / "-".join(f"{k}{v}" for k, v in layout.items())
        printed = collect(folder, store, *flags, **layout)
        stages.same_tree(store, reference)
        if "dp" in layout:  # replicas share the work: shards 0 and 2 of 16, 16 and 8 documents
            assert "24/24 documents (1 of 2 replicas)" in printed
    collect(folder, tmp_path / "batches", *flags, "--micro-batch-size", 3)
    stages.same_tree(tmp_path / "batches", reference)
    if strategy == "random":
        return  # positions are drawn before logits are computed
    collect(folder, tmp_path / "chunks", *flags, before=_cut_logits_into_small_chunks)
    stages.same_tree(tmp_path / "chunks", reference)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 4, "pp": 2}], ids=str)
def test_sets_of_a_real_model_differ_only_by_rounding(folder, tmp_path, layout):
    """Where a layout, or a shared prefix, rounds logits otherwise, a set may gain or lose a token
    at the very cut.
    """
    flags = ["--position-strategy", "all", "--coverage", 0.4]
    collect(folder, tmp_path / "a", *flags, "--no-share-prefixes", model="model")
    collect(folder, tmp_path / "b", *flags, model="model", **layout)
    a, b = CandidateReader(tmp_path / "a"), CandidateReader(tmp_path / "b")
    differing = total = 0
    for i in range(len(a)):
        assert np.array_equal(a[i].positions, b[i].positions)
        assert np.allclose(a[i].tail_mass, b[i].tail_mass, atol=1e-3)  # stored in fp16
        for t in range(len(a[i].positions)):
            ours = set(a[i].ids[a[i].offsets[t] : a[i].offsets[t + 1]].tolist())
            theirs = set(b[i].ids[b[i].offsets[t] : b[i].offsets[t + 1]].tolist())
            total += 1
            differing += ours != theirs
            assert len(ours ^ theirs) <= 2
    assert total > 100
    assert differing <= 0.02 * total


@dataclass(frozen=True)
class Mortal:
    """Logs which shards are begun; kills its rank after the ``step``-th, before the next."""

    log: Path
    step: int
    seconds: float

    def __call__(self, rank: int) -> None:
        begin, begun = CandidateWriter.shard, 0

        def logged(writer: CandidateWriter, number: int):
            nonlocal begun
            begun += 1
            if begun == self.step + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            with open(self.log, "a") as log:  # one write: lines of several ranks do not mix
                log.write(f"{number}\n")
            if begun == self.step:
                threading.Timer(self.seconds, os.kill, [os.getpid(), signal.SIGKILL]).start()
            return begin(writer, number)

        CandidateWriter.shard = logged


def test_killed_again_and_again_under_changing_layouts(folder, tmp_path):
    """One rank dies, the others are killed for it. At most one shard a rank is done twice."""
    small = ["--documents-per-shard", 1]
    collect(folder, tmp_path / "whole", *small)
    store, draw, there = tmp_path / "store", random.Random(0), set()
    for deaths, layout in enumerate([{"dp": 2}, {"dp": 3}, {"tp": 2, "dp": 2}, {}, {"dp": 2}]):
        mortal = Mortal(tmp_path / f"log-{deaths}", draw.randint(1, 4), draw.uniform(0, 0.02))
        with pytest.raises(AssertionError, match="died, exit code -9"):
            collect(folder, store, *small, before=mortal, **layout)
        begun = [int(line) for line in mortal.log.read_text().split()]
        published = {int(path.stem.split("-")[1]) for path in store.rglob("*.idx")} - there
        assert there.isdisjoint(begun)  # what was there is not done again
        assert len(begun) == len(set(begun))
        assert published <= set(begun)
        assert 0 <= len(begun) - len(published) <= layout.get("dp", 1)
        there |= published
    assert 5 <= len(there) < 40
    collect(folder, store, *small, dp=2)
    stages.same_tree(store, tmp_path / "whole")


def _limit(size: int, rank: int) -> None:
    """No file may grow beyond ``size`` once the first shard is begun."""
    begin = CandidateWriter.shard

    def begin_limited(writer: CandidateWriter, number: int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return begin(writer, number)

    CandidateWriter.shard = begin_limited


def test_a_full_disk_is_reported_and_the_rerun_goes_on(folder, tmp_path):
    """The kernel refuses to let a file grow: shards 0 and 1 are larger than shard 2."""
    collect(folder, tmp_path / "whole")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "whole").rglob("*.bin"))]
    assert sizes[2] < min(sizes[:2])

    store = tmp_path / "store"
    limit = partial(_limit, sizes[2] + 100)
    message = stages.fail("stage0", *argv(folder, store), code=6, before=limit)
    assert "shard-0000000.bin: cannot write: File too large" in message
    assert {path.name for path in store.rglob("*") if path.is_file()} == {".lock", "store.json"}
    collect(folder, store)
    stages.same_tree(store, tmp_path / "whole")


def test_stored_logits_are_the_model_s(folder, tmp_path):
    stored = {}
    for kind in ("fp16", "bf16"):
        collect(folder, tmp_path / kind, "--store-logits", kind, tp=2)
        stored[kind] = CandidateReader(tmp_path / kind)[0]
    document = stored["fp16"]
    logits = document.logits[: document.offsets[1]].astype(np.float64)
    inside = np.log(np.exp(logits).sum())
    assert inside - document.lse[0] == pytest.approx(np.log1p(-document.tail_mass[0]), abs=2e-2)
    # Multiples of 1/64 below 64: exact in fp16, so bf16 is what rounding makes of them.
    rounded = torch.from_numpy(document.logits).bfloat16().float()
    assert np.array_equal(stored["bf16"].logits, rounded.numpy())
    assert not np.array_equal(stored["bf16"].logits, document.logits)


def test_the_report_is_of_the_whole_store_and_the_cost_of_this_run(folder, tmp_path):
    """Tallied by two model copies, printed by the last stage; one shard was there already."""
    store = tmp_path / "store"
    collect(folder, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", store)
    for path in (store / "manifest.json", index_path(store, 1), store / "report.json"):
        path.unlink()
    printed = collect(folder, store, pp=2, dp=2)
    facts = json.loads((store / "report.json").read_text())
    reader = CandidateReader(store)
    sizes = np.concatenate([np.diff(document.offsets) for document in reader])
    tails = np.concatenate([document.tail_mass for document in reader])
    assert facts["documents"] == 40
    assert facts["positions"] == len(sizes)
    assert facts["set_size"]["mean"] == pytest.approx(sizes.mean())
    assert facts["coverage"]["mean"] == pytest.approx(1 - tails.mean(dtype=np.float64))
    assert printed.count("|S|: mean") == printed.count("cost: ") == 1
    cost = json.loads((store / "cost.json").read_text())
    lengths = Corpus(folder / "corpus").lengths[16:32]
    assert (cost["shards"], cost["documents"], cost["replicas"]) == (1, 16, 2)
    assert cost["positions"] == (lengths - 1).sum()
    assert f"{cost['positions']:,} positions of 16 documents, {cost['computed']:,} of" in printed
    assert 0 <= cost["share_waiting_for_disk"] <= 1
    stages.same_tree(store, tmp_path / "whole")

    collect(folder, store)  # nothing left to do: the cost stays what it was
    assert json.loads((store / "cost.json").read_text()) == cost


def test_the_cost_counts_a_prefix_of_a_shard_once(folder, tmp_path):
    """In micro-batches of a whole shard, by one model copy or two."""
    corpus, nodes = Corpus(folder / "corpus"), set()
    for number in range(len(corpus)):
        tokens = corpus[number].tokens[: corpus.first_labels[number] - 1].tolist()
        nodes |= {(number // 16, *tokens[:stop]) for stop in range(1, len(tokens) + 1)}
    labelled = int((corpus.lengths - corpus.first_labels).sum())
    positions, computed = int((corpus.lengths - 1).sum()), len(nodes) + labelled
    assert computed < 0.8 * positions
    for dp in (1, 2):
        printed = collect(folder, tmp_path / f"{dp}", "--micro-batch-size", 16, dp=dp)
        cost = json.loads((tmp_path / f"{dp}" / "cost.json").read_text())
        assert (cost["positions"], cost["computed"]) == (positions, computed)
        assert cost["computed_share"] == computed / positions
        assert (
            f"cost: {positions:,} positions of 40 documents, {computed:,} of them computed "
            f"({computed / positions:.1%})"
        ) in printed


@pytest.mark.parametrize("share", ["--share-prefixes", "--no-share-prefixes"])
def test_a_dry_run_predicts_what_is_computed(folder, tmp_path, capsys, share):
    """Every shard is planned, in micro-batches that cut trees."""
    printed = stages.dry_run(capsys, "stage0", *argv(folder, tmp_path / "store", share))
    collect(folder, tmp_path / "store", share)
    cost = json.loads((tmp_path / "store" / "cost.json").read_text())
    assert (cost["computed_share"] < 0.9) == (share == "--share-prefixes")
    of_shard = f"{cost['positions'] / 3:,.0f}, mean over 3 of 3"
    assert printed["positions of a shard"].strip() == of_shard
    of_shard = f"{cost['computed'] / 3:,.0f} ({cost['computed_share']:.1%})"
    assert printed["computed"].strip() == of_shard


def test_parts_written_in_two_places_merge_into_the_whole(folder, tmp_path):
    collect(folder, tmp_path / "whole", dp=2)
    printed = collect(folder, tmp_path / "one", "--shards", "0:1", dp=2)
    assert "--shards 0:1 is done; others are missing" in printed
    collect(folder, tmp_path / "two", "--shards", "1:3")
    with pytest.raises(StoreError, match="unfinished: 2 of 3 shards"):
        CandidateReader(tmp_path / "two")
    merge_parts([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    for path in (tmp_path / "merged").rglob("*.*"):
        if path.suffix in (".bin", ".idx", ".json"):
            relative = path.relative_to(tmp_path / "merged")
            assert path.read_bytes() == (tmp_path / "whole" / relative).read_bytes(), relative
