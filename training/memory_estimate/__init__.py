"""Memory of a training stage, computed before anything is allocated"""
