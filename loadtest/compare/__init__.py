"""`actuary compare`: variants under load in blocks that stand close together, judged with statistics."""
