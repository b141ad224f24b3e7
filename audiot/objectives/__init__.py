"""Objectives of pre-training: what is corrupted, what is predicted, the loss and its measures."""
