"""Block-sparse attention in Triton"""
