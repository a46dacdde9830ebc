"""Train a transformers model on a candidate store in a plain loop, as Stage 1 does by default.

python -m examples.any_loop --model BASE --data-path corpus --store store --lr 1e-5 --save tuned
"""

import argparse

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_replay.data.corpus import Corpus
from megatron_replay.functional import restricted_cross_entropy
from megatron_replay.optim import MoClip
from megatron_replay.store import CandidateReader


def document_loss(model, tokens, recorded):
    """Sum of the loss at the N recorded positions, on which later tokens have no effect."""
    inputs = torch.tensor(tokens[None, : recorded.stop], device=model.device)
    hidden_NH = model.base_model(inputs).last_hidden_state[0, recorded.positions]
    weight_VH = model.get_output_embeddings().weight
    ids, offsets = torch.tensor(recorded.ids), torch.tensor(recorded.offsets)
    labels_N = torch.tensor(tokens[recorded.positions + 1], dtype=torch.int64)
    return restricted_cross_entropy(hidden_NH, weight_VH, ids, offsets, labels_N).sum()


def main(argv=None):
    """Train for an epoch, in steps of 16 documents: Stage 1 with --no-pack-documents."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--data-path", "--store", "--save", "--lr"):
        parser.add_argument(name, required=True, type=float if name == "--lr" else str)
    args = parser.parse_args(argv)
    corpus, reader = Corpus(args.data_path), CandidateReader(args.store)
    reader.require(corpus_fingerprint=corpus.fingerprint)
    documents = reader.stops().nonzero()[0]  # those with a recorded position
    steps = DataLoader(documents, batch_size=16, shuffle=True, collate_fn=list)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}
    vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    optimizer = MoClip([matrices, vectors], args.lr, betas=(0.9, 0.95), clip_grad=1.0)
    scheduler = CosineAnnealingLR(optimizer, T_max=len(steps))
    for numbers in steps:
        recorded, mean = reader.read(numbers), 0.0  # over all recorded positions of the step
        for number, record in zip(numbers, recorded.documents(), strict=True):
            loss = document_loss(model, corpus[number].tokens, record) / len(recorded.positions)
            loss.backward()
            mean += loss.item()
        optimizer.step()
        print(f"loss {mean:.4f}, gradient norm {optimizer.grad_norm:.4f}")
        optimizer.zero_grad()
        scheduler.step()
    for part in (model, AutoTokenizer.from_pretrained(args.model)):
        part.save_pretrained(args.save)


if __name__ == "__main__":
    main()
