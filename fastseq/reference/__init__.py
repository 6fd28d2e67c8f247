"""The executable specification: every operation's equations in NumPy, forward and backward.

One module a family, under the same stem as its kernels. Written to be read and to be right, never
to be fast: kernels, operators and modules are judged by what these functions give in float64.
"""
