"""Operators: one file each with its reference, fast paths and cost."""
