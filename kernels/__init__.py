"""Compiled kernels; installed as `fastseq.kernels`. See README.md beside this file."""
