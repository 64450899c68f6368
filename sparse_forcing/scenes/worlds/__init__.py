"""Worlds in which something comes back: what the last frames show says where and when, only what needs memory.

``batch`` is the front door (``sample_worlds``, ``sample_mixture``); ``config`` holds the settings and imports no torch.
"""
