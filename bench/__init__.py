"""Measurements against named peers and limits, reported as ratios of one run."""
