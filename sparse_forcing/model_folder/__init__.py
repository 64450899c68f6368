"""Model folders: defaults, parts, published sizes, conversion of original checkpoints"""
