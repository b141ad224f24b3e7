"""Objectives of pre-training: the corruption, the prediction and the loss."""
