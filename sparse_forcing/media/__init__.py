"""Video files, still pictures and grids of videos, read within bounds and written whole or not at all"""
