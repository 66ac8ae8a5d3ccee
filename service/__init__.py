"""The serving room: bundles in, probabilities over HTTP out. Never imports torch or transformers."""
