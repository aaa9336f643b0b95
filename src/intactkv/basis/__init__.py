"""Are a quantized model's keys and values the full model's, and if not, what takes one to the other?"""
