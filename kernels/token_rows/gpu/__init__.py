"""Row operations in Triton"""
