"""Captioned procedural videos: the data the embedded model learns from and is judged against.

``vocabulary`` names what a scene may contain, ``sample`` draws scenes, ``render`` turns them into
video, ``captions`` into text and back.  ``vocabulary`` and ``captions`` do not import torch.
"""
