"""The source documents' claims, measured: one file per claim, each with a verdict. `actuary study NAME|all`."""
