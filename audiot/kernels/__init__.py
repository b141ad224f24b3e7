"""Triton kernels, each beside the name of its plain form, and operators that `torch.compile` leaves as they are."""
