"""models/: from a formula to a trained checkpoint (torch and transformers live here).

`activations.py` is the file to open first. The door is kept empty so that `models.cli` can print
its help without importing torch.
"""
