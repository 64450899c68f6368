"""The caption checker's eyes: objects found in the pixels of a synthetic clip, and the names of their motions"""
