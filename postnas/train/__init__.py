"""Alignment of candidates and distillation of hybrids, on one loop that resumes exactly."""
