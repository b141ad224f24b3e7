"""Corpora: each gives Lhotse cuts for every split."""
