"""Modules shared by several families."""
