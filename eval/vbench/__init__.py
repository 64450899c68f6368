"""VBench as published: its prompts, preparation of frames, score arithmetic, detectors and networks"""
