"""Learning on one batch, for tests."""

from __future__ import annotations


def losses_of(module, batch, optimizer, steps):
    """The loss before each of some steps of an optimiser."""
    losses = []
    for _ in range(steps):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
