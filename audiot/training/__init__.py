"""The parts around the training loop: optimisation, callbacks, interrupts, compilation, several processes."""
