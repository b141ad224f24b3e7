"""Predictions over HTTP: a web page and a JSON API of a fine-tuned model."""
