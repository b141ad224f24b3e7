"""Objectives of pre-training: what is corrupted, what is predicted, and the loss."""
