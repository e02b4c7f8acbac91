"""One script for each quantization tool, run by the Python of that tool's own environment.

They import the tool and the standard library, never this project: `serving.models.quantize` hands
each a job as JSON (METHOD, folders, token ids) and copies the tokenizer itself.
"""
