"""Measuring videos: against a reference run, over time, and in fine detail. `run.evaluate` does it all."""
