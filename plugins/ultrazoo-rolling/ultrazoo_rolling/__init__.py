"""Rolling-window attention with frame sinks: an attention for ultrazoo."""

__version__ = "0.1.0"
