"""What a fine-tuned model gained, what it kept, what it cost.

Evaluation is separate from the stages: it reads Hugging Face directories, corpora and stores, and
never imports megatron.
"""
