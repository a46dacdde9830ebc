"""The parts of Stage 0: from documents to records, and from records to a finished store."""
