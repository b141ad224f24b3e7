"""Lhotse data: corpora, preparation, batches."""
