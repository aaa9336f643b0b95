"""lm-eval on models with an intact prefix: the model type `intactkv`, tasks over local files, and paired comparison.

Needs lm-eval (`pip install 'intactkv[eval]'`).
"""
