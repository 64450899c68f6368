"""Training recipes, one file a stage"""
