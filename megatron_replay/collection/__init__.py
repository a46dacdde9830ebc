"""The parts of Stage 0: from documents to records, and from records to a finished store."""

#: Positions whose logits exist at one time.
LOGITS_CHUNK_SIZE = 1024
