"""export/: from a checkpoint to an ONNX bundle (torch stops here).

`bundle.py` is the format that the service reads, and needs no torch; `exporter.py` writes it.
"""
