"""Doors to other libraries. torchdiffeq and torchsde take `ProbabilityFlow` and `ReverseSDE` as they are."""
