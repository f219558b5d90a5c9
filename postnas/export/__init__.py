"""Hybrids in other formats, one file each."""
