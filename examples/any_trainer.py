"""Train a transformers model on a candidate store in a Trainer, as Stage 1 does by default.

python -m examples.any_trainer --model BASE --data-path corpus --store store --lr 1e-5 --save tuned
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from examples.any_loop import document_loss
from megatron_replay.data.corpus import Corpus
from megatron_replay.optim import MoClip
from megatron_replay.store import CandidateReader


class RestrictedLoss(torch.nn.Module):
    """A module, since DistributedDataParallel only sums gradients of what runs in its forward."""

    accepts_loss_kwargs = True  # Trainer counts the labels of a step for num_items_in_batch

    def __init__(self, model, corpus, reader):
        super().__init__()
        self.model, self.corpus, self.reader = model, corpus, reader

    def forward(self, document, labels, num_items_in_batch):
        """A document's share of the mean over all recorded positions of a step."""
        loss = document_loss(self.model, self.corpus[document].tokens, self.reader[document])
        return {"loss": loss / num_items_in_batch}


def main(argv=None):
    """Train for an epoch, in steps of 16 documents on each device; needs accelerate."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--data-path", "--store", "--save", "--lr"):
        parser.add_argument(name, required=True, type=float if name == "--lr" else str)
    args = parser.parse_args(argv)
    corpus, reader = Corpus(args.data_path), CandidateReader(args.store)
    reader.require(corpus_fingerprint=corpus.fingerprint)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    def collate(numbers):
        labels = corpus[numbers[0]].tokens[reader[numbers[0]].positions + 1]
        return {"document": numbers[0], "labels": torch.tensor(labels)}

    settings = TrainingArguments(
        args.save, num_train_epochs=1, per_device_train_batch_size=1, weight_decay=0.1,
        gradient_accumulation_steps=16, lr_scheduler_type="cosine", max_grad_norm=0.0,  # MoClip's
        logging_steps=1, save_strategy="no", report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(
        RestrictedLoss(model, corpus, reader), settings, collate, reader.stops().nonzero()[0],
        optimizer_cls_and_kwargs=(MoClip, {"lr": args.lr, "betas": (0.9, 0.95), "clip_grad": 1.0}),
    ).train()  # fmt: skip
    model.save_pretrained(args.save, is_main_process=settings.should_save)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.save)


if __name__ == "__main__":
    main()
