"""VBench's quality dimensions: how a video looks and moves, whatever it shows"""
