"""export/ops: one small compiler from a record's torch expression to its other forms.

registry record --trace.py--> Expression --formula.py-------> text
                                        '--onnx_function.py-> ONNX function body
"""
