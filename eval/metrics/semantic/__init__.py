"""VBench's semantic dimensions: whether a video shows what its prompt says"""
