"""What surrounds the training loop: optimisation, callbacks, interrupts, compilation, several processes."""
