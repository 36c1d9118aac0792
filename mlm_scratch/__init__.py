"""Masked-language-model training written out by hand.

Read in this order: masking.py -> loader.py -> model.py -> loop.py -> fill_mask.py.
"""
