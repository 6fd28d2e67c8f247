"""CPU kernels written in Numba: one file per family, and `native.py`, what they share."""
