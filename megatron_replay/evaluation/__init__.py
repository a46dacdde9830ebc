"""What a fine-tuned model gained, what it kept, what it cost.

Evaluation sits beside the stages: it reads Hugging Face directories, corpora and stores, and never
imports megatron.
"""
