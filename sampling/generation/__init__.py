"""From prompts to files: settings, jobs, outputs, and the function behind `sparse-forcing generate`"""
