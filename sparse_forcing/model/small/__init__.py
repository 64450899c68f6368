"""For small GPUs: weights in 8 bits, a decoder in tiles, and a tiny one"""
