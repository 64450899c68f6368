"""Block selection in Triton"""
