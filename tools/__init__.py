"""Command-line tools and their Python interfaces."""
