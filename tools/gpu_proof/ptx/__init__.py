"""A machine for compiled PTX, and the ways in which Triton's launches and those of csrc come to it."""
