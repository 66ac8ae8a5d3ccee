"""A transformers folder -> CTranslate2's, in float32 or int8.

python loadtest/rivals/to_ctranslate2.py MODEL OUT float32|int8
"""

from __future__ import annotations

import sys

from ctranslate2.converters import TransformersConverter

model, out, precision = sys.argv[1:]
TransformersConverter(model).convert(out, quantization=precision, force=True)
