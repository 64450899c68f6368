"""The training loop and what it stands on: checkpoints, resume, guard, parallel processes, optimizers"""
