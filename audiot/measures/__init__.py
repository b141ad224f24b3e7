"""Measures without a trained task: how well hidden states tell phones apart, and how much their clusters say of phones."""
