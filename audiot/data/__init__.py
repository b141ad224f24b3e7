"""Data with Lhotse: corpora, preparation and batches."""
