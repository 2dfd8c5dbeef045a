"""Operators: one file each with its reference, fast paths and cost; Triton kernels in ``_<op>_kernels.py``."""
